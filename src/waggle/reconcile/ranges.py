"""The source ranges that frontends refer to (wag_source_ranges).

Lists are immutable: a changed list has another id and entries of its own (waggle.plan). So they are written before the
frontends that refer to them and removed after the last one has gone, and no client sees half a list. After a restart,
entries that no Service asks for are removed once the plan is complete.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from waggle.errors import TableFull
from waggle.kernel.maps import Map
from waggle.model.objects import ObjectKey
from waggle.reconcile.claims import Claims

#: who needs the nodes' addresses: every Service with direct server return
ALL_NODES = ObjectKey("", "all nodes")
_ALLOWED = (1).to_bytes(4, "little")


class SourceRanges:
    """`claim` what a Service needs; `write` before its frontends are written, `clean` afterwards."""

    def __init__(self, table: Map) -> None:
        self._table = table
        self._claims: Claims[bytes, None] = Claims()
        self.problem = ""

    def adopt(self) -> None:
        """Reads the table back."""
        self._claims.present = set(self._table.keys())

    def complete(self) -> None:
        """The plan has seen every Service: what none of them claimed goes."""
        self._claims.complete()

    def claim(self, service: ObjectKey, keys: Iterable[bytes]) -> None:
        """Makes `keys` what a Service needs."""
        self._claims.claim(service, dict.fromkeys(keys))

    def write(self) -> None:
        """Writes what is missing. What finds no room stays missing, its clients stay out, and `problem` says so."""
        self.problem = ""
        missing = self._claims.missing
        for key in sorted(missing):
            try:
                self._table.update(key, _ALLOWED)
            except TableFull as error:
                self.problem = f"{len(missing)} ranges find no room, their clients are refused: {error}"
                return
            self._claims.written(key)

    # -- what the map holds against what it should (waggle.reconcile.drift) ------------------------------------------

    def wanted(self) -> set[bytes]:
        """What the table should hold, and was written."""
        return self._claims.needed()

    def knows(self, key: bytes) -> bool:
        """Whether an entry is one that was written, needed or about to be removed."""
        return key in self._claims.present

    def keys(self) -> Iterator[bytes]:
        """What the table does hold."""
        return self._table.keys()

    def owners(self, key: bytes) -> list[ObjectKey]:
        """The Services that need an entry."""
        return self._claims.owners(key)

    def renew(self, key: bytes) -> None:
        """Has the next `write` write an entry again."""
        self._claims.present.discard(key)
        self._claims.missing[key] = None

    def discard(self, key: bytes) -> None:
        """Removes an entry that nobody needs."""
        if not self.knows(key):
            self._table.delete(key)

    def clean(self) -> None:
        """Removes what no frontend refers to any more."""
        claims = self._claims
        for key in sorted(claims.unused & claims.present):
            self._table.delete(key)
            claims.present.discard(key)
        claims.unused.clear()
