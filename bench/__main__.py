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
from bench.places import BenchError, checked
from bench.plain import PLACEMENTS, PlainNetwork
from bench.report import Report
from bench.rounds import measure
from bench.traffic import TESTS, ClientSettings, Sample, Test, cpus
from bench.ways import PlainRouting, Way

HERE = Path(__file__).parent
SECTIONS = ("traffic", "scale")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        write(options.out, json.loads(options.report.read_text()) if options.report else run(options))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything was taken down", file=sys.stderr)
        return 130
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    keys = [test.key for test in TESTS]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures waggle against plain routing, side by side. README.md tells how.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=_positive, default=15, help="alternated rounds per test")
    parser.add_argument("--seconds", type=float, default=0.5, help="measured time of one run of the client")
    parser.add_argument("--warmup", type=float, default=0.1, help="time before that, not measured")
    parser.add_argument("--services", type=_numbers, default=[1, 1000, 10000], help="numbers of Services")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}, and of the tests: "
                        f"{', '.join(keys)}")  # fmt: skip
    parser.add_argument("--placements", default="one,across", help="of one (node), across (nodes)")
    parser.add_argument("--servers", type=_positive, default=2, help="serving pods per node")
    parser.add_argument("--family", type=int, choices=(4, 6), default=4, help="IP version of the traffic")
    parser.add_argument("--close", choices=("fin", "rst"), default="fin", help="how connections end")
    parser.add_argument("--plain-only", action="store_true", help="measure the base line alone, without waggle")
    parser.add_argument("--no-quiet", action="store_true", help="leave out the lab whose events are off")
    parser.add_argument("--scale-services", type=_positive, default=10000, help="Services of the scale section")
    parser.add_argument("--scale-endpoints", type=_positive, default=10, help="endpoints of each of them")
    parser.add_argument("--starts", type=_positive, default=5, help="cold starts")
    parser.add_argument("--changes", type=_positive, default=500, help="EndpointSlice changes")
    parser.add_argument("--quick", action="store_true", help="few, short rounds: does everything work?")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only make tables and picture from a figures.json")
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "bench" / stamp, help="where files go")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds, options.warmup = 3, 0.2, 0.05
        options.services = [number for number in options.services if number <= 1000] or options.services[:1]
        options.scale_services, options.starts, options.changes = min(options.scale_services, 1000), 1, 50
    names = [name.strip() for name in options.only.split(",")]
    unknown = [name for name in names if name not in (*SECTIONS, *keys)]
    if unknown:
        parser.error(f"--only: unknown: {', '.join(unknown)}")
    options.tests = [test for test in TESTS if test.key in names] or (list(TESTS) if "traffic" in names else [])
    options.scale = "scale" in names and not options.plain_only
    asked = {name.strip() for name in options.placements.split(",")}
    options.places = [place for place in PLACEMENTS if place.split()[0] in asked]
    if not options.places or len(options.places) != len(asked):
        parser.error("--placements: one, across")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The document that holds every figure."""
    if os.geteuid() != 0:
        raise BenchError("the benchmark makes network namespaces and loads BPF programs: run it as root")
    checked(["make", "-s", "-C", str(HERE)], timeout=120, subject="make -C bench")
    progress = _Progress()
    document: dict[str, Any] = {
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": _machine(),
        "options": {name: value for name, value in vars(options).items() if isinstance(value, (int, float, str, list))
                    and name not in ("tests", "out")},
        "samples": [],
    }  # fmt: skip
    if options.tests:
        document |= _traffic(options, progress)
    if options.scale:
        from bench.scale import measure_scale  # as above

        document["scale"] = measure_scale(
            options.scale_services, options.scale_endpoints, options.starts, options.changes, cpus()[1], progress
        )
    return document


def _traffic(options: argparse.Namespace, progress: Callable[[str], None]) -> dict[str, Any]:
    client_cpu, server_cpu = cpus()
    settings = ClientSettings(options.seconds, options.warmup, options.close, client_cpu)
    tests: list[Test] = options.tests
    with ExitStack() as stack:
        progress("base line: plain routed namespaces")
        network = stack.enter_context(PlainNetwork(options.servers, server_cpu))
        plain = PlainRouting(network, options.family)
        _drop_time_wait([plain])
        alone = measure([plain], tests, options.places, 0, options.rounds, settings, progress)
        if options.plain_only:
            return {"samples": [dataclasses.asdict(sample) for sample in alone]}
        ways = [plain, *_lab_ways(options, server_cpu, stack, progress)]
        _drop_time_wait(ways)
        samples: list[Sample] = []
        for services in sorted(options.services):
            progress(f"programming {services} Services")
            for way in ways:
                way.program(services)
            samples += measure(ways, tests, options.places, services, options.rounds, settings, progress)
    return {
        "samples": [dataclasses.asdict(sample) for sample in samples],
        "base_line_alone": [dataclasses.asdict(sample) for sample in alone],
    }


def _lab_ways(
    options: argparse.Namespace, server_cpu: int | None, stack: ExitStack, progress: Callable[[str], None]
) -> list[Way]:
    from bench.lab_network import ClusterIP, Direct, LabNetwork  # the base line is measured without waggle installed

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
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), platform.machine())  # fmt: skip
    try:
        from waggle import __version__ as version
    except ImportError:
        version = "(not installed)"
    return {"kernel": platform.release(), "cpu": model, "cpus": len(os.sched_getaffinity(0)), "waggle": version}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
