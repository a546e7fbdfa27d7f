"""waggle last in a chain: another plugin makes interfaces and addresses, waggle brings Services and host ports.

On top of Debian's `bridge` and `ptp`, executed as a runtime executes a list of plugins.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agent_node import NODE4, NODE6, PLUGIN, AgentNode, endpoints, service

from waggle.abi._generated import Endpoint, EndpointFlag
from waggle.abi.address import unpack_address
from waggle.kernel.maps import Map
from waggle.kernel.netns import call_in_netns

PLUGINS = Path("/usr/lib/cni")
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root"),
    pytest.mark.skipif(not (PLUGINS / "bridge").exists(), reason="not installed: containernetworking-plugins"),
]
NETNS = Path("/run/netns")
RANGES = "10.245.0.0/24,fd00:10:245::/64"
VIP4, VIP6 = "10.96.8.1", "fd00:10:96::81"


@dataclass
class Chain:
    """One list of plugins on a node; `main` makes the interfaces."""

    node: AgentNode
    main: dict[str, Any]

    def call(self, command: str, pod: str, *, ports: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The whole list; the result of the last plugin. For DEL the last comes first."""
        own = {"type": "waggle-cni", "apiSocket": str(self.node.socket), "capabilities": {"portMappings": True}}
        result: dict[str, Any] = {}
        plugins = [(PLUGINS / self.main["type"], self.main), (PLUGIN, own)]
        for program, plugin in plugins if command != "DEL" else reversed(plugins):
            config = {"cniVersion": "1.0.0", "name": "chain", **plugin}
            if result or command == "CHECK":
                config["prevResult"] = result or self.last[pod]
            if plugin is own:
                config["runtimeConfig"] = {"portMappings": ports or []}
            result = self._execute(program, command, pod, config) or result
        if command == "ADD":
            self.last = {**getattr(self, "last", {}), pod: result}
        return result

    def _execute(self, program: Path, command: str, pod: str, config: dict[str, Any]) -> dict[str, Any]:
        variables = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": str(NETNS / pod),
            "CNI_PATH": str(PLUGINS),
            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin",
        }
        done = subprocess.run(
            self.node.inside([str(program)]), env=variables, input=json.dumps(config), capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (program, command, done.stdout, done.stderr)
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def add(self, suffix: str, **more: Any) -> tuple[Path, dict[str, Any], str, str]:
        """A pod: its namespace, the result, its addresses."""
        name = f"{self.node.name}-{suffix}"
        subprocess.run(["ip", "netns", "add", name], check=True)
        self.node.pods.append(name)
        result = self.call("ADD", name, **more)
        v4, v6 = (entry["address"].partition("/")[0] for entry in result["ips"])
        return NETNS / name, result, v4, v6

    def delete(self, netns: Path) -> None:
        self.call("DEL", netns.name)
        self.node.pods.remove(netns.name)
        subprocess.run(["ip", "netns", "del", netns.name], check=True)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    with AgentNode(tmp_path_factory.mktemp("chain")) as found:
        found.agent = found.start(pod_cidr=RANGES)
        yield found


@pytest.fixture(params=["bridge", "ptp"])
def chain(request: pytest.FixtureRequest, node: AgentNode, tmp_path: Path) -> Chain:
    ranges = [[{"subnet": subnet}] for subnet in RANGES.split(",")]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    ipam = {"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": str(tmp_path)}
    more = {"bridge": "chain0", "isGateway": True} if request.param == "bridge" else {}
    return Chain(node, {"type": request.param, "ipam": ipam, **more})


def test_services_and_host_ports(node: AgentNode, chain: Chain) -> None:
    before = left(node)
    server, result, v4, v6 = chain.add("server", ports=[{"hostPort": 8088, "containerPort": 8080}])
    names = [entry["name"] for entry in result["interfaces"]]
    assert names.count("eth0") == 1 and not any(name.startswith("wag") for name in names), "what the other plugin said"
    links = json.loads(inside(server, "ip", "-j", "link"))
    assert sorted(link["ifname"] for link in links) == ["eth0", "lo"], "no second interface"
    client, _, client4, _ = chain.add("client")
    node.serve(server, "web")
    for address in (v4, v6):
        assert node.connect(address, 8080, netns=client, cgroup=False) == "web", "pod to pod"
        assert node.connect(address, 8080) == "web", "node to pod"

    slices = [endpoints("web", v4), endpoints("web6", v6)]
    node.apply("web", service("web", VIP4), service("web6", VIP6), *slices)
    node.until(lambda: node.connect(VIP6, 80) == "web")
    for vip in (VIP4, VIP6):
        assert node.connect(vip, 80, netns=client) == "web", "by the socket"
        assert node.connect(vip, 80, netns=client, cgroup=False) == "web", "by the packet"
        assert node.connect(vip, 80, netns=server, cgroup=False) == "web", "to itself"
    for address in (NODE4, NODE6):
        assert node.connect(address, 8088, netns=node.peer, cgroup=False) == "web", "host port, from outside"
        assert node.connect(address, 8088) == "web", "host port, from the node"
    assert client4 in pods_in_the_table(node)

    for pod in (server, client):
        chain.call("CHECK", pod.name)
        chain.delete(pod)
    node.apply("web")
    node.until(lambda: left(node) == before)


def test_agent_restarts(node: AgentNode, chain: Chain) -> None:
    before = left(node)
    server, _, v4, _ = chain.add("server")
    client, _, _, _ = chain.add("client")
    node.serve(server, "web")
    node.apply("web", service("web", VIP4), endpoints("web", v4))
    node.until(lambda: node.connect(VIP4, 80) == "web")
    node.stop(node.agent)
    assert node.connect(VIP4, 80, netns=client, cgroup=False) == "web", "without an agent"
    node.agent = node.start(pod_cidr=RANGES)
    assert node.connect(VIP4, 80, netns=client, cgroup=False) == "web", "with another one"
    assert node.get("/status")["problems"] == []
    for pod in (server, client):
        chain.call("CHECK", pod.name)
        chain.delete(pod)
    node.apply("web")
    node.until(lambda: left(node) == before)


def test_garbage_collection_leaves_interfaces_to_who_made_them(node: AgentNode, chain: Chain) -> None:
    before = left(node)
    kept, _, _, _ = chain.add("kept")
    gone, _, v4, _ = chain.add("gone")
    valid = [{"containerID": kept.name, "ifname": "eth0"}]
    done = node.cni("GC", "", name="chain", **{"cni.dev/valid-attachments": valid})
    assert done.returncode == 0, done.stdout
    assert v4 not in pods_in_the_table(node)
    assert "eth0" in inside(gone, "ip", "link")
    for pod in (kept, gone):
        chain.delete(pod)
    node.until(lambda: left(node) == before)


def test_what_is_no_veth_pair_is_refused(node: AgentNode) -> None:
    name = f"{node.name}-macvlan"
    subprocess.run(["ip", "netns", "add", name], check=True)
    node.pods.append(name)
    commands = [["link", "add", "eth0", "link", "up0", "type", "macvlan"], ["link", "set", "eth0", "netns", name]]
    for command in commands:
        subprocess.run(["ip", "-n", node.name, *command], check=True)
    made = {"interfaces": [{"name": "eth0", "sandbox": str(NETNS / name)}], "ips": [{"address": "10.245.0.9/24"}]}
    done = node.cni("ADD", name, prevResult=made)
    assert done.returncode == 1 and "no veth pair" in json.loads(done.stdout)["msg"], done.stdout
    assert not list((node.state / "cni").glob("wag*"))


def inside(netns: Path, *command: str) -> str:
    return call_in_netns(netns, lambda: subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def pods_in_the_table(node: AgentNode) -> list[str]:
    entries = [(unpack_address(key), Endpoint.unpack(value)) for key, value in table(node, "wag_endpoints")]
    return sorted(address for address, value in entries if value.flags & EndpointFlag.POD)


def table(node: AgentNode, name: str) -> list[tuple[bytes, bytes]]:
    with contextlib.closing(Map.pinned(node.bpf_root / "maps" / name)) as found:
        return found.dump()


def left(node: AgentNode) -> dict[str, Any]:
    """What pods leave with waggle; the bridge itself stays, as its plugin wants it."""
    return {
        "records": sorted(file.name for file in (node.state / "cni").glob("wag*")),
        "pins": sorted(pin.name for pin in (node.bpf_root / "links").glob("pod-*")),
        "endpoints": pods_in_the_table(node),
        "netns": len(table(node, "wag_netns")),
        "services": len(table(node, "wag_services")),
    }
