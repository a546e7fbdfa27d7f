"""What the sources said, indexed the way the plan reads it.

Sources call `upsert`, `delete` and `replace`; the agent calls `take_changes` and gets the keys whose plan may differ
now. One object may be known from several origins (a file and the API): the first origin that named it owns it, the
others are remembered and take over when the owner lets go, so that deleting a file never deletes what the API says.

Pods of the API are peers of policies and nothing else: what serves a Service, an apiserver says in EndpointSlices.

Everything runs in one thread (the agent's event loop).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from msgspec.structs import replace

from waggle.model.objects import (
    KINDS,
    TRIGGER_TIME_ANNOTATION,
    ZONE_LABEL,
    ClusterNetworkPolicy,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    NodePolicy,
    Object,
    ObjectKey,
    Pod,
    Service,
    ServiceCIDR,
    kind_of,
)

T = TypeVar("T")

#: The origin of what an apiserver says.
API = "kubernetes"
POLICY_KINDS = ("NetworkPolicy", "ClusterNetworkPolicy", "NodePolicy")


@dataclass(slots=True)
class Changes:
    """Keys that changed since the last `take_changes`."""

    services: set[ObjectKey] = field(default_factory=set)
    nodes: set[ObjectKey] = field(default_factory=set)
    pods: set[ObjectKey] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)  # changes by kind, deletions too
    # Service → for each change that is no deletion, when its cause happened, as the object says; "" where it does not
    triggers: dict[ObjectKey, list[str]] = field(default_factory=dict)
    service_cidrs: set[ObjectKey] = field(default_factory=set)
    namespaces: set[ObjectKey] = field(default_factory=set)
    policies: set[ObjectKey] = field(default_factory=set)  # NetworkPolicies
    cluster_policies: set[ObjectKey] = field(default_factory=set)
    node_policies: set[ObjectKey] = field(default_factory=set)
    pod_nodes: set[str] = field(default_factory=set)  # names of the nodes that the changed pods are or were on

    def __bool__(self) -> bool:
        return bool(self.services or self.nodes or self.pods or self.service_cidrs or self.for_policy)

    @property
    def for_policy(self) -> bool:
        """Whether what policies mean may have changed."""
        policies = self.policies or self.cluster_policies or self.node_policies
        return bool(policies or self.namespaces or self.pods or self.nodes)


class Store:
    """The rows, by kind and key, with the indices the plan needs."""

    def __init__(self) -> None:
        self.services: dict[ObjectKey, Service] = {}
        self.slices: dict[ObjectKey, EndpointSlice] = {}
        self.pods: dict[ObjectKey, Pod] = {}
        self.nodes: dict[ObjectKey, Node] = {}
        self.service_cidrs: dict[ObjectKey, ServiceCIDR] = {}
        self.namespaces: dict[ObjectKey, Namespace] = {}
        self.policies: dict[ObjectKey, NetworkPolicy] = {}
        self.cluster_policies: dict[ObjectKey, ClusterNetworkPolicy] = {}
        self.node_policies: dict[ObjectKey, NodePolicy] = {}
        self.zones: dict[str, str] = {}  # node name → zone, of nodes that have one
        self.slices_of: dict[ObjectKey, dict[ObjectKey, EndpointSlice]] = {}
        self.on_change: Callable[[], None] = lambda: None
        self.on_demand: Callable[[], None] = lambda: None  # the first policy has come, or the last has gone
        self._selecting: dict[str, set[ObjectKey]] = {}  # namespace → Services that have a selector
        self._pods_in: dict[str, dict[ObjectKey, Pod]] = {}
        self._pods_on: dict[str, dict[ObjectKey, Pod]] = {}  # by node name; "" while a pod has no node
        self._serving_in: dict[str, dict[ObjectKey, Pod]] = {}  # those that Services may select
        self._policies_in: dict[str, dict[ObjectKey, NetworkPolicy]] = {}
        self._origins: dict[tuple[str, ObjectKey], dict[str, Object]] = {}  # only where an origin other than the owner
        self._owner: dict[str, dict[ObjectKey, str]] = {kind: {} for kind in KINDS}
        self._changes = Changes()

    def pods_in(self, namespace: str) -> Iterable[Pod]:
        """All pods of one namespace."""
        return self._pods_in.get(namespace, {}).values()

    def pods_on(self, node: str) -> Iterable[Pod]:
        """All pods of one node."""
        return self._pods_on.get(node, {}).values()

    def serving_pods_in(self, namespace: str) -> Iterable[Pod]:
        """The pods of one namespace that Services without EndpointSlices select among: all but the API's."""
        return self._serving_in.get(namespace, {}).values()

    def policies_in(self, namespace: str) -> Iterable[NetworkPolicy]:
        """All NetworkPolicies of one namespace."""
        return self._policies_in.get(namespace, {}).values()

    @property
    def has_policies(self) -> bool:
        """Whether there is any policy; without one nobody reads the API's pods and namespaces."""
        return self.has_pod_policies or bool(self.node_policies)

    @property
    def has_pod_policies(self) -> bool:
        """Whether any of them is about pods; without one they have nothing to wait for."""
        return bool(self.policies or self.cluster_policies)

    def upsert(self, obj: Object, origin: str) -> None:
        """Record `obj` as `origin` has it now. An equal object is no change."""
        kind, key = kind_of(obj), obj.key
        owner = self._owner[kind].setdefault(key, origin)
        if owner != origin:
            self._origins.setdefault((kind, key), {})[origin] = obj
            return
        self._put(kind, key, obj)

    def delete(self, kind: str, key: ObjectKey, origin: str) -> None:
        """Forget the object as known from `origin`. Unknown objects are no error: deletes may repeat."""
        owner = self._owner[kind].get(key)
        others = self._origins.get((kind, key))
        if owner != origin:
            if others:
                others.pop(origin, None)
                if not others:
                    del self._origins[kind, key]
            return
        if others:
            heir = next(iter(others))
            obj = others.pop(heir)
            if not others:
                del self._origins[kind, key]
            self._owner[kind][key] = heir
            self._put(kind, key, obj, other_owner=API in (origin, heir))
            return
        del self._owner[kind][key]
        self._remove(kind, key)

    def replace(self, kind: str, objects: Iterable[Object], origin: str) -> None:
        """Make `objects` all that `origin` knows of `kind`: what a fresh list of the API or a whole file means."""
        seen = set()
        for obj in objects:
            seen.add(obj.key)
            self.upsert(obj, origin)
        gone = [key for key, owner in self._owner[kind].items() if owner == origin and key not in seen]
        gone += [
            key
            for (other_kind, key), others in self._origins.items()
            if other_kind == kind and origin in others and key not in seen
        ]
        for key in gone:
            self.delete(kind, key, origin)

    def keys_from(self, origin: str) -> list[tuple[str, ObjectKey]]:
        """(kind, key) of everything `origin` owns."""
        return [(kind, key) for kind, owners in self._owner.items() for key, o in owners.items() if o == origin]

    def owner(self, kind: str, key: ObjectKey) -> str | None:
        """The origin that owns an object, or None where it is unknown."""
        return self._owner[kind].get(key)

    def take_changes(self) -> Changes:
        """What changed since the last call; the store then starts a new set."""
        changes, self._changes = self._changes, Changes()
        return changes

    @property
    def pending(self) -> Counter[str]:
        """Changes since the last `take_changes`, by kind."""
        return self._changes.counts

    def mark_all_services(self) -> None:
        """Have every Service planned again (the node's own facts changed)."""
        self._changes.services.update(self.services)
        self.on_change()

    # -- rows ---------------------------------------------------------------------------------------------------

    def _put(self, kind: str, key: ObjectKey, obj: Object, *, other_owner: bool = False) -> None:
        rows = self.rows(kind)
        old = rows.get(key)
        if old is not None and _same(old, obj):
            if other_owner and isinstance(old, Pod):  # it says the same, but may no longer serve, or only now
                self._index_serving(key, old, False)
                self._index_serving(key, old, True)
                self.on_change()
            return
        had_policies = self.has_policies
        rows[key] = obj
        self._index(key, old, obj)
        self._announce(kind, had_policies)

    def _remove(self, kind: str, key: ObjectKey) -> None:
        had_policies = self.has_policies
        old = self.rows(kind).pop(key, None)
        if old is not None:
            self._index(key, old, None)
            self._announce(kind, had_policies)

    def _announce(self, kind: str, had_policies: bool) -> None:
        if kind in POLICY_KINDS and self.has_policies != had_policies:
            self.on_demand()  # first: who plans for the change must see that not all is known
        self.on_change()

    def rows(self, kind: str) -> dict[ObjectKey, Object]:
        """All objects of a kind, by key. Only to be read."""
        rows: object = {
            "Service": self.services,
            "EndpointSlice": self.slices,
            "Pod": self.pods,
            "Node": self.nodes,
            "ServiceCIDR": self.service_cidrs,
            "Namespace": self.namespaces,
            "NetworkPolicy": self.policies,
            "ClusterNetworkPolicy": self.cluster_policies,
            "NodePolicy": self.node_policies,
        }[kind]
        return rows  # type: ignore[return-value]  # one dict per kind; the caller pairs kind and object

    def _index(self, key: ObjectKey, old: Object | None, new: Object | None) -> None:
        self._count(old, new)
        for obj, present in ((old, False), (new, True)):
            match obj:
                case Service():
                    self._index_service(obj, present)
                case EndpointSlice():
                    self._index_slice(obj, present)
                case Pod():
                    self._index_pod(key, obj, present)
                case Node():
                    self._index_node(obj, present)
                case ServiceCIDR():
                    self._changes.service_cidrs.add(key)
                case Namespace():
                    self._changes.namespaces.add(key)
                case NetworkPolicy():
                    _place(self._policies_in, key.namespace, key, obj if present else None)
                    self._changes.policies.add(key)
                case ClusterNetworkPolicy():
                    self._changes.cluster_policies.add(key)
                case NodePolicy():
                    self._changes.node_policies.add(key)

    def _count(self, old: Object | None, new: Object | None) -> None:
        obj = new or old
        assert obj is not None
        self._changes.counts[kind_of(obj)] += 1
        if isinstance(new, Service):
            self._changes.triggers.setdefault(new.key, []).append("")
        elif isinstance(new, EndpointSlice) and new.service_key is not None:
            # an annotation that the change before had already tells nothing of this one
            caused = _trigger_time(new)
            fresh = "" if old is not None and caused == _trigger_time(old) else caused
            self._changes.triggers.setdefault(new.service_key, []).append(fresh)

    def _index_node(self, node: Node, present: bool) -> None:
        name = node.metadata.name
        zone = (node.metadata.labels or {}).get(ZONE_LABEL, "")
        if present and zone:
            self.zones[name] = zone
        else:
            self.zones.pop(name, None)
        self._changes.nodes.add(node.key)

    def _index_service(self, service: Service, present: bool) -> None:
        selecting = self._selecting.setdefault(service.metadata.namespace, set())
        if present and service.spec.selector:
            selecting.add(service.key)
        else:
            selecting.discard(service.key)
        self._changes.services.add(service.key)

    def _index_slice(self, piece: EndpointSlice, present: bool) -> None:
        service = piece.service_key
        if service is None:
            return
        if present:
            self.slices_of.setdefault(service, {})[piece.key] = piece
        else:
            pieces = self.slices_of.get(service, {})
            pieces.pop(piece.key, None)
            if not pieces:
                self.slices_of.pop(service, None)
        self._changes.services.add(service)

    def _index_pod(self, key: ObjectKey, pod: Pod, present: bool) -> None:
        now = pod if present else None
        node = pod.spec.node_name
        _place(self._pods_in, key.namespace, key, now)
        _place(self._pods_on, node, key, now)
        self._changes.pods.add(key)
        self._changes.pod_nodes.add(node)
        self._index_serving(key, pod, present)

    def _index_serving(self, key: ObjectKey, pod: Pod, present: bool) -> None:
        namespace = key.namespace
        serves = self._owner["Pod"].get(key) != API if present else key in self._serving_in.get(namespace, ())
        if not serves:
            return
        _place(self._serving_in, namespace, key, pod if present else None)
        labels = pod.metadata.labels or {}
        for service in self._selecting.get(namespace, ()):
            selector = self.services[service].spec.selector or {}
            if selector.items() <= labels.items():
                self._changes.services.add(service)
                if present:
                    self._changes.triggers.setdefault(service, []).append("")


def _place(index: dict[str, dict[ObjectKey, T]], at: str, key: ObjectKey, obj: T | None) -> None:
    """Puts an object into an index, or takes it out; nothing stays of a group without objects."""
    if obj is not None:
        index.setdefault(at, {})[key] = obj
        return
    group = index.get(at, {})
    group.pop(key, None)
    if not group:
        index.pop(at, None)


def _trigger_time(obj: Object) -> str:
    return (obj.metadata.annotations or {}).get(TRIGGER_TIME_ANNOTATION, "")


def _same(old: Object, new: Object) -> bool:
    """Equal in what the plan reads: a new resourceVersion alone is no change."""
    version = old.metadata.resource_version
    if version != new.metadata.resource_version:
        new = replace(new, metadata=replace(new.metadata, resource_version=version))
    return old == new
