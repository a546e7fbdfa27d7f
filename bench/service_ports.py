"""A Service port as a Service proxy sees it: what rules of kube-proxy and manifests for waggle are both made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench import objects


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`local`: it is on the node that is programmed."""

    address: str
    port: int
    local: bool = False


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service without affinity, both traffic policies Cluster. `node_port` 0: it has none."""

    namespace: str
    name: str
    port_name: str
    protocol: str  # TCP, UDP, SCTP
    cluster_ip: str
    port: int
    endpoints: Sequence[Endpoint]
    node_port: int = 0

    def __str__(self) -> str:
        """As kube-proxy writes it: namespace/name:port."""
        return f"{self.namespace}/{self.name}:{self.port_name}"


def filler(number: int, endpoints: Sequence[Endpoint]) -> ServicePort:
    """Service `number` of `objects`, with the endpoints given."""
    name = objects.service_name(number)
    address = objects.cluster_ip(number)
    return ServicePort(objects.NAMESPACE, name, "http", "TCP", address, objects.FILLER_PORT, endpoints)


def made_up_endpoints(number: int, count: int) -> list[Endpoint]:
    """Endpoints on nodes that do not exist, those that `objects.endpoint_slice` gives a Service."""
    return [Endpoint(objects.endpoint_ip(number, index), objects.TARGET_PORT) for index in range(count)]


def manifests(port: ServicePort) -> list[dict[str, Any]]:
    """Service and EndpointSlice. All endpoints have the same port."""
    spec: dict[str, Any] = {
        "type": "NodePort" if port.node_port else "ClusterIP",
        "clusterIP": port.cluster_ip,
        "clusterIPs": [port.cluster_ip],
        "ipFamilies": ["IPv4"],
        "ports": [{"name": port.port_name, "protocol": port.protocol, "port": port.port}],
    }
    if port.node_port:
        spec["ports"][0]["nodePort"] = port.node_port
    ready = {"ready": True, "serving": True, "terminating": False}
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": port.name, "namespace": port.namespace},
            "spec": spec,
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": port.name,
                "namespace": port.namespace,
                "labels": {"kubernetes.io/service-name": port.name},
            },
            "addressType": "IPv4",
            "endpoints": [{"addresses": [each.address], "conditions": ready} for each in port.endpoints],
            "ports": [{"name": port.port_name, "protocol": port.protocol, "port": port.endpoints[0].port}],
        },
    ]
