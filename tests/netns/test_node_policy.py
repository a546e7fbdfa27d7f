"""NodePolicies with a real agent, real TCP, and somebody who is logged in while a change is tried."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_node import NODE4, NODE6, PEER4, PEER6, WAGGLE, AgentNode

from waggle.abi._generated import NodePolicy
from waggle.kernel.maps import Map

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

#: A session: says back what it is told, line by line.
ECHO = """
import socket, sys, threading
s = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
def talk(c):
    with c, c.makefile("rwb") as f:
        for line in f:
            f.write(line)
            f.flush()
while True:
    c, _ = s.accept()
    threading.Thread(target=talk, args=(c,), daemon=True).start()
"""
#: The other end of one, by lines of its standard input.
SESSION = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
f = s.makefile("rwb")
print(s.getsockname()[1], flush=True)
for line in sys.stdin:
    try:
        f.write(line.encode())
        f.flush()
        print(f.readline().decode().strip() or "closed", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    with AgentNode(tmp_path_factory.mktemp("node")) as made:
        made.serve(made.netns, "web", 80)
        made.serve(made.netns, "shell", 22)
        made.serve(made.peer, "outside", 8080)
        run(made, made.netns, ECHO, "2222")
        made.agent = made.start(log_level="debug")
        yield made


@pytest.fixture(autouse=True)
def clean(node: AgentNode) -> Iterator[None]:
    """Every test begins and ends with no NodePolicy, and with an agent."""
    yield
    assert node.agent is not None
    if node.agent.poll() is not None or node.agent not in node.running:
        node.agent = node.start()
    node.apply("policy")
    node.until(lambda: status(node) == {"confirmed": [], "trial": None, "notConfirmed": []})
    node.until(lambda: in_force(node) == (0, 0, False))


def run(node: AgentNode, netns: Path, script: str, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["nsenter", f"--net={netns}", sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    node.running.append(process)
    assert process.stdout is not None and process.stdout.readline()
    return process


class Session:
    """A TCP connection from the neighbour that stays."""

    def __init__(self, node: AgentNode, port: int, address: str = NODE4) -> None:
        self.process = subprocess.Popen(
            ["nsenter", f"--net={node.peer}", sys.executable, "-c", SESSION, address, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.source_port = int(self.process.stdout.readline())

    def says(self, text: str = "hello") -> bool:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip() == text

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def session(node: AgentNode, port: int, address: str = NODE4) -> Iterator[Session]:
    made = Session(node, port, address)
    try:
        yield made
    finally:
        made.close()


def policy(name: str = "p", *, audit: bool = False, **spec: Any) -> dict[str, Any]:
    annotations = {"annotations": {"waggle.io/audit": "true"}} if audit else {}
    return {
        "apiVersion": "waggle.io/v1alpha1",
        "kind": "NodePolicy",
        "metadata": {"name": name, **annotations},
        "spec": spec,
    }


def status(node: AgentNode) -> dict[str, Any]:
    return {name: value for name, value in node.get("/node-policies").items() if name != "policies"}


def in_force(node: AgentNode) -> tuple[int, int, bool]:
    """Sets that are confirmed, and whether there is a trial, as the map has them."""
    raw = Map.pinned(node.bpf_root / "maps" / "wag_node_policy").lookup(bytes(4))
    assert raw is not None
    value = NodePolicy.unpack(raw)
    return value.ingress, value.egress, bool(value.trial_until_ns)


def on_trial(node: AgentNode) -> bool:
    return status(node)["trial"] is not None and in_force(node)[2]


def waggle(node: AgentNode, *arguments: str, ssh: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command; `ssh`: what SSH_CONNECTION is in the shell that it runs in."""
    variables = {key: value for key, value in os.environ.items() if key != "SSH_CONNECTION"}
    command = [*WAGGLE, "node-policy", *arguments, "--socket", str(node.socket)]
    if ssh is not None:  # sudo forgets the variable, the shell before it does not
        variables["SSH_CONNECTION"] = ssh
        command = ["sh", "-c", 'env -u SSH_CONNECTION "$@"; exit $?', "sh", *command]
    return subprocess.run(node.inside(command), env=variables, capture_output=True, text=True, timeout=60, check=False)


def reaches(node: AgentNode, address: str, port: int) -> bool:
    return node.connect(address, port, netns=node.peer, cgroup=False, timeout=0.5) in ("web", "shell", "")


DENY = {"policyTypes": ["Ingress"]}


def test_a_denied_session_goes_on_and_the_policy_reverts(node: AgentNode) -> None:
    assert reaches(node, NODE4, 80)
    with session(node, 2222) as old:
        assert old.says()
        node.apply("policy", policy(**DENY, confirmSeconds=3))
        node.until(lambda: on_trial(node))
        assert not reaches(node, NODE4, 80)
        assert not reaches(node, NODE6, 80)
        assert old.says()
        assert node.connect(PEER4, 8080) == "outside"  # answers come in
        node.until(lambda: status(node)["notConfirmed"] == ["p"], 5)
        assert reaches(node, NODE4, 80) and reaches(node, NODE6, 80)
        assert old.says()
