"""Running commands inside a lab: which place a name means, and what a command finds there.

A name is a node (`node1`), the machine outside the cluster (`client`), or a pod (`web-1`, `other-namespace/web-1`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches

from waggle.errors import LabError
from waggle.lab import namespaces, processes
from waggle.lab.containers import search_path
from waggle.lab.layout import CLIENT, LabLayout, Place, PodLayout
from waggle.lab.record import LabRecord, PodRecord, load_pods
from waggle.model.objects import ObjectKey


def place_named(lab: LabLayout, record: LabRecord, name: str) -> tuple[Place, dict[str, str]]:
    """The place, and the variables a command there gets in addition. Raises LabError for an unknown name."""
    if name == CLIENT:
        return lab.client, {}
    node = lab.node_named(name, record.nodes)
    if node is not None:
        # waggle's own commands then ask this node's agent.
        return node.place, {
            "NODE_NAME": node.name,
            "WAGGLE_API_SOCKET": str(node.socket),
            "WAGGLE_BPF_ROOT": str(node.bpf),
        }
    pod, pod_record = pod_named(lab, record, name)
    return pod.place, {
        "POD_NAME": pod.key.name,
        "POD_NAMESPACE": pod.key.namespace,
        "POD_IP": pod_record.addresses[0] if pod_record.addresses else "",
        "NODE_NAME": pod.node.name,
    }


def pod_named(lab: LabLayout, record: LabRecord, name: str) -> tuple[PodLayout, PodRecord]:
    """Raises LabError for a name that is no pod's, with the nearest name that there is."""
    known = load_pods(lab, record.nodes)
    namespace, _, pod_name = name.rpartition("/")
    found = known.get(ObjectKey(namespace or "default", pod_name))
    if found is None:
        names = [CLIENT, *(n.name for n in lab.nodes(record.nodes)), *(shown_name(key) for key in known)]
        near = get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there is: {', '.join(names)}"
        raise LabError(f"lab {lab.name!r} has no node or pod {name!r}{hint}")
    return found


def log_of(lab: LabLayout, record: LabRecord, name: str, container: str | None) -> str:
    """What a node's agent, or a pod's container (None: its first), has written so far. Raises LabError."""
    node = lab.node_named(name, record.nodes)
    if node is not None:
        path = node.log
    else:
        pod, pod_record = pod_named(lab, record, name)
        names = [str(item["name"]) for item in pod_record.document["spec"].get("containers", [])]
        if container is not None and container not in names:
            raise LabError(f"pod {name} has no container {container!r}, only {', '.join(names)}")
        path = pod.log(container or names[0])
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}") from error


def shown_name(key: ObjectKey) -> str:
    """What a user types for a pod."""
    return key.name if key.namespace == "default" else str(key)


def command_environment(place: Place, extra: dict[str, str]) -> dict[str, str]:
    """The caller's environment with what the place adds."""
    return {**os.environ, "PATH": search_path(), "HOSTNAME": place.name.rpartition("/")[2], **extra}


def become(lab: LabLayout, record: LabRecord, name: str, command: Sequence[str]) -> None:
    """Replaces this process by `command` in the place named `name`. Raises LabError where that is not possible."""
    place, extra = place_named(lab, record, name)
    if not (namespaces.is_namespace(place.netns) and namespaces.is_namespace(place.uts)):
        raise LabError(f"{name} has lost its namespaces: waggle lab up --name {lab.name} brings it back")
    processes.replace_self(place, place.exec_cgroup, command, command_environment(place, extra))
