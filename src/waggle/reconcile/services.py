"""Brings the frontend and backend tables to what the plan says, with as few writes as that takes.

Order of every flush: new extents of backends, then frontend values, then deletes, then (a moment later) old extents
become free. A packet therefore sees the old set of a Service or the new one. After a restart the tables are read back
(`adopt`): what is there and right is not written again, and nothing is removed before `complete` says that the plan
knows everything. A flush that fails half-way is done again, whole, by the next one. Services for which a table had no
room are `starved`: apply them again when something was deleted or settled.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from waggle.abi._generated import BACKEND_SIZE, ServiceFlag, ServiceKey
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import ADDRESS_SIZE, ANY4, ANY6, PROTOCOLS, host_port, is_ipv4, protocol_name, unpack_address
from waggle.errors import TableFull
from waggle.kernel.maps import Map
from waggle.model.bound import LocalPort
from waggle.model.host_port import HostPortOwner
from waggle.model.objects import ObjectKey
from waggle.model.service import Family
from waggle.plan.extents import ExtentAllocator
from waggle.plan.services import FrontendSettings, ServiceRow

#: stands for the backends of an adopted frontend whose extent makes no sense: equal to no set, and no record long
_UNREADABLE = b"?"
#: where a packed wag_service_key has its protocol
_PROTOCOL_AT = ServiceKey(bytes(ADDRESS_SIZE), 0, 0xFF, 0).pack().index(0xFF)
_SCOPE_AT = ServiceKey(bytes(ADDRESS_SIZE), 0, 0, 0xFF).pack().index(0xFF)


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
    """What one flush wrote, for logs and metrics. `ticket` is for `settle`; 0 when nothing waits for it. `udp_changed`:
    some UDP frontend that was there has other backends now.
    """

    backends: int = 0
    frontends: int = 0
    deletes: int = 0
    ticket: int = 0
    udp_changed: bool = False

    def __bool__(self) -> bool:
        return bool(self.backends or self.frontends or self.deletes)


@dataclass(slots=True)
class _Pending:
    extents: list[_Extent] = field(default_factory=list)
    frontends: dict[bytes, tuple[_Extent, FrontendSettings]] = field(default_factory=dict)
    deletes: set[bytes] = field(default_factory=set)
    udp_changed: bool = False


#: What a frontend belongs to: a Service, or the pod whose host port it is.
Owner = ObjectKey | HostPortOwner
_Frontends = dict[bytes, tuple[_Extent, FrontendSettings]]


class ServiceTables:
    """The desired state of wag_services and wag_backends, and how to get there."""

    def __init__(self, services: Map, backends: Map) -> None:
        self._services = services
        self._backends = backends
        self._extents = ExtentAllocator(backends.info.max_entries)
        self._frontends: dict[bytes, tuple[_Extent, FrontendSettings]] = {}  # what the map holds
        self._rows: dict[Owner, list[ServiceRow]] = {}
        self._owner: dict[bytes, Owner] = {}
        self._local: set[bytes] = set()  # of these, the ports of the node: NodePorts and host ports
        self.local_changed = False  # since the last `local_ports`
        self._contenders: dict[bytes, list[Owner]] = {}
        self._unclaimed: set[bytes] = set()  # adopted and not yet asked for by any Service
        self._pending = _Pending()
        # beyond any that flows may remember from a table that is gone: they would take a set for one they know
        self._revision = int(time.time()) & 0x7FFFFFFF
        self.problems: dict[Owner, str] = {}
        self.starved: set[Owner] = set()

    # -- restart ------------------------------------------------------------------------------------------------

    def adopt(self) -> int:
        """Reads the tables back. Returns how many frontends were found.

        A frontend that leads outside the backend table (it was made smaller) or into another one's extent is kept in
        mind as wrong: it is written again as soon as its Service is known.
        """
        entries = [(key, ServiceValue.unpack(raw)) for key, raw in self._services.dump()]
        sound = self._sound_runs({(value.offset, _whole(value)) for _, value in entries if _whole(value)})
        # all at once: one system call per Service is most of a restart with 10,000
        records = self._backends.read_array(0, max((offset + count for offset, count in sound), default=0))
        by_run: dict[tuple[int, int], _Extent] = {}
        for key, value in entries:
            whole = _whole(value)
            run = (value.offset, whole) if whole else (-1, value.revision)
            extent = by_run.get(run)
            if extent is None:
                if not whole or run in sound:
                    end = value.offset + whole
                    backends = records[value.offset * BACKEND_SIZE : end * BACKEND_SIZE] if whole else b""
                    extent = _Extent(value.offset, backends, value.revision, seen=True)
                else:
                    extent = _Extent(0, _UNREADABLE, value.revision, seen=True)
                by_run[run] = extent
            extent.users += 1
            self._frontends[key] = (extent, FrontendSettings(*value[3:]))
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

    def apply(self, service: Owner, rows: list[ServiceRow]) -> set[Owner]:
        """Makes `rows` what the tables shall hold for a Service (nothing is written before `flush`).

        Returns Services that waited for a frontend this one gave up: plan them again.
        """
        self.problems.pop(service, None)
        self.starved.discard(service)
        waiting: set[Owner] = set()
        kept = {key for row in rows for key in row.keys}
        for row in self._rows.get(service, ()):
            for key in row.keys:
                if key in kept:
                    continue
                if self._owner.get(key) == service:
                    waiting.update(self._contenders.pop(key, ()))
                    del self._owner[key]
                    self._leave_local(key)
                    self._drop(key)
                else:
                    self._withdraw(key, service)
        if rows:
            self._rows[service] = rows
        else:
            self._rows.pop(service, None)
        for row in rows:
            for key in row.keys:
                if not key[_SCOPE_AT]:
                    self._owner.setdefault(key, service)
        for row in rows:
            try:
                self._apply_row(service, row)
            except TableFull as error:
                self._starve(service, str(error))
        waiting.discard(service)
        return waiting

    def rows(self, service: Owner) -> list[ServiceRow]:
        """What was last applied for a Service."""
        return self._rows.get(service, [])

    def services(self) -> list[Owner]:
        """Who has rows."""
        return list(self._rows)

    def _apply_row(self, service: Owner, row: ServiceRow) -> None:
        mine = []
        for key, settings in zip(row.keys, row.settings, strict=True):
            # an entry for clients outside belongs to whoever has the frontend, also where that one has none so far
            owner = self._owner.get(_internal(key), service) if key[_SCOPE_AT] else self._owner[key]
            if owner == service:
                self._owner[key] = service
                if settings.flags & (ServiceFlag.NODEPORT | ServiceFlag.HOST_PORT) and key not in self._local:
                    self._local.add(key)
                    self.local_changed = True
                mine.append((key, settings))
                self._unclaimed.discard(key)
            elif not key[_SCOPE_AT]:
                contenders = self._contenders.setdefault(key, [])
                if service not in contenders:
                    contenders.append(service)
                self._report(service, f"{_shown(key)} is already served by {named(owner)}")
        extent = self._existing(mine, row.backends)
        for key, settings in mine:
            current = self._frontends.get(key)
            if current is not None and current[1] == settings and current[0].backends == row.backends:
                continue
            if extent is None:
                extent = self._new_extent(row.backends)
            self._put(key, extent, settings)

    def _new_extent(self, backends: bytes) -> _Extent:
        count = len(backends) // BACKEND_SIZE
        self._revision = self._revision % 0xFFFFFFFF + 1
        extent = _Extent(self._extents.allocate(count), backends, self._revision)
        if count:
            self._pending.extents.append(extent)
        return extent

    def _existing(self, mine: list[tuple[bytes, FrontendSettings]], backends: bytes) -> _Extent | None:
        for key, _ in mine:
            current = self._frontends.get(key)
            if current is not None and current[0].backends == backends:
                return current[0]
        return None

    def _put(self, key: bytes, extent: _Extent, settings: FrontendSettings) -> None:
        if key[_PROTOCOL_AT] == PROTOCOLS["UDP"] and key in self._frontends:
            self._pending.udp_changed = True
        extent.users += 1  # before the release: the extent may be the one that the frontend has
        self._release(key)
        self._frontends[key] = (extent, settings)
        self._pending.frontends[key] = (extent, settings)
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

    def _starve(self, service: Owner, problem: str) -> None:
        self.starved.add(service)
        self._report(service, problem)

    def _report(self, service: Owner, problem: str) -> None:
        known = self.problems.get(service, "")
        if problem not in known:
            self.problems[service] = f"{known}; {problem}" if known else problem

    def _withdraw(self, key: bytes, service: Owner) -> None:
        contenders = self._contenders.get(key)
        if contenders and service in contenders:
            contenders.remove(service)
            if not contenders:
                del self._contenders[key]

    # -- what the maps hold against what they should (waggle.reconcile.drift) --------------------------------------

    def frontends(self) -> list[bytes]:
        """Packed keys of all that wag_services should hold."""
        return list(self._frontends)

    def owner(self, key: bytes) -> Owner | None:
        """The Service that has a frontend; None: adopted, and not yet asked for."""
        return self._owner.get(key)

    def should_be(self, key: bytes) -> tuple[bytes, bytes] | None:
        """(wag_service, backend records) of a frontend once nothing is pending; None: it should not be there."""
        current = self._frontends.get(key)
        return (_value(*current), current[0].backends) if current is not None else None

    def read(self, key: bytes) -> tuple[bytes, bytes] | None:
        """What the maps hold for a frontend, in the same form. Records that lie outside the table are none."""
        raw = self._services.lookup(key)
        if raw is None:
            return None
        value = ServiceValue.unpack(raw)
        if value.offset + _whole(value) > self._backends.info.max_entries:
            return raw, b""
        return raw, self._backends.read_array(value.offset, _whole(value))

    def batches(self, size: int) -> Iterator[list[tuple[bytes, bytes]]]:
        """All that wag_services does hold, in parts of about `size`."""
        return self._services.batches(size)

    def renew(self, keys: Iterable[bytes]) -> None:
        """Has the next flush write these frontends and their backends anew, and all others that share those: with a
        new revision, so that flows which saw what was wrong are looked at again. TableFull where there is no room."""
        wrong = {id(self._frontends[key][0]) for key in keys if key in self._frontends}
        fresh: dict[int, _Extent] = {}
        for key, (extent, settings) in list(self._frontends.items()):
            if id(extent) not in wrong:
                continue
            if id(extent) not in fresh:
                fresh[id(extent)] = self._new_extent(extent.backends)
            self._put(key, fresh[id(extent)], settings)

    def discard(self, keys: Iterable[bytes]) -> None:
        """Has the next flush remove those of these frontends that should not be there."""
        self._pending.deletes.update(key for key in keys if key not in self._frontends)

    def local_ports(self) -> dict[LocalPort, Owner]:
        """The ports of the node that lead elsewhere, and whose they are."""
        self.local_changed = False
        found: dict[LocalPort, Owner] = {}
        for key in self._local:
            entry, owner = ServiceKey.unpack(key), self._owner[key]
            address = "" if entry.addr in (ANY4, ANY6) else unpack_address(entry.addr)
            family = Family.IPV4 if is_ipv4(entry.addr) else Family.IPV6
            everywhere = isinstance(owner, HostPortOwner)
            found[LocalPort(protocol_name(entry.proto), family, address, entry.port, everywhere)] = owner
        return found

    def _leave_local(self, key: bytes) -> None:
        if key in self._local:
            self._local.discard(key)
            self.local_changed = True

    def overlaps(self) -> dict[Owner, str]:
        """Owners of a port of one address of the node that somebody else has on every address, and what that means."""
        found: dict[Owner, str] = {}
        for key in self._local:
            owner = self._owner[key]
            if isinstance(owner, HostPortOwner):
                entry = ServiceKey.unpack(key)
                other = self._owner.get(entry._replace(addr=ANY4 if is_ipv4(entry.addr) else ANY6).pack(), owner)
                if other != owner:
                    found[owner] = f"{_shown(key)} leads here, that port of all other addresses to {named(other)}"
        return found

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
        done.udp_changed = pending.udp_changed
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

    def _write_frontends(self, frontends: _Frontends) -> _Frontends:
        """Writes frontends; those for which there is no room are returned."""
        entries = [(key, _value(extent, settings)) for key, (extent, settings) in frontends.items()]
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
    def service_count(self) -> int:
        """Services that have rows."""
        return len(self._rows)

    @property
    def backend_count(self) -> int:
        return self._extents.used


def _value(extent: _Extent, settings: FrontendSettings) -> bytes:
    return ServiceValue(extent.offset, extent.count - settings.draining, extent.revision, *settings).pack()


def _whole(value: ServiceValue) -> int:
    """Records of the extent that a frontend leads to."""
    return value.count + value.draining


def _internal(key: bytes) -> bytes:
    """The key of the same frontend for clients inside, which every frontend has."""
    return key[:_SCOPE_AT] + b"\0" + key[_SCOPE_AT + 1 :]


def named(owner: Owner) -> str:
    """The owner of a frontend for people."""
    return f"{'Pod' if isinstance(owner, HostPortOwner) else 'Service'} {owner}"


def _shown(key: bytes) -> str:
    entry = ServiceKey.unpack(key)
    address = "*" if entry.addr in (ANY4, ANY6) else unpack_address(entry.addr)
    return f"{protocol_name(entry.proto)} {host_port(address, entry.port)}"
