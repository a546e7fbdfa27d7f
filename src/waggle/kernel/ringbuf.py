"""The consumer side of a BPF ring buffer (Documentation/bpf/ringbuf.rst): mmap, positions, records.

The programs never wake us (BPF_RB_NO_WAKEUP): call `read` as often as events shall be fresh.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator

from waggle.kernel.maps import Map

_BUSY = 1 << 31
_DISCARD = 1 << 30
_HEADER = 8


class RingBuffer:
    """Reads records of one BPF_MAP_TYPE_RINGBUF map. One reader per map."""

    def __init__(self, ring: Map) -> None:
        self.size = ring.info.max_entries
        page = mmap.PAGESIZE
        fd = ring.fd.number
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0)
        # producer position page, then the data twice, so that a record never wraps
        self._producer = mmap.mmap(fd, page + 2 * self.size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._data = memoryview(self._producer)[page:]

    def read(self, limit: int = 65536) -> Iterator[bytes]:
        """The records that are complete now, at most `limit`."""
        position = struct.unpack_from("=Q", self._consumer)[0]
        end = struct.unpack_from("=Q", self._producer)[0]
        while position < end and limit:
            at = position & (self.size - 1)
            header = struct.unpack_from("=I", self._data, at)[0]
            if header & _BUSY:
                break
            length = header & ~(_BUSY | _DISCARD)
            record = bytes(self._data[at + _HEADER : at + _HEADER + length]) if not header & _DISCARD else None
            position += (length + _HEADER + 7) // 8 * 8
            struct.pack_into("=Q", self._consumer, 0, position)
            if record is not None:
                limit -= 1
                yield record

    def skip(self) -> None:
        """Throws away everything that is waiting."""
        for _ in self.read(1 << 30):
            pass

    def close(self) -> None:
        self._data.release()
        self._producer.close()
        self._consumer.close()
