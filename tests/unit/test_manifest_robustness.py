"""Whatever stands where a value is expected, a manifest ends as objects, refusals and notes; nothing raises."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from test_manifest_objects import NODE, POD, SERVICE, SLICE

from waggle.sources.yaml_objects import parse_manifest

ODD: list[Any] = [None, True, 0, -1, 1.5, float("inf"), 10**30, "", "x", "\n", "é", "9" * 300, "a" * 5000]
ODD += [[], {}, [None], {"a": None}, {"": ""}, [[[]]]]


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _paths(value[key], (*path, key))


def _with(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("text", [SERVICE, SLICE, POD, NODE])
@pytest.mark.parametrize("encode", [yaml.safe_dump, json.dumps])
@pytest.mark.parametrize("in_list", [False, True])
def test_odd_values_anywhere(text, encode, in_list):
    document = yaml.safe_load(text)
    document["metadata"]["labels"] = {"a": "b"}
    for path in _paths(document):
        for odd in ODD:
            changed = _with(document, path, odd)
            if in_list:
                changed = {"apiVersion": "v1", "kind": "List", "items": [changed, changed]}
            manifest = parse_manifest(encode(changed).encode(), "f")
            for error in manifest.errors:
                assert error.line, (path, odd)
                assert str(error).isprintable(), (path, odd)
            for note in manifest.notes:
                assert str(note).isprintable(), (path, odd)
