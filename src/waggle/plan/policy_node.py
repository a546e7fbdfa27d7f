"""What policies of the node itself are compiled into: sets as those of pods are, for the node's own traffic.

NodePolicies allow, and deny the rest of a direction that one of them names, as NetworkPolicies do. Before them comes
what no policy may cut: else the node could be lost to who would put it right.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from waggle.model.meta import ObjectKey
from waggle.model.node_policy import Essentials, Guests, is_audited, policy_types, rules_of
from waggle.model.policy_objects import LabelSelector, NodePolicy, NodePolicyPeer, NodePolicyPort
from waggle.model.policy_rules import Direction, RuleRef
from waggle.plan.policy_compile import (
    EVERYTHING,
    Action,
    Compiled,
    Rule,
    Span,
    Tier,
    all_ports,
    joined,
    port_span,
    unique,
)
from waggle.plan.policy_predicates import Predicate, Predicates
from waggle.plan.policy_tables import PROTOCOL_INDEX

#: The kind under which events name rules that no object has.
ESSENTIALS = "Essentials"
_KEY = ObjectKey("", "node")
_TCP, _UDP = PROTOCOL_INDEX["TCP"], PROTOCOL_INDEX["UDP"]
_DNS = 53


@dataclass(frozen=True, slots=True)
class NodeTrial:
    """What is tried until `until_ns` of CLOCK_BOOTTIME, instead of what is confirmed."""

    policies: tuple[NodePolicy, ...]
    guests: Guests
    until_ns: int


@dataclass(frozen=True, slots=True)
class NodePlan:
    """The policies of this node, in the order of their names."""

    essentials: Essentials
    confirmed: tuple[NodePolicy, ...] = ()
    trial: NodeTrial | None = None


def compile_node(
    policies: Sequence[NodePolicy],
    essentials: Essentials,
    guests: Guests,
    direction: Direction,
    predicates: Predicates,
) -> tuple[Compiled, ...]:
    """The set of a direction, in the order in which it is asked; () where nothing is: everything passes."""
    compiled = [_compiled(policy, direction, predicates) for policy in policies if direction in policy_types(policy)]
    if not compiled:
        return ()
    return _essentials(essentials, guests, direction, predicates), *compiled


def _compiled(policy: NodePolicy, direction: Direction, predicates: Predicates) -> Compiled:
    audited = is_audited(policy)
    rules = []
    for index, (peers, listed) in enumerate(rules_of(policy, direction)):
        ref = RuleRef("NodePolicy", policy.key, direction, index)
        found = None if not peers else unique(_peer(peer, predicates) for peer in peers)
        rules.append(Rule(ref, Tier.NETWORK, audited, Action.ACCEPT, found, _spans(listed)))
    return _made("NodePolicy", policy.key, direction, Tier.NETWORK, rules, audited=audited)


def _peer(peer: NodePolicyPeer, predicates: Predicates) -> Predicate | None:
    if peer.ip_block is not None:
        return predicates.block(peer.ip_block.cidr, peer.ip_block.except_)
    if peer.node_selector is not None:
        return predicates.nodes(peer.node_selector)
    if peer.pod_selector is None and peer.namespace_selector is None:
        return None
    return predicates.pods(None, peer.namespace_selector, peer.pod_selector)


def _spans(listed: Sequence[NodePolicyPort]) -> tuple[Span, ...]:
    if not listed:
        return EVERYTHING
    spans: list[Span] = []
    for port in listed:
        index = PROTOCOL_INDEX.get(port.protocol or "TCP")
        if index is None:
            continue
        spans += [all_ports(index)] if port.port is None else port_span(index, port.port, port.end_port or port.port)
    return joined(spans)


def _essentials(essentials: Essentials, guests: Guests, direction: Direction, predicates: Predicates) -> Compiled:
    """Of tier Admin, which isolates nobody."""

    def rule(index: int, name: str, addresses: Iterable[str] | None, spans: Sequence[Span]) -> Rule:
        blocks = None if addresses is None else unique(predicates.block(_whole(one)) for one in sorted(set(addresses)))
        ref = RuleRef(ESSENTIALS, _KEY, direction, index, name)
        return Rule(ref, Tier.ADMIN, False, Action.ACCEPT, blocks, joined(spans))

    nodes = (predicates.nodes(LabelSelector()),)
    tunnel = RuleRef(ESSENTIALS, _KEY, direction, 0, "tunnels between nodes")
    vxlan = joined(port_span(_UDP, essentials.vxlan_port, essentials.vxlan_port))
    rules = [Rule(tunnel, Tier.ADMIN, False, Action.ACCEPT, nodes, vxlan)]
    if direction is Direction.INGRESS:
        here = [port for address, port in essentials.apiservers if address in essentials.own]
        rules.append(rule(1, "health checks", None, _tcp(essentials.open_ports)))
        rules.append(rule(2, "API server", None, _tcp(here)))
        rules.append(rule(3, "who was logged in", guests.addresses, _tcp(guests.ports)))
    else:
        for number in sorted({port for _, port in essentials.apiservers}):
            there = [address for address, port in essentials.apiservers if port == number]
            rules.append(rule(len(rules), "API server", there, _tcp([number])))
        dns = [*port_span(_UDP, _DNS, _DNS), *port_span(_TCP, _DNS, _DNS)]
        rules.append(rule(len(rules), "resolvers", essentials.resolvers, dns))
    said = [one for one in rules if one.spans and one.peers != ()]
    return _made(ESSENTIALS, _KEY, direction, Tier.ADMIN, said, audited=False)


def _tcp(numbers: Iterable[int]) -> list[Span]:
    return [span for number in numbers for span in port_span(_TCP, number, number)]


def _whole(address: str) -> str:
    return str(ipaddress.ip_network(address))


def _made(kind: str, key: ObjectKey, direction: Direction, tier: Tier, rules: list[Rule], *, audited: bool) -> Compiled:
    text = "\n".join([json.dumps([kind, *key, direction, tier, audited]), *(rule.text for rule in rules)])
    digest = blake2b(text.encode(), digest_size=16).hexdigest()
    return Compiled(kind, key, tier, audited, tuple(rules), digest)
