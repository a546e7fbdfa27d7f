"""The way from tables that nobody planned for to those that are wanted: after a restart policies may be others.

`PolicyDelta` promises that whatever a packet meets is the old or the new, because the old sets have entries for the new
classes. What is read back has none. So every address whose class changes goes through a class of its own for the pair:
the old sets say of that what they said of the old class, and the new sets what they say of the new one. First addresses
move there, then pods to their sets, then addresses on to where they are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from waggle.plan.policy_predicates import hash64
from waggle.plan.policy_tables import NAMED, NOBODY, STRICT

#: Length and network, of addresses of 16 bytes.
Range = tuple[int, bytes]


@dataclass(slots=True)
class Bridge:
    """Classes of `addresses` and `ranges` on the way, and what each class of a pair stands for."""

    addresses: dict[bytes, int] = field(default_factory=dict)
    ranges: dict[Range, int] = field(default_factory=dict)
    pairs: dict[int, tuple[int, int]] = field(default_factory=dict)  # class → old, new

    def between(self, old: int, new: int) -> int:
        """The class of a pair; the class itself where it stays."""
        if old == new:
            return old
        made = hash64(f"{old} becomes {new}") & ~(STRICT | NAMED) | 1 << 62
        self.pairs[made] = old, new
        return made


class _Ranges:
    """Longest prefixes."""

    def __init__(self, ranges: Mapping[Range, int]) -> None:
        self._ranges = ranges
        self._lengths = sorted({length for length, _ in ranges}, reverse=True)

    def find(self, address: bytes, longest: int = 128) -> int:
        number = int.from_bytes(address, "big")
        for length in self._lengths:
            if length <= longest:
                network = (number >> (128 - length) << (128 - length)).to_bytes(16, "big")
                found = self._ranges.get((length, network))
                if found is not None:
                    return found
        return NOBODY


def bridge(
    old: tuple[Mapping[bytes, int], Mapping[Range, int]],
    new: tuple[Mapping[bytes, int], Mapping[Range, int]],
    otherwise: Callable[[bytes], int | None],
) -> Bridge:
    """`old` and `new`: classes of addresses and of ranges. `otherwise`: the class of an address that has no entry,
    where that is not what its range says."""
    found = Bridge()
    before, after = _Ranges(old[1]), _Ranges(new[1])

    def class_of(address: bytes, exact: Mapping[bytes, int], ranges: _Ranges) -> int:
        if address in exact:
            return exact[address]
        known = otherwise(address)
        return ranges.find(address) if known is None else known

    for address in {**old[0], **new[0]}:
        found.addresses[address] = found.between(class_of(address, old[0], before), class_of(address, new[0], after))
    for one in {**old[1], **new[1]}:
        length, network = one
        found.ranges[one] = found.between(before.find(network, length), after.find(network, length))
    return found
