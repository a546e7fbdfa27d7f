"""Runs the random worlds of `policed_worlds` through `waggle.testing.policy_differential`."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import FlakyFailure
from policed_worlds import (
    INTERFACES,
    OWN,
    SERVICES,
    Answer,
    Change,
    Complaint,
    Evict,
    Onward,
    Packets,
    Restart,
    Step,
    World,
    worlds,
)
from worlds import HERE

from waggle.abi._generated import EventsOf
from waggle.model.meta import ObjectKey
from waggle.testing.differential import Difference
from waggle.testing.machine import Machine
from waggle.testing.policy_differential import PolicyComparison

STEPS = 40
SIZES = {"wag_nat": 4096, "wag_conns": 16384}


def machine(name: str) -> Machine:
    """No event is left out."""
    return Machine(name, events=EventsOf.OFF, sizes=SIZES, events_per_second=10**9)


def run_world(on: Machine, world: World) -> Counter[str]:
    """All of a world: how many packets agreed, by what happened to them. Raises Difference; call it from inside the
    machine."""
    comparison = PolicyComparison(on, dict(INTERFACES), HERE, OWN, keep=world.keep)
    try:
        for service in SERVICES:
            comparison.serve(*service)
        comparison.put(*world.objects)
        for step in world.steps:
            run_step(comparison, step)
    finally:
        comparison.close()
    return comparison.agreed


def run_step(comparison: PolicyComparison, step: Step) -> None:
    known = list(comparison.opened)
    match step:
        case Packets(packets):
            for packet, later_fragment, by_stack, flags in packets:
                fragment = later_fragment and packet.protocol in ("TCP", "UDP", "SCTP")
                flags = flags if packet.protocol == "TCP" and not packet.begins else 0
                comparison.send(packet, flags=flags, later_fragment=fragment, by_stack=by_stack)
        case Onward(flow, begins) if known:
            packet = known[flow % len(known)]
            comparison.send(packet._replace(begins=begins or packet.protocol in ("UDP", "GRE", "ICMP", "ICMPv6")))
        case Answer(flow) if known:
            comparison.reply(known[flow % len(known)])
        case Complaint(source, flow, made_up, back, destination):
            inner = made_up or (known[flow % len(known)] if known else None)
            if inner is not None and inner.protocol in ("TCP", "UDP", "SCTP"):
                inner = inner.reversed()._replace(begins=True) if back else inner
                source = source or inner.destination.address
                same = {":" in end for end in (source, inner.source.address, destination or source)}
                if len(same) == 1:
                    comparison.complain(source, inner, destination)
        case Evict(flow) if known:
            comparison.forget(known[flow % len(known)])
        case Change(objects, gone, probes):
            remove: tuple[type[Any], ObjectKey] | None = None
            there = comparison.keys()
            if gone is not None and there:
                remove = there[gone % len(there)]
            if objects:
                comparison.put(*objects, probes=probes)
            if remove:
                comparison.remove(*remove, probes=probes)
        case Restart(objects, probes):
            comparison.restart(*objects, probes=probes)


def explore(on: Machine, number: int, examples: int) -> Counter[str]:
    """So many random worlds of one seed. How many packets agreed, by what happened to them.

    Raises Difference with the smallest world found in which something differs.
    """
    agreed: Counter[str] = Counter()
    found: list[Difference] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        print_blob=False,
        report_multiple_bugs=False,
    )
    @given(worlds(STEPS))
    def compare(world: World) -> None:
        try:
            agreed.update(run_world(on, world))
        except Difference as difference:
            found.append(difference)
            raise

    try:
        on.inside(compare)
    except (Difference, FlakyFailure):
        raise min(found, key=lambda one: len(str(one))) from None
    return agreed
