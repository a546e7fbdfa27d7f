"""Host ports: ports of the node that lead to one pod.

They come from Pod objects (`containers[].ports[].hostPort`) and from the runtime's CNI request (`portMappings`),
whichever is there; where both are, they mean the same. A host port is a node port with one backend, except that it is
served on every address of the node, whatever nodeport-addresses says, or on the one that its hostIP names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from waggle.model.interface import HostPort, PodInterface
from waggle.model.objects import ObjectKey, Pod
from waggle.model.service import Family, family_of

ANY = {Family.IPV4: "0.0.0.0", Family.IPV6: "::"}


class HostPortOwner(NamedTuple):
    """The pod that a host port leads to. `interface` is its host side, "" for a pod that no CNI request made.

    Three fields, so that none is ever equal to the ObjectKey of a Service.
    """

    namespace: str
    name: str
    interface: str

    @property
    def held(self) -> bool:
        """Whether the runtime keeps a socket of its own on the ports. Those without Kubernetes do (Podman, which names
        no namespace), once ADD has succeeded, and start no container without: nobody else may take the port meanwhile.
        """
        return not self.namespace

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name or self.interface


class PodPorts(NamedTuple):
    """The host ports of one pod, and the addresses that they lead to."""

    ports: tuple[HostPort, ...]
    addresses: tuple[str, ...]


def host_ports(pod: Pod) -> tuple[HostPort, ...]:
    """Those of a Pod object. On the host's network the ports are the node's own, and a finished pod has none."""
    if pod.spec.host_network or pod.status.phase in ("Succeeded", "Failed"):
        return ()
    sidecars = [c for c in pod.spec.init_containers if c.restart_policy == "Always"]
    found = [
        HostPort(port.protocol, port.host_port, port.container_port, port.host_ip)
        for container in (*pod.spec.containers, *sidecars)
        for port in container.ports
        if port.host_port
    ]
    return tuple(dict.fromkeys(found))


def node_host_ports(
    node: str, pods: Iterable[Pod], interfaces: Iterable[PodInterface]
) -> dict[HostPortOwner, PodPorts]:
    """All host ports of a node: of the pods that runtimes made here, and of Pod objects that say they are here."""
    found: dict[HostPortOwner, PodPorts] = {}
    made: dict[ObjectKey, HostPortOwner] = {}
    addresses: dict[HostPortOwner, tuple[str, ...]] = {}
    for interface in interfaces:
        owner = HostPortOwner(interface.namespace, interface.name, interface.host_ifname)
        addresses[owner] = tuple(map(str, interface.addresses))
        if interface.name:
            made.setdefault(ObjectKey(interface.namespace, interface.name), owner)
        if interface.host_ports:
            found[owner] = PodPorts(interface.host_ports, addresses[owner])
    for pod in pods:
        ports = host_ports(pod) if pod.spec.node_name == node else ()
        if not ports:
            continue
        owner = made.get(pod.key) or HostPortOwner(*pod.key, "")
        known = found.get(owner)
        where = addresses.get(owner) or tuple(entry.ip for entry in pod.status.pod_ips)
        found[owner] = PodPorts(tuple(dict.fromkeys((*(known.ports if known else ()), *ports))), where)
    return found


def frontend_address(port: HostPort, family: Family, node_addresses: Iterable[str]) -> str | None:
    """Where a host port is served in a family: "" for every address of the node; None: not at all.

    A hostIP must be an address of the node, or a loopback address, which processes of the node alone can use: any
    other would take traffic that is somebody else's.
    """
    if not port.host_ip or port.host_ip == ANY[family]:
        return ""
    if not _is_address(port.host_ip) or family_of(port.host_ip) is not family:
        return None
    ours = port.host_ip in set(node_addresses) or ipaddress.ip_address(port.host_ip).is_loopback
    return port.host_ip if ours else None


def faults(ports: PodPorts, node_addresses: Iterable[str]) -> list[str]:
    """What of the ports cannot be served, in words."""
    everywhere = frozenset(node_addresses)
    return [
        f"host port {port.port}/{port.protocol}: hostIP {port.host_ip} is no address of this node"
        for port in ports.ports
        if port.host_ip
        and all(frontend_address(port, family, everywhere) is None for family in (Family.IPV4, Family.IPV6))
    ]


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def changed(before: Mapping[HostPortOwner, PodPorts], now: Mapping[HostPortOwner, PodPorts]) -> set[HostPortOwner]:
    """The pods whose host ports have to be planned again."""
    return {owner for owner in before.keys() | now.keys() if before.get(owner) != now.get(owner)}
