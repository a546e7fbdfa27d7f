"""Addresses to names: which Service, pod or node an address belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from waggle.abi.address import host_port, unpack_address
from waggle.model.interface import PodInterface
from waggle.model.objects import ObjectKey, ObjectReference
from waggle.model.service import FrontendKind
from waggle.store import Changes, Store


class Names:
    """Names from the store, of the local pods, and of what endpoints say that they are.

    Events come all the time, and so do changes: a change costs what it is large, and nothing before somebody asks.
    References to pods are kept as the slices have them: a hundred thousand endpoints need no texts of their own.
    """

    def __init__(
        self,
        store: Store,
        local_pods: Callable[[], Iterable[PodInterface]],
        service_of: Callable[[bytes, int, int], str] = lambda address, port, protocol: "",
        endpoints_of: Callable[[ObjectKey], Iterable[str]] = lambda key: (),
    ) -> None:
        """`service_of`: "namespace/name" of the Service with this frontend, or ""; `endpoints_of`: addresses of a
        Service's endpoints."""
        self._store = store
        self._local_pods = local_pods
        self.service_of = service_of
        self._endpoints_of = endpoints_of
        self.stale = True  # pods of this node have come or gone
        self.by_netns: dict[int, str] = {}
        self._changed: Changes | None = None  # what is not here yet; None: nothing is
        self._local: dict[str, str] = {}
        self._pods: dict[str, ObjectKey] = {}
        self._addresses_of_pod: dict[ObjectKey, tuple[str, ...]] = {}
        self._targets: dict[str, ObjectReference | str] = {}
        self._addresses_of_service: dict[ObjectKey, tuple[str, ...]] = {}
        self._nodes: dict[str, str] = {}
        self._endpoints: dict[str, frozenset[str]] = {}

    def follow(self, changes: Changes) -> None:
        """What has changed in the store."""
        self._endpoints.clear()
        if self._changed is not None:
            self._changed.services |= changes.services
            self._changed.nodes |= changes.nodes
            self._changed.pods |= changes.pods

    def address(self, address: str) -> str:
        """ "pod namespace/name" or "node name" for an address, "" when unknown."""
        self._refresh()
        if name := self._local.get(address):
            return name
        if pod := self._pods.get(address):
            return f"pod {pod}"
        if node := self._nodes.get(address):  # before endpoints, which are there too
            return node
        target = self._targets.get(address, "")
        return target if isinstance(target, str) else f"pod {target.namespace}/{target.name}"

    def of(self, raw: bytes) -> str:
        """As `address`, of one in an event; "" for zeros."""
        return self.address(unpack_address(raw)) if any(raw) else ""

    def service_addresses(self, service: str) -> frozenset[str]:
        """Addresses of the endpoints of a Service, "namespace/name"; none where it is not known."""
        if service not in self._endpoints:
            self._endpoints[service] = frozenset(self._endpoints_of(ObjectKey(*service.partition("/")[::2])))
        return self._endpoints[service]

    def _refresh(self) -> None:
        if self.stale:
            self.stale = False
            self._local = {
                str(ip): f"pod {pod.namespace or 'default'}/{pod.name}"
                for pod in self._local_pods()
                if pod.name
                for ip in pod.addresses
            }
        changed, self._changed = self._changed, Changes()
        store = self._store
        if changed is None or changed.nodes:
            self._nodes = {
                own.address: f"node {node.metadata.name}"
                for node in store.nodes.values()
                for own in node.status.addresses
            }
        for key in store.pods if changed is None else changed.pods:
            self._take_pod(key)
        for key in store.slices_of if changed is None else changed.services:
            self._take_service(key)

    def _take_pod(self, key: ObjectKey) -> None:
        for address in self._addresses_of_pod.pop(key, ()):
            if self._pods.get(address) == key:  # else it is another pod's by now
                del self._pods[address]
        pod = self._store.pods.get(key)
        if pod is None or pod.spec.host_network or pod.status.phase in ("Succeeded", "Failed"):
            return  # its address is the node's, or may be another pod's by now
        if pod.status.pod_ips:
            self._addresses_of_pod[key] = addresses = tuple(entry.ip for entry in pod.status.pod_ips)
            self._pods.update(dict.fromkeys(addresses, key))

    def _take_service(self, key: ObjectKey) -> None:
        for address in self._addresses_of_service.pop(key, ()):
            self._targets.pop(address, None)
        addresses = []
        for piece in self._store.slices_of.get(key, {}).values():
            for endpoint in piece.endpoints or ():
                target = endpoint.target_ref
                if target is not None and target.kind == "Pod" and endpoint.addresses:
                    addresses.append(endpoint.addresses[0])
                    here = f"pod {piece.metadata.namespace}/{target.name}"
                    self._targets[endpoint.addresses[0]] = target if target.namespace else here
        if addresses:
            self._addresses_of_service[key] = tuple(addresses)


def end_facts(raw: bytes, port: int, name: str) -> dict[str, object]:
    """An address of an event for people: text, port, and a name where there is one."""
    text = unpack_address(raw) if any(raw) else ""
    return {"address": text, "port": port, "name": name, "text": host_port(text, port)}


def frontend_text(kind: FrontendKind, address: str, port: int) -> str:
    """A frontend for people: "10.96.0.10:80" or "*:30080"."""
    return f"*:{port}" if kind is FrontendKind.NODE_PORT else host_port(address, port)
