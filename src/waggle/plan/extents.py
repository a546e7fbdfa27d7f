"""Extents of the backend array: who has which indices.

A freed extent is not handed out again at once: a frontend may still lead to it, or a packet may have read the
frontend's old value and be about to read the extent. `free` puts it aside, `retire` says that no frontend leads there
any more, and `release` (called by the reconciler when no packet can hold an old value) makes it available.
"""

from __future__ import annotations

from waggle.errors import TableFull


class ExtentAllocator:
    """Indices 0 … capacity-1 in runs. Allocation is exact in size; runs are merged when nothing else is left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._top = 0  # everything from here on was never handed out
        self._free: dict[int, list[int]] = {}  # size → offsets
        self._freed: list[tuple[int, int]] = []  # a frontend may still lead there
        self._retired: list[tuple[int, list[tuple[int, int]]]] = []  # only packets on their way may: ticket → runs
        self._ticket = 0
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
        """Gives a run back; it becomes available after `retire` and `release`."""
        if size:
            self._freed.append((offset, size))

    def give_back(self, offset: int, size: int) -> None:
        """Gives a run back that nothing ever led to: it is available at once."""
        if size:
            self._free.setdefault(size, []).append(offset)
            self.used -= size

    def retire(self) -> int:
        """No frontend leads to what was freed so far. Returns the ticket to `release` it with; 0 when it is nothing."""
        if not self._freed:
            return 0
        self._ticket += 1
        self._retired.append((self._ticket, self._freed))
        self._freed = []
        return self._ticket

    def release(self, ticket: int | None = None) -> None:
        """Makes what was retired with `ticket` or before available; everything retired without one."""
        while self._retired and (ticket is None or self._retired[0][0] <= ticket):
            for offset, size in self._retired.pop(0)[1]:
                self.give_back(offset, size)

    @property
    def waiting(self) -> bool:
        """Whether something was retired and not yet released."""
        return bool(self._retired)

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
