"""One YAML document → plain values (dict, list, str, int, float, bool, None), built straight from parser events.

Invariants:
- Input may be hostile: depth and alias expansion are bounded, and nothing here recurses. (PyYAML's C composer recurses
  without a limit and takes the process down with `[` written 100,000 times.)
- Scalars mean what they mean to kubectl: YAML 1.1 booleans such as `on` and `y`, octal numbers, no dates, no base 60. A
  file that is refused there must not be read differently here.
- A key given twice is refused: one of the two would silently win.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml import events
from yaml._yaml import CParser

MAX_DEPTH = 100
MAX_ALIASED_VALUES = 100_000

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0[xX][0-9a-fA-F]+|0[oO]?[0-7]+|0[bB][01]+)\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {form: True for word in ("y", "yes", "true", "on") for form in (word, word.title(), word.upper())}
_WORDS |= {form: False for word in ("n", "no", "false", "off") for form in (word, word.title(), word.upper())}
_WORDS |= {form: float("inf") for form in (".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF")}
_WORDS |= {form: float("-inf") for form in ("-.inf", "-.Inf", "-.INF")}
_WORDS |= {form: float("nan") for form in (".nan", ".NaN", ".NAN")}
_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS: dict[str, tuple[type, ...]] = {
    _TAG + "int": (int,),
    _TAG + "float": (float, int),
    _TAG + "bool": (bool,),
    _TAG + "null": (type(None),),
}
_COLLECTION_TAGS = (None, "!", _TAG + "map", _TAG + "seq")


class SyntaxFault(Exception):
    """A document cannot be read. `line` is 1-based in the file; `text` is the document, "" where it is no text."""

    def __init__(self, reason: str, line: int, text: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.text = text


def build_value(text: str, lines_before: int) -> tuple[Any, int]:
    """(value, 1-based line where it begins) of the one document in `text`. Raises SyntaxFault.

    `lines_before` is the number of lines of the file that precede `text`.
    """
    builder = _Builder()
    line = 0
    try:
        parser: Any = CParser(text)
        while True:
            event = parser.get_event()
            if type(event) is events.StreamEndEvent:
                return builder.root, lines_before + builder.line + 1
            line = event.start_mark.line
            builder.take(event)
    except _Refused as refused:
        raise SyntaxFault(str(refused), lines_before + line + 1, text) from refused
    except yaml.MarkedYAMLError as error:
        raise _syntax_fault(error, text, lines_before) from error
    except yaml.YAMLError as error:
        raise SyntaxFault(f"not YAML: {error}", lines_before + line + 1, text) from error


class _Refused(Exception):
    """The event just taken makes no usable document."""


class _Frame:
    """A mapping or list that has begun and not ended."""

    __slots__ = ("anchor", "container", "count", "key", "merges", "merging")

    def __init__(self, container: Any, anchor: str | None, count: int) -> None:
        self.container: Any = container  # dict, list, or None at the root
        self.anchor = anchor
        self.count = count  # the builder's count when it began
        self.key: str | None = None  # the key whose value comes next
        self.merging = False  # that key is the merge key `<<`
        self.merges: list[dict[str, Any]] = []


class _Builder:
    """Parser events → a plain value, with a stack of its own in place of recursion."""

    def __init__(self) -> None:
        self.root: Any = None
        self.line = 0  # 0-based, of the root value
        self._top = _Frame(None, None, 0)
        self._stack: list[_Frame] = []
        self._anchors: dict[str, tuple[Any, int]] = {}  # anchor → (value, number of values in it, aliases expanded)
        self._documents = 0
        self._count = 0  # values so far, aliases expanded
        self._aliased = 0  # of these, the ones that only aliases added

    def take(self, event: Any) -> None:
        kind = type(event)
        if kind is events.ScalarEvent:
            self._scalar(event)
        elif kind is events.MappingStartEvent:
            self._open(event, {})
        elif kind is events.SequenceStartEvent:
            self._open(event, [])
        elif kind is events.MappingEndEvent or kind is events.SequenceEndEvent:
            self._close()
        elif kind is events.AliasEvent:
            self._alias(event.anchor)
        elif kind is events.DocumentStartEvent:
            self._documents += 1
            if self._documents > 1:
                raise _Refused("a second document begins here without a line '---' before it")

    def _scalar(self, event: Any) -> None:
        self._count += 1
        top = self._top
        if top.key is None and type(top.container) is dict:
            value = event.value
            self._take_key(value, merge=value == "<<" and event.implicit[0])
        else:
            if top.container is None:
                self.line = event.start_mark.line
            if event.tag is None:
                value = _plain_value(event.value) if event.implicit[0] else event.value
            else:
                value = _tagged_value(event.value, event.tag)
            self._place(value)
        if event.anchor:
            self._anchors[event.anchor] = (value, 1)

    def _take_key(self, key: Any, merge: bool = False) -> None:
        top = self._top
        if type(key) is not str:
            raise _Refused("a mapping key must be a string")
        if key in top.container:
            raise _Refused(f"the key {_shown(key)} is given twice in one mapping")
        top.key = key
        top.merging = merge

    def _open(self, event: Any, container: Any) -> None:
        top = self._top
        if top.key is None and type(top.container) is dict:
            raise _Refused("a mapping key must be a string")
        if event.tag not in _COLLECTION_TAGS:
            raise _Refused(f"the tag {_short(event.tag)} is not supported")
        if len(self._stack) >= MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH} levels")
        if top.container is None:
            self.line = event.start_mark.line
        self._stack.append(top)
        self._top = _Frame(container, event.anchor, self._count)
        self._count += 1

    def _close(self) -> None:
        ended = self._top
        for merged in ended.merges:
            for key, value in merged.items():
                ended.container.setdefault(key, value)
        self._top = self._stack.pop()
        if ended.anchor:
            self._anchors[ended.anchor] = (ended.container, self._count - ended.count)
        self._place(ended.container)

    def _alias(self, anchor: str) -> None:
        if anchor not in self._anchors:
            raise _Refused(
                f"the alias {_shown('*' + anchor)} stands for nothing before it, or for something it is part of"
            )
        value, count = self._anchors[anchor]
        self._count += count
        self._aliased += count
        if self._aliased > MAX_ALIASED_VALUES:
            raise _Refused(f"aliases expand to more than {MAX_ALIASED_VALUES:,} values")
        if self._top.key is None and type(self._top.container) is dict:
            self._take_key(value)
        else:
            self._place(value)

    def _place(self, value: Any) -> None:
        top = self._top
        if type(top.container) is list:
            top.container.append(value)
        elif top.container is None:
            self.root = value
        else:
            if top.merging:
                self._merge(value)
            else:
                top.container[top.key] = value
            top.key = None

    def _merge(self, value: Any) -> None:
        sources = value if type(value) is list else [value]
        if not all(type(source) is dict for source in sources):
            raise _Refused("'<<' merges mappings only")
        self._top.merges.extend(sources)


def _plain_value(text: str) -> Any:
    """What a scalar without quotes and without a tag means."""
    first = text[:1]
    if "0" <= first <= "9" or (first and first in "+-."):
        if len(text) > 40:
            return text  # no number anybody means, and Python refuses to convert the longest ones
        if _INTEGER.match(text):
            return _integer(text.replace("_", ""))
        if _FLOAT.match(text):
            return float(text)
    return _WORDS.get(text, text)


def _integer(text: str) -> int:
    digits = text.lstrip("+-")
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return int(text, 8)
    return int(text, 0)


def _tagged_value(text: str, tag: str) -> Any:
    if tag in ("!", _TAG + "str"):
        return text
    if tag not in _SCALAR_TAGS:
        raise _Refused(f"the tag {_short(tag)} is not supported")
    value = _plain_value(text)
    if type(value) not in _SCALAR_TAGS[tag]:
        raise _Refused(f"{_shown(text)} is not what its tag {_short(tag)} says")
    return value


def _short(tag: str) -> str:
    return "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:79] + "…")


def _syntax_fault(error: yaml.MarkedYAMLError, text: str, lines_before: int) -> SyntaxFault:
    mark = error.problem_mark or error.context_mark
    # The parser counts the end of the text as a line of its own.
    last = text.rstrip("\r\n").count("\n")
    line = min(mark.line, last) if mark else last
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    if "cannot start any token" in reason and "\t" in text.split("\n")[line]:
        reason += " (YAML indents with spaces, not with tabs)"
    return SyntaxFault(f"not YAML: {reason}", lines_before + line + 1, text)
