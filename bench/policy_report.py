"""What policies cost, for people."""

from __future__ import annotations

import statistics
from typing import Any

from bench.pods_report import rate_text, ratio_text
from bench.policy import CASES, MAPS, NO_POLICY
from bench.rounds import Rates
from bench.tables import in_order, table
from bench.traffic import TESTS, Sample


def policy(rows: list[dict[str, Any]], tables: dict[str, dict[str, Any]]) -> str:
    """Rates without policies, and all others as ratios to them; what the tables hold and weigh."""
    samples = [Sample(**row) for row in rows]
    rates = Rates(samples)
    parts = ["### Policies"]
    titles = {case.name: case.title for case in CASES}
    measured = {sample.test for sample in samples}
    for placement in in_order(sample.placement for sample in samples):
        lines = []
        for test in (test for test in TESTS if test.key in measured):
            ways = [case.name for case in CASES if rates.has(0, placement, test.key, case.name)]
            if NO_POLICY not in ways:
                continue
            ratios = {way: ratio_text(rates.ratio(0, placement, test.key, way, NO_POLICY)) for way in ways}
            others = [ratios.get(case.name, "") for case in CASES if case.name != NO_POLICY]
            lines.append([test.title, rate_text(test, rates.rate(0, placement, test.key, NO_POLICY)), *others])
        heads = [f"{titles[case.name]} / no policy" for case in CASES if case.name != NO_POLICY]
        parts.append(f"{placement.capitalize()}:\n\n" + table(["", "no policy", *heads], lines))
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
