"""Nodes on two networks with a router in between that knows no pods: tunnels where it stands, routes where it does not.

node1 and node3 are on one network, node2 on the other. Reverse paths are filtered strictly, as in every lab.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_machine import ECHO, Lab, echo_pod, service, unique_name

from waggle.lab import published
from waggle.lab.traffic import Outcome, Probe
from waggle.model.objects import ObjectKey

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

NODES = {"node1": ("10.77.0.11", "fd00:77::11"), "node2": ("10.77.1.12", "fd00:77:0:1::12")}
NODES["node3"] = ("10.77.0.13", "fd00:77::13")
PODS = {"far-1": "node1", "far-2": "node2", "far-3": "node3"}
WAGGLE = (sys.executable, "-m", "waggle.cli.main")

# Takes everything and answers with how much it was; sends as much as it is asked for.
SERVER = """
import socket, socketserver, threading
class Tcp(socketserver.BaseRequestHandler):
    def handle(self):
        wanted, total = int(self.request.recv(16)), 0
        if wanted < 0:
            self.request.sendall(bytes(-wanted))
            return
        while total < wanted:
            total += len(self.request.recv(1 << 20))
        self.request.sendall(str(total).encode())
class Udp(socketserver.BaseRequestHandler):
    def handle(self):
        data, sock = self.request
        sock.sendto(data, self.client_address)
class T(socketserver.ThreadingTCPServer):
    address_family, allow_reuse_address, daemon_threads = socket.AF_INET6, True, True
class U(socketserver.ThreadingUDPServer):
    address_family, max_packet_size, daemon_threads = socket.AF_INET6, 65535, True
threading.Thread(target=U(("::", 9000), Udp).serve_forever, daemon=True).start()
T(("::", 9000), Tcp).serve_forever()
"""
# Sends and receives so many bytes, and datagrams larger than any packet: {"up": seconds, "down": seconds, "udp": n}
CLIENT = """
import json, socket, sys, time
host, size = sys.argv[1], int(sys.argv[2])
found = {}
for name, wanted in (("up", size), ("down", -size)):
    with socket.create_connection((host, int(sys.argv[3])), 10) as sock:
        begin = time.monotonic()
        sock.sendall(str(wanted).encode().ljust(16))
        if wanted > 0:
            sock.sendall(bytes(wanted))
            assert int(sock.recv(16)) == wanted
        else:
            total = 0
            while chunk := sock.recv(1 << 20):
                total += len(chunk)
            assert total == size, total
        found[name] = time.monotonic() - begin
sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(1)
sock.connect((host, int(sys.argv[3])))
answers = 0
for attempt in range(12):
    try:
        sock.send(bytes(8000))
        answers += sock.recv(65535) == bytes(8000)
    except OSError:  # too big, said once for each direction: the sender learns it
        continue
found["udp"] = answers
print(json.dumps(found))
"""


def bulk_pod(name: str, node: str) -> dict[str, Any]:
    document = echo_pod(name, nodeName=node)
    document["metadata"]["labels"]["app"] = "bulk"
    container = document["spec"]["containers"][0]
    container["command"] = [sys.executable, "-c", SERVER]
    container["ports"] = [{"containerPort": 9000, "protocol": protocol} for protocol in ("TCP", "UDP")]
    return document


def bulk_service(**annotations: str) -> dict[str, Any]:
    document = service("bulk", type="NodePort")
    document["metadata"]["annotations"] = annotations
    for port in document["spec"]["ports"]:
        port |= {"port": 9000, "targetPort": 9000, "nodePort": 30900}
    return document


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(unique_name("o"))
    try:
        made.run("up", "--nodes", "3", "--segments", "2")
        made.apply(
            tmp_path_factory.mktemp("overlay"),
            service("far", type="NodePort", externalTrafficPolicy="Cluster"),
            *(service(name, selector={"pod": name}) for name in PODS),
            *(_labelled(echo_pod(name, nodeName=node), pod=name) for name, node in PODS.items()),
            bulk_service(),
            bulk_pod("bulk-2", "node2"),
        )
        yield made
    finally:
        made.close()


def _labelled(document: dict[str, Any], **labels: str) -> dict[str, Any]:
    document["metadata"]["labels"] |= labels
    return document


def command_in(lab: Lab, name: str, *command: str) -> list[str]:
    """A command in the network of a node or pod, outside the lab's cgroups: no socket hook sees what it does."""
    layout = lab.layout
    if name in NODES:
        netns = layout.machine(name).netns
    else:
        netns = layout.pod(ObjectKey("default", name), layout.node(1)).place.netns
    return ["nsenter", f"--net={netns}", *command]


def inside(lab: Lab, name: str, *command: str) -> str:
    """What it prints."""
    done = subprocess.run(command_in(lab, name, *command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.05)


def every_request(outcomes: list[Outcome]) -> None:
    assert [dict(outcome.failed) for outcome in outcomes if outcome.failed] == []


# -- what there is ------------------------------------------------------------------------------------------------


def test_a_tunnel_only_where_a_router_is_in_between(lab: Lab) -> None:
    behind = {"node1": ["node2"], "node2": ["node1", "node3"], "node3": ["node2"]}
    for node, peers in behind.items():
        status = json.loads(lab.run("exec", node, "--", *WAGGLE, "status", "-o", "json").stdout)
        assert status["tunnels"] == {"waggle-vxlan4": peers}
        assert status["problems"] == []
        assert status["devices"] == ["eth0"]
    mtu = json.loads(inside(lab, "far-1", "ip", "-json", "link", "show", "eth0"))[0]["mtu"]
    assert mtu == 1450


def test_pods_nodes_and_the_client_reach_everything(lab: Lab) -> None:
    pods = {name: lab.pod(name)["addresses"] for name in PODS}
    clusters = lab.service("far")["clusterIPs"]
    node_port = lab.service("far")["ports"][0]["nodePort"]
    to_pods = [(name, Probe(a, 8080, p)) for name in PODS for a in pods[name] for p in ("tcp", "udp")]
    to_service = [Probe(a, 80, p, 6) for a in clusters for p in ("tcp", "udp")]
    to_ports = [Probe(a, node_port, "tcp", 4) for addresses in NODES.values() for a in addresses]
    for origin in (*PODS, *NODES):
        found = lab.ask(origin, *(probe for _, probe in to_pods), *to_service, *to_ports)
        every_request(found)
        own = {False: NODES, True: pods}[origin in PODS][origin]
        for (name, probe), outcome in zip(to_pods, found, strict=False):
            assert set(outcome.answers) == {name}, probe
            assert set(outcome.clients) <= set(own), (origin, probe)
    every_request(lab.ask("client", *to_ports))


def test_pods_and_the_addresses_of_nodes_behind_tunnels(lab: Lab) -> None:
    """As a pod asks an API server. The router would drop what comes from a pod."""
    server = command_in(lab, "node2", *ECHO, "--port", "9443", "--name", "api")
    with subprocess.Popen(server) as process:
        try:
            until(lambda: ":9443" in inside(lab, "node2", "ss", "-Hltn"))
            probes = [Probe(a, 9443, p, 2) for a in NODES["node2"] for p in ("tcp", "udp")]
            for origin in PODS:
                outcomes = lab.ask(origin, *probes)
                every_request(outcomes)
                assert {c for one in outcomes for c in one.clients} == set(lab.pod(origin)["addresses"])
        finally:
            process.terminate()


def test_what_no_socket_hook_has_seen(lab: Lab) -> None:
    """Answers come back by a pod's interface, or out of the tunnel, as a Service's: nothing must filter them."""
    for name in PODS:
        address = lab.service(name)["clusterIPs"][0]
        answer = inside(lab, "node1", "curl", "-s", "--max-time", "5", f"http://{address}/")
        assert json.loads(answer)["name"] == name


# -- large packets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, 1])
def test_large_transfers_from_a_pod_that_does_not_know_of_the_tunnel(lab: Lab, version: int) -> None:
    """Its interface is as large as the network's: it was made before there was a tunnel."""
    target = lab.pod("bulk-2")["addresses"][version]
    index = json.loads(inside(lab, "far-1", "ip", "-json", "link", "show", "eth0"))[0]["link_index"]
    links = json.loads(inside(lab, "node1", "ip", "-json", "link"))
    (host,) = [link["ifname"] for link in links if link["ifindex"] == index]
    inside(lab, "node1", "ip", "link", "set", host, "mtu", "1500")
    inside(lab, "far-1", "ip", "link", "set", "eth0", "mtu", "1500")
    before = _counted(lab, "node1")
    found = json.loads(inside(lab, "far-1", sys.executable, "-c", CLIENT, target, str(32 << 20), "9000"))
    assert found["udp"] >= 8, found
    # GSO: what enters the tunnel is far larger than a packet on the wire
    packets, size = (after - first for after, first in zip(_counted(lab, "node1"), before, strict=True))
    assert size / packets > 4000, (packets, size)


def _counted(lab: Lab, node: str) -> tuple[int, int]:
    """Packets and bytes that a node has sent into its tunnel."""
    shown = json.loads(inside(lab, node, "ip", "-json", "-s", "link", "show", "waggle-vxlan4"))
    return shown[0]["stats64"]["tx"]["packets"], shown[0]["stats64"]["tx"]["bytes"]


@pytest.mark.parametrize("forwarding", ["snat", "dsr"])
def test_large_transfers_through_a_node_port_on_the_other_network(lab: Lab, tmp_path: Path, forwarding: str) -> None:
    lab.apply(tmp_path, bulk_service(**{"waggle.dev/forwarding": forwarding}))
    time.sleep(0.5)
    for address in NODES["node1"]:
        done = lab.run("exec", "client", "--", sys.executable, "-c", CLIENT, address, str(8 << 20), "30900")
        assert json.loads(done.stdout)["udp"] >= 8


# -- changes ------------------------------------------------------------------------------------------------------


def publish(lab: Lab, node: str, *addresses: str) -> None:
    """The Node object with these addresses."""
    layout = lab.layout.node(int(node.removeprefix("node")))
    document = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node},
        "spec": {"podCIDR": layout.pod_cidrs[0], "podCIDRs": list(layout.pod_cidrs)},
        "status": {"addresses": [{"type": "InternalIP", "address": address} for address in addresses]},
    }
    published.publish(lab.layout, document)


def reaches(lab: Lab, origin: str, *targets: str) -> bool:
    """Whether pings are answered, from a pod or a node."""
    pings = (command_in(lab, origin, "ping", "-c", "1", "-W", "1", target) for target in targets)
    return all(subprocess.run(ping, capture_output=True, check=False).returncode == 0 for ping in pings)


def tunnel_facts(lab: Lab, node: str) -> dict[str, str]:
    """Everything on a node that has to do with tunnels."""
    rules = [inside(lab, node, "ip", f"-{version}", "rule") for version in (4, 6)]
    routes = [inside(lab, node, "ip", f"-{version}", "route", "show", "table", "all") for version in (4, 6)]
    return {
        "link": inside(lab, node, "ip", "-d", "link", "show", "type", "vxlan"),
        "rules": "".join(line for text in rules for line in text.splitlines(True) if "proto 119" in line),
        "routes": "".join(
            line for text in routes for line in text.splitlines(True) if "waggle-vxlan" in line and "proto 119" in line
        ),
    }


def tunnel_names(lab: Lab, node: str) -> list[str]:
    shown = inside(lab, node, "ip", "-json", "link", "show", "type", "vxlan")
    return [link["ifname"] for link in json.loads(shown or "[]") if link]


def test_a_node_that_changes_its_address_vanishes_and_comes_back(lab: Lab) -> None:
    pod = lab.pod("far-2")["addresses"]
    try:
        inside(
            lab,
            "node2",
            "sh",
            "-c",
            "ip address del 10.77.1.12/24 dev eth0 && ip address add 10.77.1.99/24 dev eth0 && "
            "ip route replace default via 10.77.1.1",
        )
        publish(lab, "node2", "10.77.1.99", NODES["node2"][1])
        until(lambda: reaches(lab, "far-1", *pod, "10.77.1.99", NODES["node2"][1]) and reaches(lab, "node1", *pod))
        assert "local 10.77.1.99" in tunnel_facts(lab, "node2")["link"]
        published.retract(lab.layout, "Node", ObjectKey("", "node2"))
        until(lambda: set(tunnel_facts(lab, "node1").values()) == {""})
        assert not reaches(lab, "far-1", pod[0])
        publish(lab, "node2", "10.77.1.99", NODES["node2"][1])
        until(lambda: reaches(lab, "far-1", *pod))
    finally:
        inside(lab, "node2", "ip", "address", "flush", "dev", "eth0", "scope", "global")
        lab.run("up")
    until(lambda: reaches(lab, "far-1", *pod) and reaches(lab, "far-2", *lab.pod("far-3")["addresses"]))
    assert "10.77.1.99" not in inside(lab, "node1", "bridge", "fdb", "show", "dev", "waggle-vxlan4")


def test_pods_of_both_families_where_the_network_has_only_ipv6(lab: Lab) -> None:
    try:
        for node, (v4, v6) in NODES.items():
            inside(lab, node, "ip", "address", "del", f"{v4}/24", "dev", "eth0")
            publish(lab, node, v6)
        until(lambda: all(tunnel_names(lab, node) == ["waggle-vxlan6"] for node in NODES))
        addresses = {name: lab.pod(name)["addresses"] for name in PODS}
        until(lambda: all(reaches(lab, origin, *addresses["far-2"]) for origin in ("far-1", "node1")))
        probes = [Probe(a, 8080) for pair in addresses.values() for a in pair]
        probes += [Probe(a, 80, p, 4) for a in lab.service("far")["clusterIPs"] for p in ("tcp", "udp")]
        for origin in ("far-1", "far-2", "node1", "node2"):
            every_request(lab.ask(origin, *probes))
        node_port = lab.service("far")["ports"][0]["nodePort"]
        every_request(lab.ask("client", *(Probe(v6, node_port, "tcp", 4) for _, v6 in NODES.values())))
    finally:
        lab.run("up")
    until(lambda: all(tunnel_names(lab, node) == ["waggle-vxlan4"] for node in NODES))
    until(lambda: reaches(lab, "far-1", *lab.pod("far-2")["addresses"], *lab.pod("far-3")["addresses"]))


def test_agents_killed_and_started_again_under_load(lab: Lab) -> None:
    target = lab.pod("far-2")["addresses"][0]
    command = command_in(lab, "far-1", "ping", "-q", "-i", "0.01", "-W", "2", target)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pings:
        time.sleep(1)
        for node in ("node1", "node2"):
            lab.kill_agent(node)
        time.sleep(0.5)
        lab.run("up")
        pings.send_signal(signal.SIGINT)
        output, _ = pings.communicate(timeout=20)
    assert " 0% packet loss" in output, output
    assert int(output.split(" packets transmitted")[0].split()[-1]) > 100


def test_leftovers_and_what_others_changed_are_put_right(lab: Lab) -> None:
    before = tunnel_facts(lab, "node1")
    fdb = inside(lab, "node1", "bridge", "fdb", "show", "dev", "waggle-vxlan4")
    lab.kill_agent("node1")
    inside(
        lab,
        "node1",
        "sh",
        "-ce",
        """
        bridge fdb append 02:00:00:00:00:99 dev waggle-vxlan4 dst 10.77.1.99
        ip neigh replace 10.244.9.0 lladdr 02:00:00:00:00:99 dev waggle-vxlan4 nud permanent
        ip route add 10.244.9.0/24 via 10.244.9.0 dev waggle-vxlan4 onlink proto 119
        ip route add 10.77.1.99 dev waggle-vxlan4 table 11900 proto 119
        ip rule add from 10.244.9.0/24 lookup 11900 priority 119 protocol 119
        ip route del 10.244.2.0/24
        ip rule del from 10.244.1.0/24 lookup 11900
        """,
    )
    assert tunnel_facts(lab, "node1") != before
    lab.run("up")
    until(lambda: tunnel_facts(lab, "node1") == before)
    until(lambda: inside(lab, "node1", "bridge", "fdb", "show", "dev", "waggle-vxlan4") == fdb)
    assert "10.244.9.0" not in inside(lab, "node1", "ip", "neigh", "show", "dev", "waggle-vxlan4")
    inside(lab, "node1", "ip", "link", "delete", "waggle-vxlan4")  # the agent is there, and hears of it
    until(lambda: reaches(lab, "far-1", *lab.pod("far-2")["addresses"]))


def test_cleanup_removes_it_all(lab: Lab) -> None:
    node = lab.layout.node(3)
    filters = ("cat", "/proc/sys/net/ipv4/conf/all/rp_filter", "/proc/sys/net/ipv4/conf/eth0/rp_filter")
    # a lab that brings a node back sets them anew; the agent looks every few seconds
    until(lambda: lab.run("exec", "node3", "--", *filters).stdout.split() == ["0", "1"])
    lab.kill_agent("node3")
    try:
        done = lab.run(
            "exec", "node3", "--", *WAGGLE, "cleanup", "--bpf-root", str(node.bpf), "--state-dir", str(node.state),
            "--api-socket", str(node.socket), "--cni-bin-dir", "/nonexistent", "--cni-conf-dir", "/nonexistent",
        )  # fmt: skip
        assert "removed interface waggle-vxlan4" in done.stdout
        assert set(tunnel_facts(lab, "node3").values()) == {""}
        assert "proto 119" not in inside(lab, "node3", "ip", "route", "show", "table", "all")
        assert lab.run("exec", "node3", "--", *filters).stdout.split() == ["1", "1"]
    finally:
        lab.run("up")
    until(lambda: reaches(lab, "far-3", *lab.pod("far-2")["addresses"]))
