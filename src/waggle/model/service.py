"""What a Service means: which frontends it has, in which families, with which affinity and for which clients.

Rules are those of Kubernetes 1.36 (pkg/proxy), referred to as semantics.md section N. Addresses are text here; tables
and bytes are the business of waggle.plan. Endpoints are in `endpoints`, who gets which of them in `choice`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, TypeVar

from waggle.model.objects import SERVICE_PROXY_NAME_LABEL, Service, ServicePort

DEFAULT_AFFINITY_SECONDS = 10_800

BALANCING_ANNOTATION = "waggle.dev/balancing"
FORWARDING_ANNOTATION = "waggle.dev/forwarding"
WEIGHT_ANNOTATION = "waggle.dev/weight"
MAX_WEIGHT = 1000

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Family(StrEnum):
    """IP family, with the names Kubernetes uses for EndpointSlice.addressType."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"


class Balancing(StrEnum):
    """How a new flow's backend is chosen. MAGLEV: by a hash of the flow, with the same outcome on every node."""

    RANDOM = "random"
    MAGLEV = "maglev"


class Forwarding(StrEnum):
    """How packets from outside reach backends on other nodes. SNAT: with this node's address, answers come back here.
    DSR: as they are, inside packets to the backend, whose node answers the client directly.
    """

    SNAT = "snat"
    DSR = "dsr"


class FrontendKind(StrEnum):
    """Why an address is a frontend."""

    CLUSTER_IP = "ClusterIP"
    EXTERNAL_IP = "ExternalIP"
    LOAD_BALANCER = "LoadBalancer"
    NODE_PORT = "NodePort"


class Frontend(NamedTuple):
    """An address that stands for a Service port. `address` is "" for a NodePort: any address of the node."""

    kind: FrontendKind
    address: str
    port: int


def family_of(address: str) -> Family:
    """The family of an address in text."""
    return Family.IPV6 if ":" in address else Family.IPV4


def is_proxied(service: Service) -> bool:
    """Whether a Service gets frontends at all (semantics.md section 1)."""
    if service.spec.type == "ExternalName":
        return False
    if SERVICE_PROXY_NAME_LABEL in (service.metadata.labels or {}):
        return False
    return service.spec.cluster_ip != "None"


def cluster_ips(service: Service) -> list[str]:
    """All cluster addresses, clusterIPs before the older clusterIP."""
    spec = service.spec
    addresses = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    return [address for address in addresses if address and address != "None"]


def load_balancer_ips(service: Service) -> list[str]:
    """Addresses of the load balancer that arrive here as destinations: those whose ipMode is VIP or not said. With
    ipMode Proxy the load balancer is the destination, and in-cluster traffic must go through it (semantics.md 1).
    """
    if service.spec.type != "LoadBalancer":
        return []
    ingress = service.status.load_balancer.ingress or ()
    return [entry.ip for entry in ingress if entry.ip and entry.ip_mode in (None, "VIP")]


def families(service: Service) -> list[Family]:
    """The families a Service has frontends in.

    Where neither addresses nor ipFamilies say (a standalone NodePort without a cluster address), both.
    """
    found = [family_of(address) for address in cluster_ips(service)]
    found += [Family(name) for name in service.spec.ip_families or [] if name in ("IPv4", "IPv6")]
    return sorted(set(found)) or [Family.IPV4, Family.IPV6]


def frontends(service: Service, port: ServicePort, family: Family) -> list[Frontend]:
    """The frontends of one port in one family: cluster, external and load balancer addresses, then the node port."""
    addresses = [(FrontendKind.CLUSTER_IP, address) for address in cluster_ips(service)]
    addresses += [(FrontendKind.EXTERNAL_IP, address) for address in service.spec.external_ips or ()]
    addresses += [(FrontendKind.LOAD_BALANCER, address) for address in load_balancer_ips(service)]
    found = [Frontend(kind, address, port.port) for kind, address in addresses if family_of(address) is family]
    if port.node_port and service.spec.type in ("NodePort", "LoadBalancer"):
        found.append(Frontend(FrontendKind.NODE_PORT, "", port.node_port))
    return found


def affinity_seconds(service: Service) -> int:
    """How long a client stays with its backend after its last new flow; 0 without affinity (semantics.md section 4)."""
    if service.spec.session_affinity != "ClientIP":
        return 0
    config = service.spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    return DEFAULT_AFFINITY_SECONDS if seconds is None else seconds


def source_ranges(service: Service, family: Family, node_addresses: Iterable[str] = ()) -> list[IPNetwork] | None:
    """The networks whose clients may use the load balancer addresses of a family; None: everybody's may.

    They guard nothing else. A range that holds everything of the family opens it, and so does a list in which the
    family does not occur. Where an address of this node is allowed, the load balancer's own address is too: a client
    on the node that has bound it comes with it as its source (semantics.md section 3). Values that are no range are
    passed over: the API server lets none through.
    """
    found = [network for network in _ranges(service) if _is_of(network, family)]
    if not found or any(network.prefixlen == 0 for network in found):
        return None
    addresses = [ipaddress.ip_address(text) for text in node_addresses]
    if any(address in network for network in found for address in addresses):
        found += [ipaddress.ip_network(text) for text in load_balancer_ips(service) if family_of(text) is family]
    return sorted(set(found), key=lambda network: (int(network.network_address), network.prefixlen))


def open_families(service: Service) -> list[Family]:
    """The families of load balancer addresses that source ranges were given for the other family alone: Kubernetes
    leaves them open to everybody, which whoever wrote the list should know.
    """
    ranges = _ranges(service)
    served = {family_of(address) for address in load_balancer_ips(service)}
    return sorted(family for family in served if ranges and not any(_is_of(network, family) for network in ranges))


def _ranges(service: Service) -> list[IPNetwork]:
    found = []
    for text in service.spec.load_balancer_source_ranges or ():
        try:
            found.append(ipaddress.ip_network(text.strip(), strict=False))
        except ValueError:
            continue
    return found


def _is_of(network: IPNetwork, family: Family) -> bool:
    return (network.version == 6) == (family is Family.IPV6)


def balancing(service: Service, default: Balancing) -> Balancing:
    """How the Service wants its flows spread: its annotation waggle.dev/balancing, else the default."""
    return _annotated(service, BALANCING_ANNOTATION, default)


def forwarding(service: Service, default: Forwarding) -> Forwarding:
    """How the Service wants packets from outside forwarded: its annotation waggle.dev/forwarding, else the default."""
    return _annotated(service, FORWARDING_ANNOTATION, default)


_Choice = TypeVar("_Choice", bound=StrEnum)


def _annotated(service: Service, annotation: str, default: _Choice) -> _Choice:
    wanted = (service.metadata.annotations or {}).get(annotation)
    return type(default)(wanted) if wanted in set(type(default)) else default


def weight(annotations: Mapping[str, str] | None) -> int:
    """How many flows an endpoint gets in proportion to others: the annotation waggle.dev/weight of its EndpointSlice,
    or of its pod where there are no slices. 0: none, where others have more. At most 1000; 1 where it says nothing.
    """
    text = (annotations or {}).get(WEIGHT_ANNOTATION, "")
    return min(int(text), MAX_WEIGHT) if text.isascii() and text.isdigit() and len(text) <= 4 else 1


def ignored_annotations(service: Service) -> list[str]:
    """Sentences about annotations of waggle's that say nothing it knows."""
    found = []
    for annotation, known in ((BALANCING_ANNOTATION, Balancing), (FORWARDING_ANNOTATION, Forwarding)):
        wanted = (service.metadata.annotations or {}).get(annotation)
        if wanted is not None and wanted not in set(known):
            found.append(f"annotation {annotation}: {wanted!r} is not {' or '.join(known)}; the default is used")
    return found
