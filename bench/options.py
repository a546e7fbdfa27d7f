"""The command line."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

from bench.plain import PLACEMENTS
from bench.traffic import TESTS

SECTIONS = ("traffic", "scale")


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
    parser.add_argument("--attempts", type=_positive, default=4, help="runs at most until one is undisturbed")
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
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "build" / "bench" / stamp, help="where files go"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds, options.warmup, options.attempts = 3, 0.2, 0.05, 1
        options.services = [number for number in options.services if number <= 1000] or options.services[:1]
        options.scale_services, options.starts, options.changes = min(options.scale_services, 1000), 1, 50
    if options.report and not options.report.is_file():
        parser.error(f"--report: {options.report} is not a file")
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]
