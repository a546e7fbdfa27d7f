"""Metrics that are read when somebody asks: counters of the programs, sizes of tables, state of the sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from waggle.observe.counters import all_reasons, counters, drops

if TYPE_CHECKING:
    from waggle.agent.agent import Agent

Family = CounterMetricFamily | GaugeMetricFamily


class DatapathCollector(Collector):
    """One scrape reads every per-CPU counter once."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Family]:
        maps = self._agent.datapath.maps
        if not maps:
            return
        dropped = CounterMetricFamily(
            "waggle_drops", "Packets and connections dropped, by reason and hook.", labels=["reason", "hook"]
        )
        found = drops(maps["wag_drops"])
        for (reason, hook), value in sorted(found.items()):
            dropped.add_metric([reason, hook], value)
        for reason in all_reasons():
            if not any(known == reason for known, _ in found):
                dropped.add_metric([reason, ""], 0)
        yield dropped
        for name, value in counters(maps["wag_counters"]).items():
            yield CounterMetricFamily(f"waggle_{name}", _COUNTER_HELP[name], value=value)
        tables = self._agent.tables
        yield GaugeMetricFamily("waggle_services", "Services known.", value=len(self._agent.store.services))
        yield GaugeMetricFamily("waggle_frontends", "Entries of the frontend table.", value=tables.frontend_count)
        yield GaugeMetricFamily("waggle_backends", "Records of the backend table in use.", value=tables.backend_count)
        yield GaugeMetricFamily("waggle_pods", "Pods attached on this node.", value=len(self._agent.cni.pods()))
        yield GaugeMetricFamily(
            "waggle_problems", "Objects and sources with a problem.", value=self._agent.problem_count
        )
        yield GaugeMetricFamily(
            "waggle_synced", "1: every source has given its first full view.", value=self._agent.synced
        )
        memory = GaugeMetricFamily("waggle_map_memory_bytes", "Kernel memory of each map.", labels=["map"])
        for name, value in sorted(self._agent.datapath.map_memory().items()):
            memory.add_metric([name], value)
        yield memory


_COUNTER_HELP = {
    "events_lost": "Events that found the ring buffer full.",
    "socket_lb": "Connects and sends translated at the socket.",
    "packet_lb": "Flows translated per packet.",
    "udp_slot": "UDP sockets that talked to more Services at once than are remembered.",
}
