"""Metrics that are read when somebody asks: counters of the programs, sizes of tables, state of the sources."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from waggle.abi._generated import NAT_COUNT_SIZE, SWEEP_SIZE, NatCount, Outcome, Reason, Sweep
from waggle.abi.learned_names import in_force
from waggle.model.objects import KINDS
from waggle.observe.counters import counters, drops, flows, suppressed
from waggle.observe.denials import Denied
from waggle.observe.reasons import REJECTING, all_reasons, hook_direction, verdict_name

if TYPE_CHECKING:
    from waggle.agent.agent import Agent
    from waggle.kernel.maps import Map

Family = CounterMetricFamily | GaugeMetricFamily


class DatapathCollector(Collector):
    """One scrape reads every per-CPU counter once."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Family]:
        maps = self._agent.datapath.maps
        if not maps:
            return
        yield from self._verdicts(maps)
        for name, value in counters(maps["wag_counters"]).items():
            yield CounterMetricFamily(f"waggle_{name}", _COUNTER_HELP[name], value=value)
        yield from _names(maps)
        yield from _nat(maps, self._agent.datapath.nat_size)
        tables = self._agent.tables
        yield GaugeMetricFamily("waggle_services", "Services known.", value=len(self._agent.store.services))
        store = self._agent.store
        policies = GaugeMetricFamily("waggle_policies", "Policies known, by kind.", labels=["kind"])
        policies.add_metric(["NetworkPolicy"], len(store.policies))
        policies.add_metric(["ClusterNetworkPolicy"], len(store.cluster_policies))
        policies.add_metric(["NodePolicy"], len(store.node_policies))
        yield policies
        yield GaugeMetricFamily("waggle_frontends", "Entries of the frontend table.", value=tables.frontend_count)
        yield GaugeMetricFamily("waggle_backends", "Records of the backend table in use.", value=tables.backend_count)
        yield GaugeMetricFamily("waggle_pods", "Pods attached on this node.", value=len(self._agent.cni.pods()))
        yield GaugeMetricFamily(
            "waggle_problems", "Objects and sources with a problem.", value=self._agent.problem_count
        )
        yield GaugeMetricFamily(
            "waggle_synced", "1: every source has given its first full view.", value=self._agent.synced
        )
        yield from self._services()
        memory = GaugeMetricFamily("waggle_map_memory_bytes", "Kernel memory of each map.", labels=["map"])
        for name, value in sorted(self._agent.datapath.map_memory().items()):
            memory.add_metric([name], value)
        yield memory

    def _verdicts(self, maps: Mapping[str, Map]) -> Iterator[Family]:
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
        own = self._agent.flows
        denied = own.denials.counts()
        yield _by_verdict(found, flows(maps["wag_flow_counts"]), denied)
        policy = CounterMetricFamily(
            "waggle_policy_denials",
            "Packets that policies dropped (verdict dropped), or would drop if audited ones were enforced (audit), by "
            "the object that decided; where no rule did, by those that isolate the pod.",
            labels=["policy", "direction", "verdict"],
        )
        for who, value in sorted(denied.items()):
            policy.add_metric(list(who), value)
        yield policy
        left_out = CounterMetricFamily(
            "waggle_events_suppressed",
            "Events that were left out because there were too many (event-rate).",
            labels=["kind"],
        )
        for kind, value in suppressed(maps["wag_buckets"]).items():
            left_out.add_metric([kind], value)
        yield left_out
        yield GaugeMetricFamily("waggle_flow_history_events", "Events that are remembered.", value=len(own.history))
        yield GaugeMetricFamily(
            "waggle_flow_history_bytes", "Memory that they take, at most.", value=own.history.memory_bytes
        )
        yield CounterMetricFamily(
            "waggle_flow_log_lost",
            "Events that could not be written to the flow log.",
            value=own.log.lost if own.log is not None else 0,
        )

    def _services(self) -> Iterator[Family]:
        agent = self._agent
        yield GaugeMetricFamily(
            "waggle_programmed_services", "Services that have frontends in the table.", value=agent.tables.service_count
        )
        yield GaugeMetricFamily(
            "waggle_health_ports",
            "Health ports of Services on this node, one per Service and family.",
            value=agent.health.ports,
        )
        pending = GaugeMetricFamily(
            "waggle_changes_pending", "Objects whose change is not in the tables yet, by kind.", labels=["kind"]
        )
        waiting = agent.changes_pending
        for kind in sorted(KINDS):
            pending.add_metric([kind], waiting[kind])
        yield pending
        unmet = GaugeMetricFamily(
            "waggle_no_local_endpoints",
            "Services with traffic policy Local, internal or external, whose endpoints are all on other nodes.",
            labels=["policy"],
        )
        for policy in ("external", "internal"):
            unmet.add_metric([policy], sum(policy in found for found in agent.unmet.values()))
        yield unmet


def _by_verdict(
    dropped: Mapping[tuple[str, str], int], begun: Mapping[str, int], denied: Mapping[Denied, int]
) -> CounterMetricFamily:
    """Bounded: four verdicts, two directions."""
    found = dict.fromkeys(((verdict_name(o), way) for o in Outcome for way in ("egress", "ingress")), 0)
    for hook, value in begun.items():
        found["forwarded", hook_direction(hook)] += value
    rejecting = {reason.name.lower() for reason in Reason if reason in REJECTING}
    for (reason, hook), value in dropped.items():
        found["rejected" if reason in rejecting else "dropped", hook_direction(hook)] += value
    for who, value in denied.items():
        if who.verdict == "audit" and who.direction:
            found["audit", who.direction] += value
    family = CounterMetricFamily(
        "waggle_verdicts",
        "Flows that began (forwarded), and packets and connections that were not let through or, with audited policies "
        "enforced, would not be (audit), by direction as seen from pods and processes of the node.",
        labels=["verdict", "direction"],
    )
    for labels, value in found.items():
        family.add_metric(list(labels), value)
    return family


def _names(maps: Mapping[str, Map]) -> Iterator[Family]:
    entries, now = maps["wag_names"].dump(), time.monotonic()
    yield GaugeMetricFamily(
        "waggle_names",
        "Addresses that pods may reach by a name that a DNS answer gave them.",
        value=sum(bool(in_force(raw, now)) for _, raw in entries),
    )
    made = counters(maps["wag_counters"])["name_entry"]
    yield CounterMetricFamily(
        "waggle_names_evicted",
        "Such addresses that were forgotten: those not used for longest make room.",
        value=max(0, made - len(entries)),
    )


def _nat(maps: Mapping[str, Map], size: int) -> Iterator[Family]:
    zero = bytes(4)
    swept = Sweep.unpack(maps["wag_sweeps"].lookup(zero) or bytes(SWEEP_SIZE))
    count = NatCount.unpack(maps["wag_nat_counts"].lookup(zero) or bytes(NAT_COUNT_SIZE))
    yield GaugeMetricFamily("waggle_nat_size", "Entries that the NAT table has room for.", value=size)
    yield GaugeMetricFamily("waggle_nat_entries", "Entries of the NAT table, at the last sweep.", value=swept.entries)
    yield GaugeMetricFamily(
        "waggle_nat_confirmed_flows", "Translated flows whose clients went on after an answer.", value=swept.confirmed
    )
    yield GaugeMetricFamily(
        "waggle_nat_sweep_seconds", "How long the last sweep over the NAT table took.", value=swept.took_ns / 1e9
    )
    yield CounterMetricFamily("waggle_nat_sweeps", "Sweeps over the NAT table.", value=swept.sweeps)
    yield CounterMetricFamily("waggle_nat_expired", "NAT entries whose time was over.", value=swept.expired)
    yield CounterMetricFamily("waggle_nat_flows", "Translated flows that began.", value=count.begun)
    yield CounterMetricFamily(
        "waggle_nat_displaced",
        "Translated flows that were never confirmed and made room for others that began.",
        value=count.displaced,
    )


_COUNTER_HELP = {
    "events_lost": "Events that found the ring buffer full.",
    "socket_lb": "Connects and sends translated at the socket.",
    "packet_lb": "Flows translated per packet.",
    "udp_slot": "UDP sockets asked for one more Service than they remember: in pods it is served per packet.",
    "dsr": "Flows that another node sent here to be answered directly.",
    "name_learned": "Addresses that DNS answers gave pods for names in their policies.",
    "name_entry": "Those that the pod had not been told lately.",
    "name_slot": "Names in policies that made room for another one of the same address.",
    "name_refused": "Addresses that a pod may not use as it was told too many within a minute.",
    "name_unreadable": "DNS answers to pods with names in their policies that could not be read to their end.",
    "masquerade": "Flows of pods that left the cluster with the node's address.",
}
