"""Brings the frontend and backend tables to what the plan says, with as few writes as that takes.

Order of every flush: new extents of backends, then frontend values, then deletes, then (a moment later) old extents
become free. A packet therefore sees the old set of a Service or the new one. After a restart the tables are read back
(`adopt`): what is there and right is not written again, and nothing is removed before `complete` says that the plan
knows everything. A flush that fails half-way is done again, whole, by the next one. Services for which a table had no
room are `starved`: apply them again when something was deleted or settled.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from waggle.abi._generated import BACKEND_SIZE
from waggle.abi._generated import Service as ServiceValue
from waggle.errors import TableFull
from waggle.kernel.maps import Map
from waggle.model.objects import ObjectKey
from waggle.plan.extents import ExtentAllocator
from waggle.plan.services import ServiceRow

#: stands for the backends of an adopted frontend whose extent makes no sense: equal to no set, and no record long
_UNREADABLE = b"?"


@dataclass(slots=True)
class _Extent:
    """Backends in the array, shared by `users` frontends. `seen`: a frontend in the map leads, or led, here."""

    offset: int
    backends: bytes
    revision: int
    users: int = 0
    seen: bool = False

    @property
    def count(self) -> int:
        return len(self.backends) // BACKEND_SIZE


@dataclass(slots=True)
class Flush:
    """What one flush wrote, for logs and metrics. `ticket` is for `settle`; 0 when nothing waits for it."""

    backends: int = 0
    frontends: int = 0
    deletes: int = 0
    ticket: int = 0

    def __bool__(self) -> bool:
        return bool(self.backends or self.frontends or self.deletes)


@dataclass(slots=True)
class _Pending:
    extents: list[_Extent] = field(default_factory=list)
    frontends: dict[bytes, tuple[_Extent, int]] = field(default_factory=dict)
    deletes: set[bytes] = field(default_factory=set)


class ServiceTables:
    """The desired state of wag_services and wag_backends, and how to get there."""

    def __init__(self, services: Map, backends: Map) -> None:
        self._services = services
        self._backends = backends
        self._extents = ExtentAllocator(backends.info.max_entries)
        self._frontends: dict[bytes, tuple[_Extent, int]] = {}  # what the map holds: key → extent, flags
        self._rows: dict[ObjectKey, list[ServiceRow]] = {}
        self._owner: dict[bytes, ObjectKey] = {}
        self._contenders: dict[bytes, list[ObjectKey]] = {}
        self._unclaimed: set[bytes] = set()  # adopted and not yet asked for by any Service
        self._pending = _Pending()
        self._revision = 0
        self.problems: dict[ObjectKey, str] = {}
        self.starved: set[ObjectKey] = set()

    # -- restart ------------------------------------------------------------------------------------------------

    def adopt(self) -> int:
        """Reads the tables back. Returns how many frontends were found.

        A frontend that leads outside the backend table (it was made smaller) or into another one's extent is kept in
        mind as wrong: it is written again as soon as its Service is known.
        """
        entries = [(key, ServiceValue.unpack(raw)) for key, raw in self._services.dump()]
        sound = self._sound_runs({(value.offset, value.count) for _, value in entries if value.count})
        by_run: dict[tuple[int, int], _Extent] = {}
        for key, value in entries:
            run = (value.offset, value.count) if value.count else (-1, value.revision)
            extent = by_run.get(run)
            if extent is None:
                if not value.count or run in sound:
                    backends = self._backends.read_array(value.offset, value.count)
                    extent = _Extent(value.offset, backends, value.revision, seen=True)
                else:
                    extent = _Extent(0, _UNREADABLE, value.revision, seen=True)
                by_run[run] = extent
            extent.users += 1
            self._frontends[key] = (extent, value.flags)
            self._revision = max(self._revision, value.revision)
        self._extents.adopt({(e.offset, e.count) for e in by_run.values()})
        self._unclaimed = set(self._frontends)
        return len(entries)

    def _sound_runs(self, runs: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """The runs that lie in the backend table and do not reach into one before them."""
        sound = set()
        end = 0
        for offset, count in sorted(runs):
            if offset >= end and offset + count <= self._backends.info.max_entries:
                sound.add((offset, count))
                end = offset + count
        return sound

    def complete(self) -> None:
        """The plan has seen every Service: adopted frontends that no Service claimed go with the next flush."""
        for key in self._unclaimed:
            self._drop(key)
        self._unclaimed.clear()

    # -- the plan -----------------------------------------------------------------------------------------------

    def apply(self, service: ObjectKey, rows: list[ServiceRow]) -> set[ObjectKey]:
        """Makes `rows` what the tables shall hold for a Service (nothing is written before `flush`).

        Returns Services that waited for a frontend this one gave up: plan them again.
        """
        self.problems.pop(service, None)
        self.starved.discard(service)
        waiting: set[ObjectKey] = set()
        kept = {key for row in rows for key in row.keys}
        for row in self._rows.get(service, ()):
            for key in row.keys:
                if key in kept:
                    continue
                if self._owner.get(key) == service:
                    waiting.update(self._contenders.pop(key, ()))
                    del self._owner[key]
                    self._drop(key)
                else:
                    self._withdraw(key, service)
        if rows:
            self._rows[service] = rows
        else:
            self._rows.pop(service, None)
        for row in rows:
            try:
                self._apply_row(service, row)
            except TableFull as error:
                self._starve(service, str(error))
        waiting.discard(service)
        return waiting

    def rows(self, service: ObjectKey) -> list[ServiceRow]:
        """What was last applied for a Service."""
        return self._rows.get(service, [])

    def _apply_row(self, service: ObjectKey, row: ServiceRow) -> None:
        mine = []
        for key, flags in zip(row.keys, row.flags, strict=True):
            owner = self._owner.setdefault(key, service)
            if owner == service:
                mine.append((key, flags))
                self._unclaimed.discard(key)
            else:
                contenders = self._contenders.setdefault(key, [])
                if service not in contenders:
                    contenders.append(service)
                self.problems[service] = f"a frontend is already served by Service {owner}"
        extent = self._existing(mine, row.backends)
        for key, flags in mine:
            current = self._frontends.get(key)
            if current is not None and current[1] == flags and current[0].backends == row.backends:
                continue
            if extent is None:
                self._revision = self._revision % 0xFFFFFFFF + 1
                extent = _Extent(
                    self._extents.allocate(len(row.backends) // BACKEND_SIZE), row.backends, self._revision
                )
                if len(row.backends) // BACKEND_SIZE:
                    self._pending.extents.append(extent)
            self._put(key, extent, flags)

    def _existing(self, mine: list[tuple[bytes, int]], backends: bytes) -> _Extent | None:
        for key, _ in mine:
            current = self._frontends.get(key)
            if current is not None and current[0].backends == backends:
                return current[0]
        return None

    def _put(self, key: bytes, extent: _Extent, flags: int) -> None:
        extent.users += 1  # before the release: the extent may be the one that the frontend has
        self._release(key)
        self._frontends[key] = (extent, flags)
        self._pending.frontends[key] = (extent, flags)
        self._pending.deletes.discard(key)

    def _drop(self, key: bytes) -> None:
        if self._release(key):
            self._pending.frontends.pop(key, None)
            self._pending.deletes.add(key)

    def _release(self, key: bytes) -> bool:
        current = self._frontends.pop(key, None)
        if current is None:
            return False
        extent = current[0]
        extent.users -= 1
        if not extent.users and extent.seen:
            self._extents.free(extent.offset, extent.count)
        elif not extent.users:
            self._extents.give_back(extent.offset, extent.count)
        return True

    def _starve(self, service: ObjectKey, problem: str) -> None:
        self.starved.add(service)
        self.problems[service] = problem

    def _withdraw(self, key: bytes, service: ObjectKey) -> None:
        contenders = self._contenders.get(key)
        if contenders and service in contenders:
            contenders.remove(service)
            if not contenders:
                del self._contenders[key]

    # -- the kernel ---------------------------------------------------------------------------------------------

    def flush(self) -> Flush:
        """Writes everything pending, in the order that keeps every packet right. All stays pending when it fails."""
        pending = self._pending
        done = Flush()
        extents = [extent for extent in pending.extents if extent.users]
        if extents:
            keys = b"".join(struct.pack(f"={e.count}I", *range(e.offset, e.offset + e.count)) for e in extents)
            self._write_backends(keys, b"".join(e.backends for e in extents))
            done.backends = len(keys) // 4
        refused = self._write_frontends(pending.frontends)
        done.frontends = len(pending.frontends) - len(refused)
        if pending.deletes:
            done.deletes = self._services.delete_many(sorted(pending.deletes))
        if refused and done.deletes:
            again = self._write_frontends(refused)
            done.frontends += len(refused) - len(again)
            refused = again
        for key in refused:
            self._release(key)
            owner = self._owner.get(key)
            if owner is not None:
                size = self._services.info.max_entries
                self._starve(owner, f"frontend table is full ({size} entries): raise max-services")
        self._pending = _Pending()
        done.ticket = self._extents.retire()
        return done

    def _write_backends(self, keys: bytes, values: bytes) -> None:
        step = 16384
        for start in range(0, len(keys) // 4, step):
            part = keys[start * 4 : (start + step) * 4]
            self._backends.update_packed(
                part, values[start * BACKEND_SIZE : (start + step) * BACKEND_SIZE], len(part) // 4
            )

    def _write_frontends(self, frontends: dict[bytes, tuple[_Extent, int]]) -> dict[bytes, tuple[_Extent, int]]:
        """Writes frontends; those for which there is no room are returned."""
        entries = [(key, _value(extent, flags)) for key, (extent, flags) in frontends.items()]
        refused: set[bytes] = set()
        try:
            self._services.update_many(entries)
        except TableFull:
            # part of the batch is written; which of the rest fit shows when each is written again
            refused = {key for key, value in entries if not self._fits(key, value)}
        finally:
            # also when it failed otherwise: how far it came is unknown then
            for key, (extent, _) in frontends.items():
                extent.seen = extent.seen or key not in refused
        return {key: frontends[key] for key in refused}

    def _fits(self, key: bytes, value: bytes) -> bool:
        try:
            self._services.update(key, value)
        except TableFull:
            return False
        return True

    def settle(self, ticket: int | None = None) -> None:
        """Old extents may be used again: call it when no packet can still hold an old frontend value.

        With the ticket of a flush, only those that this flush and the ones before it replaced.
        """
        self._extents.release(ticket)

    @property
    def pending(self) -> bool:
        """Whether `flush` has something to do: after a flush that failed, all of it."""
        return bool(self._pending.extents or self._pending.frontends or self._pending.deletes)

    @property
    def unsettled(self) -> bool:
        """Whether `settle` has something to do."""
        return self._extents.waiting

    @property
    def frontend_count(self) -> int:
        return len(self._frontends)

    @property
    def backend_count(self) -> int:
        return self._extents.used


def _value(extent: _Extent, flags: int) -> bytes:
    return ServiceValue(extent.offset, extent.count, extent.revision, flags).pack()
