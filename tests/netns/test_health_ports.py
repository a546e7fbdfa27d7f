"""Health ports with real sockets: what they answer, who keeps answering, and that nobody can take them down."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from agent_node import NODE4, NODE6, PEER4, AgentNode, endpoints, service
from lab_machine import Lab, echo_pod, unique_name
from lab_machine import service as lab_service
from test_agent import cleanup

from waggle.kernel.maps import Map
from waggle.kernel.netns import call_in_netns
from waggle.lab import agents
from waggle.lab import processes as lab_processes
from waggle.reconcile import health_process
from waggle.reconcile.health_process import HealthProcess, find_processes

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

PORT = 32_100
HERE, THERE = "here", "there"
LOOPBACK = ("127.0.0.1", "::1")
PODS = ("10.244.1.11", "10.244.1.12", "10.244.1.13")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentNode]:
    with AgentNode(tmp_path) as made:
        yield made


class Answer(NamedTuple):
    status: int
    weight: str | None
    body: Any


def ask(node: AgentNode, port: int = PORT, address: str = NODE4, target: str = "/", method: str = "GET") -> Answer:
    """What the health port answers to a neighbour of the node. Raises OSError where nothing does."""

    def request() -> Answer:
        connection = http.client.HTTPConnection(address, port, timeout=3)
        try:
            connection.request(method, target)
            response = connection.getresponse()
            text = response.read()
            body = json.loads(text) if text else None
            return Answer(response.status, response.headers["X-Load-Balancing-Endpoint-Weight"], body)
        finally:
            connection.close()

    return call_in_netns(node.netns if address in LOOPBACK else node.peer, request)


def answers(node: AgentNode, port: int = PORT, address: str = NODE4) -> tuple[int, int] | None:
    """(status, local endpoints), or None where nothing answers."""
    try:
        found = ask(node, port, address)
    except OSError:
        return None
    return found.status, found.body["localEndpoints"]


def publish(
    node: AgentNode, ready: int = 1, name: str = "web", *, port: int = PORT, vip: str = "10.96.0.10", **spec: Any
) -> None:
    """A Service for load balancers with so many ready endpoints here, and one elsewhere."""
    local = {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port}
    document = service(name, vip, **(local | spec))
    if document["spec"]["externalTrafficPolicy"] != "Local":
        del document["spec"]["healthCheckNodePort"]
    piece = endpoints(name, *PODS[:ready], PEER4)
    for endpoint in piece["endpoints"]:
        endpoint["nodeName"] = THERE if endpoint["addresses"] == [PEER4] else HERE
    node.apply(name, document, piece)


def processes(node: AgentNode) -> list[int]:
    return find_processes(-1, node.cgroup / health_process.NAME)


def problems(node: AgentNode) -> dict[str, str]:
    return {problem["subject"]: problem["reason"] for problem in node.get("/status")["problems"]}


def metrics(node: AgentNode) -> dict[str, float]:
    text = node.request("/metrics")[1].decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


class Poller:
    """Asks every 10 ms over a connection of its own, as a load balancer does, and keeps every answer."""

    def __init__(self, node: AgentNode, address: str = NODE4) -> None:
        self._node, self._address = node, address
        self._stop = threading.Event()
        self.seen: list[tuple[int, int] | None] = []
        self._thread = threading.Thread(target=call_in_netns, args=(node.peer, self._run), daemon=True)

    def _run(self) -> None:
        request = b"GET /healthz HTTP/1.1\r\nHost: lb\r\n\r\n"
        while not self._stop.is_set():
            try:
                with socket.create_connection((self._address, PORT), timeout=2) as connection:
                    connection.sendall(request)
                    text = b""
                    while part := connection.recv(4096):
                        text += part
                head, _, body = text.partition(b"\r\n\r\n")
                self.seen.append((int(head.split()[1]), json.loads(body)["localEndpoints"]))
            except (OSError, ValueError, IndexError):
                self.seen.append(None)
            self._stop.wait(0.01)

    def __enter__(self) -> Poller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def more(self, count: int = 20) -> list[tuple[int, int] | None]:
        """The next so many answers."""
        start = len(self.seen) + 1  # one may be on its way
        deadline = time.monotonic() + 20
        while len(self.seen) < start + count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self.seen[start:]

    def history(self) -> list[tuple[int, int] | None]:
        """All answers, each once where it was repeated."""
        return [one for i, one in enumerate(self.seen) if i == 0 or one != self.seen[i - 1]]


# -- what is answered ------------------------------------------------------------------------------------------------


def test_the_answer(node: AgentNode) -> None:
    publish(node, 2, clusterIPs=["10.96.0.10", "fd00:96::10"])
    node.start()
    node.until(lambda: answers(node) == (200, 2))
    expected = {"service": {"namespace": "t", "name": "web"}, "localEndpoints": 2, "serviceProxyHealthy": True}
    for target in ("/", "/healthz", "/any?thing=goes"):
        assert ask(node, target=target) == Answer(200, "2", expected)
    assert ask(node, method="HEAD") == Answer(200, "2", None)
    assert ask(node, method="POST") == Answer(200, "2", expected)
    # the Service has no IPv6 endpoint, and the answer of a family is that of its endpoints
    none = {**expected, "localEndpoints": 0}
    assert ask(node, address=NODE6) == Answer(503, "0", none)
    publish(node, 0)
    node.until(lambda: answers(node) == (503, 0))
    assert ask(node) == Answer(503, "0", none)
    with pytest.raises(ConnectionRefusedError):
        ask(node, address=NODE6)  # no Service there any more
    listed = node.waggle("service", "list", "--api-socket", str(node.socket)).stdout
    assert f"*:{PORT}" in listed and "0 ready here (IPv4)" in listed


def test_only_ready_endpoints_of_this_node_count_and_addresses_count_once(node: AgentNode) -> None:
    document = service("web", "10.96.0.10", type="LoadBalancer", externalTrafficPolicy="Local")
    document["spec"]["healthCheckNodePort"] = PORT
    document["spec"]["ports"].append({"name": "q", "port": 81, "protocol": "UDP", "targetPort": 8081})
    conditions: list[dict[str, bool]] = [
        {"ready": True},
        {"ready": False, "serving": True, "terminating": True},
        {"ready": False, "serving": False},
    ]
    piece = endpoints("web", *PODS)
    piece["ports"].append({"name": "q", "port": 8081, "protocol": "UDP"})
    for endpoint, found in zip(piece["endpoints"], conditions, strict=True):
        endpoint |= {"conditions": found, "nodeName": HERE}
    piece["endpoints"].append({"addresses": [PEER4], "nodeName": THERE, "conditions": {"ready": True}})
    node.apply("web", document, piece)
    node.start()
    node.until(lambda: answers(node) == (200, 1))
    piece["endpoints"][0]["conditions"] = conditions[1]  # traffic goes on to what terminates, but none is asked for
    node.apply("web", document, piece)
    node.until(lambda: answers(node) == (503, 0))


def test_listens_where_nodeports_are_served(node: AgentNode) -> None:
    publish(node)
    node.start(nodeport_addresses="192.0.2.0/24")
    node.until(lambda: answers(node) == (200, 1))
    for address in (NODE6, *LOOPBACK):
        assert answers(node, address=address) is None


def test_moves_with_the_service(node: AgentNode) -> None:
    publish(node)
    node.start()
    node.until(lambda: answers(node) == (200, 1))
    (process,) = processes(node)
    publish(node, 2, port=PORT + 1)
    node.until(lambda: answers(node, PORT + 1) == (200, 2))
    node.until(lambda: answers(node) is None)
    publish(node, externalTrafficPolicy="Cluster")
    node.until(lambda: answers(node, PORT + 1) is None)
    node.until(lambda: not processes(node))  # nothing is left to answer
    assert not (node.cgroup / health_process.NAME).exists()
    publish(node)
    node.until(lambda: answers(node) == (200, 1))
    assert processes(node) != [process]


def test_one_process_answers_for_many_services(node: AgentNode) -> None:
    documents = []
    for number in range(300):
        name = f"s{number}"
        document = service(
            name,
            f"10.96.{1 + number // 200}.{1 + number % 200}",
            type="LoadBalancer",
            externalTrafficPolicy="Local",
            healthCheckNodePort=31_000 + number,
        )
        piece = endpoints(name, PODS[0])
        piece["endpoints"][0]["nodeName"] = HERE if number % 3 else THERE
        documents += [document, piece]
    node.apply("many", *documents)
    node.start(max_services=4096)
    node.until(lambda: answers(node, 31_299) == (200, 1))
    for number in range(300):
        found = ask(node, 31_000 + number)
        assert (found.status, found.body["service"]["name"]) == (200 if number % 3 else 503, f"s{number}")
    assert len(processes(node)) == 1
    assert metrics(node)["waggle_health_ports"] == 300


# -- while no agent is there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [NODE4, NODE6])
def test_goes_on_answering_what_the_tables_say_while_the_agent_is_away(node: AgentNode, address: str) -> None:
    both = {"clusterIPs": ["10.96.0.10", "fd00:96::10"]}

    def change(ready: int) -> None:
        publish(node, ready, **both)
        pods = [f"fd00:10:244:1::{n}" for n in range(ready)]
        piece = endpoints("web", *pods, "2001:db8::2")
        for endpoint in piece["endpoints"]:
            endpoint["nodeName"] = HERE if endpoint["addresses"][0] in pods else THERE
        piece["metadata"] = {**piece["metadata"], "name": "web-6"}
        node.apply("web-6", piece)

    change(3)
    agent = node.start()
    node.until(lambda: answers(node, address=address) == (200, 3))
    (process,) = processes(node)
    with Poller(node, address) as poller:
        poller.more()
        change(2)
        node.until(lambda: poller.seen[-1] == (200, 2))
        node.stop(agent)  # SIGKILL
        change(0)  # nobody is there to see it
        assert set(poller.more(50)) == {(200, 2)}
        agent = node.start()
        node.until(lambda: poller.seen[-1] == (503, 0))
        assert processes(node) == [process]
        node.stop(agent, signal.SIGTERM)
        assert set(poller.more()) == {(503, 0)}
        change(1)
        node.start()
        node.until(lambda: poller.seen[-1] == (200, 1))
    assert processes(node) == [process]
    assert poller.history() == [(200, 3), (200, 2), (503, 0), (200, 1)]  # never none, never another


def test_killed_in_the_middle_of_changes_it_answers_what_was_written(node: AgentNode) -> None:
    publish(node, 1)
    agent = node.start()
    node.until(lambda: answers(node) == (200, 1))
    for number in range(6):
        publish(node, 1 + number % 3)
        time.sleep(number * 0.004)
        node.stop(agent)
        (row,) = node.dump("health")
        assert answers(node) == (200, row["endpoints"]) and row["name"] == "web"
        agent = node.start()
        node.until(lambda n=number: answers(node) == (200, 1 + n % 3))
    assert len(processes(node)) == 1


def test_a_killed_process_is_replaced(node: AgentNode) -> None:
    publish(node)
    node.start()
    node.until(lambda: answers(node) == (200, 1))
    for _ in range(3):
        (process,) = processes(node)
        os.kill(process, signal.SIGKILL)
        node.until(lambda: answers(node) == (200, 1))
        assert processes(node) != [process]
    assert metrics(node)["waggle_health_server_starts_total"] == 4
    node.until(lambda: problems(node) == {})


@pytest.mark.slow
def test_a_hanging_process_is_replaced(node: AgentNode) -> None:
    publish(node)
    node.start()
    node.until(lambda: answers(node) == (200, 1))
    (process,) = processes(node)
    os.kill(process, signal.SIGSTOP)
    node.until(lambda: processes(node) != [process] and answers(node) == (200, 1), 40)
    node.until(lambda: len(processes(node)) == 1)
    node.until(lambda: problems(node) == {})


def test_an_agent_of_another_version_replaces_it_and_nobody_notices(
    node: AgentNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First a process of another version in place of the agent's, then, with the next agent, the agent's again."""
    publish(node)
    agent = node.start()
    node.until(lambda: answers(node) == (200, 1))
    (before,) = processes(node)
    node.stop(agent)
    other = tmp_path / health_process.NAME
    other.write_bytes(health_process.BINARY.read_bytes() + b"another version")
    other.chmod(0o755)
    with Poller(node) as poller:
        poller.more()
        with monkeypatch.context() as patch:
            patch.setattr(health_process, "BINARY", other)
            table = Map.pinned(node.bpf_root / "maps" / "wag_health")
            process = HealthProcess(node.bpf_root / "maps", table.info.id, node.socket, node.cgroup)
            call_in_netns(node.netns, lambda: process.connect(["*"])).close()
        (between,) = processes(node)
        assert Path(f"/proc/{between}/exe").readlink() == other and between != before
        assert set(poller.more()) == {(200, 1)}
        node.start()
        node.until(lambda: processes(node) not in ([between], []) and len(processes(node)) == 1)
        poller.more()
    assert poller.history() == [(200, 1)]
    publish(node, 2)
    node.until(lambda: answers(node) == (200, 2))


def test_the_control_socket_gone_is_no_second_process(node: AgentNode) -> None:
    publish(node)
    agent = node.start()
    node.until(lambda: answers(node) == (200, 1))
    node.stop(agent)
    health_process.control_socket(node.socket).unlink()
    elsewhere = node.directory / "other" / "agent.sock"
    agent = node.start(wait="", api_socket=elsewhere)
    control = health_process.control_socket(elsewhere)
    node.until(control.exists)
    node.until(lambda: answers(node) == (200, 1))
    assert len(processes(node)) == 1
    node.stop(agent)


# -- what gets in the way --------------------------------------------------------------------------------------------


def test_two_services_with_one_port(node: AgentNode) -> None:
    publish(node, 2, "first")
    agent = node.start()
    node.until(lambda: answers(node) == (200, 2))
    publish(node, 1, "second", vip="10.96.0.11")
    node.until(lambda: "Service t/second" in problems(node))
    said = f"healthCheckNodePort {PORT} is already that of Service t/first"
    assert problems(node) == {"Service t/second": said}
    assert ask(node).body["service"]["name"] == "first"
    node.stop(agent)
    node.start()  # whoever has the port keeps it
    node.until(lambda: problems(node) == {"Service t/second": said})
    assert ask(node).body["service"]["name"] == "first"
    (node.manifests / "first.json").unlink()
    node.until(lambda: answers(node) == (200, 1))
    assert ask(node).body["service"]["name"] == "second"
    node.until(lambda: problems(node) == {})


def test_a_port_that_somebody_else_has(node: AgentNode) -> None:
    def take() -> socket.socket:
        return socket.create_server((NODE4, PORT), reuse_port=False)

    publish(node, 2)
    publish(node, 1, "other", port=PORT + 1, vip="10.96.0.11")
    taken = call_in_netns(node.netns, take)
    agent = node.start()
    node.until(lambda: answers(node, PORT + 1) == (200, 1))
    said = f"healthCheckNodePort {PORT} cannot be opened for IPv4: Address already in use"
    node.until(lambda: problems(node) == {"Service t/web": said})
    node.stop(agent)  # nor does trying again depend on an agent
    taken.close()
    node.until(lambda: answers(node) == (200, 2))
    node.start()
    assert problems(node) == {}


def test_no_program_to_start(node: AgentNode, tmp_path: Path) -> None:
    """The rest of the node does not depend on it."""
    publish(node)
    blocked = health_process.control_socket(node.socket)
    blocked.mkdir(parents=True)
    node.start()
    node.until(lambda: "health ports" in problems(node))
    assert str(blocked) in problems(node)["health ports"]
    assert len(node.dump("health")) == 1 and node.answers("/healthz")
    blocked.rmdir()
    node.until(lambda: answers(node) == (200, 1))
    node.until(lambda: problems(node) == {})


# -- clients that are none -------------------------------------------------------------------------------------------


def said_to(node: AgentNode, text: bytes) -> bytes:
    """What comes back."""

    def talk() -> bytes:
        with socket.create_connection((NODE4, PORT), timeout=8) as connection:
            found = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough
                connection.sendall(text)
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(4096):
                    found += part
            return found

    return call_in_netns(node.peer, talk)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"400"),  # TLS
        (b"\r\n\r\n", b"400"),
        (b"get / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET\r\n\r\n", b"400"),
        (b"GET  HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/2.0\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\0\r\n\r\n", b"400"),
        (b"A\n\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 5000, b"431"),
        (b"GET /" + b"y" * 100_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.0\n\n", b"200"),
        (b"POST / HTTP/1.1\r\nContent-Length: 30000\r\n\r\n" + b"z" * 30_000, b"200"),
    ],
)
def test_garbage(polite: AgentNode, text: bytes, status: bytes) -> None:
    found = said_to(polite, text)
    assert found.split()[1:2] == [status], found
    assert answers(polite) == (200, 1)


@pytest.fixture(scope="module")
def polite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    """A node whose health port answers one endpoint, without an agent."""
    with AgentNode(tmp_path_factory.mktemp("polite")) as made:
        publish(made)
        agent = made.start()
        made.until(lambda: answers(made) == (200, 1))
        made.stop(agent)
        yield made


@pytest.mark.slow
def test_many_slow_clients_keep_nobody_waiting(polite: AgentNode) -> None:
    (process,) = processes(polite)
    descriptors = Path(f"/proc/{process}/fd")
    before = len(list(descriptors.iterdir()))

    def crowd() -> list[socket.socket]:
        found = []
        for number in range(1500):
            one = socket.create_connection((NODE4, PORT), timeout=5)
            one.sendall(b"GET / HTTP/1.1\r\nX-Slow: "[: number % 20])
            found.append(one)
        return found

    connections = call_in_netns(polite.peer, crowd)
    try:
        for _ in range(20):
            begin = time.monotonic()
            assert answers(polite) == (200, 1)
            assert time.monotonic() - begin < 1
        assert len(list(descriptors.iterdir())) - before <= 520  # the oldest made way
        memory = Path(f"/proc/{process}/status").read_text()
        assert int(memory.split("VmRSS:")[1].split()[0]) < 4096  # KiB
        polite.until(lambda: len(list(descriptors.iterdir())) == before, 15)  # nobody may take for ever
    finally:
        for one in connections:
            one.close()
    assert processes(polite) == [process] and answers(polite) == (200, 1)


def test_many_clients_at_once_are_all_answered(polite: AgentNode) -> None:
    def all_at_once() -> list[bytes]:
        opened = [socket.create_connection((NODE4, PORT), timeout=5) for _ in range(120)]
        for one in opened:
            one.sendall(b"GET / HTTP/1.1\r\n\r\n")
        found = []
        for one in opened:
            found.append(one.recv(4096))
            one.close()
        return found

    for _ in range(10):
        assert {text[:15] for text in call_in_netns(polite.peer, all_at_once)} == {b"HTTP/1.1 200 OK"}


def test_has_no_rights(polite: AgentNode) -> None:
    (process,) = processes(polite)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4 and status["Groups"].strip() == ""
    bind_service = f"{1 << 10:016x}"
    assert (status["CapPrm"], status["CapEff"], status["NoNewPrivs"]) == (bind_service, bind_service, "1")
    assert status["CapInh"] == status["CapAmb"] == f"{0:016x}"
    root = Path(f"/proc/{process}/root")
    assert list(root.iterdir()) == [] and str(root.readlink()).endswith("(deleted)")
    limits = Path(f"/proc/{process}/limits").read_text()
    assert "Max processes             0                    0" in limits


# -- neighbours and the end ------------------------------------------------------------------------------------------


def test_two_nodes_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    with AgentNode(tmp_path / "a") as one, AgentNode(tmp_path / "b") as two:
        publish(one, 1)
        publish(two, 2)
        one_agent = one.start()
        two.start()
        one.until(lambda: answers(one) == (200, 1))
        two.until(lambda: answers(two) == (200, 2))
        (kept,) = processes(two)
        one.stop(one_agent)
        assert cleanup(one).returncode == 0
        assert answers(one) is None and processes(one) == []
        assert answers(two) == (200, 2) and processes(two) == [kept]


def test_cleanup_ends_it_and_leaves_nothing(node: AgentNode) -> None:
    before = node.facts()
    publish(node)
    agent = node.start()
    node.until(lambda: answers(node) == (200, 1))
    assert cleanup(node).returncode == 1 and answers(node) == (200, 1)  # an agent runs
    node.stop(agent)
    dry = json.loads(cleanup(node, "--dry-run", "-o", "json").stdout)["removed"]
    assert answers(node) == (200, 1)
    done = json.loads(cleanup(node, "-o", "json").stdout)["removed"]
    assert done == dry and {"process", "cgroup"} <= {entry["kind"] for entry in done}
    assert processes(node) == [] and answers(node) is None
    after = node.facts()
    made = {str(node.manifests / "web.json"), str(node.socket.parent)}
    assert set(after["files"]) - set(before["files"]) == made and after["pins"] == before["pins"]
    assert not (node.cgroup / health_process.NAME).exists()
    assert "nothing" in cleanup(node).stdout


def test_cleanup_finds_it_without_its_socket(node: AgentNode) -> None:
    publish(node)
    agent = node.start()
    node.until(lambda: answers(node) == (200, 1))
    node.stop(agent)
    for path in node.socket.parent.iterdir():
        path.unlink()
    assert cleanup(node).returncode == 0
    assert processes(node) == [] and not (node.cgroup / health_process.NAME).exists()


# -- the node --------------------------------------------------------------------------------------------------------


def node_object(**changes: Any) -> dict[str, Any]:
    metadata = {"name": HERE} | changes.pop("metadata", {})
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": changes}


def health(node: AgentNode, path: str) -> tuple[int, dict[str, Any]]:
    status, body = node.request(path)
    return status, json.loads(body)


@pytest.mark.parametrize(
    "leaving",
    [
        {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "value": "1", "effect": "NoSchedule"}]},
        {"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}},
    ],
)
def test_a_node_that_leaves_is_not_healthy_but_lives_and_answers(node: AgentNode, leaving: dict[str, Any]) -> None:
    publish(node)
    node.apply("node", node_object(unschedulable=True, taints=[{"key": "node.kubernetes.io/unschedulable"}]))
    node.start()
    status, body = health(node, "/healthz")
    assert status == 200 and body["nodeEligible"] is True and body["healthy"] is True
    assert body["lastUpdated"] == body["currentTime"] == body["status"]["IPv6"]["lastUpdated"]
    node.apply("node", node_object(**leaving))
    node.until(lambda: health(node, "/healthz")[0] == 503)
    assert health(node, "/healthz")[1]["nodeEligible"] is False
    status, body = health(node, "/livez")
    assert status == 200 and "nodeEligible" not in body
    node.until(lambda: answers(node) == (200, 1))  # endpoints tell themselves when they go
    node.apply("node", node_object())
    node.until(lambda: health(node, "/healthz")[0] == 200)
    counted = metrics(node)
    assert counted['waggle_health_requests_total{code="503",path="/healthz"}'] >= 2
    assert counted['waggle_health_requests_total{code="200",path="/livez"}'] == 1


def test_a_change_that_waits_too_long(node: AgentNode) -> None:
    """As an agent leaves it that was killed, or hangs, in the middle of a change and is not replaced."""
    publish(node)
    agent = node.start()
    node.until(lambda: answers(node) == (200, 1))
    node.stop(agent)
    with contextlib.closing(Map.pinned(node.bpf_root / "maps" / "wag_overdue")) as overdue:
        assert overdue.lookup(bytes(4)) == bytes(8)  # it had nothing to do
        overdue.update(bytes(4), (time.monotonic_ns() + 500_000_000).to_bytes(8, "little"))
        assert answers(node) == (200, 1)
        node.until(lambda: answers(node) == (503, 1))
    assert ask(node).body["serviceProxyHealthy"] is False and ask(node).weight == "1"
    with (node.manifests / "slow.json").open("w"):  # being written: it holds up the first full view
        node.start(wait="/status")
        for path in ("/healthz", "/livez"):
            status, body = health(node, path)
            assert status == 503 and body["healthy"] is body["status"]["IPv4"]["healthy"] is False
            assert body["lastUpdated"] < body["currentTime"]
        assert answers(node) == (503, 1)
    node.until(lambda: answers(node) == (200, 1))
    assert health(node, "/healthz")[0] == health(node, "/livez")[0] == 200


def test_metrics_of_changes(node: AgentNode) -> None:
    publish(node, nodePort=32_200)
    node.start()
    name = "waggle_network_programming_duration_seconds"
    assert metrics(node)[f"{name}_count"] == 0  # what was there before us is not ours to time
    synced = metrics(node)
    assert synced['waggle_sync_duration_seconds_count{kind="full"}'] == 1
    assert synced['waggle_no_local_endpoints{policy="external"}'] == 0
    assert synced["waggle_programmed_services"] == 1 and synced['waggle_changes_pending{kind="Service"}'] == 0

    publish(node, 0, nodePort=32_200)  # the Service is as it was; its slice has changed
    node.until(lambda: metrics(node)[f"{name}_count"] == 1)
    seen = metrics(node)
    assert 0 < seen[f"{name}_sum"] < 5
    slices = 'waggle_changes_total{kind="EndpointSlice"}'
    assert seen[slices] == synced[slices] + 1
    assert seen['waggle_no_local_endpoints{policy="external"}'] == 1
    assert seen['waggle_sync_duration_seconds_count{kind="partial"}'] >= 1
    assert seen["waggle_last_queued_timestamp_seconds"] <= seen["waggle_last_sync_timestamp_seconds"]

    time.sleep(1)  # causes are given in whole seconds: this one must not seem to be from before the agent
    piece = endpoints("late", PODS[0])
    cause = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time()))
    piece["metadata"]["annotations"] = {"endpoints.kubernetes.io/last-change-trigger-time": cause}
    time.sleep(2)
    node.apply("late", service("late", "10.96.0.12"), piece)
    node.until(
        lambda: metrics(node)[f"{name}_count"] == 3
    )  # the Service from when it was seen, the slice from its cause
    assert 1.9 < metrics(node)[f"{name}_sum"] - seen[f"{name}_sum"] < 10
    (node.manifests / "late.json").unlink()
    node.until(lambda: metrics(node)["waggle_programmed_services"] == 1)
    assert metrics(node)[f"{name}_count"] == 3


def test_aborted_sockets_are_counted(node: AgentNode) -> None:
    """Of two connected UDP sockets, the one whose backend has gone."""
    document, other = service("dns", "10.96.0.53"), service("log", "10.96.0.54")
    for one in (document, other):
        one["spec"]["ports"][0]["protocol"] = "UDP"

    def piece(name: str, address: str) -> dict[str, Any]:
        made = endpoints(name, address)
        made["ports"][0]["protocol"] = "UDP"
        return made

    node.apply("log", other, piece("log", PODS[0]))
    node.apply("dns", document, piece("dns", PODS[0]))
    node.start()
    script = (
        "import errno, socket, sys\n"
        "sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]\n"
        "for one, address in zip(sockets, ('10.96.0.53', '10.96.0.54')):\n"
        "    one.connect((address, 80))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print([errno.errorcode.get(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)) for one in sockets])\n"
    )
    command = node.inside([sys.executable, "-c", script])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None and client.stdout.readline() == "ready\n"
        node.apply("dns", document, piece("dns", PODS[1]))
        node.until(lambda: metrics(node)["waggle_udp_sockets_aborted_total"] == 1)
        assert client.communicate("\n", timeout=10)[0].strip() == "['ECONNABORTED', None]"
    assert metrics(node)["waggle_socket_sweep_duration_seconds_count"] >= 1


# -- in the lab ------------------------------------------------------------------------------------------------------


def test_in_the_lab(tmp_path: Path) -> None:
    """The port comes by itself; from outside, the node with the pod is healthy and the other one is not."""
    lab = Lab(unique_name("h"))
    try:
        lab.run("up", "--nodes", "2")
        lab.apply(
            tmp_path,
            lab_service("web", type="LoadBalancer", externalTrafficPolicy="Local"),
            echo_pod("web-1", nodeName="node1"),
        )
        port = lab.service("web")["healthCheckNodePort"]
        script = (
            "import http.client, json, sys\n"
            "for address in sys.argv[2:]:\n"
            "    connection = http.client.HTTPConnection(address, int(sys.argv[1]), timeout=5)\n"
            "    connection.request('GET', '/healthz')\n"
            "    response = connection.getresponse()\n"
            "    print(response.status, json.load(response)['localEndpoints'])\n"
        )

        def outside() -> list[str]:
            addresses = [address for number in (1, 2) for address in lab.layout.node(number).addresses]
            done = lab.run("exec", "client", "--", sys.executable, "-c", script, str(port), *addresses, check=False)
            return done.stdout.splitlines()

        expected = ["200 1", "200 1", "503 0", "503 0"]
        deadline = time.monotonic() + 10
        while outside() != expected:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for number in (1, 2):
            for pid in lab_processes.pids_below(lab.layout.node(number).agent_cgroup):
                os.kill(pid, signal.SIGKILL)
            while agents.is_running(lab.layout.node(number)):
                time.sleep(0.01)
        assert outside() == expected
        lab.run("up")
        assert outside() == expected
    finally:
        lab.close()
