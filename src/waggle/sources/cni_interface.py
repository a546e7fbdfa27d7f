"""The interface of a pod: a veth pair, its addresses, routes and neighbours, made, looked at and removed.

A pod's addresses are /32 and /128: nothing is on its link but the gateway, whose MAC is written down on both sides.
So no ARP or neighbour discovery is ever needed between pod and node, and no duplicate address detection delays it.
The agent's own network namespace holds the host side; `host` is a socket there.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
from collections.abc import Iterable
from pathlib import Path

from waggle.errors import KernelError, NotFound
from waggle.kernel.netlink import RTPROT_WAGGLE, Batch, IPAddress, IPInterface, Link, Netlink
from waggle.kernel.netns import call_in_netns_fd
from waggle.sources.cni_records import Attachment, is_host_ifname

logger = logging.getLogger(__name__)

#: What a pod sees as its gateway. Never on the wire: only the MAC beside it matters.
GATEWAY4 = ipaddress.IPv4Address("169.254.1.1")
GATEWAY6 = ipaddress.IPv6Address("fe80::1")

_LOOPBACK = 1  # the index of "lo" in every namespace
_SYSCTL = Path("/proc/sys/net/ipv6/conf")


def gateway_of(address: IPAddress) -> IPAddress:
    return GATEWAY4 if address.version == 4 else GATEWAY6


def default_route_of(address: IPAddress) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network("0.0.0.0/0" if address.version == 4 else "::/0")


def create_interface(host: Netlink, record: Attachment, netns_fd: int, mtu: int) -> int:
    """Make it all; the index of the host side. A leftover of an earlier attempt is replaced.

    Raises KernelError; what was made until then has been removed again.
    """
    _create_pair(host, record, netns_fd, mtu)
    try:
        link = host.link_by_name(record.host_ifname)
        call_in_netns_fd(netns_fd, lambda: _configure_pod_side(record, link), name=record.netns)
        _configure_host_side(host, record, link.index)
    except KernelError:
        remove_interface(host, record.host_ifname)
        raise
    return link.index


def _create_pair(host: Netlink, record: Attachment, netns_fd: int, mtu: int) -> None:
    batch = Batch()
    batch.create_veth(
        record.host_ifname,
        mac=record.host_mac,
        peer_name=record.ifname,
        peer_mac=record.pod_mac,
        peer_netns_fd=netns_fd,
        mtu=mtu,
    )
    for attempt in (1, 2):
        try:
            host.run(batch)
            return
        except KernelError as error:
            if error.errno != errno.EEXIST:
                raise
            if attempt == 2 or not remove_interface(host, record.host_ifname):
                message = f"{record.netns} has an interface {record.ifname} already"
                raise KernelError(message, errno.EEXIST) from error


def _configure_pod_side(record: Attachment, host_side: Link) -> None:
    """Runs inside the pod's namespace."""
    index = host_side.peer_index
    addresses = record.ips
    dual = any(address.version == 6 for address in addresses)
    if dual:
        _allow_ipv6("lo")
        _allow_ipv6(record.ifname)
        _write_sysctl(_SYSCTL / record.ifname / "accept_ra", "0")
    batch = Batch()
    batch.set_link(_LOOPBACK, up=True)
    batch.set_link(index, up=True, ipv6_link_local=not dual)
    if dual:
        batch.add_address(index, _link_local(record.pod_mac), nodad=True)
    for address in addresses:
        batch.add_address(index, _host_prefix(address), nodad=True)
        batch.add_neighbour(index, gateway_of(address), record.host_mac)
        # Another network may have given this pod a default route before: the specification lets that one stand.
        batch.add_route(default_route_of(address), via=gateway_of(address), dev=index, onlink=True, exist_ok=True)
    with Netlink() as pod:
        pod.run(batch)


def _configure_host_side(host: Netlink, record: Attachment, index: int) -> None:
    batch = Batch()
    batch.set_link(index, up=True, ipv6_link_local=False)
    for address in record.ips:
        batch.add_route(_host_prefix(address).network, dev=index, replace=True)
        batch.add_neighbour(index, address, record.pod_mac)
    host.run(batch)


def remove_interface(host: Netlink, name: str) -> bool:
    """Remove the pair; the kernel removes its addresses, routes and neighbours with it. False: there was none."""
    batch = Batch()
    batch.delete_link(name)
    try:
        host.run(batch)
    except NotFound:
        return False
    return True


def faults_of_interface(
    host: Netlink, record: Attachment, netns_fd: int, *, default_routes: Iterable[IPAddress]
) -> list[str]:
    """What differs from the record, as sentences; empty when everything is as it was made.

    `default_routes`: addresses whose family must have its default route through this interface.
    """
    try:
        link = host.link_by_name(record.host_ifname)
    except NotFound:
        return [f"host interface {record.host_ifname} does not exist"]
    faults = _host_faults(host, record, link)
    wanted = tuple(default_routes)
    return faults + call_in_netns_fd(netns_fd, lambda: _pod_faults(record, link, wanted), name=record.netns)


def _host_faults(host: Netlink, record: Attachment, link: Link) -> list[str]:
    faults = []
    if link.kind != "veth" or link.mac != record.host_mac:
        faults.append(f"host interface {link.name} is a {link.kind or 'device'} with MAC {link.mac}, not the one made")
    if not link.up:
        faults.append(f"host interface {link.name} is down")
    routes = {(route.dst, route.ifindex) for route in host.routes(protocol=RTPROT_WAGGLE)}
    neighbours = {entry.ip: entry for entry in host.neighbours(link.index)}
    for address in record.ips:
        if (_host_prefix(address).network, link.index) not in routes:
            faults.append(f"the host has no route to {address} through {link.name}")
        entry = neighbours.get(address)
        if entry is None or entry.mac != record.pod_mac or not entry.permanent:
            faults.append(f"the host's neighbour entry for {address} is missing or wrong")
    return faults


def _pod_faults(record: Attachment, host_side: Link, default_routes: tuple[IPAddress, ...]) -> list[str]:
    """Runs inside the pod's namespace."""
    with Netlink() as pod:
        try:
            link = pod.link_by_name(record.ifname)
        except NotFound:
            return [f"the pod has no interface {record.ifname}"]
        faults = []
        if link.index != host_side.peer_index or link.peer_index != host_side.index or link.mac != record.pod_mac:
            faults.append(f"the pod's interface {record.ifname} is not the peer of {host_side.name}")
        if not link.up:
            faults.append(f"the pod's interface {record.ifname} is down")
        present = {address.interface for address in pod.addresses(link.index)}
        neighbours = {entry.ip: entry for entry in pod.neighbours(link.index)}
        routes = {(route.dst, route.ifindex, route.via) for route in pod.routes()}
    for address in record.ips:
        gateway = gateway_of(address)
        if _host_prefix(address) not in present:
            faults.append(f"the pod's interface {record.ifname} lacks address {address}")
        entry = neighbours.get(gateway)
        if entry is None or entry.mac != record.host_mac or not entry.permanent:
            faults.append(f"the pod's neighbour entry for its gateway {gateway} is missing or wrong")
        if address in default_routes and (default_route_of(address), link.index, gateway) not in routes:
            faults.append(f"the pod has no default route via {gateway}")
    return faults


def host_interfaces(host: Netlink) -> dict[str, Link]:
    """All host sides that exist, by name: those of recorded pods and those nobody remembers."""
    return {link.name: link for link in host.links() if link.kind == "veth" and is_host_ifname(link.name)}


def routed_addresses(host: Netlink) -> dict[str, list[IPAddress]]:
    """Addresses in use according to the kernel, by host interface: the truth where a record was lost."""
    names = {link.index: name for name, link in host_interfaces(host).items()}
    found: dict[str, list[IPAddress]] = {}
    for route in host.routes(protocol=RTPROT_WAGGLE):
        if route.ifindex in names and route.dst.prefixlen == route.dst.max_prefixlen:
            found.setdefault(names[route.ifindex], []).append(route.dst.network_address)
    return found


def _host_prefix(address: IPAddress) -> IPInterface:
    return ipaddress.ip_interface(address)


def _link_local(mac: str) -> IPInterface:
    """What the kernel would make of the MAC (RFC 4291 appendix A), but without waiting for duplicates."""
    raw = bytes.fromhex(mac.replace(":", ""))
    identifier = bytes([raw[0] ^ 0x02]) + raw[1:3] + b"\xff\xfe" + raw[3:]
    return ipaddress.IPv6Interface((b"\xfe\x80" + bytes(6) + identifier, 64))


def _allow_ipv6(name: str) -> None:
    # Some runtimes create namespaces with IPv6 switched off.
    _write_sysctl(_SYSCTL / name / "disable_ipv6", "0")


def _write_sysctl(file: Path, value: str) -> None:
    try:
        with file.open("r+") as stream:
            if stream.read().strip() != value:
                stream.seek(0)
                stream.write(value)
    except OSError as error:
        # Not fatal by itself: without IPv6 the address that follows is refused, with the kernel's reason.
        logger.warning("cannot set %s to %s: %s", file, value, error.strerror)
