"""BPF maps as bytes: single operations, batches, dumps, pins.

A map here knows its kernel type, key and value size; what the bytes mean is the business of waggle.abi. Values of
per-CPU maps are one `value_size` (rounded up to 8) per possible CPU, in CPU order.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from waggle.errors import KernelError, NotFound
from waggle.kernel import syscall
from waggle.kernel.syscall import Fd, attr_of, bpf, bpf_raw

HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LPM_TRIE, SK_STORAGE, RINGBUF = 1, 2, 5, 6, 9, 11, 24, 27
_PERCPU = (PERCPU_HASH, PERCPU_ARRAY)
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says of a map (struct bpf_map_info)."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str


def map_info(fd: int) -> MapInfo:
    """Reads struct bpf_map_info."""
    raw = syscall.obj_info(fd, 88)
    kind, number, key, value, entries, flags = struct.unpack_from("=6I", raw)
    return MapInfo(kind, number, key, value, entries, flags, raw[24:40].split(b"\0", 1)[0].decode())


def possible_cpus() -> int:
    """How many values a per-CPU map holds per key."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(text.replace(",", "-").rsplit("-", 1)[-1]) + 1


class Map:
    """One BPF map, owned through a file descriptor."""

    def __init__(self, fd: Fd) -> None:
        self.fd = fd
        self.info = map_info(fd.number)
        self.name = self.info.name
        self.key_size = self.info.key_size
        size = self.info.value_size
        self.value_size = (size + 7) // 8 * 8 * possible_cpus() if self.info.type in _PERCPU else size
        self._lock = threading.Lock()  # of the buffers below, which single operations share
        self._key = ctypes.create_string_buffer(max(self.key_size, 1))
        self._value = ctypes.create_string_buffer(max(self.value_size, 1))
        self._attr = attr_of("IIQQQ", fd.number, 0, ctypes.addressof(self._key), ctypes.addressof(self._value), 0)
        self._delete_attr = attr_of("IIQ", fd.number, 0, ctypes.addressof(self._key))

    @classmethod
    def pinned(cls, path: Path) -> Map:
        """The map pinned at `path`; NotFound when there is none."""
        return cls(syscall.obj_get(path))

    @classmethod
    def create(cls, kind: int, key_size: int, value_size: int, max_entries: int, name: str, flags: int = 0) -> Map:
        """A new map without BTF: for tests and for moving entries."""
        attr = attr_of("IIIIIII", kind, key_size, value_size, max_entries, flags, 0, 0, size=72)
        ctypes.memmove(ctypes.addressof(attr) + 28, name.encode()[:15], len(name.encode()[:15]))
        return cls(Fd(bpf(syscall.MAP_CREATE, attr, f"create map {name}")))

    def pin(self, path: Path) -> None:
        """Pins the map, so that it outlives this process."""
        syscall.obj_pin(self.fd.number, path)

    def close(self) -> None:
        self.fd.close()

    # -- one entry ----------------------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> bytes | None:
        """The value, or None where there is no such key."""
        with self._lock:
            self._set_key(key)
            result, number = bpf_raw(syscall.MAP_LOOKUP_ELEM, self._attr)
            if result >= 0:
                return self._value.raw[: self.value_size]
        if number != errno.ENOENT:
            syscall.raise_errno(number, f"map {self.name}: lookup")
        return None

    def update(self, key: bytes, value: bytes, flags: int = syscall.BPF_ANY) -> None:
        """Writes one entry. TableFull when the map has no room."""
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name}: value of {len(value)} bytes, not {self.value_size}")
        attr = self._attr
        with self._lock:
            self._set_key(key)
            ctypes.memmove(self._value, value, len(value))
            struct.pack_into("=Q", attr, 24, flags)
            result, number = bpf_raw(syscall.MAP_UPDATE_ELEM, attr)
            struct.pack_into("=Q", attr, 24, 0)
        if result < 0:
            syscall.raise_errno(number, f"map {self.name}: update")

    def delete(self, key: bytes) -> bool:
        """Removes one entry; False where there was none."""
        with self._lock:
            self._set_key(key)
            result, number = bpf_raw(syscall.MAP_DELETE_ELEM, self._delete_attr)
        if result < 0:
            if number == errno.ENOENT:
                return False
            syscall.raise_errno(number, f"map {self.name}: delete")
        return True

    def _set_key(self, key: bytes) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: key of {len(key)} bytes, not {self.key_size}")
        ctypes.memmove(self._key, key, self.key_size)

    # -- many entries -------------------------------------------------------------------------------------------

    def update_many(self, entries: Iterable[tuple[bytes, bytes]]) -> int:
        """Writes entries in batches of one system call each; how many. TableFull names the map."""
        pairs = list(entries)
        for start in range(0, len(pairs), _BATCH):
            part = pairs[start : start + _BATCH]
            self.update_packed(b"".join(k for k, _ in part), b"".join(v for _, v in part), len(part))
        return len(pairs)

    def update_packed(self, keys: bytes, values: bytes, count: int) -> None:
        """Writes `count` entries that are packed back to back, in one system call."""
        if len(keys) != count * self.key_size or len(values) != count * self.value_size:
            raise ValueError(f"map {self.name}: batch of {count} has {len(keys)}+{len(values)} bytes")
        key_buffer = ctypes.create_string_buffer(keys, len(keys))
        value_buffer = ctypes.create_string_buffer(values, len(values))
        attr = attr_of(
            "QQQQIIQQ", 0, 0, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), count, self.fd.number, 0, 0
        )
        bpf(syscall.MAP_UPDATE_BATCH, attr, f"map {self.name} (size {self.info.max_entries}): write {count} entries")

    def delete_many(self, keys: Iterable[bytes]) -> int:
        """Removes keys; those that are gone already are passed over. How many were removed."""
        todo = list(keys)
        removed = 0
        while todo:
            part, todo = todo[:_BATCH], todo[_BATCH:]
            buffer = ctypes.create_string_buffer(b"".join(part), len(part) * self.key_size)
            attr = attr_of("QQQQIIQQ", 0, 0, ctypes.addressof(buffer), 0, len(part), self.fd.number, 0, 0)
            result, number = bpf_raw(syscall.MAP_DELETE_BATCH, attr)
            if result >= 0:
                removed += len(part)
                continue
            done = struct.unpack_from("=I", attr, 32)[0] if number != errno.EFAULT else 0
            if number != errno.ENOENT:
                syscall.raise_errno(number, f"map {self.name}: delete {len(part)} entries")
            # the batch stops at the first key that is not there; where one is missing many may be: one by one is linear
            removed += done + sum(self.delete(key) for key in part[done + 1 :])
        return removed

    def dump(self) -> list[tuple[bytes, bytes]]:
        """All entries. Entries that change meanwhile may or may not be seen; none is seen twice in a plain hash."""
        if self.info.type == ARRAY or self.info.type in (HASH, LRU_HASH):
            return list(self._dump_batched())
        return list(self._dump_singly())

    def _dump_batched(self) -> Iterator[tuple[bytes, bytes]]:
        for batch in self.batches(min(max(self.info.max_entries, 64), 16384)):
            yield from batch

    def batches(self, size: int) -> Iterator[list[tuple[bytes, bytes]]]:
        """All entries of a hash or array, in parts of about `size`: one system call each. As of `dump`."""
        token = ctypes.create_string_buffer(max(self.key_size, 8))
        first = True
        while True:
            keys = ctypes.create_string_buffer(size * self.key_size)
            values = ctypes.create_string_buffer(size * self.value_size)
            attr = attr_of(
                "QQQQIIQQ",
                0 if first else ctypes.addressof(token),
                ctypes.addressof(token),
                ctypes.addressof(keys),
                ctypes.addressof(values),
                size,
                self.fd.number,
                0,
                0,
            )
            result, number = bpf_raw(syscall.MAP_LOOKUP_BATCH, attr)
            if result < 0 and number == errno.ENOSPC:
                size *= 2  # one bucket holds more than the buffers do
                continue
            if result < 0 and number != errno.ENOENT:
                syscall.raise_errno(number, f"map {self.name}: dump")
            count = struct.unpack_from("=I", attr, 32)[0]
            raw_keys, raw_values = keys.raw, values.raw
            yield [
                (
                    raw_keys[i * self.key_size : (i + 1) * self.key_size],
                    raw_values[i * self.value_size : (i + 1) * self.value_size],
                )
                for i in range(count)
            ]
            if result < 0:
                return
            first = False

    def keys(self) -> Iterator[bytes]:
        """Keys one by one (get_next_key)."""
        key = ctypes.create_string_buffer(max(self.key_size, 1))
        following = ctypes.create_string_buffer(max(self.key_size, 1))
        attr = attr_of("IIQQQ", self.fd.number, 0, 0, ctypes.addressof(following), 0)
        while True:
            result, number = bpf_raw(syscall.MAP_GET_NEXT_KEY, attr)
            if result < 0:
                if number == errno.ENOENT:
                    return
                syscall.raise_errno(number, f"map {self.name}: next key")
            yield following.raw[: self.key_size]
            ctypes.memmove(key, following, self.key_size)
            attr = attr_of("IIQQQ", self.fd.number, 0, ctypes.addressof(key), ctypes.addressof(following), 0)

    def _dump_singly(self) -> Iterator[tuple[bytes, bytes]]:
        for key in self.keys():
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def read_array(self, start: int, count: int) -> bytes:
        """`count` values of an array map from index `start`, back to back."""
        if count == 0:
            return b""
        keys = ctypes.create_string_buffer(count * self.key_size)
        values = ctypes.create_string_buffer(count * self.value_size)
        # the token of an array map is the last index read
        before = ctypes.create_string_buffer(struct.pack("=I", (start - 1) & 0xFFFFFFFF), 8)
        after = ctypes.create_string_buffer(8)
        attr = attr_of(
            "QQQQIIQQ",
            ctypes.addressof(before) if start else 0,
            ctypes.addressof(after),
            ctypes.addressof(keys),
            ctypes.addressof(values),
            count,
            self.fd.number,
            0,
            0,
        )
        result, number = bpf_raw(syscall.MAP_LOOKUP_BATCH, attr)
        if result < 0 and number != errno.ENOENT:
            syscall.raise_errno(number, f"map {self.name}: read {count} values at {start}")
        got = struct.unpack_from("=I", attr, 32)[0]
        if got != count:
            raise KernelError(f"map {self.name}: {got} of {count} values at {start}")
        return values.raw

    def memory_bytes(self) -> int:
        """Memory the kernel charges for the map (fdinfo's memlock)."""
        text = Path(f"/proc/self/fdinfo/{self.fd.number}").read_text()
        for line in text.splitlines():
            if line.startswith("memlock:"):
                return int(line.split()[1])
        return 0


def unpin(path: Path) -> bool:
    """Removes a pin, or what stands in its place: a symbolic link, an empty directory. False where there was none."""
    try:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise KernelError(f"unpin {path}: {error.strerror}", error.errno or 0) from error
    return True


def program_at_work(link: Path) -> int:
    """The id of the program behind a pinned link; 0: there is none, or it goes away."""
    try:
        with syscall.obj_get(link) as fd:
            return syscall.link_prog_id(fd.number)
    except KernelError:
        return 0


def map_of_program(program: int, name: str) -> Map | None:
    """The map with a name that the program with an id uses; None where one of them is not there."""
    try:
        with syscall.prog_fd_by_id(program) as fd:
            for number in syscall.prog_map_ids(fd.number):
                found = Map(syscall.map_fd_by_id(number))
                if found.name == name:
                    return found
    except KernelError:
        pass  # it is none of ours, or goes away
    return None


def open_pinned(path: Path) -> Map | None:
    """The map pinned at `path`, or None: nothing is there, or a directory."""
    try:
        return Map.pinned(path)
    except NotFound:
        return None
    except KernelError as error:
        if error.errno != errno.EISDIR:
            raise
        return None
