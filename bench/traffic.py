"""One measurement: the client runs one test against some addresses, and what it reports becomes a Sample."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from bench.places import BIN, Place
from bench.plain import PORT


@dataclass(frozen=True, slots=True)
class Test:
    """`name` is that of the client's test; several Tests may share one with different `slots`."""

    key: str
    title: str
    name: str
    slots: int
    protocol: str = "TCP"
    unit: str = "1/s"

    @property
    def port(self) -> int:
        return PORT + 1 if self.name == "bulk" else PORT


#: With several exchanges under way both CPUs are busy and the rate says what one exchange costs; with one it says
#: how long it takes, most of which is waking up the other side.
TESTS = (
    Test("connect", "TCP connections, 16 at a time", "connect", 16),
    Test("request", "TCP request/response, one connection", "request", 1),
    Test("request16", "TCP request/response, 16 connections", "request", 16),
    Test("udp16", "UDP request/response, 16 connected sockets", "udp", 16, protocol="UDP"),
    Test("udpsendto16", "UDP request/response, 16 unconnected sockets", "udp-sendto", 16, protocol="UDP"),
    Test("bulk", "TCP bulk, one connection", "bulk", 1, unit="bit/s"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of the client. `rate` is in the test's unit; `foreign` and `stolen` are shares of CPU time (disturbance).

    `attempts` counts how often it was measured before it was undisturbed; the last attempt counts.
    """

    services: int
    placement: str
    test: str
    way: str
    round: int
    rate: float
    p50_us: float
    p99_us: float
    lost: int
    connections: int
    foreign: float
    stolen: float
    attempts: int


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How every run is made. `attempts`: at most so many when something else keeps taking CPU time."""

    seconds: float
    warmup: float
    close: str
    cpu: int | None
    attempts: int


def run_client(place: Place, targets: Sequence[str], test: Test, settings: ClientSettings) -> dict[str, float]:
    """What the client printed."""
    arguments = [str(BIN / "client"), "--test", test.name, "--slots", str(test.slots), "--end-with-parent"]
    arguments += ["--seconds", str(settings.seconds), "--warmup", str(settings.warmup), "--close", settings.close]
    if settings.cpu is not None:
        arguments += ["--cpu", str(settings.cpu)]
    for address in targets:
        arguments += ["--target", address]
    figures: dict[str, float] = json.loads(place.run(arguments, timeout=settings.seconds + settings.warmup + 30))
    return figures


def rate_of(test: Test, figures: dict[str, float]) -> float:
    """In the test's unit; 0 when nothing came back within the measured time."""
    return (figures["bytes"] * 8 if test.name == "bulk" else figures["exchanges"]) / figures["seconds"]


def cpus() -> tuple[int | None, int | None]:
    """CPU of the client and of the server; None on a machine with a single one."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else (None, None)


def target(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
