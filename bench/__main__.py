"""`python -m bench`: measure everything, or what is asked for, and write figures, tables and pictures."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from bench.chart import chart
from bench.east_west import measure_east_west
from bench.figures import FILE, Figures
from bench.leftovers import remove_leftovers
from bench.north_south import measure_north_south
from bench.options import parse, recorded
from bench.picture import picture
from bench.places import BenchError, checked
from bench.pods import measure_pods
from bench.report import Report
from bench.rule_sets import RULE_SETS, ipvs_missing
from bench.traffic import cpus

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for number in _SIGNALS:
        signal.signal(number, _interrupt)
    if options.report:
        write(Figures(options.out, json.loads(options.report.read_text())))
        return 0
    figures = Figures(options.resume or options.out, {})
    problem, status = "", 0
    try:
        if options.resume:
            figures = Figures.resumed(options.resume, recorded(options))
        run(options, figures)
    except _expected_errors() as error:
        problem, status = str(error), 1
    except KeyboardInterrupt:
        problem, status = "interrupted; everything was taken down", 130
    if problem:
        print(f"bench: {problem}", file=sys.stderr)
        figures.document["incomplete"] = problem
    if not figures.empty:
        write(figures)
    return status


def run(options: argparse.Namespace, figures: Figures) -> None:
    """Measure what is asked for; `figures` holds every figure, also when this ends early."""
    if os.geteuid() != 0:
        raise BenchError("the benchmark makes network namespaces and loads BPF programs: run it as root")
    checked(["make", "-s", "-C", str(Path(__file__).parent)], timeout=120, subject="make -C bench")
    remove_leftovers()
    progress = _Progress()
    if "made" not in figures.document:
        figures.document |= {
            "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": _machine(),
            "options": recorded(options),
        }
    _leave_out_missing_peers(options, figures, progress)
    if "cni" in options.parts and not figures.rows("cni"):
        _cni(options, figures, progress)
    if "control-plane" in options.parts:
        _control_plane(options, figures, progress)
    if "north-south" in options.parts:
        measure_north_south(options, figures, progress)
    if options.pod_tests:
        measure_pods(options, figures, progress)
    if options.policy_tests:
        _policy(options, figures, progress)
    if options.tests or options.first_packet:
        measure_east_west(options, figures, progress)


def _leave_out_missing_peers(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    """What this machine cannot measure is said in the report, and does not stop the rest."""
    missing = {"IPVS": ipvs_missing()}
    for name in dict.fromkeys([*options.ways, *options.modes]):
        reason = RULE_SETS[name].missing() if name in RULE_SETS else ""
        if reason:
            progress(f"{name} is left out: {reason}")
            missing[name] = reason
    options.ways = [name for name in options.ways if name not in missing]
    options.modes = [name for name in options.modes if name not in missing]
    figures.document["missing_peers"] = missing


def _cni(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    from bench.cni import measure_cni  # the peers can be measured without waggle installed

    figures.rows("cni").extend(measure_cni(options.rounds, options.pods, progress))
    figures.save()


def _policy(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    from bench.policy import measure_policy  # the peers can be measured without waggle installed

    measure_policy(options, figures, progress)


def _control_plane(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    from bench.scale import ScaleSettings, measure_scale  # the peers can be measured without waggle installed

    for services, endpoints in options.scale:
        if figures.complete("control_plane", 1, services=services, endpoints=endpoints):
            continue
        settings = ScaleSettings(
            services=services,
            endpoints=endpoints,
            starts=options.starts,
            changes=options.changes,
            burst=min(options.burst, services),
            attempts=options.attempts,
            cpu=cpus()[1],
            peers=[RULE_SETS[name] for name in options.ways if name in RULE_SETS],
            sync_limit=options.sync_limit,
            settle=options.settle,
        )
        figures.rows("control_plane").append(measure_scale(settings, progress))
        figures.save()


def write(figures: Figures) -> None:
    """figures.json, report.md and the pictures; the report on standard output as well."""
    report = Report(figures.document)
    text = report.markdown()
    figures.save()
    written = {"report.md": text}
    if len(report.ways) > 1:
        written["ratios.svg"] = chart(report)
    if drawn := picture(report):
        written["peers.svg"] = drawn
    for name, content in written.items():
        (figures.folder / name).write_text(content)
    print(text)
    print(f"Written: {', '.join(str(figures.folder / name) for name in (FILE, *written))}")


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
