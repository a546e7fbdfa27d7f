"""Which way leads to the pods of other nodes, and where none does."""

from __future__ import annotations

import ipaddress

from waggle.model.objects import Node, NodeAddress, NodeSpec, NodeStatus, ObjectMeta
from waggle.plan.routing import Place, RoutePlan, Routing, plan_routing, tunnel_mac


def node(name: str, ranges: list[str], *addresses: str, kind: str = "InternalIP") -> Node:
    return Node(
        metadata=ObjectMeta(name=name),
        spec=NodeSpec(pod_cidrs=ranges),
        status=NodeStatus(addresses=[NodeAddress(type=kind, address=address) for address in addresses]),
    )


def place(*interfaces: str, ranges: tuple[str, ...] = ("10.244.1.0/24", "fd00:244:1::/64")) -> Place:
    found = [ipaddress.ip_interface(text) for text in interfaces]
    return Place(
        "own",
        frozenset(interface.ip for interface in found),
        tuple(interface.network for interface in found),
        tuple(ipaddress.ip_network(text) for text in ranges),
    )


HERE = place("10.0.0.1/24", "fd00::1/64")
OWN = node("own", ["10.244.1.0/24"], "10.0.0.1", "fd00::1")


def native(plan: RoutePlan) -> dict[str, str]:
    return {str(route.dst): str(route.via) for route in plan.native}


def behind(plan: RoutePlan) -> dict[str, tuple[str, set[str], set[str]]]:
    """Node → its address, the ranges and the addresses that its tunnel leads to."""
    return {peer.name: (str(peer.at), set(map(str, peer.ranges)), set(map(str, peer.addresses))) for peer in plan.peers}


def problems(plan: RoutePlan) -> dict[str, str]:
    return {str(cidr): reason for cidr, reason in plan.problems.items()}


def test_natively_where_the_address_is_on_a_network_of_ours() -> None:
    nodes = [
        OWN,
        node("near", ["10.244.2.0/24", "fd00:2::/64"], "10.0.0.2", "fd00::2"),
        node("far", ["10.244.3.0/24", "fd00:3::/64"], "10.0.1.3", "fd00:0:0:1::3"),
        node("without-range", [], "10.0.0.7"),
    ]
    plan = plan_routing(nodes, HERE, Routing.AUTO)
    assert native(plan) == {"10.244.2.0/24": "10.0.0.2", "fd00:2::/64": "fd00::2"}
    assert behind(plan) == {
        "far": ("10.0.1.3", {"10.244.3.0/24", "fd00:3::/64"}, {"10.0.1.3", "fd00:0:0:1::3"}),
    }
    assert plan.problems == {}


def test_a_range_without_an_address_of_its_family_goes_through_the_tunnel() -> None:
    nodes = [OWN, node("near", ["10.244.2.0/24", "fd00:2::/64"], "10.0.0.2")]
    plan = plan_routing(nodes, HERE, Routing.AUTO)
    assert native(plan) == {"10.244.2.0/24": "10.0.0.2"}
    assert behind(plan) == {"near": ("10.0.0.2", {"fd00:2::/64"}, set())}


def test_everything_where_vxlan_is_asked_for() -> None:
    plan = plan_routing([OWN, node("near", ["10.244.2.0/24"], "10.0.0.2", "fd00::2")], HERE, Routing.VXLAN)
    assert native(plan) == {}
    assert behind(plan) == {"near": ("10.0.0.2", {"10.244.2.0/24"}, {"10.0.0.2", "fd00::2"})}


def test_only_routes_where_native_is_asked_for() -> None:
    nodes = [
        OWN,
        node("near", ["10.244.2.0/24"], "10.0.0.2"),
        node("far", ["10.244.3.0/24"], "10.0.1.3"),
        node("half", ["10.244.4.0/24", "fd00:4::/64"], "10.0.0.4"),
        node("none", ["10.244.5.0/24"], "192.0.2.4", kind="ExternalIP"),
    ]
    plan = plan_routing(nodes, HERE, Routing.NATIVE)
    assert native(plan) == {"10.244.2.0/24": "10.0.0.2", "10.244.4.0/24": "10.0.0.4"}
    assert behind(plan) == {}
    assert problems(plan) == {
        "10.244.3.0/24": "node address 10.0.1.3 is on no network of this node, so 10.244.3.0/24 cannot be routed: that "
        "takes a tunnel (routing: auto)",
        "fd00:4::/64": "node half has no IPv6 InternalIP, so there is no route to its pods",
        "10.244.5.0/24": "node none has no IPv4 InternalIP, so there is no route to its pods",
    }


def test_packets_are_carried_by_ipv4_where_both_nodes_have_it() -> None:
    far = [node("both", ["10.244.2.0/24"], "fd01::2", "10.0.1.2"), node("six", ["10.244.3.0/24"], "fd01::3")]
    plan = plan_routing([OWN, *far], HERE, Routing.AUTO)
    assert {name: at for name, (at, _, _) in behind(plan).items()} == {"both": "10.0.1.2", "six": "fd01::3"}
    only6 = place("fd00::1/64")
    plan = plan_routing([node("own", [], "fd00::1"), *far], only6, Routing.AUTO)
    assert {name: at for name, (at, _, _) in behind(plan).items()} == {"both": "fd01::2", "six": "fd01::3"}


def test_a_node_without_ranges_is_reached_by_pods_all_the_same() -> None:
    plan = plan_routing([OWN, node("control", [], "10.0.1.9")], HERE, Routing.AUTO)
    assert behind(plan) == {"control": ("10.0.1.9", set(), {"10.0.1.9"})}


def test_what_no_way_leads_to() -> None:
    nodes = [
        OWN,
        node("a", ["10.244.2.0/24"], "10.0.1.2"),
        node("b", ["10.244.2.0/24"], "10.0.1.3"),
        node("clash", ["10.244.1.128/25"], "10.0.1.4"),
        node("inside", ["10.1.0.0/16"], "10.1.0.5"),
        node("none", ["10.244.6.0/24"]),
        node("self", ["10.244.7.0/24"], "10.0.0.1"),
    ]
    plan = plan_routing(nodes, HERE, Routing.AUTO)
    assert behind(plan)["a"][1] == {"10.244.2.0/24"}
    assert problems(plan) == {
        "10.244.2.0/24": "node b has pods there, and so has node a: no route leads to both",
        "10.244.1.128/25": "node clash has pods there, and so has this node: no route leads to both",
        "10.1.0.0/16": "10.1.0.5, the address of node inside, lies in its own pod range 10.1.0.0/16",
        "10.244.6.0/24": "node none and this node have no InternalIP of the same family: no tunnel leads to its pods",
        "10.244.7.0/24": "10.0.0.1, the address of node self, is an address of this node",
    }
    assert "self" not in behind(plan) and "inside" not in behind(plan)


def test_the_own_node_may_be_without_an_address() -> None:
    far = node("far", ["10.244.2.0/24"], "10.0.1.2")
    assert behind(plan_routing([node("own", []), far], HERE, Routing.AUTO)) == {}
    fallback = {4: ipaddress.ip_address("10.0.0.1")}
    known = Place("own", HERE.every, HERE.networks, HERE.ranges, fallback)
    plan = plan_routing([far], known, Routing.AUTO)  # its Node object may come later
    assert behind(plan)["far"][0] == "10.0.1.2" and plan.own == fallback


def test_every_node_knows_the_mac_address_of_every_other() -> None:
    macs = {tunnel_mac(f"node{number}") for number in range(5000)}
    assert len(macs) == 5000
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)  # a single machine's, and nobody's who makes hardware
    assert tunnel_mac("node1") == tunnel_mac("node1")
