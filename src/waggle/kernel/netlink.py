"""rtnetlink: links, addresses, routes and neighbours, in batches, and news about them.

Hand-written because it lies on the path of every pod: one system call carries all requests of a batch and one answer
round checks them all (0.7 ms for a pod's whole interface, against 11 ms through a general library).

Invariants: every request is acknowledged and every acknowledgement is looked at; an error names the object, carries
the errno and the kernel's own words (extended acknowledgement). One socket may be used by several threads: exchanges
are serialised.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from waggle.errors import KernelError, NotFound
from waggle.kernel import netlink_wire as wire
from waggle.kernel.netlink_batch import MISSING, Batch, Request
from waggle.kernel.netlink_wire import (
    ARPHRD_ETHER,
    RTPROT_WAGGLE,
    Address,
    FdbEntry,
    IPAddress,
    IPInterface,
    IPNetwork,
    Link,
    Neighbour,
    NextHop,
    Route,
    Rule,
    Vxlan,
)
from waggle.kernel.netns import call_in_netns, call_in_netns_fd

__all__ = [
    "ARPHRD_ETHER",
    "RTPROT_WAGGLE",
    "Address",
    "Batch",
    "Change",
    "FdbEntry",
    "IPAddress",
    "IPInterface",
    "IPNetwork",
    "Link",
    "Monitor",
    "Neighbour",
    "Netlink",
    "NextHop",
    "Route",
    "Rule",
    "Vxlan",
]

T = TypeVar("T")

_SOL_NETLINK = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 10, 11, 12
_SO_RCVBUFFORCE = 33
_RECEIVE_BYTES = 1 << 20
# Acknowledgements wait in the socket while the kernel works through one sendmsg; more than this could overflow it.
_REQUESTS_PER_SEND = 256
_BUFFER_BYTES = 1 << 17  # a dump's message has at most 32 KiB; 256 acknowledgements come one by one
_DUMP_ATTEMPTS = 10
_ANSWER_SECONDS = 30.0

_GROUPS = {"link": 0x1, "address": 0x10 | 0x100, "route": 0x40 | 0x400}


def _open(groups: int) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    try:
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            sock.setsockopt(_SOL_NETLINK, option, 1)
        try:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
        except PermissionError:  # not CAP_NET_ADMIN: read-only use, the system's maximum has to do
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        sock.bind((0, groups))
    except OSError as error:
        sock.close()
        raise KernelError(f"cannot set up a netlink socket: {error.strerror}", error.errno or 0) from error
    return sock


def _open_in(netns: str | Path | int | None, groups: int) -> socket.socket:
    if netns is None:
        return _open(groups)
    if isinstance(netns, int):
        return call_in_netns_fd(netns, lambda: _open(groups))
    return call_in_netns(netns, lambda: _open(groups))


def _messages(data: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """(type, flags, sequence, body) of each message of one datagram."""
    offset, end = 0, len(data)
    while offset + 16 <= end:
        length, kind, flags, sequence, _ = wire.NLMSG_HEADER.unpack_from(data, offset)
        if length < 16 or offset + length > end:
            raise KernelError("netlink: a message does not fit its datagram")
        yield kind, flags, sequence, data[offset + 16 : offset + length]
        offset += (length + 3) & ~3


def _failure(what: str, number: int, flags: int, body: memoryview) -> KernelError:
    """The exception for one negative acknowledgement."""
    kernel_says = ""
    if flags & wire.NLM_F_ACK_TLVS:
        # With NETLINK_CAP_ACK the original header follows the error, without its payload.
        skip = 4 + 16
        if not flags & wire.NLM_F_CAPPED:
            skip = 4 + ((struct.unpack_from("=I", body, 4)[0] + 3) & ~3)
        for kind, raw in wire.attributes(body[skip:]):
            if kind == wire.NLMSGERR_ATTR_MSG:
                kernel_says = bytes(raw).rstrip(b"\0").decode(errors="replace")
    reason = os.strerror(number) + (f" ({kernel_says})" if kernel_says else "")
    kind_of_error = NotFound if number in MISSING else KernelError
    return kind_of_error(f"cannot {what}: {reason}", number)


class Netlink:
    """A request socket in the caller's network namespace, or in that of `netns` (a path or an open descriptor).

    The socket keeps its namespace: only opening it needs a thread there, using it does not.
    """

    def __init__(self, netns: str | Path | int | None = None) -> None:
        self._socket = _open_in(netns, 0)
        self._socket.settimeout(_ANSWER_SECONDS)
        self._lock = threading.Lock()
        self._sequence = 0
        self._buffer = bytearray(_BUFFER_BYTES)

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    # -- changing things

    def run(self, batch: Batch) -> None:
        """Send all requests of `batch`, wait for all answers. Raises the first failure (NotFound, KernelError).

        The requests after a failed one have been carried out all the same; the error says how many failed.
        """
        failures: list[KernelError] = []
        with self._lock:
            for start in range(0, len(batch.requests), _REQUESTS_PER_SEND):
                failures += self._exchange(batch.requests[start : start + _REQUESTS_PER_SEND])
        if failures:
            if len(failures) > 1:
                failures[0].add_note(f"{len(failures)} requests of this batch of {len(batch)} failed")
            raise failures[0]

    def _exchange(self, requests: list[Request]) -> list[KernelError]:
        parts: list[bytes] = []
        first = self._sequence + 1
        for request in requests:
            self._sequence += 1
            flags = request.flags | wire.NLM_F_REQUEST | wire.NLM_F_ACK
            parts.append(wire.NLMSG_HEADER.pack(16 + len(request.body), request.kind, flags, self._sequence, 0))
            parts.append(request.body)  # all parts of a body are padded to four bytes
        self._send(b"".join(parts))
        waiting = len(requests)
        failures: list[KernelError] = []
        while waiting:
            for kind, flags, sequence, body in _messages(self._receive()):
                if kind != wire.NLMSG_ERROR or not first <= sequence <= self._sequence:
                    continue  # left over from an exchange that was given up
                waiting -= 1
                number = -struct.unpack_from("=i", body)[0]
                request = requests[sequence - first]
                if number and number not in request.tolerated:
                    failures.append(_failure(request.what, number, flags, body))
        return failures

    # -- asking

    def links(self) -> list[Link]:
        """All interfaces of the namespace."""
        body = wire.IFINFOMSG.pack(0, 0, 0, 0, 0) + wire.u32(wire.IFLA_EXT_MASK, wire.RTEXT_FILTER_SKIP_STATS)
        return self._dump(wire.RTM_GETLINK, body, wire.RTM_NEWLINK, wire.decode_link)

    def link_by_name(self, name: str) -> Link:
        """Raises NotFound."""
        body = wire.IFINFOMSG.pack(0, 0, 0, 0, 0) + wire.text(wire.IFLA_IFNAME, name)
        return self._get_link(body, f"find link {name}")

    def link_by_index(self, index: int) -> Link:
        """Raises NotFound."""
        return self._get_link(wire.IFINFOMSG.pack(0, 0, index, 0, 0), f"find link {index}")

    def addresses(self, ifindex: int = 0) -> list[Address]:
        """Addresses of both families; of one interface where `ifindex` is given."""
        found = self._dump(
            wire.RTM_GETADDR, wire.IFADDRMSG.pack(0, 0, 0, 0, ifindex), wire.RTM_NEWADDR, wire.decode_address
        )
        return [address for address in found if not ifindex or address.ifindex == ifindex]

    def routes(self, *, table: int | None = wire.RT_TABLE_MAIN, protocol: int | None = None) -> list[Route]:
        """Routes of both families, of one table (None: of all) and, where given, of one protocol."""
        found: list[Route] = []
        for family in (wire.AF_INET, wire.AF_INET6):
            header = wire.RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            found += self._dump(wire.RTM_GETROUTE, header, wire.RTM_NEWROUTE, wire.decode_route)
        return [
            route
            for route in found
            if (table is None or route.table == table) and (protocol is None or route.protocol == protocol)
        ]

    def neighbours(self, ifindex: int = 0) -> list[Neighbour]:
        """Neighbour entries of both families; of one interface where `ifindex` is given."""
        found: list[Neighbour] = []
        for family in (wire.AF_INET, wire.AF_INET6):
            header = wire.NDMSG.pack(family, 0, 0, 0, 0)
            found += self._dump(wire.RTM_GETNEIGH, header, wire.RTM_NEWNEIGH, wire.decode_neighbour)
        return [entry for entry in found if not ifindex or entry.ifindex == ifindex]

    def fdb(self, ifindex: int) -> list[FdbEntry]:
        """Where a VXLAN interface sends packets."""
        header = wire.NDMSG.pack(wire.AF_BRIDGE, ifindex, 0, 0, 0)
        found = self._dump(wire.RTM_GETNEIGH, header, wire.RTM_NEWNEIGH, wire.decode_fdb)
        return [entry for entry in found if entry.ifindex == ifindex]

    def rules(self, *, protocol: int | None = None) -> list[Rule]:
        """Routing rules of both families and, where given, of one protocol; none of a family that is off."""
        found: list[Rule] = []
        for family in (wire.AF_INET, wire.AF_INET6):
            header = wire.RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            try:
                found += self._dump(wire.RTM_GETRULE, header, wire.RTM_NEWRULE, wire.decode_rule)
            except KernelError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                    raise
        return [rule for rule in found if protocol is None or rule.protocol == protocol]

    def default_route_devices(self) -> list[str]:
        """Names of the interfaces that carry a default route, of either family, lowest metric first."""
        defaults = [r for r in self.routes() if r.dst.prefixlen == 0 and r.kind == wire.RTN_UNICAST]
        defaults.sort(key=lambda route: route.metric)
        names = {link.index: link.name for link in self.links()}
        indices = dict.fromkeys(hop.ifindex for route in defaults for hop in route.nexthops)
        return [names[index] for index in indices if index in names]

    def _get_link(self, body: bytes, what: str) -> Link:
        with self._lock:
            self._sequence += 1
            self._send(wire.NLMSG_HEADER.pack(16 + len(body), wire.RTM_GETLINK, 1, self._sequence, 0) + body)
            while True:
                for kind, flags, sequence, answer in _messages(self._receive()):
                    if sequence != self._sequence:
                        continue
                    if kind == wire.RTM_NEWLINK:
                        return wire.decode_link(answer)
                    if kind == wire.NLMSG_ERROR:
                        raise _failure(what, -struct.unpack_from("=i", answer)[0], flags, answer)

    def _dump(self, request: int, header: bytes, wanted: int, decode: Callable[[memoryview], T]) -> list[T]:
        with self._lock:
            for _ in range(_DUMP_ATTEMPTS):
                found, complete = self._dump_once(request, header, wanted, decode)
                if complete:
                    return found
        # The table changed under each attempt: what was read last is as good as anything an instant later.
        return found

    def _dump_once(
        self, request: int, header: bytes, wanted: int, decode: Callable[[memoryview], T]
    ) -> tuple[list[T], bool]:
        self._sequence += 1
        flags = wire.NLM_F_REQUEST | wire.NLM_F_DUMP
        self._send(wire.NLMSG_HEADER.pack(16 + len(header), request, flags, self._sequence, 0) + header)
        found: list[T] = []
        complete = True
        while True:
            for kind, flags, sequence, body in _messages(self._receive()):
                if sequence != self._sequence:
                    continue
                if flags & wire.NLM_F_DUMP_INTR:
                    complete = False
                if kind == wanted:
                    found.append(decode(body))
                elif kind == wire.NLMSG_DONE:
                    return found, complete
                elif kind == wire.NLMSG_ERROR:
                    raise _failure("list", -struct.unpack_from("=i", body)[0], flags, body)

    # -- the socket

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            raise KernelError(f"netlink: cannot send: {error.strerror}", error.errno or 0) from error

    def _receive(self) -> memoryview:
        """One datagram; valid until the next call."""
        try:
            size, _, flags, _ = self._socket.recvmsg_into([self._buffer])
        except OSError as error:
            raise KernelError(f"netlink: no answer: {error.strerror or error}", error.errno or 0) from error
        if flags & socket.MSG_TRUNC:
            raise KernelError(f"netlink: an answer exceeds {len(self._buffer)} bytes")
        return memoryview(self._buffer)[:size]


@dataclass(frozen=True, slots=True)
class Change:
    """Something appeared or changed (`removed` False) or went away. `subject` None: news were lost, look again."""

    subject: Link | Address | Route | None
    removed: bool = False


_NEWS: dict[int, tuple[Callable[[memoryview], Link | Address | Route], bool]] = {
    wire.RTM_NEWLINK: (wire.decode_link, False),
    wire.RTM_DELLINK: (wire.decode_link, True),
    wire.RTM_NEWADDR: (wire.decode_address, False),
    wire.RTM_DELADDR: (wire.decode_address, True),
    wire.RTM_NEWROUTE: (wire.decode_route, False),
    wire.RTM_DELROUTE: (wire.decode_route, True),
}


class Monitor:
    """A socket that hears of changes; give it to `loop.add_reader` and call `read` when it is readable.

    `what`: any of "link", "address", "route". A bridge's port messages (family AF_BRIDGE) are left out.
    """

    def __init__(self, *what: str, netns: str | Path | int | None = None) -> None:
        groups = 0
        for name in what or ("link", "address"):
            groups |= _GROUPS[name]
        self._socket = _open_in(netns, groups)
        self._socket.setblocking(False)
        self._buffer = bytearray(_BUFFER_BYTES)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> list[Change]:
        """All changes since the last call; empty when there are none. Never blocks."""
        changes: list[Change] = []
        while True:
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                return changes
            except OSError:  # ENOBUFS: the kernel dropped messages because the socket was full
                changes.append(Change(None))
                continue
            for kind, _, _, body in _messages(memoryview(self._buffer)[:size]):
                known = _NEWS.get(kind)
                if known is not None and body[0] in (wire.AF_UNSPEC, wire.AF_INET, wire.AF_INET6):
                    decode, removed = known
                    changes.append(Change(decode(body), removed))
