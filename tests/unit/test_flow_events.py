"""What becomes of a record from the ring buffer: names, words, memory, and lines in a file."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from waggle.abi._generated import (
    DENIAL_KEY_SIZE,
    DenialKey,
    Direction,
    Event,
    EventKind,
    Hook,
    Outcome,
    Reason,
)
from waggle.abi.address import pack_address
from waggle.kernel.maps import HASH
from waggle.model.meta import ObjectKey, ObjectMeta
from waggle.model.objects import (
    SERVICE_NAME_LABEL,
    Endpoint,
    EndpointSlice,
    Node,
    NodeAddress,
    NodeStatus,
    ObjectReference,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
)
from waggle.model.policy_rules import Direction as RuleDirection
from waggle.model.policy_rules import RuleRef
from waggle.observe.denials import OTHERS, Denials, Denied
from waggle.observe.events import Naming, describe
from waggle.observe.flow_log import OLDER, FlowLog
from waggle.observe.history import History, size_of
from waggle.observe.names import Names
from waggle.observe.rules import PlacedRule, PlannedRules
from waggle.plan.policy_tables import PolicyTables, SetRef
from waggle.store import Store
from waggle.testing.memory_map import MemoryMap

CLIENT, WEB, VIP = "10.244.1.10", "10.244.2.10", "10.96.0.10"
SET, RULE = 0x1122334455667788, 0xAABBCCDD
REF = PlacedRule(RuleRef("NetworkPolicy", ObjectKey("t", "web"), RuleDirection.INGRESS, 2), "policy.yaml", 12)


class KnownRules:
    """One rule, and one set."""

    def rule(self, number: int) -> PlacedRule | None:
        return REF if number == RULE else None

    def policies(self, number: int) -> tuple[str, ...]:
        return ("NetworkPolicy t/deny",) if number == SET else ()


def record(**fields: object) -> bytes:
    plain = Event(*(1_000_000_000, 0, 1, 0), bytes(16), bytes(16), bytes(16), *(0, 0, 0, 6), EventKind.FLOW, *[0] * 7)
    addresses = {name: pack_address(str(fields.pop(name))) for name in ("src", "dst", "backend") if name in fields}
    return plain._replace(verdict=Outcome.FORWARDED)._replace(**addresses, **fields).pack()


def pod(name: str, address: str, *, host_network: bool = False) -> Pod:
    return Pod(ObjectMeta(name, "t"), PodSpec(host_network=host_network), PodStatus(pod_ips=[PodIP(address)]))


def piece(of: str, *addresses: str) -> EndpointSlice:
    ends = [Endpoint([one], target_ref=ObjectReference("Pod", "t", f"{of}-{n}")) for n, one in enumerate(addresses)]
    return EndpointSlice(ObjectMeta(of, "t", labels={SERVICE_NAME_LABEL: of}), endpoints=ends)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def names(store: Store) -> Names:
    return Names(
        store, list, lambda address, port, proto: "t/web" if (address, port) == (pack_address(VIP), 80) else ""
    )


@pytest.fixture
def naming(names: Names) -> Naming:
    names.by_netns[42] = "pod t/client"
    return Naming(names, KnownRules())


# -- names -------------------------------------------------------------------------------------------------------


def test_names_follow_what_changes(store: Store, names: Names):
    store.upsert(pod("client", CLIENT), "o")
    store.upsert(piece("web", WEB, "10.244.2.11"), "o")
    store.upsert(Node(ObjectMeta("n1"), status=NodeStatus([NodeAddress("InternalIP", "192.0.2.1")])), "o")
    names.follow(store.take_changes())
    told = [names.address(one) for one in (CLIENT, WEB, "10.244.2.11", "192.0.2.1", "10.0.0.1")]
    assert told == ["pod t/client", "pod t/web-0", "pod t/web-1", "node n1", ""]
    store.upsert(piece("web", "10.244.2.11"), "o")
    store.upsert(pod("other", CLIENT), "o")  # the address is used again before its last owner is known to be gone
    names.follow(store.take_changes())
    assert [names.address(one) for one in (CLIENT, WEB, "10.244.2.11")] == ["pod t/other", "", "pod t/web-0"]
    store.delete("Pod", ObjectKey("t", "client"), "o")
    names.follow(store.take_changes())
    assert names.address(CLIENT) == "pod t/other"
    store.delete("Pod", ObjectKey("t", "other"), "o")
    store.delete("EndpointSlice", ObjectKey("t", "web"), "o")
    names.follow(store.take_changes())
    assert [names.address(one) for one in (CLIENT, "10.244.2.11")] == ["", ""]


def test_an_address_of_the_node_is_not_that_of_its_host_network_pods(store: Store, names: Names):
    store.upsert(Node(ObjectMeta("n1"), status=NodeStatus([NodeAddress("InternalIP", "192.0.2.1")])), "o")
    store.upsert(pod("proxy", "192.0.2.1", host_network=True), "o")
    store.upsert(piece("proxy", "192.0.2.1"), "o")
    names.follow(store.take_changes())
    assert names.address("192.0.2.1") == "node n1"


# -- words -------------------------------------------------------------------------------------------------------


def test_a_flow_to_a_service(naming: Naming):
    raw = record(netns=42, dst=VIP, dport=80, backend=WEB, bport=8080, hook=Hook.SOCKET, count=3)
    facts = describe(naming.name(raw, 100.0), "id")
    assert facts["time"] == 101.0 and facts["id"] == "id"
    assert (facts["kind"], facts["verdict"], facts["service"], facts["count"]) == ("flow", "forwarded", "t/web", 3)
    assert (facts["source"]["name"], facts["source"]["address"]) == ("pod t/client", "")
    assert facts["backend"]["text"] == f"{WEB}:8080"
    assert "reason" not in facts


def test_the_packets_of_a_translated_socket_are_of_its_service(store: Store, names: Names, naming: Naming):
    store.upsert(pod("client", CLIENT), "o")
    names.follow(store.take_changes())
    packet = record(src=CLIENT, sport=1000, dst=WEB, dport=8080, hook=Hook.POD_EGRESS, time_ns=2_000_000_000)
    assert naming.name(packet, 0.0).service == ""
    naming.name(record(netns=42, dst=VIP, dport=80, backend=WEB, bport=8080, hook=Hook.SOCKET), 0.0)
    assert naming.name(packet, 0.0).service == "t/web"
    facts = describe(naming.name(packet, 0.0))
    assert "backend" not in facts and facts["destination"]["text"] == f"{WEB}:8080"
    for other in ({"dport": 8081}, {"proto": 17}, {"src": "10.244.1.11"}, {"time_ns": 60_000_000_000}):
        fields = {"src": CLIENT, "dst": WEB, "dport": 8080, "time_ns": 2_000_000_000} | other
        assert naming.name(record(**fields), 0.0).service == "", other


def test_a_drop(naming: Naming):
    raw = record(
        src=CLIENT, dst=VIP, dport=80, kind=EventKind.DROP, verdict=Outcome.REJECTED, reason=Reason.NO_BACKEND,
        ifindex=7, hook=Hook.POD_EGRESS, suppressed=9,
    )  # fmt: skip
    facts = describe(naming.name(raw, 0.0))
    assert (facts["kind"], facts["verdict"], facts["reason"]) == ("drop", "rejected", "no_backend")
    assert (facts["service"], facts["ifindex"], facts["suppressed"], facts["hook"]) == ("t/web", 7, 9, "pod_egress")
    assert facts["explanation"] == "the Service has no usable endpoint"
    assert "rule" not in facts and "count" not in facts


def denied(**fields: object) -> bytes:
    plain = {
        "src": CLIENT, "dst": WEB, "dport": 80, "kind": EventKind.POLICY, "verdict": Outcome.DROPPED,
        "reason": Reason.POLICY_INGRESS, "policy": SET, "rule": RULE, "direction": Direction.INGRESS,
    }  # fmt: skip
    return record(**(plain | fields))


def test_what_a_rule_decided(naming: Naming):
    facts = describe(naming.name(denied(), 0.0))
    assert (facts["kind"], facts["verdict"], facts["direction"]) == ("policy", "dropped", "ingress")
    assert facts["rule"] == {
        "object": "NetworkPolicy t/web", "direction": "ingress", "index": 2, "file": "policy.yaml", "line": 12
    }  # fmt: skip
    assert facts["policies"] == []
    assert facts["numbers"] == {"policy": "1122334455667788", "rule": "aabbccdd"}


def test_what_no_rule_allowed(naming: Naming):
    facts = describe(naming.name(denied(rule=0, verdict=Outcome.AUDIT), 0.0))
    assert (facts["verdict"], facts["rule"], facts["policies"]) == ("audit", None, ["NetworkPolicy t/deny"])


def test_rules_that_nobody_knows_any_more(naming: Naming):
    facts = describe(naming.name(denied(rule=1, policy=1), 0.0))
    assert (facts["rule"], facts["policies"]) == (None, [])


def test_numbers_of_another_version_are_shown_as_they_are(naming: Naming):
    facts = describe(naming.name(denied(reason=31, hook=6, verdict=9, kind=77, proto=47), 0.0))
    assert (facts["reason"], facts["hook"], facts["verdict"]) == ("unknown_31", "unknown_6", "unknown_9")
    assert (facts["kind"], facts["protocol"], facts["explanation"]) == ("", "47", "")


def test_rules_are_those_of_the_plan_and_those_that_just_were():
    tables = PolicyTables()
    ref = RuleRef("NetworkPolicy", ObjectKey("t", "web"), RuleDirection.INGRESS, 2, "the-name")
    cluster = RuleRef("ClusterNetworkPolicy", ObjectKey("", "guard"), RuleDirection.EGRESS, 0)
    tables.rules = {7: ref, 8: cluster}
    tables.set_names = {
        9: SetRef(RuleDirection.INGRESS, (("NetworkPolicy", ref.key), ("ClusterNetworkPolicy", cluster.key)))
    }
    lines = {ref.key: 12}
    rules = PlannedRules(
        lambda: tables, lambda kind, key: ("file:/etc/p.yaml" if key in lines else "api", lines.get(key))
    )
    place = {"file": "/etc/p.yaml", "line": 12}
    shown = {"object": "NetworkPolicy t/web", "direction": "ingress", "index": 2, "name": "the-name"}
    assert rules.rule(7).as_json() == shown | place
    assert rules.rule(8).as_json() == {"object": "ClusterNetworkPolicy guard", "direction": "egress", "index": 0}
    assert rules.policies(9) == ("NetworkPolicy t/web", "ClusterNetworkPolicy guard")
    assert rules.rule(7) is rules.rule(7) and rules.rule(0) is None and rules.policies(1) == ()
    lines[ref.key] = 15  # the file has changed
    assert rules.rule(7).line == 15
    tables.rules.clear()
    tables.set_names.clear()
    assert rules.rule(7).as_json() == shown | place | {"line": 15} and len(rules.policies(9)) == 2


# -- memory ------------------------------------------------------------------------------------------------------


def test_an_event_is_found_by_its_id_as_long_as_it_is_remembered(naming: Naming):
    events = [naming.name(record(dport=port), 0.0) for port in range(5)]
    history = History(3 * size_of(events[0]))
    ids = []
    for event in events:
        history.add(event)
        ids.append(history.identity(event))
        assert history.find(ids[-1]) is event
    assert len(set(ids)) == 5
    assert [history.find(one) for one in ids] == [None, None, *events[2:]]
    assert list(history.newest_first()) == events[:1:-1]
    assert History(1 << 20).find(ids[-1]) is None  # of another life
    for nonsense in ("", "-", "x", ids[-1] + "0", ids[-1].partition("-")[0] + "--1"):
        assert history.find(nonsense) is None


def test_history_keeps_to_its_memory(naming: Naming, names: Names):
    limit = 2 << 20
    tracemalloc.start()
    try:
        history = History(limit)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(10_000):  # no two of them alike, in any name
            names.by_netns = {number: f"pod some-namespace/some-deployment-with-a-name-{number:010d}"}
            raw = record(netns=number, time_ns=number, dport=number % 65536, count=number + 1_000_000)
            history.add(naming.name(raw, 1e9))
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert history.memory_bytes <= limit
    assert limit // 2 < used <= limit + (600 << 10), used / len(history)  # and the table of names


def test_no_history_remembers_nothing(naming: Naming):
    history = History(0)
    seen = naming.name(record(), 0.0)
    history.add(seen)
    assert len(history) == 0 and history.find(history.identity(seen)) is None


# -- the log -----------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[int]:
    return [json.loads(line)["n"] for line in file.read_text().splitlines()]


def test_the_log_is_begun_anew_when_it_is_full(tmp_path: Path):
    file = tmp_path / "new" / "flows.jsonl"
    log = FlowLog(file, 1000)
    for start in range(0, 1000, 20):
        log.write({"n": number, "text": "x" * 80} for number in range(start, start + 20))
    log.close()
    files = [file, *(file.with_name(f"{file.name}.{n}") for n in range(1, OLDER + 1))]
    assert sorted(file.parent.iterdir()) == sorted(one for one in files if one.exists())
    assert all(one.stat().st_size <= 1000 for one in files if one.exists())
    kept = [number for one in reversed(files) if one.exists() for number in lines(one)]
    assert kept == list(range(1000 - len(kept), 1000)) and len(kept) >= 30  # none is missing, and the last are there
    assert (log.lost, log.problem) == (0, "")
    assert all(one.stat().st_mode & 0o777 == 0o600 for one in files if one.exists())


def test_a_line_longer_than_the_log(tmp_path: Path):
    log = FlowLog(tmp_path / "log", 100)
    log.write([{"n": 1, "text": "x" * 500}, {"n": 2}])
    log.close()
    assert [lines(tmp_path / name) for name in ("log.1", "log")] == [[1], [2]]


def test_the_log_goes_on_in_the_file_that_is_there(tmp_path: Path):
    for number in (1, 2):
        log = FlowLog(tmp_path / "log", 1000)
        log.write([{"n": number}])
        log.close()
    assert lines(tmp_path / "log") == [1, 2]


def test_a_log_that_somebody_removes_is_made_again(tmp_path: Path):
    log = FlowLog(tmp_path / "log", 1000)
    log.write([{"n": 1}])
    (tmp_path / "log").unlink()
    log.write([{"n": 2}])
    log.close()
    assert lines(tmp_path / "log") == [2]


def test_what_cannot_be_written_is_counted_and_told(tmp_path: Path):
    (tmp_path / "dir").write_text("a file")
    log = FlowLog(tmp_path / "dir" / "log", 1000)
    log.write([{"n": 1}, {"n": 2}])
    assert log.lost == 2 and log.problem.startswith(f"cannot write {tmp_path / 'dir' / 'log'}: ")
    (tmp_path / "dir").unlink()
    log.write([{"n": 3}])
    log.close()
    assert (log.lost, log.problem) == (2, "") and lines(tmp_path / "dir" / "log") == [3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(tmp_path: Path):
    (tmp_path / "log").symlink_to("/dev/full")
    log = FlowLog(tmp_path / "log", 1000)
    log.write([{"n": 1}])
    log.close()
    assert log.lost == 1 and "No space left" in log.problem


# -- counts ------------------------------------------------------------------------------------------------------


def deny(table: MemoryMap, count: int, policy: int = SET, rule: int = RULE, verdict: Outcome = Outcome.DROPPED) -> None:
    table.update(DenialKey(policy, rule, Direction.INGRESS, verdict).pack(), count.to_bytes(8, "little"))


def test_denials_are_counted_by_who_decided():
    table = MemoryMap(HASH, DENIAL_KEY_SIZE, 8, 64)
    deny(table, 5)
    deny(table, 7, rule=0)
    deny(table, 2, rule=0, verdict=Outcome.AUDIT)
    deny(table, 1, policy=0, rule=0)
    deny(table, 3, policy=9, rule=9)
    assert Denials(table, KnownRules()).counts() == {
        Denied("NetworkPolicy t/web", "ingress", "dropped"): 5,
        Denied("NetworkPolicy t/deny", "ingress", "dropped"): 7,
        Denied("NetworkPolicy t/deny", "ingress", "audit"): 2,
        Denied(OTHERS, "ingress", "dropped"): 1,
        Denied("", "ingress", "dropped"): 3,
    }


def test_a_table_that_fills_up_loses_what_nobody_can_name_but_not_its_counts():
    table = MemoryMap(HASH, DENIAL_KEY_SIZE, 8, 8)
    counts = Denials(table, KnownRules())
    deny(table, 5)
    for number in range(1, 5):
        deny(table, 10, policy=number, rule=number)
    for _ in range(2):
        assert counts.counts()["", "ingress", "dropped"] == 40
        assert len(table.dump()) == 1
    deny(table, 6)
    assert counts.counts() == {("NetworkPolicy t/web", "ingress", "dropped"): 6, ("", "ingress", "dropped"): 40}
