"""The interfaces by which a node is reached from outside, on which of them XDP works, and which interfaces are ours."""

from __future__ import annotations

from collections.abc import Iterable

from waggle.errors import KernelError
from waggle.kernel.netlink import ARPHRD_ETHER, Netlink
from waggle.kernel.netlink_wire import Link

POD_INTERFACE_PREFIX = "wag"
#: IP version of the network below → the tunnel interface over it. No pod's interface has such a name.
TUNNELS = {4: "waggle-vxlan4", 6: "waggle-vxlan6"}


def uplinks(configured: Iterable[str], addresses: Iterable[str], netlink: Netlink) -> list[tuple[str, int]]:
    """(name, ifindex) of the interfaces that serve NodePorts: those configured, or those with a default route or one
    of the node's SNAT `addresses`. KernelError names a configured interface that does not exist."""
    by_name = {link.name: link for link in netlink.links()}
    wanted = set(addresses)
    names = list(configured)
    for name in names:
        if name not in by_name:
            raise KernelError(f"devices: interface {name} does not exist")
        if by_name[name].type != ARPHRD_ETHER:
            raise KernelError(f"devices: {name} has no Ethernet header, which the programs on uplinks need")
    if not names:
        names = [name for name in netlink.default_route_devices() if name in by_name]
        indices = {link.index: link.name for link in by_name.values()}
        names += [indices[a.ifindex] for a in netlink.addresses() if str(a.ip) in wanted]
    # tunnels without an Ethernet header (WireGuard, tun, PPP) are left to the stack, loopback too
    # our own tunnels have programs too, but nobody comes in by them from outside
    return sorted(
        {
            (name, by_name[name].index)
            for name in names
            if by_name[name].type == ARPHRD_ETHER and name not in TUNNELS.values()
        }
    )


def xdp_uplinks(devices: Iterable[tuple[str, int]], links: Iterable[Link]) -> tuple[dict[int, bytes], dict[str, str]]:
    """Where XDP works, with the interface's MAC address by its index; and by name why it does not on the others.

    Not where VLANs are: cards take the tag off before XDP sees a packet, and it would look like one without.
    """
    by_index = {link.index: link for link in links}
    vlans = {link.peer_index: link.name for link in by_index.values() if link.kind == "vlan"}
    macs: dict[int, bytes] = {}
    rests: dict[str, str] = {}
    for name, index in devices:
        if index in vlans:
            rests[name] = f"no XDP, tc does all the work: VLAN {vlans[index]} is on it, whose packets XDP cannot tell"
        elif index in by_index:
            macs[index] = bytes.fromhex(by_index[index].mac.replace(":", ""))
    return macs, rests


def is_pod_interface(name: str) -> bool:
    """Whether an interface is the host side of a pod, by the name that CNI gives it."""
    digest = name.removeprefix(POD_INTERFACE_PREFIX)
    return name != digest and len(digest) == 11 and all(c in "0123456789abcdef" for c in digest)
