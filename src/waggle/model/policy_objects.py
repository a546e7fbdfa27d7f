"""The objects that say who may talk to whom, with only the fields waggle reads.

NetworkPolicy is networking.k8s.io/v1; ClusterNetworkPolicy is policy.networking.k8s.io/v1alpha2, the successor of
AdminNetworkPolicy and BaselineAdminNetworkPolicy; NodePolicy is waggle's own. Absent and empty lists mean different
things in NetworkPolicy, so they stay apart: no rules in a listed direction deny everything, a rule without peers allows
every peer.
"""

from __future__ import annotations

import msgspec

from waggle.model.meta import ObjectKey, ObjectMeta, Struct

#: "true" on a policy: what it would drop is reported, and nothing is cut.
AUDIT_ANNOTATION = "waggle.io/audit"
#: On every Namespace, by the apiserver; here for namespaces that no object stands for.
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"


class LabelSelectorRequirement(Struct, frozen=True):
    key: str
    operator: str  # In, NotIn, Exists, DoesNotExist
    values: list[str] = []


class LabelSelector(Struct, frozen=True):
    """All of it must hold; empty, it selects everything."""

    match_labels: dict[str, str] = {}
    match_expressions: list[LabelSelectorRequirement] = []


class Namespace(Struct, frozen=True):
    metadata: ObjectMeta

    @property
    def key(self) -> ObjectKey:
        return ObjectKey("", self.metadata.name)


class IPBlock(Struct, frozen=True):
    cidr: str
    except_: list[str] = msgspec.field(default_factory=list, name="except")


class NetworkPolicyPeer(Struct, frozen=True):
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(Struct, frozen=True):
    protocol: str = "TCP"
    port: int | str | None = None  # a name is looked up in the pod that the packet is for
    end_port: int | None = None


class NetworkPolicyIngressRule(Struct, frozen=True):
    from_: list[NetworkPolicyPeer] | None = msgspec.field(default=None, name="from")
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicyEgressRule(Struct, frozen=True):
    to: list[NetworkPolicyPeer] | None = None
    ports: list[NetworkPolicyPort] | None = None


class NetworkPolicySpec(Struct, frozen=True):
    pod_selector: LabelSelector = LabelSelector()
    policy_types: list[str] | None = None  # Ingress, Egress
    ingress: list[NetworkPolicyIngressRule] | None = None
    egress: list[NetworkPolicyEgressRule] | None = None


class NetworkPolicy(Struct, frozen=True):
    metadata: ObjectMeta
    spec: NetworkPolicySpec = NetworkPolicySpec()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(self.metadata.namespace, self.metadata.name)


class NamespacedPods(Struct, frozen=True):
    pod_selector: LabelSelector
    namespace_selector: LabelSelector = LabelSelector()


class ClusterSubject(Struct, frozen=True):
    """Exactly one is given."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPods | None = None


class ClusterPeer(Struct, frozen=True):
    """Exactly one is given; `nodes`, `networks` and `domain_names` in egress rules alone."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPods | None = None
    nodes: LabelSelector | None = None
    networks: list[str] | None = None
    domain_names: list[str] | None = None


class PortRange(Struct, frozen=True):
    start: int
    end: int


class DestinationPort(Struct, frozen=True):
    number: int | None = None
    range: PortRange | None = None


class PortMatch(Struct, frozen=True):
    """Of one protocol; without a port, all of its ports."""

    destination_port: DestinationPort | None = None


class ClusterProtocol(Struct, frozen=True):
    """Exactly one is given."""

    tcp: PortMatch | None = None
    udp: PortMatch | None = None
    sctp: PortMatch | None = None
    destination_named_port: str = ""


class ClusterIngressRule(Struct, frozen=True):
    action: str  # Accept, Deny, Pass
    from_: list[ClusterPeer] = msgspec.field(default_factory=list, name="from")
    protocols: list[ClusterProtocol] | None = None  # None: every packet
    name: str = ""


class ClusterEgressRule(Struct, frozen=True):
    action: str  # Accept, Deny, Pass
    to: list[ClusterPeer] = []
    protocols: list[ClusterProtocol] | None = None  # None: every packet
    name: str = ""


class ClusterNetworkPolicySpec(Struct, frozen=True):
    tier: str  # Admin, Baseline
    priority: int  # 0 to 1000; the lower one is looked at first
    subject: ClusterSubject
    ingress: list[ClusterIngressRule] = []
    egress: list[ClusterEgressRule] = []


class ClusterNetworkPolicy(Struct, frozen=True):
    metadata: ObjectMeta
    spec: ClusterNetworkPolicySpec

    @property
    def key(self) -> ObjectKey:
        return ObjectKey("", self.metadata.name)


class NodePolicyPeer(Struct, frozen=True):
    """A block; or nodes; or pods, of all namespaces where no namespaceSelector says of which."""

    node_selector: LabelSelector | None = None
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NodePolicyPort(Struct, frozen=True):
    protocol: str = "TCP"
    port: int | None = None  # None: all of the protocol
    end_port: int | None = None


class NodePolicyIngressRule(Struct, frozen=True):
    from_: list[NodePolicyPeer] | None = msgspec.field(default=None, name="from")
    ports: list[NodePolicyPort] | None = None


class NodePolicyEgressRule(Struct, frozen=True):
    to: list[NodePolicyPeer] | None = None
    ports: list[NodePolicyPort] | None = None


class NodePolicySpec(Struct, frozen=True):
    node_selector: LabelSelector = LabelSelector()
    policy_types: list[str] | None = None  # Ingress, Egress
    ingress: list[NodePolicyIngressRule] | None = None
    egress: list[NodePolicyEgressRule] | None = None
    confirm_seconds: int = 60  # 0: a change is in force without anybody confirming it


class NodePolicy(Struct, frozen=True):
    """What the node itself may be reached from, and reach."""

    metadata: ObjectMeta
    spec: NodePolicySpec = NodePolicySpec()

    @property
    def key(self) -> ObjectKey:
        return ObjectKey("", self.metadata.name)
