"""The command line."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.east_west import DEFAULT_WAYS, WAYS
from bench.north_south import DEFAULT_MODES, MODES
from bench.plain import PLACEMENTS
from bench.rule_sets import RULE_SETS
from bench.traffic import TESTS

PARTS = ("cni", "control-plane", "north-south", "pods", "policy", "east-west", "first-packet")
#: What labs are measured with and without: `bench.policy.CASES`, by name.
POLICY_CASES = ("policies-1", "policies-100", "policies-1000", "remote-10000", "quiet")
#: What figures depend on: recorded with them, and compared when a run is resumed.
_RECORDED = (
    "parts", "tests", "ways", "modes", "rounds", "seconds", "warmup", "attempts", "services", "servers", "family",
    "close", "places", "scale", "starts", "changes", "burst", "settle", "sync_limit",
    "pods", "cases",
)  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    keys = [test.key for test in TESTS]
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measures waggle against plain routing and kube-proxy's rules, side by side. README.md tells how.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--tests", default=",".join(keys), help=f"of east-west, pods and policy: of {', '.join(keys)}")
    parser.add_argument("--ways", default=",".join(DEFAULT_WAYS), help=f"to the servers: of {', '.join(WAYS)}")
    parser.add_argument("--modes", default=",".join(DEFAULT_MODES), help=f"north-south: of {', '.join(MODES)}")
    parser.add_argument("--rounds", type=_positive, default=5, help="alternated rounds")
    parser.add_argument("--seconds", type=float, default=0.35, help="measured time of one run")
    parser.add_argument("--warmup", type=float, default=0.1, help="time before that, not measured")
    parser.add_argument("--attempts", type=_positive, default=3, help="runs at most until one is undisturbed")
    parser.add_argument("--services", type=_numbers, default="1,1000,10000,50000", help="numbers of Services")
    parser.add_argument("--placements", default="one,across", help="of one (node), across (nodes)")
    parser.add_argument("--servers", type=_positive, default=2, help="serving pods per node")
    parser.add_argument("--family", type=int, choices=(4, 6), default=4, help="IP version of the traffic; rules of "
                        "kube-proxy and first packets are measured with 4 only")  # fmt: skip
    parser.add_argument("--close", choices=("fin", "rst"), default="fin", help="how connections end")
    parser.add_argument("--scale", type=_sizes, default="10000x10,50000x5", help="control plane: Services x endpoints")
    parser.add_argument("--starts", type=_positive, default=3, help="cold starts and full syncs")
    parser.add_argument("--changes", type=_positive, default=200, help="EndpointSlice changes, one at a time")
    parser.add_argument("--burst", type=_positive, default=1000, help="EndpointSlice changes made at once")
    parser.add_argument("--pods", type=_positive, default=200, help="CNI: pods made at once")
    parser.add_argument("--cases", default=",".join(POLICY_CASES), help=f"policy: of {', '.join(POLICY_CASES)}")
    # their CPU time is part of what is measured
    parser.add_argument("--settle", type=float, default=4, help="seconds for agents to become quiet after many changes")
    parser.add_argument("--sync-limit", type=float, default=60, help="seconds after which a peer's sync is given up")
    parser.add_argument("--quick", action="store_true", help="few, short rounds: does everything work?")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only make tables and pictures from a figures.json")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with a run that was stopped")
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "build" / "bench" / stamp, help="where files go"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        _shorten(options)
    if options.report and not options.report.is_file():
        parser.error(f"--report: {options.report} is not a file")
    options.parts = _of(parser, "--parts", options.parts, PARTS)
    options.ways = _of(parser, "--ways", options.ways, WAYS)
    options.modes = _of(parser, "--modes", options.modes, tuple(MODES))
    options.cases = _of(parser, "--cases", options.cases, POLICY_CASES)
    asked_tests = _of(parser, "--tests", options.tests, tuple(keys))
    tests = [test for test in TESTS if test.key in asked_tests]
    options.tests = tests if "east-west" in options.parts else []
    options.pod_tests = tests if "pods" in options.parts else []
    options.policy_tests = tests if "policy" in options.parts else []
    options.first_packet = "first-packet" in options.parts and options.family == 4
    if options.family == 6:
        options.ways = [way for way in options.ways if way not in RULE_SETS]
    asked = {name.strip() for name in options.placements.split(",")}
    options.places = [place for place in PLACEMENTS if place.split()[0] in asked]
    if not options.places or len(options.places) != len(asked):
        parser.error("--placements: one, across")
    return options


def recorded(options: argparse.Namespace) -> dict[str, Any]:
    """The options that figures depend on, as they are put beside them."""
    values = {name: getattr(options, name) for name in _RECORDED}
    return values | {"tests": [test.key for test in options.tests or options.pod_tests or options.policy_tests]}


def _shorten(options: argparse.Namespace) -> None:
    options.rounds, options.seconds, options.warmup, options.attempts = 3, 0.2, 0.05, 1
    options.services = [number for number in options.services if number <= 1000] or options.services[:1]
    options.scale = [(min(services, 1000), endpoints) for services, endpoints in options.scale[:1]]
    options.starts, options.changes, options.burst = 1, 50, min(options.burst, 200)
    options.pods = min(options.pods, 50)


def _of(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    """The names in a list, once each, in the order of `known`."""
    names = {name.strip() for name in text.split(",")}
    unknown = names - set(known)
    if unknown:
        parser.error(f"{option}: unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [name for name in known if name in names]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _sizes(text: str) -> list[tuple[int, int]]:
    """ "10000x10,50000x5" as pairs."""
    sizes = []
    for part in text.split(","):
        services, _, endpoints = part.partition("x")
        sizes.append((_positive(services), _positive(endpoints)))
    return sizes
