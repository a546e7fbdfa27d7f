"""One pod from nothing to ready and back: namespaces, the CNI plugin, containers, and its live object.

Invariants:
- The record is written before anything else and removed after everything else. Whatever a crash leaves is either
  completed by `repair` or removed by `remove`; both may be repeated.
- The live object says "ready" only while every container runs and every declared port has a listener.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import msgspec

from waggle.errors import CniError, LabError, WaggleError
from waggle.lab import cni, containers, namespaces, processes, published, sockets
from waggle.lab.containers import ContainerState
from waggle.lab.layout import LabLayout, PodLayout
from waggle.lab.lock import Say
from waggle.lab.record import PodRecord, save_pod
from waggle.model.host_port import host_ports
from waggle.model.objects import Pod

_INIT_TIMEOUT = 120.0
#: Seconds for the agents to send new connections elsewhere before a pod that is deleted is told to end.
_SETTLE = 0.1
#: CNI 1.1.0: "try again later", which the plugin answers when the agent is away.
_AGENT_AWAY = 11


def typed(record: PodRecord) -> Pod:
    """The record's manifest as a typed object."""
    return msgspec.convert(record.document, Pod)


def new_record(document: dict[str, Any], node: int) -> PodRecord:
    meta = document["metadata"]
    uid = meta.get("uid") or str(uuid4())
    spec = {**document["spec"], "nodeName": f"node{node}"}
    document = {**document, "metadata": {**meta, "uid": uid}, "spec": spec}
    return PodRecord(
        document=document,
        node=node,
        container_id=uuid4().hex,
        uid=uid,
        host_network=bool(spec.get("hostNetwork", False)),
    )


def states(pod: PodLayout, record: PodRecord) -> dict[str, ContainerState]:
    return {container.name: containers.state(pod, container.name) for container in typed(record).spec.containers}


def phase(found: Iterable[ContainerState]) -> str:
    """Kubernetes' phase of a pod whose containers are in these states and are not started again."""
    listed = list(found)
    if any(state.running for state in listed):
        return "Running"
    return "Succeeded" if all(state.status == 0 for state in listed) else "Failed"


def live_object(record: PodRecord, pod: PodLayout, *, phase: str, ready: bool) -> dict[str, Any]:
    """The Pod with its status, as an apiserver would show it."""
    status = {
        "phase": phase,
        "hostIP": pod.node.addresses[0],
        "podIP": record.addresses[0] if record.addresses else "",
        "podIPs": [{"ip": address} for address in record.addresses],
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
    }
    return {**record.document, "status": status}


def start(lab: LabLayout, pod: PodLayout, record: PodRecord) -> PodRecord:
    """Makes the pod and starts its containers; the record with its addresses. `await_ready` does the rest."""
    save_pod(pod, record)
    if record.host_network:
        record = msgspec.structs.replace(record, addresses=list(pod.node.addresses))
    else:
        namespaces.create_place(pod.place)
        ports = host_ports(typed(record))
        result = cni.add(pod.node, record.container_id, pod.place.netns, record.key, record.uid, ports)
        record = msgspec.structs.replace(record, addresses=cni.addresses_of(result), cni_result=result)
    save_pod(pod, record)
    _prepare_after(pod, record)
    for container in _named(typed(record).spec.init_containers, "init"):
        _start_container(lab, pod, record, container)
        _await_init(pod, container.name)
    for container in typed(record).spec.containers:
        _start_container(lab, pod, record, container)
    return record


def await_ready(lab: LabLayout, pod: PodLayout, record: PodRecord, deadline: float) -> str:
    """Waits until every declared port has a listener, then shows the pod as ready. What keeps it from being ready
    at `deadline` (time.monotonic) or for good, in words; empty when it is ready.
    """
    wanted = {(port.protocol, port.container_port) for container in typed(record).spec.containers
              for port in container.ports if port.protocol in ("TCP", "UDP")}  # fmt: skip
    while True:
        ended = _problem(states(pod, record))
        missing = wanted - sockets.listening(pod.place.netns) if not ended else set()
        if ended or not missing:
            break
        if time.monotonic() > deadline:
            listed = ", ".join(f"{port}/{protocol}" for protocol, port in sorted(missing))
            ended = f"nothing listens on {listed}"
            break
        time.sleep(0.02)
    show(lab, pod, record, ready=not ended)
    return ended


def show(lab: LabLayout, pod: PodLayout, record: PodRecord, *, ready: bool) -> None:
    """Publishes the pod's live object as its containers are now."""
    found = states(pod, record)
    published.publish(lab, live_object(record, pod, phase=phase(found.values()), ready=ready and not _problem(found)))
    if ready and _problem(states(pod, record)):  # it ended just now, and its shell may have been the faster one
        found = states(pod, record)
        published.publish(lab, live_object(record, pod, phase=phase(found.values()), ready=False))


def repair(lab: LabLayout, pod: PodLayout, record: PodRecord, say: Say) -> PodRecord | None:
    """Brings back what died of the pod; the new record, None when everything was well. Restart policies hold."""
    if not _is_connected(pod, record):
        say(f"pod {record.key}: making it again on {pod.node.name}")
        _disconnect(pod, record, say)
        fresh = msgspec.structs.replace(record, container_id=uuid4().hex, addresses=[], cni_result=None)
        return start(lab, pod, fresh)
    found = states(pod, record)
    policy = record.document["spec"].get("restartPolicy") or "Always"
    again = [name for name, state in found.items() if _restarts(policy, state)]
    if not again:
        if published.find(lab, "Pod", record.key) is None:
            show(lab, pod, record, ready=True)
        return None
    _prepare_after(pod, record)
    for container in typed(record).spec.containers:
        if container.name in again:
            say(f"pod {record.key}: starting container {container.name} again ({found[container.name].reason})")
            containers.stop(pod, [container.name], grace=0)
            _start_container(lab, pod, record, container)
    return record


def update_metadata(lab: LabLayout, pod: PodLayout, record: PodRecord) -> None:
    """Takes over changed labels or annotations of a pod that goes on as it is."""
    shown = published.find(lab, "Pod", record.key) or {}
    conditions = shown.get("status", {}).get("conditions", [])
    save_pod(pod, record)
    _prepare_after(pod, record)
    show(lab, pod, record, ready={"type": "Ready", "status": "True"} in conditions)


def remove(lab: LabLayout, pod: PodLayout, record: PodRecord, say: Say, *, grace: float) -> None:
    """Ends and removes the pod, in Kubernetes' order: terminating, signalled, disconnected, gone."""
    for name in ("succeeded", "failed"):
        (pod.run / f"after-{name}.yaml").unlink(missing_ok=True)
    if published.find(lab, "Pod", record.key) is not None:
        # As ready as before, as in Kubernetes: a terminating endpoint that serves is what traffic falls back to.
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        _show_terminating(lab, pod, record, now, ready=not _problem(states(pod, record)))
        time.sleep(_SETTLE)
        processes.terminate([pod.place.cgroup], grace=grace)
        _show_terminating(lab, pod, record, now, ready=False)
    processes.terminate([pod.place.cgroup], grace=grace)
    published.retract(lab, "Pod", record.key)
    _disconnect(pod, record, say)
    processes.remove_cgroup(pod.place.cgroup)
    # The record goes last: until then the pod is known, and a second attempt finds it.
    for path in sorted(pod.run.iterdir(), key=lambda path: path == pod.record):
        path.unlink()
    shutil.rmtree(pod.run)


def _show_terminating(lab: LabLayout, pod: PodLayout, record: PodRecord, since: str, *, ready: bool) -> None:
    document = live_object(record, pod, phase="Running", ready=ready)
    document["metadata"] = {**document["metadata"], "deletionTimestamp": since}
    published.publish(lab, document)


def _is_connected(pod: PodLayout, record: PodRecord) -> bool:
    if record.host_network:
        return bool(record.addresses)
    if record.cni_result is None or not namespaces.is_namespace(pod.place.netns):
        return False
    try:
        cni.check(pod.node, record.container_id, pod.place.netns, record.key, record.uid, record.cni_result)
    except CniError as error:
        if error.code == _AGENT_AWAY:
            raise
        return False
    namespaces.create_place(pod.place)  # its UTS namespace may be missing alone
    return True


def _disconnect(pod: PodLayout, record: PodRecord, say: Say) -> None:
    """Ends the pod's processes, frees its addresses and removes its namespaces."""
    processes.kill([pod.place.cgroup])
    if record.host_network:
        return
    try:
        cni.delete(pod.node, record.container_id, pod.place.netns, record.key, record.uid, record.cni_result)
    except WaggleError as error:
        # The addresses stay reserved until the next `up` lets the agent collect its garbage.
        say(f"pod {record.key}: {error}; going on")
    namespaces.remove_namespaces([pod.place.netns, pod.place.uts])


def _prepare_after(pod: PodLayout, record: PodRecord) -> None:
    """The live objects that a container's shell shows when the container ends."""
    single = len(typed(record).spec.containers) == 1
    for name in ("succeeded", "failed"):
        document = live_object(record, pod, phase=name.title() if single else "Running", ready=False)
        (pod.run / f"after-{name}.yaml").write_bytes(published.encode(document))


def _start_container(lab: LabLayout, pod: PodLayout, record: PodRecord, container: Any) -> None:
    after = (
        pod.run / "after-succeeded.yaml",
        pod.run / "after-failed.yaml",
        published.path_of(lab, "Pod", record.key),
    )
    containers.start(pod, container, record.addresses, after)


def _named(items: list[Any], prefix: str) -> list[Any]:
    return [msgspec.structs.replace(item, name=f"{prefix}-{item.name}") for item in items]


def _await_init(pod: PodLayout, name: str) -> None:
    deadline = time.monotonic() + _INIT_TIMEOUT
    while (state := containers.state(pod, name)).running:
        if time.monotonic() > deadline:
            raise LabError(f"pod {pod.key}: init container {name} has not ended after {_INIT_TIMEOUT:g} s")
        time.sleep(0.02)
    if state.status != 0:
        raise LabError(f"pod {pod.key}: init container {name} {state.reason}: see {pod.log(name)}")


def _problem(found: dict[str, ContainerState]) -> str:
    return ", ".join(f"container {name} {state.reason}" for name, state in found.items() if not state.running)


def _restarts(policy: str, state: ContainerState) -> bool:
    if state.running or policy == "Never":
        return False
    return policy != "OnFailure" or state.status != 0
