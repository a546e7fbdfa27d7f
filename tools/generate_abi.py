"""Writes src/waggle/abi/_generated.py: the Python side of every struct, enum, map and constant of the BPF programs.

Reads the BTF (Documentation/bpf/btf.rst in the kernel tree) of bpf/build/abi.o and the symbol tables of the shipped
objects. `--check` writes nothing and exits with 1 when the file is stale.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "src/waggle/abi/_generated.py"
OBJECTS = ("socket", "pod", "node", "xdp", "sweep")

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)


@dataclass
class Type:
    """One BTF type."""

    kind: int
    name: str
    size_or_type: int
    members: list[tuple[str, int, int]] = field(default_factory=list)  # (name, type id or value, bit offset)
    element: int = 0
    count: int = 0
    signed: bool = False


class Elf:
    """The few parts of a little-endian ELF64 that are needed: sections and symbols."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_bytes()
        offset, count, names = struct.unpack_from("<Q", self.raw, 40)[0], *struct.unpack_from("<HH", self.raw, 60)
        headers = [struct.unpack_from("<IIQQQQIIQQ", self.raw, offset + 64 * i) for i in range(count)]
        strings = self._bytes(headers[names])
        self.names = [self._text(strings, h[0]) for h in headers]
        self.headers = headers

    def section(self, name: str) -> bytes:
        return self._bytes(self.headers[self.names.index(name)])

    def symbols(self, section: str) -> dict[str, tuple[int, int]]:
        """name → (offset, size) of the symbols in a section."""
        table = self.headers[self.names.index(".symtab")]
        strings = self._bytes(self.headers[table[6]])
        wanted = self.names.index(section)
        raw = self._bytes(table)
        found = {}
        for at in range(0, len(raw), 24):
            name, _info, _other, index, value, size = struct.unpack_from("<IBBHQQ", raw, at)
            if index == wanted and name and size:
                found[self._text(strings, name)] = (value, size)
        return found

    def _bytes(self, header: tuple[int, ...]) -> bytes:
        return self.raw[header[4] : header[4] + header[5]]

    @staticmethod
    def _text(strings: bytes, at: int) -> str:
        return strings[at : strings.index(b"\0", at)].decode()


class Btf:
    """All types of one .BTF section, by id."""

    def __init__(self, raw: bytes) -> None:
        header, type_off, type_len, str_off, _str_len = struct.unpack_from("<IIIII", raw, 4)
        strings = raw[header + str_off :]
        self.types: list[Type] = [Type(0, "void", 0)]
        self.tags: dict[int, str] = {}
        at, end = header + type_off, header + type_off + type_len
        while at < end:
            name_off, info, size = struct.unpack_from("<III", raw, at)
            at += 12
            kind, count, flag = info >> 24 & 0x1F, info & 0xFFFF, info >> 31
            item = Type(kind, self._text(strings, name_off), size)
            if kind == INT:
                item.signed = bool(struct.unpack_from("<I", raw, at)[0] >> 24 & 1)  # BTF_INT_SIGNED
                at += 4
            elif kind == VAR:
                at += 4
            elif kind == ARRAY:
                item.element, _, item.count = struct.unpack_from("<III", raw, at)
                at += 12
            elif kind in (STRUCT, UNION):
                for _ in range(count):
                    member, member_type, offset = struct.unpack_from("<III", raw, at)
                    item.members.append(
                        (self._text(strings, member), member_type, offset & 0xFFFFFF if flag else offset)
                    )
                    at += 12
            elif kind == ENUM:
                for _ in range(count):
                    member, value = struct.unpack_from("<Ii", raw, at)
                    item.members.append((self._text(strings, member), value, 0))
                    at += 8
            elif kind == FUNC_PROTO:
                at += 8 * count
            elif kind == DATASEC:
                for _ in range(count):
                    item.members.append(("", struct.unpack_from("<I", raw, at)[0], 0))
                    at += 12
            elif kind == DECL_TAG:
                at += 4
                self.tags[size] = item.name
            elif kind == ENUM64:
                at += 12 * count
            self.types.append(item)

    @staticmethod
    def _text(strings: bytes, at: int) -> str:
        return strings[at : strings.index(b"\0", at)].decode()

    def resolve(self, number: int) -> tuple[Type, list[str]]:
        """The type behind typedefs and qualifiers, and the typedef names passed on the way."""
        names = []
        item = self.types[number]
        while item.kind in (TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG):
            if item.kind == TYPEDEF:
                names.append(item.name)
            item = self.types[item.size_or_type]
        return item, names

    def named(self, kind: int, name: str) -> Type:
        return next(t for t in self.types if t.kind == kind and t.name == name)


_CLASH = "  # type: ignore[assignment]  # tuple has a method of this name"


def python_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.removeprefix("wag_").split("_"))


@dataclass
class Field:
    """One member of a struct: its Python type, its format and how values are converted."""

    name: str
    annotation: str
    format: str
    pack: str
    unpack: str
    slots: int = 1


class Writer:
    """Collects what the maps reach and prints it."""

    def __init__(self, btf: Btf) -> None:
        self.btf = btf
        self.done: dict[str, str] = {}
        self.formats: dict[str, tuple[str, int]] = {}

    def field(self, name: str, number: int) -> Field:
        item, names = self.btf.resolve(number)
        if item.kind == STRUCT and item.name == "wag_addr":
            return Field(name, "bytes", "16s", f"self.{name}", "{0}")
        if item.kind == STRUCT and item.name.startswith("bpf_"):  # the kernel's own, such as a timer
            return Field(name, "bytes", f"{item.size_or_type}s", f"self.{name}", "{0}")
        if item.kind == STRUCT:
            inner = self.struct(item)
            layout, slots = self.formats[inner]
            return Field(name, inner, layout, f"*self.{name}.values()", inner + ".of({})", slots)
        if item.kind == ARRAY:
            element, _ = self.btf.resolve(item.element)
            if element.kind == STRUCT:  # whoever reads it unpacks one after another
                self.struct(element)
            elif element.kind != INT:
                raise SystemExit(f"{name}: only arrays of numbers and structs are supported, which are bytes in Python")
            return Field(name, "bytes", f"{item.count * element.size_or_type}s", f"self.{name}", "{0}")
        code = {1: "B", 2: "H", 4: "I", 8: "Q"}[item.size_or_type]
        if item.signed:
            code = code.lower()
        if "__be16" in names:
            return Field(name, "int", code, f"_swap16(self.{name})", "_swap16({0})")
        if any(n.startswith("__be") for n in names):
            raise SystemExit(f"{name}: big-endian fields other than __be16 are not supported")
        return Field(name, "int", code, f"self.{name}", "{0}")

    def struct(self, item: Type) -> str:
        name = python_name(item.name)
        if name in self.done:
            return name
        fields: list[Field] = []
        layout, at = "", 0
        for member, number, bits in item.members:
            if bits // 8 != at:
                raise SystemExit(f"struct {item.name}: hidden padding before {member}: make it explicit")
            made = self.field(member, number)
            size = struct.calcsize("=" + made.format)
            at += size
            if member.startswith("pad"):
                layout += f"{size}x"
            else:
                layout += made.format
                fields.append(made)
        if at != item.size_or_type:
            raise SystemExit(f"struct {item.name}: hidden padding at the end: make it explicit")
        self.formats[name] = (layout, sum(f.slots for f in fields))
        constant = "_" + item.name.removeprefix("wag_").upper()
        lines = [f"{constant[1:]}_SIZE = {item.size_or_type}", f'{constant} = Struct("={layout}")', "", ""]
        lines += [f"class {name}(NamedTuple):"]
        lines += [f'    """struct {item.name}: {item.size_or_type} bytes."""', ""]
        lines += [f"    {f.name}: {f.annotation}{_CLASH if f.name in ('count', 'index') else ''}" for f in fields]
        packed = ", ".join(f.pack for f in fields)
        lines += ["", "    def values(self) -> tuple[Any, ...]:", f"        return ({packed},)"]
        lines += ["", "    def pack(self) -> bytes:", f"        return {constant}.pack({packed})"]
        slot, parts = 0, []
        for f in fields:
            arguments = ", ".join(f"v[{slot + i}]" for i in range(f.slots))
            parts.append(f.unpack.format(arguments))
            slot += f.slots
        lines += [
            "",
            "    @classmethod",
            f"    def of(cls, *v: Any) -> {name}:",
            f"        return cls({', '.join(parts)})",
        ]
        lines += ["", "    @classmethod", f"    def unpack(cls, raw: bytes) -> {name}:"]
        lines += [f"        return cls.of(*{constant}.unpack(raw))", "", ""]
        self.done[name] = "\n".join(lines)
        return name

    def enum(self, item: Type) -> str:
        prefix = item.name.upper().removesuffix("_KIND").removesuffix("_FLAG") + "_"
        base = "IntFlag" if item.name.endswith("_flag") else "IntEnum"
        lines = [f"class {python_name(item.name)}({base}):", f'    """enum {item.name}."""', ""]
        for member, value, _ in item.members:
            short = member
            for candidate in (prefix, "WAG_"):
                if member.startswith(candidate):
                    short = member.removeprefix(candidate)
                    break
            lines.append(f"    {short} = {value}")
        return "\n".join([*lines, "", ""])

    def maps(self) -> list[str]:
        section = next(t for t in self.btf.types if t.kind == DATASEC and t.name == ".maps")
        rows = []
        for _, number, _ in section.members:
            variable = self.btf.types[number]
            definition, _ = self.btf.resolve(variable.size_or_type)
            sides = {}
            for member, pointer, _ in definition.members:
                if member in ("key", "value"):
                    target, _ = self.btf.resolve(self.btf.resolve(pointer)[0].size_or_type)
                    if target.kind == STRUCT and target.name != "wag_addr":
                        sides[member] = self.struct(target)
                    elif target.kind == STRUCT:
                        sides[member] = "Address"
                    else:
                        sides[member] = f"U{target.size_or_type * 8}"
            rows.append((variable.name, sides.get("key"), sides.get("value")))
        lines = [
            "#: map → (type of the key, type of the value); None where the map has none",
            "MAPS: dict[str, tuple[Any, Any]] = {",
        ]
        lines += [f'    "{name}": ({key}, {value}),' for name, key, value in sorted(rows)]
        return [*lines, "}", ""]


def config_lines(btf: Btf) -> list[str]:
    described = {
        btf.types[number].name: text.removeprefix("config: ")
        for number, text in btf.tags.items()
        if text.startswith("config: ")
    }
    lines = ["#: load-time constant → what it means", "CONFIG: dict[str, str] = {"]
    lines += [f"    {name!r}: {text!r}," for name, text in sorted(described.items())]
    lines += ["}", "", "#: object → load-time constant → (offset, size) in .rodata"]
    lines.append("CONFIG_LAYOUT: dict[str, dict[str, tuple[int, int]]] = {")
    for name in OBJECTS:
        elf = Elf(ROOT / f"src/waggle/bpf/{name}.bpf.o")
        symbols = elf.symbols(".rodata") if ".rodata" in elf.names else {}
        row = {k: v for k, v in sorted(symbols.items()) if k in described}
        lines.append(f"    {name!r}: {row!r},")
    return [*lines, "}", ""]


HEADER = '''"""What BPF programs and agent share. Generated from BTF by tools/generate_abi.py; do not edit."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, NamedTuple


class Address:
    """struct wag_addr: 16 bytes, IPv4 as ::ffff:a.b.c.d. Plain bytes in Python."""


class U32:
    """A 32-bit number in host byte order."""


class U64:
    """A 64-bit number in host byte order."""


def _swap16(port: int) -> int:
    return (port & 0xFF) << 8 | port >> 8


'''


def generate() -> str:
    btf = Btf(Elf(ROOT / "bpf/build/abi.o").section(".BTF"))
    writer = Writer(btf)
    abi = btf.named(STRUCT, "wag_abi")
    enums = []
    for _, number, _ in abi.members:
        item, _ = btf.resolve(number)
        if item.kind == STRUCT:
            writer.struct(item)
        elif item.kind == ENUM:
            enums.append(writer.enum(item))
    maps = writer.maps()
    text = HEADER + "\n".join(enums) + "\n" + "\n".join(writer.done.values())
    text += "\n".join(maps) + "\n" + "\n".join(config_lines(btf))
    return subprocess.run(
        [sys.executable, "-m", "ruff", "format", "-q", "--stdin-filename", str(OUTPUT), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is up to date")
    check = parser.parse_args().check
    text = generate()
    if check:
        if OUTPUT.read_text() == text:
            return 0
        print(f"{OUTPUT.relative_to(ROOT)} is stale: run `make abi`", file=sys.stderr)
        return 1
    OUTPUT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
