"""What would let a node's own packet pass: one more NodePolicy, since rules of all of them add up."""

from __future__ import annotations

from collections.abc import Container

import msgspec

from waggle.model.meta import ObjectKey, ObjectMeta
from waggle.model.node_trace import NodeLook
from waggle.model.policy import Traffic
from waggle.model.policy_fix import Fix, free_name, manifest_of, whole_block
from waggle.model.policy_objects import (
    IPBlock,
    NodePolicy,
    NodePolicyEgressRule,
    NodePolicyIngressRule,
    NodePolicyPeer,
    NodePolicyPort,
    NodePolicySpec,
)
from waggle.model.policy_rules import Direction


def node_fix(look: NodeLook, traffic: Traffic, taken: Container[ObjectKey]) -> Fix:
    """For the nodes that the policy in the way selects, so that it isolates no other. `taken`: those there are."""
    by_key = {policy.key: policy for policy in look.own.policies}
    in_the_way = next(by_key[one.key] for one in look.policies if not one.audited)
    peer = traffic.source if look.direction is Direction.INGRESS else traffic.destination
    peers = [NodePolicyPeer(ip_block=IPBlock(whole_block(peer)))]
    ports = None if traffic.port is None else [NodePolicyPort(traffic.protocol, traffic.port)]
    spec = NodePolicySpec(node_selector=in_the_way.spec.node_selector, policy_types=[look.direction.value])
    if look.direction is Direction.INGRESS:
        spec = msgspec.structs.replace(spec, ingress=[NodePolicyIngressRule(peers, ports)])
    else:
        spec = msgspec.structs.replace(spec, egress=[NodePolicyEgressRule(peers, ports)])
    wished = f"allow-{look.direction.value.lower()}-{traffic.protocol.lower()}-{traffic.port or 'any'}"
    policy = NodePolicy(ObjectMeta(name=free_name(taken, "", wished)), spec)
    words = f"one more NodePolicy that allows it on node {look.node}, which then waits to be confirmed there"
    return Fix(words, manifest_of(policy), (f"a rule of {in_the_way.metadata.name} for {peer}",))
