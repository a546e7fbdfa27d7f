"""The differential test: random worlds through the model and through the data path (docs/proof.md).

`make differential` runs this file; `test_differential.py` runs it for a bounded time. Environment: SECONDS (60), SEED
(random), EXAMPLES per round (200), PROTOCOLS (TCP,UDP,SCTP).
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter

import policy_differential
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import FlakyFailure
from worlds import (
    ASKED,
    CLIENTS,
    NODE4,
    NODE6,
    PODS,
    Advance,
    Again,
    Another,
    Directly,
    Put,
    Remove,
    Reply,
    Send,
    Step,
    Turn,
    World,
    turned,
    worlds,
)

from waggle.abi._generated import EventsOf
from waggle.model.flows import Tuple
from waggle.model.objects import EndpointSlice, kind_of
from waggle.model.packets import End
from waggle.testing.differential import Comparison, Difference
from waggle.testing.frames import ACK, FIN, OPTIONS, RST, SYN, Frame
from waggle.testing.machine import Machine

SIZES = {
    "wag_nat": 4096,
    "wag_nat_young": 256,
    "wag_services": 512,
    "wag_backends": 512,
}  # no flow of a world is evicted
FLAGS = {"S": SYN, "A": ACK, "F": FIN, "R": RST}
STEPS = 80
TRIES = 5
PROTOCOLS = ("TCP", "UDP", "SCTP")
AWAY = ("198.51.100.9", "2001:db8::99", "203.0.113.222", "2001:db8:cb::de")


def machine(name: str) -> Machine:
    return Machine(name, events=EventsOf.OFF, sizes=SIZES)


def run_world(on: Machine, world: World) -> Comparison:
    """All of a world. Raises Difference; call it from inside the machine."""
    comparison = Comparison(on, world.local, world.xdp)
    comparison.put(*world.objects)
    for step in world.steps:
        run_step(comparison, step)
    return comparison


def run_step(comparison: Comparison, step: Step) -> None:
    store = comparison.node.store
    match step:
        case Send():
            send(comparison, step)
        case Again(number, flags):
            known = list(comparison.flows.known())
            if known:
                comparison.send(Frame(known[number % len(known)], flags_of(flags), b"again"))
        case Another(number, port, after):
            known = list(comparison.flows.known())
            if known:
                if after:
                    comparison.advance(after)
                flow = known[number % len(known)]
                comparison.send(Frame(flow._replace(source=End(flow.source.address, port))))
        case Directly(number, flags):
            known = list(comparison.flows.known().items())
            if known:
                flow, becomes = known[number % len(known)]
                if flow.source.address != becomes.destination.address:
                    comparison.send(Frame(flow._replace(destination=becomes.destination), flags_of(flags)))
        case Reply(number, flags, size):
            answered = list(comparison.flows.answered().items())
            if answered:
                becomes, flow = answered[number % len(answered)]
                comparison.reply(flow, Frame(becomes, flags_of(flags), b"r" * size))
        case Put(obj):
            comparison.put(obj)
        case Turn(number, conditions):
            every = [(p, i) for p in sorted(store.slices.values(), key=key) for i in range(len(p.endpoints or ()))]
            if every:
                piece, at = every[number % len(every)]
                comparison.put(turned(piece, at, conditions))
        case Remove(number):
            kinds = (store.services, store.slices, store.pods, store.service_cidrs)
            every = [(kind_of(o), o.key) for rows in kinds for o in rows.values()]
            if every:
                comparison.remove(*every[number % len(every)])
        case Advance(seconds):
            comparison.advance(seconds)


def key(piece: EndpointSlice) -> str:
    return piece.metadata.name


def send(comparison: Comparison, step: Send) -> None:
    protocol, target = target_of(comparison, step.target)
    v = int(":" in target.address)
    source = End(CLIENTS[step.client % len(CLIENTS)][v], step.port)
    if source.address == target.address:
        return
    options = OPTIONS[6 if v else 4] if step.options else b""
    frame = Frame(
        Tuple(protocol, source, target),
        flags_of(step.flags),
        b"x" * step.size,
        step.ttl,
        options=options,
        checksum=step.checksum or protocol != "UDP" or v == 1,
    )
    comparison.send(frame)


def target_of(comparison: Comparison, number: int) -> tuple[str, End]:
    """Most packets are for a Service that is there, some for one that was, some for a port that none has, some for
    something else."""
    number, which = divmod(number, 8)
    there = comparison.frontends()
    gone = [one for one in comparison.ever if one not in there]
    others = [("TCP", End(NODE4, 22)), ("TCP", End(NODE6, 22)), *((p, End(a, 53)) for a in AWAY for p in PROTOCOLS)]
    others += [(p, End(address, 8080)) for pair, _ in PODS for address in pair for p in PROTOCOLS]
    asked = [(p, End(address, 81)) for address in ASKED for p in PROTOCOLS]
    targets = (there if which < 5 else (gone, asked, others)[which - 5]) or others
    return targets[number % len(targets)]


def flags_of(text: str) -> int:
    return sum(FLAGS[c] for c in text)


def explore(on: Machine, number: int, examples: int, protocols: tuple[str, ...]) -> Counter[str]:
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
    @given(worlds(protocols, STEPS))
    def compare(world: World) -> None:
        # the programs choose backends and ports at random: one try may miss what another has shown
        for _ in range(TRIES if found else 1):
            try:
                agreed.update(run_world(on, world).agreed)
            except Difference as difference:
                found.append(difference)
                raise

    try:
        on.inside(compare)
    except (Difference, FlakyFailure):
        raise min(found, key=lambda one: len(str(one))) from None
    return agreed


def main() -> int:
    seconds = float(os.environ.get("SECONDS") or 60)
    first = int(os.environ.get("SEED") or random.randrange(1 << 32))
    examples = int(os.environ.get("EXAMPLES") or 200)
    protocols = tuple((os.environ.get("PROTOCOLS") or ",".join(PROTOCOLS)).split(","))
    on, policed = machine("differential"), policy_differential.machine("policed")
    begin = time.monotonic()
    agreed: Counter[str] = Counter()
    try:
        for number in range(first, sys.maxsize):
            agreed += explore(on, number, examples, protocols)
            agreed += policy_differential.explore(policed, number, examples)
            spent = time.monotonic() - begin
            print(f"SEED={number}: {agreed.total()} packets agree after {spent:.0f} s", flush=True)
            if spent >= seconds:
                break
    except Difference as difference:
        print(f"\n{difference}\n\nagain with: make differential SEED={number} EXAMPLES={examples}")
        print(f"{agreed.total() + 1} packets, 1 differ")
        return 1
    finally:
        on.close()
        policed.close()
    for what, count in agreed.most_common():
        print(f"{count:10} {what}")
    print(f"{agreed.total()} packets, 0 differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
