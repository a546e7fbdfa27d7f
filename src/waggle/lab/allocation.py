"""What an apiserver fills in when a Service is created: cluster addresses, families, node ports, the health port.

Only manifests that leave them out get them. A Service that is applied again keeps what it has, and nothing is given
out that another Service of the lab holds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

from waggle.errors import LabError
from waggle.lab.layout import NODE_PORTS, SERVICE_CIDR_V4, SERVICE_CIDR_V6

Document = dict[str, Any]
_RANGES = {"IPv4": SERVICE_CIDR_V4, "IPv6": SERVICE_CIDR_V6}


class ServiceAllocator:
    """Gives out what the `existing` Services do not hold."""

    def __init__(self, existing: Iterable[Document]) -> None:
        self._known = {_key(service): service for service in existing}

    def complete(self, service: Document) -> Document:
        """The Service with everything filled in; the argument stays as it is. Raises LabError when a range is full,
        or when the Service asks for what another one holds.
        """
        spec: Document = dict(service.get("spec") or {})
        before = (self._known.pop(_key(service), None) or {}).get("spec", {})
        if spec.get("type", "ClusterIP") != "ExternalName" and spec.get("clusterIP") != "None":
            spec |= self._addresses(spec, before)
        if spec.get("type") in ("NodePort", "LoadBalancer"):
            spec["ports"] = self._node_ports(spec.get("ports") or [], before.get("ports") or [])
        if spec.get("type") == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            spec["healthCheckNodePort"] = self._health_port(spec, before)
        completed = {**service, "spec": spec}
        self._refuse_conflicts(completed)
        self._known[_key(service)] = completed
        return completed

    def _addresses(self, spec: Document, before: Document) -> Document:
        given = _cluster_ips(spec)
        kept = given or _cluster_ips(before)
        families = spec.get("ipFamilies") or [_family(address) for address in kept] or ["IPv4"]
        if spec.get("ipFamilyPolicy") in ("PreferDualStack", "RequireDualStack") and len(families) == 1:
            families = [*families, "IPv6" if families[0] == "IPv4" else "IPv4"]
        by_family = {_family(address): address for address in kept}
        addresses = [by_family.get(family) or self._free_address(family) for family in families]
        return {"clusterIP": addresses[0], "clusterIPs": addresses, "ipFamilies": families}

    def _free_address(self, family: str) -> str:
        taken = {address for service in self._known.values() for address in _cluster_ips(service["spec"])}
        # As kube-apiserver: the lower part of a range is left to those who choose their address themselves.
        candidates = ipaddress.ip_network(_RANGES[family])
        for offset in range(256, min(candidates.num_addresses, 1 << 16) - 1):
            address = str(candidates[offset])
            if address not in taken:
                return address
        raise LabError(f"no {family} cluster address is left in {candidates}")

    def _node_ports(self, ports: list[Document], before: list[Document]) -> list[Document]:
        kept = {_port_id(port): port["nodePort"] for port in before if port.get("nodePort")}
        taken = {number for service in self._known.values() for number in _node_port_numbers(service)}
        taken |= {number for port in ports if (number := port.get("nodePort") or kept.get(_port_id(port)))}
        result = []
        for port in ports:
            number = port.get("nodePort") or kept.get(_port_id(port)) or _first_free(NODE_PORTS, taken)
            taken.add(number)
            result.append({**port, "nodePort": number})
        return result

    def _health_port(self, spec: Document, before: Document) -> int:
        wanted: int = spec.get("healthCheckNodePort") or before.get("healthCheckNodePort") or 0
        others = [*self._known.values(), {"spec": {"ports": spec["ports"]}}]
        return wanted or _first_free(NODE_PORTS, {n for service in others for n in _node_port_numbers(service)})

    def _refuse_conflicts(self, service: Document) -> None:
        addresses = set(_cluster_ips(service["spec"]))
        node_ports = set(_node_ports_with_protocol(service))
        for key, other in self._known.items():
            shared = addresses & set(_cluster_ips(other["spec"]))
            if shared:
                raise LabError(f"Service {'/'.join(_key(service))}: {'/'.join(key)} has the address {shared.pop()}")
            ports = node_ports & set(_node_ports_with_protocol(other))
            if ports:
                protocol, number = ports.pop()
                raise LabError(
                    f"Service {'/'.join(_key(service))}: {'/'.join(key)} has the node port {number}/{protocol}"
                )


def _key(document: Document) -> tuple[str, str]:
    return document["metadata"].get("namespace", "default"), document["metadata"]["name"]


def _cluster_ips(spec: Document) -> list[str]:
    addresses = spec.get("clusterIPs") or [spec.get("clusterIP")]
    return [address for address in addresses if address and address != "None"]


def _family(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


def _port_id(port: Document) -> tuple[object, str]:
    return port.get("name") or port.get("port"), port.get("protocol", "TCP")


def _node_ports_with_protocol(service: Document) -> Iterator[tuple[str, int]]:
    for port in service["spec"].get("ports") or []:
        if port.get("nodePort"):
            yield port.get("protocol", "TCP"), port["nodePort"]
    if service["spec"].get("healthCheckNodePort"):
        yield "TCP", service["spec"]["healthCheckNodePort"]


def _node_port_numbers(service: Document) -> Iterator[int]:
    return (number for _, number in _node_ports_with_protocol(service))


def _first_free(candidates: Iterable[int], taken: set[int]) -> int:
    for number in candidates:
        if number not in taken:
            return number
    raise LabError("no node port is left")
