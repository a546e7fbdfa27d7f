"""Networks for pods that waggle's own is measured against: Debian's `bridge` plugin, and VXLAN set up by hand.

Both are the base line's topology with other pods, or with another way between the nodes. The overlay's nodes reach each
other's pods through a VXLAN device with permanent entries, as flannel has it; there is no NAT, and no rule.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.places import Place, checked
from bench.plain import PlainNetwork
from bench.ways import PlainRouting

PLUGINS = Path("/usr/lib/cni")
VNI = 77


class BridgeNetwork(PlainNetwork):
    """Pods made by the real `bridge` plugin with masquerade, its usual configuration. (`portmap` behind it does nothing
    for a pod that publishes no port.)"""

    def __init__(self, servers: int, server_cpu: int | None) -> None:
        super().__init__(servers, server_cpu, "bridge")

    @staticmethod
    def missing() -> str:
        """Why it cannot be measured; empty when it can."""
        needed = [PLUGINS / name for name in ("bridge", "static")]
        return "" if all(file.exists() for file in needed) else "containernetworking-plugins is not installed"

    def _build_pod(self, place: Place, node: int, number: int) -> None:
        self._add_netns(place.name)
        gateways = (f"10.244.{node}.1", f"fd00:10:244:{node}::1")
        addresses = [
            {"address": f"{address}/{24 if '.' in address else 64}", "gateway": gateway}
            for address, gateway in zip(place.addresses, gateways, strict=True)
        ]
        ipam = {"type": "static", "addresses": addresses, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
        gateway = {"isGateway": True, "ipMasq": True, "hairpinMode": True}
        configuration = {"cniVersion": "1.0.0", "name": "bench", "type": "bridge", "bridge": "cni0", "ipam": ipam}
        request = {
            "CNI_COMMAND": "ADD",
            "CNI_CONTAINERID": place.name,
            "CNI_NETNS": str(place.netns),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(PLUGINS),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        }
        environment = [f"{name}={value}" for name, value in request.items()]
        checked(
            self.nodes[node - 1].command(["env", "-i", *environment, str(PLUGINS / "bridge")]),
            stdin=json.dumps(configuration | gateway),
            subject=f"the bridge plugin for {place.name}",
        )


class VxlanNetwork(PlainNetwork):
    """Plain routed pods, whose nodes are joined by a VXLAN device."""

    def __init__(self, servers: int, server_cpu: int | None) -> None:
        super().__init__(servers, server_cpu, "plain-vxlan")

    def _build_node(self, node: int) -> None:
        super()._build_node(node)
        other = 3 - node
        mac = "02:77:77:00:00:{:02x}"
        self._ip(
            f"node{node}",
            [
                f"link add vx0 address {mac.format(node)} type vxlan id {VNI} local 10.77.0.{10 + node} dev eth0 "
                "dstport 8472 nolearning",
                "link set vx0 mtu 1450 up",
                f"neigh add 10.244.{other}.0 lladdr {mac.format(other)} dev vx0 nud permanent",
                f"neigh add fd00:10:244:{other}:: lladdr {mac.format(other)} dev vx0 nud permanent",
                f"route del 10.244.{other}.0/24",
                f"route del fd00:10:244:{other}::/64",
                f"route add 10.244.{other}.0/24 via 10.244.{other}.0 dev vx0 onlink",
                f"route add fd00:10:244:{other}::/64 via fd00:10:244:{other}:: dev vx0 onlink",
            ],
        )
        entry = ["bridge", "-n", self.nodes[node - 1].name, "fdb", "add", mac.format(other), "dev", "vx0"]
        checked([*entry, "dst", f"10.77.0.{10 + other}", "self", "permanent"])

    def _build_pod(self, place: Place, node: int, number: int) -> None:
        super()._build_pod(place, node, number)
        self._ip(place.name.removeprefix(self._name("")), ["link set eth0 mtu 1450"])


class OtherPods(PlainRouting):
    """From pod to pod on one of these networks."""

    def __init__(self, network: PlainNetwork, family: int, title: str) -> None:
        super().__init__(network, family)
        self.name = network.name
        self.title = title

    def prepare(self) -> None:
        """Where there is connection tracking, no run finds the connections of the one before."""
        if isinstance(self._network, BridgeNetwork):
            flush(self._network.nodes)


def flush(nodes: Sequence[Place]) -> None:
    """Empties the connection tables of nodes."""
    for place in nodes:
        place.run(["conntrack", "-F"], timeout=60)
