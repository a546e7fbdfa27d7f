"""`python -m bench`: measure everything, or what is asked for, and write figures, tables and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from bench.chart import chart
from bench.leftovers import remove_leftovers
from bench.options import parse
from bench.places import BenchError, checked
from bench.plain import PlainNetwork
from bench.report import Report
from bench.rounds import measure
from bench.traffic import ClientSettings, Sample, Test, cpus
from bench.ways import PlainRouting, Way

#: For agents to become quiet after many Services came: their CPU time is part of what is measured.
_SETTLE_SECONDS = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    if options.report:
        write(options.out, json.loads(options.report.read_text()))
        return 0
    document: dict[str, Any] = {"samples": []}
    problem, status = "", 0
    try:
        run(options, document)
    except _expected_errors() as error:
        problem, status = str(error), 1
    except KeyboardInterrupt:
        problem, status = "interrupted; everything was taken down", 130
    if problem:
        print(f"bench: {problem}", file=sys.stderr)
        document["incomplete"] = problem
    if document["samples"] or document.get("scale"):
        write(options.out, document)
    return status


def run(options: argparse.Namespace, document: dict[str, Any]) -> None:
    """Measure what is asked for; `document` holds every figure, also when this ends early."""
    if os.geteuid() != 0:
        raise BenchError("the benchmark makes network namespaces and loads BPF programs: run it as root")
    checked(["make", "-s", "-C", str(Path(__file__).parent)], timeout=120, subject="make -C bench")
    remove_leftovers()
    progress = _Progress()
    document |= {
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(),
        "options": {
            name: getattr(options, name)
            for name in ("rounds", "seconds", "warmup", "attempts", "services", "servers", "family", "close")
        },
    }
    if options.scale:
        from bench.scale import ScaleSettings, measure_scale  # the base line can be measured without waggle installed

        settings = ScaleSettings(
            services=options.scale_services,
            endpoints=options.scale_endpoints,
            starts=options.starts,
            changes=options.changes,
            attempts=options.attempts,
            cpu=cpus()[1],
        )
        document["scale"] = measure_scale(settings, progress)
    if options.tests:
        _traffic(options, document, progress)


def _traffic(options: argparse.Namespace, document: dict[str, Any], progress: Callable[[str], None]) -> None:
    client_cpu, server_cpu = cpus()
    settings = ClientSettings(options.seconds, options.warmup, options.close, client_cpu, options.attempts)
    tests: list[Test] = options.tests

    def rounds(ways: Sequence[Way], services: int, into: list[dict[str, Any]]) -> None:
        def record(sample: Sample) -> None:
            into.append(dataclasses.asdict(sample))

        measure(ways, tests, options.places, services, options.rounds, settings, progress, record)

    with ExitStack() as stack:
        progress("base line: plain routed namespaces")
        plain = PlainRouting(stack.enter_context(PlainNetwork(options.servers, server_cpu)), options.family)
        _drop_time_wait([plain])
        if options.plain_only:
            rounds([plain], 0, document["samples"])
            return
        rounds([plain], 0, document.setdefault("base_line_alone", []))
        ways = [plain, *_lab_ways(options, server_cpu, stack, progress)]
        _drop_time_wait(ways)
        for services in sorted(options.services):
            progress(f"programming {services} Services")
            for way in ways:
                way.program(services)
            time.sleep(_SETTLE_SECONDS)
            rounds(ways, services, document["samples"])


def _lab_ways(
    options: argparse.Namespace, server_cpu: int | None, stack: ExitStack, progress: Callable[[str], None]
) -> list[Way]:
    from bench.lab_network import ClusterIP, Direct, LabNetwork, remove_leftover_labs  # as above

    remove_leftover_labs()
    progress("lab with events on")
    lab = stack.enter_context(LabNetwork(options.servers, server_cpu, events=True))
    ways: list[Way] = [
        Direct(lab, options.family, "direct", "pod to pod with waggle"),
        ClusterIP(lab, options.family, "service", "pod to ClusterIP with waggle"),
    ]
    if not options.no_quiet:
        progress("lab with events off")
        quiet = stack.enter_context(LabNetwork(options.servers, server_cpu, events=False))
        ways += [
            Direct(quiet, options.family, "direct-quiet", "pod to pod, events off"),
            ClusterIP(quiet, options.family, "service-quiet", "pod to ClusterIP, events off"),
        ]
    return ways


def _drop_time_wait(ways: Sequence[Way]) -> None:
    """See client.c on closing: no client may run out of ports, and no run may find the sockets of the one before."""
    for way in ways:
        way.client.set_sysctl("net.ipv4.tcp_max_tw_buckets", 0)


def write(folder: Path, document: dict[str, Any]) -> None:
    """figures.json, report.md and ratios.svg; the report on standard output as well."""
    report = Report(document)
    text = report.markdown()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(text)
    written = ["figures.json", "report.md"]
    if len(report.ways) > 1:
        (folder / "ratios.svg").write_text(chart(report))
        written.append("ratios.svg")
    print(text)
    print(f"Written: {', '.join(str(folder / name) for name in written)}")


class _Progress:
    """One line per step on standard error, with the time since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:7.1f} s] {text}", file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    try:
        from waggle import __version__ as version
    except ImportError:
        version = "(not installed)"
    return {
        "kernel": platform.release(),
        "cpu": models[0] if models else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "waggle": version,
    }


def _expected_errors() -> tuple[type[Exception], ...]:
    """What is shown without a traceback: errors of the benchmark, and of waggle where it is installed."""
    try:
        from waggle.errors import WaggleError
    except ImportError:
        return (BenchError,)
    return (BenchError, WaggleError)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End, taking everything down; a second signal does not stop that."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
