"""Figures for people: tables as Markdown, which is readable as it stands in a terminal too."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.disturbance import Disturbance
from bench.rounds import Rates, Spread
from bench.traffic import TESTS, Sample, Test

#: What issue and documentation promise; a figure below is marked.
AIM = 0.97
_MIB = 1 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two ways, and what their ratio says."""

    way: str
    to: str
    title: str


COMPARISONS = (
    Comparison("direct", "plain", "direct / plain"),
    Comparison("service", "direct", "Service / direct"),
    Comparison("service", "service-quiet", "events on / off"),
    Comparison("service-quiet", "direct-quiet", "Service / direct, events off"),
)


class Report:
    """Everything of one run, from the document that is in the JSON file."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.samples = [Sample(**sample) for sample in document["samples"]]
        self.rates = Rates(self.samples)
        self.sizes = sorted({sample.services for sample in self.samples})
        self.placements = _in_order(sample.placement for sample in self.samples)
        measured = {sample.test for sample in self.samples}
        self.tests = [test for test in TESTS if test.key in measured]
        self.ways = _in_order(sample.way for sample in self.samples)

    def markdown(self) -> str:
        parts = [self._machine()]
        for placement in self.placements:
            parts.append(f"### {placement.capitalize()}\n\n" + self._rates(placement, self.sizes[-1]))
            for size in self.sizes:
                parts.append(self._ratios(placement, size))
        if len(self.sizes) > 1:
            parts += self._flatness()
        if self.document.get("base_line_alone"):
            parts.append(self._base_line())
        if self.document.get("scale"):
            parts.append(self._scale(self.document["scale"]))
        return "\n\n".join(part for part in parts if part) + "\n"

    def available(self, size: int, placement: str, test: str) -> list[Comparison]:
        """The comparisons for which both ways were measured."""
        has = self.rates.has
        return [c for c in COMPARISONS if has(size, placement, test, c.way) and has(size, placement, test, c.to)]

    # -- traffic ------------------------------------------------------------------------------------------------

    def _machine(self) -> str:
        machine, options = self.document["machine"], self.document["options"]
        lost = sum(sample.lost for sample in self.samples)
        repeated = sum(sample.attempts - 1 for sample in self.samples)
        disturbed = sum(Disturbance(sample.foreign, sample.stolen).too_much for sample in self.samples)
        lines = [
            f"Measured {self.document['made']} with waggle {machine['waggle']} on {machine['cpus']} × "
            f"{machine['cpu']}, Linux {machine['kernel']}.",
        ]
        if self.samples:
            lines.append(
                f"{options['rounds']} alternated rounds of {options['seconds']:g} s; medians, with the middle half of "
                f"the rounds in brackets; IPv{options['family']}, {options['servers']} serving pods per node, "
                f"connections closed with {options['close'].upper()}. {lost} datagrams lost. {repeated} runs were "
                f"repeated because something else took CPU time; of the {len(self.samples)} that count, {disturbed} "
                "were disturbed all the same."
            )
        if self.document.get("incomplete"):
            lines.append(f"**Incomplete**: {self.document['incomplete']}")
        return "\n".join(lines)

    def _rates(self, placement: str, size: int) -> str:
        rows = []
        for test in self.tests:
            cells = [self.rates.rate(size, placement, test.key, way) for way in self.ways]
            rows.append([test.title, *(_rate(test, cell) for cell in cells)])
        return f"Rates with {_services(size)}:\n\n" + table(["", *self.ways], rows)

    def _ratios(self, placement: str, size: int) -> str:
        comparisons = _in_order(c for test in self.tests for c in self.available(size, placement, test.key))
        if not comparisons:
            return ""
        rows = []
        for test in self.tests:
            ratios = [self.rates.ratio(size, placement, test.key, c.way, c.to) for c in comparisons]
            rows.append([test.title, *(_ratio(ratio) for ratio in ratios)])
        return f"Ratios with {_services(size)}:\n\n" + table(["", *(c.title for c in comparisons)], rows)

    def _flatness(self) -> list[str]:
        parts = []
        for placement in self.placements:
            rows = []
            for test in self.tests:
                if not self.rates.has(self.sizes[0], placement, test.key, "service"):
                    continue
                ratios = [
                    self.rates.ratio(size, placement, test.key, "service", "direct").median for size in self.sizes
                ]
                rows.append([test.title, *(_marked(ratio / ratios[0]) for ratio in ratios)])
            if rows:
                head = f"Flat in the number of Services, {placement} (Service / direct, relative to {self.sizes[0]}):"
                parts.append(f"{head}\n\n" + table(["", *map(str, self.sizes)], rows))
        return parts

    def _base_line(self) -> str:
        alone = Rates(Sample(**sample) for sample in self.document["base_line_alone"])
        rows = []
        for placement in self.placements:
            for test in self.tests:
                size = self.sizes[0]
                if alone.has(0, placement, test.key, "plain") and self.rates.has(size, placement, test.key, "plain"):
                    ratio = (
                        self.rates.rate(size, placement, test.key, "plain").median
                        / alone.rate(0, placement, test.key, "plain").median
                    )
                    rows.append([test.title, placement, f"{ratio:.3f}"])
        title = "The base line beside running labs, relative to the base line alone on the machine:"
        return f"{title}\n\n" + table(["", "", "beside / alone"], rows)

    # -- scale --------------------------------------------------------------------------------------------------

    def _scale(self, scale: dict[str, Any]) -> str:
        figures = summary(scale)
        starts, changes = scale["cold_start_s"], scale["change_disturbance"]
        rows = [
            ["Cold start until every map is written", f"{figures['cold start']:.2f} s", "2 s"],
            ["Restart with everything pinned, until a change made meanwhile is applied",
             f"{figures['restart']:.2f} s", ""],
            ["One EndpointSlice change until its map entry is written, p50", f"{figures['change p50']:.2f} ms",
             "10 ms"],
            ["… p90", f"{figures['change p90']:.2f} ms", ""],
            ["… p99", f"{figures['change p99']:.2f} ms", "50 ms"],
            ["Memory of the agent (proportional set)", f"{figures['agent PSS'] / _MIB:.0f} MiB", "150 MiB"],
            ["Memory of the agent (resident set)", f"{figures['agent RSS'] / _MIB:.0f} MiB", ""],
            ["Memory of the maps", f"{figures['maps'] / _MIB:.1f} MiB", "40 MiB"],
            ["Agent's share of one CPU while nothing changes", f"{scale['agent_idle_cpu']:.1%}", ""],
        ]  # fmt: skip
        maps = sorted(scale["maps"], key=lambda entry: -int(entry["bytes"]))[:6]
        largest = ", ".join(f"{entry['name']} {entry['bytes'] / _MIB:.1f} MiB" for entry in maps)
        return (
            f"### The agent with {scale['services']} Services of {scale['endpoints']} endpoints\n\n"
            + table(["", "measured", "aim"], rows)
            + f"\n\n{len(starts)} cold starts: {_listed(starts, 'all')} s, of which the agent's own CPU time "
            + f"{_listed(starts, 'cpu')} s; {len(scale['restart_s'])} restarts: "
            + f"{_listed(scale['restart_s'], 'applied')} s; {len(scale['change_ms'])} changes. Other processes took "
            + f"{_listed(starts, 'foreign', '.0%')} of the CPU time during the starts and {changes['foreign']:.0%} "
            + f"during the changes. Largest maps: {largest}."
        )


def quantile(values: list[float], share: float) -> float:
    """The value that `share` of all do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered))) - 1]


def summary(scale: dict[str, Any]) -> dict[str, float]:
    """The figures of the scale section: seconds, milliseconds and bytes."""
    changes = scale["change_ms"]
    memory = list(scale["agent_memory"].values())
    return {
        "cold start": statistics.median(start["all"] for start in scale["cold_start_s"]),
        "restart": statistics.median(start["applied"] for start in scale["restart_s"]),
        "change p50": quantile(changes, 0.5),
        "change p90": quantile(changes, 0.9),
        "change p99": quantile(changes, 0.99),
        "agent PSS": max(entry["pss"] for entry in memory),
        "agent RSS": max(entry["rss"] for entry in memory),
        "maps": sum(entry["bytes"] for entry in scale["maps"]),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it lines up as text. The first column is left-aligned, others right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])


def _listed(runs: Sequence[dict[str, float]], key: str, form: str = ".2f") -> str:
    return ", ".join(format(run[key], form) for run in runs)


def _services(size: int) -> str:
    return "1 Service" if size == 1 else f"{size:,} Services"


def _rate(test: Test, rate: Spread) -> str:
    if test.unit == "bit/s":
        return f"{rate.median / 1e9:.2f} Gbit/s [{rate.low / 1e9:.2f}–{rate.high / 1e9:.2f}]"
    return f"{rate.median:,.0f}/s [{rate.low:,.0f}–{rate.high:,.0f}]"


def _ratio(ratio: Spread) -> str:
    return f"{_marked(ratio.median)} [{ratio.low:.2f}–{ratio.high:.2f}]"


def _marked(ratio: float) -> str:
    return f"{ratio:.3f}" + (" !" if ratio < AIM else "")


def _in_order(values: Iterable[T]) -> list[T]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))
