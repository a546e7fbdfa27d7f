"""The base line: the lab's topology in plain network namespaces, routed by the kernel alone, without BPF.

One node:      pod ─ veth ─ node ─ veth ─ pod
Across nodes:  pod ─ veth ─ node ─ veth ─ bridge ─ veth ─ node ─ veth ─ pod

Addresses, MTU, point-to-point routes and permanent neighbours are what waggle gives its pods, and the bridge is made
as the lab makes its own, so that the only difference is what waggle adds.

Names are those of `leftovers`. `kube_proxy` puts the rules of kube-proxy on the nodes of one more of these.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from bench.leftovers import NETNS, PREFIX, delete_netns
from bench.places import BIN, BenchError, Place, checked, stop

PORT = 7000  # TCP and UDP echo; PORT + 1 is the sink

ONE_NODE, ACROSS_NODES = "one node", "across nodes"
PLACEMENTS = (ONE_NODE, ACROSS_NODES)


class PlainNetwork:
    """Two nodes; the client is a pod of the first, `servers` pods on each serve. A context manager.

    `name` keeps several of them on one machine apart.
    """

    def __init__(self, servers: int, server_cpu: int | None, name: str = "plain") -> None:
        self.name = name
        self._server_cpu = server_cpu
        self._made: list[str] = []
        self._processes: list[subprocess.Popen[str]] = []
        self.nodes = [self._node(1), self._node(2)]
        self.client = self._pod("client", 1, 2)
        self.servers = {
            ONE_NODE: [self._pod(f"server1-{i}", 1, 10 + i) for i in range(servers)],
            ACROSS_NODES: [self._pod(f"server2-{i}", 2, 10 + i) for i in range(servers)],
        }

    def __enter__(self) -> Self:
        try:
            self._build()
            for place in (*self.servers[ONE_NODE], *self.servers[ACROSS_NODES]):
                self._processes.append(start_server(place, self._server_cpu))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def server_pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """Remove everything; safe to call more than once."""
        while self._processes:
            stop(self._processes.pop())
        while self._made:
            delete_netns(self._made.pop())

    # -- building -----------------------------------------------------------------------------------------------

    def _name(self, part: str) -> str:
        return f"{PREFIX}-{self.name}-{part}"

    def _node(self, node: int) -> Place:
        name = self._name(f"node{node}")
        return Place(name, NETNS / name, (f"10.77.0.{10 + node}", f"fd00:77::{10 + node:x}"))

    def _pod(self, part: str, node: int, number: int) -> Place:
        addresses = (f"10.244.{node}.{number}", f"fd00:10:244:{node}::{number:x}")
        return Place(self._name(part), NETNS / self._name(part), addresses)

    def _build(self) -> None:
        for part in ("net", "node1", "node2"):
            self._add_netns(self._name(part))
        net = Place(self._name("net"), NETNS / self._name("net"), ())
        for family in ("iptables", "ip6tables"):
            if Path(f"/proc/sys/net/bridge/bridge-nf-call-{family}").exists():
                net.set_sysctl(f"net.bridge.bridge-nf-call-{family}", 0)
        bridge = "link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0"
        self._ip("net", [bridge, "link set br0 up"])
        for node in (1, 2):
            self._build_node(node)
        self._build_pod(self.client, 1, 0)
        for node, places in ((1, self.servers[ONE_NODE]), (2, self.servers[ACROSS_NODES])):
            for number, place in enumerate(places, start=1):
                self._build_pod(place, node, number)

    def _add_netns(self, name: str) -> None:
        self._made.append(name)  # first: an interrupt in between must not leave it
        checked(["ip", "netns", "add", name])
        checked(["ip", "-n", name, "link", "set", "lo", "up"])

    def _build_node(self, node: int) -> None:
        place, other = self.nodes[node - 1], 3 - node
        v4, v6 = place.addresses
        for setting in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            place.set_sysctl(setting, 1)
        self._ip("net", [f"link add node{node} type veth peer name eth0 netns {place.name}", f"link set node{node} up"])
        self._ip("net", [f"link set node{node} master br0"])
        self._ip(
            f"node{node}",
            [
                f"addr add {v4}/24 dev eth0",
                f"addr add {v6}/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add 10.244.{other}.0/24 via 10.77.0.{10 + other}",
                f"route add fd00:10:244:{other}::/64 via fd00:77::{10 + other:x}",
            ],
        )

    def _build_pod(self, place: Place, node: int, number: int) -> None:
        """As the CNI plugin does it: /32 and /128, default routes through permanent neighbours."""
        self._add_netns(place.name)
        host_mac, pod_mac, host = f"02:77:00:0{node}:01:{number:02x}", f"02:77:00:0{node}:02:{number:02x}", f"p{number}"
        v4, v6 = place.addresses
        self._ip(
            f"node{node}",
            [
                f"link add {host} address {host_mac} type veth peer name eth0 address {pod_mac} netns {place.name}",
                f"link set {host} up",
                f"route add {v4}/32 dev {host} scope link",
                f"route add {v6}/128 dev {host}",
                f"neigh add {v4} lladdr {pod_mac} dev {host} nud permanent",
                f"neigh add {v6} lladdr {pod_mac} dev {host} nud permanent",
            ],
        )
        self._ip(
            place.name.removeprefix(self._name("")),
            [
                f"addr add {v4}/32 dev eth0",
                f"addr add {v6}/128 dev eth0 nodad",
                "link set eth0 up",
                f"neigh add 169.254.1.1 lladdr {host_mac} dev eth0 nud permanent",
                f"neigh add fe80::1 lladdr {host_mac} dev eth0 nud permanent",
                "route add default via 169.254.1.1 dev eth0 onlink",
                "route add default via fe80::1 dev eth0 onlink",
            ],
        )

    def _ip(self, part: str, lines: Sequence[str]) -> None:
        checked(["ip", "-n", self._name(part), "-batch", "-"], stdin="\n".join(lines) + "\n", subject=f"ip in {part}")


def start_server(place: Place, cpu: int | None) -> subprocess.Popen[str]:
    """The benchmark's server in a place, once it listens."""
    pin = ["--cpu", str(cpu)] if cpu is not None else []
    process = place.start([str(BIN / "server"), "--port", str(PORT), "--end-with-parent", *pin])
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        stop(process)
        raise BenchError(f"the server in {place.name} did not start")
    return process
