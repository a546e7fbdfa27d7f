"""YAML or JSON bytes → documents: plain values, each able to name the line a value stands on.

Invariants:
- The documents of one file do not depend on each other: each is cut out at its `---` and parsed on its own, so a broken
  one takes no other with it.
- Positions are worked out only when somebody asks for one: a good file never pays for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import yaml

from waggle.sources.yaml_values import SyntaxFault, build_value

#: Where a value stands inside a document: mapping keys and list indices, from the root.
Path = tuple[str | int, ...]

_MARKER = re.compile(rb"^(?:---|\.\.\.)(?=[ \t\r\n]|\Z)", re.MULTILINE)
# What YAML allows (spec 1.1, c-printable) is everything but these.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")


class Spot(NamedTuple):
    """Where a value is written: 1-based line, and its text where it is a scalar without quotes."""

    line: int
    plain: str | None = None


@dataclass
class Document:
    """One document. `value` is made of dict, list, str, int, float, bool and None; `line` is where it begins."""

    value: Any
    line: int
    _text: str
    _lines_before: int

    @property
    def size(self) -> int:
        """Length of the text in characters."""
        return len(self._text)

    def locate(self, path: Path) -> Spot:
        """Where the value at `path` is written: the line of its key, or of its first character in a list. Where it is
        not in the text, the nearest enclosing value.
        """
        node, spot = self._tree, Spot(self.line)
        for step in path:
            node, line = _child(node, step)
            if node is None:
                break
            plain = node.value if isinstance(node, yaml.ScalarNode) and not node.style else None
            spot = Spot(self._lines_before + line + 1, plain)
        return spot

    @cached_property
    def _tree(self) -> yaml.Node | None:
        try:
            # The values were built already, so the depth is known to be harmless.
            return yaml.compose(self._text, Loader=yaml.CSafeLoader)
        except yaml.YAMLError:
            return None  # JSON that is not YAML, such as "\ud83d\ude00": the document's first line has to do


def read_documents(data: bytes) -> Iterator[Document | SyntaxFault]:
    """Every document of a file that is not empty, in order; a SyntaxFault in the place of one that cannot be read."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield SyntaxFault("the file is UTF-16; save it as UTF-8", 1)
        return
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"{":
        document = _json_document(data)
        if document is not None:
            yield document
            return
    for piece, lines_before in _pieces(data):
        try:
            text = _text(piece, lines_before)
            value, line = build_value(text, lines_before)
        except SyntaxFault as fault:
            yield fault
            continue
        if value is not None:
            yield Document(value, line, text, lines_before)


def _json_document(data: bytes) -> Document | None:
    """The document, or None where the bytes are not one JSON object: then the YAML parser decides, and says where."""
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    blank = len(text) - len(text.lstrip())
    return Document(value, text.count("\n", 0, blank) + 1, text, 0)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("duplicate key")
    return made


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _pieces(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each document's bytes, from its `---` line on, and the number of lines before it.

    A marker at the start of a line ends any scalar it may stand in (YAML 1.2, c-forbidden), so cutting there needs no
    parsing. Directives (`%YAML`) belong to the document after them.
    """
    starts = [0]
    for marker in _MARKER.finditer(data):
        if marker.group() == b"---":
            starts.append(marker.start())
        else:
            end_of_line = data.find(b"\n", marker.end())
            starts.append(len(data) if end_of_line < 0 else end_of_line + 1)
    lines, counted, held = 0, 0, None
    for start, end in zip(starts, [*starts[1:], len(data)], strict=True):
        if start >= end:
            continue
        begin = start if held is None else held
        lines, counted = lines + data.count(b"\n", counted, begin), begin
        piece = data[start:end]
        if b"%" in piece and all(line[:1] == b"%" or line.strip()[:1] in (b"", b"#") for line in piece.splitlines()):
            held = begin
            continue
        held = None
        yield data[begin:end], lines


def _text(piece: bytes, lines_before: int) -> str:
    try:
        text = piece.decode()
    except UnicodeDecodeError as error:
        line = lines_before + piece.count(b"\n", 0, error.start) + 1
        raise SyntaxFault(f"byte 0x{piece[error.start]:02x} is not UTF-8", line) from error
    if found := _CONTROL.search(text):
        line = lines_before + text.count("\n", 0, found.start()) + 1
        raise SyntaxFault(f"control character U+{ord(found.group()):04X} is not allowed", line)
    return text


def _child(node: yaml.Node | None, step: str | int) -> tuple[yaml.Node | None, int]:
    """The node below `node` and its 0-based line; (None, 0) where there is none."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step].start_mark.line
    if not isinstance(node, yaml.MappingNode):
        return None, 0
    merged: tuple[yaml.Node | None, int] = (None, 0)
    for key, value in node.value:
        if key.value == step:
            return value, key.start_mark.line
        if key.value == "<<" and merged[0] is None:
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            merged = next((found for source in sources if (found := _child(source, step))[0] is not None), merged)
    return merged
