"""Where the node stands: its addresses, uplinks and tunnels with the programs on them, and the ways to other nodes."""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections.abc import Mapping, Sequence

from waggle.agent.pods import PodPrograms
from waggle.agent.proxy_flows import ProxyFlows
from waggle.config import AgentConfig
from waggle.errors import NotFound
from waggle.kernel.netlink import IPNetwork, Netlink
from waggle.model.objects import Node
from waggle.plan.routing import Place, RoutePlan, Routing, internal_addresses, plan_routing
from waggle.reconcile.datapath import Datapath, NodeAddresses, node_addresses
from waggle.reconcile.forwarding import drop_filters, enable_forwarding, keep_filters
from waggle.reconcile.overlay import OVERHEAD, TunnelSettings, is_tunnel, make_tunnels, sync_routes, tunnels
from waggle.reconcile.sysctls import Sysctls
from waggle.reconcile.uplinks import TUNNELS, uplinks
from waggle.sources.problem import Problem

log = logging.getLogger(__name__)

TUNNEL_CHECK_SECONDS = 60.0  # the kernel tells nobody when a forwarding entry goes


class NodeNetwork:
    """One node's. All but the plain facts is blocking, and may be called from any thread."""

    def __init__(
        self, config: AgentConfig, datapath: Datapath, sysctls: Sysctls, pods: PodPrograms, proxy: ProxyFlows
    ) -> None:
        self._config = config
        self._datapath = datapath
        self._pods = pods
        self._proxy = proxy
        self._sysctls = sysctls
        self._netlink = Netlink()
        self._lock = threading.Lock()  # of all of it
        self.node = NodeAddresses("", "", frozenset())
        self.devices: list[tuple[str, int]] = []
        self.attached = False  # the programs that this agent loaded are at work
        self._tunnels: list[tuple[str, int]] = []
        self._tunnels_checked = 0.0
        self._routes = RoutePlan((), (), {}, {})
        self._unrouted: Mapping[IPNetwork, str] = {}

    def look(self) -> None:
        """What is there when the agent starts; the kernel's settings become what forwarding needs."""
        self.node, self.devices, self._tunnels = self._found()
        enable_forwarding(self._sysctls)
        keep_filters(self._sysctls)

    def _found(self) -> tuple[NodeAddresses, list[tuple[str, int]], list[tuple[str, int]]]:
        node = node_addresses(self._config.node_ip, self._netlink, self._config.dns_addresses)
        return node, uplinks(self._config.devices, node.snat, self._netlink), tunnels(self._netlink.links())

    def interfaces(self) -> set[int]:
        """Those that exist now, by index."""
        return {link.index for link in self._netlink.links()}

    def attach(self) -> None:
        """Puts the loaded programs on every hook."""
        with self._lock:
            steps = (self._datapath.attach_sockets, self._attach_devices, self._pods.attach_all)
            with self._proxy.attaching() as taken_over:
                for step in steps:
                    step()
                    taken_over()
            self._datapath.take_over_flows()
            self._datapath.forget_missing_netns()
            self.attached = True

    def _attach_devices(self) -> None:
        self._datapath.attach_devices([*self.devices, *self._tunnels])

    def follow(self) -> None:
        """Interfaces or addresses have changed."""
        with self._lock:
            node, devices, found = self._found()
            were = [*self.devices, *self._tunnels]
            if (node.ip4, node.ip6) != (self.node.ip4, self.node.ip6):
                log.info("node addresses are now %s: loading the programs again", (node.ip4, node.ip6))
                with self._pods.lock:
                    self._datapath.load(node)
                if self.attached:
                    self._datapath.attach_sockets()
                    were = []
                    self._pods.attach_all()
            self._datapath.set_node_addresses(node)
            every = [*devices, *found]
            if self.attached and (every != were or not self._datapath.runs_on(every)):
                log.info("uplinks are now %s", ", ".join(name for name, _ in every) or "none")
                self._datapath.attach_devices(every)
            elif self.attached:
                self._datapath.follow_uplinks(devices)
            if self.attached:
                self._datapath.take_over_flows()
            self.node, self.devices, self._tunnels = node, devices, found  # after a failure all is to be done again

    def keep_filters(self) -> None:
        """Reverse path filters stay away from interfaces of pods, whoever sets them."""
        keep_filters(self._sysctls)
        drop_filters()

    # -- other nodes ----------------------------------------------------------------------------------------------

    def follow_routes(self, nodes: Sequence[Node], ranges: Sequence[IPNetwork]) -> None:
        """Tunnels, the programs on them, then what leads there. `ranges`: this node's pod ranges."""
        config = self._config
        settings = TunnelSettings(config.node_name, config.vxlan_vni, config.vxlan_port)
        with self._lock:
            plan = plan_routing(nodes, self._place(ranges), Routing(config.routing))
            found = make_tunnels(plan, settings, self._uplink_mtu(), self._netlink)
            if found != self._tunnels or not self._datapath.runs_on(found):
                self._tunnels = found
                self._attach_devices()
            failed = sync_routes(plan, ranges, self._netlink)
            self._routes = plan
            self._tunnels_checked = time.monotonic()
        unrouted = {**plan.problems, **failed}
        for cidr, reason in unrouted.items():
            if cidr not in self._unrouted:
                log.warning("no route to pods %s: %s", cidr, reason)
        self._unrouted = unrouted

    @property
    def routes_due(self) -> bool:
        """Whether it is time to look whether tunnels still lead where they should."""
        return bool(self._tunnels) and time.monotonic() - self._tunnels_checked > TUNNEL_CHECK_SECONDS

    def _place(self, ranges: Sequence[IPNetwork]) -> Place:
        """Where this node stands, as far as its kernel knows."""
        ours = {link.index for link in self._netlink.links() if is_tunnel(link)}
        addresses = [address for address in self._netlink.addresses() if address.ifindex not in ours]
        fallback = {address.version: address for address in map(ipaddress.ip_address, self.node.snat)}
        return Place(
            name=self._config.node_name,
            every=frozenset(address.ip for address in addresses),
            networks=tuple(address.interface.network for address in addresses if not address.ip.is_loopback),
            ranges=tuple(ranges),
            fallback={v: a for v, a in fallback.items() if any(a == address.ip for address in addresses)},
        )

    # -- facts ----------------------------------------------------------------------------------------------------

    def mtu(self) -> int:
        """MTU for a new pod: that of the uplinks, less what tunnels add where there are some."""
        present = {name for name, _ in self._tunnels}
        versions = {version for version, name in TUNNELS.items() if name in present}
        if not versions and self._config.routing == Routing.VXLAN:
            versions = {4 if self.node.ip4 else 6}
        return self._uplink_mtu() - max((OVERHEAD[version] for version in versions), default=0)

    def _uplink_mtu(self) -> int:
        """The smallest of the uplinks, 1500 without any."""
        sizes = []
        for _, ifindex in self.devices:
            try:
                sizes.append(self._netlink.link_by_index(ifindex).mtu)
            except NotFound:
                continue  # going away: the news of it are on their way
        return min(sizes, default=1500)

    def tunnels(self) -> dict[str, list[str]]:
        """The nodes that each tunnel interface leads to."""
        return {
            name: [peer.name for peer in self._routes.peers if TUNNELS[peer.at.version] == name]
            for name, _ in self._tunnels
        }

    def problems(self, own: Node | None, ranges: Sequence[IPNetwork]) -> list[Problem]:
        """What is in the way of reaching others. `own`: this node's object; `ranges`: its pod ranges."""
        found = [Problem(f"pod range {cidr}", reason) for cidr, reason in self._unrouted.items()]
        if own is None or not self._routes.peers:
            return found
        # answers to the node's source address come back through a tunnel only where other nodes know it as its own
        known = {str(address) for address in internal_addresses(own)}
        asked = [a for a in self.node.snat if not any(ipaddress.ip_address(a) in network for network in ranges)]
        return found + [
            Problem(
                f"node address {address}",
                "is not among the InternalIPs of this node's Node object: answers of pods behind tunnels may not come "
                "back to it. Set node-ip to one that is",
            )
            for address in asked
            if known and address not in known
        ]
