"""The few facts about a lab and its pods that cannot be seen on the machine, kept as small JSON files.

Written atomically: a file is complete or absent, also after a crash. A record says what was *wanted*; what *is* is
always looked up.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from waggle.errors import LabError
from waggle.lab.layout import LabLayout, PodLayout
from waggle.model.objects import ObjectKey

T = TypeVar("T")


class LabRecord(msgspec.Struct, frozen=True):
    """What `up` was asked for."""

    nodes: int
    kubeconfig: str | None = None
    #: Settings of every agent, beyond those that make the lab.
    settings: dict[str, Any] = {}
    segments: int = 1


class PodRecord(msgspec.Struct, frozen=True):
    """A pod that was asked for. Written before anything of it exists, so that nothing of it can be forgotten."""

    #: The manifest as it was applied, with the defaults and the node filled in.
    document: dict[str, Any]
    node: int
    container_id: str
    uid: str
    host_network: bool = False
    addresses: list[str] = []
    #: The CNI result of ADD; CHECK and DEL hand it back to the plugin, as the specification wants.
    cni_result: dict[str, Any] | None = None

    @property
    def key(self) -> ObjectKey:
        meta = self.document["metadata"]
        return ObjectKey(meta["namespace"], meta["name"])


def write_atomically(path: Path, content: bytes) -> None:
    """Puts `content` at `path`: readers see the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise LabError(f"cannot write {path}: {error.strerror}") from error


def load_lab(lab: LabLayout) -> LabRecord | None:
    """None where there is no such lab, or only the remains of one."""
    return _load(lab.record, LabRecord)


def save_lab(lab: LabLayout, record: LabRecord) -> None:
    lab.run.mkdir(parents=True, exist_ok=True)
    write_atomically(lab.record, msgspec.json.encode(record))


def save_pod(pod: PodLayout, record: PodRecord) -> None:
    pod.run.mkdir(parents=True, exist_ok=True)
    write_atomically(pod.record, msgspec.json.encode(record))


def load_pods(lab: LabLayout, nodes: int) -> dict[ObjectKey, tuple[PodLayout, PodRecord]]:
    """Every pod of the lab, in the order of their names."""
    found: dict[ObjectKey, tuple[PodLayout, PodRecord]] = {}
    for node in lab.nodes(nodes):
        for path in sorted(node.run.glob("pods/*/record.json")):
            record = _load(path, PodRecord)
            if record is not None:
                found[record.key] = (lab.pod(record.key, node, host_network=record.host_network), record)
    return dict(sorted(found.items()))


def _load(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise LabError(f"cannot read {path}: {error}") from error
