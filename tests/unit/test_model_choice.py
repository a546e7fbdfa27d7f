"""Who is answered by which endpoints: semantics.md sections 2 and 3, one row each."""

from __future__ import annotations

import pytest

from waggle.model.choice import Choice, NodeFacts, Otherwise, Scope, choose
from waggle.model.endpoints import Endpoint, pod_endpoints
from waggle.model.objects import (
    Container,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
)
from waggle.model.objects import PodCondition as Condition
from waggle.model.service import Family, FrontendKind

HERE = NodeFacts("node1", "zone-a")
INTERNAL, EXTERNAL = Scope.INTERNAL, Scope.EXTERNAL
CLUSTER_IP, NODE_PORT = FrontendKind.CLUSTER_IP, FrontendKind.NODE_PORT
OUTSIDE_KINDS = [FrontendKind.NODE_PORT, FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER]


def made(text: str) -> Endpoint:
    """ "r1": an endpoint on node1, in a state: r ready, s serving and terminating, t terminating, n not ready. Then
    hints: "@a" for zone-a, "#1" for node1, any number of them."""
    state, node = text[0], text[1]
    zones = frozenset(f"zone-{part[0]}" for part in text.split("@")[1:])
    nodes = frozenset(f"node{part[0]}" for part in text.split("#")[1:])
    ready, serving, terminating = state == "r", state in "rs", state in "st"
    return Endpoint(text, 80, ready, serving, terminating, f"node{node}" if node != "?" else None, zones, nodes)


def chosen(endpoints: str, kind: FrontendKind, scope: Scope, node: NodeFacts = HERE, **spec: str) -> str:
    """The chosen endpoints, or what happens without any; "keep" where the client's address is kept."""
    choice: Choice = choose(
        Service(ObjectMeta("web", "default"), ServiceSpec(**spec)), kind, scope, map(made, endpoints.split()), node
    )
    keeps = " keep" if choice.keeps_client else ""
    return " ".join(e.address for e in choice.endpoints) + keeps if choice.endpoints else choice.otherwise.value


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ("r1 r2 n2 t2", "r1 r2"),
        ("r1 s2", "r1"),
        ("s1 s2 t1 n1", "s1 s2"),
        ("t1 n2", "reject"),
        ("", "reject"),
        ("r?", "r?"),
    ],
)
@pytest.mark.parametrize(("kind", "scope"), [(CLUSTER_IP, INTERNAL), (CLUSTER_IP, EXTERNAL), (NODE_PORT, EXTERNAL)])
def test_cluster_wide(endpoints: str, expected: str, kind: FrontendKind, scope: Scope) -> None:
    assert chosen(endpoints, kind, scope) == expected


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        # the node, where every ready endpoint has node hints and one is meant for it
        ("r1#1 r2#2", "r1#1"),
        ("r1#1@a r2#2@a", "r1#1@a"),
        # a miss falls to the zone, and that to all
        ("r2#2@a r3#3@b", "r2#2@a"),
        ("r2#2@b r3#3@b", "r2#2@b r3#3@b"),
        # one endpoint without hints turns its level off
        ("r1#1@a r2@b", "r1#1@a"),
        ("r1@a r2", "r1@a r2"),
        ("r1#1 r2", "r1#1 r2"),
        # only ready endpoints have a say; without any, topology is ignored
        ("r1@a s2", "r1@a"),
        ("s1@a s2@b", "s1@a s2@b"),
        ("n1@a r2@b", "r2@b"),
    ],
)
def test_topology(endpoints: str, expected: str) -> None:
    assert chosen(endpoints, CLUSTER_IP, INTERNAL) == expected


def test_topology_on_a_node_without_a_zone() -> None:
    assert chosen("r1@a r2@b", CLUSTER_IP, INTERNAL, NodeFacts("node1")) == "r1@a r2@b"
    assert chosen("r1#1@a r2#2@b", CLUSTER_IP, INTERNAL, NodeFacts("node1")) == "r1#1@a"


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ("r1 r2", "r1"),
        ("s1 r2", "s1"),
        ("r1 s1 r2", "r1"),
        ("r2", "drop"),
        ("s2", "drop"),
        ("n1 t2", "reject"),
        ("", "reject"),
        ("r?", "drop"),
        # hints mean nothing to it
        ("r1@b r2@a", "r1@b"),
    ],
)
def test_traffic_policy_local(endpoints: str, expected: str) -> None:
    internal = {"internal_traffic_policy": "Local"}
    assert chosen(endpoints, CLUSTER_IP, INTERNAL, **internal) == expected
    assert chosen(endpoints, CLUSTER_IP, EXTERNAL, **internal) == expected
    kept = expected if expected in ("drop", "reject") else f"{expected} keep"
    for kind in OUTSIDE_KINDS:
        assert chosen(endpoints, kind, EXTERNAL, external_traffic_policy="Local") == kept


@pytest.mark.parametrize("kind", OUTSIDE_KINDS)
def test_external_policy_is_short_circuited_inside_and_internal_policy_means_nothing_there(kind: FrontendKind) -> None:
    spec = {"external_traffic_policy": "Local", "internal_traffic_policy": "Local"}
    assert chosen("r2 s1", kind, INTERNAL, **spec) == "r2"
    assert chosen("t2", kind, INTERNAL, **spec) == "reject"
    assert chosen("r1 r2", CLUSTER_IP, INTERNAL, external_traffic_policy="Local") == "r1 r2"


def test_reject_is_for_nothing_anywhere_drop_for_nothing_here() -> None:
    assert {Otherwise.REJECT.value, Otherwise.DROP.value} == {"reject", "drop"}


@pytest.mark.parametrize(
    ("distribution", "zone_hints", "node_hints"),
    [
        (None, set(), set()),
        ("", set(), set()),
        ("PreferClose", {"zone-a"}, set()),
        ("PreferSameZone", {"zone-a"}, set()),
        ("PreferSameNode", {"zone-a"}, {"node1"}),
    ],
)
def test_hints_without_slices(distribution: str | None, zone_hints: set[str], node_hints: set[str]) -> None:
    owner = Service(
        ObjectMeta("web", "default"), ServiceSpec(selector={"app": "web"}, traffic_distribution=distribution)
    )
    pod = Pod(
        ObjectMeta("a", "default", labels={"app": "web"}),
        PodSpec("node1", containers=[Container()]),
        PodStatus(pod_ips=[PodIP("10.0.0.1")], conditions=[Condition("Ready", "True")]),
    )
    (found,) = pod_endpoints(owner, [pod], ServicePort(80), Family.IPV4, {"node1": "zone-a"})
    assert (found.zone_hints, found.node_hints) == (zone_hints, node_hints)
    (found,) = pod_endpoints(owner, [pod], ServicePort(80), Family.IPV4, {})
    assert (found.zone_hints, found.node_hints) == (set(), node_hints)
