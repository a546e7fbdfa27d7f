"""What policies cost, for people."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from bench.disturbance import Disturbance
from bench.pods_report import ratio_text
from bench.policy import BASE, CASES, MAPS, NO_POLICY, Case
from bench.rounds import Spread, spread
from bench.tables import in_order, table
from bench.traffic import TESTS, Sample


def policy(rows: list[dict[str, Any]], tables: dict[str, dict[str, Any]]) -> str:
    """Rates without policies, and with each condition as ratios to what was measured next to it; what tables weigh."""
    samples = [Sample(**{name: value for name, value in row.items() if name != "case"}) for row in rows]
    pairs = _Pairs(samples)
    parts = [
        "### Policies\n\n"
        "Two labs that take turns, and change roles at half time. A ratio is the median, with the middle half in "
        "brackets, of the geometric means of a round in either role. Left out are rounds in which something else took "
        f"CPU time, {pairs.disturbed} of {pairs.count}."
    ]
    titles = {case.name: case.title for case in (BASE, *CASES)}
    measured = {sample.test for sample in samples}
    cases = [case for case in CASES if any(sample.way == case.name for sample in samples)]
    for placement in in_order(sample.placement for sample in samples):
        lines = []
        for test in (test for test in TESTS if test.key in measured):
            bases = [
                sample.rate
                for sample in samples
                if sample.way.endswith(NO_POLICY) and (sample.placement, sample.test) == (placement, test.key)
            ]
            ratios = [pairs.ratio([case], placement, test.key) for case in cases]
            together = pairs.ratio([case for case in cases if case.policies], placement, test.key)
            cells = (ratio_text(ratio) if ratio else "disturbed" for ratio in (together, *ratios))
            lines.append([test.title, f"{statistics.median(bases):,.0f}/s", *cells])
        heads = [f"{title} / {BASE.title}" for title in ("policies, all together", *(case.title for case in cases))]
        parts.append(f"{placement.capitalize()}:\n\n" + table(["", BASE.title, *heads], lines))
    lines = [
        [
            titles[name],
            f"{facts['entries']:,}",
            f"{facts['classes']:,}",
            *(f"{facts['bytes'][map_name] / 2**20:.2f}" for map_name in MAPS),
            f"{sum(facts['bytes'].values()) / 2**20:.1f}",
            f"{facts['agent_bytes'] / 2**20:.0f}",
        ]
        for name, facts in tables.items()
    ]
    heads = [
        "",
        "pairs of set and class",
        "addresses",
        *(f"{name}, MiB" for name in MAPS),
        "together, MiB",
        "agent, MiB",
    ]
    parts.append("The tables of one node:\n\n" + table(heads, lines))
    for name, facts in tables.items():
        if times := sorted(facts["enforcement_ms"]):
            parts.append(
                f"{titles[name]}: from a pod's new label in its manifest to the kernel's table "
                f"{statistics.median(times):.1f} ms (median), {times[-1]:.1f} ms (most of {len(times)})."
            )
    return "\n\n".join(parts)


class _Pairs:
    """Runs next to one another: with what is measured, and without."""

    def __init__(self, samples: list[Sample]) -> None:
        by_round: dict[tuple[str, str, int], dict[str, Sample]] = {}
        for sample in samples:
            by_round.setdefault((sample.placement, sample.test, sample.round), {})[sample.way] = sample
        self._by_round = by_round
        self._rounds = 1 + max(sample.round for sample in samples)
        self.count = len(samples) // 2
        self.disturbed = sum(
            not _undisturbed(ways[case.name], ways[case.base])
            for ways in by_round.values()
            for case in CASES
            if case.name in ways and case.base in ways
        )

    def ratio(self, cases: Sequence[Case], placement: str, test: str) -> Spread | None:
        """Of all rounds of some cases; None where nothing is left."""
        half = self._rounds // 2
        both = (
            (self._of(case, placement, test, n), self._of(case, placement, test, n + half))
            for case in cases
            for n in range(half)
        )
        ratios = [math.sqrt(first * second) for first, second in both if first and second]
        return spread(ratios) if ratios else None

    def _of(self, case: Case, placement: str, test: str, number: int) -> float | None:
        ways = self._by_round.get((placement, test, number), {})
        if case.name not in ways or case.base not in ways:
            return None
        run, base = ways[case.name], ways[case.base]
        return run.rate / base.rate if _undisturbed(run, base) else None


def _undisturbed(*samples: Sample) -> bool:
    return not any(Disturbance(sample.foreign, sample.stolen).too_much for sample in samples)
