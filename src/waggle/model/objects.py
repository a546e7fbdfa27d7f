"""The Kubernetes objects waggle reads, with only the fields it reads.

One set of types serves the Kubernetes API (JSON) and manifests (YAML): both decode straight into these structs with
msgspec, which skips every other field. Structs are frozen and untracked by the garbage collector (`gc=False`):
100,000 endpoints cost no collection time.

Field names are Kubernetes' own in snake_case; `rename="camel"` gives the wire names. Optional booleans keep None,
because Kubernetes gives None a meaning of its own (semantics.md section 1: nil ready = true).
"""

from __future__ import annotations

import msgspec

from waggle.model.meta import ObjectKey as ObjectKey
from waggle.model.meta import ObjectMeta as ObjectMeta
from waggle.model.meta import Struct
from waggle.model.policy_objects import ClusterNetworkPolicy as ClusterNetworkPolicy
from waggle.model.policy_objects import Namespace as Namespace
from waggle.model.policy_objects import NetworkPolicy as NetworkPolicy
from waggle.model.policy_objects import NodePolicy as NodePolicy

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
SERVICE_PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
HEADLESS_LABEL = "service.kubernetes.io/headless"
ZONE_LABEL = "topology.kubernetes.io/zone"
#: On an EndpointSlice: when what it follows changed (a pod became ready, say).
TRIGGER_TIME_ANNOTATION = "endpoints.kubernetes.io/last-change-trigger-time"
#: A node that the cluster autoscaler is about to remove.
TO_BE_DELETED_TAINT = "ToBeDeletedByClusterAutoscaler"


class ServicePort(Struct, frozen=True):
    port: int
    name: str = ""
    protocol: str = "TCP"
    target_port: int | str | None = None
    node_port: int = 0


class ClientIPConfig(Struct, frozen=True):
    timeout_seconds: int | None = None


class SessionAffinityConfig(Struct, frozen=True):
    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(Struct, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    ip_families: list[str] | None = None
    ip_family_policy: str | None = None
    external_name: str = ""
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    ports: list[ServicePort] = []
    selector: dict[str, str] | None = None
    publish_not_ready_addresses: bool = False
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    internal_traffic_policy: str = "Cluster"
    external_traffic_policy: str = "Cluster"
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: int = 0
    traffic_distribution: str | None = None


class LoadBalancerIngress(Struct, frozen=True):
    ip: str = ""
    ip_mode: str | None = None


class LoadBalancerStatus(Struct, frozen=True):
    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(Struct, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Struct, frozen=True):
    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()

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


class NamedHint(Struct, frozen=True):
    name: str = ""


class EndpointHints(Struct, frozen=True):
    for_zones: list[NamedHint] | None = None
    for_nodes: list[NamedHint] | None = None


class Endpoint(Struct, frozen=True):
    addresses: list[str] = []
    conditions: EndpointConditions = EndpointConditions()
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None
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


class Taint(Struct, frozen=True):
    key: str = ""


class NodeSpec(Struct, frozen=True):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: list[str] = msgspec.field(default_factory=list, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeStatus(Struct, frozen=True):
    addresses: list[NodeAddress] = []


class Node(Struct, frozen=True):
    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey("", self.metadata.name)


class ServiceCIDRSpec(Struct, frozen=True):
    cidrs: list[str] = []


class ServiceCIDR(Struct, frozen=True):
    """A range that cluster addresses are allocated from."""

    metadata: ObjectMeta
    spec: ServiceCIDRSpec = ServiceCIDRSpec()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey("", self.metadata.name)


Object = (
    Service | EndpointSlice | Pod | Node | ServiceCIDR | Namespace | NetworkPolicy | ClusterNetworkPolicy | NodePolicy
)

#: kind → (apiVersion, type, namespaced). The kinds waggle reads; others in a manifest are passed over with a note.
KINDS: dict[str, tuple[str, type[Object], bool]] = {
    "Service": ("v1", Service, True),
    "EndpointSlice": ("discovery.k8s.io/v1", EndpointSlice, True),
    "Pod": ("v1", Pod, True),
    "Node": ("v1", Node, False),
    "ServiceCIDR": ("networking.k8s.io/v1", ServiceCIDR, False),
    "Namespace": ("v1", Namespace, False),
    "NetworkPolicy": ("networking.k8s.io/v1", NetworkPolicy, True),
    "ClusterNetworkPolicy": ("policy.networking.k8s.io/v1beta1", ClusterNetworkPolicy, False),
    "NodePolicy": ("waggle.io/v1alpha1", NodePolicy, False),
}

#: kind → earlier versions of the API that say the same in the same words.
EARLIER_VERSIONS: dict[str, tuple[str, ...]] = {"ClusterNetworkPolicy": ("policy.networking.k8s.io/v1alpha2",)}


def is_read(version: str, kind: str) -> bool:
    """Whether waggle reads objects of this apiVersion and kind."""
    return kind in KINDS and version in (KINDS[kind][0], *EARLIER_VERSIONS.get(kind, ()))


def kind_of(obj: Object) -> str:
    """The Kubernetes kind of a typed object."""
    return type(obj).__name__
