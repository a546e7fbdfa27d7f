"""What a kube-apiserver does to an object before it stores it: defaults and validation, for what waggle reads.

Objects of the Kubernetes API have been through an apiserver; objects of a manifest have not. After `completed` and
`violations` both look the same to the plan. What the apiserver would *allocate* (cluster IPs, node ports) is left out:
there is nobody to allocate it, and `remarks` says so.

Rules follow pkg/apis/{core,discovery}/validation and .../v1/defaults.go of Kubernetes 1.36.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from waggle.model.objects import (
    KINDS,
    SERVICE_NAME_LABEL,
    ClusterNetworkPolicy,
    ContainerPort,
    Endpoint,
    EndpointPort,
    EndpointSlice,
    NetworkPolicy,
    Node,
    NodePolicy,
    Object,
    ObjectMeta,
    Pod,
    Service,
    ServiceCIDR,
    ServicePort,
    kind_of,
)
from waggle.model.service import IPNetwork
from waggle.sources import name_rules
from waggle.sources.name_rules import family_of, special_address
from waggle.sources.policy_admission import Violation, completed_policy, policy_violations
from waggle.sources.yaml_documents import Path

PROTOCOLS = ("TCP", "UDP", "SCTP")
MAX_ENDPOINTS = 1000
MAX_ADDRESSES = 100
MAX_SLICE_PORTS = 20_000


# -- defaults -------------------------------------------------------------------------------------------------------


def completed(obj: Object) -> Object:
    """`obj` with the apiserver's defaults: namespace, protocols, target ports, cluster IP lists.

    The resource version goes: it belongs to the cluster a manifest was copied from, and says nothing about edits since.
    """
    namespaced = KINDS[kind_of(obj)][2]
    metadata = obj.metadata
    namespace = (metadata.namespace or "default") if namespaced else ""
    if namespace != metadata.namespace or metadata.resource_version:
        obj = replace(obj, metadata=replace(metadata, namespace=namespace, resource_version=""))
    if isinstance(obj, Service):
        return _completed_service(obj)
    if isinstance(obj, (NetworkPolicy, ClusterNetworkPolicy, NodePolicy)):
        return completed_policy(obj)
    if isinstance(obj, EndpointSlice) and obj.ports:
        # The proxy ignores a port without a name; the apiserver makes it "".
        return replace(obj, ports=[replace(p, name=p.name or "", protocol=p.protocol or "TCP") for p in obj.ports])
    return obj


def _completed_service(service: Service) -> Service:
    spec = service.spec
    addresses = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else None)
    ports = [
        port
        if port.target_port and port.protocol
        else replace(port, protocol=port.protocol or "TCP", target_port=port.target_port or port.port)
        for port in spec.ports
    ]
    return replace(
        service,
        spec=replace(
            spec,
            type=spec.type or "ClusterIP",
            cluster_ip=spec.cluster_ip or (addresses[0] if addresses else ""),
            cluster_ips=addresses,
            ports=ports,
            session_affinity=spec.session_affinity or "None",
            internal_traffic_policy=spec.internal_traffic_policy or "Cluster",
            external_traffic_policy=spec.external_traffic_policy or "Cluster",
        ),
    )


# -- validation -----------------------------------------------------------------------------------------------------


def violations(obj: Object) -> Iterator[Violation]:
    """Everything the apiserver would refuse about a completed object."""
    yield from _metadata(obj.metadata, kind_of(obj))
    match obj:
        case Service():
            yield from _service(obj)
        case EndpointSlice():
            yield from _slice(obj)
        case Pod():
            yield from _pod(obj)
        case Node():
            yield from _node(obj)
        case ServiceCIDR():
            yield from _service_cidr(obj)
        case NetworkPolicy() | ClusterNetworkPolicy() | NodePolicy():
            yield from policy_violations(obj)


def _metadata(metadata: ObjectMeta, kind: str) -> Iterator[Violation]:
    rule = name_rules.label if kind in ("Service", "Namespace") else name_rules.subdomain
    if reason := rule(metadata.name):
        yield Violation(("metadata", "name"), reason)
    if metadata.namespace and (reason := name_rules.label(metadata.namespace)):
        yield Violation(("metadata", "namespace"), reason)
    yield from _labels(metadata.labels, ("metadata", "labels"))
    for key in metadata.annotations or ():
        if reason := name_rules.qualified(key):
            yield Violation(("metadata", "annotations", key), reason)


def _labels(labels: dict[str, str] | None, path: Path) -> Iterator[Violation]:
    for key, value in (labels or {}).items():
        if reason := name_rules.qualified(key) or name_rules.label_value(value):
            yield Violation((*path, key), reason)


def _service(service: Service) -> Iterator[Violation]:
    spec = service.spec
    yield from _one_of(spec.type, ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"), "type")
    yield from _one_of(spec.session_affinity, ("None", "ClientIP"), "sessionAffinity")
    yield from _one_of(spec.internal_traffic_policy, ("Cluster", "Local"), "internalTrafficPolicy")
    yield from _one_of(spec.external_traffic_policy, ("Cluster", "Local"), "externalTrafficPolicy")
    yield from _labels(spec.selector, ("spec", "selector"))
    yield from _cluster_ips(service)
    for index, address in enumerate(spec.external_ips or ()):
        if reason := _unusable(address):
            yield Violation(("spec", "externalIPs", index), reason)
    if not spec.ports and spec.type != "ExternalName" and spec.cluster_ip != "None":
        yield Violation(("spec", "ports"), "a Service needs at least one port unless it is headless")
    yield from _service_ports(service)
    yield from _health_port(service)


def _one_of(value: str, allowed: tuple[str, ...], field: str) -> Iterator[Violation]:
    if value not in allowed:
        yield Violation(("spec", field), f"must be one of {', '.join(allowed)}, not {name_rules.shown(value)}")


def _cluster_ips(service: Service) -> Iterator[Violation]:
    spec = service.spec
    addresses = spec.cluster_ips or []
    families = spec.ip_families or []
    for index, family in enumerate(families):
        if family not in ("IPv4", "IPv6"):
            reason = f"must be IPv4 or IPv6, not {name_rules.shown(family)}"
            yield Violation(("spec", "ipFamilies", index), reason)
    if len(families) != len(set(families)):
        yield Violation(("spec", "ipFamilies"), "the same family is given twice")
    if addresses and addresses[0] != spec.cluster_ip:
        yield Violation(
            ("spec", "clusterIPs", 0), f"must equal clusterIP, which is {name_rules.shown(spec.cluster_ip)}"
        )
    if addresses == ["None"]:
        return
    if addresses and spec.type == "ExternalName":
        yield Violation(("spec", "clusterIP"), "an ExternalName Service has no cluster IP")
    # A single address may have been written as `clusterIP` alone; its line is the one to show.
    found: list[str] = []
    for index, address in enumerate(addresses):
        path: Path = ("spec", "clusterIPs", index) if len(addresses) > 1 else ("spec", "clusterIP")
        if reason := _unusable(address):
            yield Violation(path, reason)
            continue
        family = family_of(address)
        if family in found:
            yield Violation(path, f"two cluster IPs of one family ({family})")
        elif index < len(families) and families[index] in ("IPv4", "IPv6") and families[index] != family:
            yield Violation(path, f"{address} is not of family {families[index]}, which ipFamilies names here")
        found.append(family)


def _service_ports(service: Service) -> Iterator[Violation]:
    spec = service.spec
    names: set[str] = set()
    ports: set[tuple[str, int]] = set()
    node_ports: set[tuple[str, int]] = set()
    for index, port in enumerate(spec.ports):
        path: Path = ("spec", "ports", index)
        if not port.name:
            if len(spec.ports) > 1:
                yield Violation(path, "every port needs a name when there is more than one")
        elif reason := name_rules.label(port.name):
            yield Violation((*path, "name"), reason)
        elif port.name in names:
            yield Violation((*path, "name"), f"the name {port.name!r} is used by another port of this Service")
        names.add(port.name)
        yield from _number(port.port, (*path, "port"))
        yield from _protocol(port.protocol, path)
        yield from _target(port, path)
        if (port.protocol, port.port) in ports:
            yield Violation((*path, "port"), f"{port.port}/{port.protocol} is another port of this Service already")
        ports.add((port.protocol, port.port))
        if not port.node_port:
            continue
        yield from _number(port.node_port, (*path, "nodePort"))
        if spec.type not in ("NodePort", "LoadBalancer"):
            yield Violation((*path, "nodePort"), f"a Service of type {spec.type} has no node ports; use type: NodePort")
        if (port.protocol, port.node_port) in node_ports:
            reason = f"{port.node_port}/{port.protocol} is another node port of this Service already"
            yield Violation((*path, "nodePort"), reason)
        node_ports.add((port.protocol, port.node_port))


def _health_port(service: Service) -> Iterator[Violation]:
    spec = service.spec
    path: Path = ("spec", "healthCheckNodePort")
    if not spec.health_check_node_port:
        return
    yield from _number(spec.health_check_node_port, path)
    if spec.type != "LoadBalancer" or spec.external_traffic_policy != "Local":
        yield Violation(path, "only a Service of type LoadBalancer with externalTrafficPolicy: Local has a health port")


def _target(port: ServicePort, path: Path) -> Iterator[Violation]:
    if isinstance(port.target_port, int):
        if port.target_port == port.port:
            return  # the default, or judged already
        yield from _number(port.target_port, (*path, "targetPort"))
    elif port.target_port and (reason := name_rules.port_name(port.target_port)):
        yield Violation((*path, "targetPort"), reason)


def _number(port: int, path: Path) -> Iterator[Violation]:
    if not 1 <= port <= 65535:
        yield Violation(path, f"must lie between 1 and 65535, not {port}")


def _protocol(protocol: str | None, path: Path) -> Iterator[Violation]:
    if protocol not in PROTOCOLS:
        hint = ", in capital letters" if protocol and protocol.upper() in PROTOCOLS else ""
        reason = f"must be TCP, UDP or SCTP{hint}, not {name_rules.shown(protocol or '')}"
        yield Violation((*path, "protocol"), reason)


def _unusable(address: str) -> str:
    """Why nothing can be served or reached at `address`; "" where it can."""
    if not family_of(address):
        return f"{name_rules.shown(address)} is not an IP address"
    kind = special_address(address)
    return f"{address} is {kind}" if kind else ""


def _slice(piece: EndpointSlice) -> Iterator[Violation]:
    if piece.address_type not in ("IPv4", "IPv6", "FQDN"):
        reason = f"must be IPv4, IPv6 or FQDN, not {name_rules.shown(piece.address_type)}"
        yield Violation(("addressType",), reason)
        return
    endpoints = piece.endpoints or []
    if len(endpoints) > MAX_ENDPOINTS:
        yield Violation(("endpoints",), f"holds {len(endpoints)} endpoints; {MAX_ENDPOINTS} are allowed in one slice")
        return
    for index, endpoint in enumerate(endpoints):
        yield from _endpoint(endpoint, piece.address_type, ("endpoints", index))
    yield from _slice_ports(piece.ports or [])


def _endpoint(endpoint: Endpoint, address_type: str, path: Path) -> Iterator[Violation]:
    if not 1 <= len(endpoint.addresses) <= MAX_ADDRESSES:
        reason = f"must hold between 1 and {MAX_ADDRESSES} addresses, not {len(endpoint.addresses)}"
        yield Violation((*path, "addresses"), reason)
    for index, address in enumerate(endpoint.addresses):
        if address_type == "FQDN":
            reason = name_rules.subdomain(address)
        elif not (reason := _unusable(address)) and family_of(address) != address_type:
            reason = f"{address} is not of addressType {address_type}"
        if reason:
            yield Violation((*path, "addresses", index), reason)
    if endpoint.node_name and (reason := name_rules.subdomain(endpoint.node_name)):
        yield Violation((*path, "nodeName"), reason)


def _slice_ports(ports: list[EndpointPort]) -> Iterator[Violation]:
    if len(ports) > MAX_SLICE_PORTS:
        yield Violation(("ports",), f"holds {len(ports)} ports; {MAX_SLICE_PORTS} are allowed")
        return
    names: set[str | None] = set()
    for index, port in enumerate(ports):
        path: Path = ("ports", index)
        if port.name and (reason := name_rules.label(port.name)):
            yield Violation((*path, "name"), reason)
        elif port.name in names:
            yield Violation(path, f"the name {port.name or ''!r} is used by another port of this slice")
        names.add(port.name)
        yield from _protocol(port.protocol, path)
        if port.port is not None:
            yield from _number(port.port, (*path, "port"))


def _pod(pod: Pod) -> Iterator[Violation]:
    if pod.spec.node_name and (reason := name_rules.subdomain(pod.spec.node_name)):
        yield Violation(("spec", "nodeName"), reason)
    names: set[str] = set()
    for field, containers in (("containers", pod.spec.containers), ("initContainers", pod.spec.init_containers)):
        for index, container in enumerate(containers):
            path: Path = ("spec", field, index)
            if reason := name_rules.label(container.name):
                yield Violation((*path, "name"), reason)
            elif container.name in names:
                yield Violation((*path, "name"), f"the name {container.name!r} is used by another container")
            names.add(container.name)
            yield from _container_ports(container.ports, path)
    if pod.status.pod_ip and (reason := _unusable(pod.status.pod_ip)):
        yield Violation(("status", "podIP"), reason)
    for index, address in enumerate(pod.status.pod_ips):
        if reason := _unusable(address.ip):
            yield Violation(("status", "podIPs", index, "ip"), reason)


def _container_ports(ports: list[ContainerPort], container: Path) -> Iterator[Violation]:
    names: set[str] = set()
    for index, port in enumerate(ports):
        path: Path = (*container, "ports", index)
        if port.name and (reason := name_rules.port_name(port.name)):
            yield Violation((*path, "name"), reason)
        elif port.name and port.name in names:
            yield Violation((*path, "name"), f"the name {port.name!r} is used by another port of this container")
        names.add(port.name)
        yield from _number(port.container_port, (*path, "containerPort"))
        yield from _protocol(port.protocol, path)
        if port.host_port:
            yield from _number(port.host_port, (*path, "hostPort"))


def _node(node: Node) -> Iterator[Violation]:
    if node.spec.pod_cidrs:
        yield from _cidrs(node.spec.pod_cidrs, ("spec", "podCIDRs"), several=True)
        if node.spec.pod_cidr not in ("", node.spec.pod_cidrs[0]):
            yield Violation(("spec", "podCIDR"), f"must equal the first of podCIDRs, {node.spec.pod_cidrs[0]}")
    elif node.spec.pod_cidr:
        yield from (Violation(("spec", "podCIDR"), found.reason) for found in _cidrs([node.spec.pod_cidr], ()))
    for index, address in enumerate(node.status.addresses):
        if address.type in ("InternalIP", "ExternalIP") and (reason := _unusable(address.address)):
            yield Violation(("status", "addresses", index, "address"), reason)


def _service_cidr(entry: ServiceCIDR) -> Iterator[Violation]:
    if not 1 <= len(entry.spec.cidrs) <= 2:
        yield Violation(("spec", "cidrs"), f"must hold one range or one of each family, not {len(entry.spec.cidrs)}")
    yield from _cidrs(entry.spec.cidrs, ("spec", "cidrs"))


def _cidrs(cidrs: Iterable[str], path: Path, *, several: bool = False) -> Iterator[Violation]:
    """`several`: of one family. Nodes may have as many as they need where no cluster gives them their one."""
    known: list[IPNetwork] = []
    for index, cidr in enumerate(cidrs):
        try:
            interface = ipaddress.ip_interface(cidr)
        except ValueError:
            yield Violation((*path, index), f"{name_rules.shown(cidr)} is not an address range such as 10.244.1.0/24")
            continue
        if interface.ip != interface.network.network_address:
            yield Violation((*path, index), f"{cidr} has bits set beyond its prefix; the range is {interface.network}")
        same = [network for network in known if network.version == interface.version]
        overlaps = next((network for network in same if interface.network.overlaps(network)), None)
        if same and not several:
            yield Violation((*path, index), f"two ranges of one family (IPv{interface.version})")
        elif overlaps is not None:
            yield Violation((*path, index), f"overlaps with {overlaps}")
        known.append(interface.network)


# -- remarks --------------------------------------------------------------------------------------------------------


def remarks(obj: Object) -> Iterator[Violation]:
    """What is right but does not do what its author may expect where no cluster runs."""
    if isinstance(obj, EndpointSlice):
        if not (obj.metadata.labels or {}).get(SERVICE_NAME_LABEL):
            yield Violation(("metadata",), f"belongs to no Service: the label {SERVICE_NAME_LABEL} is missing; ignored")
        if obj.address_type == "FQDN":
            yield Violation(("addressType",), "endpoints given as names are not served; ignored")
    if not isinstance(obj, Service):
        return
    if obj.spec.type == "ExternalName":
        yield Violation(("spec", "type"), "ExternalName is answered by DNS; nothing to serve here")
    elif not obj.spec.cluster_ip:
        node_ports = any(port.node_port for port in obj.spec.ports)
        served = "only its node ports are served" if node_ports else "it is not served"
        yield Violation(("spec",), f"has no clusterIP: it gets one from service-cidr; where that is not set, {served}")
    local = obj.spec.type == "LoadBalancer" and obj.spec.external_traffic_policy == "Local"
    if local and not obj.spec.health_check_node_port:
        reason = "has no healthCheckNodePort, and no apiserver is here to choose one: load balancers cannot ask"
        yield Violation(("spec",), reason)
    for index, port in enumerate(obj.spec.ports):
        if obj.spec.type == "NodePort" and not port.node_port:
            yield Violation(("spec", "ports", index), "has no nodePort, and no apiserver is here to choose one")
