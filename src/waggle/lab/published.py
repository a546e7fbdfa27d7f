"""The lab's live objects: one YAML file per object in the directory that every agent of the lab watches.

This directory is to the lab what the apiserver is to a cluster. Files appear by rename, so no agent sees half a file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from waggle.errors import LabError
from waggle.lab.layout import LabLayout
from waggle.lab.record import write_atomically
from waggle.model.objects import ObjectKey

Document = dict[str, Any]


def path_of(lab: LabLayout, kind: str, key: ObjectKey) -> Path:
    """The file of an object. Kinds, namespaces and names hold no underscore, so two objects never share one."""
    return lab.manifests / f"{kind.lower()}_{key.namespace}_{key.name}.yaml"


def key_of(document: Document) -> ObjectKey:
    meta = document["metadata"]
    return ObjectKey(meta.get("namespace", ""), meta["name"])


class _Dumper(yaml.CSafeDumper):
    """Quotes what YAML 1.1, and so the agent, takes for a boolean: PyYAML does so for yes and no alone."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^[yYnN]$"), list("yYnN"))


def encode(document: Document) -> bytes:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False).encode()


def publish(lab: LabLayout, document: Document) -> bool:
    """Shows the object to the agents. False when exactly this was there already."""
    path = path_of(lab, document["kind"], key_of(document))
    content = encode(document)
    if path.exists() and path.read_bytes() == content:
        return False
    lab.manifests.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
    return True


def retract(lab: LabLayout, kind: str, key: ObjectKey) -> bool:
    """Takes the object away. False when it was not there."""
    path = path_of(lab, kind, key)
    if not path.exists():
        return False
    path.unlink(missing_ok=True)
    return True


def find(lab: LabLayout, kind: str, key: ObjectKey) -> Document | None:
    path = path_of(lab, kind, key)
    return _read(path) if path.exists() else None


def all_of(lab: LabLayout, kind: str) -> list[Document]:
    """Every published object of a kind."""
    found = (_read(path) for path in sorted(lab.manifests.glob(f"{kind.lower()}_*.yaml")))
    return [document for document in found if document is not None]


def _read(path: Path) -> Document | None:
    try:
        document = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)
    except FileNotFoundError:  # retracted meanwhile
        return None
    except (OSError, yaml.YAMLError) as error:
        raise LabError(f"cannot read {path}: {error}") from error
    return document if isinstance(document, dict) else None
