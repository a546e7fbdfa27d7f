"""First packet: connections to Services that were never asked before, from fresh sockets, spread over all Services.

What a Service proxy looks up, it looks up for the first packet of a flow. A run asks `CONNECTIONS` Services, every
round others; with fewer Services than that they are asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bench.disturbance import CpuMeter
from bench.places import BIN
from bench.rounds import repeated, rotated
from bench.ways import SERVICE_NAMES, Way

CONNECTIONS = 200  # of one run


@dataclass(frozen=True, slots=True)
class FirstPackets:
    """One run: `ns` of every connect(), in order."""

    services: int
    way: str
    round: int
    ns: list[int]
    foreign: float
    stolen: float
    attempts: int


def numbers_of(services: int, number: int, rounds: int) -> list[int]:
    """The Services that round `number` of `rounds` asks: spread over all, none twice while there are enough.

    Numbers are those of `objects`; -1 is the measured Service, when it is the only one.
    """
    fillers = services - len(SERVICE_NAMES)
    if fillers <= 0:
        return [-1] * CONNECTIONS
    of_all = CONNECTIONS * rounds
    return [(place * rounds + number) * fillers // of_all % fillers for place in range(CONNECTIONS)]


def measure_first_packets(
    ways: Sequence[Way],
    services: int,
    rounds: int,
    attempts: int,
    cpu: int | None,
    record: Callable[[FirstPackets], None],
) -> None:
    """Every way once per round, the order rotating, as for rates."""
    meter = CpuMeter(lambda: {pid for way in ways for pid in way.processes()})
    for number in range(rounds):
        asked = numbers_of(services, number, rounds)
        for way in rotated(ways, number):
            ns, disturbance, made = repeated(meter, attempts, partial(_run, way, asked, cpu))
            record(FirstPackets(services, way.name, number, ns, disturbance.foreign, disturbance.stolen, made))


def _run(way: Way, numbers: Sequence[int], cpu: int | None) -> list[int]:
    way.prepare()
    command = [str(BIN / "firstpacket"), *(["--cpu", str(cpu)] if cpu is not None else [])]
    addresses = "".join(f"{address}\n" for address in way.first_targets(numbers))
    ns: list[int] = json.loads(way.client.run(command, timeout=60, stdin=addresses))
    return ns
