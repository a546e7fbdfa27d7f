"""Manifest text → typed Kubernetes objects, each checked as an apiserver would; pure, no I/O.

Used by the manifest source and by `waggle lab apply -f`. Invariants:
- Nothing raises because of what a manifest says: every document, and every item of a List, ends as an object, as a
  refusal (file, line, reason) or as a note, independently of all others.
- A refusal names the object it would have been where that can be told, so that the last good version can be kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from waggle.errors import ObjectError
from waggle.model.objects import KINDS, Object, ObjectKey, is_read, kind_of
from waggle.sources.admission import completed, remarks, violations
from waggle.sources.name_rules import shown
from waggle.sources.problem import Problem
from waggle.sources.unknown_fields import unknown_fields
from waggle.sources.yaml_documents import Document, Path, read_documents
from waggle.sources.yaml_values import SyntaxFault
from waggle.store.store import POLICY_KINDS

#: A file larger than this is not read. The apiserver's own limit for one request is 3 MiB.
MAX_FILE_SIZE = 8 << 20
MAX_REASONS_PER_OBJECT = 10
MAX_SIZE_FOR_LINES = 256 << 10

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|\[\.\.\.\]")
_MISMATCH = re.compile(r"Expected `([^`]+)`, got `([^`]+)`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_TYPE_NAMES = {
    "str": "a string",
    "int": "a whole number",
    "bool": "true or false",
    "float": "a number with a fraction",
    "object": "a mapping",
    "array": "a list",
    "null": "null",
}
#: Maps whose values are strings: null is a mistake there, and means "not given" everywhere else.
_STRING_MAPS = frozenset({"labels", "annotations", "selector"})
_GUESSED_KIND = re.compile(r"^kind:[ \t]*([A-Za-z]+)", re.MULTILINE)
_GUESSED_NAME = re.compile(r"^metadata:[ \t]*(?:\r?\n[ \t]+.*)*?\r?\n[ \t]+name:[ \t]*([-.a-z0-9]+)", re.MULTILINE)


class Identity(NamedTuple):
    """Which object: kind and key. Two manifests with the same identity mean the same object."""

    kind: str
    key: ObjectKey

    def __str__(self) -> str:
        return f"{self.kind} {self.key}"


def identity_of(obj: Object) -> Identity:
    return Identity(kind_of(obj), obj.key)


class Placed(NamedTuple):
    """A good object and the 1-based line where it begins; None inside a List too long to look for lines in."""

    obj: Object
    line: int | None


class Refusal(NamedTuple):
    """A refused object: one error per thing wrong with it. `identity` is None where it cannot be told what it is."""

    errors: tuple[ObjectError, ...]
    identity: Identity | None


@dataclass(slots=True)
class Manifest:
    """What one file says."""

    objects: dict[Identity, Placed] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)

    @property
    def errors(self) -> list[ObjectError]:
        """Everything that is wrong, in the order of the file."""
        return [error for refusal in self.refusals for error in refusal.errors]

    @property
    def has_unknown(self) -> bool:
        """Some document cannot be told apart: any object missing from this manifest may be that one."""
        return any(refusal.identity is None for refusal in self.refusals)


def parse_manifest(data: bytes, file: str) -> Manifest:
    """The objects in `data`; `file` is only a name for errors ("-" for standard input)."""
    manifest = Manifest()
    if len(data) > MAX_FILE_SIZE:
        manifest.refusals.append(too_large(file, len(data)))
        return manifest
    for document in read_documents(data):
        if isinstance(document, SyntaxFault):
            error = ObjectError(document.reason, file=file, line=document.line, subject=_guess(document.text))
            manifest.refusals.append(Refusal((error,), None))
        else:
            _Reader(manifest, file, document).read()
    return manifest


def too_large(file: str, size: int) -> Refusal:
    """The refusal of a file of `size` bytes, MAX_FILE_SIZE being exceeded."""
    reason = f"the file has {size:,} bytes; {MAX_FILE_SIZE:,} is the limit. Split it into several files"
    return Refusal((ObjectError(reason, file=file),), None)


def _guess(text: str) -> str:
    """What a document that does not parse is probably about; for people only."""
    kind, name = _GUESSED_KIND.search(text), _GUESSED_NAME.search(text)
    return f"{kind.group(1)} {name.group(1)}" if kind and name else ""


class _Refused(Exception):
    """The object being read is no object; `path` is the value at fault."""

    def __init__(self, reason: str, path: Path) -> None:
        super().__init__(reason)
        self.path = path


class _Reader:
    """One document into a manifest."""

    def __init__(self, manifest: Manifest, file: str, document: Document) -> None:
        self._manifest = manifest
        self._file = file
        self._document = document

    def read(self) -> None:
        self._item(self._document.value, (), "", "")

    def _item(self, value: Any, path: Path, default_version: str, default_kind: str) -> None:
        identity: Identity | None = None
        subject = _subject(value, default_kind)
        try:
            version, kind = self._type(value, path, default_version, default_kind)
            if kind == "List" or (kind.endswith("List") and kind.removesuffix("List") in KINDS):
                self._list(value, path, version, kind)
                return
            if not is_read(version, kind):
                what = shown(f"{version} {kind}")[1:-1]
                self._note(f"{what} is not read by waggle; passed over", path, subject)
                return
            identity = self._identity(value, kind, path)
            subject = _printable(str(identity))
            obj = self._typed(value, kind, path)
            if kind in POLICY_KINDS:
                self._refuse_unknown(value, kind, path)
            self._keep(obj, path)
        except _Refused as refused:
            error = ObjectError(str(refused), file=self._file, line=self._line(refused.path), subject=subject)
            self._manifest.refusals.append(Refusal((error,), identity))

    def _type(self, value: Any, path: Path, default_version: str, default_kind: str) -> tuple[str, str]:
        """(apiVersion, kind); those of the enclosing list where an item of a ServiceList leaves them out."""
        if not isinstance(value, dict):
            raise _Refused("this is not a Kubernetes object: a mapping with apiVersion and kind was expected", path)
        kind = value.get("kind") or default_kind
        if not isinstance(kind, str) or not kind:
            raise _Refused("this is not a Kubernetes object: it has no kind", (*path, "kind"))
        version = value.get("apiVersion") or default_version
        if not isinstance(version, str) or not version:
            raise _Refused(f"the {shown(kind)[1:-1]} has no apiVersion", (*path, "apiVersion"))
        if kind in KINDS and not is_read(version, kind) and _is_builtin(version):
            raise _Refused(f"apiVersion {shown(version)} has no {kind}; use {KINDS[kind][0]}", (*path, "apiVersion"))
        return version, kind

    def _list(self, value: dict[str, Any], path: Path, version: str, kind: str) -> None:
        items = value.get("items") or []
        if not isinstance(items, list):
            raise _Refused(f"items of a {kind} must be a list", (*path, "items"))
        if len(path) >= 8:
            raise _Refused("Lists within Lists within Lists", path)
        item_kind = kind.removesuffix("List")
        for index, item in enumerate(items):
            self._item(item, (*path, "items", index), version if item_kind else "", item_kind)

    def _identity(self, value: dict[str, Any], kind: str, path: Path) -> Identity:
        metadata = value.get("metadata")
        if not isinstance(metadata, dict):
            raise _Refused("metadata with a name is missing", (*path, "metadata"))
        name = metadata.get("name")
        if not name and metadata.get("generateName"):
            raise _Refused("metadata.generateName needs an apiserver; give a name", (*path, "metadata", "generateName"))
        if name is None or name == "":
            raise _Refused("metadata.name is missing", (*path, "metadata", "name"))
        namespace = metadata.get("namespace") or "default"
        for text, key in ((name, "name"), (namespace, "namespace")):
            if not isinstance(text, str):
                raise self._mismatch("str", _type_name(text), (*path, "metadata", key), path)
        return Identity(kind, ObjectKey(namespace if KINDS[kind][2] else "", name))

    def _typed(self, value: dict[str, Any], kind: str, path: Path) -> Object:
        if kind == "EndpointSlice" and not value.get("addressType"):
            raise _Refused("addressType is missing: IPv4, IPv6 or FQDN", (*path, "addressType"))
        struct = KINDS[kind][1]
        try:
            return msgspec.convert(value, struct)
        except msgspec.ValidationError as error:
            if "`null`" not in str(error):
                raise self._decode_fault(str(error), value, path) from error
        # null means "not given" to Kubernetes. Rare, so the copy without nulls is made only now.
        value = _without_nulls(value)
        try:
            return msgspec.convert(value, struct)
        except msgspec.ValidationError as error:
            raise self._decode_fault(str(error), value, path) from error

    def _refuse_unknown(self, value: dict[str, Any], kind: str, path: Path) -> None:
        whole = {key: part for key, part in value.items() if key not in ("apiVersion", "kind", "metadata", "status")}
        for where, known in unknown_fields(whole, KINDS[kind][1]):
            fields = ", ".join(field for field in known if field != "metadata")
            raise _Refused(f"{_dotted(where)}: there is no such field; there is {fields}", (*path, *where))

    def _keep(self, obj: Object, path: Path) -> None:
        obj = completed(obj)
        identity = identity_of(obj)
        subject = _printable(str(identity))
        errors = tuple(
            ObjectError(
                f"{_dotted(found.path)}: {found.reason}",
                file=self._file,
                line=self._line((*path, *found.path)),
                subject=subject,
            )
            for found, _ in zip(violations(obj), range(MAX_REASONS_PER_OBJECT), strict=False)
        )
        if errors:
            self._manifest.refusals.append(Refusal(errors, identity))
            return
        first = self._manifest.objects.get(identity)
        if first is not None:
            where = f"; the one in line {first.line} is used" if first.line else "; the first is used"
            raise _Refused(f"given twice in this file{where}", path)
        self._manifest.objects[identity] = Placed(obj, self._first_line(path))
        for remark in remarks(obj):
            self._note(f"{_dotted(remark.path)}: {remark.reason}", (*path, *remark.path), subject)

    def _note(self, reason: str, path: Path, subject: str) -> None:
        self._manifest.notes.append(Problem(subject, reason, self._file, self._first_line(path)))

    def _first_line(self, path: Path) -> int | None:
        """The line of a good value. Finding lines costs more than reading the values, so a long file goes without."""
        if not path:
            return self._document.line
        return self._line(path) if self._document.size <= MAX_SIZE_FOR_LINES else None

    def _line(self, path: Path) -> int:
        return self._document.locate(path).line

    def _decode_fault(self, message: str, value: Any, path: Path) -> _Refused:
        """A ValidationError of msgspec as a refusal with a path."""
        text, _, where = message.partition(" - at `$")
        inner = _path(where.rstrip("`"), value)
        if missing := _MISSING.match(text):
            return _Refused(f"{_dotted((*inner, missing.group(1)))} is missing", (*path, *inner))
        if mismatch := _MISMATCH.match(text):
            return self._mismatch(mismatch.group(1), mismatch.group(2), (*path, *inner), path)
        return _Refused(f"{_dotted(inner)}: {text}", (*path, *inner))

    def _mismatch(self, expected: str, got: str, path: Path, root: Path) -> _Refused:
        wanted = " or ".join(_TYPE_NAMES.get(part, part) for part in expected.split(" | ") if part != "null")
        plain = self._document.locate(path).plain
        found = _TYPE_NAMES.get(got, got)
        if got == "bool" and plain:
            found = f"the boolean {shown(plain)[1:-1]}"
        elif got in ("int", "float") and plain:
            found = f"the number {shown(plain)[1:-1]}"
        hint = f'; write it in quotes: "{shown(plain)[1:-1]}"' if plain and "str" in expected.split(" | ") else ""
        return _Refused(f"{_dotted(path[len(root) :])}: {wanted} was expected, not {found}{hint}", path)


def _is_builtin(version: str) -> bool:
    """A group of Kubernetes itself; a Service of Knative, say, is an object of its own and no mistake."""
    group = version.partition("/")[0] if "/" in version else ""
    return "." not in group or group.endswith(".k8s.io")


def _subject(value: Any, default_kind: str) -> str:
    """What an object that is not typed yet calls itself."""
    if not isinstance(value, dict):
        return ""
    metadata = value.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else ""
    parts = (value.get("kind") or default_kind, name)
    return _printable(" ".join(part for part in parts if isinstance(part, str) and part))


def _printable(text: str) -> str:
    """`text` fit for one line of a log."""
    text = text[:300]
    return text if text.isprintable() else "".join(char if char.isprintable() else "�" for char in text)


def _type_name(value: Any) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "str", dict: "object", list: "array"}
    return names.get(type(value), "null")


def _path(text: str, value: Any) -> Path:
    """msgspec's path as ours. Its `[...]` stands for some value of a map: the first that is no string is meant."""
    path: list[str | int] = []
    for step in _STEP.finditer(text):
        key: str | int
        if step.group(1) is not None:
            key = step.group(1)
        elif step.group(2) is not None:
            key = int(step.group(2))
        else:
            key = next((k for k, v in value.items() if not isinstance(v, str)), "")
        path.append(key)
        try:
            value = value[key]
        except (KeyError, IndexError):
            break
    return tuple(path)


def _dotted(path: Path) -> str:
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif re.fullmatch(r"\w+", step):
            text += f".{step}"
        else:
            text += f"[{shown(step)}]"
    return text.removeprefix(".")


def _without_nulls(value: Any, keep: bool = False) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_nulls(item, keep=key in _STRING_MAPS) for key, item in value.items() if item is not None or keep
    }
