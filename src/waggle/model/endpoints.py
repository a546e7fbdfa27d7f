"""The endpoints behind a Service port: from EndpointSlices, or computed from the selector and the pods that exist.

Rules are those of Kubernetes 1.36 (pkg/proxy, pkg/controller/endpointslice), referred to as semantics.md section N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from waggle.model.objects import HEADLESS_LABEL, EndpointSlice, Pod, Service, ServicePort
from waggle.model.objects import Endpoint as SliceEndpoint
from waggle.model.service import Family, family_of, weight

_NO_HINTS: frozenset[str] = frozenset()
_NO_ZONES: Mapping[str, str] = {}


class Endpoint(NamedTuple):
    """One address and port that may serve, with the conditions and hints that decide whether it does, and for whom."""

    address: str
    port: int
    ready: bool
    serving: bool
    terminating: bool
    node: str | None
    zone_hints: frozenset[str] = _NO_HINTS
    node_hints: frozenset[str] = _NO_HINTS
    weight: int = 1


def is_read(piece: EndpointSlice) -> bool:
    """Whether a slice counts (semantics.md section 1: slices with the headless label are not watched)."""
    return HEADLESS_LABEL not in (piece.metadata.labels or {})


def slice_endpoints(slices: Iterable[EndpointSlice], port: ServicePort, family: Family) -> list[Endpoint]:
    """The endpoints that slices give for a Service port.

    Only addresses[0] counts; a slice port without number is ignored; nil ready and serving mean true, nil terminating
    false. A named target port may have several numbers: every slice port of the name is used. The same address and
    port in two slices: an entry that is not terminating wins (semantics.md section 1), then one that is ready, then the
    slice's name, which Kubernetes leaves to the order of arrival; two nodes, or one after a restart, must not differ.
    """
    found: dict[tuple[str, int], Endpoint] = {}
    for piece in sorted(slices, key=_by_name):
        if piece.address_type != family or not is_read(piece):
            continue
        numbers = [
            p.port
            for p in piece.ports or ()
            if p.name is not None and p.name == port.name and p.port and (p.protocol or "TCP") == port.protocol
        ]
        if not numbers:
            continue
        share = weight(piece.metadata.annotations)
        for endpoint in piece.endpoints or ():
            if not endpoint.addresses:
                continue
            address = endpoint.addresses[0]
            conditions = endpoint.conditions
            ready, serving = conditions.ready is not False, conditions.serving is not False
            terminating = bool(conditions.terminating)
            zones, nodes = _hints(endpoint)
            for number in numbers:
                at = (address, number)
                candidate = Endpoint(
                    address, number, ready, serving, terminating, endpoint.node_name, zones, nodes, share
                )
                if at not in found or _standing(candidate) >= _standing(found[at]):
                    found[at] = candidate
    return list(found.values())


def _by_name(obj: EndpointSlice | Pod) -> str:
    return obj.metadata.name


def _hints(endpoint: SliceEndpoint) -> tuple[frozenset[str], frozenset[str]]:
    hints = endpoint.hints
    if hints is None:
        return _NO_HINTS, _NO_HINTS
    return frozenset(hint.name for hint in hints.for_zones or ()), frozenset(
        hint.name for hint in hints.for_nodes or ()
    )


def _standing(endpoint: Endpoint) -> tuple[bool, bool, bool]:
    return not endpoint.terminating, endpoint.ready, endpoint.serving


def pod_endpoints(
    service: Service, pods: Iterable[Pod], port: ServicePort, family: Family, zones: Mapping[str, str] = _NO_ZONES
) -> list[Endpoint]:
    """The endpoints of a Service without EndpointSlices: the pods its selector selects. `zones`: of nodes, by name.

    As Kubernetes' endpoint slice controller computes them (pkg/controller/endpointslice): pods that have an address
    and have not finished; ready by the Ready condition, or always with publishNotReadyAddresses. Hints follow from
    trafficDistribution (pkg/controller/endpointslice/trafficdist): the endpoint's own zone, its own node.
    """
    selector = service.spec.selector
    if not selector:
        return []
    found: dict[tuple[str, int], Endpoint] = {}
    selected = [pod for pod in pods if selector.items() <= (pod.metadata.labels or {}).items()]
    for pod in sorted(selected, key=_by_name):  # of two with one address the same counts, whichever came first
        if pod.status.phase in ("Succeeded", "Failed"):
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
        node = pod.spec.node_name or None
        hints = _distribution(service.spec.traffic_distribution, node, zones)
        found[address, number] = Endpoint(
            address, number, ready, serving, terminating, node, *hints, weight(pod.metadata.annotations)
        )
    return list(found.values())


def _distribution(
    distribution: str | None, node: str | None, zones: Mapping[str, str]
) -> tuple[frozenset[str], frozenset[str]]:
    """(zone hints, node hints). PreferClose is the older name of PreferSameZone."""
    zone = zones.get(node, "") if node else ""
    for_zones = frozenset((zone,)) if zone else _NO_HINTS
    if distribution in ("PreferClose", "PreferSameZone"):
        return for_zones, _NO_HINTS
    if distribution == "PreferSameNode":
        return for_zones, frozenset((node,)) if node else _NO_HINTS
    return _NO_HINTS, _NO_HINTS


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
