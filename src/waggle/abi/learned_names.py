"""Domain names in policies, as the programs have them: the patterns they look for, and what they have learned."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from waggle.abi._generated import Name, NameKey, PatternKey
from waggle.abi.address import unpack_address

MOST_LETTERS = 253  # of a name without the dot at its end
_SHOWN = 64  # letters of a name that the programs keep


class Learned(NamedTuple):
    """What a pod was told. `name`: the one it asked for last, cut off after 64 letters. `patterns`: id of each pattern
    that a name of the address is of, and the seconds for which it still is."""

    ifindex: int
    address: str
    name: str
    patterns: dict[int, int]


def pack_pattern(pattern: str) -> bytes | None:
    """struct wag_pattern_key of a pattern in small letters; None for one that no name can be of."""
    exact = not pattern.startswith("*.")
    text = "." + pattern if exact else pattern[1:]
    if len(text) > MOST_LETTERS + 1 or not text.isascii():
        return None
    return PatternKey(int(exact), text[::-1].encode()).pack()


def learned(entries: Iterable[tuple[bytes, bytes]], now: float) -> Iterator[Learned]:
    """What of wag_names is in force at `now` (CLOCK_MONOTONIC)."""
    for key, raw in entries:
        asked, patterns = NameKey.unpack(key), in_force(raw, now)
        if patterns:
            text = Name.unpack(raw).text.rstrip(b"\0").decode("ascii", "replace")
            yield Learned(asked.ifindex, unpack_address(asked.addr), text, patterns)


def in_force(raw: bytes, now: float) -> dict[int, int]:
    """Of struct wag_name: id of a pattern → seconds that it has left."""
    found = Name.unpack(raw)
    pairs = zip(struct.unpack("=16I", found.pattern), struct.unpack("=16I", found.until), strict=True)
    return {pattern: until - int(now) for pattern, until in pairs if pattern and until >= int(now)}


def is_cut(name: str) -> bool:
    """Whether there may be more of the name."""
    return len(name) == _SHOWN
