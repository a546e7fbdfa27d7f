"""The tables of policy: wag_policy, wag_policy_steps, wag_classes, wag_class_ranges, wag_patterns.

What is written, and in which order, is the planner's (`plan.policy_tables`). An entry is never changed into something
else, so that whatever a packet meets is the old or the new. After a restart everything is read back, and becomes what
is wanted by `sync`. A list of steps is written before the entry that leads to it, and its place is used again only
after `settle`.
"""

from __future__ import annotations

import ipaddress
import struct
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from waggle.abi._generated import (
    ClassRangeKey,
    Endpoint,
    EndpointFlag,
    NameKey,
    NodePolicy,
    PatternKey,
    PolicyRun,
    PolicyState,
    PolicyStep,
)
from waggle.abi.address import pack_address, unpack_address
from waggle.abi.learned_names import in_force, pack_pattern
from waggle.errors import WaggleError
from waggle.kernel.maps import Map
from waggle.model.policy_rules import NO_RULE, Direction
from waggle.plan.extents import ExtentAllocator
from waggle.plan.policy_bridge import bridge
from waggle.plan.policy_tables import (
    ALLOW,
    ANY,
    AUDIT,
    DENY,
    NAMED,
    NOBODY,
    SELF,
    STRICT,
    NodeSets,
    PolicyDelta,
    PolicyTables,
    Step,
    Steps,
    mapped_length,
)
from waggle.reconcile.drift import Drift

Assign = Callable[[Iterable[str]], None]


@dataclass(slots=True)
class _Run:
    """Where a list of steps is, and how many entries lead there."""

    first: int
    users: int = 0


class _Numbers:
    """A table of numbers, and what it holds."""

    def __init__(self, table: Map) -> None:
        self._table = table
        self.held: dict[bytes, int] = {}

    def read(self) -> dict[bytes, int]:
        """What the kernel has."""
        return {key: _u64(raw) for key, raw in self._table.dump()}

    def find(self, key: bytes) -> int | None:
        """What the kernel finds for a key."""
        raw = self._table.lookup(key)
        return None if raw is None else _u64(raw)

    def adopt(self) -> None:
        self.held = self.read()

    def set(self, numbers: Mapping[bytes, int]) -> None:
        """In their order."""
        due = {key: number for key, number in numbers.items() if self.held.get(key) != number}
        size = self._table.value_size
        try:
            self._table.update_many((key, number.to_bytes(size, "little")) for key, number in due.items())
        except WaggleError:
            self.adopt()  # some of them may be there
            raise
        self.held.update(due)

    def forget(self, keys: Iterable[bytes]) -> None:
        """In their order."""
        gone = [key for key in keys if key in self.held]
        self._table.delete_many(gone)
        for key in gone:
            del self.held[key]

    def forget_all_but(self, keys: Collection[bytes]) -> None:
        self.forget(sorted(self.held.keys() - keys))


class PolicyWriter:
    """`assign` is called with addresses of pods when their policies are to be what they should be now."""

    def __init__(self, maps: Mapping[str, Map], assign: Assign, *, keep: bool) -> None:
        self._policy = maps["wag_policy"]
        self._endpoints = maps["wag_endpoints"]
        self._steps = maps["wag_policy_steps"]
        self._classes = _Numbers(maps["wag_classes"])
        self._ranges = _Numbers(maps["wag_class_ranges"])
        self._patterns = _Numbers(maps["wag_patterns"])
        self._names = maps["wag_names"]
        self._state = maps["wag_policy_state"]
        self._node = maps["wag_node_policy"]
        self._assign = assign
        self._keep = keep
        self._extents = ExtentAllocator(self._steps.info.max_entries)
        self._runs: dict[Steps, _Run] = {}
        self._entries: dict[bytes, Steps] = {}  # what wag_policy holds
        self._revision = 0

    @property
    def entries(self) -> int:
        """How many pairs of set and class have an answer."""
        return len(self._entries)

    # -- the past -----------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Reads the tables back."""
        self._extents = ExtentAllocator(self._steps.info.max_entries)
        self._runs, self._entries = {}, {}
        for table in (self._classes, self._ranges, self._patterns):
            table.adopt()
        self._revision = PolicyState.unpack(self._state.lookup(bytes(4)) or bytes(8)).revision
        self._state.update(bytes(4), PolicyState(self._revision, int(self._keep)).pack())
        found = {key: PolicyRun.unpack(raw) for key, raw in self._policy.dump()}
        runs = {(run.first, run.count) for run in found.values()}
        try:
            self._extents.adopt(runs)
            lists = {run: self._read(*run) for run in runs}
        except (ValueError, WaggleError):
            # somebody else has written there: what leads nowhere denies, until `write` has given it its place
            self._policy.delete_many(found)
            self._extents = ExtentAllocator(self._steps.info.max_entries)
            return
        for key, run in found.items():
            steps = lists[run.first, run.count]
            known = self._runs.setdefault(steps, _Run(run.first))
            if known.first == run.first:
                known.users += 1
                self._entries[key] = steps
            # else the list is there twice, and this entry will be written again

    def _read(self, first: int, count: int) -> Steps:
        raw = self._steps.read_array(first, count)
        size = self._steps.value_size
        steps = (PolicyStep.unpack(raw[at : at + size]) for at in range(0, len(raw), size))
        return tuple(Step(step.start, step.verdict, step.rule, step.admin, step.baseline) for step in steps)

    # -- changes ------------------------------------------------------------------------------------------------

    def write(self, delta: PolicyDelta) -> int:
        """Makes a change, in its order. Returns what to `settle` with, 0 for nothing. TableFull leaves in force what
        was."""
        self._enter((pack_key(s, c), steps) for s, entries in delta.entries.items() for c, steps in entries.items())
        self._patterns.set(pack_patterns(delta.patterns))
        self._classes.set({pack_address(address): number for address, number in delta.classes.items()})
        for cidr, number in delta.ranges.items():
            if number is None:
                self._ranges.forget([pack_range(cidr)])
            else:
                self._ranges.set({pack_range(cidr): number})
        self._classes.forget(map(pack_address, delta.classes_gone))
        self._assign(delta.pods)
        if delta.node is not None:
            self._set_node(delta.node)
        self._revise()
        self._leave(pack_key(s, c) for s, c in delta.entries_gone)
        self._patterns.forget(pack_patterns(dict.fromkeys(delta.patterns_gone, 0)))
        return self._extents.retire()

    def sync(self, tables: PolicyTables) -> int:
        """Makes the tables these, whatever they hold: after a restart, or where something went wrong on the way."""
        wanted = {pack_key(s, c): steps for s, entries in tables.sets.items() for c, steps in entries.items()}
        classes = {pack_address(address): number for address, number in tables.classes.items()}
        ranges = {pack_range(cidr): number for cidr, number in tables.ranges.items()}
        patterns = pack_patterns(tables.patterns)
        self._enter(wanted.items())
        self._patterns.set(patterns)
        if not {_u64(key[:8]) for key in self._entries} <= tables.sets.keys():
            self._cross(wanted, classes, ranges, tables)
        self._classes.set(classes)
        # the longest first: no address is left to a range that means others
        self._ranges.set({key: ranges[key] for key in sorted(ranges, reverse=True)})
        self._ranges.forget_all_but(ranges)
        self._classes.forget_all_but(classes)
        self._assign(tables.pods)
        self._set_node(tables.node)
        self._revise()
        self._leave(self._entries.keys() - wanted.keys())
        self._patterns.forget_all_but(patterns)
        return self._extents.retire()

    def _cross(
        self,
        wanted: Mapping[bytes, Steps],
        classes: Mapping[bytes, int],
        ranges: Mapping[bytes, int],
        tables: PolicyTables,
    ) -> None:
        """Pods get their sets, where those they have know nothing of the classes that are wanted (policy_bridge)."""
        way = bridge(
            (self._classes.held, {_range_of(key): number for key, number in self._ranges.held.items()}),
            (classes, {_range_of(key): number for key, number in ranges.items()}),
            lambda address: SELF if self._is_own(address) else None,
        )
        sets = {_u64(key[:8]) for key in wanted}
        via: dict[bytes, Steps] = {}
        for policy_set in {_u64(key[:8]) for key in self._entries}:
            for between, (old, new) in way.pairs.items():
                steps = self._entries.get(pack_key(policy_set, new if policy_set in sets else old))
                if steps is not None:
                    via[pack_key(policy_set, between)] = steps
        if len(via) + len(self._entries) > self._policy.info.max_entries:
            return  # no room: for a moment addresses whose class changes are strangers to the sets that go
        self._enter(via.items())
        self._classes.set(way.addresses)
        self._ranges.set({ClassRangeKey(*key).pack(): number for key, number in way.ranges.items()})
        self._assign(tables.pods)
        self._set_node(tables.node)

    def _is_own(self, address: bytes) -> bool:
        raw = self._endpoints.lookup(address)
        return raw is not None and bool(Endpoint.unpack(raw).flags & EndpointFlag.NODE)

    def settle(self, ticket: int) -> None:
        """No packet is on its way any more that could have seen what was removed before `ticket` was given."""
        self._extents.release(ticket)

    def _enter(self, entries: Iterable[tuple[bytes, Steps]]) -> None:
        due = [(key, steps) for key, steps in entries if self._entries.get(key) != steps]
        for _, steps in due:
            if steps not in self._runs:
                run = self._runs[steps] = _Run(self._extents.allocate(len(steps)))
                self._steps.update_many(
                    (
                        (run.first + i).to_bytes(4, "little"),
                        PolicyStep(s.start, s.rule, s.verdict, s.admin, s.baseline).pack(),
                    )
                    for i, s in enumerate(steps)
                )
        self._policy.update_many((key, PolicyRun(self._runs[steps].first, len(steps)).pack()) for key, steps in due)
        for _, steps in due:  # first, so that no list goes which another entry has now
            self._runs[steps].users += 1
        for key, steps in due:
            self._drop_run(key)
            self._entries[key] = steps

    def _drop_run(self, key: bytes) -> None:
        steps = self._entries.pop(key, None)
        if steps is None:
            return
        run = self._runs[steps]
        run.users -= 1
        if not run.users:
            del self._runs[steps]
            self._extents.free(run.first, len(steps))

    def _leave(self, keys: Iterable[bytes]) -> None:
        gone = list(keys)
        self._policy.delete_many(gone)
        for key in gone:
            self._drop_run(key)

    def _set_node(self, sets: NodeSets) -> None:
        """Programs read word by word what is written word by word: a trial begins once its sets are there, and ends
        before they go."""
        now = self._node_sets()
        if sets == now:
            return
        if not sets.until_ns:  # what was tried goes on being tried until what takes its place is there
            steps = [sets._replace(trial_ingress=now.trial_ingress, trial_egress=now.trial_egress), sets]
        elif not now.until_ns:
            steps = [sets._replace(until_ns=0), sets]
        else:
            steps = [sets]
        for step in steps:
            self._node.update(bytes(4), NodePolicy(*step).pack())

    def _node_sets(self) -> NodeSets:
        return NodeSets(*NodePolicy.unpack(self._node.lookup(bytes(4)) or bytes(40)))

    def _revise(self) -> None:
        """Has programs judge the flows they know again."""
        self._revision = (self._revision + 1) % (1 << 32)
        self._state.update(bytes(4), PolicyState(self._revision, int(self._keep)).pack())

    def set_of_node(self, direction: Direction, *, on_trial: bool) -> int:
        """The set that judges what comes to the node, or leaves it; 0 where nothing does."""
        sets = self._node_sets()
        if direction is Direction.INGRESS:
            return sets.trial_ingress if on_trial else sets.ingress
        return sets.trial_egress if on_trial else sets.egress

    # -- questions ----------------------------------------------------------------------------------------------

    def answer(self, policy_set: int, peer: str, key: int, *, is_self: bool, asker: int = 0) -> Step:
        """What a program finds in the tables for a set, an address at the other end, and `plan.policy_tables.step_key`;
        read from the kernel, as programs read it. `is_self`: the address is this node's; `asker`: the pod's
        interface, for names that it was told. A pair without an answer
        denies."""
        address = pack_address(peer)
        own = self._classes.find(address)
        if own is None:
            own = SELF if is_self else self._ranges.find(ClassRangeKey(128, address).pack())
        if own is None:
            own = NOBODY
        step = self._step(policy_set, own, key) or self._step(policy_set, ANY, key) or Step(0, DENY, NO_RULE)
        if step.verdict == ALLOW or not policy_set & 1:
            return step
        raw = self._names.lookup(NameKey(asker, address).pack())
        strict = STRICT if step.verdict & AUDIT else 0
        for pattern in in_force(raw, time.monotonic()) if raw is not None else ():
            named = self._step(policy_set, NAMED | strict | pattern, key)
            if named and named.verdict & ALLOW and (named.admin < step.admin or named.baseline < step.baseline):
                return named
        return step

    def _step(self, policy_set: int, peer: int, key: int) -> Step | None:
        found = self._policy.lookup(pack_key(policy_set, peer))
        if found is None:
            return None
        run = PolicyRun.unpack(found)
        below = [step for step in self._read(run.first, run.count) if step.start <= key]
        return below[-1] if below else None

    # -- drift --------------------------------------------------------------------------------------------------

    def check(self, tables: PolicyTables) -> tuple[int, list[Drift]]:
        """How many entries were looked at, and those that are not as they should be."""
        wanted = {pack_key(s, c): steps for s, entries in tables.sets.items() for c, steps in entries.items()}
        present: dict[bytes, Steps] = {}
        for key, raw in self._policy.dump():
            run = PolicyRun.unpack(raw)
            inside = run.count and run.first + run.count <= self._extents.capacity
            present[key] = self._read(run.first, run.count) if inside else ()
        classes, ranges, patterns = self._classes.read(), self._ranges.read(), self._patterns.read()
        found = _compare("wag_policy", present, wanted, lambda key: f"set {_u64(key[:8]):#x}, class {_u64(key[8:]):#x}")
        found += _compare(
            "wag_classes", classes, {pack_address(a): n for a, n in tables.classes.items()}, unpack_address
        )
        found += _compare("wag_patterns", patterns, pack_patterns(tables.patterns), _pattern_text)
        found += _compare("wag_class_ranges", ranges, {pack_range(c): n for c, n in tables.ranges.items()}, _range_text)
        there = self._node_sets()
        if there != tables.node:
            found.append(Drift("wag_node_policy", "policies", "", f"is {there} instead of {tables.node}", bytes(4)))
        return len(present) + len(classes) + len(ranges) + len(patterns) + 1, found

    def repair(self, tables: PolicyTables) -> int:
        """Reads everything back and makes it right, as after a restart. Returns what `sync` does."""
        self.adopt()
        return self.sync(tables)


def _compare(
    table: str, there: Mapping[bytes, object], wanted: Mapping[bytes, object], name: Callable[[bytes], str]
) -> list[Drift]:
    found = []
    for key in sorted(there.keys() | wanted.keys()):
        if key not in there:
            found.append(Drift(table, "policies", name(key), "is missing", key))
        elif key not in wanted:
            found.append(Drift(table, "", name(key), "nobody has it", key))
        elif there[key] != wanted[key]:
            found.append(Drift(table, "policies", name(key), f"is {there[key]} instead of {wanted[key]}", key))
    return found


def pack_key(policy_set: int, peer: int) -> bytes:
    """struct wag_policy_key."""
    return struct.pack("<QQ", policy_set, peer)


def pack_patterns(patterns: Mapping[str, int]) -> dict[bytes, int]:
    """The entries of wag_patterns."""
    packed = ((pack_pattern(pattern), number) for pattern, number in patterns.items())
    return {key: number for key, number in packed if key is not None}


def pack_range(cidr: str) -> bytes:
    """struct wag_class_range_key."""
    network = ipaddress.ip_network(cidr)
    return ClassRangeKey(mapped_length(cidr), pack_address(str(network.network_address))).pack()


def _u64(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def _pattern_text(key: bytes) -> str:
    found = PatternKey.unpack(key)
    text = found.text.rstrip(b"\0").decode("ascii", "replace")[::-1]
    return text[1:] if found.exact else "*" + text


def _range_text(key: bytes) -> str:
    return f"{unpack_address(key[4:])}, {_u64(key[:4])} bits"


def _range_of(key: bytes) -> tuple[int, bytes]:
    found = ClassRangeKey.unpack(key)
    return found.prefix, found.addr
