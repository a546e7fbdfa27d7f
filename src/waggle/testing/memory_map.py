"""A map without a kernel: the methods of `waggle.kernel.maps.Map` on a dict.

Behaves as the kernel does where it matters to writers of maps: a hash refuses new keys when it is full (and takes new
values for those it has), an array has all its indices from the start and loses none, a batch is not atomic. `on_write`
is called after each single entry that is written or removed, so that a test sees every state a packet could see;
`fail_after` makes the write after so many fail, as the kernel does when it is out of memory.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from waggle.errors import KernelError, TableFull
from waggle.kernel.maps import ARRAY, HASH, Map, MapInfo
from waggle.kernel.syscall import BPF_ANY


class MemoryMap(Map):
    """A hash or an array in memory. Keys of an array are four bytes in host byte order."""

    def __init__(self, kind: int, key_size: int, value_size: int, max_entries: int, name: str = "memory") -> None:
        if kind not in (HASH, ARRAY):
            raise ValueError(f"only hash and array, not {kind}")
        self.info = MapInfo(kind, 0, key_size, value_size, max_entries, 0, name)
        self.name = name
        self.key_size = key_size
        self.value_size = value_size
        self.on_write: Callable[[], None] = lambda: None
        self.fail_after: int | None = None
        self.writes = 0
        self._entries: dict[bytes, bytes] = {}

    def pin(self, path: Path) -> None:
        raise KernelError(f"map {self.name} is not in the kernel: it cannot be pinned", errno.EINVAL)

    def close(self) -> None:
        """Nothing to free."""

    # -- one entry ----------------------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> bytes | None:
        self._check(key)
        if self.info.type == ARRAY:
            return self._entries.get(key, bytes(self.value_size)) if self._index(key) is not None else None
        return self._entries.get(key)

    def update(self, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
        self._check(key)
        if len(value) != self.value_size:
            raise ValueError(f"map {self.name}: value of {len(value)} bytes, not {self.value_size}")
        if flags != BPF_ANY:
            raise ValueError("only BPF_ANY")
        full = len(self._entries) >= self.info.max_entries and key not in self._entries
        if self._index(key) is None if self.info.type == ARRAY else full:
            raise TableFull(f"map {self.name}: update: Argument list too long", errno.E2BIG)
        self._count_write()
        self._entries[key] = value
        self.on_write()

    def delete(self, key: bytes) -> bool:
        self._check(key)
        if self.info.type == ARRAY:
            raise KernelError(f"map {self.name}: delete: Invalid argument", errno.EINVAL)
        if key not in self._entries:
            return False
        self._count_write()
        del self._entries[key]
        self.on_write()
        return True

    # -- many entries -------------------------------------------------------------------------------------------

    def update_many(self, entries: Iterable[tuple[bytes, bytes]]) -> int:
        pairs = list(entries)
        for key, value in pairs:
            self.update(key, value)
        return len(pairs)

    def update_packed(self, keys: bytes, values: bytes, count: int) -> None:
        if len(keys) != count * self.key_size or len(values) != count * self.value_size:
            raise ValueError(f"map {self.name}: batch of {count} has {len(keys)}+{len(values)} bytes")
        for i in range(count):
            self.update(
                keys[i * self.key_size : (i + 1) * self.key_size],
                values[i * self.value_size : (i + 1) * self.value_size],
            )

    def delete_many(self, keys: Iterable[bytes]) -> int:
        return sum(self.delete(key) for key in list(keys))

    def dump(self) -> list[tuple[bytes, bytes]]:
        return [(key, self._entries.get(key, bytes(self.value_size))) for key in self.keys()]

    def batches(self, size: int) -> Iterator[list[tuple[bytes, bytes]]]:
        entries = self.dump()
        return (entries[start : start + size] for start in range(0, len(entries), size))

    def keys(self) -> Iterator[bytes]:
        if self.info.type == ARRAY:
            return (index.to_bytes(4, sys.byteorder) for index in range(self.info.max_entries))
        return iter(list(self._entries))

    def read_array(self, start: int, count: int) -> bytes:
        if start + count > self.info.max_entries:
            raise KernelError(f"map {self.name}: {self.info.max_entries - start} of {count} values at {start}")
        zero = bytes(self.value_size)
        return b"".join(self._entries.get(i.to_bytes(4, sys.byteorder), zero) for i in range(start, start + count))

    def memory_bytes(self) -> int:
        return len(self._entries) * (self.key_size + self.value_size)

    def _check(self, key: bytes) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"map {self.name}: key of {len(key)} bytes, not {self.key_size}")

    def _index(self, key: bytes) -> int | None:
        index = int.from_bytes(key, sys.byteorder)
        return index if index < self.info.max_entries else None

    def _count_write(self) -> None:
        if self.fail_after is not None and self.writes >= self.fail_after:
            raise KernelError(f"map {self.name}: Cannot allocate memory", errno.ENOMEM)
        self.writes += 1
