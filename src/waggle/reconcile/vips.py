"""The addresses of Services and the ranges they come from (wag_vips, wag_svc_ranges).

Only what no frontend takes is looked up here, so entries are written after the frontends of their Service and removed
after them: in between a port of a new Service works, and a former one is refused instead of dropped. Ranges are set
once every Service is known; after a restart those that are pinned hold until then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from waggle.abi._generated import ServiceRange, ServiceRangeFlag, VipFlag
from waggle.errors import KernelError, TableFull
from waggle.kernel.maps import Map
from waggle.model.objects import ObjectKey
from waggle.plan.vips import holds

_UNUSED = ServiceRange(bytes(16), bytes(16), 0)


class Vips:
    """`claim` what a Service has, `write` after its frontends are written."""

    def __init__(self, vips: Map, ranges: Map) -> None:
        self._vips = vips
        self._ranges = ranges
        self._claims: dict[ObjectKey, Mapping[bytes, int]] = {}
        self._wanted: dict[bytes, dict[ObjectKey, int]] = {}
        self._present: dict[bytes, int] = {}
        self._due: set[bytes] = set()
        self._networks: list[ServiceRange] = []
        self._written: list[ServiceRange] = []
        self._strays: set[bytes] = set()
        self.problem = ""

    @property
    def most_ranges(self) -> int:
        """How many ranges there is room for."""
        return self._ranges.info.max_entries

    @property
    def pending(self) -> bool:
        """Whether `write` has something to do."""
        return bool(self._due)

    def adopt(self) -> None:
        """Reads the tables back."""
        self._read_present()
        records = [ServiceRange.unpack(raw) for _, raw in sorted(self._ranges.dump())]
        self._written = [record for record in records if record.flags]
        # the first record may hold the flag for strays alone, and is no range then
        used = int(ServiceRangeFlag.USED)
        self._networks = [record._replace(flags=used) for record in self._written if record.flags & used]
        self._strays = {key for key, flags in self._present.items() if self._is_stray(key, flags)}

    def complete(self) -> None:
        """The plan has seen every Service: addresses that none of them claimed go with the next `write`."""
        self._due |= self._present.keys() - self._wanted.keys()

    def claim(self, service: ObjectKey, entries: Mapping[bytes, int]) -> None:
        """Makes `entries` the addresses of a Service."""
        before = self._claims.pop(service, {})
        if before == entries:
            if entries:
                self._claims[service] = before
            return
        if entries:
            self._claims[service] = entries
        for key in before.keys() - entries.keys():
            del self._wanted[key][service]
            if not self._wanted[key]:
                del self._wanted[key]
            self._due.add(key)
        for key, flags in entries.items():
            self._wanted.setdefault(key, {})[service] = flags
            self._due.add(key)

    def set_ranges(self, ranges: Sequence[ServiceRange]) -> None:
        """Makes these the ranges, with the next `write`."""
        self._networks = list(ranges)
        self._strays = {key for key in self._wanted if self._is_stray(key, self._flags(key))}

    def write(self) -> None:
        """Writes what changed. What finds no room stays due, and `problem` says so."""
        self.problem = ""
        changed: list[tuple[bytes, int]] = []
        gone: list[bytes] = []
        for key in self._due:
            flags = self._flags(key)
            (self._strays.add if self._is_stray(key, flags) else self._strays.discard)(key)
            if flags is None:
                gone.append(key)
            elif self._present.get(key) != flags:
                changed.append((key, flags))
        self._vips.delete_many([key for key in gone if key in self._present])
        for key in gone:
            self._present.pop(key, None)
        self._due.difference_update(gone)
        try:
            self._vips.update_many([(key, flags.to_bytes(4, "little")) for key, flags in changed])
        except KernelError as error:
            self._read_present()  # how much of it is written is unknown
            if not isinstance(error, TableFull):
                raise
            self.problem = f"addresses of Services find no room: raise max-services ({error})"
            return  # tried again with the next change; until then their other ports go on as if no Service had them
        self._present.update(changed)
        self._due.clear()
        self._write_ranges()

    def _read_present(self) -> None:
        self._present = {key: int.from_bytes(value, "little") for key, value in self._vips.dump()}

    def _flags(self, key: bytes) -> int | None:
        claims = self._wanted.get(key)
        if claims is None:
            return None
        flags = 0
        for one in claims.values():
            flags |= one
        return flags

    def _is_stray(self, key: bytes, flags: int | None) -> bool:
        return bool(flags and flags & VipFlag.CLUSTER_IP) and not any(holds(one, key) for one in self._networks)

    def _write_ranges(self) -> None:
        """The first entry goes first and comes last: a packet sees the old list, the new one or none."""
        wanted = list(self._networks)
        if self._strays:
            first = wanted[0] if wanted else _UNUSED
            wanted[:1] = [first._replace(flags=first.flags | ServiceRangeFlag.STRAYS)]
        if wanted == self._written:
            return
        only_flags = len(wanted) == len(self._written) and [w[:2] for w in wanted] == [w[:2] for w in self._written]
        if not only_flags:
            self._put(0, _UNUSED)
            for index in range(1, self.most_ranges):
                self._put(index, wanted[index] if index < len(wanted) else _UNUSED)
        self._put(0, wanted[0] if wanted else _UNUSED)
        self._written = wanted

    def _put(self, index: int, record: ServiceRange) -> None:
        self._ranges.update(index.to_bytes(4, "little"), record.pack())
