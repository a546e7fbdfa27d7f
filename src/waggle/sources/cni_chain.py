"""A pod's interface that an earlier plugin of the chain made: found and looked at, never changed.

waggle takes part in a chain when `prevResult` names an interface CNI_IFNAME in a sandbox, which it would otherwise have
to make. It then gives the pod Services, host ports and limits, and leaves addresses, routes and the interface itself to
the plugin that made them. The host side is found as the peer of the pod's: results name it in ways of their own, or not
at all.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from waggle.errors import CniError, NotFound
from waggle.kernel.netlink import Link, Netlink
from waggle.kernel.netns import call_in_netns_fd
from waggle.sources.cni_records import Attachment
from waggle.sources.cni_request import INVALID_CONFIG, CniRequest
from waggle.sources.cni_result import list_of
from waggle.sources.ipam import IPAddress


def addresses_made_before(request: CniRequest) -> tuple[IPAddress, ...] | None:
    """Of the interface CNI_IFNAME, as an earlier plugin of the chain made it; None: it is for this one to make.
    Raises CniError (7)."""
    result = request.prev_result or {}
    interfaces = list_of(result, "interfaces")
    mine = [n for n, entry in enumerate(interfaces) if entry.get("name") == request.ifname and entry.get("sandbox")]
    if not mine:
        return None
    found = []
    for entry in list_of(result, "ips"):
        # one without an interface belongs to the only one that there is
        if entry.get("interface", mine[0]) in mine:
            try:
                found.append(ipaddress.ip_interface(str(entry.get("address"))).ip)
            except ValueError as error:
                raise CniError(INVALID_CONFIG, f"prevResult.ips: {error}") from error
    if not found:
        raise CniError(
            INVALID_CONFIG, f"prevResult.ips: {request.ifname} was made by an earlier plugin, without address"
        )
    return tuple(dict.fromkeys(found))


def find_pair(host: Netlink, request: CniRequest, netns_fd: int) -> tuple[Link, Link]:
    """(host side, pod's side) of an interface that exists. Raises CniError (7) where it is no veth pair."""
    pod_side = call_in_netns_fd(netns_fd, lambda: _link(request.ifname), name=request.netns)
    if pod_side is None:
        raise CniError(INVALID_CONFIG, f"prevResult: {request.netns} has no interface {request.ifname}")
    try:
        host_side = host.link_by_index(pod_side.peer_index) if pod_side.kind == "veth" else None
    except NotFound:
        host_side = None
    if host_side is None or host_side.kind != "veth" or host_side.peer_index != pod_side.index:
        what = pod_side.kind or "device"
        message = f"{request.ifname} is a {what} and no veth pair that ends on this node: it cannot be chained upon"
        raise CniError(INVALID_CONFIG, message)
    return host_side, pod_side


def host_sides(host: Netlink, records: Iterable[Attachment]) -> dict[str, Link]:
    """Those of chained records that are there, by the name of the record."""
    links = {link.name: link for link in host.links() if link.kind == "veth"}
    found = {}
    for record in records:
        link = links.get(record.chained_to)
        if link is not None and link.mac == record.host_mac:
            found[record.host_ifname] = link
    return found


def faults_of_chained(host: Netlink, record: Attachment, netns_fd: int) -> list[str]:
    """What differs from when it was taken over, as sentences. Addresses and routes are the other plugin's to check."""
    link = host_sides(host, [record]).get(record.host_ifname)
    if link is None:
        return [f"host interface {record.chained_to} does not exist, or is another one"]
    pod_side = call_in_netns_fd(netns_fd, lambda: _link(record.ifname), name=record.netns)
    if pod_side is None:
        return [f"the pod has no interface {record.ifname}"]
    if (pod_side.peer_index, pod_side.mac) != (link.index, record.pod_mac):
        return [f"the pod's interface {record.ifname} is not the peer of {link.name}"]
    return []


def _link(name: str) -> Link | None:
    """Runs inside the pod's namespace."""
    with Netlink() as pod:
        try:
            return pod.link_by_name(name)
        except NotFound:
            return None
