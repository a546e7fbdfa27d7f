"""A virtual machine as Kata and Firecracker put one into a pod: a tap device, wired to eth0 by tc in both directions.

The test is the machine: it reads and writes Ethernet frames. The node sees nothing of its sockets, the pod's kernel
nothing of its packets.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_node import AgentNode, endpoints, service
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from waggle.kernel.netns import call_in_netns

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

NETNS = Path("/run/netns")
VIPS = {4: "10.96.5.1", 6: "fd00:10:96::51"}
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 2, 0x1000


class Machine:
    """The frames of one pod. `address` by family; `mac` and `gateway_mac` are those of the pod's interface."""

    def __init__(self, pod: str) -> None:
        self.tap = call_in_netns(NETNS / pod, _open_tap)
        for one, other in (("eth0", "tap0"), ("tap0", "eth0")):
            _run(pod, "tc", "qdisc", "add", "dev", one, "ingress")
            everything = ["protocol", "all", "u32", "match", "u32", "0", "0"]
            redirect = ["action", "mirred", "egress", "redirect", "dev", other]
            _run(pod, "tc", "filter", "add", "dev", one, "ingress", *everything, *redirect)
        link = json.loads(_run(pod, "ip", "-j", "address", "show", "dev", "eth0"))[0]
        self.mac = link["address"]
        self.address = {
            6 if entry["family"] == "inet6" else 4: entry["local"]
            for entry in link["addr_info"]
            if entry["scope"] == "global"
        }
        neighbours = json.loads(_run(pod, "ip", "-j", "neigh", "show", "dev", "eth0"))
        self.gateway_mac = next(entry["lladdr"] for entry in neighbours if "lladdr" in entry)

    def send(self, version: int, target: str, layer: Packet) -> None:
        network = IP(src=self.address[4], dst=target) if version == 4 else IPv6(src=self.address[6], dst=target)
        os.write(self.tap, bytes(Ether(src=self.mac, dst=self.gateway_mac) / network / layer))

    def receive(self, wanted: Callable[[Packet], bool]) -> Packet:
        deadline = time.monotonic() + 5
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.tap], [], [], left)[0]:
                frame = Ether(os.read(self.tap, 65536))
                if wanted(frame):
                    return frame
        raise AssertionError("no such frame within 5 s")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    found = AgentNode(tmp_path_factory.mktemp("tap"))
    try:
        found.open()
        found.start()
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def machine(node: AgentNode) -> Iterator[Machine]:
    pod, _ = node.add_pod("vm")
    made = Machine(pod)
    try:
        yield made
    finally:
        os.close(made.tap)


def test_the_machine_finds_its_gateway(machine: Machine) -> None:
    """Nobody gave it a neighbour entry, as the pod's kernel got one."""
    everybody = Ether(src=machine.mac, dst="ff:ff:ff:ff:ff:ff")
    arp = ARP(hwsrc=machine.mac, psrc=machine.address[4], pdst="169.254.1.1")
    os.write(machine.tap, bytes(everybody / arp))
    assert machine.receive(lambda frame: ARP in frame and frame[ARP].op == 2)[ARP].hwsrc == machine.gateway_mac
    routers = Ether(src=machine.mac, dst="33:33:ff:00:00:01")
    asked = ICMPv6ND_NS(tgt="fe80::1") / ICMPv6NDOptSrcLLAddr(lladdr=machine.mac)
    os.write(machine.tap, bytes(routers / IPv6(src=machine.address[6], dst="ff02::1:ff00:1", hlim=255) / asked))
    answer = machine.receive(lambda frame: ICMPv6ND_NA in frame)
    assert answer[ICMPv6NDOptDstLLAddr].lladdr == machine.gateway_mac and answer[IPv6].dst == machine.address[6]


@pytest.mark.parametrize("version", [4, 6])
def test_tcp_to_a_service(node: AgentNode, machine: Machine, version: int) -> None:
    server, v4 = node.add_pod(f"server{version}")
    shown = json.loads(_run(server, "ip", "-j", "-6", "address", "show", "dev", "eth0", "scope", "global"))
    backend = v4 if version == 4 else shown[0]["addr_info"][0]["local"]
    node.serve(NETNS / server, "web")
    vip = VIPS[version]
    node.apply(f"s{version}", service(f"s{version}", vip), endpoints(f"s{version}", backend))
    node.until(lambda: node.connect(vip, 80) == "web")

    def from_the_service(frame: Packet) -> bool:
        layer = IP if version == 4 else IPv6
        return TCP in frame and layer in frame and (frame[layer].src, frame[TCP].sport) == (vip, 80)

    machine.send(version, vip, TCP(sport=4000, dport=80, flags="S", seq=1000))
    answer = machine.receive(from_the_service)
    assert answer[TCP].flags == "SA" and answer[TCP].ack == 1001
    machine.send(version, vip, TCP(sport=4000, dport=80, flags="A", seq=1001, ack=answer[TCP].seq + 1))
    said = machine.receive(lambda frame: from_the_service(frame) and Raw in frame and bytes(frame[Raw]) == b"web")
    assert said[TCP].dport == 4000
    machine.send(version, vip, TCP(sport=4000, dport=80, flags="R", seq=1001))


@pytest.mark.parametrize("version", [4, 6])
def test_nothing_behind_a_service(node: AgentNode, machine: Machine, version: int) -> None:
    vip = {4: "10.96.5.9", 6: "fd00:10:96::59"}[version]
    node.apply(f"empty{version}", service(f"empty{version}", vip))
    node.until(lambda: node.connect(vip, 80) == "ConnectionRefusedError")
    machine.send(version, vip, TCP(sport=4001, dport=80, flags="S", seq=1))
    assert "R" in machine.receive(lambda frame: TCP in frame and frame[TCP].dport == 4001)[TCP].flags


def test_what_the_node_sends_reaches_the_machine(node: AgentNode, machine: Machine) -> None:
    for version, address in machine.address.items():
        family = "2" if version == 4 else "10"
        code = "import socket, sys; s = socket.socket(int(sys.argv[2]), 2); s.sendto(b'hello', (sys.argv[1], 4002))"
        subprocess.run(node.inside(["python3", "-c", code, address, family]), check=True)
        frame = machine.receive(lambda frame: UDP in frame and frame[UDP].dport == 4002)
        assert bytes(frame[Raw]).startswith(b"hello") and frame.dst == machine.mac


def _open_tap() -> int:
    """Runs inside the pod's namespace."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"tap0", _IFF_TAP | _IFF_NO_PI))
    subprocess.run(["ip", "link", "set", "tap0", "up"], check=True)
    return descriptor


def _run(pod: str, *command: str) -> str:
    done = subprocess.run(["ip", "netns", "exec", pod, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout
