"""The CRDs of ClusterNetworkPolicy and NodePolicy: what an apiserver checks before it stores one.

They are made of the structs that waggle reads.

Field names and optional fields come from `waggle.model.policy_objects`; what a field means and may hold is said here.
Rules of the first follow network-policy-api 0.3 (apis/v1beta1, with the experimental fields); the words are our own.
A field that a struct has and this does not, or the other way round, is an error when the schema is made.
"""

from __future__ import annotations

import types
import typing
from typing import Any, Final

import msgspec

from waggle.model.policy_objects import (
    ClusterEgressRule,
    ClusterIngressRule,
    ClusterNetworkPolicySpec,
    ClusterPeer,
    ClusterProtocol,
    ClusterSubject,
    DestinationPort,
    IPBlock,
    LabelSelector,
    LabelSelectorRequirement,
    NamespacedPods,
    NodePolicyEgressRule,
    NodePolicyIngressRule,
    NodePolicyPeer,
    NodePolicyPort,
    NodePolicySpec,
    PortMatch,
    PortRange,
)

GROUP: Final = "policy.networking.k8s.io"
VERSION: Final = "v1beta1"
#: The same in the same words (network-policy-api 0.3 serves both).
EARLIER_VERSION: Final = "v1alpha2"
PLURAL: Final = "clusternetworkpolicies"
NODE_GROUP: Final = "waggle.io"
NODE_VERSION: Final = "v1alpha1"
NODE_PLURAL: Final = "nodepolicies"

TIERS: Final = ("Admin", "Baseline")
ACTIONS: Final = ("Accept", "Deny", "Pass")
OPERATORS: Final = ("In", "NotIn", "Exists", "DoesNotExist")
MAX_PRIORITY: Final = 1000
MAX_ITEMS: Final = 25  # rules of a direction; peers, protocols of a rule; networks, domain names of a peer
MAX_NAME: Final = 100
MAX_CONFIRM_SECONDS: Final = 3600
#: Two labels or more; a star may stand for the first ones.
DOMAIN_NAME: Final = r"^(\*\.)?([a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?\.)+[a-zA-Z0-9]([-a-zA-Z0-9_]*[a-zA-Z0-9])?\.?$"
#: Of a peer: those that only egress rules have.
EGRESS_ONLY: Final = ("nodes", "networks", "domainNames")

_Schema = dict[str, Any]
_EXACTLY_ONE: Final[_Schema] = {"minProperties": 1, "maxProperties": 1}
_SEVERAL: Final[_Schema] = {"minItems": 1, "maxItems": MAX_ITEMS}
_PORT: Final[_Schema] = {"minimum": 1, "maximum": 65535}


def _rule(rule: str, message: str) -> _Schema:
    return {"x-kubernetes-validations": [{"rule": rule, "message": message}]}


#: What holds for all values of a struct.
_STRUCTS: Final[dict[type, _Schema]] = {
    ClusterSubject: _EXACTLY_ONE,
    ClusterPeer: _EXACTLY_ONE,
    ClusterProtocol: _EXACTLY_ONE,
    PortMatch: {"minProperties": 1},
    DestinationPort: _EXACTLY_ONE,
    PortRange: _rule("self.start < self.end", "start must be lower than end"),
    LabelSelector: {"x-kubernetes-map-type": "atomic"},
    NodePolicyPeer: _rule(
        "(has(self.ipBlock) ? 1 : 0) + (has(self.nodeSelector) ? 1 : 0) + "
        "(has(self.podSelector) || has(self.namespaceSelector) ? 1 : 0) == 1",
        "one of ipBlock, nodeSelector, and podSelector or namespaceSelector or both",
    ),
    NodePolicyPort: _rule(
        "!has(self.endPort) || (has(self.port) && self.endPort >= self.port)", "endPort needs a port that is not higher"
    ),
    ClusterEgressRule: {
        "x-kubernetes-validations": [
            {
                "rule": "self.action == 'Accept' || !self.to.exists(peer, has(peer.domainNames))",
                "message": "domainNames are for rules with action Accept alone",
            },
            {
                "rule": "!(has(self.protocols) && self.protocols.exists(p, has(p.destinationNamedPort)) && "
                "self.to.exists(peer, has(peer.nodes) || has(peer.networks) || has(peer.domainNames)))",
                "message": "nodes, networks and domainNames have no ports with names",
            },
        ]
    },
}

#: (struct, field) → what it means, and what holds for it beyond its type.
_FIELDS: Final[dict[tuple[type, str], tuple[str, _Schema]]] = {
    (ClusterNetworkPolicySpec, "tier"): (
        "Admin: looked at before every NetworkPolicy. Baseline: looked at for pods that no NetworkPolicy isolates.",
        {"enum": list(TIERS)},
    ),
    (ClusterNetworkPolicySpec, "priority"): (
        "Order within the tier: lower numbers first. Policies with equal numbers are looked at in the order of names.",
        {"minimum": 0, "maximum": MAX_PRIORITY},
    ),
    (ClusterNetworkPolicySpec, "subject"): ("The pods it is about. Pods on their node's network never are.", {}),
    (ClusterNetworkPolicySpec, "ingress"): (
        "What may reach these pods: the first rule that matches decides. Without rules, nothing is decided here.",
        {"maxItems": MAX_ITEMS},
    ),
    (ClusterNetworkPolicySpec, "egress"): (
        "What these pods may reach: the first rule that matches decides. Without rules, nothing is decided here.",
        {"maxItems": MAX_ITEMS},
    ),
    (ClusterSubject, "namespaces"): ("All pods of the namespaces with these labels.", {}),
    (ClusterSubject, "pods"): ("Pods with these labels in namespaces with these labels.", {}),
    (ClusterIngressRule, "action"): (
        "Accept or Deny end the search. Pass skips the other policies of the tier.",
        {"enum": list(ACTIONS)},
    ),
    (ClusterIngressRule, "from"): ("Where packets come from: any of these.", _SEVERAL),
    (ClusterIngressRule, "protocols"): ("Any of these; left out, every packet.", _SEVERAL),
    (ClusterIngressRule, "name"): ("For people, in events and explanations.", {"maxLength": MAX_NAME}),
    (ClusterEgressRule, "action"): (
        "Accept or Deny end the search. Pass skips the other policies of the tier.",
        {"enum": list(ACTIONS)},
    ),
    (ClusterEgressRule, "to"): ("Where packets go, once Services are translated: any of these.", _SEVERAL),
    (ClusterEgressRule, "protocols"): ("Any of these; left out, every packet.", _SEVERAL),
    (ClusterEgressRule, "name"): ("For people, in events and explanations.", {"maxLength": MAX_NAME}),
    (ClusterPeer, "namespaces"): ("All pods of the namespaces with these labels.", {}),
    (ClusterPeer, "pods"): ("Pods with these labels in namespaces with these labels.", {}),
    (ClusterPeer, "nodes"): ("The addresses of the nodes with these labels.", {}),
    (ClusterPeer, "networks"): (
        "Address ranges such as 192.0.2.0/24. The addresses of pods and nodes count as well.",
        {
            **_SEVERAL,
            "x-kubernetes-list-type": "set",
            "items": {
                "type": "string",
                "maxLength": 43,
                **_rule("isCIDR(self)", "must be an address range such as 192.0.2.0/24"),
            },
        },
    ),
    (ClusterPeer, "domainNames"): (
        "The addresses that DNS gives for these names, for rules with action Accept. *.example.com is every name below "
        "example.com, and not example.com itself.",
        {
            **_SEVERAL,
            "x-kubernetes-list-type": "set",
            "items": {"type": "string", "pattern": DOMAIN_NAME},
        },
    ),
    (NamespacedPods, "namespaceSelector"): ("Of which namespaces; empty, of all.", {}),
    (NamespacedPods, "podSelector"): ("Which pods there; empty, all.", {}),
    (ClusterProtocol, "tcp"): ("TCP, to these ports.", {}),
    (ClusterProtocol, "udp"): ("UDP, to these ports.", {}),
    (ClusterProtocol, "sctp"): ("SCTP, to these ports.", {}),
    (ClusterProtocol, "destinationNamedPort"): ("The port of this name on the pod that packets are for.", {}),
    (PortMatch, "destinationPort"): ("Which ports.", {}),
    (DestinationPort, "number"): ("One port.", _PORT),
    (DestinationPort, "range"): ("All ports from start to end.", {}),
    (PortRange, "start"): ("The first port.", _PORT),
    (PortRange, "end"): ("The last port.", _PORT),
    (LabelSelector, "matchLabels"): ("Labels that must be there with these values.", {}),
    (LabelSelector, "matchExpressions"): ("Conditions that must all hold.", {"x-kubernetes-list-type": "atomic"}),
    (LabelSelectorRequirement, "key"): ("The label.", {}),
    (LabelSelectorRequirement, "operator"): ("In, NotIn, Exists or DoesNotExist.", {}),
    (LabelSelectorRequirement, "values"): (
        "For In and NotIn, at least one; for the others, none.",
        {"x-kubernetes-list-type": "atomic"},
    ),
}

_SEVERAL_OR_NONE: Final[_Schema] = {"maxItems": MAX_ITEMS}
_CIDR: Final[_Schema] = {"maxLength": 43, **_rule("isCIDR(self)", "must be an address range such as 192.0.2.0/24")}
_FIELDS.update(
    {
        (NodePolicySpec, "nodeSelector"): ("The nodes it is about; empty, all.", {}),
        (NodePolicySpec, "policyTypes"): (
            "The directions in which only what rules allow passes. Left out: Ingress, and Egress where there are rules "
            "for it.",
            {"maxItems": 2, "items": {"type": "string", "enum": ["Ingress", "Egress"]}},
        ),
        (NodePolicySpec, "ingress"): ("What may reach the node: all that one of these rules allows.", _SEVERAL_OR_NONE),
        (NodePolicySpec, "egress"): (
            "What the node's own processes may reach: all that one of these rules allows.",
            _SEVERAL_OR_NONE,
        ),
        (NodePolicySpec, "confirmSeconds"): (
            "For so long a change is on trial on each node, and then taken back unless `waggle node-policy confirm` "
            "has come. 0: it is not tried, but in force at once.",
            {"minimum": 0, "maximum": MAX_CONFIRM_SECONDS, "default": 60},
        ),
        (NodePolicyIngressRule, "from"): (
            "Where packets come from: any of these; empty, everywhere.",
            _SEVERAL_OR_NONE,
        ),
        (NodePolicyIngressRule, "ports"): ("Any of these; empty, every packet.", _SEVERAL_OR_NONE),
        (NodePolicyEgressRule, "to"): ("Where packets go: any of these; empty, everywhere.", _SEVERAL_OR_NONE),
        (NodePolicyEgressRule, "ports"): ("Any of these; empty, every packet.", _SEVERAL_OR_NONE),
        (NodePolicyPeer, "nodeSelector"): ("The addresses of the nodes with these labels.", {}),
        (NodePolicyPeer, "podSelector"): ("Pods with these labels, of all namespaces unless the next says which.", {}),
        (NodePolicyPeer, "namespaceSelector"): ("Pods of namespaces with these labels.", {}),
        (NodePolicyPeer, "ipBlock"): ("An address range, without parts of it.", {}),
        (IPBlock, "cidr"): ("Such as 192.0.2.0/24.", _CIDR),
        (IPBlock, "except"): (
            "Parts of it that are not meant.",
            {**_SEVERAL_OR_NONE, "items": {"type": "string", **_CIDR}},
        ),
        (NodePolicyPort, "protocol"): ("TCP, UDP or SCTP.", {"enum": ["TCP", "UDP", "SCTP"], "default": "TCP"}),
        (NodePolicyPort, "port"): ("The port, or the first one; left out, all.", _PORT),
        (NodePolicyPort, "endPort"): ("The last port.", _PORT),
    }
)

#: Fields that the structs give a default, and an apiserver does not: where one is forgotten, too much would be meant.
_REQUIRED: Final = {(ClusterIngressRule, "from"), (ClusterEgressRule, "to")}


def custom_resource_definition() -> dict[str, Any]:
    """The CustomResourceDefinition, as an apiserver takes it."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            "annotations": {
                # apiservers take CRDs of Kubernetes' own groups only with the place where the API was agreed on
                "api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/network-policy-api/pull/347",
            },
        },
        "spec": {
            "group": GROUP,
            "scope": "Cluster",
            "names": {
                "kind": "ClusterNetworkPolicy",
                "listKind": "ClusterNetworkPolicyList",
                "plural": PLURAL,
                "singular": "clusternetworkpolicy",
            },
            "versions": [_cluster_version(VERSION, storage=True), _cluster_version(EARLIER_VERSION, storage=False)],
        },
    }


def _cluster_version(name: str, *, storage: bool) -> dict[str, Any]:
    return {
        "name": name,
        "served": True,
        "storage": storage,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": "Tier", "type": "string", "jsonPath": ".spec.tier"},
            {"name": "Priority", "type": "integer", "jsonPath": ".spec.priority"},
            {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        ],
        "schema": {"openAPIV3Schema": _whole(ClusterNetworkPolicySpec, _CLUSTER_TEXT)},
    }


def node_policy_definition() -> dict[str, Any]:
    """The CustomResourceDefinition of NodePolicy."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{NODE_PLURAL}.{NODE_GROUP}"},
        "spec": {
            "group": NODE_GROUP,
            "scope": "Cluster",
            "names": {
                "kind": "NodePolicy",
                "listKind": "NodePolicyList",
                "plural": NODE_PLURAL,
                "singular": "nodepolicy",
            },
            "versions": [
                {
                    "name": NODE_VERSION,
                    "served": True,
                    "storage": True,
                    "additionalPrinterColumns": [
                        {"name": "Confirm", "type": "integer", "jsonPath": ".spec.confirmSeconds"},
                        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
                    ],
                    "schema": {"openAPIV3Schema": _whole(NodePolicySpec, _NODE_TEXT)},
                }
            ],
        },
    }


_CLUSTER_TEXT: Final = "What pods of the whole cluster may reach and be reached from, before or after NetworkPolicies."
_NODE_TEXT: Final = "What nodes themselves may reach and be reached from. A change is tried, and has to be confirmed."


def _whole(struct: type, text: str) -> _Schema:
    used: set[tuple[type, str]] = set()
    spec = _struct(struct, used)
    structs = {one for one, _ in used}
    if stale := {field for field in _FIELDS if field[0] in structs} - used:
        raise AssertionError(f"described, but not in the structs: {stale}")
    return {
        "type": "object",
        "description": text,
        "required": ["metadata", "spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            # written by whoever likes to say something about it; waggle does not
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }


def _struct(struct: type, used: set[tuple[type, str]], without: tuple[str, ...] = ()) -> _Schema:
    properties: dict[str, _Schema] = {}
    required: list[str] = []
    hints = typing.get_type_hints(struct)
    for field in msgspec.structs.fields(struct):
        name = field.encode_name
        if name in without:
            continue
        meaning, limits = _FIELDS[struct, name]
        used.add((struct, name))
        of_ingress = struct is ClusterIngressRule
        schema = _type(hints[field.name], used, EGRESS_ONLY if of_ingress else ())
        properties[name] = {"description": meaning, **schema, **limits}
        if field.required or (struct, name) in _REQUIRED:
            required.append(name)
    found: _Schema = {"type": "object", "properties": properties, **_STRUCTS.get(struct, {})}
    return found | ({"required": required} if required else {})


def _type(hint: Any, used: set[tuple[type, str]], without: tuple[str, ...]) -> _Schema:
    """`without`: fields that a struct directly below lacks here."""
    if isinstance(hint, types.UnionType):
        [hint] = [part for part in hint.__args__ if part is not types.NoneType]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return {"type": "array", "items": _type(arguments[0], used, without if arguments[0] is ClusterPeer else ())}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1], used, ())}
    if hint is str:
        return {"type": "string"}
    if hint is int:
        return {"type": "integer", "format": "int32"}
    return _struct(hint, used, without)
