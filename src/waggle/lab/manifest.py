"""Manifest files as `apply` and `delete` take them: checked as everywhere in waggle, and kept as they were written.

The checked, typed form says what is right or wrong; the lab goes on with the written form, because it also honours
fields that nothing else in waggle reads (restartPolicy, ipFamilyPolicy).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waggle.errors import LabError
from waggle.lab.lock import Say
from waggle.model.objects import KINDS, ObjectKey, Service
from waggle.sources.yaml_documents import read_documents
from waggle.sources.yaml_objects import Identity, Manifest, parse_manifest
from waggle.sources.yaml_values import SyntaxFault

_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class LabObject:
    """One object, as written, with its namespace filled in and without what only a cluster knows."""

    kind: str
    key: ObjectKey
    document: dict[str, Any]


def read_objects(files: Sequence[Path], say: Say) -> list[LabObject]:
    """Everything in `files` that waggle reads, but for Nodes: files, directories, or "-" for standard input.

    Other kinds are passed over, which is said. Raises LabError with everything that is wrong.
    """
    found: dict[Identity, LabObject] = {}
    errors: list[str] = []
    for file in _expand(files):
        name, data = _read(file)
        manifest = parse_manifest(data, name)
        errors += [str(error) for error in manifest.errors]
        for note in _told(manifest):
            say(note)
        written = {_identity(document): document for document in _written(data)}
        for identity in manifest.objects:
            if identity.kind == "Node":
                say(f"{name}: {identity} is passed over: a lab makes its own nodes")
            elif identity in found:
                errors.append(f"{name}: {identity} is given twice")
            else:
                found[identity] = _lab_object(identity, written[identity])
    if errors:
        raise LabError("\n".join(["nothing was applied:", *errors]) if len(errors) > 1 else errors[0])
    if not found:
        kinds = ", ".join(kind for kind in KINDS if kind != "Node")
        raise LabError(f"there is nothing for a lab in these files: none of {kinds}")
    return list(found.values())


def _expand(files: Sequence[Path]) -> Iterator[Path]:
    for path in files:
        if str(path) == "-" or path.is_file():
            yield path
        elif path.is_dir():
            yield from sorted(entry for entry in path.iterdir() if entry.suffix in _SUFFIXES and entry.is_file())
        else:
            raise LabError(f"{path} does not exist")


def _read(file: Path) -> tuple[str, bytes]:
    if str(file) == "-":
        return "-", sys.stdin.buffer.read()
    try:
        return str(file), file.read_bytes()
    except OSError as error:
        raise LabError(f"cannot read {file}: {error.strerror}") from error


def _told(manifest: Manifest) -> Iterator[str]:
    """The notes, without those about what no apiserver chose for a Service: the lab does choose."""
    chosen = {
        str(identity)
        for identity, placed in manifest.objects.items()
        if isinstance(placed.obj, Service) and placed.obj.spec.type != "ExternalName"
    }
    return (str(note) for note in manifest.notes if note.subject not in chosen)


def _written(data: bytes) -> Iterator[dict[str, Any]]:
    """Every document of a file and every item of its Lists, as written. Broken ones were told about before."""

    def items(value: Any, version: str = "", kind: str = "") -> Iterator[dict[str, Any]]:
        if not isinstance(value, dict):
            return
        value = {"apiVersion": version, "kind": kind} | value
        if str(value["kind"]).endswith("List"):
            item_kind = str(value["kind"]).removesuffix("List")
            for item in value.get("items") or []:
                yield from items(item, str(value["apiVersion"]) if item_kind else "", item_kind)
        elif isinstance(value.get("metadata"), dict):
            yield value

    for document in read_documents(data):
        if not isinstance(document, SyntaxFault):
            yield from items(document.value)


def _identity(document: dict[str, Any]) -> Identity:
    kind, metadata = str(document["kind"]), document["metadata"]
    namespaced = kind not in KINDS or KINDS[kind][2]
    return Identity(kind, ObjectKey((metadata.get("namespace") or "default") if namespaced else "", metadata["name"]))


def _lab_object(identity: Identity, document: dict[str, Any]) -> LabObject:
    metadata = {key: value for key, value in document["metadata"].items() if key not in ("resourceVersion", "uid")}
    metadata["name"] = identity.key.name
    metadata.pop("namespace", None)
    if KINDS[identity.kind][2]:
        metadata["namespace"] = identity.key.namespace
    # A lab has no controller that gives load balancers their addresses: manifests say them themselves.
    keeps_status = document.get("kind") == "Service"
    kept = {key: value for key, value in document.items() if key != "status" or keeps_status}
    return LabObject(identity.kind, identity.key, {**kept, "metadata": metadata})
