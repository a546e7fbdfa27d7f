"""`up` and `down`: from whatever there is to a running lab, and from whatever there is to nothing.

Invariants:
- Both look at the machine, not at a record of what they did; both may be interrupted anywhere and repeated.
- `down` finds processes by the lab's cgroups, everything else by the lab's name.
- Nothing outside the lab's own names is changed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from waggle.errors import LabError, WaggleError
from waggle.kernel.cgroup import cgroup2_mount
from waggle.lab import agents, cni, namespaces, pods, processes, published, requirements, underlay
from waggle.lab.layout import (
    DEFAULT_NODES,
    MAX_NODES,
    MAX_SEGMENTS,
    RUN_ROOT,
    SERVICE_CIDR_V4,
    SERVICE_CIDR_V6,
    STATE_ROOT,
    LabLayout,
    NodeLayout,
)
from waggle.lab.lock import Say, lab_lock
from waggle.lab.record import LabRecord, load_lab, load_pods, save_lab


def find_lab(name: str) -> tuple[LabLayout, LabRecord]:
    """The lab that is up under that name. Raises LabError where there is none."""
    requirements.require_root()
    lab = LabLayout(name, cgroup2_mount())
    record = load_lab(lab)
    if record is None:
        others = lab_names()
        known = f"; there is: {', '.join(others)}" if others else ""
        raise LabError(f"there is no lab {name!r}{known}. Start one: waggle lab up --name {name}")
    return replace(lab, segment_count=record.segments), record


def lab_names() -> list[str]:
    """Every lab that is up, or was left half-way."""
    return sorted(path.name for path in RUN_ROOT.iterdir() if path.is_dir()) if RUN_ROOT.is_dir() else []


def up(
    name: str,
    say: Say,
    *,
    nodes: int | None = None,
    kubeconfig: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    segments: int | None = None,
) -> list[str]:
    """Starts the lab, or brings back what is missing from it. None keeps what the lab has.

    Returns what is wrong with single pods; raises WaggleError for what keeps the lab itself from being up.
    """
    requirements.check_machine()
    lab = LabLayout(name, cgroup2_mount())
    with lab_lock(lab, say):
        if load_lab(lab) is None and _remains(lab):
            say(f"an earlier `down` of lab {name!r} was interrupted: finishing it first")
            _remove_all(lab, say)
        record = _wanted(lab, nodes, kubeconfig, settings or {}, segments)
        lab = replace(lab, segment_count=record.segments)
        save_lab(lab, record)
        lab.manifests.mkdir(parents=True, exist_ok=True)
        if record.kubeconfig is not None:
            namespaces.pin_own_netns(lab.api_netns)
        started = time.monotonic()
        if underlay.create_switch(lab):
            say("network: switch and gateway made")
        if underlay.create_client(lab):
            processes.kill([lab.client.cgroup])
            say("client: a machine outside the cluster made")
        for node in lab.nodes(record.nodes):
            _publish_node(lab, node, record)
        _publish_service_ranges(lab, record)
        every = lab.nodes(record.nodes)
        _in_parallel(lambda node: _bring_up(lab, node, record, say), every)
        _in_parallel(lambda node: _await_agent(node, record, say), every)
        problems = _repair_pods(lab, record, say)
        say(f"lab {name!r} is up: {_count(record.nodes, 'node')} ({time.monotonic() - started:.1f} s)")
    return problems


def down(name: str, say: Say) -> bool:
    """Removes everything of the lab, also what a crash left. False when there was nothing."""
    requirements.require_root()
    lab = LabLayout(name, cgroup2_mount())
    with lab_lock(lab, say):
        found = _remains(lab)
        if found:
            _remove_all(lab, say)
        lab.lock.unlink(missing_ok=True)
    # Shared with other labs: gone with the last of them.
    for folder in (lab.cgroup.parent, lab.bpf.parent, STATE_ROOT, RUN_ROOT):
        try:
            folder.rmdir()
        except OSError:  # another lab lives there, or it never existed
            continue
    say(f"lab {name!r} is gone" if found else f"there was nothing of a lab {name!r}")
    return found


def _wanted(
    lab: LabLayout, nodes: int | None, kubeconfig: Path | None, settings: Mapping[str, Any], segments: int | None
) -> LabRecord:
    known = load_lab(lab)
    count = nodes if nodes is not None else known.nodes if known else DEFAULT_NODES
    if not 1 <= count <= MAX_NODES:
        raise LabError(f"a lab has 1 to {MAX_NODES} nodes, not {count}")
    if known and count < known.nodes:
        raise LabError(
            f"lab {lab.name!r} has {known.nodes} nodes; nodes can be added, not removed: "
            f"waggle lab down --name {lab.name} first"
        )
    parts = segments if segments is not None else known.segments if known else 1
    if not 1 <= parts <= MAX_SEGMENTS:
        raise LabError(f"a lab's underlay has 1 to {MAX_SEGMENTS} segments, not {parts}")
    if known and parts != known.segments:
        raise LabError(
            f"lab {lab.name!r} has an underlay of {_count(known.segments, 'segment')}, which cannot be changed: "
            f"waggle lab down --name {lab.name} first"
        )
    merged = {**(known.settings if known else {}), **settings}
    if kubeconfig is None:
        return LabRecord(count, known.kubeconfig if known else None, merged, parts)
    if not kubeconfig.is_file():
        raise LabError(f"{kubeconfig} does not exist")
    return LabRecord(count, str(kubeconfig.absolute()), merged, parts)


def _publish_node(lab: LabLayout, node: NodeLayout, record: LabRecord) -> None:
    if record.kubeconfig is not None:  # the cluster has its own Node objects
        return
    published.publish(
        lab,
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name, "labels": {"kubernetes.io/hostname": node.name}},
            "spec": {"podCIDR": node.pod_cidrs[0], "podCIDRs": list(node.pod_cidrs)},
            "status": {"addresses": [{"type": "InternalIP", "address": address} for address in node.addresses]},
        },
    )


def _publish_service_ranges(lab: LabLayout, record: LabRecord) -> None:
    """As an apiserver does for the ranges of its flags."""
    if record.kubeconfig is not None:
        return
    published.publish(
        lab,
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": [SERVICE_CIDR_V4, SERVICE_CIDR_V6]},
        },
    )


def _bring_up(lab: LabLayout, node: NodeLayout, record: LabRecord, say: Say) -> None:
    """The node's network, configuration and agent process; does not wait for the agent."""
    booted = underlay.create_node(lab, node)
    cni.write_conf(node)
    changed = agents.write_config(lab, node, record)
    if booted or agents.is_misplaced(node):
        # What a machine that boots does not have: processes, and anything in bpffs.
        if processes.is_populated(node.place.cgroup):
            say(f"{node.name}: its network namespace was gone, so everything on it starts again")
        processes.kill([node.place.cgroup])
        if node.bpf.is_dir():
            shutil.rmtree(node.bpf)
    running = agents.is_running(node)
    if running and changed:
        say(f"{node.name}: its configuration has changed, starting its agent again")
        agents.stop(node)
        running = False
    if not running:
        agents.start(node)


def _await_agent(node: NodeLayout, record: LabRecord, say: Say) -> None:
    # A Kubernetes API that does not answer is no reason to call a lab not up: agents wait for it, and so can users.
    path = "/readyz" if record.kubeconfig is None else "/healthz"
    started = time.monotonic()
    try:
        agents.wait_ready(node, path)
    except LabError as error:
        if not agents.is_running(node):
            raise
        say(f"{error}\n{node.name}: starting its agent again")
        agents.stop(node)
        agents.start(node)
        agents.wait_ready(node, path)
    say(f"{node.name}: agent ready ({time.monotonic() - started:.1f} s)")


def _repair_pods(lab: LabLayout, record: LabRecord, say: Say) -> list[str]:
    """Brings back what died of each pod; what could not be, in words. One pod's trouble is no other's."""
    problems = []
    deadline = time.monotonic() + 30.0
    for pod, pod_record in load_pods(lab, record.nodes).values():
        try:
            repaired = pods.repair(lab, pod, pod_record, say)
            if repaired is None:
                continue
            problem = pods.await_ready(lab, pod, repaired, deadline)
        except WaggleError as error:
            problem = str(error)
        say(f"pod {pod.key}: {problem or 'ready again'}")
        if problem:
            problems.append(f"pod {pod.key}: {problem}")
    for node in lab.nodes(record.nodes):
        held = load_pods(lab, record.nodes).values()
        containers = [pod_record.container_id for pod, pod_record in held if pod_record.node == node.index]
        try:
            cni.collect_garbage(node, containers)
        except WaggleError as error:
            say(f"{node.name}: {error}")
            problems.append(f"{node.name}: {error}")
    return problems


def _remains(lab: LabLayout) -> bool:
    folders = (lab.run, lab.state, lab.bpf, lab.cgroup)
    return any(folder.exists() for folder in folders) or bool(namespaces.netns_files(lab))


def _remove_all(lab: LabLayout, say: Say) -> None:
    # The record goes first: from here on this is no lab any more, whatever happens to us.
    lab.record.unlink(missing_ok=True)
    processes.terminate([path for path in lab.cgroup.glob("*/agent") if path.is_dir()], grace=2.0)
    processes.kill([lab.cgroup])
    say("processes ended")
    netns = namespaces.netns_files(lab)
    strangers = namespaces.processes_in(netns)
    if strangers:
        listed = ", ".join(f"{pid} ({command})" for pid, command in sorted(strangers.items()))
        say(f"not part of the lab, but inside its network; it stays until they end: {listed}")
    if lab.bpf.is_dir():
        # Unpinning detaches programs that nothing else holds.
        shutil.rmtree(lab.bpf)
    uts = lab.run / "uts"
    namespaces.remove_namespaces([*netns, *(sorted(uts.iterdir()) if uts.is_dir() else []), lab.api_netns])
    say(f"{_count(len(netns), 'network namespace')} removed")
    processes.remove_cgroup(lab.cgroup)
    for folder in (lab.state, lab.run):
        if folder.is_dir():
            shutil.rmtree(folder)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _in_parallel(work: Callable[[NodeLayout], None], nodes: list[NodeLayout]) -> None:
    """Runs `work` for every node; raises the first failure after all have ended."""
    with ThreadPoolExecutor(max_workers=min(8, len(nodes))) as pool:
        for future in [pool.submit(work, node) for node in nodes]:
            future.result()
