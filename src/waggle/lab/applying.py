"""`apply` and `delete`: what an apiserver, a scheduler and the kubelets would do with the objects of a manifest.

Invariants:
- All objects of all files are read and checked before the first is applied: a mistake changes nothing.
- Applying the same files again changes nothing. A Pod whose spec differs is replaced, as its parts cannot change.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from waggle.errors import LabError, WaggleError
from waggle.lab import pods, published
from waggle.lab.allocation import ServiceAllocator
from waggle.lab.layout import LabLayout, PodLayout
from waggle.lab.lifecycle import find_lab
from waggle.lab.lock import Say, lab_lock
from waggle.lab.manifest import LabObject, read_objects
from waggle.lab.record import LabRecord, PodRecord, load_pods
from waggle.model.objects import ObjectKey

T = TypeVar("T")
_PARALLEL = 8


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one object. `problem` is empty where all went well."""

    kind: str
    key: ObjectKey
    action: str
    problem: str = ""


def apply(name: str, files: Sequence[Path], say: Say, *, timeout: float = 30.0, grace: float = 2.0) -> list[Applied]:
    """Makes the lab have the objects of `files` (files, directories, or "-"), and waits until its pods are ready.

    `timeout` is for all pods together, in seconds. Raises LabError or ObjectError when an object is refused; a pod
    that does not get ready is told in the result.
    """
    objects = read_objects(files, say)
    lab, record = find_lab(name)
    with lab_lock(lab, say):
        done = _apply_services(lab, [item for item in objects if item.kind != "Pod"], say)
        return done + _apply_pods(lab, record, [item for item in objects if item.kind == "Pod"], say, timeout, grace)


def delete(name: str, files: Sequence[Path], say: Say, *, grace: float = 2.0) -> list[Applied]:
    """Takes the objects of `files` out of the lab. Objects that are not there are no error."""
    objects = read_objects(files, say)
    lab, record = find_lab(name)
    with lab_lock(lab, say):
        known = load_pods(lab, record.nodes)

        def remove(item: LabObject) -> Applied:
            if item.kind != "Pod":
                gone = published.retract(lab, item.kind, item.key)
            else:
                gone = item.key in known
                if gone:
                    pods.remove(lab, *known[item.key], say, grace=grace)
            action = "deleted" if gone else "not found"
            say(f"{item.kind} {item.key}: {action}")
            return Applied(item.kind, item.key, action)

        return _in_parallel(remove, objects)


def _apply_services(lab: LabLayout, objects: list[LabObject], say: Say) -> list[Applied]:
    done = []
    allocator = ServiceAllocator(published.all_of(lab, "Service"))
    # What asks for certain addresses and ports gets them before others are given free ones.
    completed = {
        item.key: allocator.complete(item.document)
        for item in sorted(objects, key=lambda item: not (item.document.get("spec") or {}).get("clusterIP"))
        if item.kind == "Service"
    }
    for item in objects:
        document = completed[item.key] if item.kind == "Service" else item.document
        before = published.find(lab, item.kind, item.key)
        changed = published.publish(lab, document)
        action = "created" if before is None else "configured" if changed else "unchanged"
        say(f"{item.kind} {item.key}: {action}")
        done.append(Applied(item.kind, item.key, action))
    return done


def _apply_pods(
    lab: LabLayout, record: LabRecord, objects: list[LabObject], say: Say, timeout: float, grace: float
) -> list[Applied]:
    known = load_pods(lab, record.nodes)
    scheduler = _Scheduler(lab, record, known)
    actions: dict[ObjectKey, str] = {}
    to_start: list[tuple[PodLayout, PodRecord]] = []
    for item in objects:
        pod, wanted = scheduler.place(item.document)
        actions[item.key] = _compare(known.get(item.key), wanted)
        if actions[item.key] == "configured":
            pods.update_metadata(lab, pod, wanted)
        if actions[item.key] in ("created", "replaced"):
            to_start.append((pod, wanted))

    def start(work: tuple[PodLayout, PodRecord]) -> tuple[PodLayout, PodRecord, str]:
        pod, wanted = work
        if wanted.key in known:
            pods.remove(lab, *known[wanted.key], say, grace=grace)
        try:
            return pod, pods.start(lab, pod, wanted), ""
        except WaggleError as error:  # the other pods go on; this one stays known, so that it can be deleted
            return pod, wanted, str(error)

    problems: dict[ObjectKey, str] = {}
    started = _in_parallel(start, to_start)
    deadline = time.monotonic() + timeout
    for pod, wanted, problem in started:
        problems[wanted.key] = problem or pods.await_ready(lab, pod, wanted, deadline)
        where = " ".join([f"on {pod.node.name}", *wanted.addresses])
        say(f"Pod {wanted.key}: {actions[wanted.key]} {where}: {problems[wanted.key] or 'ready'}")
    for item in objects:
        if item.key not in problems:
            say(f"Pod {item.key}: {actions[item.key]}")
    return [Applied("Pod", item.key, actions[item.key], problems.get(item.key, "")) for item in objects]


def _compare(existing: tuple[PodLayout, PodRecord] | None, wanted: PodRecord) -> str:
    if existing is None:
        return "created"
    before = existing[1].document
    if before == wanted.document:
        return "unchanged"
    return "configured" if before["spec"] == wanted.document["spec"] else "replaced"


class _Scheduler:
    """Gives every pod a node: the one it names, the one it has, or the one with the fewest pods."""

    def __init__(self, lab: LabLayout, record: LabRecord, known: dict[ObjectKey, tuple[PodLayout, PodRecord]]) -> None:
        self._lab = lab
        self._record = record
        self._known = known
        self._load = Counter({node.index: 0 for node in lab.nodes(record.nodes)})
        self._load.update(pod_record.node for _, pod_record in known.values())

    def place(self, document: dict[str, Any]) -> tuple[PodLayout, PodRecord]:
        key = published.key_of(document)
        existing = self._known.get(key)
        named = document["spec"].get("nodeName")
        if named:
            node = self._lab.node_named(named, self._record.nodes)
            if node is None:
                raise LabError(f"Pod {key}: this lab has no node {named!r}, only node1 to node{self._record.nodes}")
            index = node.index
        elif existing is not None:
            index = existing[1].node
        else:
            index = min(self._load, key=lambda candidate: (self._load[candidate], candidate))
        if existing is None:
            self._load[index] += 1
        else:
            document = {**document, "metadata": {"uid": existing[1].uid, **document["metadata"]}}
        wanted = pods.new_record(document, index)
        if existing is not None and existing[1].document["spec"] == wanted.document["spec"]:
            wanted = msgspec.structs.replace(existing[1], document=wanted.document)
        return self._lab.pod(key, self._lab.node(index), host_network=wanted.host_network), wanted


def _in_parallel(work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    with ThreadPoolExecutor(max_workers=_PARALLEL) as pool:
        return list(pool.map(work, items))
