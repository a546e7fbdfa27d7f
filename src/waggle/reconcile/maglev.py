"""The Maglev tables that frontends refer to (wag_maglev).

Tables are immutable, as source ranges are: a changed set of backends has another id and a table of its own, which is
filled before the frontends that refer to it are written and removed after the last of them has gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from waggle.abi._generated import MaglevRequest
from waggle.errors import KernelError, TableFull
from waggle.kernel.maps import Map
from waggle.kernel.syscall import Fd
from waggle.kernel.testrun import run_syscall
from waggle.model.objects import ObjectKey
from waggle.plan.maglev import SLOTS, MaglevTable
from waggle.reconcile.claims import Claims


class MaglevTables:
    """`claim` what a Service needs; `write` before its frontends are written, `clean` afterwards.

    `fill` is the program wag_maglev_fill, `work` its map.
    """

    def __init__(self, table: Map, work: Map, fill: Fd) -> None:
        self._table = table
        self._work = work
        self._fill = fill
        self._empty = b"\xff" * table.value_size
        self._claims: Claims[int, MaglevTable] = Claims()
        self.problem = ""

    def adopt(self) -> None:
        """Reads back which tables there are. One that an agent did not live to fill is filled again when claimed."""
        found = {int.from_bytes(key, "little"): _slots(value) for key, value in self._table.dump()}
        self._claims.present = {number for number, slots in found.items() if b"\xff\xff" not in slots}
        self._claims.unused = found.keys() - self._claims.present

    def complete(self) -> None:
        """The plan has seen every Service: what none of them claimed goes."""
        self._claims.complete()

    def claim(self, service: ObjectKey, tables: Iterable[MaglevTable]) -> None:
        """Makes `tables` what a Service needs."""
        self._claims.claim(service, {table.id: table for table in tables})

    def write(self) -> None:
        """Fills what is missing. Where there is no room, backends are chosen at random, and `problem` says so."""
        self.problem = ""
        missing = self._claims.missing
        for table in list(missing.values()):
            key = table.id.to_bytes(4, "little")
            try:
                self._table.update(key, self._empty)
            except TableFull as error:
                self.problem = f"{len(missing)} Maglev tables find no room, flows spread at random: {error}"
                return
            self._work.update_packed(
                b"".join(i.to_bytes(4, "little") for i in range(table.backends)), table.work, table.backends
            )
            filled = run_syscall(self._fill, MaglevRequest(table.id, table.backends, table.greatest).pack())
            if filled != SLOTS:
                self._table.delete(key)
                raise KernelError(f"Maglev table {table.id:#x}: {filled} of {SLOTS} slots were filled")
            self._claims.written(table.id)

    def clean(self) -> None:
        """Removes what no frontend refers to any more."""
        claims = self._claims
        for number in sorted(claims.unused):
            self._table.delete(number.to_bytes(4, "little"))
            claims.present.discard(number)
        claims.unused.clear()


def _slots(value: bytes) -> list[bytes]:
    return [value[i : i + 2] for i in range(0, 2 * SLOTS, 2)]
