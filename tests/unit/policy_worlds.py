"""Worlds for tests of policies: three namespaces of three pods, as in Kubernetes' own tests, and policies as YAML."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
import yaml

from waggle.model.meta import ObjectKey
from waggle.model.objects import Node, Pod
from waggle.model.policy import PolicyWorld
from waggle.model.policy_objects import ClusterNetworkPolicy, Namespace, NetworkPolicy

NAMESPACES = "xyz"
PODS = "abc"
NODE, OTHER_NODE, OUTSIDE = "192.0.2.1", "192.0.2.2", "203.0.113.9"


def address(name: str, family: int = 4) -> str:
    """The address of a pod "x/a", of the nodes "node1" and "node2"; anything else is an address itself."""
    if name in ("node1", "node2"):
        return f"192.0.2.{name[-1]}" if family == 4 else f"2001:db8::{name[-1]}"
    namespace, slash, pod = name.partition("/")
    if not slash or namespace not in NAMESPACES:
        return name
    octets = NAMESPACES.index(namespace) + 1, PODS.index(pod) + 1
    return f"10.0.{octets[0]}.{octets[1]}" if family == 4 else f"fd00::{octets[0]}:{octets[1]}"


def pod(name: str, *, labels: dict[str, str] | None = None, **changes: Any) -> Pod:
    """A pod that listens on ports 80 and 81 of each protocol, named serve-80-tcp and so on."""
    namespace, _, short = name.partition("/")
    ports = [
        {"containerPort": number, "protocol": protocol, "name": f"serve-{number}-{protocol.lower()}"}
        for number in (80, 81)
        for protocol in ("TCP", "UDP", "SCTP")
    ]
    made = msgspec.convert(
        {
            "metadata": {"name": short, "namespace": namespace, "labels": {"pod": short} if labels is None else labels},
            "spec": {"nodeName": "node1" if short != "c" else "node2", "containers": [{"ports": ports}]},
            "status": {"phase": "Running", "podIPs": [{"ip": address(name, 4)}, {"ip": address(name, 6)}]},
        },
        Pod,
    )
    return msgspec.structs.replace(made, **changes)


def namespace(name: str, **labels: str) -> Namespace:
    """A namespace with the label ns, and others."""
    return msgspec.convert({"metadata": {"name": name, "labels": {"ns": name, **labels}}}, Namespace)


def node(name: str, **labels: str) -> Node:
    """A node with an address of each family and one that is a name."""
    addresses = [{"type": "InternalIP", "address": address(name, family)} for family in (4, 6)]
    return msgspec.convert(
        {
            "metadata": {"name": name, "labels": labels},
            "status": {"addresses": [*addresses, {"type": "Hostname", "address": name}]},
        },
        Node,
    )


def policy(text: str, name: str = "policy", namespace: str = "x", *, audit: bool = False) -> NetworkPolicy:
    """A NetworkPolicy in namespace x whose spec is `text`."""
    annotations = {"waggle.io/audit": "true"} if audit else {}
    metadata = {"name": name, "namespace": namespace, "annotations": annotations}
    return msgspec.convert({"metadata": metadata, "spec": yaml.safe_load(text)}, NetworkPolicy)


def cluster_policy(
    text: str, name: str = "cluster", tier: str = "Admin", priority: int = 10, *, audit: bool = False
) -> ClusterNetworkPolicy:
    """A ClusterNetworkPolicy about namespace x where `text` names no other subject."""
    annotations = {"waggle.io/audit": "true"} if audit else {}
    spec = {"tier": tier, "priority": priority, "subject": {"namespaces": {"matchLabels": {"ns": "x"}}}}
    spec.update(yaml.safe_load(text))
    return msgspec.convert({"metadata": {"name": name, "annotations": annotations}, "spec": spec}, ClusterNetworkPolicy)


def world(policies: Iterable[NetworkPolicy | ClusterNetworkPolicy] = (), **changes: Any) -> PolicyWorld:
    """Nine pods in three namespaces on two nodes, and these policies; seen as all nodes together do."""
    given = list(policies)
    made = PolicyWorld(
        pods={ObjectKey(n, p): pod(f"{n}/{p}") for n in NAMESPACES for p in PODS},
        namespaces={ObjectKey("", n): namespace(n) for n in NAMESPACES},
        nodes={ObjectKey("", n): node(n, role=n) for n in ("node1", "node2")},
        policies={p.key: p for p in given if isinstance(p, NetworkPolicy)},
        cluster_policies={p.key: p for p in given if isinstance(p, ClusterNetworkPolicy)},
    )
    return replace(made, **changes)
