"""Alternated rounds and what is made of them: medians, ratios of medians, and how far single rounds spread.

Within a round every way is measured once, directly after one another; the order rotates from round to round, so that
no way is always first. A machine that gets slower for a while then slows all of them.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.disturbance import CpuMeter, Disturbance
from bench.places import BenchError
from bench.traffic import ClientSettings, Sample, Test, rate_of, run_client
from bench.ways import Way

T = TypeVar("T")


def measure(
    ways: Sequence[Way],
    test: Test,
    placement: str,
    services: int,
    rounds: int,
    settings: ClientSettings,
    record: Callable[[Sample], None],
    first: int = 0,
) -> None:
    """Gives `record` a sample for every round and way, as they are measured; rounds are numbered from `first`."""
    meter = CpuMeter(lambda: {pid for way in ways for pid in way.processes()})
    for number in range(first, first + rounds):
        for way in rotated(ways, number):
            record(_sample(way, test, placement, services, number, settings, meter))


def rotated(these: Sequence[T], number: int) -> Sequence[T]:
    """In the order of round `number`: another one first every time."""
    shift = number % len(these)
    return (*these[shift:], *these[:shift])


def _sample(
    way: Way, test: Test, placement: str, services: int, number: int, settings: ClientSettings, meter: CpuMeter
) -> Sample:
    def run() -> dict[str, float]:
        way.prepare()
        found = run_client(way.client, way.targets(placement, test), test, settings)
        if rate_of(test, found):
            return found
        # A connection through 50,000 iptables rules on two nodes may take as long as a whole run.
        longer = dataclasses.replace(settings, seconds=10 * settings.seconds)
        found = run_client(way.client, way.targets(placement, test), test, longer)
        if not rate_of(test, found):
            raise BenchError(f"{test.key} by way of {way.name}: nothing was exchanged in {longer.seconds:g} s")
        return found

    figures, disturbance, attempts = repeated(meter, settings.attempts, run)
    return Sample(
        services=services,
        placement=placement,
        test=test.key,
        way=way.name,
        round=number,
        rate=rate_of(test, figures),
        p50_us=figures["p50_us"],
        p99_us=figures["p99_us"],
        lost=int(figures["lost"]),
        connections=int(figures["connections"]),
        foreign=disturbance.foreign,
        stolen=disturbance.stolen,
        attempts=attempts,
    )


def repeated(meter: CpuMeter, limit: int, run: Callable[[], T]) -> tuple[T, Disturbance, int]:
    """What an undisturbed run measured, or the last of `limit` attempts at one; how disturbed; how many there were."""
    attempts = 0
    while True:
        attempts += 1
        before = meter.snapshot()
        figures = run()
        disturbance = meter.since(before)
        if not disturbance.too_much or attempts == limit:
            return figures, disturbance, attempts
        time.sleep(0.1 * attempts)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the middle half around it."""

    median: float
    low: float  # first quartile
    high: float  # third quartile
    count: int


def spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    if len(ordered) < 2:
        return Spread(ordered[0], ordered[0], ordered[0], len(ordered))
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(median, low, high, len(ordered))


class Rates:
    """The samples, by what they measured."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._by_cell: dict[tuple[int, str, str, str], dict[int, float]] = {}
        for sample in samples:
            cell = (sample.services, sample.placement, sample.test, sample.way)
            self._by_cell.setdefault(cell, {})[sample.round] = sample.rate

    def has(self, services: int, placement: str, test: str, way: str) -> bool:
        return (services, placement, test, way) in self._by_cell

    def rate(self, services: int, placement: str, test: str, way: str) -> Spread:
        return spread(self._by_cell[services, placement, test, way].values())

    def ratio(self, services: int, placement: str, test: str, way: str, to: str) -> Spread:
        """Ratio of the medians; the quartiles are those of the ratios of single rounds."""
        upper = self._by_cell[services, placement, test, way]
        lower = self._by_cell[services, placement, test, to]
        single = spread(upper[number] / lower[number] for number in upper.keys() & lower.keys())
        median = statistics.median(upper.values()) / statistics.median(lower.values())
        return Spread(median, single.low, single.high, single.count)
