"""The programs on a pod's interface: at work when ADD answers, soon after in place for good, agent or not."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import AgentNode, endpoints, service

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="loads BPF programs and makes network namespaces: needs root"),
]

VIP = "10.96.0.10"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[AgentNode]:
    with AgentNode(tmp_path) as made:
        agent = made.start()
        server, address = made.add_pod("server")
        made.serve(Path("/run/netns") / server, "server")
        made.apply("web", service("web", VIP), endpoints("web", address))
        made.until(lambda: made.connect(VIP, 80) == "server" and len(pins(made)) == 2)
        made.stop(agent)
        yield made


def packets_are_served(node: AgentNode, pod: str) -> bool:
    """From a socket that no hook sees."""
    return node.connect(VIP, 80, cgroup=False, netns=Path("/run/netns") / pod) == "server"


def filters(node: AgentNode) -> str:
    """What runs by clsact queues of the node's pods, as tc shows it."""
    script = 'for i in /sys/class/net/wag*; do for s in ingress egress; do tc filter show dev "${i##*/}" $s; done; done'
    command = node.inside(["ip", "netns", "exec", node.netns.name, "sh", "-c", script], cgroup=False)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def pins(node: AgentNode) -> list[Path]:
    return sorted((node.bpf_root / "links").glob("pod-*"))


def test_a_pod_is_served_at_once_and_settles(node: AgentNode) -> None:
    agent = node.start()
    pod, _ = node.add_pod("a")
    assert packets_are_served(node, pod)
    assert filters(node) or len(pins(node)) > 2
    node.until(lambda: len(pins(node)) == 4 and not filters(node))
    assert packets_are_served(node, pod)
    node.stop(agent)
    assert packets_are_served(node, pod)


def test_an_agent_that_is_killed_before_a_pod_settles(node: AgentNode) -> None:
    agent = node.start()
    pod, _ = node.add_pod("a")
    node.stop(agent)
    assert packets_are_served(node, pod)
    node.start()
    assert packets_are_served(node, pod)
    node.until(lambda: len(pins(node)) == 4 and not filters(node))
    assert packets_are_served(node, pod)


def test_pods_that_leave_before_they_settle_leave_nothing(node: AgentNode) -> None:
    node.start()
    for number in range(5):
        names = [node.add_pod(f"p{number}-{part}")[0] for part in range(4)]
        for name in names:
            assert node.cni("DEL", name).returncode == 0
    assert len(pins(node)) == 2 and not filters(node)
    assert " WARNING " not in node.log.read_text()
