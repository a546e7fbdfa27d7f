"""The tunnel interfaces to nodes on other networks, and everything that stands on them.

One plain VXLAN interface for each family of addresses that packets are carried by, there only while some node needs
it. It learns nothing and floods nothing: of each node behind it there are one forwarding entry (the node's MAC address
→ its address on the network) and permanent neighbours, so that nothing is ever asked for.

A route to a node's pods leads to a gateway that is nowhere but in the neighbour table: the range's own network address,
which no pod ever has. A node's own addresses are reached through the tunnel by its peers' pods only, never by its peers
themselves, whose packets carry the tunnel: those routes stand in a table of their own, which rules have packets from
the pod ranges of this node ask.

Level-triggered: what is there is compared with what is wanted, whoever put it there.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from waggle.errors import KernelError
from waggle.kernel import netlink_wire as wire
from waggle.kernel.netlink import RTPROT_WAGGLE, Batch, IPAddress, IPNetwork, Link, Netlink, Route
from waggle.plan.routing import Peer, RoutePlan, tunnel_mac
from waggle.reconcile.uplinks import TUNNELS

log = logging.getLogger(__name__)

#: Bytes in front of a pod's packet: Ethernet, VXLAN, UDP and IP headers.
OVERHEAD = {4: 50, 6: 70}
#: Routes to the addresses of nodes behind tunnels, for pods. A number that nobody else is known to use.
TABLE = 11900
#: Of the rules that lead there: after the table of the node's own addresses (0), before all that is usual.
PRIORITY = 119


@dataclass(frozen=True, slots=True)
class TunnelSettings:
    """What all nodes must agree on."""

    node_name: str
    vni: int
    port: int


@dataclass(frozen=True, slots=True)
class _Way:
    """What a route must look like; `table` and `dst` name it."""

    table: int
    dst: IPNetwork
    ifindex: int
    via: IPAddress | None
    src: IPAddress | None = None
    onlink: bool = False

    @property
    def key(self) -> tuple[int, IPNetwork]:
        return self.table, self.dst

    def is_like(self, route: Route) -> bool:
        return (route.ifindex, route.via, route.src) == (self.ifindex, self.via, self.src)


def tunnels(links: Iterable[Link]) -> list[tuple[str, int]]:
    """(name, ifindex) of the tunnel interfaces among `links`."""
    return sorted((link.name, link.index) for link in links if is_tunnel(link))


def is_tunnel(link: Link) -> bool:
    """Whether an interface is one of ours."""
    return link.kind == "vxlan" and link.name in TUNNELS.values()


def version_of(link: Link) -> int:
    return next(version for version, name in TUNNELS.items() if name == link.name)


def make_tunnels(plan: RoutePlan, settings: TunnelSettings, mtu: int, netlink: Netlink) -> list[tuple[str, int]]:
    """Makes the interfaces that nodes need, and takes those away that none does. Returns (name, ifindex) of those
    that are there now; a new one is down, so that programs can be put on it first. `mtu`: of the network.
    """
    present = {link.name: link for link in netlink.links()}
    needed = {peer.at.version for peer in plan.peers}
    mac = tunnel_mac(settings.node_name)
    for version, name in TUNNELS.items():
        link = present.get(name)
        local = plan.own.get(version)
        if version not in needed or local is None:
            if link is not None and is_tunnel(link):
                _delete_link(netlink, link)
                log.info("removed the tunnel interface %s: no node needs it", name)
            continue
        size = mtu - OVERHEAD[version]
        batch = Batch()
        if link is not None and not _can_stay(link, settings, mac):
            _delete_link(netlink, link)
            link = None
        if link is None:
            batch.create_vxlan(name, vni=settings.vni, local=local, port=settings.port, mac=mac, mtu=size)
            log.info("made the tunnel interface %s: UDP port %d from %s", name, settings.port, local)
        else:
            if link.vxlan is not None and link.vxlan.local != local:
                batch.set_vxlan_local(link.index, local)
                log.info("the tunnel interface %s sends from %s now", name, local)
            if link.mtu != size:
                batch.set_link(link.index, mtu=size)
        netlink.run(batch)
    return tunnels(netlink.links())


def _can_stay(link: Link, settings: TunnelSettings, mac: str) -> bool:
    """Other things than these cannot be changed while an interface exists."""
    vxlan = link.vxlan
    return (
        vxlan is not None
        and (vxlan.vni, vxlan.port, vxlan.learning) == (settings.vni, settings.port, False)
        and vxlan.local is not None
        and vxlan.local.version == version_of(link)
        and link.mac == mac
    )


def _delete_link(netlink: Netlink, link: Link) -> None:
    batch = Batch()
    batch.delete_link(link.index, missing_ok=True)
    netlink.run(batch)


def sync_routes(plan: RoutePlan, own_ranges: Iterable[IPNetwork], netlink: Netlink) -> dict[IPNetwork, str]:
    """Makes routes, neighbours, forwarding entries and rules what is wanted. The tunnel interfaces must be there.

    Returns the pod ranges that no way leads to, and why.
    """
    own_ranges = list(own_ranges)
    state = _Kernel(netlink)
    failed: dict[IPNetwork, str] = {}
    sources = _sources(plan, own_ranges)
    state.sync_addresses(sources.values(), plan.own.values())
    wanted: set[tuple[int, IPNetwork]] = set()
    for route in plan.native:
        ifindex = state.device_towards(route.via)
        way = _Way(wire.RT_TABLE_MAIN, route.dst, ifindex, route.via)
        wanted.add(way.key)
        try:
            if not ifindex:
                raise KernelError(f"node address {route.via} is on no network of this node any more")
            state.apply([way])
        except KernelError as error:
            failed[route.dst] = str(error)
    for peer in plan.peers:
        ifindex = state.tunnel_of(peer)
        ways = _ways_to(peer, ifindex, sources)
        wanted.update(way.key for way in ways)
        try:
            if not ifindex:
                raise KernelError(f"the tunnel interface {TUNNELS[peer.at.version]} is missing")
            state.apply_peer(peer, ifindex, ways)
        except KernelError as error:
            failed |= dict.fromkeys(peer.ranges, f"node {peer.name}: {error}")
    state.remove_routes(wanted)
    state.remove_entries(plan.peers)
    state.sync_rules(own_ranges if any(peer.addresses for peer in plan.peers) else [])
    return failed


def _sources(plan: RoutePlan, own_ranges: Iterable[IPNetwork]) -> dict[int, IPAddress]:
    """IP version → the source address of what this node itself sends to pods behind tunnels.

    The node's own, to which its peers' pods answer through the tunnel. Of a family that it has no address of, the
    network address of its pod range: peers know the way there.
    """
    found = dict(plan.own)
    for cidr in own_ranges:
        found.setdefault(cidr.version, cidr.network_address)
    return found if plan.peers else {}


def _ways_to(peer: Peer, ifindex: int, sources: Mapping[int, IPAddress]) -> list[_Way]:
    ways = [
        _Way(wire.RT_TABLE_MAIN, cidr, ifindex, cidr.network_address, sources.get(cidr.version), onlink=True)
        for cidr in peer.ranges
    ]
    return ways + [_Way(TABLE, ipaddress.ip_network(address), ifindex, None) for address in peer.addresses]


def _neighbours_of(peer: Peer) -> set[IPAddress]:
    return {*(cidr.network_address for cidr in peer.ranges), *peer.addresses}


class _Kernel:
    """What is there, read once; changed where it is not as wanted."""

    def __init__(self, netlink: Netlink) -> None:
        self._netlink = netlink
        links = netlink.links()
        self._tunnels = {version_of(link): link for link in links if is_tunnel(link)}
        indices = {link.index for link in self._tunnels.values()}
        self._addresses = netlink.addresses()
        self._networks = [(a.interface.network, a.ifindex) for a in self._addresses if a.ifindex not in indices]
        self._routes: dict[tuple[int, IPNetwork], list[Route]] = {}
        for route in netlink.routes(table=None, protocol=RTPROT_WAGGLE):
            # those without a gateway lead to pods of this node, and are CNI's
            if route.table == TABLE or (route.table == wire.RT_TABLE_MAIN and route.via is not None):
                self._routes.setdefault((route.table, route.dst), []).append(route)
        self._neighbours = {
            index: {entry.ip: entry.mac for entry in netlink.neighbours(index) if entry.permanent} for index in indices
        }
        self._fdb = {index: {(entry.mac, entry.dst) for entry in netlink.fdb(index)} for index in indices}

    def device_towards(self, address: IPAddress) -> int:
        """The interface whose network an address is on; 0: none."""
        return next((index for network, index in self._networks if address in network), 0)

    def tunnel_of(self, peer: Peer) -> int:
        link = self._tunnels.get(peer.at.version)
        return link.index if link is not None else 0

    def sync_addresses(self, sources: Iterable[IPAddress], own: Iterable[IPAddress]) -> None:
        """Source addresses that no other interface has stand on a tunnel interface, which also comes up here."""
        own = set(own)
        wanted = {address for address in sources if address not in own}
        batch = Batch()
        for link in self._tunnels.values():
            if not link.up:
                batch.set_link(link.index, ipv6_link_local=False)  # not with the next, which would make one
                batch.set_link(link.index, up=True)
            for address in self._addresses:
                if address.ifindex == link.index and not address.ip.is_link_local:
                    if address.ip in wanted:
                        wanted.discard(address.ip)
                    else:
                        batch.delete_address(link.index, address.interface, missing_ok=True)
        if self._tunnels:
            first = self._tunnels[min(self._tunnels)].index
            for ip in wanted:
                batch.add_address(first, ipaddress.ip_interface(ip), nodad=True, exist_ok=True)
        self._netlink.run(batch)

    def apply(self, ways: Iterable[_Way]) -> None:
        batch = Batch()
        self._add_routes(batch, ways)
        self._netlink.run(batch)

    def apply_peer(self, peer: Peer, ifindex: int, ways: Iterable[_Way]) -> None:
        """All of one node: neighbours and forwarding first, so that no packet is asked about."""
        batch = Batch()
        if (peer.mac, peer.at) not in self._fdb[ifindex]:
            batch.add_fdb(ifindex, peer.mac, peer.at)
        known = self._neighbours[ifindex]
        for ip in _neighbours_of(peer):
            if known.get(ip) != peer.mac:
                batch.add_neighbour(ifindex, ip, peer.mac)
        self._add_routes(batch, ways)
        self._netlink.run(batch)

    def _add_routes(self, batch: Batch, ways: Iterable[_Way]) -> None:
        for way in ways:
            there = self._routes.get(way.key, [])
            if not any(way.is_like(route) for route in there):
                batch.add_route(
                    way.dst,
                    dev=way.ifindex,
                    via=way.via,
                    src=way.src,
                    onlink=way.onlink,
                    table=way.table,
                    replace=True,
                )
            # what an earlier agent left beside it, by another interface or gateway
            for route in there:
                if (route.ifindex, route.via) != (way.ifindex, way.via):
                    _delete_route(batch, route)

    def remove_routes(self, wanted: set[tuple[int, IPNetwork]]) -> None:
        batch = Batch()
        for key, there in self._routes.items():
            if key not in wanted:
                for route in there:
                    _delete_route(batch, route)
        self._netlink.run(batch)

    def remove_entries(self, peers: Iterable[Peer]) -> None:
        """Neighbours and forwarding entries of nodes that are gone, or elsewhere."""
        peers = list(peers)
        batch = Batch()
        for version, link in self._tunnels.items():
            here = [peer for peer in peers if peer.at.version == version]
            ips = set(chain.from_iterable(_neighbours_of(peer) for peer in here))
            for ip in self._neighbours[link.index].keys() - ips:
                batch.delete_neighbour(link.index, ip, missing_ok=True)
            macs = {peer.mac for peer in here}
            for mac, dst in self._fdb[link.index]:
                if mac not in macs:
                    batch.delete_fdb(link.index, mac, dst, missing_ok=True)
        self._netlink.run(batch)

    def sync_rules(self, ranges: Iterable[IPNetwork]) -> None:
        """Packets from these ranges ask our table."""
        present = {rule.src: rule for rule in self._netlink.rules(protocol=RTPROT_WAGGLE)}
        wanted = set(ranges)
        batch = Batch()
        for src, rule in present.items():
            if src is not None and (src not in wanted or (rule.table, rule.priority) != (TABLE, PRIORITY)):
                batch.delete_rule(src, table=rule.table, priority=rule.priority, missing_ok=True)
        for src in wanted:
            if src not in present or (present[src].table, present[src].priority) != (TABLE, PRIORITY):
                batch.add_rule(src, table=TABLE, priority=PRIORITY)
        self._netlink.run(batch)


def _delete_route(batch: Batch, route: Route) -> None:
    batch.delete_route(
        route.dst, dev=route.ifindex or None, via=route.via, table=route.table, metric=route.metric, missing_ok=True
    )
