"""The drift check on tables in memory: what it finds, what it leaves alone, what a repair does to flows."""

from __future__ import annotations

from waggle.abi._generated import BACKEND_SIZE, Backend, RangeKey, Scope, ServiceKey
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import PROTOCOLS, pack_address
from waggle.kernel.maps import ARRAY, HASH
from waggle.model.objects import ObjectKey
from waggle.plan.services import FrontendSettings, ServiceRow
from waggle.reconcile.drift import Drift, FrontendCheck, RangeCheck, frontend_name, range_name
from waggle.reconcile.ranges import ALL_NODES, SourceRanges
from waggle.reconcile.services import ServiceTables
from waggle.testing.memory_map import MemoryMap

WEB = ObjectKey("t", "web")


def key(address: str, port: int = 80, scope: Scope = Scope.INTERNAL) -> bytes:
    return ServiceKey(pack_address(address), port, PROTOCOLS["TCP"], scope).pack()


def backends(*addresses: str) -> bytes:
    return b"".join(Backend(pack_address(address), 8080, 0).pack() for address in addresses)


class Tables:
    def __init__(self) -> None:
        self.services = MemoryMap(HASH, len(key("::")), len(ServiceValue(*[0] * 9).pack()), 64, "wag_services")
        self.backends = MemoryMap(ARRAY, 4, BACKEND_SIZE, 64, "wag_backends")
        self.tables = ServiceTables(self.services, self.backends)

    def apply(self, service: ObjectKey, records: bytes, *keys: bytes) -> None:
        self.tables.apply(service, [ServiceRow(keys, tuple(FrontendSettings(0) for _ in keys), records)])
        self.tables.flush()

    def value(self, frontend: bytes) -> ServiceValue:
        return ServiceValue.unpack(self.services.lookup(frontend) or b"")

    def leads(self, frontend: bytes) -> bytes:
        value = self.value(frontend)
        return self.backends.read_array(value.offset, value.count)

    def check(self, *, repair: bool = False) -> list[Drift]:
        check = FrontendCheck(self.tables)
        found = []
        while (part := check.step()) is not None:
            found += part
        if repair:
            check.repair(found)
            self.tables.flush()
        return found


def web() -> Tables:
    made = Tables()
    made.apply(WEB, backends("10.0.0.1", "10.0.0.2"), key("10.96.0.1"), key("203.0.113.1"))
    return made


def test_what_is_right_is_left_alone() -> None:
    made = web()
    writes = made.services.writes + made.backends.writes
    assert made.check(repair=True) == []
    assert made.services.writes + made.backends.writes == writes


def test_a_wrong_backend_is_wrong_for_every_frontend_that_leads_there() -> None:
    made = web()
    before = made.value(key("10.96.0.1"))
    made.backends.update(before.offset.to_bytes(4, "little"), backends("10.9.9.9"))
    problem = "leads to 10.9.9.9:8080, 10.0.0.2:8080 instead of 10.0.0.1:8080, 10.0.0.2:8080"
    assert [(d.subject, d.entry, d.problem) for d in made.check(repair=True)] == [
        ("Service t/web", f"TCP {address}:80", problem) for address in ("10.96.0.1", "203.0.113.1")
    ]
    for frontend in (key("10.96.0.1"), key("203.0.113.1")):
        assert made.leads(frontend) == backends("10.0.0.1", "10.0.0.2")
        # flows that were led astray are looked at again only where the revision says so
        assert made.value(frontend).revision not in (0, before.revision)
    assert made.check() == []


def test_an_offset_outside_the_table_is_found() -> None:
    made = web()
    wrong = made.value(key("10.96.0.1"))._replace(offset=1 << 20)
    made.services.update(key("10.96.0.1"), wrong.pack())
    assert [d.problem for d in made.check(repair=True)] == ["leads to nothing instead of 10.0.0.1:8080, 10.0.0.2:8080"]
    assert made.check() == []


def test_a_frontend_of_nobody_goes_and_one_that_came_meanwhile_stays() -> None:
    made = web()
    made.services.update(key("10.96.0.9"), made.services.lookup(key("10.96.0.1")) or b"")
    check = FrontendCheck(made.tables)
    assert check.step() == []
    found = check.step()
    assert found is not None and [d.entry for d in found] == ["TCP 10.96.0.9:80"]
    made.apply(ObjectKey("t", "new"), backends("10.0.0.3"), key("10.96.0.9"))
    check.repair(found)
    made.tables.flush()
    assert made.leads(key("10.96.0.9")) == backends("10.0.0.3")
    assert made.check() == []


def test_names() -> None:
    assert frontend_name(key("fd00::1", 443)) == "TCP [fd00::1]:443"
    assert frontend_name(key("0.0.0.0", 30080, Scope.EXTERNAL)) == "TCP node port 30080 (IPv4), from outside"
    six = RangeKey(64 + 32, bytes(8), pack_address("fd00::")).pack()
    assert range_name(six) == "fd00::/32 of list 0000000000000000"


def test_source_ranges() -> None:
    entries = [RangeKey(64 + 96 + 8, bytes([n]) * 8, pack_address("10.0.0.0")).pack() for n in range(3)]
    table = MemoryMap(HASH, len(entries[0]), 4, 64, "wag_source_ranges")
    ranges = SourceRanges(table)
    ranges.claim(WEB, entries[:1])
    ranges.claim(ALL_NODES, entries[1:2])
    ranges.write()
    table.delete(entries[0])
    table.delete(entries[1])
    table.update(entries[2], (1).to_bytes(4, "little"))
    check = RangeCheck(ranges)
    found = []
    while (part := check.step()) is not None:
        found += part
    assert [(d.subject, d.problem) for d in found] == [
        ("", "no Service has it"),
        ("Service t/web", "is missing"),
        ("every node", "is missing"),
    ]
    check.repair(found)
    ranges.write()
    assert set(table.keys()) == set(entries[:2])
