"""Random pods, policies and packets for the differential test of policy, as `worlds` makes them for Services."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from hypothesis import strategies as st
from worlds import HERE, LOCAL, NODE4, NODE6, OTHER_NODE, REMOTE, SECOND, THERE, Choices

from waggle.model.meta import ObjectKey
from waggle.model.objects import Node, Pod
from waggle.model.packets import End
from waggle.model.policy_flows import PolicyPacket
from waggle.model.policy_objects import ClusterNetworkPolicy, Namespace, NetworkPolicy
from waggle.testing.frames import RST
from waggle.testing.policy_differential import Probe

NAMESPACES = ("x", "y", "z")
OWN = frozenset((NODE4, NODE6, *SECOND))
#: (namespace, name), addresses by family, node
PODS = tuple(
    (ObjectKey(NAMESPACES[n % 3], f"p{n}"), pair, node)
    for n, (pair, node) in enumerate([*((pair, HERE) for pair in LOCAL), *((pair, THERE) for pair in REMOTE)])
)
INTERFACES = {address: key for key, pair, node in PODS if node == HERE for address in pair}
WORLD = (("192.0.2.77", "2001:db8::77"), ("203.0.113.200", "2001:db8:cb::c8"))
ENDS = (*LOCAL, *LOCAL, *REMOTE, *WORLD, OTHER_NODE, (NODE4, NODE6), SECOND)
PORTS = (80, 81, 79, 90, 53, 1000)
VIPS = ("10.96.0.1", "fd00:10:96::1")
#: protocol, frontend, backend
SERVICES = tuple(
    (protocol, End(address, port), End(pair[v], 81))
    for v in (0, 1)
    for protocol in ("TCP", "UDP", "SCTP")
    for address, port, pair in (
        (VIPS[v], 80, LOCAL[1]),
        (VIPS[v], 81, REMOTE[0]),
        (("0.0.0.0", "::")[v], 30080, LOCAL[0]),
    )
)
BLOCKS: dict[str, list[str]] = {
    "0.0.0.0/0": ["10.0.0.0/8", "10.244.1.0/24", "192.0.2.0/24"],
    "10.244.0.0/16": ["10.244.1.10/31", "10.244.2.0/24"],
    "10.244.1.10/32": [],
    "10.244.2.8/29": ["10.244.2.11/32"],
    "192.0.2.0/29": ["192.0.2.1/32", "192.0.2.3/32"],
    "192.0.2.0/24": ["192.0.2.77/32"],
    "::/0": ["fd00::/8", "fd00:10:244:1::/64", "2001:db8::/64"],
    "fd00:10:244::/48": ["fd00:10:244:1::10/127", "fd00:10:244:2::/64"],
    "2001:db8::/64": ["2001:db8::1/128", "2001:db8::77/128"],
}
POLICIES = (*(("x", n) for n in "ab"), *(("y", n) for n in "ab"), ("z", "a"))
Spec = dict[str, Any]


# -- objects ----------------------------------------------------------------------------------------------------------


def labels(choose: Choices) -> dict[str, str]:
    found = {"app": choose.of("a", "b", ""), "tier": choose.of("", "t", "u")}
    return {key: value for key, value in found.items() if value}


def pod(choose: Choices) -> Pod:
    key, pair, node = PODS[choose.number(len(PODS) - 1)]
    ports = choose.few(
        lambda: {
            "containerPort": choose.of(80, 81, 53),
            "name": choose.of("web", "dns"),
            "protocol": choose.of("TCP", "UDP", "SCTP"),
        },
        2,
    )
    addresses = pair
    if node == THERE:  # one address may be gone, or another pod's of before
        addresses = choose.of(pair, pair, pair[:1], pair[1:], REMOTE[0])
    where = choose.of("containers", "containers", "initContainers")
    special = choose.often("", choose.of("host", "ended"), 8) if node == THERE else ""
    spec = {"nodeName": node, where: [{"ports": ports, "restartPolicy": "Always"}], "hostNetwork": special == "host"}
    status = {"phase": "Succeeded" if special == "ended" else "Running", "podIPs": [{"ip": ip} for ip in addresses]}
    metadata = {"name": key.name, "namespace": key.namespace, "labels": labels(choose)}
    return msgspec.convert({"metadata": metadata, "spec": spec, "status": status}, Pod)


def namespace(choose: Choices) -> Namespace:
    return msgspec.convert({"metadata": {"name": choose.of(*NAMESPACES), "labels": labels(choose)}}, Namespace)


def node(choose: Choices) -> Node:
    name, addresses = choose.of((HERE, (NODE4, NODE6)), (THERE, OTHER_NODE))
    entries = [{"type": "InternalIP", "address": address} for address in addresses]
    return msgspec.convert(
        {"metadata": {"name": name, "labels": labels(choose)}, "status": {"addresses": entries}}, Node
    )


def selector(choose: Choices) -> Spec:
    kind = choose.number(7)
    if kind < 2:
        return {}
    if kind < 5:
        return {"matchLabels": choose.of({"app": "a"}, {"app": "b"}, {"tier": "t"}, {"app": "a", "tier": "t"})}
    key, operator = choose.of("app", "tier"), choose.of("In", "NotIn", "Exists", "DoesNotExist")
    values = {"values": choose.of(["a", "t"], ["b"])} if operator in ("In", "NotIn") else {}
    return {"matchExpressions": [{"key": key, "operator": operator, **values}]}


def namespaces(choose: Choices) -> Spec:
    by_name = [{"matchLabels": {"kubernetes.io/metadata.name": name}} for name in NAMESPACES]
    return choose.of(selector(choose), *by_name)


def block(choose: Choices) -> Spec:
    cidr = choose.of(*BLOCKS)
    excepted = choose.few(lambda: choose.of(*BLOCKS[cidr]), 2) if BLOCKS[cidr] else []
    return {"ipBlock": {"cidr": cidr, "except": sorted(set(excepted))}}


def peer(choose: Choices) -> Spec:
    match choose.number(4):
        case 0:
            return {"podSelector": selector(choose)}
        case 1:
            return {"namespaceSelector": namespaces(choose)}
        case 2:
            return {"podSelector": selector(choose), "namespaceSelector": namespaces(choose)}
        case _:
            return block(choose)


def port(choose: Choices) -> Spec:
    protocol = {"protocol": choose.of("TCP", "TCP", "UDP", "SCTP")}
    number = choose.of(*PORTS)
    match choose.number(4):
        case 0:
            return protocol
        case 1 | 2:
            return protocol | {"port": number}
        case 3:
            return protocol | {"port": number, "endPort": number + choose.of(0, 1, 10, 2000)}
        case _:
            return protocol | {"port": choose.of("web", "dns")}


def network_policy(choose: Choices) -> NetworkPolicy:
    where, name = choose.of(*POLICIES)
    spec: Spec = {"podSelector": selector(choose)}
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        rules = choose.few(
            lambda peers=peers: {
                peers: choose.few(lambda: peer(choose), 2),
                "ports": choose.few(lambda: port(choose), 2),
            },
            2,
        )
        spec[direction] = rules
    spec["policyTypes"] = choose.of(["Ingress", "Egress"], ["Ingress"], ["Egress"], None)
    metadata = {"name": name, "namespace": where, "annotations": audited(choose)}
    return msgspec.convert({"metadata": metadata, "spec": spec}, NetworkPolicy)


def audited(choose: Choices) -> dict[str, str]:
    return choose.often({}, {"waggle.io/audit": "true"}, 5)


def inside(choose: Choices) -> Spec:
    if choose.number(1):
        return {"namespaces": namespaces(choose)}
    return {"pods": {"namespaceSelector": namespaces(choose), "podSelector": selector(choose)}}


def cluster_peer(choose: Choices, direction: str) -> Spec:
    beyond = direction == "egress"
    match choose.number(9):
        case 0 | 1 | 2 | 3:
            return inside(choose)
        case 4 | 5 if beyond:
            return {"nodes": selector(choose)}
        case 6 | 7 | 8 if beyond:
            return {"networks": choose.few(lambda: choose.of(*BLOCKS), 2, 1)}
        case 9:
            return {}  # of a newer version
        case _:
            return inside(choose)


def cluster_port(choose: Choices) -> Spec:
    number = choose.of(*PORTS)
    where = choose.of(
        {},
        {"destinationPort": {"number": number}},
        {"destinationPort": {"range": {"start": number, "end": number + 10}}},
    )
    return choose.of({"tcp": where}, {"tcp": where}, {"udp": where}, {"sctp": where}, {"destinationNamedPort": "web"})


def cluster_policy(choose: Choices) -> ClusterNetworkPolicy:
    spec: Spec = {"subject": inside(choose), "tier": choose.of("Admin", "Baseline"), "priority": choose.of(1, 2)}
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        spec[direction] = choose.few(
            lambda direction=direction, peers=peers: {
                "action": choose.of("Accept", "Deny", "Pass"),
                peers: choose.few(lambda: cluster_peer(choose, direction), 2, 1),
                "protocols": choose.of(None, [cluster_port(choose)], [cluster_port(choose), cluster_port(choose)]),
            },
            2,
        )
    metadata = {"name": choose.of("c1", "c2"), "annotations": audited(choose)}
    return msgspec.convert({"metadata": metadata, "spec": spec}, ClusterNetworkPolicy)


def any_object(choose: Choices) -> Any:
    kinds = (network_policy, pod, network_policy, pod, network_policy, namespace, cluster_policy, node)
    return choose.of(*kinds)(choose)


# -- steps ------------------------------------------------------------------------------------------------------------


class Packet(NamedTuple):
    packet: PolicyPacket
    later_fragment: bool
    by_stack: bool
    flags: int


@dataclass(frozen=True)
class Packets:
    packets: tuple[Packet, ...]


@dataclass(frozen=True)
class Onward:
    """The n-th flow there is goes on."""

    flow: int
    begins: bool


@dataclass(frozen=True)
class Answer:
    """The other end of the n-th flow answers."""

    flow: int


@dataclass(frozen=True)
class Complaint:
    """An error about the n-th flow, or about one that is made up; of what its receiver sent, or of what it got. By
    whom; "": by the one that the packet was for."""

    source: str
    flow: int
    made_up: PolicyPacket | None
    back: bool
    destination: str


@dataclass(frozen=True)
class Evict:
    flow: int


@dataclass(frozen=True)
class Change:
    """Objects come or change; the n-th that there is goes, where a number is given."""

    objects: tuple[Any, ...]
    gone: int | None
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class Restart:
    """Objects come or change while there is no agent."""

    objects: tuple[Any, ...]
    probes: tuple[Probe, ...]


Step = Packets | Onward | Answer | Complaint | Evict | Change | Restart


def random_packet(choose: Choices) -> PolicyPacket:
    v = choose.number(1)
    protocol = choose.of("TCP", "TCP", "UDP", "UDP", "SCTP", "ICMP", "GRE")
    here, other = choose.of(*LOCAL)[v], choose.of(*ENDS)[v]
    source, target = (here, other) if choose.number(1) else (other, here)
    begins = choose.often(True, False, 3)
    if protocol == "ICMP":
        protocol = "ICMPv6" if v else "ICMP"
        number = choose.of(7, 8)
        ends = (End(source, number), End(target, 0))
        return (
            PolicyPacket(protocol, *ends)
            if begins
            else PolicyPacket(protocol, End(source, 0), End(target, number), False)
        )
    if protocol == "GRE":
        return PolicyPacket(protocol, End(source, 0), End(target, 0))
    own = choose.of(1000, 1001, 80)
    end = End(target, choose.of(*PORTS))
    if choose.often(False, True, 5):
        end = End(VIPS[v], choose.of(80, 81)) if source == here else End(choose.of(NODE4, SECOND[0]), 30080)
        if source != here and v:
            end = End(choose.of(NODE6, SECOND[1]), 30080)
    if source in OWN and end.address not in INTERFACES:
        end = End(here, end.port)
    return PolicyPacket(protocol, End(source, own), end, begins or protocol == "UDP")


def probe(choose: Choices) -> Probe:
    v = choose.number(1)
    here, other = choose.of(*LOCAL)[v], choose.of(*LOCAL, *REMOTE, *WORLD, OTHER_NODE)[v]
    ends = (here, other) if choose.number(1) else (other, here)
    return Probe(choose.of("TCP", "UDP", "SCTP"), *ends, choose.of(*PORTS))


def step(choose: Choices) -> Step | None:
    """What happens next; None: nothing."""
    match choose.number(23):
        case 0:
            return None
        case 1 | 2 | 3 | 4 | 5 | 6 | 7:
            return Packets(tuple(sent(choose) for _ in range(4)))
        case 8 | 9 | 10:
            return Onward(choose.number(255), choose.often(False, True, 3))
        case 11 | 12 | 13 | 14:
            return Answer(choose.number(255))
        case 15 | 16:
            v = choose.number(1)
            packet = random_packet(choose)
            flow, back = choose.number(255), choose.often(False, True, 3)
            made_up = packet if choose.often(False, True, 2) else None
            other = choose.often("", choose.of(*ENDS)[v], 5)
            return Complaint(choose.of("", "", choose.of(*ENDS)[v]), flow, made_up, back, other)
        case 17:
            return Evict(choose.number(255))
        case 18 | 19 | 20 | 21 | 22:
            objects = tuple(choose.few(lambda: any_object(choose), 2, 1))
            gone = choose.often(None, choose.number(255), 3)
            return Change(objects if choose.number(3) else (), gone, probes(choose))
        case _:
            objects = tuple(choose.few(lambda: any_object(choose), 2))
            return Restart(objects, probes(choose))


def sent(choose: Choices) -> Packet:
    packet = random_packet(choose)
    return Packet(packet, choose.often(False, True, 8), choose.often(False, True, 4), choose.often(0, RST, 8))


def probes(choose: Choices) -> tuple[Probe, ...]:
    return tuple(probe(choose) for _ in range(8)) if choose.number(2) == 2 else ()


@dataclass(frozen=True)
class World:
    keep: bool
    objects: list[Any]
    steps: list[Step]


OBJECT_BYTES = 60
STEP_BYTES = 140


def worlds(length: int) -> st.SearchStrategy[World]:
    """Worlds of so many steps, of which some are none."""

    def make(first: bytes, pods: list[bytes], objects: list[bytes], then: list[bytes]) -> World:
        choose = Choices(first)
        keep = choose.often(False, True, 4)
        made = [pod(Choices(bytes((number,)) + data)) for number, data in enumerate(pods)]
        made += [any_object(Choices(data)) for data in objects]
        steps = [step(Choices(data)) for data in then]
        return World(keep, made, [one for one in steps if one is not None])

    def some(size: int) -> st.SearchStrategy[bytes]:
        return st.binary(min_size=size, max_size=size)

    return st.builds(
        make,
        some(4),
        st.lists(some(OBJECT_BYTES), min_size=2, max_size=len(PODS)),
        st.lists(some(OBJECT_BYTES), min_size=2, max_size=8),
        st.lists(some(STEP_BYTES), min_size=length, max_size=length),
    )
