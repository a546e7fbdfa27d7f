"""The Kubernetes objects waggle reads, with only the fields it reads.

One set of types serves the Kubernetes API (JSON) and manifests (YAML): both decode straight into these structs with
msgspec, which skips every other field. Structs are frozen and untracked by the garbage collector (`gc=False`):
100,000 endpoints cost no collection time.

Field names are Kubernetes' own in snake_case; `rename="camel"` gives the wire names. Optional booleans keep None,
because Kubernetes gives None a meaning of its own (semantics.md section 1: nil ready = true).
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
SERVICE_PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"


class ObjectKey(NamedTuple):
    """(namespace, name): what identifies an object of one kind. Namespace is "" for cluster-scoped kinds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Struct(msgspec.Struct, frozen=True, gc=False, rename="camel", omit_defaults=True):
    """Base of all objects here."""


class ObjectMeta(Struct, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    deletion_timestamp: str | None = None


class ServicePort(Struct, frozen=True):
    port: int
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str | None = None
    node_port: int = 0


class ServiceSpec(Struct, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ip_families: list[str] | None = None
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    ports: list[ServicePort] = []
    selector: dict[str, str] | None = None
    publish_not_ready_addresses: bool = False
    session_affinity: str = "None"
    internal_traffic_policy: str = "Cluster"
    external_traffic_policy: str = "Cluster"


class Service(Struct, frozen=True):
    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.metadata.namespace, self.metadata.name)


class EndpointConditions(Struct, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ObjectReference(Struct, frozen=True):
    kind: str = ""
    namespace: str = ""
    name: str = ""


class Endpoint(Struct, frozen=True):
    addresses: list[str] = []
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    zone: str | None = None
    target_ref: ObjectReference | None = None


class EndpointPort(Struct, frozen=True):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class EndpointSlice(Struct, frozen=True):
    metadata: ObjectMeta
    address_type: str = "IPv4"
    endpoints: list[Endpoint] | None = None
    ports: list[EndpointPort] | None = None

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.metadata.namespace, self.metadata.name)

    @property
    def service_key(self) -> ObjectKey | None:
        """The Service this slice belongs to, or None where the label is missing (then it is ignored)."""
        name = (self.metadata.labels or {}).get(SERVICE_NAME_LABEL)
        return ObjectKey(self.metadata.namespace, name) if name else None


class ContainerPort(Struct, frozen=True):
    container_port: int
    name: str = ""
    protocol: str = "TCP"
    host_port: int = 0
    host_ip: str = msgspec.field(default="", name="hostIP")


class EnvVar(Struct, frozen=True):
    name: str
    value: str = ""


class Container(Struct, frozen=True):
    name: str = ""
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    ports: list[ContainerPort] = []
    working_dir: str = ""
    restart_policy: str = ""


class PodSpec(Struct, frozen=True):
    node_name: str = ""
    host_network: bool = False
    containers: list[Container] = []
    init_containers: list[Container] = []


class PodIP(Struct, frozen=True):
    ip: str


class PodCondition(Struct, frozen=True):
    type: str
    status: str


class PodStatus(Struct, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: list[PodIP] = msgspec.field(default_factory=list, name="podIPs")
    host_ip: str = msgspec.field(default="", name="hostIP")
    conditions: list[PodCondition] = []


class Pod(Struct, frozen=True):
    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.metadata.namespace, self.metadata.name)


class NodeAddress(Struct, frozen=True):
    type: str
    address: str


class NodeSpec(Struct, frozen=True):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] = msgspec.field(default_factory=list, name="podCIDRs")


class NodeStatus(Struct, frozen=True):
    addresses: list[NodeAddress] = []


class Node(Struct, frozen=True):
    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey("", self.metadata.name)


Object = Service | EndpointSlice | Pod | Node

#: kind → (apiVersion, type, namespaced). The kinds waggle reads; others in a manifest are passed over with a note.
KINDS: dict[str, tuple[str, type[Service] | type[EndpointSlice] | type[Pod] | type[Node], bool]] = {
    "Service": ("v1", Service, True),
    "EndpointSlice": ("discovery.k8s.io/v1", EndpointSlice, True),
    "Pod": ("v1", Pod, True),
    "Node": ("v1", Node, False),
}


def kind_of(obj: Object) -> str:
    """The Kubernetes kind of a typed object."""
    return type(obj).__name__
