"""What is surely not meant in policies that are right as they stand.

Each finding names an object and the path of a value in it, and says what is the matter. What depends on who is there
(selects nothing, no DNS, equal priorities) is judged by the pods, namespaces and nodes that are known; without any
pods, nothing is said about that.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, combinations
from typing import NamedTuple

from waggle.model.meta import ObjectKey
from waggle.model.objects import Pod
from waggle.model.policy import (
    Action,
    ClusterRule,
    NetworkRule,
    PolicyWorld,
    cluster_peer_matches,
    cluster_peers_of,
    cluster_rules_of,
    is_audited,
    is_understood,
    named_ports,
    node_addresses,
    peer_matches,
    peers_of,
    pod_addresses,
    policy_types,
    rules_of,
    subject_has,
)
from waggle.model.policy_objects import (
    NAMESPACE_NAME_LABEL,
    ClusterNetworkPolicy,
    ClusterPeer,
    ClusterSubject,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyPeer,
)
from waggle.model.policy_rules import Direction
from waggle.model.policy_space import Ports, rule_ports
from waggle.model.selectors import requirements, selector_text, selects

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
Path = tuple[str | int, ...]


class Finding(NamedTuple):
    """One thing. `code` is its short name, `path` the value in the object that it is about."""

    code: str
    kind: str
    key: ObjectKey
    path: Path
    reason: str


def lint(world: PolicyWorld) -> list[Finding]:
    """Everything that is found, by object."""
    found: list[Finding] = []
    for policy in sorted(world.policies.values(), key=lambda p: p.key):
        found += _network_policy(world, policy)
    for cluster_policy in sorted(world.cluster_policies.values(), key=lambda p: p.key):
        found += _cluster_policy(world, cluster_policy)
    found += _equal_priorities(world)
    return found


def _pods(world: PolicyWorld) -> Iterator[Pod]:
    """The pods that policies can mean."""
    return chain.from_iterable(world.meant_pods.values())


def _addresses(world: PolicyWorld) -> Iterator[str]:
    return (address for pod in _pods(world) for address in pod_addresses(pod))


# -- NetworkPolicy --------------------------------------------------------------------------------------------------


def _network_policy(world: PolicyWorld, policy: NetworkPolicy) -> Iterator[Finding]:
    def finding(code: str, path: Path, reason: str) -> Finding:
        return Finding(code, "NetworkPolicy", policy.key, path, reason)

    namespace = policy.metadata.namespace
    if unknown := _unknown(world, [namespace]):
        yield finding(
            "unknown-namespace",
            ("metadata", "namespace"),
            f"there is no namespace {unknown[0]} among those given: {_known(world)}",
        )
    selector = policy.spec.pod_selector
    mine = [p for p in world.meant_pods.get(namespace, ()) if selects(selector, p.metadata.labels or {})]
    if world.meant_pods and not mine:
        text = selector_text(selector)
        what = f"no pod of namespace {namespace} has {text}" if text else f"namespace {namespace} has no pods"
        yield finding("selects-nothing", ("spec", "podSelector"), f"{what}: the policy does nothing")
    types = policy_types(policy)
    for direction in Direction:
        field = direction.lower()
        if direction not in types and rules_of(policy, direction):
            reason = f"policyTypes does not list {direction}: these rules do nothing"
            yield finding("ignored-rules", ("spec", field), reason)
        if direction is EGRESS and policy.spec.egress == [] and EGRESS not in types:
            reason = "an empty list does nothing here: to deny all egress, write policyTypes: [Egress]"
            yield finding("ignored-rules", ("spec", field), reason)
        if direction not in types:
            continue
        for index, rule in enumerate(rules_of(policy, direction)):
            base: Path = ("spec", field, index)
            yield from _network_rule(world, policy, direction, rule, base, mine, finding)
        yield from _shadowed(policy, direction, finding)
    if EGRESS in types:
        yield from _without_dns(world, policy, mine, finding)


_Maker = Callable[[str, Path, str], Finding]


def _network_rule(
    world: PolicyWorld,
    policy: NetworkPolicy,
    direction: Direction,
    rule: NetworkRule,
    base: Path,
    mine: list[Pod],
    finding: _Maker,
) -> Iterator[Finding]:
    side = "from" if direction is INGRESS else "to"
    for number, peer in enumerate(peers_of(rule) or ()):
        path = (*base, side, number)
        yield from _selector_of_namespaces(world, peer.namespace_selector, (*path, "namespaceSelector"), finding)
        namespace = policy.metadata.namespace
        if peer.ip_block is None and world.meant_pods and not any(_peer_pods(world, namespace, peer)):
            yield finding("selects-nothing", path, f"no pod is such a peer: {_peer_text(policy, peer)}")
    blocks = [peer.ip_block.cidr for peer in peers_of(rule) or () if peer.ip_block is not None]
    if blocks and len(blocks) == len(peers_of(rule) or ()):
        yield from _half_open(blocks, mine, (*base, side), "allowed", finding)
    for number, ports in enumerate(rule_ports(rule) or ()):
        if ports.name:
            yield from _named_port(
                world, direction, rule, ports, (*base, "ports", number, "port"), mine, policy, finding
            )


def _peer_pods(world: PolicyWorld, namespace: str, peer: NetworkPolicyPeer) -> Iterator[Pod]:
    around = [namespace] if peer.namespace_selector is None else list(world.meant_pods)
    for pod in chain.from_iterable(world.meant_pods.get(name, ()) for name in around):
        if peer_matches(world, namespace, peer, pod_addresses(pod)[0]):
            yield pod


def _peer_text(policy: NetworkPolicy, peer: NetworkPolicyPeer) -> str:
    pods = selector_text(peer.pod_selector) if peer.pod_selector else ""
    if peer.namespace_selector is None:
        return f"{pods or 'any pod'} in namespace {policy.metadata.namespace}"
    return f"{pods or 'any pod'} in namespaces with {selector_text(peer.namespace_selector) or 'any label'}"


def _named_port(
    world: PolicyWorld,
    direction: Direction,
    rule: NetworkRule,
    ports: Ports,
    path: Path,
    mine: list[Pod],
    policy: NetworkPolicy,
    finding: _Maker,
) -> Iterator[Finding]:
    if direction is INGRESS:
        asked, whose = mine, "that the policy selects"
    else:
        peers = peers_of(rule)
        namespace = policy.metadata.namespace
        asked = [pod for peer in peers for pod in _peer_pods(world, namespace, peer)] if peers else list(_pods(world))
        whose = "that the rule leads to"
    if not asked or any(
        protocol == ports.protocol
        for pod in asked
        for address in pod_addresses(pod)
        for protocol, _ in named_ports(world, address, ports.name)
    ):
        return
    yield finding(
        "unknown-port", path, f"no pod {whose} has a {ports.protocol} port named {ports.name}: it matches nothing"
    )


def _half_open(blocks: Sequence[str], mine: Iterable[Pod], path: Path, what: str, finding: _Maker) -> Iterator[Finding]:
    """Where everything of one family is meant and nothing of the other, or pods have both."""
    parsed = [ipaddress.ip_network(block, strict=False) for block in blocks]
    versions = {block.version for block in parsed}
    if len(versions) != 1:
        return
    dual = any(len({":" in address for address in pod_addresses(pod)}) == 2 for pod in mine)
    whole = any(block.prefixlen <= 1 for block in parsed)
    if dual or whole:
        has, lacks = ("IPv4", "IPv6") if versions == {4} else ("IPv6", "IPv4")
        reason = f"only {has} addresses are {what}, none of {lacks}: add blocks of both families"
        yield finding("one-family", path, reason)


def _without_dns(world: PolicyWorld, policy: NetworkPolicy, mine: list[Pod], finding: _Maker) -> Iterator[Finding]:
    """Pods that may send something, but cannot ask for names. Told for the first policy by name that isolates them."""
    for pod in mine:
        isolating = world.policies_of(pod, EGRESS, with_audited=is_audited(policy))
        if not isolating or isolating[0].key != policy.key or not any(rules_of(p, EGRESS) for p in isolating):
            continue
        rules = [rule for one in isolating for rule in rules_of(one, EGRESS)]
        if not any(map(_may_be_dns, rules)) and not _admin_allows_dns(world, pod):
            reason = (
                f"{pod.key} may send, but no rule of egress allows port 53 of UDP: names cannot be looked up. "
                "Allow UDP and TCP 53 to the DNS server's pods"
            )
            yield finding("no-dns", ("spec", "egress"), reason)
            return


def _admin_allows_dns(world: PolicyWorld, pod: Pod) -> bool:
    return any(
        rule.action == Action.ACCEPT and is_understood(rule) and _may_be_dns(rule)
        for policy in world.cluster_policies_of(pod, "Admin", with_audited=False)
        for rule in cluster_rules_of(policy, EGRESS)
    )


def _may_be_dns(rule: NetworkRule | ClusterRule) -> bool:
    """Whether a rule is about port 53 of UDP; a port with a name may be that."""
    ports = rule_ports(rule)
    return ports is None or any(p.protocol in ("UDP", "") and (p.name or p.first <= 53 <= p.last) for p in ports)


def _shadowed(policy: NetworkPolicy, direction: Direction, finding: _Maker) -> Iterator[Finding]:
    rules = rules_of(policy, direction)
    for index, rule in enumerate(rules):
        for other in (*range(index), *range(index + 1, len(rules))):
            # of two that cover each other, the later one is told
            if _covers(rules[other], rule) and not (other > index and _covers(rule, rules[other])):
                field = direction.lower()
                reason = f"allows nothing that {field}[{other}] does not allow already"
                yield finding("shadowed", ("spec", field, index), reason)
                break


def _covers(one: NetworkRule, other: NetworkRule) -> bool:
    """Whether a rule surely allows all that another does."""
    mine, theirs = peers_of(one), peers_of(other)
    if mine and (not theirs or not all(any(_peer_covers(a, b) for a in mine) for b in theirs)):
        return False
    return _ports_cover(rule_ports(one), rule_ports(other))


def _peer_covers(one: NetworkPolicyPeer, other: NetworkPolicyPeer) -> bool:
    if one.ip_block is not None or other.ip_block is not None:
        if one.ip_block is None or other.ip_block is None:
            return False
        return _block_covers(one.ip_block.cidr, other.ip_block.cidr) and all(
            any(_block_covers(mine, theirs) for mine in other.ip_block.except_)
            or not _overlap(theirs, other.ip_block.cidr)
            for theirs in one.ip_block.except_
        )
    if one.namespace_selector is None and other.namespace_selector is not None:
        return False
    if one.namespace_selector is not None and other.namespace_selector is None:
        namespaces = not requirements(one.namespace_selector)
    else:
        namespaces = _selector_covers(one.namespace_selector, other.namespace_selector)
    return namespaces and _selector_covers(one.pod_selector, other.pod_selector)


def _selector_covers(one: LabelSelector | None, other: LabelSelector | None) -> bool:
    """Whether all that one asks for, the other asks for too; no selector asks for nothing."""
    asked = requirements(other) if other is not None else []
    return all(requirement in asked for requirement in (requirements(one) if one is not None else []))


def _block_covers(one: str, other: str) -> bool:
    a, b = ipaddress.ip_network(one, strict=False), ipaddress.ip_network(other, strict=False)
    return a.version == b.version and b.subnet_of(a)  # type: ignore[arg-type]


def _overlap(one: str, other: str) -> bool:
    a, b = ipaddress.ip_network(one, strict=False), ipaddress.ip_network(other, strict=False)
    return a.version == b.version and a.overlaps(b)


def _ports_cover(mine: list[Ports] | None, theirs: list[Ports] | None) -> bool:
    if mine is None:
        return True
    return theirs is not None and all(any(_port_covers(a, b) for a in mine) for b in theirs)


def _port_covers(one: Ports, other: Ports) -> bool:
    if one.name or other.name:
        # every port of a protocol holds one with a name, if the name's protocol is known to be the same
        whole = not one.name and (one.first, one.last) == Ports("")[1:3]
        return one == other or (whole and one.protocol == other.protocol)
    return one.protocol == other.protocol and one.first <= other.first and other.last <= one.last


# -- ClusterNetworkPolicy -------------------------------------------------------------------------------------------


def _cluster_policy(world: PolicyWorld, policy: ClusterNetworkPolicy) -> Iterator[Finding]:
    def finding(code: str, path: Path, reason: str) -> Finding:
        return Finding(code, "ClusterNetworkPolicy", policy.key, path, reason)

    subject = policy.spec.subject
    mine = [pod for pod in _pods(world) if subject_has(world, subject, pod)]
    if world.meant_pods and not mine:
        yield finding("selects-nothing", ("spec", "subject"), "no pod is its subject: the policy does nothing")
    yield from _subject_namespaces(world, subject, ("spec", "subject"), finding)
    for direction in Direction:
        field, side = direction.lower(), "from" if direction is INGRESS else "to"
        rules = cluster_rules_of(policy, direction)
        for index, rule in enumerate(rules):
            base: Path = ("spec", field, index)
            if not is_understood(rule):
                becomes = "matches nothing" if rule.action == Action.ACCEPT else "denies everything"
                yield finding("not-understood", base, f"a part of it is not known here, so that it {becomes}")
                continue
            for number, peer in enumerate(cluster_peers_of(rule)):
                yield from _cluster_peer(world, peer, (*base, side, number), finding)
            networks = [text for peer in cluster_peers_of(rule) for text in peer.networks or ()]
            if networks:
                done = {"Accept": "accepted", "Deny": "denied", "Pass": "passed on"}[rule.action]
                yield from _half_open(networks, mine, (*base, side), done, finding)
            for number, ports in enumerate(rule_ports(rule) or ()):
                if ports.name and mine and not _has_port(world, direction, rule, ports.name, mine):
                    reason = f"no pod that it is about has a port named {ports.name}: it matches nothing"
                    yield finding("unknown-port", (*base, "protocols", number), reason)
            for other in range(index):
                if is_understood(rules[other]) and _cluster_covers(rules[other], rule):
                    reason = f"never reached: {field}[{other}] ({rules[other].action}) matches all that this one does"
                    yield finding("shadowed", base, reason)
                    break


def _cluster_peer(world: PolicyWorld, peer: ClusterPeer, path: Path, finding: _Maker) -> Iterator[Finding]:
    yield from _subject_namespaces(world, ClusterSubject(peer.namespaces, peer.pods), path, finding)
    if peer.nodes is not None:
        if world.nodes and not any(selects(peer.nodes, n.metadata.labels or {}) for n in world.nodes.values()):
            yield finding("selects-nothing", path, f"no node has {selector_text(peer.nodes)}")
        return
    means_pods = peer.networks is None and peer.domain_names is None and bool(world.meant_pods)
    if means_pods and not any(cluster_peer_matches(world, peer, address) for address in _addresses(world)):
        yield finding("selects-nothing", path, "no pod is such a peer")


def _has_port(world: PolicyWorld, direction: Direction, rule: ClusterRule, name: str, mine: list[Pod]) -> bool:
    asked = mine
    if direction is EGRESS:
        asked = [
            pod
            for pod in _pods(world)
            if any(cluster_peer_matches(world, p, a) for p in cluster_peers_of(rule) for a in pod_addresses(pod))
        ]
    return not asked or any(named_ports(world, a, name) for pod in asked for a in pod_addresses(pod))


def _cluster_covers(one: ClusterRule, other: ClusterRule) -> bool:
    peers = all(any(_cluster_peer_covers(a, b) for a in cluster_peers_of(one)) for b in cluster_peers_of(other))
    return peers and _ports_cover(rule_ports(one), rule_ports(other))


def _cluster_peer_covers(one: ClusterPeer, other: ClusterPeer) -> bool:
    if one.networks is not None:
        return other.networks is not None and all(
            any(_block_covers(mine, theirs) for mine in one.networks) for theirs in other.networks
        )
    if one.domain_names is not None:
        return other.domain_names is not None and set(other.domain_names) <= set(one.domain_names)
    if one.nodes is not None:
        return other.nodes is not None and _selector_covers(one.nodes, other.nodes)
    if other.namespaces is None and other.pods is None:
        return False
    namespaces = one.namespaces if one.pods is None else one.pods.namespace_selector
    theirs = other.namespaces if other.pods is None else other.pods.namespace_selector
    pods = None if one.pods is None else one.pods.pod_selector
    return _selector_covers(namespaces, theirs) and _selector_covers(
        pods, None if other.pods is None else other.pods.pod_selector
    )


def _equal_priorities(world: PolicyWorld) -> Iterator[Finding]:
    """Two policies of which either could decide about a packet, and would decide otherwise."""
    ordered = sorted(world.cluster_policies.values(), key=lambda p: p.key)
    for one, other in combinations(ordered, 2):
        if (one.spec.tier, one.spec.priority) != (other.spec.tier, other.spec.priority):
            continue
        both = [p for p in _pods(world) if all(subject_has(world, x.spec.subject, p) for x in (one, other))]
        if not both:
            continue
        clash = next(
            (
                (direction, first, second)
                for direction in Direction
                for first, a in enumerate(cluster_rules_of(one, direction))
                for second, b in enumerate(cluster_rules_of(other, direction))
                if a.action != b.action and _can_both_match(world, a, b)
            ),
            None,
        )
        if clash is not None:
            direction, first, second = (clash[0].lower(), clash[1], clash[2])
            reason = (
                f"has the priority of {one.key}, and {direction}[{second}] can match what {direction}[{first}] there "
                "matches: which one decides is left to names. Give them different priorities"
            )
            yield Finding("equal-priority", "ClusterNetworkPolicy", other.key, ("spec", "priority"), reason)


def _can_both_match(world: PolicyWorld, one: ClusterRule, other: ClusterRule) -> bool:
    mine, theirs = rule_ports(one), rule_ports(other)
    if mine is not None and theirs is not None and not any(_ports_meet(a, b) for a in mine for b in theirs):
        return False
    return any(_peers_meet(world, a, b) for a in cluster_peers_of(one) for b in cluster_peers_of(other))


def _ports_meet(one: Ports, other: Ports) -> bool:
    if one.name or other.name:
        return one.name == other.name or not (one.name and other.name)
    return one.protocol == other.protocol and one.first <= other.last and other.first <= one.last


def _peers_meet(world: PolicyWorld, one: ClusterPeer, other: ClusterPeer) -> bool:
    """Whether some address is of both: of a pod or node that is known, or anywhere in blocks that overlap."""
    if one.networks and other.networks and any(_overlap(a, b) for a in one.networks for b in other.networks):
        return True
    if one.domain_names and (other.domain_names or other.networks):
        return True
    if other.domain_names and one.networks:
        return True
    nodes = (address for node in world.nodes.values() for address in node_addresses(node))
    known = chain(_addresses(world), nodes)
    return any(cluster_peer_matches(world, one, a) and cluster_peer_matches(world, other, a) for a in known)


# -- namespaces -----------------------------------------------------------------------------------------------------


def _subject_namespaces(world: PolicyWorld, subject: ClusterSubject, path: Path, finding: _Maker) -> Iterator[Finding]:
    yield from _selector_of_namespaces(world, subject.namespaces, (*path, "namespaces"), finding)
    if subject.pods is not None:
        inner = (*path, "pods", "namespaceSelector")
        yield from _selector_of_namespaces(world, subject.pods.namespace_selector, inner, finding)


def _selector_of_namespaces(
    world: PolicyWorld, selector: LabelSelector | None, path: Path, finding: _Maker
) -> Iterator[Finding]:
    """Namespaces that are asked for by name and are not there."""
    for requirement in requirements(selector) if selector is not None else ():
        if requirement.key == NAMESPACE_NAME_LABEL and requirement.operator in ("In", "NotIn"):
            for name in _unknown(world, requirement.values):
                reason = f"there is no namespace {name} among those given: {_known(world)}"
                yield finding("unknown-namespace", path, reason)


def _unknown(world: PolicyWorld, names: Iterable[str]) -> list[str]:
    """Names of namespaces that nothing speaks of; only where there are objects of namespaces at all."""
    if not world.namespaces:
        return []
    known = {key.name for key in world.namespaces} | {pod.metadata.namespace for pod in world.pods.values()}
    return [name for name in names if name not in known]


def _known(world: PolicyWorld) -> str:
    names = sorted({key.name for key in world.namespaces})
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
