"""What health ports answer, in which order the table is written, how long changes take: without a kernel."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin_agent import StandInAgent

from waggle.abi._generated import HEALTH_KEY_SIZE, HEALTH_SIZE, Health, HealthKey
from waggle.agent.api import health_answer, rfc3339
from waggle.agent.timing import ChangeTimes
from waggle.kernel.maps import ARRAY, HASH
from waggle.model.choice import NodeFacts
from waggle.model.health import health_check_port, is_leaving
from waggle.model.objects import EndpointSlice, Node, ObjectKey, Service
from waggle.plan.health import local_policies_unmet, plan_health, service_of
from waggle.plan.services import PlanContext, plan_service
from waggle.reconcile.datapath import NodeAddresses, nodeport_addresses
from waggle.reconcile.health import LATE_SECONDS, HealthTable, Overdue
from waggle.reconcile.health_process import listen_request, read_status
from waggle.store import Store
from waggle.testing.memory_map import MemoryMap

WEB, OTHER = ObjectKey("default", "web"), ObjectKey("default", "other")
HERE = PlanContext(NodeFacts("here"))


def a_service(name: str = "web", **spec: Any) -> Service:
    local = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32100}
    common = {"clusterIP": "10.96.0.1", "ports": [{"name": "p", "port": 80}, {"name": "q", "port": 81}]}
    return msgspec.convert({"metadata": {"name": name, "namespace": "default"}, "spec": common | local | spec}, Service)


def a_slice(*found: tuple[str, str, bool], name: str = "web-1", family: str = "IPv4", cause: str = "") -> EndpointSlice:
    """(address, node, ready) of each endpoint, on both ports of the Service."""
    metadata = {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}}
    if cause:
        metadata["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": cause}
    return msgspec.convert(
        {
            "metadata": metadata,
            "addressType": family,
            "ports": [{"name": "p", "port": 8080, "protocol": "TCP"}, {"name": "q", "port": 8081, "protocol": "TCP"}],
            "endpoints": [{"addresses": [a], "nodeName": n, "conditions": {"ready": r}} for a, n, r in found],
        },
        EndpointSlice,
    )


def planned(*objects: Service | EndpointSlice) -> dict[tuple[int, int], int]:
    """(port, family) → local endpoints of the Service `web`."""
    store = Store()
    for obj in objects:
        store.upsert(obj, "test")
    rows = plan_health(store, WEB, HERE)
    assert {service_of(value) for value in rows.values()} <= {WEB}
    return {tuple(HealthKey.unpack(key)): Health.unpack(value).endpoints for key, value in rows.items()}


# -- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "port"),
    [
        ({}, 32100),
        ({"healthCheckNodePort": 0}, 0),
        ({"externalTrafficPolicy": "Cluster"}, 0),
        ({"type": "NodePort"}, 0),
        ({"type": "ClusterIP"}, 0),
        ({"clusterIP": "None"}, 0),
        ({"internalTrafficPolicy": "Local"}, 32100),
    ],
)
def test_who_has_a_health_port(spec: dict[str, Any], port: int) -> None:
    assert health_check_port(a_service(**spec)) == port
    assert set(planned(a_service(**spec))) == ({(port, 4)} if port else set())


def test_a_service_of_another_proxy_has_none() -> None:
    service = a_service()
    labels = {"service.kubernetes.io/service-proxy-name": "other"}
    labelled = msgspec.structs.replace(service, metadata=msgspec.structs.replace(service.metadata, labels=labels))
    assert health_check_port(labelled) == 0


def test_addresses_of_ready_endpoints_here_are_counted_once_by_family() -> None:
    dual = a_service(clusterIPs=["10.96.0.1", "fd00::1"])
    four = a_slice(("10.0.0.1", "here", True), ("10.0.0.2", "here", True), ("10.0.0.3", "there", True))
    unready = a_slice(("10.0.0.4", "here", False), name="web-2")
    six = a_slice(("fd00::5", "here", True), name="web-3", family="IPv6")
    assert planned(dual, four, unready, six) == {(32100, 4): 2, (32100, 6): 1}
    assert planned(dual, unready) == {(32100, 4): 0, (32100, 6): 0}
    assert planned(a_service(), four, six) == {(32100, 4): 2}  # nothing of the Service is reached by IPv6
    assert planned(four) == {}


def test_a_node_leaves_when_it_is_deleted_or_about_to_be() -> None:
    def node(**fields: Any) -> Node:
        metadata = {"name": "here"} | fields.pop("metadata", {})
        return msgspec.convert({"metadata": metadata, "spec": fields}, Node)

    assert not is_leaving(None)
    assert not is_leaving(node())
    assert not is_leaving(node(unschedulable=True, taints=[{"key": "node.kubernetes.io/unschedulable"}]))
    assert is_leaving(node(taints=[{"key": "a"}, {"key": "ToBeDeletedByClusterAutoscaler", "value": "17"}]))
    assert is_leaving(node(metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}))


def test_policies_that_leave_clients_without_an_endpoint_here() -> None:
    def unmet(*objects: Service | EndpointSlice) -> set[str]:
        store = Store()
        for obj in objects:
            store.upsert(obj, "test")
        return local_policies_unmet(plan_service(store, WEB, HERE))

    both = {"internalTrafficPolicy": "Local", "externalIPs": ["192.0.2.9"]}
    there = a_slice(("10.0.0.3", "there", True))
    assert unmet(a_service(**both), there) == {"internal", "external"}
    assert unmet(a_service(externalIPs=["192.0.2.9"]), there) == {"external"}
    assert unmet(a_service(**both), a_slice(("10.0.0.3", "here", True))) == set()
    assert unmet(a_service(**both)) == set()  # there is no endpoint anywhere: another matter


# -- the table -------------------------------------------------------------------------------------------------------


def row(endpoints: int, service: ObjectKey = WEB, port: int = 32100) -> dict[bytes, bytes]:
    value = Health(endpoints, service.namespace.encode(), service.name.encode())
    return {HealthKey(port, 4).pack(): Health.unpack(value.pack()).pack()}


class Table:
    """A health table in memory, and what it looks like."""

    def __init__(self, size: int = 16) -> None:
        self.map = MemoryMap(HASH, HEALTH_KEY_SIZE, HEALTH_SIZE, size)
        self.changes = 0
        self.restart()

    def restart(self, *, complete: bool = False) -> None:
        self.health = HealthTable(self.map, self._ports)
        self.health.adopt()
        if complete:
            self.health.complete()

    def _ports(self) -> None:
        self.changes += 1

    def flush(self) -> None:
        self.health.withdraw()
        self.health.announce()

    def shown(self) -> dict[int, tuple[str, int]]:
        return {
            HealthKey.unpack(key).port: (service_of(value).name, Health.unpack(value).endpoints)
            for key, value in self.map.dump()
        }


@pytest.fixture
def table() -> Table:
    made = Table()
    made.health.complete()
    return made


def test_less_is_written_before_the_frontends_and_more_after_them(table: Table) -> None:
    for before, after in ((1, 2), (2, 1), (1, 0), (0, 1)):
        table.health.apply(WEB, row(before))
        table.flush()
        table.health.apply(WEB, row(after))
        table.health.withdraw()
        assert table.shown() == {32100: ("web", min(before, after))}
        table.health.announce()
        assert table.shown() == {32100: ("web", after)}
        assert not table.health.pending
    table.health.apply(WEB, {})
    table.health.withdraw()
    assert table.shown() == {}
    assert table.changes == 2  # opened once, closed once; numbers are no news to the process


def test_an_unchanged_row_is_not_written(table: Table) -> None:
    table.health.apply(WEB, row(1))
    table.flush()
    writes = table.map.writes
    table.health.apply(WEB, row(1))
    table.flush()
    assert table.map.writes == writes


def test_nothing_is_removed_before_everything_is_known() -> None:
    table = Table()
    table.health.apply(WEB, row(3))
    table.health.apply(OTHER, row(1, OTHER, 32101))
    table.flush()
    table.restart()
    table.health.apply(WEB, row(2))
    table.flush()
    assert table.shown() == {32100: ("web", 2), 32101: ("other", 1)}
    table.health.complete()
    table.flush()
    assert table.shown() == {32100: ("web", 2)}


def test_who_has_a_port_keeps_it(table: Table) -> None:
    table.health.apply(WEB, row(3))
    table.health.apply(OTHER, row(1, OTHER))
    table.flush()
    assert table.shown() == {32100: ("web", 3)}
    taken = {OTHER: "healthCheckNodePort 32100 is already that of Service default/web"}
    assert table.health.problems() == taken and table.health.counts(OTHER) == {} != table.health.counts(WEB)
    for complete in (False, True):  # also when the other one is known first after a restart
        table.restart()
        table.health.apply(OTHER, row(1, OTHER))
        table.flush()
        table.health.apply(WEB, row(2))
        if complete:
            table.health.complete()
        table.flush()
        assert table.shown() == {32100: ("web", 2)} and table.health.problems() == taken
    table.health.apply(WEB, {})
    table.flush()
    assert table.shown() == {32100: ("other", 1)} and table.health.problems() == {}


def test_no_room_is_said_and_heals() -> None:
    table = Table(size=1)
    table.health.complete()
    table.health.apply(WEB, row(1))
    table.health.apply(OTHER, row(1, OTHER, 32101))
    table.flush()
    assert table.shown() == {32100: ("web", 1)} and table.health.pending
    assert "32101 is not answered" in table.health.problems()[OTHER]
    table.health.apply(WEB, {})
    table.flush()
    assert table.shown() == {32101: ("other", 1)}
    assert table.health.problems() == {} and not table.health.pending


_SERVICES = [ObjectKey("default", name) for name in ("a", "b", "c")]
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(_SERVICES), st.sampled_from([0, 1, 2]), st.integers(0, 3)),  # port 0: none
        st.sampled_from(["flush", "restart"]),
    ),
    max_size=30,
)


@given(_STEPS)
def test_in_the_end_every_port_is_that_of_one_service_that_wants_it(steps: list[Any]) -> None:
    table = Table()
    table.health.complete()
    wanted: dict[ObjectKey, tuple[int, int]] = {}
    for step in steps:
        if step == "flush":
            table.flush()
        elif step == "restart":
            table.restart()
            for service, (port, count) in wanted.items():
                table.health.apply(service, row(count, service, port))
            table.health.complete()
        else:
            service, port, count = step
            wanted.pop(service, None)
            if port:
                wanted[service] = port, count
            table.health.apply(service, row(count, service, port) if port else {})
    table.flush()
    shown = table.shown()
    assert set(shown) == {port for port, _ in wanted.values()}
    for port, (name, count) in shown.items():
        assert wanted[ObjectKey("default", name)] == (port, count)
    losers = {s for s, (port, _) in wanted.items() if shown[port][0] != s.name}
    assert set(table.health.problems()) == losers and not table.health.pending


# -- changes that wait -----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def ns(self) -> int:
        return int(self.now * 1e9)

    def __call__(self) -> float:
        return self.now


def test_overdue() -> None:
    clock, memory = Clock(), MemoryMap(ARRAY, 4, 8, 1)
    overdue = Overdue(memory, clock.ns)
    overdue.adopt()
    assert not overdue
    clock.now += 1000  # nothing to do is no reason to worry
    assert not overdue
    overdue.begin()
    clock.now += LATE_SECONDS - 1
    overdue.begin()  # another attempt at the same change
    assert not overdue
    clock.now += 1
    assert overdue
    assert int.from_bytes(memory.lookup(bytes(4)) or b"", "little") == clock.ns()

    after = Overdue(memory, clock.ns)  # the next agent: what was not written is still not
    after.adopt()
    after.begin()
    after.done(in_sync=False)
    assert after
    after.done(in_sync=True)
    assert not after and memory.lookup(bytes(4)) == bytes(8)
    after.begin()
    after.done(in_sync=False)  # of its own it knows
    assert memory.lookup(bytes(4)) == bytes(8)


def test_change_times() -> None:
    clock = Clock(1_700_000_000.0)
    times = ChangeTimes(clock.now, clock)
    clock.now += 10
    times.noticed()
    clock.now += 1
    times.noticed()
    causes = {
        WEB: ["", "2023-11-14T22:13:25.500000000Z"],  # 5.5 s after the start
        OTHER: ["2023-11-14T22:13:19Z", "yesterday"],  # before it; no time at all
    }
    times.take(causes, initial=False)
    clock.now += 2
    assert times.written(WEB) == [3.0, 7.5]
    assert times.written(WEB) == times.written(OTHER) == []

    times.noticed()
    times.take(causes, initial=True)  # in a first list, only what says when
    assert times.written(WEB) == [7.5]
    ahead = {WEB: [rfc3339(clock.now + 60)]}
    times.take(ahead, initial=False)
    assert times.written(WEB) == [0.0]


def test_the_store_tells_what_caused_a_change() -> None:
    store = Store()
    early, late = "2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"
    store.upsert(a_service(), "test")
    store.upsert(a_slice(("10.0.0.1", "here", True), cause=early), "test")
    store.upsert(a_slice(("10.0.0.1", "here", True), cause=early), "test")  # as it is
    changes = store.take_changes()
    assert changes.triggers == {WEB: ["", early]} and changes.counts == {"Service": 1, "EndpointSlice": 1}
    store.upsert(a_slice(("10.0.0.2", "here", True), cause=early), "test")  # not the cause of this change
    store.upsert(a_slice(("10.0.0.3", "here", True), cause=late), "test")
    assert store.pending == {"EndpointSlice": 2}
    store.delete("EndpointSlice", ObjectKey("default", "web-1"), "test")
    changes = store.take_changes()
    assert changes.triggers == {WEB: ["", late]} and changes.counts == {"EndpointSlice": 3}
    assert not store.pending


# -- what is said ----------------------------------------------------------------------------------------------------


def test_the_answer_of_the_node(tmp_path: Any) -> None:
    agent: Any = StandInAgent(tmp_path / "agent.sock")
    agent.last_updated = 1_700_000_000.0
    well = health_answer(agent, 1_700_000_100.0)
    assert well["lastUpdated"] == well["currentTime"] == "2023-11-14T22:15:00.000000Z" and well["healthy"] is True
    agent.overdue, agent.last_error = True, "no memory"
    late = health_answer(agent, 1_700_000_100.0)
    assert late["lastUpdated"] == "2023-11-14T22:13:20.000000Z" != late["currentTime"]
    family = {"lastUpdated": late["lastUpdated"], "healthy": False}
    assert late["status"] == {"IPv4": family, "IPv6": family}
    assert late["error"] == "no memory"
    json.dumps(late)


def test_where_health_ports_are() -> None:
    node = NodeAddresses("192.0.2.1", "2001:db8::1", frozenset({"192.0.2.1", "2001:db8::1", "10.1.2.3"}))
    assert nodeport_addresses((), node) == ["*"]
    assert nodeport_addresses(("primary",), node) == ["192.0.2.1", "2001:db8::1"]
    assert nodeport_addresses(("10.0.0.0/8", "127.0.0.0/8"), node) == ["10.1.2.3", "127.0.0.1"]
    assert nodeport_addresses(("172.16.0.0/12",), node) == []


def test_words_with_the_process() -> None:
    assert listen_request(["*"]) == b"listen *" and listen_request([]) == b"listen"
    status = read_status(b"abc-17\n32100 4 98\n32101 6 99\n")
    assert status.tag == "abc-17" and status.failed == {(32100, 4): 98, (32101, 6): 99}
    assert read_status(b"").tag == ""
