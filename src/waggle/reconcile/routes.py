"""Routes to the pods of other nodes (native routing): one per pod range, through the node's address.

Only routes of protocol RTPROT_WAGGLE are ours to change. A node whose address is not on a link of ours gets no route,
and that is reported: an overlay is needed there. So is a node without an address: its kubelet may never have said one.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from waggle.errors import KernelError
from waggle.kernel.netlink import RTPROT_WAGGLE, Batch, IPAddress, IPNetwork, Netlink
from waggle.model.objects import Node
from waggle.model.vip import pod_cidrs


@dataclass(frozen=True, slots=True)
class PodRoute:
    """Where the pods of another node are."""

    dst: IPNetwork
    via: IPAddress


def internal_addresses(node: Node) -> dict[int, IPAddress]:
    """IP version → the node's first InternalIP of it."""
    found: dict[int, IPAddress] = {}
    for entry in node.status.addresses:
        if entry.type == "InternalIP":
            try:
                address = ipaddress.ip_address(entry.address)
            except ValueError:
                continue
            found.setdefault(address.version, address)
    return found


def wanted_routes(nodes: Iterable[Node], own_name: str) -> set[PodRoute]:
    """One route per pod range of every other node that has an address of the same family."""
    wanted = set()
    for node in nodes:
        if node.metadata.name == own_name:
            continue
        addresses = internal_addresses(node)
        for cidr in pod_cidrs(node):
            via = addresses.get(cidr.version)
            if via is not None:
                wanted.add(PodRoute(cidr, via))
    return wanted


def unaddressed_ranges(nodes: Iterable[Node], own_name: str) -> dict[IPNetwork, str]:
    """The pod ranges of other nodes that have no address of the same family, so that no route leads there; and why."""
    return {
        cidr: f"node {node.metadata.name} has no IPv{cidr.version} InternalIP, so there is no route to its pods"
        for node in nodes
        if node.metadata.name != own_name
        for cidr in pod_cidrs(node)
        if cidr.version not in internal_addresses(node)
    }


def sync_routes(wanted: set[PodRoute], netlink: Netlink) -> dict[PodRoute, str]:
    """Makes the kernel's routes of our protocol what is wanted. Returns the routes that cannot be, and why."""
    on_link = [(address.interface.network, address.ifindex) for address in netlink.addresses()]
    own = {address.ip for address in netlink.addresses()}
    present = {
        PodRoute(route.dst, route.via) for route in netlink.routes(protocol=RTPROT_WAGGLE) if route.via is not None
    }
    failed: dict[PodRoute, str] = {}
    for route in sorted(wanted - present, key=str):
        device = next((index for network, index in on_link if route.via in network), None)
        if route.via in own:
            failed[route] = f"{route.via} is an address of this node"
        elif device is None:
            failed[route] = f"node address {route.via} is on no network of this node, so {route.dst} cannot be routed"
        else:
            batch = Batch()
            batch.add_route(route.dst, dev=device, via=route.via, replace=True)
            try:
                netlink.run(batch)
            except KernelError as error:
                failed[route] = str(error)
    for route in present - wanted:
        batch = Batch()
        batch.delete_route(route.dst, via=route.via, missing_ok=True)
        netlink.run(batch)
    return failed
