"""Pod to pod, for people."""

from __future__ import annotations

from typing import Any

from bench.rounds import Rates, Spread
from bench.tables import in_order, marked, table
from bench.traffic import TESTS, Sample, Test

_RATIOS = (("direct", "plain"), ("direct", "bridge"), ("direct-vxlan", "plain-vxlan"), ("direct-vxlan", "direct"))


def pods(rows: list[dict[str, Any]]) -> str:
    """Rates and ratios of every placement."""
    samples = [Sample(**row) for row in rows]
    rates = Rates(samples)
    parts = ["### Pod to pod, without a Service"]
    measured = {sample.test for sample in samples}
    tests = [test for test in TESTS if test.key in measured]
    for placement in in_order(sample.placement for sample in samples):

        def has(test: str, *ways: str, placement: str = placement) -> bool:
            return all(rates.has(0, placement, test, way) for way in ways)

        ways = in_order(sample.way for sample in samples if sample.placement == placement)
        lines = []
        for test in tests:
            cells = (rate_text(test, rates.rate(0, placement, test.key, w)) if has(test.key, w) else "" for w in ways)
            lines.append([test.title, *cells])
        parts.append(f"{placement.capitalize()}:\n\n" + table(["", *ways], lines))
        pairs = [pair for pair in _RATIOS if set(pair) <= set(ways)]
        lines = []
        for test in tests:
            found = (
                ratio_text(rates.ratio(0, placement, test.key, *pair)) if has(test.key, *pair) else "" for pair in pairs
            )
            lines.append([test.title, *found])
        parts.append(table(["", *(f"{way} / {to}" for way, to in pairs)], lines))
    return "\n\n".join(parts)


def rate_text(test: Test, rate: Spread) -> str:
    if test.unit == "bit/s":
        return f"{rate.median / 1e9:.2f} Gbit/s [{rate.low / 1e9:.2f}–{rate.high / 1e9:.2f}]"
    return f"{rate.median:,.0f}/s [{rate.low:,.0f}–{rate.high:,.0f}]"


def ratio_text(ratio: Spread) -> str:
    return f"{marked(ratio.median)} [{ratio.low:.2f}–{ratio.high:.2f}]"
