"""Extents of the backend array: who has which indices.

A freed extent is not handed out again at once: a packet may have read the frontend's old value and be about to read
the extent. `free` puts it aside, and `release` (called by the reconciler when the old values are long unreachable)
makes it available.
"""

from __future__ import annotations

from waggle.errors import TableFull


class ExtentAllocator:
    """Indices 0 … capacity-1 in runs. Allocation is exact in size; runs are merged when nothing else is left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._top = 0  # everything from here on was never handed out
        self._free: dict[int, list[int]] = {}  # size → offsets
        self._quarantine: list[tuple[int, int]] = []
        self.used = 0

    def allocate(self, size: int) -> int:
        """The first index of a run of `size`; 0 for size 0. TableFull when there is no such run."""
        if size == 0:
            return 0
        bin_ = self._free.get(size)
        if bin_:
            offset = bin_.pop()
        elif self._top + size <= self.capacity:
            offset = self._top
            self._top += size
        else:
            offset = self._from_merged(size)
        self.used += size
        return offset

    def free(self, offset: int, size: int) -> None:
        """Gives a run back; it becomes available with the next `release`."""
        if size:
            self._quarantine.append((offset, size))

    def release(self) -> None:
        """Makes everything freed so far available."""
        for offset, size in self._quarantine:
            self._free.setdefault(size, []).append(offset)
            self.used -= size
        self._quarantine.clear()

    @property
    def waiting(self) -> bool:
        """Whether something was freed and not yet released."""
        return bool(self._quarantine)

    def adopt(self, runs: set[tuple[int, int]]) -> None:
        """Starts from runs (offset, size) that are in use; they must not overlap and must fit."""
        at = 0
        self._free.clear()
        for offset, size in sorted(run for run in runs if run[1]):
            if offset < at or offset + size > self.capacity:
                raise ValueError(f"backend extents overlap or lie outside the table at index {offset}")
            if offset > at:
                self._free.setdefault(offset - at, []).append(at)
            at = offset + size
            self.used += size
        self._top = at

    def _from_merged(self, size: int) -> int:
        runs = sorted((offset, run) for run, offsets in self._free.items() for offset in offsets)
        if self._top < self.capacity:
            runs.append((self._top, self.capacity - self._top))
            self._top = self.capacity
        merged: list[list[int]] = []
        for offset, run in runs:
            if merged and merged[-1][0] + merged[-1][1] == offset:
                merged[-1][1] += run
            else:
                merged.append([offset, run])
        self._free.clear()
        found: int | None = None
        for offset, run in merged:
            start, length = offset, run
            if found is None and run >= size:
                found = offset
                start, length = offset + size, run - size
            if length:
                self._free.setdefault(length, []).append(start)
        if found is None:
            raise TableFull(
                f"backend table: no run of {size} free records (size {self.capacity}, {self.used} in use):"
                " raise max-backends"
            )
        return found
