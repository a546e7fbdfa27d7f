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
    POLICY = 3
    MAX = 4


class Outcome(IntEnum):
    """enum wag_outcome."""

    FORWARDED = 1
    DROPPED = 2
    REJECTED = 3
    AUDIT = 4


class Direction(IntEnum):
    """enum wag_direction."""

    NONE = 0
    INGRESS = 1
    EGRESS = 2


class EventsOf(IntEnum):
    """enum wag_events_of."""

    OFF = 0
    SERVICES = 1
    ALL = 2


class Counter(IntEnum):
    """enum wag_counter."""

    EVENTS_LOST = 0
    SOCKET_LB = 1
    PACKET_LB = 2
    UDP_SLOT = 3
    MASQUERADE = 4
    DSR = 5
    NAME_LEARNED = 6
    NAME_ENTRY = 7
    NAME_SLOT = 8
    NAME_UNREADABLE = 9
    NAME_REFUSED = 10
    MAX = 16


class Verdict(IntEnum):
    """enum wag_verdict."""

    PASS = 0
    TO_POD = 1
    TO_WIRE = 2
    DROP = 3
    REJECT = 4
    NEXT = 5
    SEND_BACK = 6


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
    NO_LOCAL_BACKEND = 9
    SOURCE_RANGE = 10
    NO_PORT = 11
    FREE_ADDRESS = 12
    TOO_BIG = 13
    EXPIRED = 14
    NO_ROUTE = 15
    POLICY_INGRESS = 16
    POLICY_EGRESS = 17
    POLICY_PENDING = 18
    SPOOFED = 19
    NODE_POLICY_INGRESS = 20
    NODE_POLICY_EGRESS = 21
    MAX = 32


class Hook(IntEnum):
    """enum wag_hook."""

    SOCKET = 0
    POD_EGRESS = 1
    POD_INGRESS = 2
    NODE_INGRESS = 3
    NODE_EGRESS = 4
    XDP = 5
    MAX = 8


class EndpointFlag(IntFlag):
    """enum wag_endpoint_flag."""

    POD = 1
    NODE = 2
    NODEPORT = 4
    QUEUED = 8


class NetnsId(IntEnum):
    """enum wag_netns_id."""

    NODE = -1
    UNKNOWN = -2


class ServiceFlag(IntFlag):
    """enum wag_service_flag."""

    NODEPORT = 1
    HAS_EXTERNAL = 2
    KEEP_CLIENT = 4
    EMPTY_DROP = 8
    DSR = 32
    BY_HASH = 16
    HOST_PORT = 256
    HELD = 512


class Scope(IntEnum):
    """enum wag_scope."""

    INTERNAL = 0
    EXTERNAL = 1


class NatFlag(IntFlag):
    """enum wag_nat_flag."""

    FORWARD = 1
    CLOSING = 2
    TUNNEL = 4
    ALONE = 8
    ANSWERED = 16
    RESET = 64
    CONFIRMED = 32


class VipFlag(IntFlag):
    """enum wag_vip_flag."""

    CLUSTER_IP = 1


class PolicyFlag(IntFlag):
    """enum wag_policy_flag."""

    ALLOW = 1
    AUDIT = 2
    LOST = 8


class PolicyProtocol(IntEnum):
    """enum wag_policy_protocol."""

    POLICY_OTHER = 0
    POLICY_TCP = 1
    POLICY_UDP = 2
    POLICY_SCTP = 3


class ServiceRangeFlag(IntFlag):
    """enum wag_service_range_flag."""

    USED = 1
    STRAYS = 2


EVENT_SIZE = 104
_EVENT = Struct("=QQQQ16s16s16sHHHBBBBBBIII")


class Event(NamedTuple):
    """struct wag_event: 104 bytes."""

    time_ns: int
    netns: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    policy: int
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
    verdict: int
    direction: int
    ifindex: int
    rule: int
    suppressed: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.time_ns,
            self.netns,
            self.count,
            self.policy,
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
            self.verdict,
            self.direction,
            self.ifindex,
            self.rule,
            self.suppressed,
        )

    def pack(self) -> bytes:
        return _EVENT.pack(
            self.time_ns,
            self.netns,
            self.count,
            self.policy,
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
            self.verdict,
            self.direction,
            self.ifindex,
            self.rule,
            self.suppressed,
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
            v[6],
            _swap16(v[7]),
            _swap16(v[8]),
            _swap16(v[9]),
            v[10],
            v[11],
            v[12],
            v[13],
            v[14],
            v[15],
            v[16],
            v[17],
            v[18],
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Event:
        return cls.of(*_EVENT.unpack(raw))


MAGLEV_BACKEND_SIZE = 24
_MAGLEV_BACKEND = Struct("=IIIII4x")


class MaglevBackend(NamedTuple):
    """struct wag_maglev_backend: 24 bytes."""

    start: int
    step: int
    weight: int
    credit: int
    next: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.start,
            self.step,
            self.weight,
            self.credit,
            self.next,
        )

    def pack(self) -> bytes:
        return _MAGLEV_BACKEND.pack(self.start, self.step, self.weight, self.credit, self.next)

    @classmethod
    def of(cls, *v: Any) -> MaglevBackend:
        return cls(v[0], v[1], v[2], v[3], v[4])

    @classmethod
    def unpack(cls, raw: bytes) -> MaglevBackend:
        return cls.of(*_MAGLEV_BACKEND.unpack(raw))


MAGLEV_REQUEST_SIZE = 12
_MAGLEV_REQUEST = Struct("=III")


class MaglevRequest(NamedTuple):
    """struct wag_maglev_request: 12 bytes."""

    id: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    greatest: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.id,
            self.count,
            self.greatest,
        )

    def pack(self) -> bytes:
        return _MAGLEV_REQUEST.pack(self.id, self.count, self.greatest)

    @classmethod
    def of(cls, *v: Any) -> MaglevRequest:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> MaglevRequest:
        return cls.of(*_MAGLEV_REQUEST.unpack(raw))


POLICY_REQUEST_SIZE = 32
_POLICY_REQUEST = Struct("=16sQQ")


class PolicyRequest(NamedTuple):
    """struct wag_policy_request: 32 bytes."""

    addr: bytes
    ingress: int
    egress: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.addr,
            self.ingress,
            self.egress,
        )

    def pack(self) -> bytes:
        return _POLICY_REQUEST.pack(self.addr, self.ingress, self.egress)

    @classmethod
    def of(cls, *v: Any) -> PolicyRequest:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> PolicyRequest:
        return cls.of(*_POLICY_REQUEST.unpack(raw))


NAME_KEY_SIZE = 24
_NAME_KEY = Struct("=I4x16s")


class NameKey(NamedTuple):
    """struct wag_name_key: 24 bytes."""

    ifindex: int
    addr: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            self.ifindex,
            self.addr,
        )

    def pack(self) -> bytes:
        return _NAME_KEY.pack(self.ifindex, self.addr)

    @classmethod
    def of(cls, *v: Any) -> NameKey:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> NameKey:
        return cls.of(*_NAME_KEY.unpack(raw))


NAME_SIZE = 192
_NAME = Struct("=64s64s64s")


class Name(NamedTuple):
    """struct wag_name: 192 bytes."""

    pattern: bytes
    until: bytes
    text: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            self.pattern,
            self.until,
            self.text,
        )

    def pack(self) -> bytes:
        return _NAME.pack(self.pattern, self.until, self.text)

    @classmethod
    def of(cls, *v: Any) -> Name:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> Name:
        return cls.of(*_NAME.unpack(raw))


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


NAT_SIZE = 64
_NAT = Struct("=16s16sHHB3xIIQQ")


class Nat(NamedTuple):
    """struct wag_nat: 64 bytes."""

    to: Tuple
    revision: int
    flags: int
    seen_ns: int
    number: int

    def values(self) -> tuple[Any, ...]:
        return (
            *self.to.values(),
            self.revision,
            self.flags,
            self.seen_ns,
            self.number,
        )

    def pack(self) -> bytes:
        return _NAT.pack(*self.to.values(), self.revision, self.flags, self.seen_ns, self.number)

    @classmethod
    def of(cls, *v: Any) -> Nat:
        return cls(Tuple.of(v[0], v[1], v[2], v[3], v[4]), v[5], v[6], v[7], v[8])

    @classmethod
    def unpack(cls, raw: bytes) -> Nat:
        return cls.of(*_NAT.unpack(raw))


SERVICE_RANGE_SIZE = 40
_SERVICE_RANGE = Struct("=16s16sI4x")


class ServiceRange(NamedTuple):
    """struct wag_service_range: 40 bytes."""

    network: bytes
    mask: bytes
    flags: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.network,
            self.mask,
            self.flags,
        )

    def pack(self) -> bytes:
        return _SERVICE_RANGE.pack(self.network, self.mask, self.flags)

    @classmethod
    def of(cls, *v: Any) -> ServiceRange:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> ServiceRange:
        return cls.of(*_SERVICE_RANGE.unpack(raw))


ENDPOINT_SIZE = 48
_ENDPOINT = Struct("=II6s6sIi4xQQ")


class Endpoint(NamedTuple):
    """struct wag_endpoint: 48 bytes."""

    ifindex: int
    flags: int
    pod_mac: bytes
    host_mac: bytes
    nat_used: int
    netns: int
    ingress_policy: int
    egress_policy: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.ifindex,
            self.flags,
            self.pod_mac,
            self.host_mac,
            self.nat_used,
            self.netns,
            self.ingress_policy,
            self.egress_policy,
        )

    def pack(self) -> bytes:
        return _ENDPOINT.pack(
            self.ifindex,
            self.flags,
            self.pod_mac,
            self.host_mac,
            self.nat_used,
            self.netns,
            self.ingress_policy,
            self.egress_policy,
        )

    @classmethod
    def of(cls, *v: Any) -> Endpoint:
        return cls(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7])

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


FLOW_SIZE = 24
_FLOW = Struct("=QQQ")


class Flow(NamedTuple):
    """struct wag_flow: 24 bytes."""

    count: int  # type: ignore[assignment]  # tuple has a method of this name
    emitted_ns: int
    seen_ns: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.count,
            self.emitted_ns,
            self.seen_ns,
        )

    def pack(self) -> bytes:
        return _FLOW.pack(self.count, self.emitted_ns, self.seen_ns)

    @classmethod
    def of(cls, *v: Any) -> Flow:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> Flow:
        return cls.of(*_FLOW.unpack(raw))


BUCKET_SIZE = 24
_BUCKET = Struct("=QQI4x")


class Bucket(NamedTuple):
    """struct wag_bucket: 24 bytes."""

    full_ns: int
    left_out: int
    since: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.full_ns,
            self.left_out,
            self.since,
        )

    def pack(self) -> bytes:
        return _BUCKET.pack(self.full_ns, self.left_out, self.since)

    @classmethod
    def of(cls, *v: Any) -> Bucket:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> Bucket:
        return cls.of(*_BUCKET.unpack(raw))


DENIAL_KEY_SIZE = 16
_DENIAL_KEY = Struct("=QIBB2x")


class DenialKey(NamedTuple):
    """struct wag_denial_key: 16 bytes."""

    policy: int
    rule: int
    direction: int
    verdict: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.policy,
            self.rule,
            self.direction,
            self.verdict,
        )

    def pack(self) -> bytes:
        return _DENIAL_KEY.pack(self.policy, self.rule, self.direction, self.verdict)

    @classmethod
    def of(cls, *v: Any) -> DenialKey:
        return cls(v[0], v[1], v[2], v[3])

    @classmethod
    def unpack(cls, raw: bytes) -> DenialKey:
        return cls.of(*_DENIAL_KEY.unpack(raw))


FRAGMENT_KEY_SIZE = 40
_FRAGMENT_KEY = Struct("=16s16sIB3x")


class FragmentKey(NamedTuple):
    """struct wag_fragment_key: 40 bytes."""

    src: bytes
    dst: bytes
    id: int
    proto: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.src,
            self.dst,
            self.id,
            self.proto,
        )

    def pack(self) -> bytes:
        return _FRAGMENT_KEY.pack(self.src, self.dst, self.id, self.proto)

    @classmethod
    def of(cls, *v: Any) -> FragmentKey:
        return cls(v[0], v[1], v[2], v[3])

    @classmethod
    def unpack(cls, raw: bytes) -> FragmentKey:
        return cls.of(*_FRAGMENT_KEY.unpack(raw))


FRAGMENT_SIZE = 4
_FRAGMENT = Struct("=HH")


class Fragment(NamedTuple):
    """struct wag_fragment: 4 bytes."""

    sport: int
    dport: int

    def values(self) -> tuple[Any, ...]:
        return (
            _swap16(self.sport),
            _swap16(self.dport),
        )

    def pack(self) -> bytes:
        return _FRAGMENT.pack(_swap16(self.sport), _swap16(self.dport))

    @classmethod
    def of(cls, *v: Any) -> Fragment:
        return cls(_swap16(v[0]), _swap16(v[1]))

    @classmethod
    def unpack(cls, raw: bytes) -> Fragment:
        return cls.of(*_FRAGMENT.unpack(raw))


PATTERN_KEY_SIZE = 256
_PATTERN_KEY = Struct("=B255s")


class PatternKey(NamedTuple):
    """struct wag_pattern_key: 256 bytes."""

    exact: int
    text: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            self.exact,
            self.text,
        )

    def pack(self) -> bytes:
        return _PATTERN_KEY.pack(self.exact, self.text)

    @classmethod
    def of(cls, *v: Any) -> PatternKey:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> PatternKey:
        return cls.of(*_PATTERN_KEY.unpack(raw))


NAME_SHARE_SIZE = 8
_NAME_SHARE = Struct("=II")


class NameShare(NamedTuple):
    """struct wag_name_share: 8 bytes."""

    since: int
    made: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.since,
            self.made,
        )

    def pack(self) -> bytes:
        return _NAME_SHARE.pack(self.since, self.made)

    @classmethod
    def of(cls, *v: Any) -> NameShare:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> NameShare:
        return cls.of(*_NAME_SHARE.unpack(raw))


NAT_YOUNG_SIZE = 48
_NAT_YOUNG = Struct("=16s16sHHB3xQ")


class NatYoung(NamedTuple):
    """struct wag_nat_young: 48 bytes."""

    key: Tuple
    number: int

    def values(self) -> tuple[Any, ...]:
        return (
            *self.key.values(),
            self.number,
        )

    def pack(self) -> bytes:
        return _NAT_YOUNG.pack(*self.key.values(), self.number)

    @classmethod
    def of(cls, *v: Any) -> NatYoung:
        return cls(Tuple.of(v[0], v[1], v[2], v[3], v[4]), v[5])

    @classmethod
    def unpack(cls, raw: bytes) -> NatYoung:
        return cls.of(*_NAT_YOUNG.unpack(raw))


NAT_COUNT_SIZE = 16
_NAT_COUNT = Struct("=QQ")


class NatCount(NamedTuple):
    """struct wag_nat_count: 16 bytes."""

    begun: int
    displaced: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.begun,
            self.displaced,
        )

    def pack(self) -> bytes:
        return _NAT_COUNT.pack(self.begun, self.displaced)

    @classmethod
    def of(cls, *v: Any) -> NatCount:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> NatCount:
        return cls.of(*_NAT_COUNT.unpack(raw))


CONN_SIZE = 24
_CONN = Struct("=QIHHI4x")


class Conn(NamedTuple):
    """struct wag_conn: 24 bytes."""

    seen_ns: int
    revision: int
    opened: int
    may: int
    pattern: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.seen_ns,
            self.revision,
            self.opened,
            self.may,
            self.pattern,
        )

    def pack(self) -> bytes:
        return _CONN.pack(self.seen_ns, self.revision, self.opened, self.may, self.pattern)

    @classmethod
    def of(cls, *v: Any) -> Conn:
        return cls(v[0], v[1], v[2], v[3], v[4])

    @classmethod
    def unpack(cls, raw: bytes) -> Conn:
        return cls.of(*_CONN.unpack(raw))


CLASS_RANGE_KEY_SIZE = 20
_CLASS_RANGE_KEY = Struct("=I16s")


class ClassRangeKey(NamedTuple):
    """struct wag_class_range_key: 20 bytes."""

    prefix: int
    addr: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            self.prefix,
            self.addr,
        )

    def pack(self) -> bytes:
        return _CLASS_RANGE_KEY.pack(self.prefix, self.addr)

    @classmethod
    def of(cls, *v: Any) -> ClassRangeKey:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> ClassRangeKey:
        return cls.of(*_CLASS_RANGE_KEY.unpack(raw))


POLICY_KEY_SIZE = 16
_POLICY_KEY = Struct("=QQ")


class PolicyKey(NamedTuple):
    """struct wag_policy_key: 16 bytes."""

    set: int
    peer: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.set,
            self.peer,
        )

    def pack(self) -> bytes:
        return _POLICY_KEY.pack(self.set, self.peer)

    @classmethod
    def of(cls, *v: Any) -> PolicyKey:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> PolicyKey:
        return cls.of(*_POLICY_KEY.unpack(raw))


POLICY_RUN_SIZE = 8
_POLICY_RUN = Struct("=II")


class PolicyRun(NamedTuple):
    """struct wag_policy_run: 8 bytes."""

    first: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name

    def values(self) -> tuple[Any, ...]:
        return (
            self.first,
            self.count,
        )

    def pack(self) -> bytes:
        return _POLICY_RUN.pack(self.first, self.count)

    @classmethod
    def of(cls, *v: Any) -> PolicyRun:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> PolicyRun:
        return cls.of(*_POLICY_RUN.unpack(raw))


POLICY_STEP_SIZE = 16
_POLICY_STEP = Struct("=IIB3xHH")


class PolicyStep(NamedTuple):
    """struct wag_policy_step: 16 bytes."""

    start: int
    rule: int
    verdict: int
    admin: int
    baseline: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.start,
            self.rule,
            self.verdict,
            self.admin,
            self.baseline,
        )

    def pack(self) -> bytes:
        return _POLICY_STEP.pack(self.start, self.rule, self.verdict, self.admin, self.baseline)

    @classmethod
    def of(cls, *v: Any) -> PolicyStep:
        return cls(v[0], v[1], v[2], v[3], v[4])

    @classmethod
    def unpack(cls, raw: bytes) -> PolicyStep:
        return cls.of(*_POLICY_STEP.unpack(raw))


POLICY_STATE_SIZE = 8
_POLICY_STATE = Struct("=II")


class PolicyState(NamedTuple):
    """struct wag_policy_state: 8 bytes."""

    revision: int
    keep: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.revision,
            self.keep,
        )

    def pack(self) -> bytes:
        return _POLICY_STATE.pack(self.revision, self.keep)

    @classmethod
    def of(cls, *v: Any) -> PolicyState:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> PolicyState:
        return cls.of(*_POLICY_STATE.unpack(raw))


NAME_QUERY_SIZE = 64
_NAME_QUERY = Struct("=QQIHHQQIIIII4x")


class NameQuery(NamedTuple):
    """struct wag_name_query: 64 bytes."""

    set: int
    peer: int
    place: int
    admin: int
    baseline: int
    key: PolicyKey
    low: int
    high: int
    middle: int
    now: int
    verdict: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.set,
            self.peer,
            self.place,
            self.admin,
            self.baseline,
            *self.key.values(),
            self.low,
            self.high,
            self.middle,
            self.now,
            self.verdict,
        )

    def pack(self) -> bytes:
        return _NAME_QUERY.pack(
            self.set,
            self.peer,
            self.place,
            self.admin,
            self.baseline,
            *self.key.values(),
            self.low,
            self.high,
            self.middle,
            self.now,
            self.verdict,
        )

    @classmethod
    def of(cls, *v: Any) -> NameQuery:
        return cls(v[0], v[1], v[2], v[3], v[4], PolicyKey.of(v[5], v[6]), v[7], v[8], v[9], v[10], v[11])

    @classmethod
    def unpack(cls, raw: bytes) -> NameQuery:
        return cls.of(*_NAME_QUERY.unpack(raw))


POLICY_WORK_SIZE = 336
_POLICY_WORK = Struct("=16s16sHHB3xQII16s16sHHB3x16s16sHHB3x16s16sHHB3xQIHHI4xI4x16sQQIHHQQIIIII4xIIQI4x16s8s")


class PolicyWork(NamedTuple):
    """struct wag_policy_work: 336 bytes."""

    flow: Tuple
    now: int
    revision: int
    slot: int
    back: Tuple
    key: Tuple
    inner: Tuple
    conn: Conn
    name: NameKey
    query: NameQuery
    had: int
    pattern: int
    asker: int
    asker_ifindex: int
    audit_policy: bytes
    audit_rule: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            *self.flow.values(),
            self.now,
            self.revision,
            self.slot,
            *self.back.values(),
            *self.key.values(),
            *self.inner.values(),
            *self.conn.values(),
            *self.name.values(),
            *self.query.values(),
            self.had,
            self.pattern,
            self.asker,
            self.asker_ifindex,
            self.audit_policy,
            self.audit_rule,
        )

    def pack(self) -> bytes:
        return _POLICY_WORK.pack(
            *self.flow.values(),
            self.now,
            self.revision,
            self.slot,
            *self.back.values(),
            *self.key.values(),
            *self.inner.values(),
            *self.conn.values(),
            *self.name.values(),
            *self.query.values(),
            self.had,
            self.pattern,
            self.asker,
            self.asker_ifindex,
            self.audit_policy,
            self.audit_rule,
        )

    @classmethod
    def of(cls, *v: Any) -> PolicyWork:
        return cls(
            Tuple.of(v[0], v[1], v[2], v[3], v[4]),
            v[5],
            v[6],
            v[7],
            Tuple.of(v[8], v[9], v[10], v[11], v[12]),
            Tuple.of(v[13], v[14], v[15], v[16], v[17]),
            Tuple.of(v[18], v[19], v[20], v[21], v[22]),
            Conn.of(v[23], v[24], v[25], v[26], v[27]),
            NameKey.of(v[28], v[29]),
            NameQuery.of(v[30], v[31], v[32], v[33], v[34], v[35], v[36], v[37], v[38], v[39], v[40], v[41]),
            v[42],
            v[43],
            v[44],
            v[45],
            v[46],
            v[47],
        )

    @classmethod
    def unpack(cls, raw: bytes) -> PolicyWork:
        return cls.of(*_POLICY_WORK.unpack(raw))


NODE_POLICY_SIZE = 40
_NODE_POLICY = Struct("=QQQQQ")


class NodePolicy(NamedTuple):
    """struct wag_node_policy: 40 bytes."""

    ingress: int
    egress: int
    trial_ingress: int
    trial_egress: int
    trial_until_ns: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.ingress,
            self.egress,
            self.trial_ingress,
            self.trial_egress,
            self.trial_until_ns,
        )

    def pack(self) -> bytes:
        return _NODE_POLICY.pack(self.ingress, self.egress, self.trial_ingress, self.trial_egress, self.trial_until_ns)

    @classmethod
    def of(cls, *v: Any) -> NodePolicy:
        return cls(v[0], v[1], v[2], v[3], v[4])

    @classmethod
    def unpack(cls, raw: bytes) -> NodePolicy:
        return cls.of(*_NODE_POLICY.unpack(raw))


OPEN_FLOW_SIZE = 56
_OPEN_FLOW = Struct("=16s16sHHB3xQI4x")


class OpenFlow(NamedTuple):
    """struct wag_open_flow: 56 bytes."""

    flow: Tuple
    seen_ns: int
    revision: int

    def values(self) -> tuple[Any, ...]:
        return (
            *self.flow.values(),
            self.seen_ns,
            self.revision,
        )

    def pack(self) -> bytes:
        return _OPEN_FLOW.pack(*self.flow.values(), self.seen_ns, self.revision)

    @classmethod
    def of(cls, *v: Any) -> OpenFlow:
        return cls(Tuple.of(v[0], v[1], v[2], v[3], v[4]), v[5], v[6])

    @classmethod
    def unpack(cls, raw: bytes) -> OpenFlow:
        return cls.of(*_OPEN_FLOW.unpack(raw))


OPEN_FLOWS_SIZE = 14336
_OPEN_FLOWS = Struct("=14336s")


class OpenFlows(NamedTuple):
    """struct wag_open_flows: 14336 bytes."""

    flow: bytes

    def values(self) -> tuple[Any, ...]:
        return (self.flow,)

    def pack(self) -> bytes:
        return _OPEN_FLOWS.pack(self.flow)

    @classmethod
    def of(cls, *v: Any) -> OpenFlows:
        return cls(v[0])

    @classmethod
    def unpack(cls, raw: bytes) -> OpenFlows:
        return cls.of(*_OPEN_FLOWS.unpack(raw))


DNS_SIZE = 4936
_DNS = Struct("=4128s256sB255sI4x16s64s64s64s32sIIIIIIIIIIII")


class Dns(NamedTuple):
    """struct wag_dns: 4936 bytes."""

    message: bytes
    name: bytes
    key: PatternKey
    entry: NameKey
    fresh: Name
    pattern: bytes
    patterns: int
    size: int
    at: int
    length: int
    label: int
    records: int
    done: int
    now: int
    until: int
    entering: int
    best: int
    least: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.message,
            self.name,
            *self.key.values(),
            *self.entry.values(),
            *self.fresh.values(),
            self.pattern,
            self.patterns,
            self.size,
            self.at,
            self.length,
            self.label,
            self.records,
            self.done,
            self.now,
            self.until,
            self.entering,
            self.best,
            self.least,
        )

    def pack(self) -> bytes:
        return _DNS.pack(
            self.message,
            self.name,
            *self.key.values(),
            *self.entry.values(),
            *self.fresh.values(),
            self.pattern,
            self.patterns,
            self.size,
            self.at,
            self.length,
            self.label,
            self.records,
            self.done,
            self.now,
            self.until,
            self.entering,
            self.best,
            self.least,
        )

    @classmethod
    def of(cls, *v: Any) -> Dns:
        return cls(
            v[0],
            v[1],
            PatternKey.of(v[2], v[3]),
            NameKey.of(v[4], v[5]),
            Name.of(v[6], v[7], v[8]),
            v[9],
            v[10],
            v[11],
            v[12],
            v[13],
            v[14],
            v[15],
            v[16],
            v[17],
            v[18],
            v[19],
            v[20],
            v[21],
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Dns:
        return cls.of(*_DNS.unpack(raw))


SEEN_SIZE = 16
_SEEN = Struct("=QQ")


class Seen(NamedTuple):
    """struct wag_seen: 16 bytes."""

    tag: int
    time_ns: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.tag,
            self.time_ns,
        )

    def pack(self) -> bytes:
        return _SEEN.pack(self.tag, self.time_ns)

    @classmethod
    def of(cls, *v: Any) -> Seen:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> Seen:
        return cls.of(*_SEEN.unpack(raw))


UPLINK_SIZE = 8
_UPLINK = Struct("=6s2x")


class Uplink(NamedTuple):
    """struct wag_uplink: 8 bytes."""

    mac: bytes

    def values(self) -> tuple[Any, ...]:
        return (self.mac,)

    def pack(self) -> bytes:
        return _UPLINK.pack(self.mac)

    @classmethod
    def of(cls, *v: Any) -> Uplink:
        return cls(v[0])

    @classmethod
    def unpack(cls, raw: bytes) -> Uplink:
        return cls.of(*_UPLINK.unpack(raw))


HEALTH_KEY_SIZE = 4
_HEALTH_KEY = Struct("=HH")


class HealthKey(NamedTuple):
    """struct wag_health_key: 4 bytes."""

    port: int
    family: int

    def values(self) -> tuple[Any, ...]:
        return (
            _swap16(self.port),
            self.family,
        )

    def pack(self) -> bytes:
        return _HEALTH_KEY.pack(_swap16(self.port), self.family)

    @classmethod
    def of(cls, *v: Any) -> HealthKey:
        return cls(_swap16(v[0]), v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> HealthKey:
        return cls.of(*_HEALTH_KEY.unpack(raw))


HEALTH_SIZE = 132
_HEALTH = Struct("=I64s64s")


class Health(NamedTuple):
    """struct wag_health: 132 bytes."""

    endpoints: int
    namespace: bytes
    name: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            self.endpoints,
            self.namespace,
            self.name,
        )

    def pack(self) -> bytes:
        return _HEALTH.pack(self.endpoints, self.namespace, self.name)

    @classmethod
    def of(cls, *v: Any) -> Health:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> Health:
        return cls.of(*_HEALTH.unpack(raw))


MAGLEV_SIZE = 8192
_MAGLEV = Struct("=8192s")


class Maglev(NamedTuple):
    """struct wag_maglev: 8192 bytes."""

    slot: bytes

    def values(self) -> tuple[Any, ...]:
        return (self.slot,)

    def pack(self) -> bytes:
        return _MAGLEV.pack(self.slot)

    @classmethod
    def of(cls, *v: Any) -> Maglev:
        return cls(v[0])

    @classmethod
    def unpack(cls, raw: bytes) -> Maglev:
        return cls.of(*_MAGLEV.unpack(raw))


SERVICE_KEY_SIZE = 24
_SERVICE_KEY = Struct("=16sHBB4x")


class ServiceKey(NamedTuple):
    """struct wag_service_key: 24 bytes."""

    addr: bytes
    port: int
    proto: int
    scope: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.addr,
            _swap16(self.port),
            self.proto,
            self.scope,
        )

    def pack(self) -> bytes:
        return _SERVICE_KEY.pack(self.addr, _swap16(self.port), self.proto, self.scope)

    @classmethod
    def of(cls, *v: Any) -> ServiceKey:
        return cls(v[0], _swap16(v[1]), v[2], v[3])

    @classmethod
    def unpack(cls, raw: bytes) -> ServiceKey:
        return cls.of(*_SERVICE_KEY.unpack(raw))


SERVICE_SIZE = 40
_SERVICE = Struct("=IIIHHIIQI4x")


class Service(NamedTuple):
    """struct wag_service: 40 bytes."""

    offset: int
    count: int  # type: ignore[assignment]  # tuple has a method of this name
    revision: int
    flags: int
    draining: int
    affinity_s: int
    id: int
    ranges: int
    maglev: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.offset,
            self.count,
            self.revision,
            self.flags,
            self.draining,
            self.affinity_s,
            self.id,
            self.ranges,
            self.maglev,
        )

    def pack(self) -> bytes:
        return _SERVICE.pack(
            self.offset,
            self.count,
            self.revision,
            self.flags,
            self.draining,
            self.affinity_s,
            self.id,
            self.ranges,
            self.maglev,
        )

    @classmethod
    def of(cls, *v: Any) -> Service:
        return cls(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8])

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


AFFINITY_KEY_SIZE = 24
_AFFINITY_KEY = Struct("=16sI4x")


class AffinityKey(NamedTuple):
    """struct wag_affinity_key: 24 bytes."""

    client: bytes
    id: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.client,
            self.id,
        )

    def pack(self) -> bytes:
        return _AFFINITY_KEY.pack(self.client, self.id)

    @classmethod
    def of(cls, *v: Any) -> AffinityKey:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> AffinityKey:
        return cls.of(*_AFFINITY_KEY.unpack(raw))


AFFINITY_SIZE = 32
_AFFINITY = Struct("=16sH6xQ")


class Affinity(NamedTuple):
    """struct wag_affinity: 32 bytes."""

    addr: bytes
    port: int
    used_ns: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.addr,
            _swap16(self.port),
            self.used_ns,
        )

    def pack(self) -> bytes:
        return _AFFINITY.pack(self.addr, _swap16(self.port), self.used_ns)

    @classmethod
    def of(cls, *v: Any) -> Affinity:
        return cls(v[0], _swap16(v[1]), v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> Affinity:
        return cls.of(*_AFFINITY.unpack(raw))


RANGE_KEY_SIZE = 28
_RANGE_KEY = Struct("=I8s16s")


class RangeKey(NamedTuple):
    """struct wag_range_key: 28 bytes."""

    prefix: int
    ranges: bytes
    addr: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            self.prefix,
            self.ranges,
            self.addr,
        )

    def pack(self) -> bytes:
        return _RANGE_KEY.pack(self.prefix, self.ranges, self.addr)

    @classmethod
    def of(cls, *v: Any) -> RangeKey:
        return cls(v[0], v[1], v[2])

    @classmethod
    def unpack(cls, raw: bytes) -> RangeKey:
        return cls.of(*_RANGE_KEY.unpack(raw))


SCRATCH_SIZE = 144
_SCRATCH = Struct("=16s16sHHB3x16s16sHHB3x16s16sHHB3xIIQQ")


class Scratch(NamedTuple):
    """struct wag_scratch: 144 bytes."""

    to: Tuple
    answer: Tuple
    entry: Nat

    def values(self) -> tuple[Any, ...]:
        return (
            *self.to.values(),
            *self.answer.values(),
            *self.entry.values(),
        )

    def pack(self) -> bytes:
        return _SCRATCH.pack(*self.to.values(), *self.answer.values(), *self.entry.values())

    @classmethod
    def of(cls, *v: Any) -> Scratch:
        return cls(
            Tuple.of(v[0], v[1], v[2], v[3], v[4]),
            Tuple.of(v[5], v[6], v[7], v[8], v[9]),
            Nat.of(v[10], v[11], v[12], v[13], v[14], v[15], v[16], v[17], v[18]),
        )

    @classmethod
    def unpack(cls, raw: bytes) -> Scratch:
        return cls.of(*_SCRATCH.unpack(raw))


NETNS_SIZE = 32
_NETNS = Struct("=16s16s")


class Netns(NamedTuple):
    """struct wag_netns: 32 bytes."""

    ip4: bytes
    ip6: bytes

    def values(self) -> tuple[Any, ...]:
        return (
            self.ip4,
            self.ip6,
        )

    def pack(self) -> bytes:
        return _NETNS.pack(self.ip4, self.ip6)

    @classmethod
    def of(cls, *v: Any) -> Netns:
        return cls(v[0], v[1])

    @classmethod
    def unpack(cls, raw: bytes) -> Netns:
        return cls.of(*_NETNS.unpack(raw))


SWEEP_SIZE = 64
_SWEEP = Struct("=16s16sQQQII")


class Sweep(NamedTuple):
    """struct wag_sweep: 64 bytes."""

    timer: bytes
    work: bytes
    sweeps: int
    expired: int
    took_ns: int
    entries: int
    confirmed: int

    def values(self) -> tuple[Any, ...]:
        return (
            self.timer,
            self.work,
            self.sweeps,
            self.expired,
            self.took_ns,
            self.entries,
            self.confirmed,
        )

    def pack(self) -> bytes:
        return _SWEEP.pack(self.timer, self.work, self.sweeps, self.expired, self.took_ns, self.entries, self.confirmed)

    @classmethod
    def of(cls, *v: Any) -> Sweep:
        return cls(v[0], v[1], v[2], v[3], v[4], v[5], v[6])

    @classmethod
    def unpack(cls, raw: bytes) -> Sweep:
        return cls.of(*_SWEEP.unpack(raw))


#: map → (type of the key, type of the value); None where the map has none
MAPS: dict[str, tuple[Any, Any]] = {
    "wag_affinity": (AffinityKey, Affinity),
    "wag_backends": (U32, Backend),
    "wag_buckets": (U32, Bucket),
    "wag_class_ranges": (ClassRangeKey, U64),
    "wag_classes": (Address, U64),
    "wag_conns": (Tuple, Conn),
    "wag_counters": (U32, U64),
    "wag_denials": (DenialKey, U64),
    "wag_dns": (U32, Dns),
    "wag_drops": (U32, U64),
    "wag_endpoints": (Address, Endpoint),
    "wag_events_rb": (None, None),
    "wag_flow_counts": (U32, U64),
    "wag_flows": (FlowKey, Flow),
    "wag_fragments": (FragmentKey, Fragment),
    "wag_health": (HealthKey, Health),
    "wag_maglev": (U32, Maglev),
    "wag_name_shares": (U32, NameShare),
    "wag_names": (NameKey, Name),
    "wag_nat": (Tuple, Nat),
    "wag_nat_counts": (U32, NatCount),
    "wag_nat_young": (U32, NatYoung),
    "wag_netns": (U64, Netns),
    "wag_node_policy": (U32, NodePolicy),
    "wag_open_flows": (U32, OpenFlows),
    "wag_overdue": (U32, U64),
    "wag_patterns": (PatternKey, U32),
    "wag_policy": (PolicyKey, PolicyRun),
    "wag_policy_state": (U32, PolicyState),
    "wag_policy_steps": (U32, PolicyStep),
    "wag_policy_work": (U32, PolicyWork),
    "wag_scratch": (U32, Scratch),
    "wag_seen": (U32, Seen),
    "wag_services": (ServiceKey, Service),
    "wag_source_ranges": (RangeKey, U32),
    "wag_svc_ranges": (U32, ServiceRange),
    "wag_sweeps": (U32, Sweep),
    "wag_uplinks": (U32, Uplink),
    "wag_vips": (Address, U32),
}

#: load-time constant → what it means
CONFIG: dict[str, str] = {
    "wag_beside_proxy": "1: established flows that the NAT table does not know are another proxy's",
    "wag_event_gap_ns": "mean time between two events of one kind that a CPU emits, in nanoseconds; they may come in bursts",
    "wag_event_ns": "shortest time between two events of one flow, in nanoseconds",
    "wag_events": "flows that are aggregated and emitted as events: 0 none, 1 those to Services, 2 all of pods",
    "wag_host_cookie": "cookie of the node's network namespace: its sockets may use 127.0.0.1:nodePort",
    "wag_loopback_nodeport": "1: the node's own sockets reach NodePorts by loopback addresses",
    "wag_masquerade": "1: what pods send out of the cluster gets the node's address",
    "wag_names_share": "so many addresses of names one pod may add to wag_names in a minute",
    "wag_node_ip4": "IPv4 address of this node: source of SNAT; all zero when it has none",
    "wag_node_ip6": "IPv6 address of this node: source of SNAT; all zero when it has none",
    "wag_non_masquerade": "networks that know a way to pods: nothing sent there is masqueraded",
    "wag_snat_max": "highest source port that SNAT picks",
    "wag_snat_min": "lowest source port that SNAT picks",
    "wag_sweep_seconds": "time between two sweeps over the NAT table, in seconds",
    "wag_tcp_seconds": "how long a translated TCP connection lives without a packet, in seconds",
    "wag_udp_seconds": "how long a translated UDP flow lives without a packet, in seconds",
    "wag_young_flows": "so many flows may have begun and not be confirmed: the size of wag_nat_young",
}

#: object → load-time constant → (offset, size) in .rodata
CONFIG_LAYOUT: dict[str, dict[str, tuple[int, int]]] = {
    "socket": {
        "wag_beside_proxy": (600, 1),
        "wag_event_gap_ns": (48, 8),
        "wag_event_ns": (608, 8),
        "wag_events": (41, 1),
        "wag_host_cookie": (32, 8),
        "wag_loopback_nodeport": (40, 1),
        "wag_masquerade": (76, 1),
        "wag_names_share": (604, 4),
        "wag_node_ip4": (0, 16),
        "wag_node_ip6": (16, 16),
        "wag_non_masquerade": (80, 520),
        "wag_snat_max": (58, 2),
        "wag_snat_min": (56, 2),
        "wag_sweep_seconds": (72, 4),
        "wag_tcp_seconds": (64, 4),
        "wag_udp_seconds": (68, 4),
        "wag_young_flows": (60, 4),
    },
    "pod": {
        "wag_beside_proxy": (0, 1),
        "wag_event_gap_ns": (56, 8),
        "wag_event_ns": (616, 8),
        "wag_events": (49, 1),
        "wag_host_cookie": (40, 8),
        "wag_loopback_nodeport": (48, 1),
        "wag_masquerade": (84, 1),
        "wag_names_share": (608, 4),
        "wag_node_ip4": (8, 16),
        "wag_node_ip6": (24, 16),
        "wag_non_masquerade": (88, 520),
        "wag_snat_max": (66, 2),
        "wag_snat_min": (64, 2),
        "wag_sweep_seconds": (80, 4),
        "wag_tcp_seconds": (72, 4),
        "wag_udp_seconds": (76, 4),
        "wag_young_flows": (68, 4),
    },
    "node": {
        "wag_beside_proxy": (0, 1),
        "wag_event_gap_ns": (56, 8),
        "wag_event_ns": (616, 8),
        "wag_events": (49, 1),
        "wag_host_cookie": (40, 8),
        "wag_loopback_nodeport": (48, 1),
        "wag_masquerade": (84, 1),
        "wag_names_share": (608, 4),
        "wag_node_ip4": (8, 16),
        "wag_node_ip6": (24, 16),
        "wag_non_masquerade": (88, 520),
        "wag_snat_max": (66, 2),
        "wag_snat_min": (64, 2),
        "wag_sweep_seconds": (80, 4),
        "wag_tcp_seconds": (72, 4),
        "wag_udp_seconds": (76, 4),
        "wag_young_flows": (68, 4),
    },
    "xdp": {
        "wag_beside_proxy": (0, 1),
        "wag_event_gap_ns": (56, 8),
        "wag_event_ns": (616, 8),
        "wag_events": (49, 1),
        "wag_host_cookie": (40, 8),
        "wag_loopback_nodeport": (48, 1),
        "wag_masquerade": (84, 1),
        "wag_names_share": (608, 4),
        "wag_node_ip4": (8, 16),
        "wag_node_ip6": (24, 16),
        "wag_non_masquerade": (88, 520),
        "wag_snat_max": (66, 2),
        "wag_snat_min": (64, 2),
        "wag_sweep_seconds": (80, 4),
        "wag_tcp_seconds": (72, 4),
        "wag_udp_seconds": (76, 4),
        "wag_young_flows": (68, 4),
    },
    "sweep": {
        "wag_beside_proxy": (600, 1),
        "wag_event_gap_ns": (48, 8),
        "wag_event_ns": (608, 8),
        "wag_events": (41, 1),
        "wag_host_cookie": (32, 8),
        "wag_loopback_nodeport": (40, 1),
        "wag_masquerade": (76, 1),
        "wag_names_share": (604, 4),
        "wag_node_ip4": (0, 16),
        "wag_node_ip6": (16, 16),
        "wag_non_masquerade": (80, 520),
        "wag_snat_max": (58, 2),
        "wag_snat_min": (56, 2),
        "wag_sweep_seconds": (72, 4),
        "wag_tcp_seconds": (64, 4),
        "wag_udp_seconds": (68, 4),
        "wag_young_flows": (60, 4),
    },
}
