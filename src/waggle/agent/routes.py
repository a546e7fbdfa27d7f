"""The ways from this node to all others: decided from Node objects, made in the kernel, told of in the status."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Mapping

from waggle.config import AgentConfig
from waggle.kernel.netlink import IPNetwork, Netlink
from waggle.model.objects import Node
from waggle.plan.routing import Place, RoutePlan, Routing, internal_addresses, plan_routing
from waggle.reconcile.overlay import OVERHEAD, TunnelSettings, is_tunnel, make_tunnels, sync_routes, tunnels
from waggle.reconcile.uplinks import TUNNELS
from waggle.sources.problem import Problem

CHECK_SECONDS = 60.0  # the kernel tells nobody when a forwarding entry goes

Devices = list[tuple[str, int]]


class NodeRoutes:
    """`unrouted`: pod range → why no way leads there. `tunnels`: (name, ifindex) of the interfaces there are."""

    def __init__(self, config: AgentConfig, netlink: Netlink) -> None:
        self._config = config
        self._netlink = netlink
        self._plan = RoutePlan((), (), {}, {})
        self._checked = 0.0
        self.tunnels: Devices = []
        self.unrouted: Mapping[IPNetwork, str] = {}

    def find_tunnels(self) -> Devices:
        """The tunnel interfaces as the kernel has them now."""
        return tunnels(self._netlink.links())

    def sync(
        self,
        nodes: Iterable[Node],
        ranges: list[IPNetwork],
        snat: Iterable[str],
        mtu: int,
        attach: Callable[[Devices], None],
    ) -> dict[IPNetwork, str]:
        """Makes tunnels, has programs put on them by `attach`, then lets traffic in. Which pod ranges cannot be
        reached, and why. `ranges`: of this node's pods; `snat`: its source addresses; `mtu`: of its uplinks. Blocking.
        """
        config = self._config
        plan = plan_routing(nodes, self._place(ranges, snat), Routing(config.routing))
        settings = TunnelSettings(config.node_name, config.vxlan_vni, config.vxlan_port)
        found = make_tunnels(plan, settings, mtu, self._netlink)
        attach(found)
        self.tunnels = found
        failed = sync_routes(plan, ranges, self._netlink)
        self._plan = plan
        self._checked = time.monotonic()
        return {**plan.problems, **failed}

    def _place(self, ranges: Iterable[IPNetwork], snat: Iterable[str]) -> Place:
        """Where this node stands, as far as its kernel knows."""
        ours = {link.index for link in self._netlink.links() if is_tunnel(link)}
        addresses = [address for address in self._netlink.addresses() if address.ifindex not in ours]
        every = frozenset(address.ip for address in addresses)
        fallback = [address for address in map(ipaddress.ip_address, snat) if address in every]
        return Place(
            name=self._config.node_name,
            every=every,
            networks=tuple(address.interface.network for address in addresses if not address.ip.is_loopback),
            ranges=tuple(ranges),
            fallback={address.version: address for address in fallback},
        )

    @property
    def check_due(self) -> bool:
        """Whether the tunnels have not been looked at for long."""
        return bool(self.tunnels) and time.monotonic() - self._checked > CHECK_SECONDS

    def overhead(self, *, ipv4: bool) -> int:
        """Bytes that the packets of a new pod must leave for tunnels. `ipv4`: this node has such an address."""
        present = {name for name, _ in self.tunnels}
        versions = {version for version, name in TUNNELS.items() if name in present}
        if not versions and self._config.routing == Routing.VXLAN:
            versions = {4 if ipv4 else 6}
        return max((OVERHEAD[version] for version in versions), default=0)

    def behind(self) -> dict[str, list[str]]:
        """Tunnel interface → the nodes that it leads to."""
        return {
            name: [peer.name for peer in self._plan.peers if TUNNELS[peer.at.version] == name]
            for name, _ in self.tunnels
        }

    def problems(self, own: Node | None, snat: Iterable[str], ranges: list[IPNetwork]) -> list[Problem]:
        """What is wrong with the ways to other nodes. `own`: this node's object."""
        found = [Problem(f"pod range {cidr}", reason) for cidr, reason in self.unrouted.items()]
        known = internal_addresses(own) if own is not None else []
        if not known or not self._plan.peers:
            return found
        for address in map(ipaddress.ip_address, snat):
            if address not in known and not any(address in cidr for cidr in ranges):
                reason = (
                    "is not among the InternalIPs of this node's Node object: answers of pods behind tunnels may not "
                    "come back to it. Set node-ip to one that is"
                )
                found.append(Problem(f"node address {address}", reason))
        return found
