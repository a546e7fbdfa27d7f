"""Host ports with real sockets: from outside, from pods and from the node, as Kubernetes' own tests ask for them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_machine import ECHO, Lab, echo_pod, pod, service, unique_name
from test_services import assert_all, assert_none, bare

from waggle.lab import published
from waggle.lab.traffic import Probe
from waggle.model.objects import ObjectKey

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

NODES = {1: ("10.77.0.11", "fd00:77::11"), 2: ("10.77.0.12", "fd00:77::12")}
LOOPBACK = ("127.0.0.1", "::1")
CLIENT = {"10.77.0.2", "fd00:77::2"}
SETTLE = 0.4


def holder(name: str, *ports: dict[str, Any], node: int = 1) -> dict[str, Any]:
    """A pod that answers on 8080, TCP and UDP, with these host ports."""
    made = pod(name, *ECHO, "--port", "8080", nodeName=f"node{node}")
    made["spec"]["containers"][0]["ports"] = [{"containerPort": 8080, "protocol": "TCP", **port} for port in ports]
    return made


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes with a pod each that asks."""
    made = Lab(unique_name("h"))
    try:
        made.run("up", "--nodes", "2")
        made.apply(
            tmp_path_factory.mktemp("hostports"),
            pod("asker-1", "sleep", "infinity", nodeName="node1"),
            pod("asker-2", "sleep", "infinity", nodeName="node2"),
        )
        yield made
    finally:
        made.close()


@pytest.fixture
def run(lab: Lab, tmp_path: Path) -> Iterator[Any]:
    """Makes pods (and Services), and removes them afterwards."""
    made: list[dict[str, Any]] = []

    def apply(*documents: dict[str, Any]) -> None:
        made.extend(documents)
        lab.apply(tmp_path, *documents)
        time.sleep(SETTLE)

    yield apply
    if made:
        lab.run("delete", "-f", str(lab.manifest(tmp_path, *made)))


def remove(lab: Lab, tmp_path: Path, *documents: dict[str, Any]) -> None:
    lab.run("delete", "-f", str(lab.manifest(tmp_path, *documents)))
    time.sleep(SETTLE)


def probes(addresses: tuple[str, ...], port: int, *protocols: str, count: int = 4) -> list[Probe]:
    return [Probe(a, port, p, count, 1.0) for a in addresses for p in protocols or ("tcp", "udp")]


def problems(lab: Lab, node: int) -> list[str]:
    from waggle.lab import agents

    return [f"{p['subject']}: {p['reason']}" for p in agents.get_json(lab.layout.node(node), "/status")["problems"]]


BOTH = ({"hostPort": 9080}, {"hostPort": 9080, "protocol": "UDP"})


@pytest.mark.parametrize("node", [1, 2], ids=["runtime", "pod-object"])
def test_from_everywhere(lab: Lab, run: Any, node: int) -> None:
    if node == 2:  # a runtime that sends no port mappings: the Pod object alone says what there is
        conf = lab.layout.node(2).cni_conf
        document = json.loads(conf.read_text())
        del document["plugins"][0]["capabilities"]
        conf.write_text(json.dumps(document))
    run(holder("web-1", *BOTH, node=node))
    at, other = NODES[node], 3 - node
    assert_all(lab.ask("client", *probes(at, 9080)), {"web-1"}, CLIENT)
    for origin in ("asker-1", "asker-2", f"node{other}", f"node{node}"):
        assert_all(lab.ask(origin, *probes(at, 9080)), {"web-1"})
    assert_all(lab.ask("web-1", *probes(at, 9080)), {"web-1"})  # itself
    for number in (1, 2):
        assert_all(bare(lab, f"asker-{number}", number, *probes(at, 9080)), {"web-1"})
    assert_all(lab.ask(f"node{node}", *probes(LOOPBACK, 9080)), {"web-1"})
    # not on the other node, and not at a pod's own loopback
    refused = {"Connection refused"}
    assert_none(lab.ask("client", *probes(NODES[other], 9080, "tcp", count=1)), refused)
    assert_none(lab.ask(f"node{other}", *probes(LOOPBACK, 9080, "tcp", count=1)), refused)
    assert_none(lab.ask("asker-1", *probes(LOOPBACK, 9080, "tcp", count=1)), refused)


def test_a_pod_and_its_host_port_end_together(lab: Lab, run: Any, tmp_path: Path) -> None:
    first, second = holder("web-1", *BOTH), holder("web-2", *BOTH)
    run(first)
    assert_all(lab.ask("client", *probes(NODES[1], 9080)), {"web-1"})
    remove(lab, tmp_path, first)
    for origin in ("client", "node1", "asker-1"):
        assert_none(lab.ask(origin, *probes(NODES[1], 9080, "tcp", count=1)), {"Connection refused"})
    run(second)
    assert_all(lab.ask("client", *probes(NODES[1], 9080)), {"web-2"})


def test_one_port_on_different_addresses_and_protocols(lab: Lab, run: Any) -> None:
    """Kubernetes' conformance test of HostPort: three pods, one number, no conflict."""
    v4, v6 = NODES[1]
    run(
        holder("web-1", {"hostPort": 9081, "hostIP": "127.0.0.1"}),
        holder("web-2", {"hostPort": 9081, "hostIP": v4}),
        holder("web-3", {"hostPort": 9081, "hostIP": v4, "protocol": "UDP"}),
        holder("web-4", {"hostPort": 9081, "hostIP": v6}),
        holder("web-5", {"hostPort": 9081, "hostIP": "::1", "protocol": "UDP"}),
    )
    for origin in ("client", "node1", "asker-1", "asker-2"):
        assert_all(lab.ask(origin, Probe(v4, 9081, "tcp", 4)), {"web-2"})
        assert_all(lab.ask(origin, Probe(v4, 9081, "udp", 4)), {"web-3"})
        assert_all(lab.ask(origin, Probe(v6, 9081, "tcp", 4)), {"web-4"})
    assert_all(lab.ask("node1", Probe("127.0.0.1", 9081, "tcp", 4)), {"web-1"})
    assert_all(lab.ask("node1", Probe("::1", 9081, "udp", 4)), {"web-5"})
    assert_none(lab.ask("node1", Probe("::1", 9081, "tcp", 1, 1.0)), {"Connection refused"})
    assert not problems(lab, 1)


def test_survives_the_agent(lab: Lab, run: Any) -> None:
    run(holder("web-1", *BOTH), holder("web-2", {"hostPort": 9082}, node=2))
    for node in (1, 2):
        lab.kill_agent(f"node{node}")
    for _ in range(2):
        assert_all(lab.ask("client", *probes(NODES[1], 9080)), {"web-1"})
        assert_all(lab.ask("client", *probes(NODES[2], 9082, "tcp")), {"web-2"})
        assert_all(lab.ask("node1", *probes(LOOPBACK, 9080)), {"web-1"})
        lab.run("up")


def test_a_runtime_without_kubernetes_is_enough(lab: Lab, run: Any) -> None:
    """No Pod object: what the runtime asked for is on the agent's disk."""
    run(holder("web-1", *BOTH))
    published.retract(lab.layout, "Pod", ObjectKey("default", "web-1"))
    time.sleep(1.0)
    assert_all(lab.ask("client", *probes(NODES[1], 9080)), {"web-1"})
    lab.kill_agent("node1")
    lab.run("up")
    assert_all(lab.ask("client", *probes(NODES[1], 9080)), {"web-1"})


def test_a_port_that_is_taken_is_named_and_waited_for(lab: Lab, run: Any, tmp_path: Path) -> None:
    first, second = holder("web-1", {"hostPort": 9083}), holder("web-2", {"hostPort": 9083})
    run(first)
    run(second)
    assert_all(lab.ask("client", *probes(NODES[1], 9083, "tcp")), {"web-1"})
    assert any("Pod default/web-2" in p and "already served by Pod default/web-1" in p for p in problems(lab, 1))
    remove(lab, tmp_path, first)
    assert_all(lab.ask("client", *probes(NODES[1], 9083, "tcp")), {"web-2"})
    assert not problems(lab, 1)


def test_a_node_port_that_a_pod_has_is_named(lab: Lab, run: Any) -> None:
    run(holder("web-1", {"hostPort": 30931}))
    ports = [{"name": "tcp", "port": 80, "targetPort": 8080, "nodePort": 30931}]
    run(echo_pod("other-1", nodeName="node1"), service("other", type="NodePort", ports=ports))
    assert_all(lab.ask("client", *probes(NODES[1], 30931, "tcp")), {"web-1"})
    assert any("Service default/other" in p and "already served by Pod default/web-1" in p for p in problems(lab, 1))


def test_an_address_that_is_not_the_nodes_is_named(lab: Lab, run: Any) -> None:
    run(holder("web-1", {"hostPort": 9084, "hostIP": "10.77.0.2"}))
    assert any("Pod default/web-1" in p and "hostIP 10.77.0.2 is no address" in p for p in problems(lab, 1))
