"""The agent's own metrics. Those that mirror the data path are collected at scrape time (waggle.agent.telemetry)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector


class Metrics:
    """One registry per agent, so that several agents fit into one test process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.sync_duration = Histogram(
            "waggle_sync_duration_seconds",
            "Time from noticing changes until the maps hold them.",
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.sync_failures = Counter(
            "waggle_sync_failures_total", "Passes that ended with an error and are tried again.", registry=self.registry
        )
        self.last_sync = Gauge(
            "waggle_last_sync_timestamp_seconds", "When the maps last were as the plan wants.", registry=self.registry
        )
        self.writes = Counter(
            "waggle_map_writes_total", "Map entries written or deleted, by table.", ["table"], registry=self.registry
        )
        self.cni_duration = Histogram(
            "waggle_cni_duration_seconds",
            "Time that CNI requests took in the agent.",
            ["command", "outcome"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
            registry=self.registry,
        )
