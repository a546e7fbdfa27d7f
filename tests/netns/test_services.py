"""Service semantics with real sockets: who is answered by whom, as which client, and what the others are told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from lab_machine import COMMAND, Lab, echo_pod, pod, service, unique_name

from waggle.lab import agents
from waggle.lab.traffic import Outcome, Probe, outcome_from
from waggle.model.objects import ObjectKey

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

VIPS = ("198.51.100.10", "2001:db8:100::10")
EXTERNAL = ("203.0.113.5", "2001:db8:113::5")
# that no other test asks: UDP flows stay where they are when nothing serves any more, and ports are used again
UNASKED = ("198.51.100.11", "2001:db8:100::11")
UNASKED_PORTS = {"TCP": 32411, "UDP": 32412}
CLIENT = {"10.77.0.2", "fd00:77::2"}
NODES = {1: ("10.77.0.11", "fd00:77::11"), 2: ("10.77.0.12", "fd00:77::12")}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes; `near` answers on node1, `far` on node2; `asker` asks from node1. Outside, load balancer and external
    addresses lead to node1."""
    made = Lab(unique_name("v"))
    try:
        made.run("up", "--nodes", "2")
        made.apply(
            tmp_path_factory.mktemp("services"),
            echo_pod("web-near", nodeName="node1"),
            echo_pod("web-far", nodeName="node2"),
            echo_pod("near-only", nodeName="node1"),
            echo_pod("far-only", nodeName="node2"),
            pod("asker-1", "sleep", "infinity", nodeName="node1"),
            pod("asker-2", "sleep", "infinity", nodeName="node2"),
        )
        for address in (*VIPS, *EXTERNAL, *UNASKED):
            hop = NODES[1][":" in address]
            made.run("exec", "client", "--", "ip", "route", "add", address, "via", hop)
        yield made
    finally:
        made.close()


def balanced(name: str, vips: tuple[str, str] = VIPS, **spec: Any) -> dict[str, Any]:
    spec = {"type": "LoadBalancer", "selector": {"app": "web"}, "externalIPs": list(EXTERNAL)} | spec
    document = service(name, **spec)
    document["status"] = {"loadBalancer": {"ingress": [{"ip": address, "ipMode": "VIP"} for address in vips]}}
    return document


def applied(lab: Lab, tmp_path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """The Service as it is in force on both nodes: with its addresses and node ports."""
    lab.apply(tmp_path, document)
    time.sleep(0.3)  # manifests are followed by inotify, tables written in milliseconds
    return lab.service(document["metadata"]["name"])


@pytest.fixture
def one(lab: Lab, tmp_path: Path) -> Iterator[Any]:
    """Applies one Service, and removes it afterwards."""
    made: list[dict[str, Any]] = []

    def apply(document: dict[str, Any]) -> dict[str, Any]:
        made[:] = [document]
        return applied(lab, tmp_path, document)

    yield apply
    if made:
        lab.run("delete", "-f", str(lab.manifest(tmp_path, made[0])))


def bare(lab: Lab, name: str, node: int, *probes: Probe) -> list[Outcome]:
    """Asks from a pod's network namespace, outside of every cgroup of the lab: packets are translated, not sockets."""
    place = lab.layout.pod(ObjectKey("default", name), lab.layout.node(node)).place
    done = subprocess.run(
        ["nsenter", f"--net={place.netns}", sys.executable, "-m", "waggle.lab.traffic"],
        input=json.dumps([asdict(probe) for probe in probes]),
        capture_output=True,
        text=True,
        check=True,
    )
    return [outcome_from(document) for document in json.loads(done.stdout)]


def every(addresses: tuple[str, ...] | list[str], count: int = 16, port: int = 80) -> list[Probe]:
    return [Probe(address, port, protocol, count, 1.0) for address in addresses for protocol in ("tcp", "udp")]


def node_ports(found: dict[str, Any], node: int, count: int = 16) -> list[Probe]:
    return [
        Probe(address, entry["nodePort"], entry["protocol"].lower(), count, 1.0)
        for address in NODES[node]
        for entry in found["ports"]
    ]


def assert_all(outcomes: list[Outcome], by: set[str], clients: set[str] | None = None) -> None:
    for outcome in outcomes:
        assert not outcome.failed
        assert set(outcome.answers) == by
        if clients is not None:
            assert set(outcome.clients) <= clients


def assert_none(outcomes: list[Outcome], reasons: set[str]) -> None:
    for outcome in outcomes:
        assert not outcome.answers
        assert set(outcome.failed) <= reasons


BOTH = {"web-near", "web-far"}


def test_load_balancer_and_external_addresses(lab: Lab, one: Any) -> None:
    one(balanced("web-lb"))
    for addresses in (VIPS, EXTERNAL):
        for origin in ("client", "asker-1", "node1", "asker-2"):
            assert_all(lab.ask(origin, *every(addresses, 30)), BOTH)
        assert_all(bare(lab, "asker-1", 1, *every(addresses, 30)), BOTH)


def test_external_traffic_policy_local(lab: Lab, one: Any, tmp_path: Path) -> None:
    found = one(balanced("web-lb", externalTrafficPolicy="Local"))
    # from outside: the endpoints of the node that was asked, with the client's own address
    for probes, by in (
        (every(VIPS), "web-near"),
        (node_ports(found, 1), "web-near"),
        (node_ports(found, 2), "web-far"),
    ):
        assert_all(lab.ask("client", *probes), {by}, CLIENT)
    # from inside: short-circuited to all of them
    for origin in ("asker-1", "node1"):
        assert_all(lab.ask(origin, *every(VIPS, 30)), BOTH)
    assert_all(bare(lab, "asker-1", 1, *every(VIPS, 30)), BOTH)
    near = echo_pod("web-near", nodeName="node1")
    lab.run("delete", "-f", str(lab.manifest(tmp_path, near)))
    try:
        time.sleep(0.3)
        assert_none(lab.ask("client", *every(VIPS, 1)), {"timeout"})
        assert_all(lab.ask("asker-1", *every(VIPS)), {"web-far"})
    finally:
        lab.apply(tmp_path, near)


def test_internal_traffic_policy_local(lab: Lab, one: Any) -> None:
    found = one(service("web", internalTrafficPolicy="Local"))
    assert_all(lab.ask("asker-1", *every(found["clusterIPs"])), {"web-near"})
    assert_all(lab.ask("node2", *every(found["clusterIPs"])), {"web-far"})
    assert_all(bare(lab, "asker-2", 2, *every(found["clusterIPs"])), {"web-far"})


def test_source_ranges(lab: Lab, one: Any) -> None:
    asker = lab.pod("asker-1")["addresses"]
    one(balanced("web-lb", loadBalancerSourceRanges=[f"{asker[0]}/32", f"{asker[1]}/128"]))
    assert_all(lab.ask("asker-1", *every(VIPS, 30)), BOTH)
    assert_all(bare(lab, "asker-1", 1, *every(VIPS, 30)), BOTH)
    assert_none(lab.ask("asker-2", *every(VIPS, 1)), {"No route to host"})
    assert_none(bare(lab, "asker-2", 2, *every(VIPS, 1)), {"timeout"})
    assert_none(lab.ask("client", *every(VIPS, 1)), {"timeout"})
    assert_none(lab.ask("node1", *every(VIPS, 1)), {"No route to host"})
    # they guard nothing but the load balancer's addresses
    for origin in ("client", "asker-2", "node1"):
        assert_all(lab.ask(origin, *every(EXTERNAL, 30)), BOTH)
    one(balanced("web-lb", loadBalancerSourceRanges=["10.77.0.0/24"]))
    (problem,) = agents.get_json(lab.layout.node(1), "/status")["problems"]
    assert problem["subject"] == "Service default/web-lb" and "hold no IPv6 range" in problem["reason"]
    assert_all(lab.ask("asker-2", *every(VIPS[1:], 30)), BOTH)
    one(balanced("web-lb", loadBalancerSourceRanges=["10.77.0.0/24", "fd00:77::/64"]))
    for origin in ("client", "node1"):
        assert_all(lab.ask(origin, *every(VIPS, 30)), BOTH)
    assert_none(lab.ask("asker-1", *every(VIPS, 1)), {"No route to host"})
    one(balanced("web-lb"))
    assert_all(lab.ask("asker-2", *every(VIPS, 30)), BOTH)


def test_session_affinity(lab: Lab, one: Any) -> None:
    config = {"clientIP": {"timeoutSeconds": 2}}
    found = one(balanced("web-lb", sessionAffinity="ClientIP", sessionAffinityConfig=config))
    for ask in (
        lambda probes: lab.ask("asker-1", *probes),
        lambda probes: lab.ask("client", *probes),
        lambda probes: lab.ask("node2", *probes),
        lambda probes: bare(lab, "asker-2", 2, *probes),
    ):
        # one port and protocol, every frontend: one backend
        for protocol in ("tcp", "udp"):
            for family in (0, 1):
                addresses = (VIPS[family], EXTERNAL[family])
                (first, second) = ask([Probe(address, 80, protocol, 15, 1.0) for address in addresses])
                assert not first.failed and not second.failed
                assert len(first.answers + second.answers) == 1
    seen: set[str] = set()
    deadline = time.monotonic() + 60
    while seen != BOTH:
        assert time.monotonic() < deadline
        (outcome,) = lab.ask("asker-1", Probe(found["clusterIPs"][0], 80, "tcp", 2, 1.0))
        assert len(outcome.answers) == 1
        seen |= set(outcome.answers)
        time.sleep(2.1)
    one(balanced("web-lb"))
    assert_all(lab.ask("asker-1", *every(VIPS, 30)), BOTH)


def test_nothing_behind_it_is_told_at_once(lab: Lab, one: Any) -> None:
    document = balanced("nothing-lb", UNASKED, selector={"app": "nothing"})
    for port in document["spec"]["ports"]:
        port["nodePort"] = UNASKED_PORTS[port["protocol"]]
    found = one(document)
    refused = {"Connection refused"}
    begin = time.monotonic()
    assert_none(lab.ask("asker-1", *every(found["clusterIPs"], 1), *every(UNASKED, 1)), refused)
    assert_none(bare(lab, "asker-1", 1, *every(found["clusterIPs"], 1), *every(UNASKED, 1)), refused)
    assert_none(lab.ask("client", *every(UNASKED, 1), *node_ports(found, 1, 1), *node_ports(found, 2, 1)), refused)
    assert time.monotonic() - begin < 3, "somebody waited"


def test_traffic_distribution_and_fall_back(lab: Lab, one: Any) -> None:
    found = one(service("web", trafficDistribution="PreferSameNode"))
    assert_all(lab.ask("asker-1", *every(found["clusterIPs"])), {"web-near"})
    assert_all(lab.ask("asker-2", *every(found["clusterIPs"])), {"web-far"})


_CONVERSATION = """
import json, socket, sys
address, port, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
body = b"x" * size
sock = socket.create_connection((address, port), 5)
for line in sys.stdin:
    sock.sendall(b"POST / HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: %d\\r\\n\\r\\n" % size + body)
    answer = json.loads(sock.recv(4096).partition(b"\\r\\n\\r\\n")[2])
    print(answer["name"], answer["client"], flush=True)
"""


def conversation(lab: Lab, address: str, port: int, size: int) -> subprocess.Popen[str]:
    """A connection of the client: every line in is a request of so many bytes, every line out who answered whom."""
    command = [*COMMAND, "exec", "--name", lab.name, "client", "--", sys.executable, "-c", _CONVERSATION]
    return subprocess.Popen(
        [*command, address, str(port), str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().split()


DIRECT = {"waggle.dev/forwarding": "dsr", "waggle.dev/balancing": "maglev"}


def test_direct_server_return(lab: Lab, one: Any) -> None:
    """Clients keep their address with backends on other nodes too; requests of 40 packets fit through the tunnel."""
    document = balanced("web-lb")
    document["metadata"]["annotations"] = DIRECT
    found = one(document)
    probes = [*every(VIPS, 60), *every(EXTERNAL, 60), *node_ports(found, 1, 60)]
    outcomes = lab.ask("client", *probes)
    assert_all(outcomes, BOTH)
    for outcome in outcomes:
        # a client port of UDP that an earlier test had keeps its flow, and the node's address with it
        assert sum(count for client, count in outcome.clients.items() if client not in CLIENT) <= 3
    assert_all(lab.ask("asker-1", *every(VIPS, 30)), BOTH)
    for address in VIPS:
        answered = set()
        for _ in range(20):
            with conversation(lab, address, 80, 60000) as process:
                for _ in range(3):
                    name, client = said(process)
                    assert client in CLIENT
                answered.add(name)
                process.communicate()
            if answered == BOTH:
                break
        assert answered == BOTH


def test_connections_survive_the_node_that_was_asked(lab: Lab, one: Any) -> None:
    """With Maglev every node sends a flow to the same backend, which has it already: the way to the Service changes
    from one node to the other in the middle of connections, and back."""
    document = balanced("web-lb")
    document["metadata"]["annotations"] = DIRECT
    one(document)
    processes = [conversation(lab, address, 80, 2000) for address in VIPS for _ in range(8)]
    try:
        before = [said(process) for process in processes]
        assert {name for name, _ in before} == BOTH
        for node in (2, 1, 2):
            for address in VIPS:
                hop = NODES[node][":" in address]
                lab.run("exec", "client", "--", "ip", "route", "replace", address, "via", hop)
            assert [said(process) for process in processes] == before
    finally:
        for process in processes:
            process.communicate()
        for address in VIPS:
            lab.run("exec", "client", "--", "ip", "route", "replace", address, "via", NODES[1][":" in address])


_ONE_PORT_TWO_WAYS = """
import json, socket, sys
ways = [(tuple(target), family) for target, family in json.loads(sys.argv[1])]
request = b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n"
opened = []
for target, family in ways:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", int(sys.argv[2])))
    sock.settimeout(3)
    sock.connect(target)
    opened.append(sock)
for sock in opened * 3:
    sock.sendall(request)
    print(sock.recv(4096).partition(b"\\r\\n\\r\\n")[2].decode().strip(), flush=True)
"""


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["near", "far"])
def test_one_port_directly_and_through_a_service(lab: Lab, one: Any, name: str, order: int) -> None:
    """A pod that no socket hook sees uses one port towards a pod and towards the Service before it."""
    found = one(service(name))
    port = 23000 + 10 * len(name) + order  # sockets of the last case are in TIME_WAIT
    place = lab.layout.pod(ObjectKey("default", "asker-1"), lab.layout.node(1)).place
    for family, vip, address in zip(
        (socket.AF_INET, socket.AF_INET6), found["clusterIPs"], lab.pod(f"{name}-only")["addresses"], strict=True
    ):
        ways = [((address, 8080), family), ((vip, 80), family)][::order]
        done = subprocess.run(
            ["nsenter", f"--net={place.netns}", sys.executable, "-c", _ONE_PORT_TWO_WAYS, json.dumps(ways), str(port)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["name"] for answer in answers] == [f"{name}-only"] * 6
        # the first came with the port it has, the second, to keep apart, with another
        assert [answer["client_port"] == port for answer in answers] == [True, False] * 3


def test_udp_sockets_leave_a_backend_that_is_gone(lab: Lab, one: Any, tmp_path: Path) -> None:
    """Connected, unconnected, and translated per packet: within a second all are answered by what is left. A socket
    that asked for the other pod itself notices nothing."""
    found = one(service("web", type="NodePort"))
    v4, v6 = found["clusterIPs"]
    port = next(entry["nodePort"] for entry in found["ports"] if entry["protocol"] == "UDP")
    far = lab.pod("web-far")["addresses"]
    through = [
        [kind, host, number]
        for kind in ("connected", "sendto")
        for host, number in ((v4, 80), (v6, 80), (lab.layout.node(1).addresses[0], port))
    ] * 6
    direct = [["connected", host, 8080] for host in far]
    place = lab.layout.pod(ObjectKey("default", "asker-1"), lab.layout.node(1)).place
    script = str(Path(__file__).parent / "udp_streams.py")
    started = []
    near = echo_pod("web-near", nodeName="node1")
    try:
        for command in (
            [*COMMAND, "exec", "--name", lab.name, "asker-1", "--"],
            [*COMMAND, "exec", "--name", lab.name, "node1", "--"],
            ["nsenter", f"--net={place.netns}"],
        ):
            arguments = [*command, sys.executable, script, json.dumps(through + direct)]
            started.append(subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        time.sleep(1.5)
        begun = time.monotonic()
        lab.run("delete", "-f", str(lab.manifest(tmp_path, near)))
        gone = time.monotonic()
        time.sleep(2.5)
        stories = [json.loads(process.communicate(timeout=30)[0]) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        lab.apply(tmp_path, near)
    for place_stories in stories:
        for stream, story in zip(through, place_stories, strict=False):
            before = {who for at, who in story if at < begun}
            after = [who for at, who in story if at > gone + 1]
            assert before <= BOTH, (stream, before)
            assert len(after) > 20 and set(after) == {"web-far"}, (stream, after)
        assert {story[0][1] for story in place_stories[: len(through)]} == BOTH
        for story in place_stories[len(through) :]:
            assert {who for _, who in story} == {"web-far"}


def test_ranges_and_addresses_come_and_go(lab: Lab, one: Any, tmp_path: Path) -> None:
    """A free address is dropped once its range is known, refused while a Service has it, and free again afterwards."""
    address, more = "10.111.0.7", {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR"}
    more |= {"metadata": {"name": "more"}, "spec": {"cidrs": ["10.111.0.0/24"]}}
    elsewhere = [Probe(address, 81, "tcp", 1, 1.0)]
    free, refused = {"No route to host"}, {"Connection refused"}

    def answers(expected: set[str]) -> None:
        assert_none(lab.ask("asker-1", *elsewhere), expected)
        assert_none(bare(lab, "asker-1", 1, *elsewhere), {"timeout"} if expected == free else expected)

    lab.apply(tmp_path, more)
    try:
        time.sleep(0.3)
        answers(free)
        one(service("web", clusterIP=address, clusterIPs=[address], ipFamilies=["IPv4"]))
        answers(refused)
        assert_all(lab.ask("asker-1", Probe(address, 80, "tcp", 20, 1.0)), BOTH)
        lab.kill_agent("node1")
        answers(refused)
        lab.run("up")
        answers(refused)
        lab.run("delete", "-f", str(lab.manifest(tmp_path, service("web"))))
        time.sleep(0.3)
        answers(free)
    finally:
        lab.run("delete", "-f", str(lab.manifest(tmp_path, more)))
    time.sleep(0.3)
    # nobody's: it leaves the cluster by the gateway
    (outcome,) = lab.ask("asker-1", *elsewhere)
    assert not set(outcome.failed) & {"Connection refused"} and not outcome.answers
    begin = time.monotonic()
    assert_none(lab.ask("asker-1", *elsewhere), {"timeout", "Network is unreachable"})
    assert time.monotonic() - begin > 0.9
