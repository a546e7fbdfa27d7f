"""A planted corruption of a map is found, named and repaired by a real agent: when asked, and by itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import NODE4, PEER4, AgentNode, endpoints, service

from waggle.abi._generated import Backend, EndpointFlag, Netns, RangeKey, Scope, ServiceFlag, ServiceKey
from waggle.abi._generated import Endpoint as EndpointValue
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import PROTOCOLS, pack_address
from waggle.kernel.maps import Map

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

VIP = "10.96.0.10"
LB = "203.0.113.1"
WRONG = "192.0.2.99"
WEB = ServiceKey(pack_address(VIP), 80, PROTOCOLS["TCP"], Scope.INTERNAL).pack()
BALANCER = ServiceKey(pack_address(LB), 80, PROTOCOLS["TCP"], Scope.INTERNAL).pack()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    """A node whose agent checks nothing by itself, with one pod and one Service of each kind that is corrupted."""
    made = AgentNode(tmp_path_factory.mktemp("doctor"))
    try:
        made.open()
        made.serve(made.peer, "peer")
        made.apply("web", service("web", VIP), endpoints("web", PEER4))
        balancer = service("lb", "10.96.0.11", type="LoadBalancer", loadBalancerSourceRanges=["192.0.2.0/24"])
        made.apply("lb", balancer | {"status": {"loadBalancer": {"ingress": [{"ip": LB}]}}}, endpoints("lb", PEER4))
        made.start(drift_check=0, metrics_address="127.0.0.1:9971")
        made.add_pod("pod")
        yield made
    finally:
        made.close()


def pinned(node: AgentNode, name: str) -> Map:
    return Map.pinned(node.bpf_root / "maps" / f"wag_{name}")


def doctor(node: AgentNode, *more: str) -> subprocess.CompletedProcess[str]:
    return node.waggle("doctor", "--api-socket", str(node.socket), *more, cgroup=False)


def found(node: AgentNode, *more: str) -> list[tuple[str, str, str, str]]:
    """(table, subject, entry, problem) of everything that `waggle doctor` finds; checks its exit status."""
    done = doctor(node, "-o", "json", *more)
    report = json.loads(done.stdout)
    assert done.returncode == (3 if report["found"] else 0), done
    assert report["error"] == ""
    assert all(entry["repaired"] == ("--dry-run" not in more) for entry in report["found"])
    return [(e["table"], e["subject"], e["entry"], e["problem"]) for e in report["found"]]


def contents(node: AgentNode) -> dict[str, object]:
    """What the checked maps hold, whatever place the backends have."""
    services, backends = pinned(node, "services"), pinned(node, "backends")
    leads = {}
    for key, raw in services.dump():
        value = ServiceValue.unpack(raw)
        leads[key] = value[3:], backends.read_array(value.offset, value.count)
    return {
        "services": leads,
        **{name: dict(pinned(node, name).dump()) for name in ("source_ranges", "endpoints", "netns")},
    }


def wrong_backend(node: AgentNode) -> tuple[str, str, str, str]:
    offset = ServiceValue.unpack(pinned(node, "services").lookup(WEB) or b"").offset
    pinned(node, "backends").update(offset.to_bytes(4, "little"), Backend(pack_address(WRONG), 8080, 0).pack())
    problem = f"leads to {WRONG}:8080 instead of {PEER4}:8080"
    return "wag_services", "Service t/web", f"TCP {VIP}:80", problem


def deleted_frontend(node: AgentNode) -> tuple[str, str, str, str]:
    assert pinned(node, "services").delete(WEB)
    return "wag_services", "Service t/web", f"TCP {VIP}:80", "is missing"


def extra_frontend(node: AgentNode) -> tuple[str, str, str, str]:
    services = pinned(node, "services")
    services.update(WEB.replace(pack_address(VIP), pack_address(WRONG)), services.lookup(WEB) or b"")
    return "wag_services", "", f"TCP {WRONG}:80", "no Service has it"


def wrong_flags(node: AgentNode) -> tuple[str, str, str, str]:
    services = pinned(node, "services")
    value = ServiceValue.unpack(services.lookup(WEB) or b"")
    services.update(WEB, value._replace(flags=ServiceFlag.KEEP_CLIENT).pack())
    return "wag_services", "Service t/web", f"TCP {VIP}:80", "has flags KEEP_CLIENT instead of 0"


def open_to_everybody(node: AgentNode) -> tuple[str, str, str, str]:
    services = pinned(node, "services")
    value = ServiceValue.unpack(services.lookup(BALANCER) or b"")
    services.update(BALANCER, value._replace(ranges=0).pack())
    return "wag_services", "Service t/lb", f"TCP {LB}:80", f"has ranges 0 instead of {value.ranges}"


def the_range(node: AgentNode) -> tuple[Map, bytes]:
    ranges = pinned(node, "source_ranges")
    return ranges, next(key for key, _ in ranges.dump() if RangeKey.unpack(key).addr == pack_address("192.0.2.0"))


def missing_range(node: AgentNode) -> tuple[str, str, str, str]:
    ranges, key = the_range(node)
    ranges.delete(key)
    return (
        "wag_source_ranges",
        "Service t/lb",
        f"192.0.2.0/24 of list {RangeKey.unpack(key).ranges.hex()}",
        "is missing",
    )


def extra_range(node: AgentNode) -> tuple[str, str, str, str]:
    ranges, key = the_range(node)
    value = RangeKey.unpack(key)
    ranges.update(value._replace(prefix=64 + 96, addr=pack_address("0.0.0.0")).pack(), (1).to_bytes(4, "little"))
    return "wag_source_ranges", "", f"0.0.0.0/0 of list {value.ranges.hex()}", "no Service has it"


def pod_key(node: AgentNode) -> tuple[str, bytes]:
    address = node.get("/endpoints")[0]["addresses"][0]
    return address, pack_address(address)


def pod_that_is_gone(node: AgentNode) -> tuple[str, str, str, str]:
    address, key = pod_key(node)
    assert pinned(node, "endpoints").delete(key)
    return "wag_endpoints", f"pod default/{node.pods[0][:12]}", address, "is missing"


def pod_elsewhere(node: AgentNode) -> tuple[str, str, str, str]:
    address, key = pod_key(node)
    table = pinned(node, "endpoints")
    right = EndpointValue.unpack(table.lookup(key) or b"")
    wrong = right._replace(ifindex=right.ifindex + 1000)
    table.update(key, wrong.pack())
    problem = f"is {wrong._replace(nat_used=0)} instead of {right._replace(nat_used=0)}"
    return "wag_endpoints", f"pod default/{node.pods[0][:12]}", address, problem


def pod_of_nobody(node: AgentNode) -> tuple[str, str, str, str]:
    value = EndpointValue(7, EndpointFlag.POD, bytes(6), bytes(6), 0, -2, 0, 0)
    pinned(node, "endpoints").update(pack_address(WRONG), value.pack())
    return "wag_endpoints", "", WRONG, "nobody has it"


def wrong_netns(node: AgentNode) -> tuple[str, str, str, str]:
    table = pinned(node, "netns")
    key, raw = next((k, r) for k, r in table.dump() if Netns.unpack(r).ip4 == pack_address(NODE4))
    right = Netns.unpack(raw)
    wrong = right._replace(ip4=pack_address(WRONG))
    table.update(key, wrong.pack())
    return "wag_netns", "node", f"cookie {int.from_bytes(key, 'little')}", f"is {wrong} instead of {right}"


PLANTED = [
    wrong_backend,
    deleted_frontend,
    extra_frontend,
    wrong_flags,
    open_to_everybody,
    missing_range,
    extra_range,
    pod_that_is_gone,
    pod_elsewhere,
    pod_of_nobody,
    wrong_netns,
]


def test_nothing_is_wrong_with_a_node_that_was_left_alone(node: AgentNode) -> None:
    before = contents(node)
    done = doctor(node)
    assert done.returncode == 0, done
    line = done.stdout.splitlines()[-1]
    assert line.startswith("checked 2 of services, ") and line.endswith(": nothing wrong")
    assert contents(node) == before


@pytest.mark.parametrize("plant", PLANTED, ids=lambda f: f.__name__)
def test_what_is_planted_is_named_and_repaired(node: AgentNode, plant) -> None:
    before = contents(node)
    expected = plant(node)
    assert found(node, "--dry-run") == [expected]
    assert contents(node) != before
    assert found(node) == [expected]
    assert contents(node) == before
    assert found(node) == []
    assert node.connect(VIP, 80) == "peer"
    assert ": ".join(part for part in expected if part) in node.log.read_text()


def test_the_table_says_it_in_words_and_remembers(node: AgentNode) -> None:
    table, subject, entry, problem = deleted_frontend(node)
    done = doctor(node)
    assert done.returncode == 3
    assert done.stdout.splitlines()[0] == f"{table}: {subject}: {entry}: {problem}; repaired"
    assert any(line.endswith(f"{subject}: {entry}: {problem}") for line in doctor(node).stdout.splitlines())


def test_an_agent_finds_it_by_itself(tmp_path: Path) -> None:
    node = AgentNode(tmp_path)
    try:
        node.open()
        node.serve(node.peer, "peer")
        node.apply("web", service("web", VIP), endpoints("web", PEER4))
        node.start(drift_check=1)
        assert node.connect(VIP, 80) == "peer"
        wrong_backend(node)
        node.until(lambda: b'waggle_drift_total{table="wag_services"} 1.0' in node.request("/metrics")[1])
        node.until(lambda: node.connect(VIP, 80) == "peer")
        assert f"Service t/web: TCP {VIP}:80: leads to {WRONG}:8080" in node.log.read_text()
        assert node.get("/status")["problems"] == []
        deleted_frontend(node)
        node.until(lambda: b'waggle_drift_total{table="wag_services"} 2.0' in node.request("/metrics")[1])
        node.until(lambda: node.connect(VIP, 80) == "peer")
    finally:
        node.close()
