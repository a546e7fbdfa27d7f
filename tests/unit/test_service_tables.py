"""ServiceTables on maps in memory: what a packet could see at every single write, and what stands there in the end."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from waggle.abi._generated import BACKEND_SIZE, SERVICE_KEY_SIZE, SERVICE_SIZE, Backend, ServiceKey
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import pack_address
from waggle.errors import KernelError
from waggle.kernel.maps import ARRAY, HASH
from waggle.model.objects import ObjectKey
from waggle.plan.services import FrontendSettings, ServiceRow
from waggle.reconcile.services import ServiceTables
from waggle.testing.memory_map import MemoryMap

Backends = tuple[int, ...]  # last byte of each address: enough to tell backends apart


class Maps:
    """The two maps as packets see them, and the packets on their way."""

    def __init__(self, services: int = 1000, backends: int = 1000) -> None:
        self.services = MemoryMap(HASH, SERVICE_KEY_SIZE, SERVICE_SIZE, services, "wag_services")
        self.backends = MemoryMap(ARRAY, 4, BACKEND_SIZE, backends, "wag_backends")

    def values(self) -> dict[bytes, ServiceValue]:
        return {key: ServiceValue.unpack(raw) for key, raw in self.services.dump()}

    def set_of(self, value: ServiceValue) -> Backends:
        raw = self.backends.read_array(value.offset, value.count)
        return backends_of(ServiceRow((), (), raw))

    def resolve(self) -> dict[str, Backends]:
        """Frontend → backends, as the maps say now."""
        return {frontend_name(key): self.set_of(value) for key, value in self.values().items()}


def frontend(number: int) -> bytes:
    return ServiceKey(pack_address(f"10.96.0.{number}"), 80, 6, 0).pack()


def frontend_name(key: bytes) -> str:
    return f"f{ServiceKey.unpack(key).addr[-1]}"


def row(frontends: tuple[int, ...], backends: Backends, flags: int = 0) -> ServiceRow:
    packed = b"".join(sorted(Backend(pack_address(f"10.0.0.{b}"), 8080, 0).pack() for b in backends))
    return ServiceRow(tuple(frontend(f) for f in frontends), (FrontendSettings(flags),) * len(frontends), packed)


def backends_of(one: ServiceRow) -> Backends:
    raw = one.backends
    return tuple(Backend.unpack(raw[i : i + BACKEND_SIZE]).addr[-1] for i in range(0, len(raw), BACKEND_SIZE))


def service(name: str) -> ObjectKey:
    return ObjectKey("default", name)


# -- the property ---------------------------------------------------------------------------------------------------


class Tables(RuleBasedStateMachine):
    """Services come, change, quarrel over frontends and go; agents end and start at any point.

    At every write of a flush each frontend must lead to the whole set it led to before or to the whole set it is
    to lead to, and a packet that has read a frontend's value must find that value's set until `settle`.
    """

    services_size = 1000
    backends_size = 1000

    def __init__(self) -> None:
        super().__init__()
        self.maps = Maps(self.services_size, self.backends_size)
        self.tables = ServiceTables(self.maps.services, self.maps.backends)
        self.wanted: dict[ObjectKey, list[ServiceRow]] = {}
        self.owner: dict[str, ObjectKey] = {}
        self.planned: dict[str, set[Backends]] = {}  # every set a frontend ever was to lead to
        self.adopted: dict[str, Backends] = {}  # found at a restart, kept until its Service is known or `complete`
        self.in_flight: list[tuple[ServiceValue, Backends]] = []
        self.before: dict[str, Backends] = {}
        self.after: dict[str, Backends] = {}
        self.seen: dict[bytes, tuple[ServiceValue, Backends]] = {}
        self.maps.services.on_write = self.check_packets
        self.maps.backends.on_write = self.check_packets

    # what packets see

    def check_packets(self) -> None:
        now, starved = self.maps.resolve(), self.starved_frontends()
        for name in self.before.keys() | now.keys():
            allowed = {self.before.get(name), self.after.get(name)}
            if name in starved:
                allowed |= {None} | self.planned[name]
            assert now.get(name) in allowed, f"{name} leads to {now.get(name)}, not to one of {allowed}"
        values = {key: (value, self.maps.set_of(value)) for key, value in self.maps.values().items()}
        for key, (value, backends) in self.seen.items():
            if values.get(key, (None,))[0] != value:
                self.in_flight.append((value, backends))
        self.seen = values
        for value, backends in self.in_flight:
            found = self.maps.set_of(value)
            assert found == backends, f"a packet that read {value} finds {found} instead of {backends}"

    def claimants(self) -> dict[str, dict[ObjectKey, Backends]]:
        """Frontend → who asks for it, and with which backends."""
        found: dict[str, dict[ObjectKey, Backends]] = {}
        for key, rows in self.wanted.items():
            for one in rows:
                for raw in one.keys:
                    found.setdefault(frontend_name(raw), {})[key] = backends_of(one)
        return found

    def goal(self) -> dict[str, Backends]:
        """What the maps are to say after a flush."""
        goal = {name: claims[self.owner[name]] for name, claims in self.claimants().items()}
        return {name: backends for name, backends in self.adopted.items() if name not in goal} | goal

    # what happens

    @rule(
        name=st.sampled_from("abc"),
        rows=st.lists(
            st.tuples(
                st.lists(st.integers(1, 6), min_size=1, max_size=3, unique=True).map(tuple),
                st.lists(st.integers(1, 9), max_size=5, unique=True).map(tuple),
                st.integers(0, 1),
            ),
            max_size=3,
            unique_by=lambda r: r[0][0],
        ),
    )
    def apply(self, name: str, rows: list) -> None:
        taken: set[int] = set()
        made = []
        for frontends, backends, flags in rows:  # a frontend belongs to one port of a Service
            own = tuple(f for f in frontends if f not in taken)
            taken.update(own)
            if own:
                made.append(row(own, backends, flags))
        self.plan(service(name), made)

    def plan(self, key: ObjectKey, rows: list[ServiceRow]) -> None:
        self.wanted[key] = rows
        todo = [key]
        for each in todo:
            todo += self.tables.apply(each, self.wanted.get(each, []))
        for name, claims in self.claimants().items():
            # who has a frontend keeps it as long as it asks for it; then one of those who waited gets it
            if self.owner.get(name) not in claims:
                self.owner[name] = next(k for k in claims if self.tables._owner[frontend(int(name[1:]))] == k)
            self.adopted.pop(name, None)
            self.planned.setdefault(name, set()).update(claims.values())
        lost = {k for name, claims in self.claimants().items() for k in claims if self.owner[name] != k}
        named = {k for k, text in self.tables.problems.items() if "already served" in text}
        assert named == lost

    @rule()
    def flush(self) -> None:
        self.before, self.after = self.maps.resolve(), self.goal()
        done = self.tables.flush()
        self.check_packets()
        self.check_result()
        assert not self.tables.pending
        assert self.tables.unsettled or not done.ticket
        assert not self.tables.flush(), "a second flush finds something to write"

    def check_result(self) -> None:
        """The maps say what was asked for, nothing else."""
        assert not self.tables.starved
        assert self.maps.resolve() == self.goal()

    def starved_frontends(self) -> set[str]:
        return {name for name in self.claimants() if self.owner[name] in self.tables.starved}

    @rule(map_name=st.sampled_from(["services", "backends"]), writes=st.integers(0, 4))
    def failing_flush(self, map_name: str, writes: int) -> None:
        """Out of memory in the middle: what is written is right, and the next flush writes the rest."""
        self.before, self.after = self.maps.resolve(), self.goal()
        table = getattr(self.maps, map_name)
        table.fail_after = table.writes + writes
        try:
            self.tables.flush()
        except KernelError:
            assert self.tables.pending
        finally:
            table.fail_after = None
        self.check_packets()

    @rule()
    def settle(self) -> None:
        self.in_flight.clear()
        self.tables.settle()

    @rule()
    def restart(self) -> None:
        """kill -9, and a new agent: it knows what the maps say and nothing else."""
        self.in_flight.clear()  # it takes longer than any packet
        self.tables = ServiceTables(self.maps.services, self.maps.backends)
        assert self.tables.adopt() == len(self.maps.services.dump())
        self.adopted = self.maps.resolve()
        self.wanted.clear()
        self.owner.clear()

    @rule()
    def complete(self) -> None:
        self.tables.complete()
        self.adopted.clear()

    @invariant()
    def books_are_right(self) -> None:
        if not self.tables.pending:
            assert self.tables.frontend_count == len(self.maps.services.dump())


class CrampedTables(Tables):
    """The same with maps that are soon full: who finds no room keeps a whole set, is named, and heals."""

    services_size = 4
    backends_size = 9

    def check_result(self) -> None:
        now, goal, starved = self.maps.resolve(), self.goal(), self.starved_frontends()
        assert {n: b for n, b in now.items() if n not in starved} == {n: b for n, b in goal.items() if n not in starved}
        for key in self.tables.starved:
            problem = self.tables.problems[key]
            assert "raise max-services" in problem or "raise max-backends" in problem

    @rule(data=st.data())
    def heal(self, data) -> None:
        """Once there is room, those that starved get what they want."""
        self.flush()
        starved = sorted(self.tables.starved)
        if not starved:
            return
        kept = data.draw(st.sampled_from(starved))
        rows = self.wanted[kept]
        for key in list(self.wanted):
            self.plan(key, [])
        self.complete()
        self.flush()
        self.settle()
        self.plan(kept, rows[:1])
        self.flush()
        assert not self.tables.starved
        assert not self.tables.problems
        assert self.maps.resolve() == self.goal()


for machine in (Tables, CrampedTables):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestTables = Tables.TestCase
TestCrampedTables = CrampedTables.TestCase


# -- examples -------------------------------------------------------------------------------------------------------


@pytest.fixture
def maps() -> Maps:
    return Maps()


def tables_on(maps: Maps) -> ServiceTables:
    tables = ServiceTables(maps.services, maps.backends)
    tables.adopt()
    return tables


def test_a_restart_with_the_same_plan_writes_nothing(maps):
    plan = {service("a"): [row((1, 2), (1, 2, 3))], service("b"): [row((3,), ()), row((4,), (2,), flags=1)]}
    before = tables_on(maps)
    for key, rows in plan.items():
        before.apply(key, rows)
    before.flush()
    held = maps.services.dump(), maps.backends.dump()

    after = tables_on(maps)
    for key, rows in plan.items():
        after.apply(key, rows)
    after.complete()
    assert not after.flush()
    assert (maps.services.dump(), maps.backends.dump()) == held
    assert (after.frontend_count, after.backend_count) == (4, 4)


def test_what_changed_while_the_agent_was_away_is_all_that_is_written(maps):
    before = tables_on(maps)
    for name, number in (("stays", 1), ("changes", 2), ("goes", 3)):
        before.apply(service(name), [row((number,), (number,))])
    before.flush()

    after = tables_on(maps)
    after.apply(service("stays"), [row((1,), (1,))])
    after.apply(service("changes"), [row((2,), (7, 8))])
    done = after.flush()
    assert (done.backends, done.frontends, done.deletes) == (2, 1, 0)
    assert maps.resolve() == {"f1": (1,), "f2": (7, 8), "f3": (3,)}, "nothing may go before `complete`"
    after.complete()
    done = after.flush()
    assert (done.backends, done.frontends, done.deletes) == (0, 0, 1)
    assert maps.resolve() == {"f1": (1,), "f2": (7, 8)}


def test_frontends_of_a_port_share_one_extent(maps):
    tables = tables_on(maps)
    tables.apply(service("a"), [row((1, 2), (1, 2, 3))])
    assert tables.flush().backends == 3
    assert len({(v.offset, v.revision) for v in maps.values().values()}) == 1
    tables.apply(service("a"), [row((1, 2, 3), (1, 2, 3))])
    done = tables.flush()
    assert (done.backends, done.frontends) == (0, 1), "a new frontend of a known set costs one write"


def test_the_revision_changes_exactly_when_the_set_does(maps):
    tables = tables_on(maps)
    revisions = []
    for backends in ((1,), (1,), (1, 2), (1,)):
        tables.apply(service("a"), [row((1,), backends)])
        tables.flush()
        revisions.append(maps.values()[frontend(1)].revision)
    assert revisions[0] == revisions[1]
    assert len(set(revisions[1:])) == 3

    tables = tables_on(maps)
    tables.apply(service("a"), [row((1,), (5,))])
    tables.flush()
    assert maps.values()[frontend(1)].revision not in revisions, "nor may a restart start again from 1"


def test_new_flags_for_the_same_set_keep_its_extent(maps):
    tables = tables_on(maps)
    tables.apply(service("a"), [row((1,), (1, 2))])
    tables.flush()
    tables.apply(service("a"), [row((1,), (1, 2), flags=1)])
    assert tables.flush().backends == 0
    tables.settle()
    tables.apply(service("b"), [row((2,), (8, 9))])
    tables.flush()
    assert maps.resolve() == {"f1": (1, 2), "f2": (8, 9)}


def test_a_set_replaced_before_it_was_written_costs_nothing(maps):
    tables = tables_on(maps)
    for last in range(2, 9):
        tables.apply(service("a"), [row((1,), (1, last))])
    done = tables.flush()
    assert (done.backends, done.frontends) == (2, 1)
    assert not tables.unsettled, "nothing led to the earlier sets"
    assert tables.backend_count == 2


def test_settle_with_a_ticket_leaves_what_came_after_it(maps):
    tables = tables_on(maps)
    tickets = []
    for backends in ((1, 2), (3, 4), (5, 6)):
        tables.apply(service("a"), [row((1,), backends)])
        tickets.append(tables.flush().ticket)
    assert tickets[0] == 0
    tables.settle(tickets[1])
    assert tables.backend_count == 4
    assert tables.unsettled
    tables.settle(tickets[2])
    assert tables.backend_count == 2
    assert not tables.unsettled


def test_no_room_for_backends_is_reported_leaves_others_alone_and_heals():
    maps = Maps(backends=4)
    tables = tables_on(maps)
    tables.apply(service("big"), [row((1,), (1, 2, 3))])
    tables.apply(service("late"), [row((2,), (4, 5))])
    tables.apply(service("small"), [row((3,), (6,))])
    tables.flush()
    assert maps.resolve() == {"f1": (1, 2, 3), "f3": (6,)}
    assert tables.starved == {service("late")}
    assert "backend table" in tables.problems[service("late")]

    tables.apply(service("big"), [])
    tables.flush()
    tables.settle()
    tables.apply(service("late"), [row((2,), (4, 5))])
    tables.flush()
    assert maps.resolve() == {"f2": (4, 5), "f3": (6,)}
    assert not tables.problems
    assert not tables.starved


def test_no_room_for_a_new_set_keeps_the_old_one():
    maps = Maps(backends=4)
    tables = tables_on(maps)
    tables.apply(service("a"), [row((1,), (1, 2, 3))])
    tables.flush()
    tables.apply(service("a"), [row((1,), (4, 5))])
    tables.flush()
    assert maps.resolve() == {"f1": (1, 2, 3)}
    assert service("a") in tables.starved
    tables.apply(service("a"), [row((1,), (1, 2, 3))])
    assert not tables.flush()
    assert not tables.problems


def test_no_room_for_frontends_is_reported_leaves_others_alone_and_heals():
    maps = Maps(services=2)
    tables = tables_on(maps)
    tables.apply(service("a"), [row((1,), ())])  # no backends: its going frees no extent, only its frontend
    tables.apply(service("b"), [row((2,), (2,))])
    tables.flush()
    tables.apply(service("late"), [row((3,), (3, 4))])
    tables.apply(service("b"), [row((2,), (5,))])
    tables.flush()
    assert maps.resolve() == {"f1": (), "f2": (5,)}
    assert tables.starved == {service("late")}
    assert "frontend table is full (2 entries): raise max-services" in tables.problems[service("late")]
    assert tables.frontend_count == 2

    tables.apply(service("late"), [row((3,), (3, 4))])
    tables.flush()
    tables.settle()
    tables.apply(service("late"), [row((3,), (3, 4))])
    assert not tables.flush().ticket, "trying in vain may leave nothing to settle, or the agent never rests"

    tables.apply(service("a"), [])
    assert tables.flush().deletes == 1, "the sign to try again"
    tables.apply(service("late"), [row((3,), (3, 4))])
    tables.flush()
    assert maps.resolve() == {"f2": (5,), "f3": (3, 4)}
    assert not tables.starved


def test_a_full_frontend_table_takes_a_new_frontend_in_the_flush_that_removes_another():
    maps = Maps(services=1)
    tables = tables_on(maps)
    tables.apply(service("old"), [row((1,), (1,))])
    tables.flush()
    tables.apply(service("old"), [])
    tables.apply(service("new"), [row((2,), (2,))])
    done = tables.flush()
    assert (done.frontends, done.deletes) == (1, 1)
    assert maps.resolve() == {"f2": (2,)}
    assert not tables.problems


def test_two_services_and_one_frontend(maps):
    tables = tables_on(maps)
    assert tables.apply(service("first"), [row((1,), (1,))]) == set()
    assert tables.apply(service("second"), [row((1, 2), (2,))]) == set()
    tables.flush()
    assert maps.resolve() == {"f1": (1,), "f2": (2,)}
    assert tables.problems == {service("second"): "TCP 10.96.0.1:80 is already served by Service default/first"}

    waiting = tables.apply(service("first"), [])
    assert waiting == {service("second")}
    for key in waiting:
        tables.apply(key, tables.rows(key))
    done = tables.flush()
    assert (done.frontends, done.deletes) == (1, 0), "handed over in one write, without a gap"
    assert maps.resolve() == {"f1": (2,), "f2": (2,)}
    assert not tables.problems


def test_who_stops_waiting_is_not_called(maps):
    tables = tables_on(maps)
    for name in ("first", "second", "third"):
        tables.apply(service(name), [row((1,), (1,))])
    tables.apply(service("second"), [row((2,), (2,))])
    assert service("second") not in tables.problems
    assert tables.apply(service("first"), []) == {service("third")}


@pytest.mark.parametrize("broken", ["services", "backends"])
def test_a_failed_flush_is_done_again(maps, broken):
    tables = tables_on(maps)
    tables.apply(service("gone"), [row((3,), (9,))])
    tables.flush()
    tables.apply(service("gone"), [])
    tables.apply(service("a"), [row((1,), (1, 2))])
    tables.apply(service("b"), [row((2,), (3, 4))])
    table = getattr(maps, broken)
    table.fail_after = table.writes + 1
    with pytest.raises(KernelError, match="Cannot allocate memory"):
        tables.flush()
    assert tables.pending
    tables.settle()
    table.fail_after = None
    tables.flush()
    assert maps.resolve() == {"f1": (1, 2), "f2": (3, 4)}


def test_a_smaller_backend_table_is_repaired():
    """max-backends was lowered: frontends that lead outside are written again, the rest is taken over."""
    large = Maps(backends=10)
    before = tables_on(large)
    before.apply(service("low"), [row((1,), (1, 2))])
    before.apply(service("high"), [row((2,), (3, 4, 5))])
    before.flush()
    small = Maps(backends=6)
    for key, value in large.services.dump():
        small.services.update(key, value)
    for index in range(2):
        small.backends.update(index.to_bytes(4, "little"), large.backends.lookup(index.to_bytes(4, "little")))
    stray = ServiceValue(4, 3, 9, 0, 0, 0, 0, 0, 0)
    small.services.update(frontend(2), stray.pack())

    tables = tables_on(small)
    tables.apply(service("low"), [row((1,), (1, 2))])
    tables.apply(service("high"), [row((2,), (3, 4, 5))])
    tables.complete()
    done = tables.flush()
    assert (done.backends, done.frontends) == (3, 1)
    assert small.resolve() == {"f1": (1, 2), "f2": (3, 4, 5)}


def test_extents_that_reach_into_each_other_are_repaired(maps):
    maps.services.update(frontend(1), ServiceValue(0, 4, 1, 0, 0, 0, 0, 0, 0).pack())
    maps.services.update(frontend(2), ServiceValue(2, 4, 2, 0, 0, 0, 0, 0, 0).pack())
    tables = ServiceTables(maps.services, maps.backends)
    assert tables.adopt() == 2
    tables.apply(service("a"), [row((1,), (1, 2, 3, 4))])
    tables.apply(service("b"), [row((2,), (5, 6, 7, 8))])
    tables.flush()
    assert maps.resolve() == {"f1": (1, 2, 3, 4), "f2": (5, 6, 7, 8)}


def test_more_backends_than_one_batch_takes():
    maps = Maps(services=200, backends=40_000)
    tables = tables_on(maps)
    raw = b"".join(Backend(pack_address(f"10.0.{i // 250}.{i % 250}"), 80, 0).pack() for i in range(200))
    for number in range(200):
        tables.apply(service(f"s{number}"), [ServiceRow((frontend(number),), (FrontendSettings(0),), raw)])
    done = tables.flush()
    assert (done.backends, done.frontends) == (40_000, 200)
    for value in maps.values().values():
        assert maps.backends.read_array(value.offset, value.count) == raw


def test_clients_outside_are_of_whoever_has_the_frontend(maps):
    """Also where that one begins to tell them apart after somebody else, who waits for the frontend."""

    def split(inside: Backends, outside: Backends) -> list[ServiceRow]:
        one = row((1,), outside)
        external = ServiceKey.unpack(one.keys[0])._replace(scope=1).pack()
        return [one._replace(keys=(external,)), row((1,), inside)]

    def resolve() -> dict[int, Backends]:
        return {ServiceKey.unpack(key).scope: maps.set_of(value) for key, value in maps.values().items()}

    tables = tables_on(maps)
    tables.apply(service("first"), [row((1,), (1,))])
    tables.apply(service("second"), split((2,), (3,)))
    tables.flush()
    assert resolve() == {0: (1,)}
    tables.apply(service("first"), split((1,), (4,)))
    tables.flush()
    assert resolve() == {0: (1,), 1: (4,)}
    for key in tables.apply(service("first"), []):
        tables.apply(key, tables.rows(key))
    tables.flush()
    assert resolve() == {0: (2,), 1: (3,)}
    assert not tables.problems
