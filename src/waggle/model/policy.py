"""Who may talk to whom: what NetworkPolicies and ClusterNetworkPolicies say of a packet, from the objects themselves.

`decide` answers for the first packet of a flow; what flows add (replies pass) is in `policy_flows`. Nothing here knows
of classes, sets or tables: planning and the programs are compared with it; `waggle why`, `waggle policy diff` ask it.

What is judged is the original source and the final destination: after Services have been translated, before the source
becomes the node's. The egress policies of the pod that sends and the ingress policies of the pod that gets it must both
allow it. For each of them, in this order (the first that applies decides):

1. A pod may talk to itself.
2. ClusterNetworkPolicies of tier Admin by priority, then name; their rules in order: Accept, Deny, or Pass to 4.
3. A pod and the node it runs on may talk to each other: only a Deny of 2 towards the node comes before that.
4. NetworkPolicies that select the pod in this direction: any rule of any of them allows; where there are policies and
   no rule matches, the packet is denied.
5. ClusterNetworkPolicies of tier Baseline, as in 2; Pass allows.
6. Allowed.

Audited policies do none of this; where they would turn what passes into a drop, the decision says so.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property, lru_cache
from typing import NamedTuple

from waggle.model.meta import ObjectKey
from waggle.model.objects import Node, Pod
from waggle.model.policy_objects import (
    AUDIT_ANNOTATION,
    ClusterEgressRule,
    ClusterIngressRule,
    ClusterNetworkPolicy,
    ClusterPeer,
    ClusterProtocol,
    ClusterSubject,
    IPBlock,
    Namespace,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    PortMatch,
)
from waggle.model.policy_rules import Direction, RuleRef
from waggle.model.selectors import namespace_labels, selects

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
#: What has ports. Of every other protocol only rules without ports can match.
WITH_PORTS = frozenset(("TCP", "UDP", "SCTP"))

NetworkRule = NetworkPolicyIngressRule | NetworkPolicyEgressRule
ClusterRule = ClusterIngressRule | ClusterEgressRule
Policy = NetworkPolicy | ClusterNetworkPolicy


class Action(StrEnum):
    """What a rule of a ClusterNetworkPolicy does with a packet that it matches."""

    ACCEPT = "Accept"
    DENY = "Deny"
    PASS = "Pass"


class Cause(StrEnum):
    """What made a direction's verdict."""

    NO_POD = "no pod"  # no pod of this node at this end
    ITSELF = "itself"  # both ends are the same
    OWN_NODE = "own node"  # the other end is the node that the pod runs on
    RULE = "rule"  # a rule matched
    ISOLATED = "isolated"  # NetworkPolicies select the pod and no rule allows
    NOTHING = "nothing"  # nothing decides: allowed


class Traffic(NamedTuple):
    """What is judged. `port` is the destination's; None where there is none: ICMP, a fragment that is not the first."""

    source: str
    destination: str
    protocol: str
    port: int | None = None


class Side(NamedTuple):
    """One direction's verdict. `pod`: whose policies were asked, None for none. `isolated`: NetworkPolicies select it.

    `audit`: what enforcing the audited policies too would make of a packet that passes; None where it passes then too.
    """

    direction: Direction
    pod: ObjectKey | None
    allowed: bool
    cause: Cause
    rule: RuleRef | None = None
    isolated: bool = False
    audit: Outcome | None = None


class Decision(NamedTuple):
    """What must happen to a packet that begins a flow."""

    egress: Side
    ingress: Side

    @property
    def allowed(self) -> bool:
        return self.egress.allowed and self.ingress.allowed

    @property
    def deciding(self) -> Side:
        """The side that a drop, or the report of an audited policy, is about; egress, which is asked first, for what
        passes."""
        if not self.allowed:
            return self.ingress if self.egress.allowed else self.egress
        return self.ingress if self.ingress.audit and not self.egress.audit else self.egress

    @property
    def audited(self) -> bool:
        """It passes, and would not were the audited policies enforced."""
        return self.allowed and bool(self.egress.audit or self.ingress.audit)


class Outcome(NamedTuple):
    """What a set of policies says of one direction."""

    allowed: bool
    cause: Cause
    rule: RuleRef | None = None


@dataclass(frozen=True)
class PolicyWorld:
    """The objects, by key, and where they are looked at from. Addresses are canonical text.

    `here`: the addresses of the pods of the node whose programs are meant, which judges no others; None: every pod is
    judged, as all nodes together do. `node` and `node_addresses` are that node's name and own addresses; those of
    others are in their Node objects. `names`: what DNS answers that hold still said an address is called; `told`: the
    same by the address of the pod that was told, and for that pod alone.
    """

    pods: Mapping[ObjectKey, Pod] = field(default_factory=dict)
    namespaces: Mapping[ObjectKey, Namespace] = field(default_factory=dict)
    nodes: Mapping[ObjectKey, Node] = field(default_factory=dict)
    policies: Mapping[ObjectKey, NetworkPolicy] = field(default_factory=dict)
    cluster_policies: Mapping[ObjectKey, ClusterNetworkPolicy] = field(default_factory=dict)
    here: frozenset[str] | None = None
    node: str = ""
    node_addresses: frozenset[str] = frozenset()
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    told: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)

    def called(self, address: str, asker: str) -> list[str]:
        """What an address is called as far as the pod with the address `asker` may know."""
        return [*self.names.get(address, ()), *self.told.get(asker, {}).get(address, ())]

    @cached_property
    def pod_by_address(self) -> dict[str, Pod]:
        """The pods that policies can mean, by each of their addresses. One that ends gives way to one that does not."""
        found: dict[str, Pod] = {}
        for pod in sorted(self.pods.values(), key=lambda pod: pod.key):
            for address in pod_addresses(pod):
                known = found.get(address)
                if known is None or (known.metadata.deletion_timestamp and not pod.metadata.deletion_timestamp):
                    found[address] = pod
        return found

    @cached_property
    def meant_pods(self) -> dict[str, list[Pod]]:
        """By namespace, the pods that policies can mean."""
        found: dict[str, list[Pod]] = {}
        for pod in self.pods.values():
            if pod_addresses(pod):
                found.setdefault(pod.metadata.namespace, []).append(pod)
        return found

    @cached_property
    def policies_in(self) -> dict[str, list[NetworkPolicy]]:
        """The NetworkPolicies of each namespace, by name."""
        found: dict[str, list[NetworkPolicy]] = {}
        for key in sorted(self.policies):
            found.setdefault(key.namespace, []).append(self.policies[key])
        return found

    @cached_property
    def has_audited(self) -> bool:
        every: list[Policy] = [*self.policies.values(), *self.cluster_policies.values()]
        return any(map(is_audited, every))

    def labels_of(self, namespace: str) -> dict[str, str]:
        """The labels of a namespace, whether there is an object of it or not."""
        if namespace not in self._labels:
            self._labels[namespace] = namespace_labels(namespace, self.namespaces.get(ObjectKey("", namespace)))
        return self._labels[namespace]

    @cached_property
    def _labels(self) -> dict[str, dict[str, str]]:
        return {}

    def own_node(self, pod: Pod) -> frozenset[str]:
        """The addresses of the node that a pod runs on."""
        if self.here is not None:
            return self.node_addresses
        name = pod.spec.node_name
        node = self.nodes.get(ObjectKey("", name)) if name else None
        found = frozenset(node_addresses(node)) if node else frozenset[str]()
        return found | self.node_addresses if name and name == self.node else found

    def policies_of(self, pod: Pod, direction: Direction, *, with_audited: bool) -> list[NetworkPolicy]:
        """The NetworkPolicies that isolate a pod in a direction, by name."""
        return [policy for policy in self._selecting[pod.key][direction] if with_audited or not is_audited(policy)]

    @cached_property
    def _selecting(self) -> _Memo:
        return _Memo(self)

    def cluster_policies_of(self, pod: Pod, tier: str, *, with_audited: bool) -> list[ClusterNetworkPolicy]:
        """The ClusterNetworkPolicies of a tier that select a pod, in the order in which they are asked."""
        found = self._selecting[pod.key].cluster
        return [p for p in found if p.spec.tier == tier and (with_audited or not is_audited(p))]


class _Selecting(dict[Direction, list[NetworkPolicy]]):
    """The policies that select one pod."""

    cluster: list[ClusterNetworkPolicy]


class _Memo(dict[ObjectKey, _Selecting]):
    """What selects a pod is asked for every packet; the objects of a world never change."""

    def __init__(self, world: PolicyWorld) -> None:
        self._world = world

    def __missing__(self, key: ObjectKey) -> _Selecting:
        world, pod = self._world, self._world.pods[key]
        policies = world.policies_in.get(key.namespace, ())
        found = _Selecting(
            (direction, [p for p in policies if direction in policy_types(p) and selects_pod(p, pod)])
            for direction in Direction
        )
        cluster = [p for p in world.cluster_policies.values() if subject_has(world, p.spec.subject, pod)]
        found.cluster = sorted(cluster, key=lambda p: (p.spec.priority, p.metadata.name))
        self[key] = found
        return found


def decide(world: PolicyWorld, source: str, destination: str, protocol: str, port: int | None = None) -> Decision:
    """What must happen to the first packet of a flow. Ports of protocols that have none do not count."""
    has_ports = protocol in WITH_PORTS
    traffic = Traffic(canonical(source), canonical(destination), protocol, port if has_ports else None)
    return Decision(judge(world, EGRESS, traffic), judge(world, INGRESS, traffic))


def judge(world: PolicyWorld, direction: Direction, traffic: Traffic) -> Side:
    """What the policies of the pod at one end say."""
    own = traffic.source if direction is EGRESS else traffic.destination
    pod = world.pod_by_address.get(own)
    if pod is None or (world.here is not None and own not in world.here):
        return Side(direction, None, True, Cause.NO_POD)
    said = outcome(world, direction, pod, traffic, with_audited=False)
    isolated = bool(world.policies_of(pod, direction, with_audited=False))
    audit = None
    if said.allowed and world.has_audited:
        strict = outcome(world, direction, pod, traffic, with_audited=True)
        audit = None if strict.allowed else strict
    return Side(direction, pod.key, said.allowed, said.cause, said.rule, isolated, audit)


def outcome(world: PolicyWorld, direction: Direction, pod: Pod, traffic: Traffic, *, with_audited: bool) -> Outcome:
    """The order of the module's description, for one pod."""
    if traffic.source == traffic.destination:
        return Outcome(True, Cause.ITSELF)
    peer = traffic.destination if direction is EGRESS else traffic.source
    admin = first_match(world, "Admin", direction, pod, traffic, with_audited=with_audited)
    is_own_node = peer in world.own_node(pod)
    if is_own_node and not (direction is EGRESS and admin and admin[0] is Action.DENY):
        return Outcome(True, Cause.OWN_NODE)
    if admin and admin[0] is not Action.PASS:
        return Outcome(admin[0] is Action.ACCEPT, Cause.RULE, admin[1])
    policies = world.policies_of(pod, direction, with_audited=with_audited)
    if policies:
        allowing = next(allowing_rules(world, policies, direction, pod, traffic), None)
        return Outcome(True, Cause.RULE, allowing) if allowing else Outcome(False, Cause.ISOLATED)
    baseline = first_match(world, "Baseline", direction, pod, traffic, with_audited=with_audited)
    if baseline:
        return Outcome(baseline[0] is not Action.DENY, Cause.RULE, baseline[1])
    return Outcome(True, Cause.NOTHING)


# -- NetworkPolicy --------------------------------------------------------------------------------------------------


def policy_types(policy: NetworkPolicy) -> tuple[Direction, ...]:
    """The directions in which a policy isolates: those it lists; where it lists none, ingress, and egress if there are
    rules for that (as the apiserver has it: an empty list of egress rules is none)."""
    listed = policy.spec.policy_types
    if listed:
        return tuple(direction for direction in Direction if direction in listed)
    return (INGRESS, EGRESS) if policy.spec.egress else (INGRESS,)


def selects_pod(policy: NetworkPolicy, pod: Pod) -> bool:
    """Whether a pod is one that the policy is about."""
    return policy.metadata.namespace == pod.metadata.namespace and selects(
        policy.spec.pod_selector, pod.metadata.labels or {}
    )


def rules_of(policy: NetworkPolicy, direction: Direction) -> Sequence[NetworkRule]:
    """A policy's rules in one direction."""
    return (policy.spec.ingress if direction is INGRESS else policy.spec.egress) or ()


def peers_of(rule: NetworkRule) -> list[NetworkPolicyPeer] | None:
    """What a rule says of the other end."""
    return rule.from_ if isinstance(rule, NetworkPolicyIngressRule) else rule.to


def allowing_rules(
    world: PolicyWorld, policies: Sequence[NetworkPolicy], direction: Direction, pod: Pod, traffic: Traffic
) -> Iterator[RuleRef]:
    """Every rule that allows it; the first one is said to have decided."""
    for policy in policies:
        for index, rule in enumerate(rules_of(policy, direction)):
            if rule_matches(world, policy, rule, direction, traffic):
                yield RuleRef("NetworkPolicy", policy.key, direction, index)


def rule_matches(
    world: PolicyWorld, policy: NetworkPolicy, rule: NetworkRule, direction: Direction, traffic: Traffic
) -> bool:
    """Whether a rule allows it."""
    return peers_match(world, policy, rule, direction, traffic) and ports_match(world, rule.ports, traffic)


def peers_match(
    world: PolicyWorld, policy: NetworkPolicy, rule: NetworkRule, direction: Direction, traffic: Traffic
) -> bool:
    """Whether the other end is one that a rule means; no list or an empty one means everybody."""
    address = traffic.source if direction is INGRESS else traffic.destination
    peers = peers_of(rule)
    return not peers or any(peer_matches(world, policy.metadata.namespace, peer, address) for peer in peers)


def peer_matches(world: PolicyWorld, namespace: str, peer: NetworkPolicyPeer, address: str) -> bool:
    """Whether an address is of a peer; `namespace` is the policy's."""
    if peer.ip_block is not None:
        return block_has(peer.ip_block, address)
    pod = world.pod_by_address.get(address)
    if pod is None or (peer.pod_selector is None and peer.namespace_selector is None):
        return False
    if peer.namespace_selector is None:
        if pod.metadata.namespace != namespace:
            return False
    elif not selects(peer.namespace_selector, world.labels_of(pod.metadata.namespace)):
        return False
    return peer.pod_selector is None or selects(peer.pod_selector, pod.metadata.labels or {})


def block_has(block: IPBlock, address: str) -> bool:
    """Whether a block holds an address, whoever has that. What it excepts may be in another block."""
    return in_network(address, block.cidr) and not any(in_network(address, part) for part in block.except_)


def ports_match(world: PolicyWorld, ports: Sequence[NetworkPolicyPort] | None, traffic: Traffic) -> bool:
    """Whether a packet is for one of a rule's ports; no list or an empty one means every packet, of any protocol."""
    return not ports or any(port_matches(world, port, traffic) for port in ports)


def port_matches(world: PolicyWorld, port: NetworkPolicyPort, traffic: Traffic) -> bool:
    """A port by number, by range, by its name on the pod that the packet is for, or all ports of a protocol."""
    if (port.protocol or "TCP") != traffic.protocol:
        return False
    if port.port is None or port.port == "":
        return True
    if traffic.port is None:
        return False
    if isinstance(port.port, str):
        return (traffic.protocol, traffic.port) in named_ports(world, traffic.destination, port.port)
    return port.port <= traffic.port <= (port.end_port or port.port)


def named_ports(world: PolicyWorld, address: str, name: str) -> set[tuple[str, int]]:
    """(protocol, number) of the ports that have a name on the pod at an address."""
    pod = world.pod_by_address.get(address)
    return {(protocol, number) for found, protocol, number in container_ports(pod) if found == name} if pod else set()


def container_ports(pod: Pod) -> Iterator[tuple[str, str, int]]:
    """(name, protocol, number) of a pod's named ports; of init containers only those that keep running."""
    sidecars = [container for container in pod.spec.init_containers if container.restart_policy == "Always"]
    for container in (*pod.spec.containers, *sidecars):
        for port in container.ports:
            if port.name:
                yield port.name, port.protocol or "TCP", port.container_port


# -- ClusterNetworkPolicy -------------------------------------------------------------------------------------------


def first_match(
    world: PolicyWorld, tier: str, direction: Direction, pod: Pod, traffic: Traffic, *, with_audited: bool
) -> tuple[Action, RuleRef] | None:
    """What the first rule of a tier that matches does, and which it is."""
    for policy in world.cluster_policies_of(pod, tier, with_audited=with_audited):
        for index, rule in enumerate(cluster_rules_of(policy, direction)):
            action = applies(world, rule, traffic)
            if action is not None:
                return action, RuleRef("ClusterNetworkPolicy", policy.key, direction, index, rule.name)
    return None


def subject_has(world: PolicyWorld, subject: ClusterSubject, pod: Pod) -> bool:
    """Whether a pod is one that a ClusterNetworkPolicy is about."""
    labels = world.labels_of(pod.metadata.namespace)
    if subject.namespaces is not None:
        return selects(subject.namespaces, labels)
    return (
        subject.pods is not None
        and selects(subject.pods.namespace_selector, labels)
        and selects(subject.pods.pod_selector, pod.metadata.labels or {})
    )


def cluster_rules_of(policy: ClusterNetworkPolicy, direction: Direction) -> Sequence[ClusterRule]:
    """A policy's rules in one direction, in the order in which they are asked."""
    return policy.spec.ingress if direction is INGRESS else policy.spec.egress


def cluster_peers_of(rule: ClusterRule) -> list[ClusterPeer]:
    """What a rule says of the other end."""
    return rule.from_ if isinstance(rule, ClusterIngressRule) else rule.to


def applies(world: PolicyWorld, rule: ClusterRule, traffic: Traffic) -> Action | None:
    """What a rule does with a packet; None where it does not match.

    A rule with a part that is not known here comes from a newer version of the resource: it fails closed, as the
    resource demands. An Accept then matches nothing, anything else denies everything.
    """
    if not is_understood(rule):
        return None if rule.action == Action.ACCEPT else Action.DENY
    address = traffic.source if isinstance(rule, ClusterIngressRule) else traffic.destination
    if not any(cluster_peer_matches(world, peer, address, traffic.source) for peer in cluster_peers_of(rule)):
        return None
    if rule.protocols and not any(protocol_matches(world, protocol, traffic) for protocol in rule.protocols):
        return None
    return Action(rule.action)


def is_understood(rule: ClusterRule) -> bool:
    """Whether every part of a rule is one that is known."""
    return (
        rule.action in tuple(Action)
        and all(_peer_is_understood(rule, peer) for peer in cluster_peers_of(rule))
        and all(map(_protocol_is_understood, rule.protocols or ()))
    )


def _peer_is_understood(rule: ClusterRule, peer: ClusterPeer) -> bool:
    pods = [peer.namespaces, peer.pods]
    beyond = [peer.nodes, peer.networks] if isinstance(rule, ClusterEgressRule) else []
    names = [peer.domain_names] if isinstance(rule, ClusterEgressRule) and rule.action == Action.ACCEPT else []
    every = [peer.namespaces, peer.pods, peer.nodes, peer.networks, peer.domain_names]
    given = [part for part in (*pods, *beyond, *names) if part is not None]
    return len(given) == 1 == len([part for part in every if part is not None])


def _protocol_is_understood(protocol: ClusterProtocol) -> bool:
    matches = [match for match in (protocol.tcp, protocol.udp, protocol.sctp) if match is not None]
    if len(matches) + bool(protocol.destination_named_port) != 1:
        return False
    ports = [match.destination_port for match in matches if match.destination_port is not None]
    return all((port.number is None) != (port.range is None) for port in ports)


def cluster_peer_matches(world: PolicyWorld, peer: ClusterPeer, address: str, asker: str = "") -> bool:
    """Whether an address is of a peer. Pods are peers by their labels, and by networks as every address is. `asker`:
    address of the pod that asked for its name, if any did."""
    if peer.nodes is not None:
        nodes = [node for node in world.nodes.values() if selects(peer.nodes, node.metadata.labels or {})]
        return any(address in node_addresses(node) for node in nodes)
    if peer.networks is not None:
        return any(in_network(address, network) for network in peer.networks)
    if peer.domain_names is not None:
        names = world.called(address, asker)
        return any(name_matches(pattern, name) for pattern in peer.domain_names for name in names)
    pod = world.pod_by_address.get(address)
    return pod is not None and subject_has(world, ClusterSubject(peer.namespaces, peer.pods), pod)


def protocol_matches(world: PolicyWorld, protocol: ClusterProtocol, traffic: Traffic) -> bool:
    """A protocol with a port, a range, all its ports; or a port by its name, which says its protocol too."""
    if protocol.destination_named_port:
        named = named_ports(world, traffic.destination, protocol.destination_named_port)
        return traffic.port is not None and (traffic.protocol, traffic.port) in named
    by_name: dict[str, PortMatch | None] = {"TCP": protocol.tcp, "UDP": protocol.udp, "SCTP": protocol.sctp}
    match = by_name.get(traffic.protocol)
    if match is None:
        return False
    port = match.destination_port
    if port is None:
        return True
    if traffic.port is None:
        return False
    if port.range is not None:
        return port.range.start <= traffic.port <= port.range.end
    return traffic.port == port.number


def name_matches(pattern: str, name: str) -> bool:
    """Whether a domain name is meant: *.x is one or more labels before x, and not x itself."""
    pattern, name = pattern.lower().rstrip("."), name.lower().rstrip(".")
    if pattern.startswith("*."):
        return name.endswith(pattern[1:]) and len(name) > len(pattern) - 1
    return pattern == name


# -- pods, nodes, addresses -----------------------------------------------------------------------------------------


def is_audited(policy: Policy) -> bool:
    """Whether a policy only tells what it would do."""
    return (policy.metadata.annotations or {}).get(AUDIT_ANNOTATION) == "true"


def pod_addresses(pod: Pod) -> list[str]:
    """The addresses that mean a pod; none where it shares the node's, or has ended."""
    if pod.spec.host_network or pod.status.phase in ("Succeeded", "Failed"):
        return []
    listed = [entry.ip for entry in pod.status.pod_ips] or [pod.status.pod_ip]
    return [canonical(address) for address in listed if address]


def node_addresses(node: Node) -> list[str]:
    """The addresses of a node's object; host names are none."""
    return [canonical(entry.address) for entry in node.status.addresses if _address(entry.address) is not None]


def in_network(address: str, network: str) -> bool:
    """Whether an address is in a CIDR block of its own family."""
    parsed = _address(address)
    return parsed is not None and parsed in _network(network)


def canonical(address: str) -> str:
    """The one text of an address: FD00::0A is fd00::a."""
    parsed = _address(address)
    return str(parsed) if parsed is not None else address


@lru_cache(maxsize=65536)
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None  # a host name among the addresses of a node


@lru_cache(maxsize=65536)
def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)
