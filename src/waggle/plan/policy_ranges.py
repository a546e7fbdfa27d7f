"""Blocks as prefixes: which of them hold where.

Every prefix that a block names or excepts is an entry, with the blocks that hold in it outside of longer entries. So
the longest entry with an address says which blocks hold for it.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from waggle.model.service import IPNetwork
from waggle.plan.policy_predicates import Block

BITS = {4: 32, 6: 128}
ADDRESSES = {4: ipaddress.IPv4Address, 6: ipaddress.IPv6Address}
NOWHERE: frozenset[Block] = frozenset()


class Prefix(NamedTuple):
    """The first `length` bits of addresses of one family, as a number."""

    version: int
    length: int
    bits: int

    @property
    def first(self) -> int:
        return self.bits << (BITS[self.version] - self.length)

    @property
    def cidr(self) -> str:
        return f"{ADDRESSES[self.version](self.first)}/{self.length}"

    @property
    def end(self) -> int:
        """One past the last address."""
        return (self.bits + 1) << (BITS[self.version] - self.length)


_EVERY_IPV4 = Prefix(4, 0, 0)
_MAPPED = 0xFFFF << 32


def _holds_mapped(prefix: Prefix) -> bool:
    return prefix.version == 6 and prefix.length < 96 and _MAPPED >> (128 - prefix.length) == prefix.bits


def prefix_of(network: IPNetwork) -> Prefix:
    shift = network.max_prefixlen - network.prefixlen
    return Prefix(network.version, network.prefixlen, int(network.network_address) >> shift)


class BlockRanges:
    """The entries of all blocks in use, kept up as blocks come and go."""

    def __init__(self) -> None:
        self.entries: dict[Prefix, frozenset[Block]] = {}
        self._named: Counter[Prefix] = Counter()  # how many blocks name or except a prefix
        self._on: dict[Prefix, set[Block]] = {}
        self._off: dict[Prefix, set[Block]] = {}
        self._lengths: dict[int, list[int]] = {4: [], 6: []}  # of the entries, ascending
        self._with_length: Counter[tuple[int, int]] = Counter()

    def at(self, version: int, value: int) -> frozenset[Block]:
        """The blocks that hold for an address."""
        width = BITS[version]
        for length in reversed(self._lengths[version]):
            found = self.entries.get(Prefix(version, length, value >> (width - length)))
            if found is not None:
                return found
        return NOWHERE

    def add(self, block: Block) -> set[Prefix]:
        """Takes a block in. Returns the prefixes whose entry is new or another one now."""
        prefixes = self._prefixes(block)
        for prefix in prefixes:
            self._named[prefix] += 1
            if self._named[prefix] == 1:
                self._count(prefix, 1)
                self.entries[prefix] = NOWHERE
        self._on.setdefault(prefixes[0], set()).add(block)
        for prefix in prefixes[1:]:
            self._off.setdefault(prefix, set()).add(block)
        return self._again(prefixes[0]) | {prefix for prefix in prefixes if self._named[prefix] == 1}

    def remove(self, block: Block) -> set[Prefix]:
        """Forgets a block. Returns the prefixes whose entry is gone or another one now."""
        prefixes = self._prefixes(block)
        for places, where in ((self._on, prefixes[:1]), (self._off, prefixes[1:])):
            for prefix in where:
                places[prefix].discard(block)
                if not places[prefix]:
                    del places[prefix]
        gone = set()
        for prefix in prefixes:
            self._named[prefix] -= 1
            if not self._named[prefix]:
                del self._named[prefix], self.entries[prefix]
                self._count(prefix, -1)
                gone.add(prefix)
        return self._again(prefixes[0]) | gone

    @staticmethod
    def _prefixes(block: Block) -> list[Prefix]:
        found = [prefix_of(block.network), *map(prefix_of, block.excepts)]
        # tables hold IPv4 as ::ffff:a.b.c.d: a short prefix of IPv6 has that inside, and must not be the longest there
        return [*found, _EVERY_IPV4] if any(map(_holds_mapped, found)) else found

    def _count(self, prefix: Prefix, by: int) -> None:
        at = prefix.version, prefix.length
        self._with_length[at] += by
        lengths = self._lengths[prefix.version]
        if by > 0 and self._with_length[at] == 1:
            insort(lengths, prefix.length)
        elif not self._with_length[at]:
            lengths.remove(prefix.length)

    def _again(self, within: Prefix) -> set[Prefix]:
        """Works out the entries in a prefix again; returns those that changed."""
        changed = set()
        for prefix in list(self._inside(within)):
            held = self._held(prefix)
            if held != self.entries[prefix]:
                self.entries[prefix] = held
                changed.add(prefix)
        return changed

    def _inside(self, outer: Prefix) -> Iterator[Prefix]:
        if outer.length == BITS[outer.version]:
            if outer in self.entries:
                yield outer
            return
        for prefix in self.entries:
            further = prefix.length - outer.length
            if prefix.version == outer.version and further >= 0 and prefix.bits >> further == outer.bits:
                yield prefix

    def _held(self, prefix: Prefix) -> frozenset[Block]:
        held: set[Block] = set()
        for length in self._lengths[prefix.version]:
            if length > prefix.length:
                break
            outer = Prefix(prefix.version, length, prefix.bits >> (prefix.length - length))
            held |= self._on.get(outer, NOWHERE)
            held -= self._off.get(outer, NOWHERE)
        return frozenset(held)


class SortedAddresses:
    """Addresses as numbers, so that those in a prefix are found without looking at the others."""

    def __init__(self) -> None:
        self._values: dict[int, list[int]] = {4: [], 6: []}

    def add(self, version: int, value: int) -> None:
        insort(self._values[version], value)

    def remove(self, version: int, value: int) -> None:
        values = self._values[version]
        del values[bisect_left(values, value)]

    def inside(self, prefixes: Iterable[Prefix]) -> set[tuple[int, int]]:
        """(version, number) of the addresses in any of the prefixes."""
        found: set[tuple[int, int]] = set()
        for prefix in prefixes:
            values = self._values[prefix.version]
            first, end = bisect_left(values, prefix.first), bisect_left(values, prefix.end)
            found.update((prefix.version, value) for value in values[first:end])
        return found
