"""Which way leads to the pods of every other node: the network itself, or a VXLAN tunnel to that node.

A network carries pods' packets from one node to the next where both are on it: it only delivers frames. A router
between them knows no pods, and often drops what has their addresses. So what goes to another node's pods, and what pods
send to the addresses of a node behind a tunnel, goes through it; so does all that comes back.

Both nodes of a pair decide for themselves and come to the same, because they decide by the same Node objects. Pure.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256

from waggle.model.objects import Node
from waggle.model.service import IPNetwork
from waggle.model.vip import pod_cidrs

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Routing(StrEnum):
    """The setting `routing`."""

    AUTO = "auto"  # native where the other node's address is on a network of ours
    NATIVE = "native"
    VXLAN = "vxlan"


@dataclass(frozen=True, slots=True)
class Place:
    """Where this node stands. `every`: all its addresses; `networks`: those it is on; `ranges`: of its pods."""

    name: str
    every: frozenset[IPAddress]
    networks: tuple[IPNetwork, ...]
    ranges: tuple[IPNetwork, ...] = ()
    #: IP version → the address that stands for the node where its Node object says none.
    fallback: Mapping[int, IPAddress] | None = None

    def reaches(self, address: IPAddress) -> bool:
        """Whether an address is on a network of this node."""
        return any(address in network for network in self.networks)


@dataclass(frozen=True, slots=True)
class PodRoute:
    """Where the pods of another node are: behind its address, on a network of ours."""

    dst: IPNetwork
    via: IPAddress


@dataclass(frozen=True, slots=True)
class Peer:
    """A node behind a tunnel: it is at the address `at`; `ranges` and `addresses` are reached through the tunnel."""

    name: str
    mac: str
    at: IPAddress
    ranges: tuple[IPNetwork, ...]
    addresses: tuple[IPAddress, ...]


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """Every route to other nodes. `own`: IP version → this node's address, as other nodes know it; `problems`: range
    → why no way leads there."""

    native: tuple[PodRoute, ...]
    peers: tuple[Peer, ...]
    own: Mapping[int, IPAddress]
    problems: Mapping[IPNetwork, str]


def internal_addresses(node: Node) -> list[IPAddress]:
    """The node's InternalIPs, in its order."""
    found = []
    for entry in node.status.addresses:
        if entry.type == "InternalIP":
            try:
                found.append(ipaddress.ip_address(entry.address))
            except ValueError:
                continue
    return found


def first_of_each(addresses: Iterable[IPAddress]) -> dict[int, IPAddress]:
    """IP version → the first address of it."""
    found: dict[int, IPAddress] = {}
    for address in addresses:
        found.setdefault(address.version, address)
    return found


def tunnel_mac(node_name: str) -> str:
    """The MAC address of a node's tunnel interfaces: made of its name, so that nobody has to tell it."""
    raw = sha256(node_name.encode()).digest()[:6]
    return bytes([raw[0] & 0xFC | 0x02, *raw[1:]]).hex(":")


def plan_routing(nodes: Iterable[Node], place: Place, routing: Routing) -> RoutePlan:
    """The ways to all nodes but this one."""
    others = sorted(nodes, key=lambda node: node.metadata.name)
    own_node = next((node for node in others if node.metadata.name == place.name), None)
    own = _own_addresses(own_node, place)
    native: list[PodRoute] = []
    peers: list[Peer] = []
    problems: dict[IPNetwork, str] = {}
    claimed: dict[IPNetwork, str] = {}
    for node in others:
        if node is own_node:
            continue
        found = _Ways(node, place, routing, own)
        ranges = []
        for cidr in pod_cidrs(node):
            overlaps = any(_overlap(cidr, mine) for mine in place.ranges)
            holder = "this node" if overlaps else claimed.get(cidr)
            if holder is None:
                claimed[cidr] = f"node {node.metadata.name}"
                ranges.append(cidr)
            elif cidr not in problems:
                problems[cidr] = (
                    f"node {node.metadata.name} has pods there, and so has {holder}: no route leads to both"
                )
        tunnelled = []
        for cidr in ranges:
            via = found.direct.get(cidr.version)
            if via is not None:
                native.append(PodRoute(cidr, via))
            else:
                tunnelled.append(cidr)
        reason = found.no_tunnel(tunnelled)
        if reason:
            problems |= {cidr: found.no_route(cidr) or reason for cidr in tunnelled}
        elif found.at is not None and (tunnelled or found.behind):
            name = node.metadata.name
            peers.append(Peer(name, tunnel_mac(name), found.at, tuple(tunnelled), found.behind))
    return RoutePlan(tuple(native), tuple(peers), own, problems)


def _own_addresses(own: Node | None, place: Place) -> dict[int, IPAddress]:
    """By IP version, what others know as this node's: both ends must agree on which family carries the tunnel."""
    known = [address for address in (internal_addresses(own) if own else []) if address in place.every]
    return first_of_each(known) or dict(place.fallback or {})


class _Ways:
    """How one other node can be reached."""

    def __init__(self, node: Node, place: Place, routing: Routing, own: Mapping[int, IPAddress]) -> None:
        self._name = node.metadata.name
        self._routing = routing
        addresses = internal_addresses(node)
        self._first = first_of_each(addresses)
        self._mine = [address for address in self._first.values() if address in place.every]
        #: IP version → the address that pods of that family are natively routed through
        self.direct = {
            version: address
            for version, address in self._first.items()
            if routing is not Routing.VXLAN and place.reaches(address) and address not in place.every
        }
        versions = [version for version in (4, 6) if version in own and version in self._first]
        self.at = self._first[versions[0]] if versions and routing is not Routing.NATIVE else None
        #: addresses of the node itself that pods reach through the tunnel
        self.behind = tuple(
            address
            for address in addresses
            if address not in place.every and (routing is Routing.VXLAN or not place.reaches(address))
        )

    def no_route(self, cidr: IPNetwork) -> str:
        """Why no native route leads to a range; "" where a tunnel would."""
        address = self._first.get(cidr.version)
        if address in self._mine:
            return f"{address}, the address of node {self._name}, is an address of this node"
        if self._routing is not Routing.NATIVE:
            return ""
        if address is None:
            return f"node {self._name} has no IPv{cidr.version} InternalIP, so there is no route to its pods"
        return (
            f"node address {address} is on no network of this node, so {cidr} cannot be routed: that takes a tunnel "
            "(routing: auto)"
        )

    def no_tunnel(self, ranges: Iterable[IPNetwork]) -> str:
        """Why no tunnel leads to the node, or ""."""
        if self._mine:
            return f"{self._mine[0]}, an address of node {self._name}, is one of this node"
        if self.at is None:
            return f"node {self._name} and this node have no InternalIP of the same family: no tunnel leads to its pods"
        inside = next((cidr for cidr in ranges if self.at in cidr), None)
        if inside is not None:
            return f"{self.at}, the address of node {self._name}, lies in its own pod range {inside}"
        return ""


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    if isinstance(one, ipaddress.IPv4Network):
        return isinstance(other, ipaddress.IPv4Network) and one.overlaps(other)
    return isinstance(other, ipaddress.IPv6Network) and one.overlaps(other)
