"""Every policy and rule that is asked about a packet, and why it matched or not, in words.

The same small functions as in `policy` answer each question here; only the words are new. Audited policies are among
them, marked: they decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from waggle.model.meta import ObjectKey
from waggle.model.objects import Pod
from waggle.model.policy import (
    Cause,
    ClusterRule,
    NetworkRule,
    Policy,
    PolicyWorld,
    Side,
    Traffic,
    applies,
    block_has,
    cluster_peer_matches,
    cluster_peers_of,
    cluster_rules_of,
    in_network,
    is_audited,
    is_understood,
    judge,
    named_ports,
    peer_matches,
    peers_match,
    peers_of,
    ports_match,
    protocol_matches,
    rule_matches,
    rules_of,
)
from waggle.model.policy_objects import (
    ClusterNetworkPolicy,
    ClusterPeer,
    ClusterSubject,
    IPBlock,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
)
from waggle.model.policy_rules import Direction, RuleRef
from waggle.model.policy_space import LAST_PORT, Ports, rule_ports
from waggle.model.selectors import requirement_text, unmet

INGRESS = Direction.INGRESS


class RuleLook(NamedTuple):
    """A rule that was asked. `why` says why it does not match, "" where it does."""

    rule: RuleRef
    action: str
    matches: bool
    why: str


class PolicyLook(NamedTuple):
    """A policy that selects the pod. `tier`: NetworkPolicy is one too; `rules` in the order in which they are asked."""

    kind: str
    key: ObjectKey
    tier: str
    priority: int | None
    audited: bool
    rules: tuple[RuleLook, ...]


class SideLook(NamedTuple):
    """One direction: the verdict, and every policy that selects the pod, in the order of asking. `beside`:
    how many NetworkPolicies of the pod's namespace do not select it in this direction."""

    side: Side
    policies: tuple[PolicyLook, ...]
    beside: int


def look(world: PolicyWorld, direction: Direction, traffic: Traffic) -> SideLook:
    """What is asked about a packet on one side."""
    side = judge(world, direction, traffic)
    if side.pod is None or side.cause is Cause.ITSELF:
        return SideLook(side, (), 0)
    pod = world.pods[side.pod]
    policies = world.policies_of(pod, direction, with_audited=True)
    looks = [
        *_cluster_looks(world, "Admin", direction, pod, traffic),
        *(_network_look(world, policy, direction, traffic) for policy in policies),
        *_cluster_looks(world, "Baseline", direction, pod, traffic),
    ]
    around = sum(1 for key in world.policies if key.namespace == pod.metadata.namespace)
    return SideLook(side, tuple(looks), around - len(policies))


def _network_look(world: PolicyWorld, policy: NetworkPolicy, direction: Direction, traffic: Traffic) -> PolicyLook:
    rules = []
    for index, rule in enumerate(rules_of(policy, direction)):
        matches = rule_matches(world, policy, rule, direction, traffic)
        why = "" if matches else _network_words(world, policy, rule, direction, traffic)
        rules.append(RuleLook(RuleRef("NetworkPolicy", policy.key, direction, index), "Allow", matches, why))
    return PolicyLook("NetworkPolicy", policy.key, "NetworkPolicy", None, is_audited(policy), tuple(rules))


def _cluster_looks(
    world: PolicyWorld, tier: str, direction: Direction, pod: Pod, traffic: Traffic
) -> Iterator[PolicyLook]:
    for policy in world.cluster_policies_of(pod, tier, with_audited=True):
        rules = []
        for index, rule in enumerate(cluster_rules_of(policy, direction)):
            action = applies(world, rule, traffic)
            why = "" if action else _cluster_words(world, rule, traffic)
            ref = RuleRef("ClusterNetworkPolicy", policy.key, direction, index, rule.name)
            rules.append(RuleLook(ref, str(action or rule.action), action is not None, why))
        if rules:
            yield PolicyLook(
                "ClusterNetworkPolicy", policy.key, tier, policy.spec.priority, is_audited(policy), tuple(rules)
            )


# -- words ----------------------------------------------------------------------------------------------------------


def _network_words(
    world: PolicyWorld, policy: NetworkPolicy, rule: NetworkRule, direction: Direction, traffic: Traffic
) -> str:
    address = traffic.source if direction is INGRESS else traffic.destination
    words = []
    if not peers_match(world, policy, rule, direction, traffic):
        words.append(any_of(network_peer_words(world, policy, peer, address) for peer in peers_of(rule) or ()))
    if not ports_match(world, rule.ports, traffic):
        words.append(ports_words(world, rule_ports(rule) or (), traffic))
    return "; ".join(words)


def network_peer_words(world: PolicyWorld, policy: NetworkPolicy, peer: NetworkPolicyPeer, address: str) -> str:
    """Why an address is not of a peer; "" where it is."""
    if peer_matches(world, policy.metadata.namespace, peer, address):
        return ""
    if peer.ip_block is not None:
        return block_words(peer.ip_block, address)
    pod = world.pod_by_address.get(address)
    if pod is None:
        return f"{address} is no pod's address"
    if peer.namespace_selector is None and pod.metadata.namespace != policy.metadata.namespace:
        return f"{pod.key} is not in namespace {policy.metadata.namespace}"
    return pod_words(world, pod, peer.namespace_selector, peer.pod_selector)


def block_words(block: IPBlock, address: str) -> str:
    """Why an address is not of a block."""
    if in_network(address, block.cidr) and not block_has(block, address):
        return f"{address} is excepted from {block.cidr}"
    return f"{address} is not in {block.cidr}"


def pod_words(world: PolicyWorld, pod: Pod, namespaces: LabelSelector | None, pods: LabelSelector | None) -> str:
    """Which labels a pod and its namespace lack."""
    words = []
    namespace = pod.metadata.namespace
    if namespaces is not None and (lacking := unmet(namespaces, world.labels_of(namespace))):
        words.append(f"namespace {namespace} is not {_all(lacking)}")
    if pods is not None and (lacking := unmet(pods, pod.metadata.labels or {})):
        words.append(f"{pod.key} is not {_all(lacking)}")
    return " and ".join(words)


def _all(lacking: Sequence[object]) -> str:
    return ",".join(requirement_text(requirement) for requirement in lacking)  # type: ignore[arg-type]


def _cluster_words(world: PolicyWorld, rule: ClusterRule, traffic: Traffic) -> str:
    if not is_understood(rule):
        return "a part of it is not known here: it accepts nothing"
    address = traffic.source if type(rule).__name__ == "ClusterIngressRule" else traffic.destination
    words = []
    if not any(cluster_peer_matches(world, peer, address, traffic.source) for peer in cluster_peers_of(rule)):
        words.append(any_of(_cluster_peer_words(world, peer, address, traffic) for peer in cluster_peers_of(rule)))
    if rule.protocols and not any(protocol_matches(world, protocol, traffic) for protocol in rule.protocols):
        words.append(ports_words(world, rule_ports(rule) or (), traffic))
    return "; ".join(words)


def _cluster_peer_words(world: PolicyWorld, peer: ClusterPeer, address: str, traffic: Traffic) -> str:
    if peer.networks is not None:
        return f"{address} is not in {', '.join(peer.networks)}"
    if peer.nodes is not None:
        return f"{address} is of no such node"
    if peer.domain_names is not None:
        names = ", ".join(world.called(address, traffic.source))
        said = f"is called {names}, not" if names else "is not known as"
        return f"{address} {said} {', '.join(peer.domain_names)}"
    pod = world.pod_by_address.get(address)
    if pod is None:
        return f"{address} is no pod's address"
    subject = ClusterSubject(peer.namespaces, peer.pods)
    if subject.pods is not None:
        return pod_words(world, pod, subject.pods.namespace_selector, subject.pods.pod_selector)
    return pod_words(world, pod, subject.namespaces, None)


def ports_words(world: PolicyWorld, ports: Sequence[Ports], traffic: Traffic) -> str:
    """Why a packet is for none of some ports."""
    shown = ", ".join(map(port_text, ports))
    here = traffic.protocol if traffic.port is None else f"{traffic.protocol} {traffic.port}"
    missing = [p.name for p in ports if p.name and not any(named_ports(world, traffic.destination, p.name))]
    unknown = f" (nothing at {traffic.destination} is named {', '.join(missing)})" if missing else ""
    return f"{here} is not {shown}{unknown}"


def port_text(ports: Ports) -> str:
    """Ports of a rule, in few words."""
    if ports.name:
        return f"{ports.protocol} {ports.name}".strip()
    if (ports.first, ports.last) == (1, LAST_PORT):
        return f"any {ports.protocol}"
    numbers = str(ports.first) if ports.first == ports.last else f"{ports.first}-{ports.last}"
    return f"{ports.protocol} {numbers}"


def any_of(words: Iterator[str]) -> str:
    """Why nothing of several matches, from why each does not."""
    found = [word for word in words if word]
    more = f", nor any of {len(found) - 3} more" if len(found) > 3 else ""
    return ", nor: ".join(dict.fromkeys(found[:3])) + more if found else "it names nobody"


def policy_of(world: PolicyWorld, rule: RuleRef) -> Policy:
    """The object a rule is in."""
    found: dict[ObjectKey, NetworkPolicy] | dict[ObjectKey, ClusterNetworkPolicy] = (
        dict(world.policies) if rule.kind == "NetworkPolicy" else dict(world.cluster_policies)
    )
    return found[rule.key]
