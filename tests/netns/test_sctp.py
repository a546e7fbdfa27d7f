"""Services with real SCTP sockets. Where this kernel has none, `make test-vm` boots one that has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_machine import COMMAND, Lab, pod, service, unique_name
from sctp_ends import opened


def sctp_sockets() -> bool:
    try:
        opened("127.0.0.1").close()
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root"),
    pytest.mark.skipif(not sctp_sockets(), reason="this kernel has no SCTP sockets: make test-vm boots one that has"),
]

SCRIPT = str(Path(__file__).parent / "sctp_ends.py")
CLIENT = {"10.77.0.2", "fd00:77::2"}
NODE1 = ("10.77.0.11", "fd00:77::11")
OUTSIDE = ("203.0.113.99", "2001:db8:cb::99")  # in none of the networks that know pods
BOTH = {"web-near", "web-far"}
#: messages that share a packet, and such that need several
SIZES = [1, 3, 1001, 1453, 7000, 30001]
COUNT = 16


def server(name: str, node: int, **port: Any) -> dict[str, Any]:
    ports = [{"containerPort": 8080, "protocol": "SCTP", **port}]
    made = pod(name, sys.executable, SCRIPT, "serve", "8080", nodeName=f"node{node}")
    made["spec"]["containers"][0]["ports"] = ports
    return made


def sctp_service(app: str = "web", **annotations: str) -> dict[str, Any]:
    ports = [{"name": "sctp", "port": 36412, "targetPort": 8080, "protocol": "SCTP"}]
    made = service("web", type="NodePort", selector={"app": app}, ports=ports)
    made["metadata"]["annotations"] = annotations
    return made


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes; `web-near` answers on node1, `web-far` on node2; `asker` asks from node1."""
    made = Lab(unique_name("s"))
    try:
        # on an emulated machine agents may need longer than `up` waits; the next one goes on
        until(lambda: made.run("up", "--nodes", "2", check=False).returncode == 0, 300)
        made.apply(
            tmp_path_factory.mktemp("sctp"),
            server("web-near", 1, hostPort=9080),
            server("web-far", 2),
            server("other-far", 2),
            pod("asker", "sleep", "infinity", nodeName="node1"),
        )
        pods = made.status()["pods"]
        targets = [(address, 8080) for entry in pods if entry["name"] != "asker" for address in entry["addresses"]]
        until(lambda: len(names(ask(made, "asker", targets))) == 3)  # they listen when they have started
        yield made
    finally:
        made.close()


@pytest.fixture
def one(lab: Lab, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """Applies the Service and gives it as it is in force; removes it afterwards."""
    documents: list[dict[str, Any]] = []

    def apply(document: dict[str, Any]) -> dict[str, Any]:
        documents[:] = [document]
        lab.apply(tmp_path, document)
        time.sleep(1)
        return lab.service("web")

    yield apply
    if documents:
        lab.run("delete", "-f", str(lab.manifest(tmp_path, *documents)))


def until(done: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.2)


def at(addresses: Any, port: int) -> list[tuple[str, int]]:
    return [(address, port) for address in addresses]


def ask(lab: Lab, origin: str, targets: list[tuple[str, int]], sizes: list[int] | None = None) -> list[dict[str, Any]]:
    """What comes of one association to each target, from a node, a pod or the client."""
    command = [sys.executable, SCRIPT, "ask", json.dumps(targets), json.dumps(sizes or [1])]
    return [json.loads(line) for line in lab.run("exec", origin, "--", *command).stdout.splitlines()]


def names(answers: list[dict[str, Any]]) -> set[str]:
    """Who answered; nobody where an association failed."""
    return set() if any("failed" in answer for answer in answers) else {answer["name"] for answer in answers}


def clients(answers: list[dict[str, Any]], name: str) -> set[str]:
    return {answer["client"] for answer in answers if answer["name"] == name}


@pytest.fixture(params=["snat", "dsr"])
def forwarding(request: pytest.FixtureRequest, lab: Lab) -> Iterator[str]:
    """With direct server return, packets of the client fit into the tunnel. A sender that learns it from errors repeats
    in IP fragments what it had cut for more, and nobody can correct their checksum where the port changes. It also cuts
    them itself, as none comes over a wire that is yet to be cut: BPF cannot put such ones of SCTP into a tunnel."""
    if request.param == "snat":
        yield "snat"
        return
    try:
        lab.run("exec", "client", "--", "ethtool", "-K", "eth0", "tx-sctp-segmentation", "off")
        for address in NODE1:
            lab.run("exec", "client", "--", "ip", "route", "add", address, "dev", "eth0", "mtu", "1440")
        yield "dsr"
    finally:
        for address in NODE1:
            lab.run("exec", "client", "--", "ip", "route", "del", address, "dev", "eth0", check=False)
        lab.run("exec", "client", "--", "ethtool", "-K", "eth0", "tx-sctp-segmentation", "on")


def node_port(found: dict[str, Any]) -> int:
    return found["ports"][0]["nodePort"]


def test_cluster_ip(lab: Lab, one: Any) -> None:
    found = one(sctp_service())
    answers = ask(lab, "asker", at(found["clusterIPs"] * COUNT, 36412), SIZES)
    assert names(answers) == BOTH, answers
    assert {answer["client"] for answer in answers} == set(lab.pod("asker")["addresses"])
    # no program is asked when a process of the node connects: its packets are translated
    answers = ask(lab, "node1", at(found["clusterIPs"] * COUNT, 36412), SIZES)
    assert names(answers) == BOTH, answers
    assert {answer["client"] for answer in answers} == set(NODE1)


def test_node_port(lab: Lab, one: Any, forwarding: str) -> None:
    found = one(sctp_service(**{"waggle.dev/forwarding": forwarding}))
    answers = ask(lab, "client", at(NODE1 * COUNT, node_port(found)), SIZES)
    assert names(answers) == BOTH, answers
    assert clients(answers, "web-near") == CLIENT
    assert clients(answers, "web-far") == (CLIENT if forwarding == "dsr" else set(NODE1))


def test_host_port(lab: Lab) -> None:
    answers = ask(lab, "client", at(NODE1, 9080), SIZES)
    assert names(answers) == {"web-near"}, answers
    assert clients(answers, "web-near") == CLIENT


def test_leaving_the_cluster(lab: Lab) -> None:
    command = [*COMMAND, "exec", "--name", lab.name, "client", "--", "env", "POD_NAME=outside"]
    for address, via in zip(OUTSIDE, ("10.77.0.2", "fd00:77::2"), strict=True):
        lab.run("exec", "client", "--", "ip", "addr", "add", address, "dev", "lo")
        lab.run("exec", "node1", "--", "ip", "route", "add", address, "via", via)
    process = subprocess.Popen([*command, sys.executable, SCRIPT, "serve", "8080", *OUTSIDE])
    try:
        until(lambda: names(ask(lab, "client", at(OUTSIDE, 8080))))
        answers = ask(lab, "asker", at(OUTSIDE * 3, 8080), SIZES)
        assert names(answers) == {"outside"}, answers
        assert clients(answers, "outside") == set(NODE1)
    finally:
        process.terminate()
        process.wait()
        for address in OUTSIDE:
            lab.run("exec", "client", "--", "ip", "addr", "del", address, "dev", "lo")
            lab.run("exec", "node1", "--", "ip", "route", "del", address)


def test_associations_keep_a_backend_that_is_removed(lab: Lab, one: Any, forwarding: str) -> None:
    annotations = {"waggle.dev/forwarding": forwarding}
    found = one(sctp_service(**annotations))
    asked = {"asker": at(found["clusterIPs"], 36412), "client": at(NODE1, node_port(found))}
    processes = [talk(lab, origin, targets * 4) for origin, targets in asked.items()]
    try:
        before = [said(process) for process in processes]
        assert {name for answers in before for name, _ in answers} == BOTH
        one(sctp_service("other", **annotations))
        for origin, targets in asked.items():
            until(lambda origin=origin, targets=targets: names(ask(lab, origin, targets)) == {"other-far"})
        for _ in range(3):
            assert [said(process) for process in processes] == before
    finally:
        for process in processes:
            process.communicate()


def talk(lab: Lab, origin: str, targets: list[tuple[str, int]]) -> subprocess.Popen[str]:
    command = [*COMMAND, "exec", "--name", lab.name, origin, "--", sys.executable, SCRIPT, "talk", json.dumps(targets)]
    return subprocess.Popen([*command, "5000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> list[tuple[str, str]]:
    """(who answered, the client that it saw) for one more message by each association."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def test_nothing_behind_it_is_told_at_once(lab: Lab, one: Any) -> None:
    found = one(sctp_service("nothing"))
    for origin, targets in (
        ("asker", at(found["clusterIPs"], 36412)),
        ("asker", at(found["clusterIPs"], 36413)),  # beside its port
        ("client", at(NODE1, node_port(found))),
    ):
        for answer in ask(lab, origin, targets):
            assert answer["failed"] == "Connection refused", (origin, targets, answer)
            assert answer["seconds"] < 2
