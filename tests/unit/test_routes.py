"""Which routes to the pods of other nodes are wanted, and which cannot be."""

from __future__ import annotations

import ipaddress

from waggle.model.objects import Node, NodeAddress, NodeSpec, NodeStatus, ObjectMeta
from waggle.reconcile.routes import PodRoute, unaddressed_ranges, wanted_routes


def node(name: str, ranges: list[str], *addresses: str, kind: str = "InternalIP") -> Node:
    return Node(
        metadata=ObjectMeta(name=name),
        spec=NodeSpec(pod_cidrs=ranges),
        status=NodeStatus(addresses=[NodeAddress(type=kind, address=address) for address in addresses]),
    )


def test_a_route_for_every_range_with_an_address_of_its_family() -> None:
    nodes = [
        node("own", ["10.244.1.0/24"], "10.0.0.1"),
        node("both", ["10.244.2.0/24", "fd00:2::/64"], "10.0.0.2", "fd00::2"),
        node("half", ["10.244.3.0/24", "fd00:3::/64"], "10.0.0.3"),
        node("none", ["10.244.4.0/24"], "192.0.2.4", kind="ExternalIP"),
        node("without-range", []),
    ]
    assert wanted_routes(nodes, "own") == {
        PodRoute(ipaddress.ip_network(range_), ipaddress.ip_address(via))
        for range_, via in (("10.244.2.0/24", "10.0.0.2"), ("fd00:2::/64", "fd00::2"), ("10.244.3.0/24", "10.0.0.3"))
    }
    assert {str(cidr): reason for cidr, reason in unaddressed_ranges(nodes, "own").items()} == {
        "fd00:3::/64": "node half has no IPv6 InternalIP, so there is no route to its pods",
        "10.244.4.0/24": "node none has no IPv4 InternalIP, so there is no route to its pods",
    }


def test_the_own_node_may_be_without_an_address() -> None:
    assert unaddressed_ranges([node("own", ["10.244.1.0/24"])], "own") == {}
