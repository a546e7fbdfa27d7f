"""What a policy says in one direction: rules over predicates and ranges of keys (`policy_tables.step_key`).

A rule that fails closed is compiled into what it then is: an Accept into no rule, anything else into a Deny of
everything. What a policy says has a canonical text, which is part of the ids of the sets that it is in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from hashlib import blake2b

from waggle.model.meta import ObjectKey
from waggle.model.policy_objects import (
    AUDIT_ANNOTATION,
    ClusterEgressRule,
    ClusterIngressRule,
    ClusterNetworkPolicy,
    ClusterPeer,
    ClusterProtocol,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    PortMatch,
)
from waggle.model.policy_rules import Direction, RuleRef
from waggle.plan.policy_predicates import PodTerm, PortName, Predicate, Predicates
from waggle.plan.policy_tables import END, PORT_BITS, PROTOCOL_INDEX

Policy = NetworkPolicy | ClusterNetworkPolicy
Span = tuple[int, int]  # keys from the first up to, and without, the second

EVERYTHING: tuple[Span, ...] = ((0, END),)
MOST_PORTS = (1 << PORT_BITS) - 1


class Tier(IntEnum):
    """In the order in which they are asked."""

    ADMIN = 0
    NETWORK = 1  # NetworkPolicies, which only allow
    BASELINE = 2


class Action(IntEnum):
    """What a rule does with what it matches."""

    ACCEPT = 0
    DENY = 1
    PASS = 2


_TIERS = {"Admin": Tier.ADMIN, "Baseline": Tier.BASELINE}
_ACTIONS = {"Accept": Action.ACCEPT, "Deny": Action.DENY, "Pass": Action.PASS}


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """`peers`: one of them must hold; None: whoever it is. `spans` and `named` say which keys, one of them must."""

    ref: RuleRef
    tier: Tier
    audited: bool
    action: Action
    peers: tuple[Predicate, ...] | None
    spans: tuple[Span, ...]
    named: tuple[PortName, ...] = ()
    id: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", self.ref.id)

    @property
    def text(self) -> str:
        peers = None if self.peers is None else sorted(peer.text for peer in self.peers)
        return json.dumps([self.ref.index, self.ref.name, self.action, peers, self.spans, sorted(self.named)])


@dataclass(frozen=True, slots=True, eq=False)
class Compiled:
    """One direction of a policy. `digest` is of all that it says."""

    kind: str
    key: ObjectKey
    tier: Tier
    audited: bool
    rules: tuple[Rule, ...]
    digest: str

    @property
    def ref(self) -> tuple[str, ObjectKey]:
        return self.kind, self.key


def is_audited(policy: Policy) -> bool:
    """Whether it only tells what it would do."""
    return (policy.metadata.annotations or {}).get(AUDIT_ANNOTATION) == "true"


def compile_policy(policy: Policy, direction: Direction, predicates: Predicates) -> Compiled | None:
    """None where it says nothing in that direction."""
    audited = is_audited(policy)
    if isinstance(policy, NetworkPolicy):
        if direction not in _policy_types(policy):
            return None
        tier = Tier.NETWORK
        rules = [
            _network_rule(RuleRef("NetworkPolicy", policy.key, direction, index), audited, rule, predicates)
            for index, rule in enumerate(_rules(policy, direction))
        ]
    else:
        known = _TIERS.get(policy.spec.tier)
        cluster_rules: Sequence[ClusterIngressRule | ClusterEgressRule] = (
            policy.spec.ingress if direction is Direction.INGRESS else policy.spec.egress
        )
        if known is None or not cluster_rules:
            return None
        tier = known
        rules = []
        for index, cluster_rule in enumerate(cluster_rules):
            ref = RuleRef("ClusterNetworkPolicy", policy.key, direction, index, cluster_rule.name)
            compiled = _cluster_rule(ref, tier, audited, cluster_rule, predicates)
            if compiled is not None:
                rules.append(compiled)
        if not rules:
            return None
    kind = type(policy).__name__
    text = "\n".join([json.dumps([kind, *policy.key, direction, tier, audited]), *(rule.text for rule in rules)])
    digest = blake2b(text.encode(), digest_size=16).hexdigest()
    return Compiled(kind, policy.key, tier, audited, tuple(rules), digest)


# -- NetworkPolicy --------------------------------------------------------------------------------------------------


def _policy_types(policy: NetworkPolicy) -> Sequence[str]:
    if policy.spec.policy_types:
        return policy.spec.policy_types
    return (Direction.INGRESS, Direction.EGRESS) if policy.spec.egress else (Direction.INGRESS,)


def _rules(policy: NetworkPolicy, direction: Direction) -> Sequence[NetworkPolicyIngressRule | NetworkPolicyEgressRule]:
    return (policy.spec.ingress if direction is Direction.INGRESS else policy.spec.egress) or ()


def _network_rule(
    ref: RuleRef, audited: bool, rule: NetworkPolicyIngressRule | NetworkPolicyEgressRule, predicates: Predicates
) -> Rule:
    listed = rule.from_ if isinstance(rule, NetworkPolicyIngressRule) else rule.to
    peers = None if not listed else unique(_network_peer(ref.key.namespace, peer, predicates) for peer in listed)
    spans, named = _network_ports(rule.ports)
    return Rule(ref, Tier.NETWORK, audited, Action.ACCEPT, peers, spans, named)


def _network_peer(namespace: str, peer: NetworkPolicyPeer, predicates: Predicates) -> Predicate | None:
    if peer.ip_block is not None:
        return predicates.block(peer.ip_block.cidr, peer.ip_block.except_)
    if peer.namespace_selector is not None:
        return predicates.pods(None, peer.namespace_selector, peer.pod_selector)
    return predicates.pods(namespace, None, peer.pod_selector) if peer.pod_selector is not None else None


def _network_ports(ports: Sequence[NetworkPolicyPort] | None) -> tuple[tuple[Span, ...], tuple[PortName, ...]]:
    if not ports:
        return EVERYTHING, ()
    spans: list[Span] = []
    named: list[PortName] = []
    for port in ports:
        index = PROTOCOL_INDEX.get(port.protocol or "TCP")
        if index is None:
            continue
        if port.port is None or port.port == "":
            spans.append(all_ports(index))
        elif isinstance(port.port, str):
            named.append(PortName(port.port, index))
        else:
            spans += port_span(index, port.port, port.end_port or port.port)
    return joined(spans), tuple(sorted(set(named)))


# -- ClusterNetworkPolicy -------------------------------------------------------------------------------------------


def _cluster_rule(
    ref: RuleRef, tier: Tier, audited: bool, rule: ClusterIngressRule | ClusterEgressRule, predicates: Predicates
) -> Rule | None:
    action = _ACTIONS.get(rule.action)
    listed = rule.from_ if isinstance(rule, ClusterIngressRule) else rule.to
    parts = [_cluster_peer(peer, rule, predicates) for peer in listed]
    ports = _protocols(rule.protocols)
    if action is None or ports is None or any(part is None for part in parts):
        # a newer version of the resource says something here that this one does not understand
        return None if action is Action.ACCEPT else Rule(ref, tier, audited, Action.DENY, None, EVERYTHING)
    return Rule(ref, tier, audited, action, unique(predicate for part in parts for predicate in part or ()), *ports)


def _cluster_peer(
    peer: ClusterPeer, rule: ClusterIngressRule | ClusterEgressRule, predicates: Predicates
) -> list[Predicate] | None:
    """The predicates of which one must hold; None where the peer is not understood."""
    given = [field for field in peer.__struct_fields__ if getattr(peer, field) is not None]
    if len(given) != 1:
        return None
    if peer.namespaces is not None:
        return [predicates.pods(None, peer.namespaces, None)]
    if peer.pods is not None:
        return [predicates.pods(None, peer.pods.namespace_selector, peer.pods.pod_selector)]
    if isinstance(rule, ClusterIngressRule):
        return None
    if peer.nodes is not None:
        return [predicates.nodes(peer.nodes)]
    if peer.networks is not None:
        blocks = [predicates.block(cidr) for cidr in peer.networks]
        known = [block for block in blocks if block is not None]
        return [*known] if len(known) == len(blocks) else None
    if peer.domain_names is not None and rule.action == "Accept":
        return [predicates.name(pattern) for pattern in peer.domain_names]
    return None


def _protocols(protocols: Sequence[ClusterProtocol] | None) -> tuple[tuple[Span, ...], tuple[PortName, ...]] | None:
    """None where one is not understood."""
    if not protocols:
        return EVERYTHING, ()
    spans: list[Span] = []
    named: list[PortName] = []
    for protocol in protocols:
        matches = {"TCP": protocol.tcp, "UDP": protocol.udp, "SCTP": protocol.sctp}
        given = [(PROTOCOL_INDEX[name], match) for name, match in matches.items() if match is not None]
        if len(given) + bool(protocol.destination_named_port) != 1:
            return None
        if not given:
            named += [PortName(protocol.destination_named_port, index) for index in PROTOCOL_INDEX.values()]
            continue
        found = _destination(*given[0])
        if found is None:
            return None
        spans += found
    return joined(spans), tuple(sorted(set(named)))


def _destination(index: int, match: PortMatch) -> list[Span] | None:
    port = match.destination_port
    if port is None:
        return [all_ports(index)]
    if (port.number is None) == (port.range is None):
        return None
    if port.number is not None:
        return port_span(index, port.number, port.number)
    assert port.range is not None
    return port_span(index, port.range.start, port.range.end)


# -- both -----------------------------------------------------------------------------------------------------------


def unique(peers: Iterable[Predicate | None]) -> tuple[Predicate, ...]:
    """Those that can hold at all, each once, in the order of their texts."""
    found = {peer.text: peer for peer in peers if peer is not None}
    return tuple(found[text] for text in sorted(found))


def all_ports(index: int) -> Span:
    """Every port of a protocol."""
    return index << PORT_BITS, (index + 1) << PORT_BITS


def port_span(index: int, first: int, last: int) -> list[Span]:
    """These ports of a protocol, if any. Port 0 stands for a fragment, whose port nobody knows: no range means it."""
    first, last = max(first, 1), min(last, MOST_PORTS)
    base = index << PORT_BITS
    return [(base + first, base + last + 1)] if first <= last else []


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same keys in spans that neither overlap nor touch."""
    found: list[Span] = []
    for first, end in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((first, end))
    return tuple(found)


def pods_of(policy: Policy, predicates: Predicates) -> PodTerm | None:
    """The pods that a policy is about; None for a subject that is not understood."""
    if isinstance(policy, NetworkPolicy):
        return predicates.pods(policy.metadata.namespace, None, policy.spec.pod_selector)
    subject = policy.spec.subject
    if subject.namespaces is not None:
        return predicates.pods(None, subject.namespaces, None)
    if subject.pods is not None:
        return predicates.pods(None, subject.pods.namespace_selector, subject.pods.pod_selector)
    return None
