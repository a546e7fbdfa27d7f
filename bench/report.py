"""Figures for people: tables as Markdown, which is readable as it stands in a terminal too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.cni_report import cni
from bench.control_plane_report import control_plane
from bench.disturbance import Disturbance
from bench.first_packet_report import FirstPacketFigures
from bench.north_south_report import NorthSouthFigures
from bench.pods_report import pods, rate_text, ratio_text
from bench.policy_report import policy
from bench.rounds import Rates
from bench.rule_sets import RULE_SETS
from bench.tables import in_order, marked, services, table
from bench.traffic import TESTS, Sample


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
    Comparison("direct", "direct-quiet", "direct, events on / off"),
    Comparison("service-quiet", "direct-quiet", "Service / direct, events off"),
    *(Comparison("service", peer, f"Service / {peer}") for peer in RULE_SETS),
)


class Report:
    """Everything of one run, from the document that is in the JSON file."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.samples = [Sample(**sample) for sample in document.get("samples", [])]
        self.rates = Rates(self.samples)
        self.sizes = sorted({sample.services for sample in self.samples})
        self.placements = in_order(sample.placement for sample in self.samples)
        measured = {sample.test for sample in self.samples}
        self.tests = [test for test in TESTS if test.key in measured]
        self.ways = in_order(sample.way for sample in self.samples)
        first, north_south = document.get("first_packets"), document.get("north_south", {}).get("runs")
        self.first_packets = FirstPacketFigures(first) if first else None
        self.north_south = NorthSouthFigures(document["north_south"]) if north_south else None
        self.control_plane: list[dict[str, Any]] = document.get("control_plane", [])

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
        if self.first_packets:
            parts.append(self.first_packets.markdown())
        if self.north_south:
            parts.append(self.north_south.markdown())
        if self.document.get("pods"):
            parts.append(pods(self.document["pods"]))
        if self.document.get("policy"):
            parts.append(policy(self.document["policy"], self.document.get("policy_tables", {})))
        if self.document.get("cni"):
            parts.append(cni(self.document["cni"]))
        parts += [control_plane(scale) for scale in self.control_plane]
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
        for peer, reason in self.document.get("missing_peers", {}).items():
            lines.append(f"Not measured: {peer} ({reason}).")
        if self.document.get("incomplete"):
            lines.append(f"**Incomplete**: {self.document['incomplete']}")
        return "\n".join(lines)

    def _rates(self, placement: str, size: int) -> str:
        rows = []
        for test in self.tests:
            cells = [self.rates.rate(size, placement, test.key, way) for way in self.ways]
            rows.append([test.title, *(rate_text(test, cell) for cell in cells)])
        return f"Rates with {services(size)}:\n\n" + table(["", *self.ways], rows)

    def _ratios(self, placement: str, size: int) -> str:
        comparisons = in_order(c for test in self.tests for c in self.available(size, placement, test.key))
        if not comparisons:
            return ""
        rows = []
        for test in self.tests:
            ratios = [self.rates.ratio(size, placement, test.key, c.way, c.to) for c in comparisons]
            rows.append([test.title, *(ratio_text(ratio) for ratio in ratios)])
        return f"Ratios with {services(size)}:\n\n" + table(["", *(c.title for c in comparisons)], rows)

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
                rows.append([test.title, *(marked(ratio / ratios[0]) for ratio in ratios)])
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
