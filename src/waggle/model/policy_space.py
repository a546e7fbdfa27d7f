"""The space that policies divide: which ports and which addresses some policies can tell apart.

All ports between two bounds, and all addresses between two edges of blocks, get the same verdict: one of them stands
for all, so that answers about whole ranges are exact and not sampled.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from waggle.model.policy import (
    ClusterRule,
    NetworkRule,
    Policy,
    PolicyWorld,
    cluster_peers_of,
    cluster_rules_of,
    named_ports,
    peers_of,
    rules_of,
)
from waggle.model.policy_objects import LabelSelector, NetworkPolicy, PortMatch
from waggle.model.policy_rules import Direction

LAST_PORT = 65535
PORT_PROTOCOLS = ("TCP", "UDP", "SCTP")

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Ports(NamedTuple):
    """What a rule says of one protocol: these ports, inclusive; or the port with a name, whatever its number is."""

    protocol: str  # "" for a name that says its protocol itself
    first: int = 1
    last: int = LAST_PORT
    name: str = ""


def rules(policy: Policy, direction: Direction) -> Sequence[NetworkRule | ClusterRule]:
    """A policy's rules in one direction, whichever kind it is."""
    return rules_of(policy, direction) if isinstance(policy, NetworkPolicy) else cluster_rules_of(policy, direction)


def rule_ports(rule: NetworkRule | ClusterRule) -> list[Ports] | None:
    """The ports that a rule is about; None for every packet."""
    if isinstance(rule, NetworkRule):
        return [_network_port(p.protocol or "TCP", p.port, p.end_port) for p in rule.ports] if rule.ports else None
    if not rule.protocols:
        return None
    found: list[Ports] = []
    for entry in rule.protocols:
        if entry.destination_named_port:
            found.append(Ports("", name=entry.destination_named_port))
        matches: list[tuple[str, PortMatch | None]] = [("TCP", entry.tcp), ("UDP", entry.udp), ("SCTP", entry.sctp)]
        found += [_cluster_port(protocol, match) for protocol, match in matches if match is not None]
    return found


def _network_port(protocol: str, port: int | str | None, end: int | None) -> Ports:
    if port is None or port == "":
        return Ports(protocol)
    return Ports(protocol, name=port) if isinstance(port, str) else Ports(protocol, port, end or port)


def _cluster_port(protocol: str, match: PortMatch) -> Ports:
    port = match.destination_port
    if port is None:
        return Ports(protocol)
    if port.range is not None:
        return Ports(protocol, port.range.start, port.range.end)
    return Ports(protocol, port.number or 1, port.number or LAST_PORT)


def port_starts(
    policies: Iterable[tuple[Policy, Direction]], world: PolicyWorld, destination: str
) -> dict[str, set[int]]:
    """By protocol, the ports at which the verdict of some policies may change, for packets to an address."""
    starts: dict[str, set[int]] = {protocol: {1} for protocol in PORT_PROTOCOLS}
    for policy, direction in policies:
        for rule in rules(policy, direction):
            for ports in rule_ports(rule) or ():
                if ports.name:
                    for protocol, number in named_ports(world, destination, ports.name):
                        starts[protocol].update((number, number + 1))
                elif ports.protocol in starts:
                    starts[ports.protocol].update((ports.first, ports.last + 1))
    return starts


def intervals(starts: Iterable[int]) -> list[tuple[int, int]]:
    """The ports from 1 to 65535, cut at `starts`: (first, last)."""
    cuts = sorted({1, *(start for start in starts if 1 <= start <= LAST_PORT)})
    return [(first, following - 1) for first, following in zip(cuts, [*cuts[1:], LAST_PORT + 1], strict=True)]


def networks(policies: Iterable[Policy]) -> set[IPNetwork]:
    """Every block that a policy names, those that are excepted too."""
    texts: set[str] = set()
    for policy in policies:
        for direction in Direction:
            for rule in rules(policy, direction):
                if isinstance(rule, NetworkRule):
                    blocks = [peer.ip_block for peer in peers_of(rule) or () if peer.ip_block is not None]
                    texts.update(text for block in blocks for text in (block.cidr, *block.except_))
                else:
                    texts.update(text for peer in cluster_peers_of(rule) for text in peer.networks or ())
    return {ipaddress.ip_network(text, strict=False) for text in texts}


def holding(address: str, blocks: Iterable[IPNetwork]) -> frozenset[IPNetwork]:
    """The blocks that hold an address."""
    parsed = ipaddress.ip_address(address)
    return frozenset(block for block in blocks if parsed in block)


class Region(NamedTuple):
    """Addresses that are in the same blocks: ranges (first, last) of numbers of one family, 4 or 6."""

    version: int
    ranges: tuple[tuple[int, int], ...]

    def networks(self) -> list[IPNetwork]:
        """The region as blocks."""
        kind = ipaddress.IPv4Address if self.version == 4 else ipaddress.IPv6Address
        return [
            network
            for first, last in self.ranges
            for network in ipaddress.summarize_address_range(kind(first), kind(last))
        ]

    def address(self, taken: frozenset[str]) -> str | None:
        """An address of the region that is none of `taken`; None where there is none."""
        kind = ipaddress.IPv4Address if self.version == 4 else ipaddress.IPv6Address
        for first, last in self.ranges:
            for number in range(first, min(last, first + len(taken)) + 1):
                if str(kind(number)) not in taken:
                    return str(kind(number))
        return None


def regions(blocks: Iterable[IPNetwork], version: int) -> Iterator[Region]:
    """The addresses of a family, divided by blocks: every address is in one region."""
    mine = [block for block in blocks if block.version == version]
    end = 1 << (32 if version == 4 else 128)
    edges = [(int(block.network_address), int(block.broadcast_address) + 1) for block in mine]
    cuts = sorted({0, *(edge for pair in edges for edge in pair if edge < end)})
    found: dict[frozenset[int], list[tuple[int, int]]] = {}
    for first, following in zip(cuts, [*cuts[1:], end], strict=True):
        inside = frozenset(number for number, (low, high) in enumerate(edges) if low <= first < high)
        ranges = found.setdefault(inside, [])
        if ranges and ranges[-1][1] == first - 1:
            ranges[-1] = (ranges[-1][0], following - 1)
        else:
            ranges.append((first, following - 1))
    for ranges in found.values():
        yield Region(version, tuple(ranges))


class Keys(NamedTuple):
    """The labels and names of ports that policies look at; two pods that agree in these are the same to them."""

    pods: frozenset[str]
    namespaces: frozenset[str]
    nodes: frozenset[str]
    ports: frozenset[str]


def keys(policies: Iterable[Policy]) -> Keys:
    """What some policies look at."""
    pods: set[str] = set()
    namespaces: set[str] = set()
    nodes: set[str] = set()
    names: set[str] = set()
    for policy in policies:
        if isinstance(policy, NetworkPolicy):
            _add(pods, policy.spec.pod_selector)
        else:
            subject = policy.spec.subject
            _add(namespaces, subject.namespaces)
            if subject.pods is not None:
                _add(namespaces, subject.pods.namespace_selector)
                _add(pods, subject.pods.pod_selector)
        for direction in Direction:
            for rule in rules(policy, direction):
                names.update(ports.name for ports in rule_ports(rule) or () if ports.name)
                if isinstance(rule, NetworkRule):
                    for peer in peers_of(rule) or ():
                        _add(pods, peer.pod_selector)
                        _add(namespaces, peer.namespace_selector)
                    continue
                for target in cluster_peers_of(rule):
                    _add(namespaces, target.namespaces)
                    _add(nodes, target.nodes)
                    if target.pods is not None:
                        _add(namespaces, target.pods.namespace_selector)
                        _add(pods, target.pods.pod_selector)
    return Keys(*map(frozenset, (pods, namespaces, nodes, names)))


def _add(found: set[str], selector: LabelSelector | None) -> None:
    if selector is not None:
        found.update(selector.match_labels)
        found.update(requirement.key for requirement in selector.match_expressions)
