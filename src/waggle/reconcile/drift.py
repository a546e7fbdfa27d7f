"""What the maps hold against what they should: found, named, repaired.

Nobody but the agent writes these maps, so that nothing should ever be found. What is found came from a fault of
waggle's, or of the machine, or from another hand; whichever it was, traffic must not go wrong until somebody notices.

Tables are read in small steps, each of which is one turn of the event loop: between reading and comparing nothing
changes. `FrontendCheck` and `RangeCheck` are made anew for every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from waggle.abi._generated import BACKEND_SIZE, Backend, RangeKey, Scope, ServiceFlag, ServiceKey
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import ANY4, ANY6, host_port, is_ipv4, protocol_name, unpack_address
from waggle.reconcile.ranges import ALL_NODES, SourceRanges
from waggle.reconcile.services import ServiceTables, named

STEP = 256  # entries
MOST_NAMED = 5  # backends in a sentence


class Drift(NamedTuple):
    """One entry that is not as it should be. `subject` is the object it belongs to, "" where there is none; `key` is
    the entry's, as the map has it."""

    table: str
    subject: str
    entry: str
    problem: str
    key: bytes = b""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.table, self.subject, self.entry, self.problem) if part)


class FrontendCheck:
    """wag_services and wag_backends, step by step. Nothing of `tables` may be pending when a step is made."""

    def __init__(self, tables: ServiceTables) -> None:
        self._tables = tables
        self._wanted = iter(tables.frontends())
        self._batches = tables.batches(STEP)
        self.checked = 0

    def step(self) -> list[Drift] | None:
        """What the next entries have wrong; None after the last. Repairs are left to the next flush."""
        keys = list(islice(self._wanted, STEP))
        if keys:
            self.checked += len(keys)
            return [drift for key in keys for drift in self._check(key)]
        batch = next(self._batches, None)
        if batch is None:
            return None
        return [drift for key, _ in batch for drift in self._check_wanted(key)]

    def _check(self, key: bytes) -> Iterator[Drift]:
        should = self._tables.should_be(key)
        if should is None:
            return  # gone since
        found = self._tables.read(key)
        if found == should:
            return
        owner = self._tables.owner(key)
        yield Drift("wag_services", named(owner) if owner else "", frontend_name(key), _difference(found, should), key)

    def _check_wanted(self, key: bytes) -> Iterator[Drift]:
        if self._tables.should_be(key) is None:
            yield Drift("wag_services", "", frontend_name(key), "no Service has it", key)

    def repair(self, drifts: Iterable[Drift]) -> None:
        """Has everything that differs written again with the next flush."""
        keys = [drift.key for drift in drifts]
        self._tables.renew(keys)
        self._tables.discard(keys)


class RangeCheck:
    """wag_source_ranges, step by step. A trie answers with the longest prefix that it has, so that only a walk shows
    what is missing."""

    def __init__(self, ranges: SourceRanges) -> None:
        self._ranges = ranges
        self._before = ranges.wanted()
        self._keys = ranges.keys()
        self._seen: set[bytes] = set()
        self._done = False
        self.checked = 0

    def step(self) -> list[Drift] | None:
        """As of FrontendCheck."""
        keys = list(islice(self._keys, STEP))
        if keys:
            self._seen.update(keys)
            self.checked += len(keys)
            extra = [key for key in keys if not self._ranges.knows(key)]
            return [Drift("wag_source_ranges", "", range_name(key), "no Service has it", key) for key in extra]
        if self._done:
            return None
        self._done = True
        missing = sorted((self._before & self._ranges.wanted()) - self._seen)
        return [Drift("wag_source_ranges", self._subject(key), range_name(key), "is missing", key) for key in missing]

    def _subject(self, key: bytes) -> str:
        owners = self._ranges.owners(key)
        return ", ".join("every node" if owner == ALL_NODES else f"Service {owner}" for owner in owners)

    def repair(self, drifts: Iterable[Drift]) -> None:
        """As of FrontendCheck."""
        wanted = self._ranges.wanted()
        for drift in drifts:
            if drift.key in wanted:
                self._ranges.renew(drift.key)
            else:
                self._ranges.discard(drift.key)


def frontend_name(key: bytes) -> str:
    """ "TCP 10.96.0.1:80", "UDP node port 30080 (IPv4), from outside" of a packed wag_service_key."""
    value = ServiceKey.unpack(key)
    if value.addr in (ANY4, ANY6):
        where = f"node port {value.port} ({'IPv4' if is_ipv4(value.addr) else 'IPv6'})"
    else:
        where = host_port(unpack_address(value.addr), value.port)
    outside = ", from outside" if value.scope == Scope.EXTERNAL else ""
    return f"{protocol_name(value.proto)} {where}{outside}"


def range_name(key: bytes) -> str:
    """ "10.0.0.0/8 of list 1f3a…" of a packed wag_range_key."""
    value = RangeKey.unpack(key)
    bits = value.prefix - 64 - (96 if is_ipv4(value.addr) else 0)
    return f"{unpack_address(value.addr)}/{bits} of list {value.ranges.hex()}"


def _difference(found: tuple[bytes, bytes] | None, should: tuple[bytes, bytes]) -> str:
    """What is wrong with (wag_service, backend records)."""
    if found is None:
        return "is missing"
    is_, wanted = ServiceValue.unpack(found[0]), ServiceValue.unpack(should[0])
    if found[1] != should[1] or is_.count != wanted.count:
        return f"leads to {_ends(found[1])} instead of {_ends(should[1])}"
    fields = [name for name in ServiceValue._fields if getattr(is_, name) != getattr(wanted, name)]
    return "; ".join(
        f"has {name} {_shown(name, getattr(is_, name))} instead of {_shown(name, getattr(wanted, name))}"
        for name in fields
    )


def _shown(name: str, value: int) -> str:
    return str(ServiceFlag(value).name or value) if name == "flags" and value else str(value)


def _ends(records: bytes) -> str:
    every = [Backend.unpack(records[i : i + BACKEND_SIZE]) for i in range(0, len(records), BACKEND_SIZE)]
    named = [host_port(unpack_address(one.addr), one.port) for one in every[:MOST_NAMED]]
    more = [f"{len(every) - MOST_NAMED} more"] if len(every) > MOST_NAMED else []
    return ", ".join(named + more) or "nothing"
