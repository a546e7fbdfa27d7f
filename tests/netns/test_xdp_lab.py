"""XDP on the uplinks of a lab: the same answers as by tc, from packets that tc has not seen."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_machine import Lab, echo_pod, pod, service, unique_name

from waggle.kernel.syscall import Fd
from waggle.lab.namespaces import netns_files
from waggle.lab.traffic import Probe
from waggle.testing.xdp import XDP_PASS, give_verdict

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

NODE = ("10.77.0.11", "fd00:77::11")
CLIENT = {"10.77.0.2", "fd00:77::2"}
BOTH = {"web-near", "web-far"}

# As on a wire: a sender computes its checksums. Virtual Ethernet leaves them for later, and XDP cannot know.
_TX_OFF = "for i in $(ip -o link | cut -d: -f2 | cut -d@ -f1); do ethtool -K $i tx off 2>/dev/null; done; :"


@pytest.fixture(scope="module", params=["native", "generic"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(unique_name("x"))
    kept: list[Fd] = []
    try:
        made.run("up", "--nodes", "2", "--set", f"xdp={request.param}")
        made.apply(
            tmp_path_factory.mktemp("xdp"),
            echo_pod("web-near", nodeName="node1"),
            echo_pod("web-far", nodeName="node2"),
            pod("asker", "sleep", "infinity", nodeName="node1"),
        )
        for file in netns_files(made.layout):
            subprocess.run(["nsenter", f"--net={file}", "sh", "-c", _TX_OFF], check=True, capture_output=True)
        (switch,) = [file for file in netns_files(made.layout) if file.name.endswith("-net")]
        kept += give_verdict(XDP_PASS, switch, lambda name: name.startswith("node"))
        yield made
    finally:
        for one in kept:
            one.close()
        made.close()


def applied(lab: Lab, tmp_path: Path, **annotations: str) -> dict[str, Any]:
    document = service("web", type="NodePort")
    document["metadata"]["annotations"] = annotations
    lab.apply(tmp_path, document)
    time.sleep(0.3)
    return lab.service("web")


def probes(found: dict[str, Any]) -> list[Probe]:
    return [
        Probe(address, entry["nodePort"], entry["protocol"].lower(), 40, 2.0)
        for address in NODE
        for entry in found["ports"]
    ]


def test_programs_are_where_they_belong(lab: Lab) -> None:
    shown = lab.run("exec", "node1", "--", "ip", "-d", "link", "show", "eth0").stdout
    assert "wag_xdp_uplink" in shown
    status = lab.status()
    assert not [problem for node in status["nodes"] for problem in node["agent"].get("problems", [])]


def test_snat(lab: Lab, tmp_path: Path) -> None:
    found = applied(lab, tmp_path)
    outcomes = lab.ask("client", *probes(found))
    for outcome in outcomes:
        assert not outcome.failed
        assert set(outcome.answers) == BOTH
        # the one on the node that was asked sees the client, the other that node
        assert set(outcome.clients) <= CLIENT | set(NODE)
        assert set(outcome.clients) & set(NODE)


def test_direct_server_return(lab: Lab, tmp_path: Path) -> None:
    found = applied(lab, tmp_path, **{"waggle.dev/forwarding": "dsr", "waggle.dev/balancing": "maglev"})
    for outcome in lab.ask("client", *probes(found)):
        assert not outcome.failed
        assert set(outcome.answers) == BOTH
        # a client port of UDP that the test before had keeps its flow, and the node's address with it
        assert sum(count for client, count in outcome.clients.items() if client not in CLIENT) <= 3


def test_everything_else_still_works(lab: Lab, tmp_path: Path) -> None:
    found = applied(lab, tmp_path)
    for origin in ("asker", "node1", "node2"):
        for outcome in lab.ask(
            origin, *(Probe(a, 80, p, 20, 2.0) for a in found["clusterIPs"] for p in ("tcp", "udp"))
        ):
            assert not outcome.failed
            assert set(outcome.answers) == BOTH
    for address in NODE:
        assert " 0% packet loss" in lab.run("exec", "client", "--", "ping", "-c", "2", "-i", "0.2", address).stdout


def test_it_goes_when_it_is_not_wanted_any_more(lab: Lab, tmp_path: Path) -> None:
    lab.run("up", "--set", "xdp=none")
    shown = lab.run("exec", "node1", "--", "ip", "-d", "link", "show", "eth0").stdout
    assert "wag_xdp_uplink" not in shown
    found = applied(lab, tmp_path)
    for outcome in lab.ask("client", *probes(found)):
        assert not outcome.failed
        assert set(outcome.answers) == BOTH
