"""The smallest change that would let a packet pass, tried out: every proposal is judged by the model before it is made.

Where a pod is isolated and no rule allows, that is one more NetworkPolicy about this pod, this peer and this port. It
selects among the pods that the policy in the way selects, so that it isolates nobody who is not isolated already. Where
a ClusterNetworkPolicy denies, it is a rule before the one that does. Several changes may be needed, one after another.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from waggle.model.meta import ObjectKey, ObjectMeta
from waggle.model.objects import KINDS, Pod
from waggle.model.policy import (
    Action,
    Cause,
    PolicyWorld,
    Side,
    Traffic,
    cluster_rules_of,
    decide,
    is_understood,
    judge,
    peer_matches,
    peers_match,
    peers_of,
    ports_match,
    rules_of,
)
from waggle.model.policy_objects import (
    NAMESPACE_NAME_LABEL,
    ClusterEgressRule,
    ClusterIngressRule,
    ClusterNetworkPolicy,
    ClusterNetworkPolicySpec,
    ClusterPeer,
    ClusterProtocol,
    ClusterSubject,
    DestinationPort,
    IPBlock,
    LabelSelector,
    NamespacedPods,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    NodePolicy,
    PortMatch,
)
from waggle.model.policy_rules import Direction
from waggle.model.selectors import unmet

INGRESS = Direction.INGRESS
#: Labels that a controller gives to pods of one generation: policies that name them break at the next.
_PASSING = frozenset(
    {
        "pod-template-hash",
        "pod-template-generation",
        "controller-revision-hash",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "controller-uid",
        "job-name",
        "batch.kubernetes.io/controller-uid",
        "batch.kubernetes.io/job-name",
        "batch.kubernetes.io/job-completion-index",
    }
)
_MOST_STEPS = 6
#: Of a policy that accepts names: before most others, and with room before it.
_NAME_PRIORITY = 100


class Fix(NamedTuple):
    """One change. `manifest`: an object to apply, or None where nothing can be written for it; `instead`: other changes
    that would do, in words."""

    words: str
    manifest: dict[str, Any] | None
    instead: tuple[str, ...] = ()


def fixes(world: PolicyWorld, traffic: Traffic) -> list[Fix]:
    """All that has to change for a packet to pass, in order; empty where it passes, or nothing is known to help."""
    found: list[Fix] = []
    for _ in range(_MOST_STEPS):
        decision = _decided(world, traffic)
        if decision.allowed:
            return found
        made = _fix(world, decision.deciding, traffic)
        if made is None:
            return []
        fix, changed = made
        found.append(fix)
        if changed is None:
            return found
        world = changed
    return []


def _decided(world: PolicyWorld, traffic: Traffic) -> Any:
    return decide(world, traffic.source, traffic.destination, traffic.protocol, traffic.port)


def _fix(world: PolicyWorld, side: Side, traffic: Traffic) -> tuple[Fix, PolicyWorld | None] | None:
    assert side.pod is not None
    pod = world.pods[side.pod]
    if side.cause is Cause.ISOLATED:
        return _allow(world, side, pod, traffic)
    return _before(world, side, traffic)


# -- NetworkPolicy --------------------------------------------------------------------------------------------------


def _allow(world: PolicyWorld, side: Side, pod: Pod, traffic: Traffic) -> tuple[Fix, PolicyWorld] | None:
    direction = side.direction
    isolating = world.policies_of(pod, direction, with_audited=False)
    selector = isolating[0].spec.pod_selector
    labels = {**selector.match_labels, **_lasting(pod.metadata.labels or {})}
    other = traffic.source if direction is INGRESS else traffic.destination
    if direction is not INGRESS and world.called(other, traffic.source):
        return _allow_name(world, pod, other, traffic)
    peer = _peer(world, pod.metadata.namespace, other)
    ports = None
    if traffic.port is not None:
        ports = [NetworkPolicyPort(protocol=traffic.protocol, port=traffic.port)]
    spec = NetworkPolicySpec(
        pod_selector=LabelSelector(match_labels=labels, match_expressions=selector.match_expressions),
        policy_types=[direction.value],
        ingress=[NetworkPolicyIngressRule(from_=[peer], ports=ports)] if direction is INGRESS else None,
        egress=[NetworkPolicyEgressRule(to=[peer], ports=ports)] if direction is not INGRESS else None,
    )
    name = free_name(world.policies, pod.metadata.namespace, f"allow-{direction.lower()}")
    policy = NetworkPolicy(ObjectMeta(name=name, namespace=pod.metadata.namespace), spec)
    changed = replace(world, policies={**world.policies, policy.key: policy})
    if not judge(changed, direction, traffic).allowed:
        return None
    whole = "" if ports else ", on every port, as rules cannot name this protocol"
    words = f"allow it by a NetworkPolicy in namespace {pod.metadata.namespace}{whole}"
    instead = tuple(_alternatives(world, isolating, direction, pod, traffic))
    return Fix(words, manifest_of(policy), instead), changed


def _allow_name(world: PolicyWorld, pod: Pod, address: str, traffic: Traffic) -> tuple[Fix, PolicyWorld] | None:
    """Addresses behind names come and go, and only a ClusterNetworkPolicy can speak of names."""
    subject = ClusterSubject(pods=_pods_like(pod))
    peer = ClusterPeer(domain_names=[world.called(address, traffic.source)[0]])
    rule = ClusterEgressRule(action=Action.ACCEPT.value, to=[peer], protocols=_protocols(traffic))
    spec = ClusterNetworkPolicySpec(tier="Admin", priority=_NAME_PRIORITY, subject=subject, egress=[rule])
    policy = ClusterNetworkPolicy(ObjectMeta(name=f"{pod.metadata.namespace}-names"), spec)
    if policy.key in world.cluster_policies:
        return None
    changed = replace(world, cluster_policies={**world.cluster_policies, policy.key: policy})
    if not judge(changed, Direction.EGRESS, traffic).allowed:
        return None
    return Fix("accept the name by a ClusterNetworkPolicy", manifest_of(policy)), changed


def _alternatives(
    world: PolicyWorld, isolating: list[NetworkPolicy], direction: Direction, pod: Pod, traffic: Traffic
) -> Iterator[str]:
    """Labels and ports that rules which are there already lack by little."""
    other = traffic.source if direction is INGRESS else traffic.destination
    stranger = world.pod_by_address.get(other)
    field = direction.lower()
    for policy in isolating:
        for index, rule in enumerate(rules_of(policy, direction)):
            name = f"NetworkPolicy {policy.key} {field}[{index}]"
            if peers_match(world, policy, rule, direction, traffic):
                if traffic.port is not None:
                    yield f"add port {traffic.port} of {traffic.protocol} to {name}, for all that it allows"
                continue
            if stranger is None or not ports_match(world, rule.ports, traffic):
                continue
            for peer in peers_of(rule) or ():
                labels = _label_that_helps(world, policy, peer, stranger)
                if labels:
                    text = ",".join(f"{key}={value}" for key, value in labels.items())
                    yield f"label pod {stranger.key} with {text}: {name} allows it then"


def _label_that_helps(
    world: PolicyWorld, policy: NetworkPolicy, peer: NetworkPolicyPeer, pod: Pod
) -> dict[str, str] | None:
    """Labels that make a pod such a peer, none of which it has with another value; None where there are none."""
    if peer.pod_selector is None or peer.ip_block is not None:
        return None
    labels: dict[str, str] = {}
    for requirement in unmet(peer.pod_selector, pod.metadata.labels or {}):
        if requirement.operator not in ("In", "Exists") or requirement.key in (pod.metadata.labels or {}):
            return None
        labels[requirement.key] = requirement.values[0] if requirement.values else ""
    if not labels:
        return None
    metadata = msgspec.structs.replace(pod.metadata, labels={**(pod.metadata.labels or {}), **labels})
    changed = replace(world, pods={**world.pods, pod.key: msgspec.structs.replace(pod, metadata=metadata)})
    address = next(address for address, one in world.pod_by_address.items() if one is pod)
    return labels if peer_matches(changed, policy.metadata.namespace, peer, address) else None


def _peer(world: PolicyWorld, namespace: str, address: str) -> NetworkPolicyPeer:
    pod = world.pod_by_address.get(address)
    labels = _lasting(pod.metadata.labels or {}) if pod else {}
    if pod is None or not labels:
        return NetworkPolicyPeer(ip_block=IPBlock(whole_block(address)))
    around = None
    if pod.metadata.namespace != namespace:
        around = LabelSelector({NAMESPACE_NAME_LABEL: pod.metadata.namespace})
    return NetworkPolicyPeer(pod_selector=LabelSelector(labels), namespace_selector=around)


# -- ClusterNetworkPolicy -------------------------------------------------------------------------------------------


def _before(world: PolicyWorld, side: Side, traffic: Traffic) -> tuple[Fix, PolicyWorld | None] | None:
    """A rule before the one that denies: one that passes on where what comes after allows, else one that accepts."""
    assert side.rule is not None
    ref = side.rule
    policy = world.cluster_policies[ref.key]
    rule = cluster_rules_of(policy, ref.direction)[ref.index]
    field = ref.direction.lower()
    if not is_understood(rule):
        words = f"{ref} has a part that is not known here, and so denies everything: take that part away"
        return Fix(words, None), None
    other = traffic.source if ref.direction is INGRESS else traffic.destination
    for action in (Action.PASS, Action.ACCEPT):
        changed = _with_rule(world, policy, ref.direction, ref.index, action, other, traffic)
        if changed is not None and judge(changed, ref.direction, traffic).allowed:
            words = f"{action.value.lower()} it by a rule before {field}[{ref.index}] of ClusterNetworkPolicy {ref.key}"
            if all(is_understood(one) for side in Direction for one in cluster_rules_of(policy, side)):
                return Fix(words, manifest_of(changed.cluster_policies[ref.key])), changed
            # what is not known here would be lost from an object that is written here
            return Fix(f"{words}; other parts of it are not known here, so that it has to be edited", None), changed
    return None


def _with_rule(
    world: PolicyWorld,
    policy: ClusterNetworkPolicy,
    direction: Direction,
    index: int,
    action: Action,
    address: str,
    traffic: Traffic,
) -> PolicyWorld | None:
    pod = world.pod_by_address.get(address)
    if pod is not None:
        peer = ClusterPeer(pods=_pods_like(pod))
    elif direction is INGRESS:
        return None  # rules of ingress can name pods alone
    elif called := world.called(address, traffic.source):
        if action is not Action.ACCEPT:
            return None  # names are for Accept alone
        peer = ClusterPeer(domain_names=[called[0]])
    else:
        peer = ClusterPeer(networks=[whole_block(address)])
    protocols = _protocols(traffic)
    ingress, egress = list(policy.spec.ingress), list(policy.spec.egress)
    if direction is INGRESS:
        ingress.insert(index, ClusterIngressRule(action=action.value, from_=[peer], protocols=protocols))
    else:
        egress.insert(index, ClusterEgressRule(action=action.value, to=[peer], protocols=protocols))
    spec = msgspec.structs.replace(policy.spec, ingress=ingress, egress=egress)
    changed = msgspec.structs.replace(policy, spec=spec)
    return replace(world, cluster_policies={**world.cluster_policies, policy.key: changed})


def _protocols(traffic: Traffic) -> list[ClusterProtocol] | None:
    """The port of a packet; None for one that has none."""
    if traffic.port is None:
        return None
    match = PortMatch(DestinationPort(number=traffic.port))
    by_name = {
        "TCP": ClusterProtocol(tcp=match),
        "UDP": ClusterProtocol(udp=match),
        "SCTP": ClusterProtocol(sctp=match),
    }
    return [by_name[traffic.protocol]]


# -- small things ---------------------------------------------------------------------------------------------------


def _lasting(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels of a pod that the next one of its kind will have too."""
    return {key: value for key, value in labels.items() if key not in _PASSING}


def _pods_like(pod: Pod) -> NamespacedPods:
    """The pods of a namespace that have the labels of one."""
    return NamespacedPods(
        namespace_selector=LabelSelector({NAMESPACE_NAME_LABEL: pod.metadata.namespace}),
        pod_selector=LabelSelector(_lasting(pod.metadata.labels or {})),
    )


def whole_block(address: str) -> str:
    """The block of one address."""
    return str(ipaddress.ip_network(address))


def free_name(taken: Container[ObjectKey], namespace: str, name: str) -> str:
    """The name, or with a number behind it where it is taken: what is applied must not replace another policy."""
    number = 1
    while ObjectKey(namespace, name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return name if number == 1 else f"{name}-{number}"


def manifest_of(obj: NetworkPolicy | ClusterNetworkPolicy | NodePolicy) -> dict[str, Any]:
    """An object as it would be applied."""
    kind = type(obj).__name__
    made = msgspec.to_builtins(obj)
    made["metadata"] = {
        key: made["metadata"][key] for key in ("name", "namespace", "annotations") if made["metadata"].get(key)
    }
    if isinstance(obj, NetworkPolicy):
        made["spec"] = {"podSelector": {}, **made["spec"]}
    return {"apiVersion": KINDS[kind][0], "kind": kind, **made}
