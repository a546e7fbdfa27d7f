"""What is at the addresses of Services besides their frontends (semantics.md section 3).

A port that no Service defines on a cluster address is refused, an address of a Service range that no Service has is
dropped, and an echo request to an address of a Service is answered. Ports of external and load balancer addresses are
left alone where no Service defines them: the address may be a machine's own, and its sshd must stay reachable.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from waggle.model.objects import Node, Service, ServiceCIDR
from waggle.model.service import IPNetwork, cluster_ips, is_proxied, load_balancer_ips

NO_RANGES = "none"  # of the setting: no range is enforced, whatever objects there are


class Beyond(StrEnum):
    """What happens to a packet that no frontend takes."""

    PASS = "pass"  # not the business of Services
    REJECT = "reject"
    DROP = "drop"
    ECHO = "echo"


class ServiceRanges(NamedTuple):
    """Where cluster addresses come from; `problems` says which range is not enforced, and why."""

    networks: tuple[IPNetwork, ...]
    problems: Mapping[str, str]


def vips(service: Service) -> dict[str, bool]:
    """The addresses of a Service; of each, whether it is a cluster address, which is nobody else's."""
    if not is_proxied(service):
        return {}
    found = dict.fromkeys((*(service.spec.external_ips or ()), *load_balancer_ips(service)), False)
    return found | dict.fromkeys(cluster_ips(service), True)


def pod_cidrs(node: Node) -> list[IPNetwork]:
    """A node's pod ranges; values that are no range are passed over (the API server lets none through)."""
    found = []
    for text in node.spec.pod_cidrs or ([node.spec.pod_cidr] if node.spec.pod_cidr else []):
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError:
            continue
    return found


def taken_networks(addresses: Iterable[str], nodes: Iterable[Node]) -> dict[IPNetwork, str]:
    """What no Service range may overlap with, and what it is: the addresses of this node and every node's pods."""
    taken: dict[IPNetwork, str] = {ipaddress.ip_network(a): f"the node's address {a}" for a in addresses}
    for node in nodes:
        taken |= {cidr: f"the pod range {cidr} of node {node.metadata.name}" for cidr in pod_cidrs(node)}
    return taken


def service_ranges(
    objects: Iterable[ServiceCIDR], configured: Iterable[str], taken: Mapping[IPNetwork, str], limit: int
) -> ServiceRanges:
    """The Service ranges in force: those configured, else those of the ServiceCIDR objects.

    `taken` are networks that have another use, and which. A range that overlaps with one is not enforced: the error is
    in the configuration, and what would be dropped is traffic of pods or nodes. At most `limit` are enforced.
    """
    texts = list(dict.fromkeys(configured)) or sorted({cidr for entry in objects for cidr in entry.spec.cidrs})
    networks: list[IPNetwork] = []
    problems: dict[str, str] = {}
    for text in texts:
        if text == NO_RANGES:
            continue
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            problems[text] = "is not an address range such as 10.96.0.0/12"
            continue
        use = next((what for other, what in taken.items() if _overlap(network, other)), "")
        if use:
            problems[text] = f"overlaps with {use}: traffic to its free addresses is not dropped"
        elif len(networks) == limit:
            problems[text] = f"is one more than the {limit} that can be enforced: its free addresses are not dropped"
        else:
            networks.append(network)
    return ServiceRanges(tuple(networks), problems)


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return one.version == other.version and one.overlaps(other)


def beyond_frontends(
    address: str,
    *,
    echo: bool,
    used: Mapping[str, bool],
    ranges: Iterable[IPNetwork],
    errors: bool = True,
    established: bool = False,
) -> Beyond:
    """What happens to a packet for `address` that no frontend takes and that is for no pod or address of this node.

    `used` are the addresses of all Services (`vips`); `errors`: an ICMP error may be sent about such a packet, which is
    not so for what is ICMP itself. `established`: it is the middle of a connection, which nothing here ends.
    """
    if established:
        return Beyond.PASS
    if echo and address in used:
        return Beyond.ECHO
    if used.get(address):
        return Beyond.REJECT if errors else Beyond.DROP
    inside = any(ipaddress.ip_address(address) in network for network in ranges)
    return Beyond.DROP if inside else Beyond.PASS
