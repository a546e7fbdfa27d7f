"""The agent is killed and started again under load: no request without its answer, with 10,000 Services around.

Every way that a packet can take through the data path has a stream of its own, with new and with established flows:
translated at the socket, translated per packet, NodePort from outside with the backend on another node.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_machine import COMMAND, Lab, echo_pod, pod, service, unique_name
from ledger import Account, LedgerLoad, Way, server_command

from waggle.kernel.maps import Map
from waggle.lab import agents, processes
from waggle.lab.traffic import Probe
from waggle.model.objects import ObjectKey

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

SERVICES, ENDPOINTS = 10_000, 10
NODES = ("node1", "node2")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes, a pod that answers on each, a pod to ask from, and very many Services."""
    made = Lab(unique_name("r"))
    tmp_path = tmp_path_factory.mktemp("restart")
    try:
        made.run("up", "--nodes", "2")
        made.apply(
            tmp_path,
            service("web", type="NodePort"),
            *(
                pod(f"web-{i}", *server_command(8080), ports=[("TCP", 8080), ("UDP", 8080)], nodeName=f"node{i}")
                for i in (1, 2)
            ),
            echo_pod("echo-1", nodeName="node1"),
            echo_pod("echo-2", nodeName="node2"),
            pod("asker", "sleep", "infinity", nodeName="node1"),
        )
        for start in range(0, SERVICES, 1000):
            publish(made, f"many-{start}", [piece for n in range(start, start + 1000) for piece in filler(n)])
        deadline = time.monotonic() + 60
        while any(count(made, node) < SERVICES for node in NODES):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield made
    finally:
        made.close()


def publish(lab: Lab, name: str, documents: list[dict[str, Any]]) -> None:
    """Objects as a manifest of the lab, replaced in one step. Behind the lab's back: it would wait for its agents."""
    temporary = lab.layout.manifests / f".{name}.tmp"
    temporary.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}))
    temporary.rename(lab.layout.manifests / f"test-{name}.json")


def filler(number: int) -> Iterator[dict[str, Any]]:
    third, fourth = divmod(number, 256)
    yield headed("v1", "Service", f"s{number}", spec={"clusterIP": f"10.97.{third}.{fourth}", "ports": [port(80)]})
    yield endpoint_slice(
        f"s{number}", [f"10.128.{third}.{fourth}"] + [f"10.{130 + i}.0.1" for i in range(ENDPOINTS - 1)]
    )


def headed(version: str, kind: str, name: str, **rest: Any) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "namespace": "many"}, **rest}


def port(number: int) -> dict[str, Any]:
    return {"name": "p", "port": number, "protocol": "TCP"}


def endpoint_slice(name: str, addresses: list[str]) -> dict[str, Any]:
    piece = headed(
        "discovery.k8s.io/v1",
        "EndpointSlice",
        name,
        addressType="IPv4",
        ports=[port(8080)],
        endpoints=[{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
    )
    piece["metadata"]["labels"] = {"kubernetes.io/service-name": name}
    return piece


def count(lab: Lab, node: str) -> int:
    """Frontends in the tables of a node, as its agent counts them."""
    status = agents.get_json(lab.layout.node(int(node.removeprefix("node"))), "/status")
    return int(status["counts"]["frontends"])


@pytest.fixture
def loads(lab: Lab) -> Iterator[list[LedgerLoad]]:
    """Requests on every way, from now on."""
    web = lab.service("web")
    v4, v6 = web["clusterIPs"]
    ports = {entry["protocol"]: entry["nodePort"] for entry in web["ports"]}
    tcp, udp = ports["TCP"], ports["UDP"]
    node4, node6 = lab.layout.node(2).addresses

    def inside(place: str) -> list[Way]:
        return [Way(f"{place} tcp-new {family}", "tcp-new", host, 80) for family, host in (("v4", v4), ("v6", v6))] + [
            Way(f"{place} tcp-long v4", "tcp-long", v4, 80),
            Way(f"{place} udp-new v6", "udp-new", v6, 80),
            Way(f"{place} udp-long v4", "udp-long", v4, 80),
        ]

    outside = [
        Way("outside tcp-new v4", "tcp-new", node4, tcp),
        Way("outside tcp-new v6", "tcp-new", node6, tcp),
        Way("outside tcp-long v4", "tcp-long", node4, tcp),
        Way("outside tcp-long v6", "tcp-long", node6, tcp),
        Way("outside udp-new v6", "udp-new", node6, udp),
        Way("outside udp-long v4", "udp-long", node4, udp),
    ]

    def there(place: str) -> list[str]:
        return [*COMMAND, "exec", "--name", lab.name, place, "--"]

    asker = lab.layout.pod(ObjectKey("default", "asker"), lab.layout.node(1)).place
    with contextlib.ExitStack() as stack:
        started = []
        for command, ways in (
            (there("asker"), inside("pod")),
            (there("node2"), inside("node")),
            # outside of the node's cgroup: no socket hook, every packet is translated
            (["nsenter", f"--net={asker.netns}"], inside("packet")),
            (there("client"), outside),
        ):
            load = LedgerLoad(command, ways)
            stack.callback(load.close)
            started.append(load)
        for load in started:
            load.await_answers(5)
        yield started


def kill_agents(lab: Lab) -> None:
    for number in (1, 2):
        # one that has just been started may still be two processes
        for pid in processes.pids_below(lab.layout.node(number).agent_cgroup):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def agent_pid(lab: Lab, number: int) -> int:
    (pid,) = (lab.layout.node(number).agent_cgroup / "cgroup.procs").read_text().split()
    return int(pid)


def settled(loads: list[LedgerLoad]) -> dict[str, Account]:
    """The final ledger of all loads, in which nothing may be missing."""
    ledger = {name: account for load in loads for name, account in load.finish().items()}
    missing = {name: account for name, account in ledger.items() if account.open_items or account.errors}
    assert not missing
    assert len(ledger) == 21
    # an answer may come late on a busy machine, but no packet may have been lost on the way
    assert {name: account.lost_segments for name, account in ledger.items() if account.lost_segments} == {}
    return ledger


def test_agents_killed_and_restarted_lose_nothing(lab: Lab, loads: list[LedgerLoad], tmp_path: Path) -> None:
    echo = {name: lab.pod(name)["addresses"][0] for name in ("echo-1", "echo-2")}
    moving = headed("v1", "Service", "moving", spec={"clusterIP": "10.99.0.1", "ports": [port(80)]})
    for old, new in (("echo-1", "echo-2"), ("echo-2", "echo-1")):
        publish(lab, "moving", [moving, endpoint_slice("moving", [echo[old]])])
        until_answered_by(lab, old)
        before = [agent_pid(lab, number) for number in (1, 2)]
        kill_agents(lab)
        publish(lab, "moving", [moving, endpoint_slice("moving", [echo[new]])])
        for load in loads:
            load.await_answers(10)
        until_answered_by(lab, old)  # nobody is there to change it
        lab.run("up")
        assert not {agent_pid(lab, number) for number in (1, 2)} & set(before)
        until_answered_by(lab, new)
        for load in loads:
            load.await_answers(10)
    ledger = settled(loads)
    assert sum(account.sent for account in ledger.values()) > 2000


def until_answered_by(lab: Lab, name: str) -> None:
    """Only that pod answers for the Service `moving`, from either node, now or within a moment."""
    deadline = time.monotonic() + 10
    while True:
        outcomes = [lab.ask(node, Probe("10.99.0.1", 80, "tcp", 4))[0] for node in NODES]
        if all(dict(outcome.answers) == {name: 4} for outcome in outcomes):
            return
        assert time.monotonic() < deadline, outcomes


@pytest.mark.slow
def test_agents_killed_again_and_again_while_they_start_lose_nothing(lab: Lab, loads: list[LedgerLoad]) -> None:
    """Killed while it takes over the maps, loads programs, reads the tables back, lists, writes."""
    frontends_before = count(lab, "node1")
    for delay in (0.2, 0.35, 0.5, 0.65, 0.8, 1.0, 1.3, 1.8):
        kill_agents(lab)
        for number in (1, 2):
            while agents.is_running(lab.layout.node(number)):
                time.sleep(0.01)
            agents.start(lab.layout.node(number))
        time.sleep(delay)
    lab.run("up")
    assert [count(lab, node) for node in NODES] == [frontends_before] * 2
    for load in loads:
        load.await_answers(10)
    settled(loads)


def test_the_nat_table_changes_its_size(lab: Lab, loads: list[LedgerLoad]) -> None:
    """Flows that are there lose nothing. One that begins while programs with the old table and with the
    new one are both at work may be lost, as documented for max-nat."""
    for size in (100_000, 20_000):
        lab.run("up", "--set", f"max-nat={size}")
        for number in (1, 2):
            node = lab.layout.node(number)
            assert Map.pinned(node.bpf / "maps" / "wag_nat").info.max_entries == size
            assert "entries of the NAT table that was at work before" in node.log.read_text()
        for load in loads:
            load.await_answers(10)
    ledger = {name: account for load in loads for name, account in load.finish().items()}
    for name, account in ledger.items():
        assert account.open_items <= (account.sent // 10 if "-new" in name else 0), (name, account)
        assert "-new" in name or not account.errors, (name, account)
