"""The tables that waggle-health answers from: what each health port says, and whether changes wait too long.

Rows that promise less are written before the frontends change and rows that promise more after it, so that no load
balancer is sent to endpoints that the data path does not lead to. After a restart the table is read back; nothing is
removed from it before `complete` says that the plan knows everything. A port that two Services want stays with the one
that has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from waggle.abi._generated import Health, HealthKey
from waggle.errors import TableFull
from waggle.kernel.maps import Map
from waggle.model.objects import ObjectKey
from waggle.plan.health import service_of

LATE_SECONDS = 60.0  # as kube-proxy: twice its longest time between two synchronisations
_ONLY = bytes(4)  # key of an array with one entry


class HealthTable:
    """`apply` what a Service wants; `withdraw` before its frontends are written, `announce` afterwards."""

    def __init__(self, table: Map, on_ports: Callable[[], None] = lambda: None) -> None:
        self._table = table
        self._on_ports = on_ports  # called when the set of ports in the table has changed
        self._rows: dict[ObjectKey, Mapping[bytes, bytes]] = {}
        self._claims: dict[bytes, list[ObjectKey]] = {}
        self._written: dict[bytes, bytes] = {}
        self._due: set[bytes] = set()
        self._complete = False
        self._full = ""

    def adopt(self) -> None:
        """Reads the table back."""
        self._written = dict(self._table.dump())

    @property
    def numbers(self) -> frozenset[int]:
        """The ports that are answered, or are to be."""
        return frozenset(HealthKey.unpack(key).port for key in (*self._written, *self._claims))

    def complete(self) -> None:
        """The plan has seen every Service: ports that no Service claimed are closed."""
        self._complete = True
        self._due.update(self._written, self._claims)

    def apply(self, service: ObjectKey, rows: Mapping[bytes, bytes]) -> None:
        """Makes `rows` (as of `plan_health`) what a Service wants. Nothing is written yet."""
        before = self._rows.pop(service, {})
        if rows:
            self._rows[service] = rows
        for key in before.keys() - rows.keys():
            self._claims[key].remove(service)
            if not self._claims[key]:
                del self._claims[key]
        for key in rows.keys() - before.keys():
            self._claims.setdefault(key, []).append(service)
        self._due.update(before, rows)

    def withdraw(self) -> None:
        """Writes what promises less than the table does."""
        for key in sorted(self._due):
            wanted = self._wanted(key)
            if _endpoints(wanted) < _endpoints(self._written.get(key)) or wanted is None:
                self._write(key, wanted)

    def announce(self) -> None:
        """Writes the rest."""
        for key in sorted(self._due):
            self._write(key, self._wanted(key))

    @property
    def pending(self) -> bool:
        """Whether something is not written."""
        return bool(self._due)

    @property
    def ports(self) -> int:
        """Ports in the table, one per Service and family."""
        return len(self._written)

    def holder(self, port: int, family: int) -> ObjectKey | None:
        """The Service that a port answers for."""
        value = self._written.get(HealthKey(port, family).pack())
        return service_of(value) if value is not None else None

    def counts(self, service: ObjectKey) -> dict[int, int]:
        """Family (4, 6) → local endpoints, as a Service's health port tells them; empty where it tells nothing."""
        found = {}
        for key in self._rows.get(service, ()):
            value = self._written.get(key)
            if value is not None and service_of(value) == service:
                found[HealthKey.unpack(key).family] = _endpoints(value)
        return found

    def problems(self) -> dict[ObjectKey, str]:
        """Services whose health port cannot be what they want."""
        found: dict[ObjectKey, str] = {}
        for key, services in self._claims.items():
            value = self._written.get(key)
            holder = service_of(value) if value is not None else None
            port = HealthKey.unpack(key).port
            for service in services:
                if holder is None and key in self._due and self._full:
                    found[service] = f"healthCheckNodePort {port} is not answered: {self._full}"
                elif holder is not None and service != holder:
                    found[service] = f"healthCheckNodePort {port} is already that of Service {holder}"
        return found

    def _wanted(self, key: bytes) -> bytes | None:
        """What the table shall hold. Whoever has a port keeps it, also while that Service is not yet known again."""
        services = self._claims.get(key, ())
        current = self._written.get(key)
        if current is not None:
            holder = service_of(current)
            if holder in services:
                return self._rows[holder][key]
            if not self._complete:
                return current
        return self._rows[services[0]][key] if services else None

    def _write(self, key: bytes, value: bytes | None) -> None:
        current = self._written.get(key)
        if value is None:
            self._table.delete(key)
            self._written.pop(key, None)
        elif value != current:
            try:
                self._table.update(key, value)
            except TableFull as error:
                self._full = str(error)
                return
            self._written[key] = value
        self._due.discard(key)
        if (value is None) != (current is None):
            self._on_ports()


class Overdue:
    """The moment from which on a change has waited too long to be in the tables, kept where waggle-health sees it.

    So it also tells when the agent hangs, or was killed in the middle of a change and does not come back. `adopt` what
    an agent before left: its change may not have been written, and counts as waiting until everything is in sync.
    """

    def __init__(self, table: Map, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._table = table
        self._clock = clock
        self._due = 0
        self._inherited = False

    def adopt(self) -> None:
        """Reads back what waits."""
        self._due = int.from_bytes(self._table.lookup(_ONLY) or b"", "little")
        self._inherited = self._due != 0

    def begin(self) -> None:
        """A change waits, from now on if none did."""
        if not self._due:
            self._set(self._clock() + int(LATE_SECONDS * 1e9))

    def done(self, *, in_sync: bool) -> None:
        """What is known is in the tables; `in_sync`: everything is known."""
        self._inherited = self._inherited and not in_sync
        if self._due and not self._inherited:
            self._set(0)

    def __bool__(self) -> bool:
        """Whether a change waits too long."""
        return self._due != 0 and self._clock() >= self._due

    def _set(self, due: int) -> None:
        self._table.update(_ONLY, due.to_bytes(8, "little"))
        self._due = due


def _endpoints(value: bytes | None) -> int:
    return Health.unpack(value).endpoints if value is not None else 0
