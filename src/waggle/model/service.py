"""What a Service means on a node: its frontends, the endpoints behind each port, and which of them may be chosen.

Rules are those of Kubernetes 1.36 (pkg/proxy), referred to as semantics.md section N. Addresses are text here; tables
and bytes are the business of waggle.plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    EndpointSlice,
    Pod,
    Service,
    ServicePort,
)


class Family(StrEnum):
    """IP family, with the names Kubernetes uses for EndpointSlice.addressType."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"


class FrontendKind(StrEnum):
    """Why an address is a frontend."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"


class Frontend(NamedTuple):
    """An address that stands for a Service port. `address` is "" for a NodePort: any address of the node."""

    kind: FrontendKind
    address: str
    port: int


class Endpoint(NamedTuple):
    """One address and port that may serve, with the conditions that decide whether it does."""

    address: str
    port: int
    ready: bool
    serving: bool
    terminating: bool
    node: str | None


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


def families(service: Service) -> list[Family]:
    """The families a Service has frontends in.

    Where neither addresses nor ipFamilies say (a standalone NodePort without a cluster address), both.
    """
    found = [family_of(address) for address in cluster_ips(service)]
    found += [Family(name) for name in service.spec.ip_families or [] if name in ("IPv4", "IPv6")]
    return sorted(set(found)) or [Family.IPV4, Family.IPV6]


def frontends(service: Service, port: ServicePort, family: Family) -> list[Frontend]:
    """The frontends of one port in one family."""
    found = [
        Frontend(FrontendKind.CLUSTER_IP, address, port.port)
        for address in cluster_ips(service)
        if family_of(address) is family
    ]
    if port.node_port and service.spec.type in ("NodePort", "LoadBalancer"):
        found.append(Frontend(FrontendKind.NODE_PORT, "", port.node_port))
    return found


def is_read(piece: EndpointSlice) -> bool:
    """Whether a slice counts (semantics.md section 1: slices with the headless label are not watched)."""
    return HEADLESS_LABEL not in (piece.metadata.labels or {})


def slice_endpoints(slices: Iterable[EndpointSlice], port: ServicePort, family: Family) -> list[Endpoint]:
    """The endpoints that slices give for a Service port.

    Only addresses[0] counts; a slice port without number is ignored; nil ready and serving mean true, nil terminating
    false. A named target port may have several numbers: every slice port of the name is used. The same address and
    port in two slices: an entry that is not terminating wins, else the last seen (semantics.md section 1).
    """
    found: dict[tuple[str, int], Endpoint] = {}
    for piece in slices:
        if piece.address_type != family or not is_read(piece):
            continue
        numbers = [
            p.port
            for p in piece.ports or ()
            if p.name is not None and p.name == port.name and p.port and (p.protocol or "TCP") == port.protocol
        ]
        if not numbers:
            continue
        for endpoint in piece.endpoints or ():
            if not endpoint.addresses:
                continue
            address = endpoint.addresses[0]
            conditions = endpoint.conditions
            ready, serving = conditions.ready is not False, conditions.serving is not False
            terminating = bool(conditions.terminating)
            for number in numbers:
                at = (address, number)
                if terminating and at in found and not found[at].terminating:
                    continue
                found[at] = Endpoint(address, number, ready, serving, terminating, endpoint.node_name)
    return list(found.values())


def pod_endpoints(service: Service, pods: Iterable[Pod], port: ServicePort, family: Family) -> list[Endpoint]:
    """The endpoints of a Service without EndpointSlices: the pods its selector selects.

    As Kubernetes' endpoint slice controller computes them (pkg/controller/endpointslice): pods that have an address
    and have not finished; ready by the Ready condition, or always with publishNotReadyAddresses.
    """
    selector = service.spec.selector
    if not selector:
        return []
    found: dict[tuple[str, int], Endpoint] = {}
    for pod in pods:
        if not selector.items() <= (pod.metadata.labels or {}).items() or pod.status.phase in ("Succeeded", "Failed"):
            continue
        address = pod_address(pod, family)
        number = target_port(pod, port)
        if address is None or number is None:
            continue
        serving = any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions)
        terminating = pod.metadata.deletion_timestamp is not None
        ready = service.spec.publish_not_ready_addresses or (serving and not terminating)
        known = found.get((address, number))
        if known is not None and terminating and not known.terminating:
            continue
        found[address, number] = Endpoint(address, number, ready, serving, terminating, pod.spec.node_name or None)
    return list(found.values())


def pod_address(pod: Pod, family: Family) -> str | None:
    """The pod's address of a family, or None."""
    addresses = [p.ip for p in pod.status.pod_ips] or ([pod.status.pod_ip] if pod.status.pod_ip else [])
    return next((address for address in addresses if family_of(address) is family), None)


def target_port(pod: Pod, port: ServicePort) -> int | None:
    """The number that a Service port has on a pod; None where a named port does not exist there.

    Init containers count only where they keep running (restartPolicy Always), as in Kubernetes' podutil.FindPort.
    """
    target = port.target_port
    if target is None or target == 0 or target == "":
        return port.port
    if isinstance(target, int):
        return target
    sidecars = [c for c in pod.spec.init_containers if c.restart_policy == "Always"]
    for container in (*pod.spec.containers, *sidecars):
        for offered in container.ports:
            if offered.name == target and offered.protocol == port.protocol:
                return offered.container_port
    return None


def cluster_set(endpoints: Iterable[Endpoint]) -> list[Endpoint]:
    """The endpoints that cluster-wide traffic may go to: the ready ones; if there is none, all that still serve while
    they terminate (semantics.md section 2)."""
    every = list(endpoints)
    ready = [e for e in every if e.ready]
    return ready or [e for e in every if e.serving and e.terminating]
