"""Random nodes, objects and steps for the differential test: small pools, so that everything meets everything.

Each of them is made of a short string of bytes, one byte per choice, all zero being the plainest. Hypothesis draws the
strings: one draw for a step instead of twenty, and still it finds the smallest that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hypothesis import strategies as st
from msgspec.structs import replace

from waggle.model.choice import NodeFacts
from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_NAME_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    ZONE_LABEL,
    ClientIPConfig,
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    NamedHint,
    Node,
    NodeSpec,
    Object,
    ObjectMeta,
    Pod,
    PodCondition,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServiceCIDR,
    ServiceCIDRSpec,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    SessionAffinityConfig,
)
from waggle.model.packets import LocalNode
from waggle.model.service import BALANCING_ANNOTATION, FORWARDING_ANNOTATION, WEIGHT_ANNOTATION
from waggle.testing.machine import NODE4, NODE6, NON_MASQUERADE

T = TypeVar("T")

NAMESPACE = "t"
HERE, THERE = "here", "there"
ZONES = ("", "a", "b")
SECOND = ("192.0.2.9", "2001:db8::9")  # more addresses of this node
LOCAL = tuple((f"10.244.1.{n}", f"fd00:10:244:1::{n}") for n in (10, 11, 12))
REMOTE = tuple((f"10.244.2.{n}", f"fd00:10:244:2::{n}") for n in (10, 11, 12))
UNATTACHED = ("10.244.1.99", "fd00:10:244:1::99")  # of this node, by another CNI
OUTSIDE = (("192.0.2.77", "2001:db8::77"), ("192.0.2.78", "2001:db8::78"), ("203.0.113.200", "2001:db8:cb::c8"))
OTHER_NODE = ("192.0.2.3", "2001:db8::3")
#: (addresses of a pod by family, its node)
PODS = (
    *((pair, HERE) for pair in LOCAL),
    *((pair, THERE) for pair in REMOTE),
    ((NODE4, NODE6), HERE),  # in the host's network
    (OTHER_NODE, THERE),
    (UNATTACHED, HERE),
)
CLIENTS = (*LOCAL, *OUTSIDE, *REMOTE[:2], OTHER_NODE)
EXTERNAL = (("203.0.113.1", "2001:db8:2::1"), ("203.0.113.2", "2001:DB8:2:0::2"), SECOND)
RANGES = (
    "192.0.2.0/25",
    "192.0.2.77/32",
    "10.244.1.0/24",
    "0.0.0.0/1",
    "0.0.0.0/0",
    " 203.0.113.0/24",
    "2001:db8::/64",
    "2001:db8::77/128",
    "fd00::/8",
    "::/0",
)
FAMILIES = ("IPv4", "IPv6")
#: Service ranges of an object, or configured
SERVICE_CIDRS = (
    ("10.96.0.0/16", "fd00:10:96::/112"),
    ("10.96.0.0/16",),
    ("fd00:10:96::/112",),
    ("10.96.0.0/31", "fd00:10:96::2/127"),  # other cluster addresses are strays
    ("203.0.113.0/25", "2001:db8:2::/64"),  # with addresses of load balancers
    ("10.244.0.0/16", "2001:db8::/64"),  # of pods and nodes: not enforced
)
POD_CIDRS = {"here": ["10.244.1.0/24", "fd00:10:244:1::/64"], "there": ["10.244.2.0/24", "fd00:10:244:2::/64"]}
#: where packets to ports that no Service has go: addresses that Services may have, that are free, that lie outside
ASKED = (
    *(f"10.96.0.{n}" for n in (1, 2, 3, 77)),
    *(f"fd00:10:96::{n}" for n in (1, 2, 3, 77)),
    *("203.0.113.1", "203.0.113.2", "203.0.113.99", "203.0.113.77", "10.97.0.1"),
    *("2001:db8:2::1", "2001:db8:2::2", "2001:db8:2::99", "2001:db8:2::77", "fd00:10:97::1"),
    *SECOND,
)
SERVICES = (0, 1, 0, 1, 0, 1, 2)


class Choices:
    """Bytes as choices. Where they end, the first of everything is chosen."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def number(self, most: int) -> int:
        """0 … most."""
        return next(self._data, 0) % (most + 1)

    def of(self, *values: T) -> T:
        return values[self.number(len(values) - 1)]

    def often(self, usual: T, other: T, one_in: int) -> T:
        return other if self.number(one_in - 1) == one_in - 1 else usual

    def few(self, make: Callable[[], T], most: int, least: int = 0) -> list[T]:
        return [make() for _ in range(least + self.number(most - least))]


# -- objects ----------------------------------------------------------------------------------------------------------


def local_node(choose: Choices) -> LocalNode:
    addresses = frozenset((NODE4, NODE6, *SECOND))
    allowed = choose.of((), ("primary",), ("192.0.2.0/29",), ("2001:db8::/64", "192.0.2.9/32"), ())
    pods = frozenset(address for pair in LOCAL for address in pair)
    facts = NodeFacts(HERE, choose.of(*ZONES))
    ranges = choose.of((), (), (), ("none",), *SERVICE_CIDRS)
    return LocalNode(facts, addresses, (NODE4, NODE6), allowed, pods, NON_MASQUERADE, service_cidr=ranges)


def node_object(name: str, zone: str) -> Node:
    return Node(ObjectMeta(name, labels={ZONE_LABEL: zone} if zone else None), NodeSpec(pod_cidrs=POD_CIDRS[name]))


def service_cidr(choose: Choices) -> ServiceCIDR:
    return ServiceCIDR(ObjectMeta(choose.of("kubernetes", "more")), ServiceCIDRSpec(list(choose.of(*SERVICE_CIDRS))))


def service(choose: Choices, protocols: tuple[str, ...]) -> Service:
    number = choose.of(*SERVICES)
    kind = choose.of(
        "ClusterIP", "NodePort", "LoadBalancer", "NodePort", "LoadBalancer", "LoadBalancer", "ExternalName"
    )
    which = choose.of((0,), (1,), (0, 1), (0, 1))
    cluster_ips = [(f"10.96.0.{number + 1}", f"fd00:10:96::{number + 1}")[f] for f in which]
    cluster_ips = choose.often(cluster_ips, ["None"], 20)
    # the third Service has addresses of its own, so that never two wait for what a third one has
    shared = EXTERNAL if number < 2 else (("203.0.113.99", "2001:db8:2::99"),)
    external = choose.few(lambda: choose.of(*shared), 2)
    ingress = choose.few(
        lambda: LoadBalancerIngress(choose.of(*choose.of(*shared)), choose.of(None, "VIP", "Proxy")), 2
    )
    affinity = choose.of(0, 0, 0, 60, 300)
    spec = ServiceSpec(
        type=kind,
        cluster_ip=cluster_ips[0],
        cluster_ips=cluster_ips,
        ip_families=[FAMILIES[f] for f in which],
        external_ips=[address for pair in external for address in pair] or None,
        ports=service_ports(choose, protocols, number, kind),
        selector=choose.of(None, {"app": "a"}, {"app": "a", "tier": "x"}),
        publish_not_ready_addresses=choose.of(False, True),
        session_affinity="ClientIP" if affinity else "None",
        session_affinity_config=SessionAffinityConfig(ClientIPConfig(affinity)) if affinity else None,
        internal_traffic_policy=choose.of("Cluster", "Cluster", "Local"),
        external_traffic_policy=choose.of("Cluster", "Local"),
        load_balancer_source_ranges=choose.few(lambda: choose.of(*RANGES), 2),
        traffic_distribution=choose.of(None, "PreferClose", "PreferSameZone", "PreferSameNode"),
    )
    labels = choose.often(None, {SERVICE_PROXY_NAME_LABEL: "other"}, 20)
    annotations = choose.often({}, {BALANCING_ANNOTATION: "maglev"}, 4)
    annotations |= choose.often({}, {FORWARDING_ANNOTATION: "dsr"}, 4)
    status = ServiceStatus(LoadBalancerStatus(ingress or None))
    return Service(ObjectMeta(f"s{number}", NAMESPACE, labels=labels, annotations=annotations), spec, status)


def service_ports(choose: Choices, protocols: tuple[str, ...], number: int, kind: str) -> list[ServicePort]:
    found: dict[tuple[int, str], ServicePort] = {}  # as the API server demands
    for index in range(1 + choose.number(1)):
        port, protocol = choose.of(80, 443), choose.of(*protocols)
        target: int | str | None = choose.of(8080, None, "web")
        node_port = choose.of(30080 + number * 10 + index, 0) if kind != "ClusterIP" else 0
        found.setdefault((port, protocol), ServicePort(port, f"p{index}", protocol, target, node_port))
    return list(found.values())


def conditions(choose: Choices) -> EndpointConditions:
    ready, serving = choose.of(True, True, True, None, False), choose.of(True, True, None, False)
    return EndpointConditions(ready, serving, choose.of(None, False, False, True))


def endpoint(choose: Choices, family: int) -> Endpoint:
    addresses, node = choose.of(*PODS)
    hints = EndpointHints(
        choose.of(None, [NamedHint("a")], [NamedHint("b")], [NamedHint("a"), NamedHint("b")]),
        choose.of(None, [NamedHint(HERE)], [NamedHint(THERE)]),
    )
    node_name = choose.often(node, None, 5)
    return Endpoint([addresses[family]], conditions(choose), node_name, None, choose.of(None, None, hints))


def endpoint_slice(choose: Choices, protocols: tuple[str, ...]) -> EndpointSlice:
    family = choose.number(1)
    name = f"s{choose.of(*SERVICES)}"
    suffix = choose.of("x", "y")
    labels = {SERVICE_NAME_LABEL: name} | choose.often({}, {HEADLESS_LABEL: ""}, 20)
    weight = choose.of(None, None, None, {WEIGHT_ANNOTATION: "0"}, {WEIGHT_ANNOTATION: "3"})
    numbers = [(index, protocol, choose.of(8080, 8080, 80, 9090, None)) for index in (0, 1) for protocol in protocols]
    return EndpointSlice(
        ObjectMeta(f"{name}-{FAMILIES[family]}-{suffix}".lower(), NAMESPACE, labels=labels, annotations=weight),
        FAMILIES[family],
        choose.few(lambda: endpoint(choose, family), 5, 1),
        [
            EndpointPort(f"p{index}", protocol, port)
            for index, protocol, port in numbers
            if choose.often(True, False, 4)
        ],
    )


def pod(choose: Choices) -> Pod:
    number = choose.number(len(PODS) - 1)
    addresses, node = PODS[number]
    meta = ObjectMeta(
        f"pod-{number}",
        NAMESPACE,
        labels=choose.of({"app": "a"}, {"app": "a", "tier": "x"}, {"app": "b"}, None),
        deletion_timestamp=choose.of(None, None, "2026-01-01T00:00:00Z"),
    )
    ips = [PodIP(addresses[f]) for f in choose.of((0, 1), (0,), (1,))]
    ready = PodCondition("Ready", choose.of("True", "True", "False"))
    status = PodStatus(choose.of("Running", "Running", "Succeeded"), ips[0].ip, ips, conditions=[ready])
    return Pod(meta, PodSpec(node), status)


def any_object(choose: Choices, protocols: tuple[str, ...]) -> Object:
    match choose.number(8):
        case 8:
            return service_cidr(choose)
        case 0 | 1 | 2:
            return endpoint_slice(choose, protocols)
        case 3 | 4:
            return pod(choose)
        case _:
            return service(choose, protocols)


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Send:
    """A client's packet. `client` and `target` count through what there is, so that any number means something."""

    client: int
    target: int
    port: int
    flags: str
    ttl: int
    size: int
    options: bool
    checksum: bool


@dataclass(frozen=True)
class Again:
    """Another packet of a flow that is known."""

    flow: int
    flags: str


@dataclass(frozen=True)
class Another:
    """The client of a flow that is known begins another to the same frontend, so many seconds later."""

    flow: int
    port: int
    after: int


@dataclass(frozen=True)
class Directly:
    """The client of a flow that is known turns to its backend directly, with the same port."""

    flow: int
    flags: str


@dataclass(frozen=True)
class Reply:
    """What a backend answers; also one that the flow has left."""

    flow: int
    flags: str
    size: int


@dataclass(frozen=True)
class Put:
    obj: Object


@dataclass(frozen=True)
class Turn:
    """The n-th endpoint there is has other conditions; None: it is gone."""

    endpoint: int
    conditions: EndpointConditions | None


@dataclass(frozen=True)
class Remove:
    """The n-th object there is goes."""

    number: int


@dataclass(frozen=True)
class Advance:
    seconds: int


Step = Send | Again | Another | Directly | Reply | Put | Turn | Remove | Advance


def step(choose: Choices, protocols: tuple[str, ...]) -> Step | None:
    """What happens next; None: nothing."""
    match choose.number(24):
        case 0:
            return None
        case 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8:
            return Send(
                choose.number(255),
                choose.number(255) << 8 | choose.number(255),
                choose.of(1000, 1000, 1000, 1001, 40000),
                choose.of("S", "S", "S", "A", "R", "FA", "F"),
                choose.of(64, 64, 64, 64, 2, 1, 255),
                choose.of(0, 5, 100),
                choose.of(False, False, False, True),
                choose.of(True, True, False),
            )
        case 9 | 10 | 11:
            return Again(choose.number(255), choose.of("A", "A", "A", "S", "FA", "R"))
        case 12 | 13 | 14:
            return Reply(choose.number(255), choose.of("SA", "A", "A", "FA", "R"), choose.of(0, 7))
        case 15 | 16:
            return Turn(choose.number(255), choose.often(conditions(choose), None, 3))
        case 17 | 18:
            return Put(any_object(choose, protocols))
        case 19:
            return Remove(choose.number(255))
        case 20 | 21:
            return Another(choose.number(255), 2000 + choose.number(255), choose.of(0, 0, 40, 200))
        case 22:
            return Directly(choose.number(255), choose.of("S", "S", "A"))
        case _:
            return Advance(choose.of(1, 40, 200, 400))


@dataclass(frozen=True)
class World:
    """A node, what is there at first, and what happens then."""

    local: LocalNode
    xdp: bool
    objects: list[Object]
    steps: list[Step]


NODE_BYTES = 10
OBJECT_BYTES = 60
STEP_BYTES = 40


def worlds(protocols: tuple[str, ...], length: int) -> st.SearchStrategy[World]:
    """Worlds of so many steps, of which some are none."""

    def make(node: bytes, first: list[bytes], then: list[bytes]) -> World:
        choose = Choices(node)
        local = local_node(choose)
        objects: list[Object] = [node_object(HERE, local.facts.zone), node_object(THERE, choose.of("a", "b"))]
        objects += choose.few(lambda: service_cidr(choose), 2)
        kinds = [service, *[endpoint_slice] * 3, service, *[endpoint_slice] * 3, pod, pod, pod, service]
        for kind, data in zip(kinds, first, strict=False):
            choices = Choices(data)
            objects.append(pod(choices) if kind is pod else kind(choices, protocols))
        steps = [step(Choices(data), protocols) for data in then]
        return World(local, choose.of(False, True), objects, [one for one in steps if one is not None])

    def some(size: int) -> st.SearchStrategy[bytes]:
        return st.binary(min_size=size, max_size=size)

    # of a fixed length, because a list without one is short as a rule: what is not needed becomes a step that is none
    return st.builds(
        make,
        some(NODE_BYTES),
        st.lists(some(OBJECT_BYTES), min_size=2, max_size=12),
        st.lists(some(STEP_BYTES), min_size=length, max_size=length),
    )


def turned(piece: EndpointSlice, number: int, conditions: EndpointConditions | None) -> EndpointSlice:
    """The slice with another condition of one of its endpoints, or without that."""
    ends = list(piece.endpoints or ())
    if conditions is None:
        del ends[number]
    else:
        ends[number] = replace(ends[number], conditions=conditions)
    return replace(piece, endpoints=ends)
