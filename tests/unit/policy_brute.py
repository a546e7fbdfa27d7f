"""Random worlds of pods and policies, what the standard says of a packet in them, and a look-up as the programs do it.

`verdict` is written from the standard alone, packet by packet: it knows no predicates, classes or steps.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_right
from dataclasses import dataclass, field
from dataclasses import replace as altered
from functools import cached_property, lru_cache

from hypothesis import strategies as st

from waggle.model.meta import ObjectKey, ObjectMeta
from waggle.model.objects import Container, ContainerPort, Node, NodeAddress, NodeStatus, Pod, PodIP, PodSpec, PodStatus
from waggle.model.policy_objects import (
    AUDIT_ANNOTATION,
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
    LabelSelectorRequirement,
    Namespace,
    NamespacedPods,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    PortMatch,
    PortRange,
)
from waggle.model.policy_rules import NO_RULE, Direction, rule_id
from waggle.plan.policy import PolicyPlanner, full_tables
from waggle.plan.policy_tables import (
    ALLOW,
    ANY,
    AUDIT,
    DENY,
    NAMED,
    NOBODY,
    OPEN,
    STRICT,
    PolicyTables,
    step_key,
)

HERE = "n1"
OWN = frozenset(("192.168.0.1", "fd00:1::1"))
NAMESPACES = ("a", "b")
POD_ADDRESSES = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "10.0.1.2", "fd00::1", "fd00::2", "fd00::3"]
#: Addresses of nodes, of the world, and one in the pods' range that no pod has.
OTHERS = ["192.168.0.1", "192.168.0.2", "fd00:1::1", "fd00:1::2", "8.8.8.8", "10.0.0.9", "2001:db8::1"]
EVERY = [*POD_ADDRESSES, *OTHERS]
PACKETS = [("TCP", 80), ("TCP", 81), ("TCP", None), ("UDP", 53), ("SCTP", 80), ("ICMP", None)]
PATTERNS = ("x.org", "*.y.org")


@dataclass(frozen=True)
class World:
    pods: dict[ObjectKey, Pod] = field(default_factory=dict)
    namespaces: dict[ObjectKey, Namespace] = field(default_factory=dict)
    nodes: dict[ObjectKey, Node] = field(default_factory=dict)
    policies: dict[ObjectKey, NetworkPolicy] = field(default_factory=dict)
    cluster_policies: dict[ObjectKey, ClusterNetworkPolicy] = field(default_factory=dict)

    @cached_property
    def by_address(self) -> dict[str, Pod]:
        found = {}
        for key in sorted(self.pods, reverse=True):
            pod = self.pods[key]
            if not pod.spec.host_network and pod.status.phase not in ("Succeeded", "Failed"):
                found.update({entry.ip: pod for entry in pod.status.pod_ips})
        return found

    @cached_property
    def has_audited(self) -> bool:
        every = (*self.policies.values(), *self.cluster_policies.values())
        return any(policy.metadata.annotations for policy in every)

    @cached_property
    def here(self) -> dict[str, ObjectKey]:
        return {address: pod.key for address, pod in self.by_address.items() if pod.spec.node_name == HERE}

    def tables(self) -> PolicyTables:
        return full_tables(
            here=self.here,
            own_addresses=OWN,
            pods=self.pods,
            namespaces=self.namespaces,
            nodes=self.nodes,
            policies=self.policies,
            cluster_policies=self.cluster_policies,
        )


def feed(planner: PolicyPlanner, old: World, new: World) -> None:
    """Tells a planner what differs."""
    planner.set_own_addresses(OWN)
    for address in old.here.keys() - new.here.keys():
        planner.detach(address)
    setters = [
        ("pods", planner.set_pod),
        ("policies", planner.set_policy),
        ("cluster_policies", planner.set_cluster_policy),
        ("namespaces", lambda key, obj: planner.set_namespace(key.name, obj)),
        ("nodes", lambda key, obj: planner.set_node(key.name, obj)),
    ]
    for name, setter in setters:
        before, after = getattr(old, name), getattr(new, name)
        for key in before.keys() | after.keys():
            if before.get(key) != after.get(key):
                setter(key, after.get(key))
    for address, key in new.here.items():
        planner.attach(address, key)


# -- what the standard says -----------------------------------------------------------------------------------------


def selected(selector: LabelSelector, labels: dict[str, str] | None) -> bool:
    have = labels or {}
    for expression in selector.match_expressions:
        value = have.get(expression.key)
        said = {
            "In": value in expression.values,
            "NotIn": value not in expression.values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not said[expression.operator]:
            return False
    return all(have.get(key) == value for key, value in selector.match_labels.items())


@lru_cache
def inside(address: str, cidr: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


def named(pod: Pod | None, name: str, protocol: str, port: int | None) -> bool:
    containers = [*pod.spec.containers, *(c for c in pod.spec.init_containers if c.restart_policy)] if pod else []
    return any(
        (found.name, found.protocol, found.container_port) == (name, protocol, port)
        for container in containers
        for found in container.ports
    )


@dataclass
class Question:
    world: World
    direction: Direction
    pod: Pod  # whose policies are asked
    peer: str
    target: Pod | None  # the pod that the packet is for
    protocol: str
    port: int | None
    names: frozenset[str]  # patterns that an answer said the peer has
    audited: bool = False

    def namespace_labels(self, name: str) -> dict[str, str]:
        found = self.world.namespaces.get(ObjectKey("", name))
        return {"kubernetes.io/metadata.name": name} | ((found.metadata.labels or {}) if found else {})

    @property
    def peer_pod(self) -> Pod | None:
        return self.world.by_address.get(self.peer)

    def asked(self, policies):
        for policy in sorted(policies, key=lambda policy: policy.key):
            if self.audited or (policy.metadata.annotations or {}).get(AUDIT_ANNOTATION) != "true":
                yield policy

    def network(self):
        """None where nothing isolates; else whether a rule allows, and its number."""
        isolated, allowed = False, None
        for policy in self.asked(self.world.policies.values()):
            types = policy.spec.policy_types or ["Ingress", *(["Egress"] if policy.spec.egress else [])]
            mine = policy.metadata.namespace == self.pod.metadata.namespace
            if (
                not mine
                or self.direction not in types
                or not selected(policy.spec.pod_selector, self.pod.metadata.labels)
            ):
                continue
            isolated = True
            rules = policy.spec.ingress if self.direction == Direction.INGRESS else policy.spec.egress
            for index, rule in enumerate(rules or []):
                peers = rule.from_ if self.direction == Direction.INGRESS else rule.to
                who = not peers or any(self.network_peer(policy.metadata.namespace, peer) for peer in peers)
                if allowed is None and who and (not rule.ports or any(map(self.network_port, rule.ports))):
                    allowed = rule_id("NetworkPolicy", policy.key, self.direction, index)
        return (allowed is not None, allowed or NO_RULE) if isolated else None

    def network_peer(self, namespace: str, peer: NetworkPolicyPeer) -> bool:
        if peer.ip_block:
            block = peer.ip_block
            return inside(self.peer, block.cidr) and not any(inside(self.peer, part) for part in block.except_)
        pod = self.peer_pod
        if pod is None:
            return False
        if peer.namespace_selector is None:
            where = pod.metadata.namespace == namespace
        else:
            where = selected(peer.namespace_selector, self.namespace_labels(pod.metadata.namespace))
        return where and (peer.pod_selector is None or selected(peer.pod_selector, pod.metadata.labels))

    def network_port(self, port: NetworkPolicyPort) -> bool:
        if port.protocol != self.protocol:
            return False
        if port.port is None:
            return True
        if isinstance(port.port, str):
            return named(self.target, port.port, self.protocol, self.port)
        return self.port is not None and port.port <= self.port <= (port.end_port or port.port)

    def tier(self, tier: str):
        """(action, number of the rule) of the first match; None for none."""
        policies = [p for p in self.asked(self.world.cluster_policies.values()) if p.spec.tier == tier]
        for policy in sorted(policies, key=lambda policy: policy.spec.priority):
            subject = policy.spec.subject
            if not self.means(self.pod, subject.namespaces, subject.pods):
                continue
            rules = policy.spec.ingress if self.direction == Direction.INGRESS else policy.spec.egress
            for index, rule in enumerate(rules):
                action = self.cluster_rule(rule)
                if action:
                    return action, rule_id("ClusterNetworkPolicy", policy.key, self.direction, index)
        return None

    def means(self, pod: Pod, namespaces: LabelSelector | None, pods: NamespacedPods | None) -> bool:
        labels = self.namespace_labels(pod.metadata.namespace)
        if namespaces is not None:
            return selected(namespaces, labels)
        return selected(pods.namespace_selector, labels) and selected(pods.pod_selector, pod.metadata.labels)

    def cluster_rule(self, rule) -> str | None:
        peers = rule.from_ if self.direction == Direction.INGRESS else rule.to
        if any(peer == ClusterPeer() for peer in peers):
            return None if rule.action == "Accept" else "Deny"
        who = any(map(self.cluster_peer, peers))
        return rule.action if who and (not rule.protocols or any(map(self.cluster_port, rule.protocols))) else None

    def cluster_peer(self, peer: ClusterPeer) -> bool:
        if peer.nodes is not None:
            nodes = [node for node in self.world.nodes.values() if selected(peer.nodes, node.metadata.labels)]
            return any(entry.address == self.peer for node in nodes for entry in node.status.addresses)
        if peer.networks is not None:
            return any(inside(self.peer, cidr) for cidr in peer.networks)
        if peer.domain_names is not None:
            return any(pattern in self.names for pattern in peer.domain_names)
        return self.peer_pod is not None and self.means(self.peer_pod, peer.namespaces, peer.pods)

    def cluster_port(self, protocol: ClusterProtocol) -> bool:
        if protocol.destination_named_port:
            return named(self.target, protocol.destination_named_port, self.protocol, self.port)
        match = {"TCP": protocol.tcp, "UDP": protocol.udp, "SCTP": protocol.sctp}.get(self.protocol)
        if match is None or match.destination_port is None:
            return match is not None
        wanted = match.destination_port
        low, high = (wanted.range.start, wanted.range.end) if wanted.range else (wanted.number, wanted.number)
        return self.port is not None and low <= self.port <= high

    def outcome(self) -> tuple[bool, int]:
        admin = self.tier("Admin")
        if self.peer in OWN:
            denied = self.direction == Direction.EGRESS and admin is not None and admin[0] == "Deny"
            return (False, admin[1]) if denied else (True, NO_RULE)
        if admin and admin[0] != "Pass":
            return admin[0] == "Accept", admin[1]
        network = self.network()
        if network:
            return network
        baseline = self.tier("Baseline")
        return (baseline[0] != "Deny", baseline[1]) if baseline else (True, NO_RULE)


def verdict(world, direction, own, peer, protocol, port, names=frozenset()) -> tuple[int, int]:
    """(verdict, rule) for a pod here, as the tables have them."""
    pod = world.by_address[own]
    target = pod if direction == Direction.INGRESS else world.by_address.get(peer)
    question = Question(world, direction, pod, peer, target, protocol, port, names)
    allowed, rule = question.outcome()
    if not (allowed and world.has_audited):
        return (ALLOW if allowed else DENY), rule
    strictly, strict_rule = altered(question, audited=True).outcome()
    return (ALLOW, rule) if strictly else (ALLOW | AUDIT, strict_rule)


# -- what the programs do -------------------------------------------------------------------------------------------


@lru_cache
def mapped(address: str) -> int:
    parsed = ipaddress.ip_address(address)
    return int(parsed) | (0xFFFF << 32 if parsed.version == 4 else 0)


@lru_cache
def inside_mapped(address: str, cidr: str) -> int:
    """The length of a prefix, as 16 bytes have it, that holds an address; -1 where it does not."""
    prefix, length = cidr.split("/")
    bits = int(length) + (0 if ":" in prefix else 96)
    return bits if mapped(prefix) >> (128 - bits) == mapped(address) >> (128 - bits) else -1


def class_of(tables: PolicyTables, address: str) -> int:
    if address in tables.classes:
        return tables.classes[address]
    longest = max(tables.ranges, key=lambda cidr: inside_mapped(address, cidr), default=None)
    return tables.ranges[longest] if longest and inside_mapped(address, longest) >= 0 else NOBODY


def at(steps, key: int) -> int:
    return bisect_right(steps, key, key=lambda step: step.start) - 1


def look_up(tables, direction, own, peer, protocol, port, names=frozenset()) -> tuple[int, int]:
    """(verdict, rule) for an address of a pod here, from the tables alone."""
    set_id = tables.pods[own][direction == Direction.EGRESS]
    if set_id == OPEN:
        return ALLOW, NO_RULE
    entries = tables.sets.get(set_id, {})
    class_id = class_of(tables, peer)
    class_id = class_id if class_id in entries else ANY
    if class_id not in entries:
        return DENY, NO_RULE
    key = step_key(protocol, port)
    place = at(entries[class_id], key)
    found = entries[class_id][place]
    best = None
    for pattern in names & tables.patterns.keys() if set_id & 1 and found.verdict != ALLOW else ():
        of_pattern = NAMED | tables.patterns[pattern] | (STRICT if found.verdict & AUDIT else 0)
        if of_pattern in entries:
            step = entries[of_pattern][at(entries[of_pattern], key)]
            before = step.admin < found.admin or step.baseline < found.baseline
            if step.verdict & ALLOW and before and (best is None or step[3:] < best[3:]):
                best = step
    return (ALLOW, best.rule) if best else (found.verdict, found.rule)


# -- random worlds --------------------------------------------------------------------------------------------------

LABELS = st.dictionaries(st.sampled_from(["app", "tier"]), st.sampled_from(["x", "y"]), max_size=2)
EXPRESSION = st.builds(
    lambda key, operator, values: LabelSelectorRequirement(
        key, operator, values if operator in ("In", "NotIn") else []
    ),
    st.sampled_from(["app", "tier", "kubernetes.io/metadata.name"]),
    st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]),
    st.lists(st.sampled_from(["x", "y", "a"]), min_size=1, max_size=2),
)
ALL = st.just(LabelSelector())
SELECTOR = st.one_of(
    st.builds(LabelSelector, st.sampled_from([{"app": "x"}, {"app": "y"}, {"tier": "x"}])),
    st.builds(LabelSelector, LABELS, st.lists(EXPRESSION, max_size=1)),
    ALL,
)
CIDRS = {
    "0.0.0.0/0": ["10.0.0.0/8", "10.0.0.0/16", "8.0.0.0/8"],
    "10.0.0.0/15": ["10.0.0.0/24", "10.0.1.2/32", "10.0.0.0/15"],
    "10.0.0.0/24": ["10.0.0.1/32", "10.0.0.2/31"],
    "10.0.0.2/32": [],
    "192.168.0.0/30": ["192.168.0.1/32"],
    "::/0": ["fd00::/16", "::/8", "2000::/3"],
    "fd00::/64": ["fd00::2/127"],
}
BLOCK = st.sampled_from(sorted(CIDRS)).flatmap(
    lambda cidr: st.builds(
        IPBlock,
        st.just(cidr),
        st.lists(st.sampled_from(CIDRS[cidr]), max_size=2, unique=True) if CIDRS[cidr] else st.just([]),
    )
)
PORT_NAME = st.sampled_from(["web", "dns"])
PROTOCOL = st.sampled_from(["TCP", "UDP", "SCTP"])
PEER = st.one_of(
    st.builds(NetworkPolicyPeer, SELECTOR),
    st.builds(NetworkPolicyPeer, st.none(), SELECTOR),
    st.builds(NetworkPolicyPeer, SELECTOR, SELECTOR),
    st.builds(NetworkPolicyPeer, ip_block=BLOCK),
    st.builds(NetworkPolicyPeer, ip_block=BLOCK),
)
PORT = st.one_of(
    st.builds(NetworkPolicyPort, PROTOCOL),
    st.builds(NetworkPolicyPort, PROTOCOL, st.sampled_from([80, 81, 53])),
    st.builds(NetworkPolicyPort, PROTOCOL, st.just(80), st.sampled_from([81, 9000])),
    st.builds(NetworkPolicyPort, PROTOCOL, PORT_NAME),
)
PEERS = st.lists(PEER, min_size=1, max_size=2) | st.lists(PEER, min_size=1, max_size=2) | st.sampled_from([None, []])
PORTS = st.lists(PORT, min_size=1, max_size=2) | st.sampled_from([None, []])
AUDITED = st.sampled_from([None, None, None, {AUDIT_ANNOTATION: "true"}])


def policy(key: ObjectKey, annotations, spec: NetworkPolicySpec) -> NetworkPolicy:
    return NetworkPolicy(ObjectMeta(name=key.name, namespace=key.namespace, annotations=annotations), spec)


NETWORK_SPEC = st.builds(
    NetworkPolicySpec,
    ALL | SELECTOR,
    st.sampled_from([None, None, ["Ingress"], ["Egress"], ["Egress", "Ingress"]]),
    st.lists(st.builds(NetworkPolicyIngressRule, PEERS, PORTS), min_size=1, max_size=2) | st.none(),
    st.lists(st.builds(NetworkPolicyEgressRule, PEERS, PORTS), min_size=1, max_size=2) | st.none(),
)
NAMESPACED = st.builds(NamespacedPods, SELECTOR, SELECTOR)
NUMBERED_PORT = st.one_of(
    st.builds(ClusterProtocol, tcp=st.just(PortMatch())),
    st.builds(ClusterProtocol, tcp=st.just(PortMatch(DestinationPort(number=80)))),
    st.builds(ClusterProtocol, udp=st.just(PortMatch(DestinationPort(range=PortRange(50, 80))))),
    st.builds(ClusterProtocol, sctp=st.just(PortMatch())),
)
CLUSTER_PORT = NUMBERED_PORT | st.builds(ClusterProtocol, destination_named_port=PORT_NAME)
POD_PEER = st.builds(ClusterPeer, SELECTOR) | st.builds(ClusterPeer, pods=NAMESPACED)
UNKNOWN_PEER = st.just(ClusterPeer())
BEYOND = st.builds(ClusterPeer, nodes=SELECTOR) | st.builds(
    ClusterPeer, networks=st.lists(st.sampled_from(sorted(CIDRS)), min_size=1, max_size=2)
)
DOMAIN = st.builds(ClusterPeer, domain_names=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2, unique=True))
CLUSTER_PORTS = st.none() | st.lists(CLUSTER_PORT, min_size=1, max_size=2)
ACTION = st.sampled_from(["Accept", "Deny", "Pass"])
INGRESS_RULE = st.builds(
    ClusterIngressRule, ACTION, st.lists(POD_PEER | POD_PEER | UNKNOWN_PEER, min_size=1, max_size=2), CLUSTER_PORTS
)
EGRESS_RULE = st.one_of(
    st.builds(ClusterEgressRule, ACTION, st.lists(POD_PEER | BEYOND, min_size=1, max_size=2), CLUSTER_PORTS),
    st.builds(ClusterEgressRule, ACTION, st.lists(BEYOND | UNKNOWN_PEER, min_size=1, max_size=2), CLUSTER_PORTS),
)
DOMAIN_RULE = st.builds(  # an apiserver refuses named ports of these
    ClusterEgressRule,
    st.just("Accept"),
    st.lists(DOMAIN, min_size=1, max_size=2),
    st.none() | st.lists(NUMBERED_PORT, min_size=1, max_size=2),
)
SUBJECT = (
    st.builds(ClusterSubject, ALL) | st.builds(ClusterSubject, SELECTOR) | st.builds(ClusterSubject, pods=NAMESPACED)
)


def cluster_policies(egress, audited):
    def build(name, annotations, tier, priority, subject, ingress, egress):
        spec = ClusterNetworkPolicySpec(tier, priority, subject, ingress, egress)
        return ClusterNetworkPolicy(ObjectMeta(name=name, annotations=annotations), spec)

    return st.builds(
        build,
        st.sampled_from(["c1", "c2", "c3"]),
        audited,
        st.sampled_from(["Admin", "Baseline"]),
        st.integers(0, 1),
        SUBJECT,
        st.lists(INGRESS_RULE, min_size=1, max_size=2),
        st.lists(egress, min_size=1, max_size=3),
    )


def pod(key: ObjectKey, node: str, labels, addresses, ports, special: str) -> Pod:
    container = Container(ports=[ContainerPort(number, name, protocol) for name, protocol, number in ports])
    sidecar = special == "sidecar"
    spec = PodSpec(
        node,
        host_network=special == "host",
        containers=[] if sidecar else [container],
        init_containers=[Container(restart_policy="Always", ports=container.ports)] if sidecar else [],
    )
    phase = "Succeeded" if special == "ended" else "Running"
    status = PodStatus(phase, pod_ips=[PodIP(address) for address in addresses])
    return Pod(ObjectMeta(name=key.name, namespace=key.namespace, labels=labels), spec, status)


NAMED_PORTS = [("web", "TCP", 80), ("web", "TCP", 81), ("dns", "UDP", 53), ("web", "SCTP", 80), ("dns", "TCP", 80)]
POD_KEYS = [ObjectKey(namespace, name) for namespace in NAMESPACES for name in ("p", "q", "r")]
POD = st.builds(
    pod,
    st.sampled_from(POD_KEYS),
    st.sampled_from([HERE, HERE, HERE, "n2"]),
    LABELS,
    st.lists(st.sampled_from(POD_ADDRESSES), min_size=1, max_size=2, unique=True),
    st.lists(st.sampled_from(NAMED_PORTS), max_size=2, unique=True),
    st.sampled_from([*[""] * 6, "host", "ended", "sidecar"]),
)
NAMESPACE = st.builds(
    lambda name, labels: Namespace(ObjectMeta(name=name, labels=labels)), st.sampled_from(NAMESPACES), LABELS
)
NODE = st.builds(
    lambda name, labels: Node(
        ObjectMeta(name=name, labels=labels),
        status=NodeStatus(
            [NodeAddress("InternalIP", f"192.168.0.{name[1]}"), NodeAddress("InternalIP", f"fd00:1::{name[1]}")]
        ),
    ),
    st.sampled_from([HERE, "n2"]),
    LABELS,
)
POLICY = st.builds(
    policy, st.builds(ObjectKey, st.sampled_from(NAMESPACES), st.sampled_from(["p1", "p2"])), AUDITED, NETWORK_SPEC
)
CLUSTER_POLICY = cluster_policies(EGRESS_RULE | DOMAIN_RULE, AUDITED)


def _keyed(objects):
    return {found.key: found for found in objects}


def worlds():
    return st.builds(
        World,
        st.lists(POD, min_size=4, max_size=8).map(_keyed),
        st.lists(NAMESPACE, max_size=3).map(_keyed),
        st.lists(NODE, max_size=3).map(_keyed),
        st.lists(POLICY, min_size=1, max_size=5).map(_keyed),
        st.lists(CLUSTER_POLICY, max_size=3).map(_keyed),
    )


@st.composite
def histories(draw, *, one_at_a_time: bool = False) -> list[World]:
    """A world and what becomes of it: objects come, change and go, sometimes several at once."""
    found = [draw(worlds())]
    kinds = {
        "pods": POD,
        "namespaces": NAMESPACE,
        "nodes": NODE,
        "policies": POLICY,
        "cluster_policies": CLUSTER_POLICY,
    }
    for _ in range(draw(st.integers(1, 3))):
        world = found[-1]
        for kind in draw(
            st.lists(
                st.sampled_from([*sorted(kinds), "policies", "policies"]),
                min_size=1,
                max_size=1 if one_at_a_time else 3,
            )
        ):
            objects = dict(getattr(world, kind))
            goes = bool(objects) and draw(st.booleans())
            if goes:
                del objects[draw(st.sampled_from(sorted(objects)))]
            if not goes or (not one_at_a_time and draw(st.booleans())):
                objects |= _keyed([draw(kinds[kind])])
            world = altered(world, **{kind: objects})
        found.append(world)
    return found
