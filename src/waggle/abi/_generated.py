"""What BPF programs and agent share. Generated from BTF by tools/generate_abi.py; do not edit."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, NamedTuple


class Address:
    """struct wag_addr: 16 bytes, IPv4 as ::ffff:a.b.c.d. Plain bytes in Python."""


class U32:
    """A 32-bit number in host byte order."""


class U64:
    """A 64-bit number in host byte order."""


def _swap16(port: int) -> int:
    return (port & 0xFF) << 8 | port >> 8


class EventKind(IntEnum):
    """enum wag_event_kind."""

    DROP = 1
    FLOW = 2


class Counter(IntEnum):
    """enum wag_counter."""

    EVENTS_LOST = 0
    SOCKET_LB = 1
    PACKET_LB = 2
    UDP_SLOT = 3
    MAX = 8


class Verdict(IntEnum):
    """enum wag_verdict."""

    PASS = 0
    TO_POD = 1
    TO_WIRE = 2
    DROP = 3


class Reason(IntEnum):
    """enum wag_reason."""

    NONE = 0
    MALFORMED = 1
    NO_BACKEND = 2
    FRAGMENT = 3
    NAT_PORTS = 4
    NAT_FULL = 5
    REWRITE = 6
    NO_NODE_IP = 7
    STALE_BACKEND = 8
    MAX = 16


class Hook(IntEnum):
    """enum wag_hook."""

    SOCKET = 0
    POD_EGRESS = 1
    POD_INGRESS = 2
    NODE_INGRESS = 3
    NODE_EGRESS = 4
    MAX = 8


class EndpointFlag(IntFlag):
    """enum wag_endpoint_flag."""

    POD = 1
    NODE = 2


class ServiceFlag(IntFlag):
    """enum wag_service_flag."""

    NODEPORT = 1


class NatFlag(IntFlag):
    """enum wag_nat_flag."""

    FORWARD = 1
    CLOSING = 2


EVENT_SIZE = 88
_EVENT = Struct("=QQQ16s16s16sHHHBBBB2xI")


class Event(NamedTuple):
    """struct wag_event: 88 bytes."""

    time_ns: int
    netns: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    src: bytes
    dst: bytes
    backend: bytes
    sport: int
    dport: int
    bport: int
    proto: int
    kind: int
    hook: int
    reason: int
    ifindex: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.time_ns,
            self.netns,
            self.count,
            self.src,
            self.dst,
            self.backend,
            _swap16(self.sport),
            _swap16(self.dport),
            _swap16(self.bport),
            self.proto,
            self.kind,
            self.hook,
            self.reason,
            self.ifindex,
        )

    def pack(self) -> bytes:
        return _EVENT.pack(
            self.time_ns,
            self.netns,
            self.count,
            self.src,
            self.dst,
            self.backend,
            _swap16(self.sport),
            _swap16(self.dport),
            _swap16(self.bport),
            self.proto,
            self.kind,
            self.hook,
            self.reason,
            self.ifindex,
        )

    @classmethod
    def of(cls, *v: Any) -> Event:
        return cls(
            v[0],
            v[1],
            v[2],
            v[3],
            v[4],
            v[5],
            _swap16(v[6]),
            _swap16(v[7]),
            _swap16(v[8]),
            v[9],
            v[10],
            v[11],
            v[12],
            v[13],
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Event:
        return cls.of(*_EVENT.unpack(raw))


ENDPOINT_SIZE = 24
_ENDPOINT = Struct("=II6s6sI")


class Endpoint(NamedTuple):
    """struct wag_endpoint: 24 bytes."""

    ifindex: int
    flags: int
    pod_mac: bytes
    host_mac: bytes
    nat_used: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.ifindex,
            self.flags,
            self.pod_mac,
            self.host_mac,
            self.nat_used,
        )

    def pack(self) -> bytes:
        return _ENDPOINT.pack(self.ifindex, self.flags, self.pod_mac, self.host_mac, self.nat_used)

    @classmethod
    def of(cls, *v: Any) -> Endpoint:
        return cls(v[0], v[1], v[2], v[3], v[4])

    @classmethod
    def unpack(cls, raw: bytes) -> Endpoint:
        return cls.of(*_ENDPOINT.unpack(raw))


FLOW_KEY_SIZE = 64
_FLOW_KEY = Struct("=Q16s16s16sHHBB2x")


class FlowKey(NamedTuple):
    """struct wag_flow_key: 64 bytes."""

    netns: int
    src: bytes
    frontend: bytes
    backend: bytes
    fport: int
    bport: int
    proto: int
    hook: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.netns,
            self.src,
            self.frontend,
            self.backend,
            _swap16(self.fport),
            _swap16(self.bport),
            self.proto,
            self.hook,
        )

    def pack(self) -> bytes:
        return _FLOW_KEY.pack(
            self.netns,
            self.src,
            self.frontend,
            self.backend,
            _swap16(self.fport),
            _swap16(self.bport),
            self.proto,
            self.hook,
        )

    @classmethod
    def of(cls, *v: Any) -> FlowKey:
        return cls(v[0], v[1], v[2], v[3], _swap16(v[4]), _swap16(v[5]), v[6], v[7])

    @classmethod
    def unpack(cls, raw: bytes) -> FlowKey:
        return cls.of(*_FLOW_KEY.unpack(raw))


FLOW_SIZE = 16
_FLOW = Struct("=QQ")


class Flow(NamedTuple):
    """struct wag_flow: 16 bytes."""

    count: int  # type: ignore[assignment]  # tuple has a method of this name
    emitted_ns: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.count,
            self.emitted_ns,
        )

    def pack(self) -> bytes:
        return _FLOW.pack(self.count, self.emitted_ns)

    @classmethod
    def of(cls, *v: Any) -> Flow:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> Flow:
        return cls.of(*_FLOW.unpack(raw))


SERVICE_KEY_SIZE = 24
_SERVICE_KEY = Struct("=16sHB5x")


class ServiceKey(NamedTuple):
    """struct wag_service_key: 24 bytes."""

    addr: bytes
    port: int
    proto: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.addr,
            _swap16(self.port),
            self.proto,
        )

    def pack(self) -> bytes:
        return _SERVICE_KEY.pack(self.addr, _swap16(self.port), self.proto)

    @classmethod
    def of(cls, *v: Any) -> ServiceKey:
        return cls(v[0], _swap16(v[1]), v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> ServiceKey:
        return cls.of(*_SERVICE_KEY.unpack(raw))


SERVICE_SIZE = 16
_SERVICE = Struct("=IIII")


class Service(NamedTuple):
    """struct wag_service: 16 bytes."""

    offset: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    revision: int
    flags: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.offset,
            self.count,
            self.revision,
            self.flags,
        )

    def pack(self) -> bytes:
        return _SERVICE.pack(self.offset, self.count, self.revision, self.flags)

    @classmethod
    def of(cls, *v: Any) -> Service:
        return cls(v[0], v[1], v[2], v[3])

    @classmethod
    def unpack(cls, raw: bytes) -> Service:
        return cls.of(*_SERVICE.unpack(raw))


BACKEND_SIZE = 24
_BACKEND = Struct("=16sHH4x")


class Backend(NamedTuple):
    """struct wag_backend: 24 bytes."""

    addr: bytes
    port: int
    flags: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.addr,
            _swap16(self.port),
            self.flags,
        )

    def pack(self) -> bytes:
        return _BACKEND.pack(self.addr, _swap16(self.port), self.flags)

    @classmethod
    def of(cls, *v: Any) -> Backend:
        return cls(v[0], _swap16(v[1]), v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> Backend:
        return cls.of(*_BACKEND.unpack(raw))


TUPLE_SIZE = 40
_TUPLE = Struct("=16s16sHHB3x")


class Tuple(NamedTuple):
    """struct wag_tuple: 40 bytes."""

    src: bytes
    dst: bytes
    sport: int
    dport: int
    proto: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.src,
            self.dst,
            _swap16(self.sport),
            _swap16(self.dport),
            self.proto,
        )

    def pack(self) -> bytes:
        return _TUPLE.pack(self.src, self.dst, _swap16(self.sport), _swap16(self.dport), self.proto)

    @classmethod
    def of(cls, *v: Any) -> Tuple:
        return cls(v[0], v[1], _swap16(v[2]), _swap16(v[3]), v[4])

    @classmethod
    def unpack(cls, raw: bytes) -> Tuple:
        return cls.of(*_TUPLE.unpack(raw))


NAT_SIZE = 56
_NAT = Struct("=16s16sHHB3xIIQ")


class Nat(NamedTuple):
    """struct wag_nat: 56 bytes."""

    to: Tuple
    revision: int
    flags: int
    seen_ns: int

    def values(self) -> tuple[Any, ...]:
        return (
            *self.to.values(),
            self.revision,
            self.flags,
            self.seen_ns,
        )

    def pack(self) -> bytes:
        return _NAT.pack(*self.to.values(), self.revision, self.flags, self.seen_ns)

    @classmethod
    def of(cls, *v: Any) -> Nat:
        return cls(Tuple.of(v[0], v[1], v[2], v[3], v[4]), v[5], v[6], v[7])

    @classmethod
    def unpack(cls, raw: bytes) -> Nat:
        return cls.of(*_NAT.unpack(raw))


#: map → (type of the key, type of the value); None where the map has none
MAPS: dict[str, tuple[Any, Any]] = {
    "wag_backends": (U32, Backend),
    "wag_counters": (U32, U64),
    "wag_drops": (U32, U64),
    "wag_endpoints": (Address, Endpoint),
    "wag_events_rb": (None, None),
    "wag_flows": (FlowKey, Flow),
    "wag_nat": (Tuple, Nat),
    "wag_services": (ServiceKey, Service),
}

#: load-time constant → what it means
CONFIG: dict[str, str] = {
    "wag_event_ns": "shortest time between two events of one flow, in nanoseconds",
    "wag_events": "1: Service translations are aggregated per flow and emitted as events",
    "wag_host_cookie": "cookie of the node's network namespace: its sockets may use 127.0.0.1:nodePort",
    "wag_node_ip4": "IPv4 address of this node: source of SNAT; all zero when it has none",
    "wag_node_ip6": "IPv6 address of this node: source of SNAT; all zero when it has none",
    "wag_snat_max": "highest source port that SNAT picks",
    "wag_snat_min": "lowest source port that SNAT picks when the client's own is taken",
}

#: object → load-time constant → (offset, size) in .rodata
CONFIG_LAYOUT: dict[str, dict[str, tuple[int, int]]] = {
    "socket": {
        "wag_event_ns": (48, 8),
        "wag_events": (40, 1),
        "wag_host_cookie": (32, 8),
        "wag_node_ip4": (0, 16),
        "wag_node_ip6": (16, 16),
        "wag_snat_max": (44, 2),
        "wag_snat_min": (42, 2),
    },
    "pod": {
        "wag_event_ns": (48, 8),
        "wag_events": (40, 1),
        "wag_host_cookie": (32, 8),
        "wag_node_ip4": (0, 16),
        "wag_node_ip6": (16, 16),
        "wag_snat_max": (44, 2),
        "wag_snat_min": (42, 2),
    },
    "node": {
        "wag_event_ns": (48, 8),
        "wag_events": (40, 1),
        "wag_host_cookie": (32, 8),
        "wag_node_ip4": (0, 16),
        "wag_node_ip6": (16, 16),
        "wag_snat_max": (44, 2),
        "wag_snat_min": (42, 2),
    },
}
