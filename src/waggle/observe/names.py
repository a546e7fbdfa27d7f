"""Addresses to names: which Service, pod or node an address belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from waggle.abi.address import host_port, unpack_address
from waggle.model.interface import PodInterface
from waggle.model.service import FrontendKind, cluster_ips
from waggle.store import Store


class Names:
    """Resolves on demand from the store; built anew when asked after a change (`stale`)."""

    def __init__(self, store: Store, local_pods: Callable[[], Iterable[PodInterface]]) -> None:
        self._store = store
        self._local_pods = local_pods
        self.stale = True
        self._services: dict[tuple[str, int], str] = {}
        self._addresses: dict[str, str] = {}
        self.by_netns: dict[int, str] = {}

    def service(self, address: str, port: int) -> str:
        """ "namespace/name" of the Service with this frontend, "" when unknown. NodePorts match any address."""
        self._refresh()
        return self._services.get((address, port)) or self._services.get(("", port), "")

    def address(self, address: str) -> str:
        """ "pod namespace/name" or "node name" for an address, "" when unknown."""
        self._refresh()
        return self._addresses.get(address, "")

    def endpoint(self, raw: bytes, port: int) -> dict[str, object]:
        """An address of an event for people: text, port, and a name where there is one."""
        text = unpack_address(raw) if any(raw) else ""
        return {"address": text, "port": port, "name": self.address(text), "text": host_port(text, port)}

    def _refresh(self) -> None:
        if not self.stale:
            return
        self.stale = False
        self._services.clear()
        self._addresses.clear()
        for key, service in self._store.services.items():
            for port in service.spec.ports:
                for address in cluster_ips(service):
                    self._services[address, port.port] = str(key)
                if port.node_port:
                    self._services["", port.node_port] = str(key)
        for node in self._store.nodes.values():
            for own in node.status.addresses:
                self._addresses[own.address] = f"node {node.metadata.name}"
        for slices in self._store.slices_of.values():
            for piece in slices.values():
                for endpoint in piece.endpoints or ():
                    reference = endpoint.target_ref
                    if reference is not None and reference.kind == "Pod" and endpoint.addresses:
                        namespace = reference.namespace or piece.metadata.namespace
                        self._addresses[endpoint.addresses[0]] = f"pod {namespace}/{reference.name}"
        for pod in self._store.pods.values():
            if pod.spec.host_network or pod.status.phase in ("Succeeded", "Failed"):
                continue  # its address is the node's, or may be another pod's by now
            for entry in pod.status.pod_ips:
                self._addresses[entry.ip] = f"pod {pod.key}"
        for local in self._local_pods():
            if local.name:
                for ip in local.addresses:
                    self._addresses[str(ip)] = f"pod {local.namespace or 'default'}/{local.name}"


def frontend_text(kind: FrontendKind, address: str, port: int) -> str:
    """A frontend for people: "10.96.0.10:80" or "*:30080"."""
    return f"*:{port}" if kind is FrontendKind.NODE_PORT else host_port(address, port)
