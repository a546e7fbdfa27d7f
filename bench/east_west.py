"""Pods that talk to pods: rates and first packets, directly and through Services, by waggle and by its peers.

Everything that is compared is up at the same time, and the number of Services grows for all of them together.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from bench.figures import Figures
from bench.first_packet import FirstPackets, measure_first_packets
from bench.kube_proxy import RuleNetwork, ThroughRules
from bench.plain import PlainNetwork
from bench.rounds import measure
from bench.rule_sets import RULE_SETS
from bench.traffic import ClientSettings, Sample, Test, cpus
from bench.ways import PlainRouting, Way

#: Measured for the first packet only: after it, packets of either kind are translated at the same speed.
_FIRST_ONLY = ("service-packet",)
_LAB_WAYS = ("direct", "service", "service-packet")
_QUIET_WAYS = ("direct-quiet", "service-quiet")
WAYS = ("plain", *_LAB_WAYS, *_QUIET_WAYS, *RULE_SETS)
DEFAULT_WAYS = ("plain", "direct", "service", "service-packet", "iptables-legacy", "nftables")


def measure_east_west(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    """Rates with `options.tests`, first packets with `options.first_packet`; skips what `figures` holds already."""
    client_cpu, server_cpu = cpus()
    settings = ClientSettings(options.seconds, options.warmup, options.close, client_cpu, options.attempts)
    with ExitStack() as stack:
        ways = _ways(options, server_cpu, stack, settings, figures, progress)
        sustained = [way for way in ways if way.name not in _FIRST_ONLY or options.ways == [way.name]]
        first = [way for way in ways if way.name != "plain"]
        for services in sorted(options.services):
            if _all_there(options, figures, services, sustained, first):
                continue
            for way in ways:
                if type(way).program is not Way.program:
                    progress(f"programming {services} Services: {way.name}")
                    way.program(services)
            time.sleep(options.settle)
            if options.first_packet and first:
                progress(f"{services} Services: first packets")
                _first_packets(options, figures, services, first, client_cpu)
            _rates(sustained, options, services, settings, figures, progress, "samples")


def _ways(
    options: argparse.Namespace,
    server_cpu: int | None,
    stack: ExitStack,
    settings: ClientSettings,
    figures: Figures,
    progress: Callable[[str], None],
) -> list[Way]:
    """In the order of `options.ways`, each brought up; the base line is measured alone first."""
    ways: dict[str, Way] = {}
    if "plain" in options.ways:
        progress("base line: plain routed namespaces")
        plain = PlainRouting(stack.enter_context(PlainNetwork(options.servers, server_cpu)), options.family)
        drop_time_wait([plain])
        ways["plain"] = plain
        if len(options.ways) > 1:
            _rates([plain], options, 0, settings, figures, progress, "base_line_alone")
    ways |= _lab_ways(options, server_cpu, stack, progress)
    for name, rules in RULE_SETS.items():
        if name in options.ways:
            progress(f"namespaces for {rules.title}")
            ways[name] = ThroughRules(stack.enter_context(RuleNetwork(rules, options.servers, server_cpu)))
    drop_time_wait(list(ways.values()))
    return [ways[name] for name in options.ways]


def _lab_ways(
    options: argparse.Namespace, server_cpu: int | None, stack: ExitStack, progress: Callable[[str], None]
) -> dict[str, Way]:
    ways: dict[str, Way] = {}
    asked = {name for name in options.ways if name in (*_LAB_WAYS, *_QUIET_WAYS)}
    if not asked:
        return ways
    # only here: the base line and the peers can be measured without waggle installed
    from bench.lab_network import ClusterIP, ClusterIPPerPacket, Direct, LabNetwork, remove_leftover_labs

    remove_leftover_labs()
    family = options.family
    if asked & set(_LAB_WAYS):
        progress("lab with events on")
        lab = stack.enter_context(LabNetwork(options.servers, server_cpu, "on"))
        ways["direct"] = Direct(lab, family, "direct", "pod to pod with waggle")
        ways["service"] = ClusterIP(lab, family, "service", "pod to ClusterIP with waggle")
        ways["service-packet"] = ClusterIPPerPacket(lab, family, "service-packet", "the same, translated per packet")
    if asked & set(_QUIET_WAYS):
        progress("lab with events off")
        quiet = stack.enter_context(LabNetwork(options.servers, server_cpu, "off", flow_events="off"))
        ways["direct-quiet"] = Direct(quiet, family, "direct-quiet", "pod to pod, events off")
        ways["service-quiet"] = ClusterIP(quiet, family, "service-quiet", "pod to ClusterIP, events off")
    return ways


def _rates(
    ways: Sequence[Way],
    options: argparse.Namespace,
    services: int,
    settings: ClientSettings,
    figures: Figures,
    progress: Callable[[str], None],
    key: str,
) -> None:
    tests: list[Test] = options.tests
    rows = figures.rows(key)

    def record(sample: Sample) -> None:
        rows.append(dataclasses.asdict(sample))

    for placement in options.places:
        for test in tests:
            if _rates_there(options, figures, services, placement, test, len(ways), key):
                continue
            progress(f"{services} Services, {placement}: {test.title}")
            measure(ways, test, placement, services, options.rounds, settings, record)
            figures.save()


def _first_packets(
    options: argparse.Namespace, figures: Figures, services: int, ways: Sequence[Way], cpu: int | None
) -> None:
    if figures.complete("first_packets", options.rounds * len(ways), services=services):
        return
    rows = figures.rows("first_packets")

    def record(run: FirstPackets) -> None:
        rows.append(dataclasses.asdict(run))

    measure_first_packets(ways, services, options.rounds, options.attempts, cpu, record)
    figures.save()


def _rates_there(
    options: argparse.Namespace,
    figures: Figures,
    services: int,
    placement: str,
    test: Test,
    ways: int,
    key: str,
) -> bool:
    count = options.rounds * ways
    return figures.complete(key, count, services=services, placement=placement, test=test.key)


def _all_there(
    options: argparse.Namespace,
    figures: Figures,
    services: int,
    sustained: Sequence[Way],
    first: Sequence[Way],
) -> bool:
    """Nothing is left to measure with so many Services: they need not be programmed."""
    if options.first_packet and first:
        count = options.rounds * len(first)
        if not figures.complete("first_packets", count, services=services):
            return False
    return all(
        _rates_there(options, figures, services, placement, test, len(sustained), "samples")
        for placement in options.places
        for test in options.tests
    )


def drop_time_wait(ways: Sequence[Way]) -> None:
    """See client.c on closing: no client may run out of ports, and no run may find the sockets of the one before."""
    for way in ways:
        way.client.set_sysctl("net.ipv4.tcp_max_tw_buckets", 0)
