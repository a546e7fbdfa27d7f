"""The sockets of the current network namespace, and whose they are (sock_diag(7))."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from waggle.errors import KernelError
from waggle.model.bound import BoundSocket

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ERROR, _DONE = 2, 3
_SKV6ONLY = 11  # INET_DIAG_SKV6ONLY
_STATES = {"TCP": 1 << 10, "UDP": 1 << 7}  # TCP_LISTEN; TCP_CLOSE: bound, to nobody in particular
_ESTABLISHED = 1 << 1
_INFO = 2  # INET_DIAG_INFO: struct tcp_info
_LAST_DATA_RECV = 8 + 4 * 11  # where in it tcpi_last_data_recv is: milliseconds
_NUMBERS = {"TCP": socket.IPPROTO_TCP, "UDP": socket.IPPROTO_UDP}
_HEADER = struct.Struct("=IHHII")
_MESSAGE = struct.Struct("=BBBB2s2s16s16sI8sIIIII")  # struct inet_diag_msg; ports and addresses in network order


class Connection(NamedTuple):
    """An established TCP connection. `quiet_ms`: since the last data from the other end."""

    local: str
    local_port: int
    remote: str
    remote_port: int
    quiet_ms: int
    inode: int = 0


def connections() -> list[Connection]:
    """Every TCP connection. Raises KernelError."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        found += [_connection(payload) for payload in _dump("TCP", family, _ESTABLISHED, 1 << (_INFO - 1))]
    return found


def bound_sockets() -> list[BoundSocket]:
    """TCP sockets that listen and UDP sockets that are bound and not connected. Raises KernelError."""
    found = []
    for protocol in _NUMBERS:
        for family in (socket.AF_INET, socket.AF_INET6):
            found += [_parsed(protocol, payload) for payload in _dump(protocol, family, _STATES[protocol])]
    return found


def _dump(protocol: str, family: int, states: int, more: int = 0) -> list[bytes]:
    """`more`: what to tell besides, bits of INET_DIAG_*."""
    body = struct.pack("=BBBBI48x", family, _NUMBERS[protocol], more, 0, states)
    request = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + body
    found = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.send(request)
            for kind, payload in _messages(netlink):
                if kind == _SOCK_DIAG_BY_FAMILY:
                    found.append(payload)
    except OSError as error:
        raise KernelError(f"cannot list {protocol} sockets: {error.strerror}", error.errno or 0) from error
    return found


def _messages(netlink: socket.socket) -> Iterator[tuple[int, bytes]]:
    while True:
        data = netlink.recv(1 << 16)
        at = 0
        while at < len(data):
            size, kind, _flags, _sequence, _port = _HEADER.unpack_from(data, at)
            payload = data[at + _HEADER.size : at + size]
            if kind == _DONE:
                return
            if kind == _ERROR:
                number = -struct.unpack_from("=i", payload)[0]
                raise OSError(number, os.strerror(number))
            yield kind, payload
            at += (size + 3) & ~3


def _parsed(protocol: str, payload: bytes) -> BoundSocket:
    family, _, _, _, port, _, address, _, _, _, _, _, _, _, inode = _MESSAGE.unpack_from(payload)
    text = socket.inet_ntop(family, address[: 4 if family == socket.AF_INET else 16])
    only_v6 = any(kind == _SKV6ONLY and value[0] for kind, value in _attributes(payload))
    # an IPv6 socket on ::ffff:a.b.c.d is one of IPv4
    return BoundSocket(protocol, text.removeprefix("::ffff:"), int.from_bytes(port, "big"), only_v6, inode)


def _connection(payload: bytes) -> Connection:
    family, _, _, _, port, peer_port, *_ = parts = _MESSAGE.unpack_from(payload)
    length = 4 if family == socket.AF_INET else 16
    local, remote = (socket.inet_ntop(family, parts[at][:length]).removeprefix("::ffff:") for at in (6, 7))
    quiet = 0
    for kind, value in _attributes(payload):
        if kind == _INFO:
            [quiet] = struct.unpack_from("=I", value, _LAST_DATA_RECV)
    return Connection(local, int.from_bytes(port, "big"), remote, int.from_bytes(peer_port, "big"), quiet, parts[-1])


def _attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    at = _MESSAGE.size
    while at + 4 <= len(payload):
        size, kind = struct.unpack_from("=HH", payload, at)
        yield kind, payload[at + 4 : at + size]
        at += max(4, (size + 3) & ~3)


def socket_owners(inodes: Iterable[int]) -> dict[int, str]:
    """ "nginx (pid 12)" for sockets that some process has open; reads all of /proc, so only ask when there is one."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, str] = {}
    for process in Path("/proc").iterdir() if wanted else ():
        if not process.name.isdecimal():
            continue
        try:
            for descriptor in os.scandir(process / "fd"):
                inode = wanted.get(os.readlink(descriptor.path))  # noqa: PTH115  # tens of thousands of them
                if inode is not None:
                    name = (process / "comm").read_text().strip()
                    found.setdefault(inode, f"{name} (pid {process.name})")
        except OSError:
            continue  # the process, or its descriptor, is gone
    return found
