"""First packets as tables: how long, and how many times as long as through waggle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.rule_sets import RULE_SETS
from bench.tables import in_order, quantile, services, table

#: Ways of waggle, in the order in which one of them is what the peers are compared with.
_OURS = ("service", "service-packet")


class FirstPacketFigures:
    """Nanoseconds of every connect(), by number of Services and way."""

    def __init__(self, runs: Sequence[dict[str, Any]]) -> None:
        self._ns: dict[tuple[int, str], list[int]] = {}
        for run in runs:
            self._ns.setdefault((run["services"], run["way"]), []).extend(run["ns"])
        self.sizes = sorted({size for size, _ in self._ns})
        self.ways = in_order(way for _, way in self._ns)

    def us(self, size: int, way: str, share: float) -> float:
        """Microseconds that `share` of the connections do not exceed."""
        return quantile(self._ns[size, way], share) / 1e3

    def markdown(self) -> str:
        count = len(next(iter(self._ns.values())))
        parts = [
            "### First packet\n\nMicroseconds of connect() to Services that were not asked before, spread over all of "
            f"them, one node; {count} connections each. p50 / p99:\n\n" + self._times()
        ]
        if any(way in self.ways for way in RULE_SETS) and _OURS[0] in self.ways:
            parts.append(
                "Relative to the same through waggle (p50 / p99; below 1: faster than waggle):\n\n" + self._ratios()
            )
        return "\n\n".join(parts)

    def _times(self) -> str:
        rows = []
        for size in self.sizes:
            cells = [f"{self.us(size, way, 0.5):.1f} / {self.us(size, way, 0.99):.1f}" for way in self.ways]
            rows.append([services(size), *cells])
        return table(["", *self.ways], rows)

    def _ratios(self) -> str:
        pairs = [(peer, ours) for ours in _OURS for peer in RULE_SETS if peer in self.ways and ours in self.ways]
        rows = []
        for size in self.sizes:
            cells = []
            for peer, ours in pairs:
                p50, p99 = (self.us(size, peer, share) / self.us(size, ours, share) for share in (0.5, 0.99))
                cells.append(f"{p50:.2f} / {p99:.2f}")
            rows.append([services(size), *cells])
        return table(["", *(f"{peer} / {ours}" for peer, ours in pairs)], rows)
