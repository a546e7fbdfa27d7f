"""Containers that a runtime put on the network, as Pods: what Services without Kubernetes select.

A container joins Services by its labels, as a pod does in a cluster. The labels come with the CNI request, or from
the runtime, asked afterwards. A group of containers on one network interface (a pod of Podman) is one Pod with the
labels of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import msgspec

from waggle.model.objects import ObjectKey, ObjectMeta, Pod, PodCondition, PodIP, PodSpec, PodStatus, Service

DEFAULT_NAMESPACE = "default"
#: Labels by which a container says which namespace it belongs to; the first that is there counts.
NAMESPACE_LABELS = ("waggle.dev/namespace", "io.kubernetes.pod.namespace")


class Workload(msgspec.Struct, frozen=True):
    """What a runtime says of the container, or the group of containers, behind an interface. Kept on disk."""

    runtime: str
    name: str
    labels: dict[str, str] = {}
    ready: bool = False


class Attached(NamedTuple):
    """A container that is on the network. `namespace`, `name` and `labels` are those of the CNI request; `managed`:
    Kubernetes made it, and says itself what it is; `workload`: what the runtime said, None before it was asked."""

    container_id: str
    addresses: tuple[str, ...]
    namespace: str = ""
    name: str = ""
    labels: Mapping[str, str] = {}
    managed: bool = False
    workload: Workload | None = None


def pod_rows(node: str, attached: Iterable[Attached]) -> list[Pod]:
    """The Pods of a node's containers, in the order of `attached`: one for each container, with the addresses of its
    first interface. Of two that claim one name, the later one gets a part of its ID added."""
    rows: dict[ObjectKey, Pod] = {}
    seen: set[str] = set()
    for container in attached:
        if container.managed or container.container_id in seen:
            continue
        seen.add(container.container_id)
        pod = _row(node, container, suffix="")
        if pod.key in rows:
            pod = _row(node, container, suffix=f"-{container.container_id[:12]}")
        rows[pod.key] = pod
    return list(rows.values())


def _row(node: str, container: Attached, suffix: str) -> Pod:
    said = container.workload
    labels = {**container.labels, **(said.labels if said else {})}
    name = (said.name if said else "") or container.name or container.container_id[:12]
    ready = "True" if said is None or said.ready else "False"
    return Pod(
        metadata=ObjectMeta(name=name + suffix, namespace=_namespace(container, labels), labels=labels),
        spec=PodSpec(node_name=node),
        status=PodStatus(
            phase="Running",
            pod_ip=container.addresses[0] if container.addresses else "",
            pod_ips=[PodIP(ip=address) for address in container.addresses],
            conditions=[PodCondition(type="Ready", status=ready)],
        ),
    )


def _namespace(container: Attached, labels: Mapping[str, str]) -> str:
    said = next((labels[label] for label in NAMESPACE_LABELS if labels.get(label)), "")
    return container.namespace or said or DEFAULT_NAMESPACE


def unresolved_ports(services: Iterable[Service], rows: Iterable[Pod]) -> dict[ObjectKey, str]:
    """Services that select such containers by a targetPort with a name, and that name: containers have none."""
    by_namespace: dict[str, list[Mapping[str, str]]] = {}
    for pod in rows:
        by_namespace.setdefault(pod.metadata.namespace, []).append(pod.metadata.labels or {})
    found: dict[ObjectKey, str] = {}
    for service in services:
        selector = service.spec.selector
        there = by_namespace.get(service.metadata.namespace)
        if not selector or not there:
            continue
        named = next((p.target_port for p in service.spec.ports if isinstance(p.target_port, str)), "")
        if named and any(selector.items() <= labels.items() for labels in there):
            found[service.key] = named
    return found
