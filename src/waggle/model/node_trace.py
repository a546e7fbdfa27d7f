"""What NodePolicies say of a node's own packet, and why each rule matches or not, in words."""

from __future__ import annotations

from typing import NamedTuple

from waggle.model.node_policy import (
    Essentials,
    Guests,
    Peers,
    essential,
    is_audited,
    means,
    policy_types,
    port_matches,
    rules_of,
)
from waggle.model.policy import PolicyWorld, Traffic, node_addresses
from waggle.model.policy_objects import NodePolicy, NodePolicyPeer, NodePolicyPort
from waggle.model.policy_rules import Direction, RuleRef
from waggle.model.policy_space import Ports
from waggle.model.policy_trace import PolicyLook, RuleLook, any_of, block_words, pod_words, ports_words
from waggle.model.selectors import requirement_text, unmet


class OwnPolicies(NamedTuple):
    """NodePolicies of one node. `essentials`: what always passes; None: nobody knows. `known`: the node that is asked
    has them in force, or on trial; else they are what objects say, and only that node knows what it has confirmed."""

    policies: tuple[NodePolicy, ...]
    essentials: Essentials | None = None
    guests: Guests = Guests()
    known: bool = False
    on_trial: bool = False


class NodeLook(NamedTuple):
    """The verdict of one node over a packet of its own, and every policy that was asked."""

    node: str
    direction: Direction
    allowed: bool
    audited: bool
    because: str
    rule: RuleRef | None
    policies: tuple[PolicyLook, ...]
    own: OwnPolicies


def look_node(
    world: PolicyWorld, node: str, own: OwnPolicies, direction: Direction, traffic: Traffic
) -> NodeLook | None:
    """What `node` says of a packet that comes to it or leaves it; None where none of its policies is about that."""
    asked = [policy for policy in own.policies if direction in policy_types(policy)]
    if not asked:
        return None
    peer = traffic.source if direction is Direction.INGRESS else traffic.destination
    namespaces = {key.name: namespace for key, namespace in world.namespaces.items()}
    known = Peers(list(world.pods.values()), namespaces, list(world.nodes.values()))
    looks = tuple(_policy(world, known, policy, direction, peer, traffic) for policy in asked)
    always = ""
    if own.essentials is not None:
        always = essential(own.essentials, own.guests, direction, peer, traffic.protocol, traffic.port, known.nodes)
    rule = next((rule.rule for look in looks for rule in look.rules if rule.matches and not look.audited), None)
    isolated = any(not look.audited for look in looks)
    allowed = bool(always or rule or not isolated)
    would = any(rule.matches for look in looks for rule in look.rules)
    because = "NodePolicies isolate the node, and no rule allows it"
    if always:
        because = f"{always} always pass"
    elif rule:
        because = f"{rule} allows it"
    elif not isolated:
        because = "no policy that is enforced is about it"
    return NodeLook(node, direction, allowed, allowed and not always and not would, because, rule, looks, own)


def _policy(
    world: PolicyWorld, known: Peers, policy: NodePolicy, direction: Direction, peer: str, traffic: Traffic
) -> PolicyLook:
    rules = []
    for index, (peers, ports) in enumerate(rules_of(policy, direction)):
        words = []
        if peers and not any(means(one, peer, known) for one in peers):
            words.append(any_of(_peer_words(world, one, peer) for one in peers))
        if ports and not any(port_matches(one, traffic.protocol, traffic.port) for one in ports):
            words.append(ports_words(world, list(map(_ports, ports)), traffic))
        ref = RuleRef("NodePolicy", policy.key, direction, index)
        rules.append(RuleLook(ref, "Allow", not words, "; ".join(words)))
    return PolicyLook("NodePolicy", policy.key, "NodePolicy", None, is_audited(policy), tuple(rules))


def _peer_words(world: PolicyWorld, peer: NodePolicyPeer, address: str) -> str:
    if peer.ip_block is not None:
        return block_words(peer.ip_block, address)
    if peer.node_selector is not None:
        owners = [node for node in world.nodes.values() if address in node_addresses(node)]
        for node in owners:
            lacking = ",".join(map(requirement_text, unmet(peer.node_selector, node.metadata.labels or {})))
            return f"node {node.metadata.name} is not {lacking}"
        return f"{address} is no node's address"
    pod = world.pod_by_address.get(address)
    if pod is None:
        return f"{address} is no pod's address"
    return pod_words(world, pod, peer.namespace_selector, peer.pod_selector)


def _ports(listed: NodePolicyPort) -> Ports:
    if listed.port is None:
        return Ports(listed.protocol)
    return Ports(listed.protocol, listed.port, listed.end_port or listed.port)
