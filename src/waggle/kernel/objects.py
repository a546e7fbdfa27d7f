"""Loads BPF objects: ELF, BTF and CO-RE are libbpf's (libbpf.so.1), everything after the load is raw bpf(2).

`BpfObject.open` reads an ELF; `configure` sets constants before the load; `resize` sets map sizes; `load` makes maps
(taking over those that are pinned and fit) and loads programs. A failed load raises LoadError with the verifier's log
and its last meaningful line as the summary.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from pathlib import Path

from waggle.errors import LoadError, MissingFeature
from waggle.kernel.maps import Map, open_pinned, unpin
from waggle.kernel.syscall import Fd

OBJECT_DIR = Path(__file__).resolve().parent.parent / "bpf"

_LOG_SIZE = 4 << 20
_PRINT_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_libc = ctypes.CDLL(None)


class _Libbpf:
    """libbpf.so.1 with the few functions used, typed. Its messages are kept in `messages` for error reports."""

    def __init__(self) -> None:
        try:
            self.lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        except OSError as error:
            raise MissingFeature("libbpf.so.1 is missing: install the package libbpf1 (Debian) or libbpf") from error
        self.messages: list[str] = []
        pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        signatures = {
            "bpf_object__open_file": (pointer, [text, pointer]),
            "bpf_object__load": (integer, [pointer]),
            "bpf_object__close": (None, [pointer]),
            "bpf_object__next_map": (pointer, [pointer, pointer]),
            "bpf_object__next_program": (pointer, [pointer, pointer]),
            "bpf_map__name": (text, [pointer]),
            "bpf_map__fd": (integer, [pointer]),
            "bpf_map__type": (integer, [pointer]),
            "bpf_map__key_size": (ctypes.c_uint32, [pointer]),
            "bpf_map__value_size": (ctypes.c_uint32, [pointer]),
            "bpf_map__max_entries": (ctypes.c_uint32, [pointer]),
            "bpf_map__set_max_entries": (integer, [pointer, ctypes.c_uint32]),
            "bpf_map__reuse_fd": (integer, [pointer, integer]),
            "bpf_map__initial_value": (pointer, [pointer, ctypes.POINTER(ctypes.c_size_t)]),
            "bpf_program__name": (text, [pointer]),
            "bpf_program__fd": (integer, [pointer]),
            "bpf_program__set_autoload": (integer, [pointer, ctypes.c_bool]),
            "bpf_program__set_log_buf": (integer, [pointer, pointer, ctypes.c_size_t]),
            "libbpf_set_print": (pointer, [_PRINT_CALLBACK]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self.lib, name)
            function.restype = result
            function.argtypes = arguments
        vsnprintf = _libc.vsnprintf
        vsnprintf.argtypes = [pointer, ctypes.c_size_t, text, pointer]

        def keep(level: int, fmt: bytes, args: int) -> int:
            if level <= 1:  # warnings and infos; debug is megabytes
                buffer = ctypes.create_string_buffer(16384)
                vsnprintf(buffer, len(buffer), fmt, args)
                self.messages.append(buffer.value.decode(errors="replace").rstrip())
            return 0

        self._keep = _PRINT_CALLBACK(keep)  # must outlive the library's use of it
        self.lib.libbpf_set_print(self._keep)


_loaded: list[_Libbpf] = []


def _libbpf() -> _Libbpf:
    if not _loaded:
        _loaded.append(_Libbpf())
    return _loaded[0]


class BpfObject:
    """One ELF object: first a specification that can be changed, after `load` kernel objects."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bpf = _libbpf()
        self._lib = self._bpf.lib
        self._bpf.messages.clear()
        if not path.exists():
            raise LoadError(f"{path} is missing: build it with `make -C bpf`")
        handle = self._lib.bpf_object__open_file(os.fsencode(path), None)
        if not handle:
            raise LoadError(f"{path.name}: not a BPF object: {self._last_message()}", log=self._messages())
        self._handle = handle
        self._maps = self._collect("map")
        self._programs = self._collect("program")
        self._wanted = set(self._programs)
        self.programs: dict[str, Fd] = {}
        self.maps: dict[str, Map] = {}

    @classmethod
    def open(cls, name: str) -> BpfObject:
        """The object shipped in the package under `name`, such as "pod"."""
        return cls(OBJECT_DIR / f"{name}.bpf.o")

    @property
    def map_names(self) -> list[str]:
        return [name for name in self._maps if not name.startswith(".")]

    @property
    def program_names(self) -> list[str]:
        return list(self._programs)

    def configure(self, layout: Mapping[str, tuple[int, int]], values: Mapping[str, bytes]) -> None:
        """Sets load-time constants. `layout` gives name → (offset, size) in .rodata; values are raw bytes."""
        rodata = next((m for name, m in self._maps.items() if name.endswith(".rodata")), None)
        if rodata is None:
            return
        size = ctypes.c_size_t()
        base = self._lib.bpf_map__initial_value(rodata, ctypes.byref(size))
        for name, (offset, length) in layout.items():
            value = values[name]
            if len(value) != length or offset + length > size.value:
                raise LoadError(f"{self.path.name}: constant {name} does not fit: rebuild with `make -C bpf`")
            ctypes.memmove(base + offset, value, length)

    def resize(self, name: str, entries: int) -> None:
        """Sets max_entries of a map; objects that do not have it are left alone."""
        if name in self._maps and self._lib.bpf_map__set_max_entries(self._maps[name], entries):
            raise LoadError(f"{self.path.name}: map {name} cannot have {entries} entries")

    def autoload(self, wanted: set[str]) -> None:
        """Loads only the programs in `wanted`."""
        self._wanted = wanted
        for name, program in self._programs.items():
            self._lib.bpf_program__set_autoload(program, name in wanted)

    def load(self, maps: Mapping[str, Map] | None = None) -> None:
        """Creates maps and loads programs. Maps in `maps` are used instead of new ones."""
        for name, taken in (maps or {}).items():
            failed = self._lib.bpf_map__reuse_fd(self._maps[name], taken.fd.number) if name in self._maps else 0
            if failed:
                reason = os.strerror(-failed)
                raise LoadError(f"{self.path.name}: cannot use the existing map {name}: {reason}", -failed)
        logs: dict[str, ctypes.Array[ctypes.c_char]] = {}
        result = self._lib.bpf_object__load(self._handle)
        if result:
            # again with room for the log: asking for it from the start makes every load slower
            self._reopen_with_logs(logs, maps or {})
            raise self._load_error(-result, logs)
        for name, program in self._programs.items():
            number = self._lib.bpf_program__fd(program)
            if number >= 0:
                self.programs[name] = Fd(os.dup(number))
        for name, handle in self._maps.items():
            number = self._lib.bpf_map__fd(handle)
            if number >= 0 and not name.startswith(".") and "." not in name:
                self.maps[name] = Map(Fd(os.dup(number)))

    def close(self) -> None:
        """Frees libbpf's side; descriptors handed out in `programs` and `maps` stay valid."""
        if self._handle:
            self._lib.bpf_object__close(self._handle)
            self._handle = None

    def __enter__(self) -> BpfObject:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def spec(self, name: str) -> tuple[int, int, int, int]:
        """(type, key size, value size, max entries) of a map before the load."""
        handle = self._maps[name]
        return (
            self._lib.bpf_map__type(handle),
            self._lib.bpf_map__key_size(handle),
            self._lib.bpf_map__value_size(handle),
            self._lib.bpf_map__max_entries(handle),
        )

    def _collect(self, kind: str) -> dict[str, int]:
        following = getattr(self._lib, f"bpf_object__next_{kind}")
        name_of = getattr(self._lib, f"bpf_{kind}__name")
        found: dict[str, int] = {}
        item = following(self._handle, None)
        while item:
            found[name_of(item).decode()] = item
            item = following(self._handle, item)
        return found

    def _reopen_with_logs(self, logs: dict[str, ctypes.Array[ctypes.c_char]], taken: Mapping[str, Map]) -> None:
        self._bpf.messages.clear()
        constants = {}
        for name, handle in self._maps.items():
            if name.endswith(".rodata"):
                size = ctypes.c_size_t()
                base = self._lib.bpf_map__initial_value(handle, ctypes.byref(size))
                constants[name] = ctypes.string_at(base, size.value) if base else b""
        sizes = {name: self._lib.bpf_map__max_entries(handle) for name, handle in self._maps.items()}
        self._lib.bpf_object__close(self._handle)
        self._handle = self._lib.bpf_object__open_file(os.fsencode(self.path), None)
        self._maps = self._collect("map")
        self._programs = self._collect("program")
        for name, handle in self._maps.items():
            if constants.get(name):
                base = self._lib.bpf_map__initial_value(handle, ctypes.byref(ctypes.c_size_t()))
                ctypes.memmove(base, constants[name], len(constants[name]))
            elif name in taken:
                self._lib.bpf_map__reuse_fd(handle, taken[name].fd.number)
            elif not name.startswith(".") and "." not in name:
                self._lib.bpf_map__set_max_entries(handle, sizes[name])
        self.autoload(self._wanted)
        for name, program in self._programs.items():
            logs[name] = ctypes.create_string_buffer(_LOG_SIZE)
            self._lib.bpf_program__set_log_buf(program, logs[name], _LOG_SIZE)
        self._lib.bpf_object__load(self._handle)

    def _load_error(self, number: int, logs: Mapping[str, ctypes.Array[ctypes.c_char]]) -> LoadError:
        parts = [f"--- {name}\n{log.value.decode(errors='replace')}" for name, log in logs.items() if log.value]
        failed = next((name for name in logs if any(f"prog '{name}'" in m for m in self._bpf.messages)), "")
        verifier = logs[failed].value.decode(errors="replace") if failed else ""
        summary = summarize_verifier_log(verifier) or self._last_message() or os.strerror(number)
        subject = f"{self.path.name}: {failed}" if failed else self.path.name
        return LoadError(
            f"{subject} did not load: {summary} ({os.strerror(number)})",
            number,
            "\n".join([*self._bpf.messages, *parts]),
        )

    def _messages(self) -> str:
        return "\n".join(self._bpf.messages)

    def _last_message(self) -> str:
        return self._bpf.messages[-1].removeprefix("libbpf: ") if self._bpf.messages else ""


_STATE_LINE = re.compile(r"^(\d+: |;|R\d|from |processed |arg#|verification time|stack depth|mark_precise|\s*$)")


def summarize_verifier_log(log: str) -> str:
    """The line of a verifier log that says what is wrong: the last one that is neither state nor statistics."""
    for line in reversed(log.splitlines()):
        if not _STATE_LINE.match(line):
            return line.strip()
    return ""


def load_pinned(bpf: BpfObject, pin_dir: Path, sizes: Mapping[str, int]) -> dict[str, Map]:
    """Loads `bpf` with its maps pinned in `pin_dir`, taking over those that are there.

    A pinned map whose size or layout differs from what this version wants is replaced: a new one is made, entries are
    moved when their layout is the same, and the pin is switched. Returns all maps by name.
    """
    for name, entries in sizes.items():
        bpf.resize(name, entries)
    taken: dict[str, Map] = {}
    moving: dict[str, Map] = {}
    for name in bpf.map_names:
        if "." in name:
            continue
        existing = open_pinned(pin_dir / name)
        if existing is None:
            continue
        kind, key_size, value_size, entries = bpf.spec(name)
        info = existing.info
        if (info.type, info.key_size, info.value_size, info.max_entries) == (kind, key_size, value_size, entries):
            taken[name] = existing
        else:
            moving[name] = existing
    bpf.load(taken)
    for name, new in bpf.maps.items():
        old = moving.get(name)
        if old is not None:
            _move_entries(old, new)
        if name not in taken:
            _switch_pin(new, pin_dir / name)
    return dict(bpf.maps)


def _switch_pin(new: Map, pin: Path) -> None:
    """Puts a map in place of the one that is pinned, or of what is no map: at no moment is the name without one."""
    scratch = pin.with_name(f"{pin.name}-new")
    unpin(scratch)  # left by a loader that was killed
    new.pin(scratch)
    if pin.is_dir() and not pin.is_symlink():
        unpin(pin)
    scratch.rename(pin)


def _move_entries(old: Map, new: Map) -> None:
    """Copies entries when both maps have the same layout; otherwise the agent fills the new map from its plan."""
    same = (old.info.key_size, old.info.value_size, old.info.type) == (
        new.info.key_size,
        new.info.value_size,
        new.info.type,
    )
    if not same or old.key_size == 0 or new.name.startswith("wag_sk_"):
        return
    new.update_many(old.dump()[: new.info.max_entries])
