"""Tables of policy on a `waggle.testing.machine`, written as an agent writes them: through PolicyWriter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from waggle.abi._generated import PolicyRequest
from waggle.abi.address import pack_address
from waggle.kernel.testrun import run_syscall
from waggle.plan.policy_tables import ALLOW, DENY, END, OPEN, PROTOCOL_INDEX, PolicyTables, Step, Steps, step_key
from waggle.reconcile.policy import PolicyWriter
from waggle.testing.machine import Machine

Sets = tuple[int, int]

#: Rule of what `steps` allows, and of all else.
ALLOWS, DENIES = 7, 8
EVERYTHING: Steps = (Step(0, ALLOW, ALLOWS),)
NOTHING: Steps = (Step(0, DENY, DENIES),)


def assigner(machine: Machine, sets_of: Callable[[str], Sets]) -> Callable[[Iterable[str]], None]:
    """What PolicyWriter calls with addresses of pods."""

    def assign(addresses: Iterable[str]) -> None:
        for address in addresses:
            request = PolicyRequest(pack_address(address), *sets_of(address))
            run_syscall(machine.programs["wag_policy_assign"], request.pack())

    return assign


class PolicedMachine:
    """Tables as a test says, for programs that are asked about them alone."""

    def __init__(self, machine: Machine, *, keep: bool = False) -> None:
        self.machine = machine
        self.tables = PolicyTables()
        self.writer = PolicyWriter(machine.maps, assigner(machine, self._sets_of), keep=keep)
        self.writer.adopt()
        self.writer.sync(self.tables)

    def _sets_of(self, address: str) -> Sets:
        return self.tables.pods.get(address, (OPEN, OPEN))

    def put(
        self,
        *,
        sets: Mapping[int, Mapping[int, Steps]] | None = None,
        classes: Mapping[str, int] | None = None,
        ranges: Mapping[str, int] | None = None,
        pods: Mapping[str, Sets] | None = None,
        patterns: Mapping[str, int] | None = None,
    ) -> None:
        """What is given replaces what was there of it; the revision is raised."""
        tables = self.tables
        if sets is not None:
            tables.sets = {number: dict(entries) for number, entries in sets.items()}
        if classes is not None:
            tables.classes = dict(classes)
        if ranges is not None:
            tables.ranges = dict(ranges)
        if patterns is not None:
            tables.patterns = dict(patterns)
        if pods is not None:
            gone = dict.fromkeys(tables.pods.keys() - pods.keys(), (OPEN, OPEN))
            tables.pods = {**gone, **pods}
        self.writer.settle(self.writer.sync(tables))


def steps(*spans: tuple[str, int, int] | str, verdict: int = ALLOW) -> Steps:
    """Steps that give `verdict` to ports (protocol, first, last), and to a protocol by its name; all else is denied."""
    edges: dict[int, Step] = {0: Step(0, DENY, DENIES)}
    every = [(one, 0, 0xFFFF) if isinstance(one, str) else one for one in spans]
    for protocol, first, last in sorted(every, key=lambda span: step_key(span[0], span[1])):
        begin = step_key(protocol, first)
        end = begin + 1 + (last - first if protocol in PROTOCOL_INDEX else 0xFFFF)
        edges[begin] = Step(begin, verdict, ALLOWS)
        edges[end] = Step(end, DENY, DENIES)
    return tuple(edges[start] for start in sorted(edges) if start < END)
