"""Per-CPU counters of the programs, summed."""

from __future__ import annotations

import struct

from waggle.abi._generated import BUCKET_SIZE, Bucket, Counter, EventKind, Hook
from waggle.kernel.maps import Map
from waggle.observe.reasons import hook_name, reason_name


def _sum(raw: bytes) -> int:
    return sum(struct.unpack(f"={len(raw) // 8}Q", raw))


def drops(table: Map) -> dict[tuple[str, str], int]:
    """(reason, hook) → packets or connections dropped so far; only what is not zero."""
    found = {}
    for key, raw in table.dump():
        total = _sum(raw)
        if total:
            index = int.from_bytes(key, "little")
            found[reason_name(index // Hook.MAX), hook_name(index % Hook.MAX)] = total
    return found


def counters(table: Map) -> dict[str, int]:
    """Name of enum wag_counter in lower case → value."""
    values = {int.from_bytes(key, "little"): _sum(raw) for key, raw in table.dump()}
    return {c.name.lower(): values.get(int(c), 0) for c in Counter if c is not Counter.MAX}


def flows(table: Map) -> dict[str, int]:
    """Hook → flows that began there; every hook."""
    found = {hook_name(hook): 0 for hook in Hook if hook is not Hook.MAX}
    for key, raw in table.dump():
        name = hook_name(int.from_bytes(key, "little"))
        if name in found:
            found[name] = _sum(raw)
    return found


def suppressed(table: Map) -> dict[str, int]:
    """Kind of event → those that were left out because there were too many."""
    found = {kind.name.lower(): 0 for kind in EventKind if kind is not EventKind.MAX}
    for key, raw in table.dump():
        number = int.from_bytes(key, "little")
        if EventKind.DROP <= number < EventKind.MAX:
            parts = (Bucket.unpack(raw[at : at + BUCKET_SIZE]) for at in range(0, len(raw), BUCKET_SIZE))
            found[EventKind(number).name.lower()] = sum(part.left_out for part in parts)
    return found
