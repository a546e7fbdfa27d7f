"""Ports that lead to Services or pods: nobody binds them, the kernel hands out none, and who was there is named."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import NODE4, NODE6, PEER4, AgentNode, endpoints, service

from waggle.kernel.netns import call_in_netns

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

PORT = 30080
BIND = """
import errno, json, socket, sys
found = []
for kind, host, port, only_v6 in json.loads(sys.argv[1]):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6)
        try:
            sock.bind((host, port))
            found.append("ok")
        except OSError as error:
            found.append(errno.errorcode[error.errno])
print(json.dumps(found))
"""
HOLD = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if sys.argv[1] == "tcp" else socket.SOCK_DGRAM)
sock.bind((sys.argv[2], int(sys.argv[3])))
if sys.argv[1] == "tcp":
    sock.listen()
print("ready", flush=True)
sys.stdin.read()
"""
EPHEMERAL = """
import json, socket, sys
kept, found = [], set()
for number in range(int(sys.argv[1])):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if number % 2:
        sock.bind(("0.0.0.0", 0))
    else:
        sock.connect((sys.argv[2], 9))
    kept.append(sock)
    found.add(sock.getsockname()[1])
print(json.dumps(sorted(found)))
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    made = AgentNode(tmp_path_factory.mktemp("bind"))
    try:
        made.open()
        made.apply("web", node_port("web", "10.96.0.10", PORT), endpoints("web", PEER4))
        made.start()
        yield made
    finally:
        made.close()


def node_port(name: str, address: str, port: int, protocol: str = "TCP") -> dict:
    made = service(name, address, type="NodePort", nodePort=port)
    made["spec"]["ports"][0]["protocol"] = protocol
    return made


def bind(node: AgentNode, *wanted: tuple, cgroup: bool = True, netns: Path | None = None) -> list[str]:
    """What comes of binding (kind, host, port[, only IPv6])."""
    filled = [(*want, 0) if len(want) == 3 else want for want in wanted]
    command = node.inside([sys.executable, "-c", BIND, json.dumps(filled)], cgroup=cgroup, netns=netns)
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@contextlib.contextmanager
def held(node: AgentNode, kind: str, host: str, port: int) -> Iterator[int]:
    """A process of the node that has a port; its id. It is outside of the cgroup: no hook sees it."""
    command = node.inside([sys.executable, "-c", HOLD, kind, host, str(port)], cgroup=False)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        yield process.pid
    finally:
        process.communicate()


def problems(node: AgentNode) -> list[str]:
    return [f"{problem['subject']}: {problem['reason']}" for problem in node.get("/status")["problems"]]


def test_nobody_binds_a_node_port(node: AgentNode) -> None:
    taken = [("tcp", host, PORT) for host in ("0.0.0.0", "::", NODE4, "127.0.0.1", "127.0.0.9", f"::ffff:{NODE4}")]
    assert bind(node, *taken) == ["EADDRINUSE"] * len(taken)
    free = [
        ("udp", "0.0.0.0", PORT),
        ("tcp", "0.0.0.0", PORT + 1),
        ("tcp", NODE6, PORT),  # the Service has one family
        ("tcp", "::1", PORT),
        ("tcp", "0.0.0.0", 0),
        ("tcp", "10.255.255.1", 80),
    ]
    assert bind(node, *free) == [*["ok"] * 5, "EADDRNOTAVAIL"]


def test_pods_bind_what_they_like(node: AgentNode) -> None:
    pod, _ = node.add_pod("binds")
    assert bind(node, ("tcp", "0.0.0.0", PORT), ("tcp", "::", PORT), netns=Path("/run/netns") / pod) == ["ok", "ok"]


def test_nobody_binds_a_host_port(node: AgentNode) -> None:
    mappings = [{"hostPort": 9090, "containerPort": 80}, {"hostPort": 9091, "containerPort": 80, "hostIP": "127.0.0.1"}]
    of_kubernetes = "K8S_POD_NAMESPACE=t;K8S_POD_NAME=ports"
    pod, _ = node.add_pod("ports", runtimeConfig={"portMappings": mappings}, arguments=of_kubernetes)
    taken = [("tcp", host, 9090) for host in ("0.0.0.0", "::", NODE4, NODE6, "127.0.0.1")]
    taken.append(("tcp", "127.0.0.1", 9091))
    free = [("tcp", NODE4, 9091), ("tcp", "0.0.0.0", 9091), ("tcp", "::1", 9091), ("udp", "0.0.0.0", 9090)]
    node.until(lambda: bind(node, *taken) == ["EADDRINUSE"] * len(taken))
    assert bind(node, *free) == ["ok"] * len(free)
    assert node.cni("DEL", pod).returncode == 0
    node.until(lambda: bind(node, *taken) == ["ok"] * len(taken))


def test_a_runtime_holds_the_host_ports_it_publishes(node: AgentNode) -> None:
    """Podman listens on them itself, from when ADD has succeeded: that is neither refused nor a fault."""
    mappings = [{"hostPort": 9092, "containerPort": 80}, {"hostPort": 9093, "containerPort": 80, "hostIP": "127.0.0.1"}]
    node.add_pod("held", runtimeConfig={"portMappings": mappings}, arguments="K8S_POD_NAME=held")
    node.until(lambda: {e["port"] for e in node.dump("services")} >= {9092, 9093})
    held = [("tcp", "0.0.0.0", 9092), ("tcp", "::", 9092), ("tcp", NODE4, 9092), ("tcp", "127.0.0.1", 9093)]
    assert bind(node, *held) == ["ok"] * len(held)
    node.serve(node.netns, "the runtime", 9092)
    time.sleep(0.3)  # longer than a look at who is on such a port takes to come
    assert not any("9092" in problem["reason"] for problem in node.get("/status")["problems"])


def test_a_port_is_free_again_with_its_service_and_taken_while_no_agent_runs(node: AgentNode) -> None:
    wanted = ("udp", "0.0.0.0", 30090)
    assert bind(node, wanted) == ["ok"]
    node.apply("dns", node_port("dns", "10.96.0.11", 30090, "UDP"))
    node.until(lambda: bind(node, wanted) == ["EADDRINUSE"])
    agent = node.running[0]
    node.stop(agent)
    assert bind(node, wanted, ("tcp", "0.0.0.0", PORT)) == ["EADDRINUSE", "EADDRINUSE"]
    node.running.insert(0, node.start())
    node.running.pop()
    (node.manifests / "dns.json").unlink()
    node.until(lambda: bind(node, wanted) == ["ok"])


def test_the_kernel_hands_out_no_node_port(node: AgentNode) -> None:
    """Of 200 ephemeral ports, 190 lead to a Service: what is left is all that sockets get."""
    first, count = 33000, 190
    sysctls = Path("/proc/sys/net/ipv4")
    call_in_netns(node.netns, lambda: (sysctls / "ip_local_port_range").write_text(f"{first} {first + 199}"))
    call_in_netns(node.netns, lambda: (sysctls / "ip_local_reserved_ports").write_text(f"{first + 199}"))
    many = [node_port(f"n{n}", f"10.96.1.{n + 1}", first + n, "UDP" if n % 2 else "TCP") for n in range(count)]

    def reserved() -> str:
        return call_in_netns(node.netns, lambda: (sysctls / "ip_local_reserved_ports").read_text().strip())

    node.apply("many", *many)
    try:
        node.until(lambda: reserved() == f"{first}-{first + count - 1},{first + 199}")
        command = node.inside([sys.executable, "-c", EPHEMERAL, "9", PEER4])
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert len(found) >= 8 and set(found) <= set(range(first + count, first + 199))
    finally:
        (node.manifests / "many.json").unlink()
    node.until(lambda: reserved() == f"{first + 199}")


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize("host", ["0.0.0.0", NODE4])
def test_who_was_there_before_is_named(node: AgentNode, kind: str, host: str) -> None:
    try:
        with held(node, kind, host, 30095) as pid:
            node.apply("late", node_port("late", "10.96.0.12", 30095, kind.upper()))
            node.until(lambda: len(problems(node)) == 1)
            (problem,) = problems(node)
            assert problem.startswith("Service t/late: python") and f"(pid {pid})" in problem
            assert f"was on {kind.upper()} {host}:30095 before" in problem
        node.until(lambda: not problems(node), 15)
    finally:
        (node.manifests / "late.json").unlink()
    node.until(lambda: bind(node, (kind, host, 30095)) == ["ok"])


def test_addresses_that_serve_no_node_ports(tmp_path: Path) -> None:
    """With nodeport-addresses, only those are kept free; a wildcard meets them too. cleanup takes the rest away."""
    node = AgentNode(tmp_path)
    try:
        node.open()
        node.apply("web", node_port("web", "10.96.0.10", 33080), endpoints("web", PEER4))
        with held(node, "tcp", "127.0.0.1", 33080):
            agent = node.start(nodeport_addresses="192.0.2.0/24")
            assert bind(node, ("tcp", NODE4, 33080), ("tcp", "0.0.0.0", 33080)) == ["EADDRINUSE"] * 2
            assert problems(node) == []
        assert bind(node, ("tcp", "127.0.0.1", 33080), ("tcp", NODE6, 33080)) == ["ok", "ok"]
        assert problems(node) == []
        reserved = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
        node.until(lambda: call_in_netns(node.netns, reserved.read_text).strip() == "33080")
        node.stop(agent)
        done = node.waggle(
            "cleanup",
            *("--bpf-root", str(node.bpf_root), "--state-dir", str(node.state), "--api-socket", str(node.socket)),
        )
        assert done.returncode == 0, done.stderr
        assert call_in_netns(node.netns, reserved.read_text).strip() == ""
        assert bind(node, ("tcp", "0.0.0.0", 33080)) == ["ok"]
    finally:
        node.close()
