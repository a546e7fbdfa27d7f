"""North-south as a table: packets per second of one core, and what a packet costs without the generator."""

from __future__ import annotations

from typing import Any

from bench.north_south import MODES
from bench.rounds import Spread, spread
from bench.tables import in_order, table

#: What is known of hardware, for the same three ways through a node (XDP : tc : iptables).
HARDWARE = "10 : 3.6 : 2.1"
_BASE = "iptables-legacy"
_FLOOR = "floor"


class NorthSouthFigures:
    """Packets per second by mode."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._found = found
        self._rates: dict[str, dict[int, float]] = {}
        for run in found["runs"]:
            self._rates.setdefault(run["mode"], {})[run["round"]] = run["received"] / run["seconds"]
        self.modes = in_order(self._rates)

    def rate(self, mode: str) -> Spread:
        return spread(self._rates[mode].values())

    def node_ns(self, mode: str) -> float | None:
        """Nanoseconds of a packet in the node and on its way out: what the mode takes more than the generator alone in
        the same round, the median of all rounds."""
        floor = self._rates.get(_FLOOR, {})
        both = self._rates[mode].keys() & floor.keys()
        if mode == _FLOOR or not both:
            return None
        return spread(1e9 / self._rates[mode][n] - 1e9 / floor[n] for n in both).median

    def markdown(self) -> str:
        rows = []
        for mode in self.modes:
            rate, ns = self.rate(mode), self.node_ns(mode)
            lost = self._lost(mode)
            rows.append(
                [
                    MODES[mode].title if mode in MODES else mode,
                    f"{rate.median / 1e3:,.0f} [{rate.low / 1e3:,.0f}–{rate.high / 1e3:,.0f}]",
                    self._relative(rate.median, self.rate(_BASE).median if _BASE in self.modes else None),
                    f"{ns:,.0f}" if ns is not None else "",
                    self._relative(self.node_ns(_BASE) if _BASE in self.modes else None, ns),
                    f"{lost:.1%}",
                ]
            )
        head = [
            "",
            "thousand packets/s",
            "/ iptables",
            "ns in the node",
            "iptables' ns / these",
            "lost",
        ]
        parts = [
            f"### North-south, one core\n\nNodePort to a backend on another node, 64-byte UDP, {self._found['flows']} "
            f"known flows, {self._found['services']:,} Services. Generator and node share the core; the node's own "
            "part is what is left when the generator's is taken off:",
            table(head, rows),
        ]
        for mode, ns in self._found["program_ns"].items():
            parts.append(
                f"The program of {mode} alone (BPF_PROG_TEST_RUN, one run at a time): {ns['least']:.0f} ns at least, "
                f"{ns['median']:.0f} ns median, of which the harness takes some 20."
            )
        if _BASE in self.modes:
            ours = [mode for mode in self.modes if mode in MODES and MODES[mode].agent is not None]
            split = " : ".join(f"{2.1 * self.rate(mode).median / self.rate(_BASE).median:.1f}" for mode in ours)
            parts.append(
                f"Known of hardware: XDP : tc : iptables = {HARDWARE}. Here, on the same scale: "
                f"{' : '.join(ours)} : iptables = {split} : 2.1, the generator's part included."
            )
        return "\n\n".join(parts)

    def _lost(self, mode: str) -> float:
        runs = [run for run in self._found["runs"] if run["mode"] == mode]
        # answers to the router and the like come out as well, so that it may be more than was sent
        received, sent = sum(int(run["received"]) for run in runs), sum(int(run["sent"]) for run in runs)
        return max(0.0, 1 - received / sent)

    @staticmethod
    def _relative(value: float | None, to: float | None) -> str:
        return f"{value / to:.2f}" if value and to else ""
