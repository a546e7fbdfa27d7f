"""Manifests read once, to be thought about and not to be served: policies and what they may be about.

Beside the objects that the agent reads, the pod templates of workloads count as pods ("deployment/web"): manifests of
an application seldom have pods of their own. A pod without an address gets one, so that it can be asked about; `placed`
says which those are.

Every value can be found again: `line` says where it is written, so that whoever reads a finding can go there.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from waggle.errors import ConfigError, ObjectError
from waggle.model.meta import ObjectKey
from waggle.model.objects import KINDS, EndpointSlice, Node, Object, Pod, PodCondition, PodIP, Service
from waggle.model.policy import PolicyWorld, pod_addresses
from waggle.model.policy_objects import ClusterNetworkPolicy, Namespace, NetworkPolicy
from waggle.sources.yaml_documents import Document, Path, read_documents
from waggle.sources.yaml_objects import MAX_FILE_SIZE, Identity, parse_manifest
from waggle.sources.yaml_values import SyntaxFault

SUFFIXES = (".yaml", ".yml", ".json")
#: Where pods are that have no address yet.
DEFAULT_POD_CIDR = "10.244.0.0/16"
#: Where a workload has its pod template.
_TEMPLATES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"), ("spec", "template")),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}

T = TypeVar("T", bound=Object)


class Place(NamedTuple):
    """Where something is written. `line` is 1-based."""

    file: str
    line: int


@dataclass
class PolicyFiles:
    """What files say. `errors`: everything in them that is refused."""

    objects: dict[Identity, Object] = field(default_factory=dict)
    errors: list[ObjectError] = field(default_factory=list)
    placed: set[ObjectKey] = field(default_factory=set)
    _written: dict[Identity, tuple[str, Document, Path]] = field(default_factory=dict)

    def place(self, kind: str, key: ObjectKey, path: Path = ()) -> Place | None:
        """Where a value of an object is written; None for an object that no file gives."""
        found = self._written.get(Identity(kind, key))
        if found is None:
            return None
        file, document, base = found
        return Place(file, document.locate((*base, *path)).line)

    def of(self, kind: type[T]) -> dict[ObjectKey, T]:
        """The objects of a type, by key."""
        return {identity.key: obj for identity, obj in self.objects.items() if isinstance(obj, kind)}

    def world(self) -> PolicyWorld:
        """As policies see it."""
        return PolicyWorld(
            pods=self.of(Pod),
            namespaces=self.of(Namespace),
            nodes=self.of(Node),
            policies=self.of(NetworkPolicy),
            cluster_policies=self.of(ClusterNetworkPolicy),
        )

    @property
    def services(self) -> dict[ObjectKey, Service]:
        return self.of(Service)

    @property
    def slices(self) -> dict[ObjectKey, EndpointSlice]:
        return self.of(EndpointSlice)


def read_policy_files(
    paths: Iterable[FilePath], pod_cidr: str = DEFAULT_POD_CIDR, addresses: dict[ObjectKey, str] | None = None
) -> PolicyFiles:
    """What these files, and the files in these directories and below, say; "-" is standard input.

    `pod_cidr`: where pods without an address are put; `addresses`: those that they got, for pods of several readings
    to be given the same. ConfigError where a path cannot be read; what is wrong in a file is in `errors`.
    """
    files = PolicyFiles()
    seen: set[FilePath] = set()  # a directory may hold a file that was named, too
    for path in paths:
        if str(path) == "-":
            _read(files, sys.stdin.buffer.read(), "-")
            continue
        try:
            for file in _files(path):
                if file.resolve() not in seen:
                    seen.add(file.resolve())
                    _read(files, file.read_bytes(), str(file))
        except OSError as error:
            raise ConfigError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    _give_addresses(files, pod_cidr, {} if addresses is None else addresses)
    return files


def _files(path: FilePath) -> Iterator[FilePath]:
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if file.suffix in SUFFIXES and not hidden and file.is_file():
            yield file


def _read(files: PolicyFiles, data: bytes, shown: str) -> None:
    manifest = parse_manifest(data, shown)
    files.errors += manifest.errors
    found: dict[Identity, Object] = {identity: placed.obj for identity, placed in manifest.objects.items()}
    written: dict[Identity, tuple[str, Document, Path]] = {}
    for document, path, value in _items(data):
        identity = _identity(value)
        if identity is None:
            continue
        written.setdefault(identity, (shown, document, path))
        if identity.kind in _TEMPLATES:
            _template(files, found, written, identity, shown, document, path, value)
    for identity, obj in found.items():
        if identity in files.objects:
            first, here = files.place(*identity), written.get(identity)
            line = here[1].locate(here[2]).line if here else None
            where = f"{first.file}:{first.line}" if first else "another file"
            reason = f"is given in {where} too; one of them has to go"
            files.errors.append(ObjectError(reason, file=shown, line=line, subject=str(identity)))
            continue
        files.objects[identity] = obj
        if identity in written:
            files._written[identity] = written[identity]


def _items(data: bytes) -> Iterator[tuple[Document, Path, dict[str, Any]]]:
    """Every object in the text, those in Lists too: its document, its path in it, its value."""
    if len(data) > MAX_FILE_SIZE:
        return
    for document in read_documents(data):
        if isinstance(document, SyntaxFault):
            continue
        waiting: list[tuple[Path, Any]] = [((), document.value)]
        while waiting:
            path, value = waiting.pop(0)
            if not isinstance(value, dict):
                continue
            items = value.get("items")
            if str(value.get("kind", "")).endswith("List") and isinstance(items, list) and len(path) < 8:
                waiting += [((*path, "items", index), item) for index, item in enumerate(items)]
            else:
                yield document, path, value


def _identity(value: dict[str, Any]) -> Identity | None:
    kind, metadata = value.get("kind"), value.get("metadata")
    if not isinstance(kind, str) or not isinstance(metadata, dict):
        return None
    name, namespace = metadata.get("name"), metadata.get("namespace") or "default"
    if not isinstance(name, str) or not isinstance(namespace, str):
        return None
    return Identity(kind, ObjectKey(namespace if KINDS.get(kind, ("", None, True))[2] else "", name))


def _template(
    files: PolicyFiles,
    found: dict[Identity, Object],
    written: dict[Identity, tuple[str, Document, Path]],
    workload: Identity,
    shown: str,
    document: Document,
    path: Path,
    value: Any,
) -> None:
    """Takes a workload's template as a pod that is named after it."""
    steps = _TEMPLATES[workload.kind]
    for step in steps:
        value = value.get(step) if isinstance(value, dict) else None
    name = f"{workload.kind.lower()}/{workload.key.name}"
    identity = Identity("Pod", ObjectKey(workload.key.namespace, name))
    try:
        pod = msgspec.convert(value, Pod)
    except msgspec.ValidationError as error:
        line = document.locate((*path, *steps)).line
        reason = f"its pod template cannot be read: {error}"
        files.errors.append(ObjectError(reason, file=shown, line=line, subject=str(workload)))
        return
    metadata = replace(pod.metadata, name=name, namespace=workload.key.namespace)
    found[identity] = replace(pod, metadata=metadata)
    written[identity] = (shown, document, (*path, *steps))


def _give_addresses(files: PolicyFiles, pod_cidr: str, addresses: dict[ObjectKey, str]) -> None:
    """Makes pods that have not been started yet such that policies and Services can mean them."""
    try:
        range_ = ipaddress.ip_network(pod_cidr)
    except ValueError as error:
        raise ConfigError(f"pod-cidr: {error}") from error
    taken = {*addresses.values(), *(address for pod in files.of(Pod).values() for address in pod_addresses(pod))}
    free = (text for text in map(str, range_.hosts()) if text not in taken)
    for key, pod in sorted(files.of(Pod).items()):
        if pod.spec.host_network or pod.status.phase or pod.status.pod_ip or pod.status.pod_ips:
            continue
        if key not in addresses:
            try:
                addresses[key] = next(free)
            except StopIteration:
                raise ConfigError(
                    f"pod-cidr: {pod_cidr} has no address left for pod {key}: give a larger one"
                ) from None
        ready = [PodCondition(type="Ready", status="True")]
        status = replace(pod.status, phase="Running", pod_ips=[PodIP(addresses[key])], conditions=ready)
        files.objects[Identity("Pod", key)] = replace(pod, status=status)
        files.placed.add(key)
