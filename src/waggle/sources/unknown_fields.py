"""Fields of a document that its type does not have: what kubectl refuses by default, and an apiserver passes over.

For most objects a field that nobody reads does no harm. In a policy a misspelt one does: without its podSelector, a
policy is about every pod of the namespace.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import msgspec

from waggle.sources.yaml_documents import Path


class Unknown(NamedTuple):
    """A field that is not there, and those that are."""

    path: Path
    known: tuple[str, ...]


def unknown_fields(value: Any, hint: Any, path: Path = ()) -> Iterator[Unknown]:
    """Those of `value`, which has been converted to the type `hint`, with paths from its root."""
    hint = _without_none(hint)
    arguments = typing.get_args(hint)
    if isinstance(value, list) and arguments:
        for index, item in enumerate(value):
            yield from unknown_fields(item, arguments[0], (*path, index))
    elif isinstance(value, dict) and isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        fields = _fields(hint)
        for key, item in value.items():
            if key in fields:
                yield from unknown_fields(item, fields[key], (*path, key))
            else:
                yield Unknown((*path, key), tuple(fields))


def _without_none(hint: Any) -> Any:
    parts = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return parts[0] if isinstance(hint, types.UnionType) and len(parts) == 1 else hint


@cache
def _fields(struct: type[msgspec.Struct]) -> dict[str, Any]:
    hints = typing.get_type_hints(struct)
    return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(struct)}
