"""Netfilter's conntrack: the flows of the current network namespace that it translates, read and written.

Source: Linux include/uapi/linux/netfilter/{nfnetlink,nfnetlink_conntrack,nf_conntrack_common}.h. Ports and sizes are in
network order there; here nothing is.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from waggle.errors import KernelError
from waggle.kernel import netlink_wire as wire

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_NEW, _GET, _DELETE = 0, 1, 2
_ORIGINAL, _REPLY, _STATUS, _PROTOINFO, _NAT_SRC, _TIMEOUT, _NAT_DST = 1, 2, 3, 4, 6, 7, 13
_SRC_NAT, _DST_NAT, _DYING, _SEEN_REPLY, _ASSURED, _CONFIRMED = 0x10, 0x20, 0x200, 0x2, 0x4, 0x8
_TCP_ESTABLISHED, _TCP_TIME_WAIT = 3, 7
_BE_LIBERAL = 0x08  # what the windows are is not known of a flow that somebody else translated so far
_NFGENMSG = struct.Struct("=BBH")
_U16 = struct.Struct("!H")
_U32 = struct.Struct("!I")
_LASTING = {socket.IPPROTO_TCP: 432000, socket.IPPROTO_UDP: 120}  # seconds without a packet


@dataclass(frozen=True, slots=True)
class Tuple:
    """One direction of a flow; addresses as text."""

    src: str
    dst: str
    sport: int
    dport: int
    protocol: int


@dataclass(frozen=True, slots=True)
class Flow:
    """`original` as its client sends it, `reply` as it is answered: what differs is translated."""

    original: Tuple
    reply: Tuple
    over: bool = False  # a TCP connection that has ended, or is about to


def translated_flows() -> list[Flow]:
    """TCP, UDP and SCTP flows that reach another destination than they ask for. None where there is no conntrack.

    Raises KernelError.
    """
    found: list[Flow] = []
    for body in _ask(_GET, wire.NLM_F_DUMP, b"", socket.AF_UNSPEC, missing_ok=True):
        flow = _decode(body)
        if flow is not None:
            found.append(flow)
    return found


def put(flow: Flow) -> None:
    """Has conntrack translate a flow that is under way, in place of what it knows of it. Raises KernelError."""
    forget(flow)
    family = _family(flow.original)
    asked = flow.original
    plain = Tuple(asked.dst, asked.src, asked.dport, asked.sport, asked.protocol)  # the kernel translates it from this
    status = _CONFIRMED | _SEEN_REPLY | _ASSURED
    parts = [
        _tuple(_ORIGINAL, flow.original),
        _tuple(_REPLY, plain),
        wire.attribute(_STATUS, _U32.pack(status)),
        wire.attribute(_TIMEOUT, _U32.pack(120 if flow.over else _LASTING.get(flow.original.protocol, 120))),
    ]
    if (flow.reply.src, flow.reply.sport) != (flow.original.dst, flow.original.dport):
        parts.append(_nat(_NAT_DST, flow.reply.src, flow.reply.sport))
    if (flow.reply.dst, flow.reply.dport) != (flow.original.src, flow.original.sport):
        parts.append(_nat(_NAT_SRC, flow.reply.dst, flow.reply.dport))
    if flow.original.protocol == socket.IPPROTO_TCP:
        liberal = bytes((_BE_LIBERAL, _BE_LIBERAL))
        state = wire.attribute(1, bytes([_TCP_ESTABLISHED]))
        tcp = wire.nested(1, state, wire.attribute(4, liberal), wire.attribute(5, liberal))
        parts.append(wire.nested(_PROTOINFO, tcp))
    _ask(_NEW, wire.NLM_F_CREATE | wire.NLM_F_EXCL | wire.NLM_F_ACK, b"".join(parts), family)


def forget(flow: Flow) -> None:
    """Takes out what conntrack knows of a flow, whichever direction it saw first."""
    for one in (flow.original, flow.reply):
        _ask(_DELETE, wire.NLM_F_ACK, _tuple(_ORIGINAL, one), _family(one), missing_ok=True)


def _decode(body: memoryview) -> Flow | None:
    tuples: dict[int, Tuple] = {}
    status, over = 0, False
    for kind, data in wire.attributes(body[_NFGENMSG.size :]):
        if kind in (_ORIGINAL, _REPLY):
            one = _decode_tuple(data)
            if one is None:
                return None
            tuples[kind] = one
        elif kind == _STATUS:
            status = _U32.unpack(data)[0]
        elif kind == _PROTOINFO:
            over = any(
                inner_kind == 1 and state[0] >= _TCP_TIME_WAIT
                for outer_kind, outer in wire.attributes(data)
                if outer_kind == 1
                for inner_kind, state in wire.attributes(outer)
            )
    if not status & _DST_NAT or status & _DYING or len(tuples) != 2:
        return None
    return Flow(tuples[_ORIGINAL], tuples[_REPLY], over)


def _decode_tuple(data: memoryview) -> Tuple | None:
    addresses: dict[int, str] = {}
    numbers: dict[int, int] = {}
    for kind, inner in wire.attributes(data):
        for what, value in wire.attributes(inner):
            if kind == 1:
                addresses[what] = str(ipaddress.ip_address(bytes(value)))
            elif kind == 2:
                numbers[what] = value[0] if what == 1 else int.from_bytes(value, "big")
    src, dst = addresses.get(1, addresses.get(3)), addresses.get(2, addresses.get(4))
    if src is None or dst is None or not {1, 2, 3} <= numbers.keys():
        return None  # a protocol without ports
    return Tuple(src, dst, numbers[2], numbers[3], numbers[1])


def _tuple(kind: int, one: Tuple) -> bytes:
    src, dst = ipaddress.ip_address(one.src).packed, ipaddress.ip_address(one.dst).packed
    first = 1 if len(src) == 4 else 3
    return wire.nested(
        kind,
        wire.nested(1, wire.attribute(first, src), wire.attribute(first + 1, dst)),
        wire.nested(
            2,
            wire.attribute(1, bytes([one.protocol])),
            wire.attribute(2, _U16.pack(one.sport)),
            wire.attribute(3, _U16.pack(one.dport)),
        ),
    )


def _nat(kind: int, address: str, port: int) -> bytes:
    raw = ipaddress.ip_address(address).packed
    lowest, highest = (1, 2) if len(raw) == 4 else (4, 5)
    ports = wire.nested(3, wire.attribute(1, _U16.pack(port)), wire.attribute(2, _U16.pack(port)))
    return wire.nested(kind, wire.attribute(lowest, raw), wire.attribute(highest, raw), ports)


def _family(one: Tuple) -> int:
    return socket.AF_INET6 if ":" in one.src else socket.AF_INET


def _ask(operation: int, flags: int, body: bytes, family: int, *, missing_ok: bool = False) -> list[memoryview]:
    """The answers to one request. `missing_ok`: that there is no such thing is no error."""
    payload = _NFGENMSG.pack(family, 0, 0) + body
    size = wire.NLMSG_HEADER.size + len(payload)
    header = wire.NLMSG_HEADER.pack(size, _SUBSYSTEM | operation, wire.NLM_F_REQUEST | flags, 1, 0)
    missing = (errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EINVAL) if missing_ok else ()
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
            netlink.send(header + payload)
            return list(_answers(netlink))
    except OSError as error:
        if error.errno in missing:
            return []
        raise KernelError(f"conntrack: {error.strerror}", error.errno or 0) from error


def _answers(netlink: socket.socket) -> Iterator[memoryview]:
    while True:
        data = memoryview(netlink.recv(1 << 18))
        offset = 0
        while offset + wire.NLMSG_HEADER.size <= len(data):
            size, kind, flags, _sequence, _port = wire.NLMSG_HEADER.unpack_from(data, offset)
            body = data[offset + wire.NLMSG_HEADER.size : offset + size]
            if kind == wire.NLMSG_DONE:
                return
            if kind == wire.NLMSG_ERROR:
                number = -struct.unpack_from("=i", body)[0]
                if number:
                    raise OSError(number, os.strerror(number))
                return
            yield body
            if not flags & wire.NLM_F_MULTI:
                return
            offset += (size + 3) & ~3
