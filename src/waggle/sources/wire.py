"""The Kubernetes wire: lists and watch events decoded straight into waggle's structs, then made small.

`decode_list` and `decode_event` parse JSON into `waggle.model.objects` with no dict in between; fields the structs do
not have (managedFields, for one) are skipped while parsing and never become Python objects. What is decoded but not
read by anybody is dropped again before the object is handed out:
- annotations, which hold whole documents (kubectl's last-applied-configuration), but for the one that policies have;
- metadata.resourceVersion, which belongs to the watch, not to the row: without it two versions of an object are equal
  exactly if they say the same, also when a restored etcd numbers its revisions anew;
- labels of Services and EndpointSlices beyond those that Kubernetes' own proxy rules read.
A pod has hundreds of fields and is decoded in a shape of its own: what policies ask of a peer, and no containers.
Repeated strings (node, zone, namespace, protocol, port names) and whole condition structs become one shared object
each, so that 100,000 endpoints cost what differs between them.

One object that does not fit the types is refused on its own (`Refused`), with the rest of the list intact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec.structs import force_setattr

from waggle.errors import ApiError
from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_NAME_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    ClusterNetworkPolicy,
    Container,
    ContainerPort,
    EndpointHints,
    EndpointSlice,
    NamedHint,
    Namespace,
    NetworkPolicy,
    Node,
    NodePolicy,
    Object,
    ObjectKey,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServiceCIDR,
    ServiceStatus,
)
from waggle.model.policy_objects import AUDIT_ANNOTATION
from waggle.sources.apiserver import Status, status_error
from waggle.sources.name_rules import plain_range

T = TypeVar("T", bound=Object)

_KEPT_LABELS: Final = (SERVICE_NAME_LABEL, SERVICE_PROXY_NAME_LABEL, HEADLESS_LABEL)
_TABLE_LIMIT = 1 << 16  # strings; reached only where "repeated" strings do not repeat


@dataclass(frozen=True, slots=True)
class Refused:
    """An object that does not fit its type."""

    key: ObjectKey
    reason: str


@dataclass(slots=True)
class Page(Generic[T]):
    """One chunk of a list; `token` is "" on the last."""

    objects: list[T]
    version: str
    token: str
    refused: list[Refused] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Event(Generic[T]):
    """One watch event. Exactly one of `changed`, `deleted`, `refused` is set; none on a bookmark."""

    version: str
    changed: T | None = None
    deleted: ObjectKey | None = None
    refused: Refused | None = None


class _ListMeta(msgspec.Struct, rename="camel", gc=False):
    resource_version: str = ""
    token: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct, Generic[T], gc=False):
    metadata: _ListMeta
    items: list[T] | None = None


class _RawList(msgspec.Struct, gc=False):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Added(msgspec.Struct, Generic[T], tag="ADDED", gc=False):
    object: T


class _Modified(msgspec.Struct, Generic[T], tag="MODIFIED", gc=False):
    object: T


class _Deleted(msgspec.Struct, Generic[T], tag="DELETED", gc=False):
    object: T


class _Bare(msgspec.Struct, gc=False):
    """Any object, as far as it can be identified."""

    metadata: ObjectMeta = ObjectMeta()


class _Bookmark(msgspec.Struct, tag="BOOKMARK", gc=False):
    object: _Bare


class _Error(msgspec.Struct, tag="ERROR", gc=False):
    object: Status


class _BareEvent(msgspec.Struct, gc=False):
    type: str
    object: _Bare


class Wire(Generic[T]):
    """Decoders of one kind."""

    def __init__(self, kind: type[T]) -> None:
        shape: Any = _PodOnWire if kind is Pod else kind
        self._list = msgspec.json.Decoder(_List[shape])
        self._event = msgspec.json.Decoder(_Added[shape] | _Modified[shape] | _Deleted[shape] | _Bookmark | _Error)
        self._object = msgspec.json.Decoder(shape)
        self._shrunk: Callable[[Any], T] = _SHRUNK[kind]

    def decode_list(self, body: bytes) -> Page[T]:
        """A chunk of a list. Raises ApiError where the body is no list."""
        try:
            chunk = self._list.decode(body)
        except msgspec.ValidationError:
            return self._decode_list_one_by_one(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(f"the API's answer is not JSON: {error}") from error
        return Page(list(map(self._shrunk, chunk.items or ())), chunk.metadata.resource_version, chunk.metadata.token)

    def _decode_list_one_by_one(self, body: bytes) -> Page[T]:
        try:
            chunk = msgspec.json.decode(body, type=_RawList)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(f"the API's answer is not a list: {error}") from error
        page: Page[T] = Page([], chunk.metadata.resource_version, chunk.metadata.token)
        for item in chunk.items or []:
            try:
                obj = self._object.decode(item)
            except msgspec.ValidationError as error:
                page.refused.append(Refused(_key_of(_bare(item)), str(error)))
                continue
            page.objects.append(self._shrunk(obj))
        return page

    def decode_event(self, line: bytes) -> Event[T]:
        """A watch event. Raises ApiError for an ERROR event (with its code) and for what is no event (code 0)."""
        try:
            event = self._event.decode(line)
        except msgspec.ValidationError as error:
            return self._refused_event(line, error)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ApiError(f"the API sent a watch event that is not JSON: {error}") from error
        match event:
            case _Added(object=obj) | _Modified(object=obj):
                version = obj.metadata.resource_version
                return Event(version, changed=self._shrunk(obj))
            case _Deleted(object=obj):
                return Event(obj.metadata.resource_version, deleted=_key_of(obj.metadata))
            case _Bookmark(object=bare):
                return Event(bare.metadata.resource_version)
            case _Error(object=status):
                raise status_error(status)
        raise AssertionError(event)

    def _refused_event(self, line: bytes, error: msgspec.ValidationError) -> Event[T]:
        try:
            bare = msgspec.json.decode(line, type=_BareEvent)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ApiError(f"the API sent what is no watch event: {error}") from error
        meta = bare.object.metadata
        if bare.type == "DELETED" and meta.name:  # whatever else it says, it is gone
            return Event(meta.resource_version, deleted=_key_of(meta))
        if bare.type not in ("ADDED", "MODIFIED") or not meta.name:
            raise ApiError(f"the API sent what is no watch event: {error}") from error
        return Event(meta.resource_version, refused=Refused(_key_of(meta), str(error)))


def _bare(item: msgspec.Raw) -> ObjectMeta:
    try:
        return msgspec.json.decode(item, type=_Bare).metadata
    except msgspec.ValidationError:
        return ObjectMeta(name="?")


def _key_of(meta: ObjectMeta) -> ObjectKey:
    return ObjectKey(meta.namespace, meta.name)


# -- making objects small ---------------------------------------------------------------------------------------
#
# Every object below was decoded a moment ago and is known to nobody else: only that makes it right to write to a
# frozen struct.


class _Shared(dict[Any, Any]):
    """Equal values become one object. sys.intern would do for strings, but keeps them for ever on Python 3.12."""

    def __missing__(self, value: Any) -> Any:
        if len(self) >= _TABLE_LIMIT:
            self.clear()
        self[value] = value
        return value


_strings = _Shared()
_structs = _Shared()
_NO_STATUS: Final = ServiceStatus()


class _SharedHints(dict[tuple[tuple[str, ...], tuple[str, ...]], EndpointHints]):
    """One EndpointHints for equal names. Its lists cannot be keys, so it is made again from them."""

    def __missing__(self, names: tuple[tuple[str, ...], tuple[str, ...]]) -> EndpointHints:
        if len(self) >= _TABLE_LIMIT:
            self.clear()
        zones, nodes = ([NamedHint(_strings[name]) for name in part] for part in names)
        self[names] = made = EndpointHints(zones, nodes)
        return made


_hints = _SharedHints()


def _hint_names(hints: EndpointHints) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(h.name for h in hints.for_zones or ()), tuple(h.name for h in hints.for_nodes or ())


def _shrink_meta(meta: ObjectMeta, *, all_labels: bool) -> None:
    if meta.annotations is not None:
        force_setattr(meta, "annotations", None)
    force_setattr(meta, "resource_version", "")
    force_setattr(meta, "namespace", _strings[meta.namespace])
    labels = meta.labels
    if labels:
        kept: Mapping[str, str]
        if all_labels:
            kept = {_strings[name]: _strings[value] for name, value in labels.items()}
        else:
            kept = {name: labels[name] for name in _KEPT_LABELS if name in labels}
        force_setattr(meta, "labels", kept or None)


def _shrunk_service(service: Service) -> Service:
    _shrink_meta(service.metadata, all_labels=False)
    spec = service.spec
    for name in ("type", "session_affinity", "internal_traffic_policy", "external_traffic_policy"):
        force_setattr(spec, name, _strings[getattr(spec, name)])
    if spec.cluster_ips and spec.cluster_ips[0] == spec.cluster_ip:
        spec.cluster_ips[0] = spec.cluster_ip
    if spec.ip_families:
        spec.ip_families[:] = [_strings[family] for family in spec.ip_families]
    if spec.selector:
        force_setattr(spec, "selector", {_strings[name]: value for name, value in spec.selector.items()})
    if not service.status.load_balancer.ingress:
        force_setattr(service, "status", _NO_STATUS)
    for port in spec.ports:
        force_setattr(port, "name", _strings[port.name])
        force_setattr(port, "protocol", _strings[port.protocol])
    return service


def _shrunk_slice(piece: EndpointSlice) -> EndpointSlice:
    # 100,000 times each: locals are a third faster
    put, strings, structs, shared_hints = force_setattr, _strings, _structs, _hints
    _shrink_meta(piece.metadata, all_labels=False)
    put(piece, "address_type", strings[piece.address_type])
    if piece.ports:
        piece.ports[:] = [structs[port] for port in piece.ports]
    for endpoint in piece.endpoints or ():
        put(endpoint, "conditions", structs[endpoint.conditions])
        if endpoint.hints is not None:
            put(endpoint, "hints", shared_hints[_hint_names(endpoint.hints)])
        if endpoint.node_name is not None:
            put(endpoint, "node_name", strings[endpoint.node_name])
        if endpoint.zone is not None:
            put(endpoint, "zone", strings[endpoint.zone])
        target = endpoint.target_ref
        if target is not None:
            put(target, "kind", strings[target.kind])
            put(target, "namespace", strings[target.namespace])
    return piece


def _shrunk_node(node: Node) -> Node:
    _shrink_meta(node.metadata, all_labels=True)
    for address in node.status.addresses:
        force_setattr(address, "type", _strings[address.type])
    return node


def _shrunk_service_cidr(entry: ServiceCIDR) -> ServiceCIDR:
    _shrink_meta(entry.metadata, all_labels=False)
    return entry


def _shrunk_namespace(namespace: Namespace) -> Namespace:
    _shrink_meta(namespace.metadata, all_labels=True)
    return namespace


def _shrink_policy_meta(meta: ObjectMeta) -> None:
    audit = (meta.annotations or {}).get(AUDIT_ANNOTATION)
    _shrink_meta(meta, all_labels=False)
    if audit is not None:
        force_setattr(meta, "annotations", {AUDIT_ANNOTATION: audit})


def _plain_blocks(policy: NetworkPolicy | NodePolicy) -> None:
    """Ranges as they are meant."""
    blocks = [peer.ip_block for rule in policy.spec.ingress or () for peer in rule.from_ or ()]
    blocks += [peer.ip_block for rule in policy.spec.egress or () for peer in rule.to or ()]
    for block in blocks:
        if block is not None:
            force_setattr(block, "cidr", plain_range(block.cidr))
            block.except_[:] = map(plain_range, block.except_)


def _shrunk_policy(policy: NetworkPolicy) -> NetworkPolicy:
    _shrink_policy_meta(policy.metadata)
    _plain_blocks(policy)
    return policy


def _shrunk_node_policy(policy: NodePolicy) -> NodePolicy:
    _shrink_policy_meta(policy.metadata)
    _plain_blocks(policy)
    return policy


def _shrunk_cluster_policy(policy: ClusterNetworkPolicy) -> ClusterNetworkPolicy:
    _shrink_policy_meta(policy.metadata)
    for rule in policy.spec.egress:
        for peer in rule.to:
            if peer.networks:
                peer.networks[:] = map(plain_range, peer.networks)
    return policy


# -- pods as peers ----------------------------------------------------------------------------------------------
#
# There are more of them than of anything else, so they are made of shared parts: pods of one template have the same
# ports, and mostly the same labels.


class _PodMeta(msgspec.Struct, rename="camel", frozen=True, gc=False):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None


class _PortOnWire(msgspec.Struct, rename="camel", gc=False):
    container_port: int
    name: str = ""
    protocol: str = "TCP"


class _ContainerOnWire(msgspec.Struct, rename="camel", gc=False):
    ports: list[_PortOnWire] | None = None
    restart_policy: str = ""


class _PodSpecOnWire(msgspec.Struct, rename="camel", frozen=True, gc=False):
    node_name: str = ""
    host_network: bool = False
    containers: list[_ContainerOnWire] = []
    init_containers: list[_ContainerOnWire] | None = None


class _AddressOnWire(msgspec.Struct, gc=False):
    ip: str


class _PodStatusOnWire(msgspec.Struct, rename="camel", frozen=True, gc=False):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[_AddressOnWire] | None = msgspec.field(default=None, name="podIPs")


class _PodOnWire(msgspec.Struct, frozen=True, gc=False):
    metadata: _PodMeta
    spec: _PodSpecOnWire = _PodSpecOnWire()
    status: _PodStatusOnWire = _PodStatusOnWire()


_LABELS_LIMIT = 1 << 12  # pods of Jobs have labels of their own, and come and go
_labels: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
_ports: dict[tuple[tuple[str, str, int], ...], list[Container]] = {}
_NONE: Final[list[Any]] = []  # an empty list costs 56 bytes; nobody writes to those of a row


def _pod(wire: _PodOnWire) -> Pod:
    """What is left out: containers without named ports, host ports (CNI requests say them), conditions."""
    meta, spec, status = wire.metadata, wire.spec, wire.status
    addresses = [entry.ip for entry in status.pod_ips or ()] or ([status.pod_ip] if status.pod_ip else [])
    return Pod(
        ObjectMeta(meta.name, _strings[meta.namespace], labels=_shared_labels(meta.labels)),
        PodSpec(_strings[spec.node_name], spec.host_network, _named_ports(spec), _NONE),
        PodStatus(
            _strings[status.phase],
            addresses[0] if addresses else "",
            [PodIP(address) for address in addresses] if addresses else _NONE,
            conditions=_NONE,
        ),
    )


def _shared_labels(labels: dict[str, str] | None) -> dict[str, str] | None:
    if not labels:
        return None
    items = tuple(labels.items())
    found = _labels.get(items)
    if found is None:
        if len(_labels) >= _LABELS_LIMIT:
            _labels.clear()
        found = _labels[items] = {_strings[name]: value for name, value in items}
    return found


def _named_ports(spec: _PodSpecOnWire) -> list[Container]:
    """All in one container: names mean the same wherever in the pod they stand. Init containers that go on count."""
    running = [*spec.containers, *(c for c in spec.init_containers or () if c.restart_policy == "Always")]
    named = tuple((p.name, p.protocol, p.container_port) for c in running for p in c.ports or () if p.name)
    if not named:
        return _NONE
    found = _ports.get(named)
    if found is None:
        if len(_ports) >= _LABELS_LIMIT:
            _ports.clear()
        ports = [ContainerPort(number, _strings[name], _strings[protocol]) for name, protocol, number in named]
        found = _ports[named] = [Container(command=_NONE, args=_NONE, env=_NONE, ports=ports)]
    return found


_SHRUNK: Final[dict[type, Callable[[Any], Any]]] = {
    Service: _shrunk_service,
    EndpointSlice: _shrunk_slice,
    Node: _shrunk_node,
    ServiceCIDR: _shrunk_service_cidr,
    Namespace: _shrunk_namespace,
    NetworkPolicy: _shrunk_policy,
    ClusterNetworkPolicy: _shrunk_cluster_policy,
    NodePolicy: _shrunk_node_policy,
    Pod: _pod,
}
