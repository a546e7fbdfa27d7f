"""Per-CPU counters of the programs, summed."""

from __future__ import annotations

import struct

from waggle.abi._generated import Counter, Hook, Reason
from waggle.kernel.maps import Map
from waggle.observe.events import hook_name, reason_name


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


def all_reasons() -> list[str]:
    """Every drop reason there is, for documentation and for metrics that start at zero."""
    return [r.name.lower() for r in Reason if r not in (Reason.NONE, Reason.MAX)]
