"""What a lab looks like right now: read from the machine, changes nothing."""

from __future__ import annotations

from typing import Any

from waggle.lab import agents, namespaces, pods, processes, published
from waggle.lab.layout import LabLayout, NodeLayout, Place, PodLayout
from waggle.lab.record import LabRecord, PodRecord, load_pods

Document = dict[str, Any]


def lab_status(lab: LabLayout, record: LabRecord) -> Document:
    """The lab as a JSON document: nodes with their agents, pods, Services."""
    known = load_pods(lab, record.nodes)
    return {
        "name": lab.name,
        "kubeconfig": record.kubeconfig,
        "manifests": str(lab.manifests),
        "nodes": [_node(node) for node in lab.nodes(record.nodes)],
        "client": {"present": _present(lab.client), "addresses": ["10.77.0.2", "fd00:77::2"]},
        "pods": [_pod(lab, pod, pod_record) for pod, pod_record in known.values()],
        "services": [_service(document) for document in published.all_of(lab, "Service")],
    }


def is_healthy(status: Document) -> bool:
    """Whether everything that was asked for is there and works."""
    nodes_well = all(node["agent"]["state"] == "ready" and node["present"] for node in status["nodes"])
    pods_well = all(pod["ready"] or pod["phase"] == "Succeeded" for pod in status["pods"])
    return nodes_well and pods_well and bool(status["client"]["present"])


def _node(node: NodeLayout) -> Document:
    pids = processes.pids_below(node.agent_cgroup)
    if not pids:
        state = "dead"
    elif agents.is_ready(node):
        state = "ready"
    else:
        state = "not ready"
    return {
        "name": node.name,
        "present": _present(node.place),
        "addresses": list(node.addresses),
        "podCIDRs": list(node.pod_cidrs),
        "agent": {
            "state": state,
            "pid": min(pids) if pids else None,
            "apiSocket": str(node.socket),
            "config": str(node.config),
            "log": str(node.log),
        },
    }


def _pod(lab: LabLayout, pod: PodLayout, record: PodRecord) -> Document:
    found = pods.states(pod, record)
    shown = published.find(lab, "Pod", record.key) or {}
    conditions = shown.get("status", {}).get("conditions", [])
    said_ready = any(condition == {"type": "Ready", "status": "True"} for condition in conditions)
    running = all(state.running for state in found.values())
    reason = ", ".join(state.reason for state in found.values() if state.reason)
    if not record.addresses:
        reason = "not connected to the network; waggle lab up tries again"
    return {
        "namespace": record.key.namespace,
        "name": record.key.name,
        "node": pod.node.name,
        "phase": pods.phase(found.values()) if record.addresses else "Pending",
        "ready": said_ready and running and _present(pod.place),
        "reason": reason,
        "addresses": record.addresses,
        "hostNetwork": record.host_network,
        "containers": [
            {
                "name": name,
                "running": state.running,
                "exitStatus": state.status,
                "reason": state.reason,
                "log": str(pod.log(name)),
            }
            for name, state in found.items()
        ],
    }


def _service(document: Document) -> Document:
    spec = document.get("spec") or {}
    single = spec.get("clusterIP")
    return {
        "namespace": document["metadata"].get("namespace", "default"),
        "name": document["metadata"]["name"],
        "type": spec.get("type", "ClusterIP"),
        "clusterIPs": spec.get("clusterIPs") or ([single] if single else []),
        "ports": [
            {
                "name": port.get("name", ""),
                "port": port.get("port"),
                "protocol": port.get("protocol", "TCP"),
                "nodePort": port.get("nodePort"),
            }
            for port in spec.get("ports") or []
        ],
        "healthCheckNodePort": spec.get("healthCheckNodePort"),
    }


def _present(place: Place) -> bool:
    return namespaces.is_namespace(place.netns)
