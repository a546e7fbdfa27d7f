"""ServiceTables on maps in memory: what a packet could see at every single write, and what stands there in the end."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from waggle.abi._generated import BACKEND_SIZE, SERVICE_KEY_SIZE, SERVICE_SIZE, Backend, ServiceKey
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import pack_address
from waggle.errors import KernelError
from waggle.kernel.maps import ARRAY, HASH
from waggle.model.objects import ObjectKey
from waggle.plan.services import ServiceRow
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
    return ServiceKey(pack_address(f"10.96.0.{number}"), 80, 6).pack()


def frontend_name(key: bytes) -> str:
    return f"f{ServiceKey.unpack(key).addr[-1]}"


def row(frontends: tuple[int, ...], backends: Backends, flags: int = 0) -> ServiceRow:
    packed = b"".join(sorted(Backend(pack_address(f"10.0.0.{b}"), 8080, 0).pack() for b in backends))
    return ServiceRow(tuple(frontend(f) for f in frontends), (flags,) * len(frontends), packed)


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
        self.adopted: dict[str, Backends] = {}  # found at a restart, kept until its Service is known or `complete`
        self.in_flight: list[tuple[ServiceValue, Backends]] = []
        self.before: dict[str, Backends] = {}
        self.after: dict[str, Backends] | None = {}
        self.seen: dict[bytes, tuple[ServiceValue, Backends]] = {}
        self.maps.services.on_write = self.check_packets
        self.maps.backends.on_write = self.check_packets

    # what packets see

    def check_packets(self) -> None:
        now = self.maps.resolve()
        after = self.after
        for name in self.before.keys() | now.keys():
            allowed = [self.before.get(name)] + ([after.get(name)] if after is not None else [])
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
        lost = {k for name, claims in self.claimants().items() for k in claims if self.owner[name] != k}
        assert lost == {k for k, text in self.tables.problems.items() if "already served" in text}

    @rule()
    def flush(self) -> None:
        self.before, self.after = self.maps.resolve(), self.goal()
        done = self.tables.flush()
        self.check_packets()
        assert self.maps.resolve() == self.goal()
        assert bool(done.ticket) <= self.tables.unsettled
        assert not self.tables.pending
        again = self.tables.flush()
        assert not again, f"a second flush writes {again}"

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


Tables.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestTables = Tables.TestCase
