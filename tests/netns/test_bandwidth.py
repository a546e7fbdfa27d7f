"""Limits of pods (the capability bandwidth): what TCP gets in both directions, and that others are not held up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import AgentNode, endpoints, service

from waggle.abi._generated import Endpoint, EndpointFlag
from waggle.abi.address import pack_address
from waggle.kernel.maps import Map

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

NETNS = Path("/run/netns")
VIP = "10.96.9.1"
RATE = 20_000_000  # bits per second: little work, so that a busy machine does not hold it up
BURST = 2_000_000  # bits: a tenth of a second, by which a wakeup may be late
SECONDS = 2.0
_RECEIVE = """
import socket, sys, time
server = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
connection, _ = server.accept()
def take(seconds):
    began, total = time.monotonic(), 0
    while (passed := time.monotonic() - began) < seconds:
        total += len(connection.recv(1 << 20))
    return total / passed
take(1.0)
print(int(take(float(sys.argv[1])) * 8), flush=True)
"""
_SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as connection:
    try:
        while True:
            connection.sendall(bytes(1 << 16))
    except (ConnectionError, TimeoutError):
        pass
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    with AgentNode(tmp_path_factory.mktemp("bandwidth")) as found:
        found.agent = found.start()
        yield found


def add(node: AgentNode, suffix: str, **bandwidth: int) -> tuple[Path, str, str]:
    name, v4 = node.add_pod(suffix, runtimeConfig={"bandwidth": bandwidth})
    text = subprocess.run(
        ["ip", "-n", name, "-j", "-6", "address", "show", "dev", "eth0", "scope", "global"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return NETNS / name, v4, json.loads(text)[0]["addr_info"][0]["local"]


class Flow:
    """One sender, one receiver."""

    def __init__(self, node: AgentNode, sender: Path, receiver: Path, address: str, port: int = 9000) -> None:
        self._node = node
        self.receiver = subprocess.Popen(
            node.inside([sys.executable, "-c", _RECEIVE, str(SECONDS)], netns=receiver), stdout=subprocess.PIPE
        )
        node.running.append(self.receiver)
        assert self.receiver.stdout is not None and self.receiver.stdout.readline() == b"ready\n"
        # outside of the cgroup: a Service is found packet by packet
        command = node.inside([sys.executable, "-c", _SEND, address, str(port)], netns=sender, cgroup=False)
        self.sender = subprocess.Popen(command)
        node.running.append(self.sender)

    def rate(self) -> int:
        """Bits per second that arrived. The flow has ended then."""
        assert self.receiver.stdout is not None
        measured = int(self.receiver.stdout.readline())
        for process in (self.sender, self.receiver):
            self._node.stop(process)
        self.receiver.stdout.close()
        return measured


def test_limits_hold_and_others_are_not_held_up(node: AgentNode) -> None:
    limited, in4, in6 = add(node, "in", ingressRate=RATE, ingressBurst=BURST)
    slow, _, _ = add(node, "out", egressRate=RATE, egressBurst=BURST)
    behind, back4, _ = add(node, "behind", ingressRate=RATE, ingressBurst=BURST)
    free, free4, free6 = add(node, "free")
    other, _, _ = add(node, "other")
    node.apply("s", service("s", VIP, port=9000), endpoints("s", back4, port=9000))
    node.until(lambda: any(entry["addr"] == VIP for entry in node.dump("services")))
    flows = {
        "to the pod, IPv6": Flow(node, other, limited, in6),
        "to the pod, through a Service": Flow(node, other, behind, VIP),
        "from the pod": Flow(node, slow, free, free4),
    }
    for what, flow in flows.items():
        assert 0.90 * RATE < flow.rate() < 1.05 * RATE, what
    both = Flow(node, other, limited, in4), Flow(node, other, free, free6)
    limited_rate, free_rate = (flow.rate() for flow in both)
    assert 0.90 * RATE < limited_rate < 1.05 * RATE
    assert free_rate > 4 * RATE, "from the same pod to another one, as fast as it goes"


def test_limits_outlive_the_agent(node: AgentNode) -> None:
    limited, v4, _ = add(node, "kept", ingressRate=RATE, ingressBurst=BURST)
    sender, _, _ = add(node, "sender")
    assert node.agent is not None
    node.stop(node.agent)
    node.agent = node.start()
    with_limit = Endpoint.unpack(endpoint(node, v4))
    assert with_limit.flags & EndpointFlag.QUEUED
    assert 0.90 * RATE < Flow(node, sender, limited, v4).rate() < 1.05 * RATE


def endpoint(node: AgentNode, address: str) -> bytes:
    table = Map.pinned(node.bpf_root / "maps" / "wag_endpoints")
    try:
        found = table.lookup(pack_address(address))
    finally:
        table.close()
    assert found is not None
    return found
