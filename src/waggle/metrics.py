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
            "Time from noticing changes until the maps hold them; full: every Service was planned again.",
            ["kind"],
            buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self.registry,
        )
        self.sync_failures = Counter(
            "waggle_sync_failures_total", "Passes that ended with an error and are tried again.", registry=self.registry
        )
        self.last_sync = Gauge(
            "waggle_last_sync_timestamp_seconds", "When the maps last were as the plan wants.", registry=self.registry
        )
        self.last_queued = Gauge(
            "waggle_last_queued_timestamp_seconds", "When changes were last noticed.", registry=self.registry
        )
        self.programming_duration = Histogram(
            "waggle_network_programming_duration_seconds",
            "Time until the maps hold a change, from what the EndpointSlice says was its cause, or from when the "
            "change was seen. Deletions and what is older than the agent do not count.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300),
            registry=self.registry,
        )
        self.changes = Counter(
            "waggle_changes_total", "Objects that changed, by kind.", ["kind"], registry=self.registry
        )
        self.health_requests = Counter(
            "waggle_health_requests_total",
            "Answers of /healthz and /livez, by HTTP status.",
            ["path", "code"],
            registry=self.registry,
        )
        self.health_starts = Counter(
            "waggle_health_server_starts_total",
            "Times that the agent started the process that answers health ports.",
            registry=self.registry,
        )
        self.socket_sweeps = Histogram(
            "waggle_socket_sweep_duration_seconds",
            "Time that a walk over UDP sockets took, which aborts those whose backend serves no more.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
            registry=self.registry,
        )
        self.sockets_aborted = Counter(
            "waggle_udp_sockets_aborted_total",
            "Connected UDP sockets that were aborted because their backend served no more.",
            registry=self.registry,
        )
        self.writes = Counter(
            "waggle_map_writes_total", "Map entries written or deleted, by table.", ["table"], registry=self.registry
        )
        self.drift = Counter(
            "waggle_drift_total",
            "Map entries that were found to be other than they should, by table; they were repaired.",
            ["table"],
            registry=self.registry,
        )
        self.last_drift_check = Gauge(
            "waggle_last_drift_check_timestamp_seconds",
            "When the maps were last compared with what they should hold.",
            registry=self.registry,
        )
        self.dns_requests = Counter(
            "waggle_dns_requests_total",
            "DNS questions, by who answered (own, forwarded, none) and how: an RCODE, or why there was no answer.",
            ["source", "answer"],
            registry=self.registry,
        )
        self.cni_duration = Histogram(
            "waggle_cni_duration_seconds",
            "Time that CNI requests took in the agent.",
            ["command", "outcome"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
            registry=self.registry,
        )
