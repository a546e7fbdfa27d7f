"""Sockets of the node on ports that lead elsewhere: NodePorts and host ports.

Nothing new can bind such a port (the bind hooks refuse it); what was bound before gets nothing any more from outside,
and is named.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import NamedTuple

from waggle.model.service import Family, family_of


class LocalPort(NamedTuple):
    """A port of the node that leads elsewhere. `address` is "" for every address of the node; `everywhere`: also for
    those that serve no NodePorts."""

    protocol: str
    family: Family
    address: str
    port: int
    everywhere: bool


class BoundSocket(NamedTuple):
    """A socket of the node that listens (TCP) or takes datagrams from anybody (UDP)."""

    protocol: str
    address: str
    port: int
    only_v6: bool
    inode: int


def in_vain(socket: BoundSocket, port: LocalPort, serves: Callable[[str], bool]) -> bool:
    """Whether packets for the socket go where the port leads. `serves`: whether an address serves NodePorts."""
    if (socket.protocol, socket.port) != (port.protocol, port.port):
        return False
    bound = ipaddress.ip_address(socket.address)
    if bound.is_unspecified:
        dual = bound.version == 6 and not socket.only_v6
        # a port of one address takes nothing from a socket that serves all the others too
        return not port.address and (dual or port.family is family_of(socket.address))
    if port.family is not family_of(socket.address):
        return False
    return socket.address == port.address if port.address else port.everywhere or serves(socket.address)


def sockets_in_vain(
    sockets: Iterable[BoundSocket], ports: Iterable[LocalPort], serves: Callable[[str], bool]
) -> list[tuple[BoundSocket, LocalPort]]:
    """Every socket with the port that takes its packets."""
    by_number: dict[tuple[str, int], list[LocalPort]] = {}
    for port in ports:
        by_number.setdefault((port.protocol, port.port), []).append(port)
    return [
        (socket, port)
        for socket in sockets
        for port in by_number.get((socket.protocol, socket.port), ())
        if in_vain(socket, port, serves)
    ]
