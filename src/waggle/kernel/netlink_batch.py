"""Requests to rtnetlink, collected so that one system call carries them all.

A `Batch` only builds bytes; `Netlink.run` sends them and checks every acknowledgement. The kernel works through a
batch in order and goes on after a failed request: put requests into one batch only where that is harmless.
Each request remembers a sentence about itself, which is what an error shows.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from waggle.kernel import netlink_wire as wire
from waggle.kernel.netlink_wire import RTPROT_WAGGLE, IPAddress, IPInterface, IPNetwork

#: "It is not there", in the words of links (ENODEV), addresses (EADDRNOTAVAIL), routes (ESRCH), neighbours (ENOENT).
MISSING = frozenset({errno.ENODEV, errno.ENXIO, errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL})
_EXISTS = frozenset({errno.EEXIST})
_NONE: frozenset[int] = frozenset()
_CREATE = wire.NLM_F_CREATE | wire.NLM_F_EXCL
_REPLACE = wire.NLM_F_CREATE | wire.NLM_F_REPLACE


@dataclass(frozen=True, slots=True)
class Request:
    """One netlink message without its header. Error numbers in `tolerated` count as success."""

    kind: int
    flags: int
    body: bytes
    what: str
    tolerated: frozenset[int]


class Batch:
    """Collects requests; `link` arguments take an interface's index or its name."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __len__(self) -> int:
        return len(self.requests)

    def _add(self, kind: int, flags: int, body: bytes, what: str, tolerated: frozenset[int] = _NONE) -> None:
        self.requests.append(Request(kind, flags, body, what, tolerated))

    def create_veth(
        self,
        name: str,
        *,
        peer_name: str,
        peer_netns_fd: int | None = None,
        mac: str | None = None,
        peer_mac: str | None = None,
        mtu: int = 0,
        txqueuelen: int | None = None,
        up: bool = False,
    ) -> None:
        """A veth pair; `mtu` (0: the kernel's default) and `txqueuelen` hold for both ends. EEXIST if `name` exists.

        The peer comes into being first, so it cannot be up at once (ENOTCONN): set it up afterwards.
        """
        mine = _link_attributes(name=name, mac=mac, mtu=mtu, txqueuelen=txqueuelen)
        theirs = _link_attributes(name=peer_name, mac=peer_mac, mtu=mtu, txqueuelen=txqueuelen, netns_fd=peer_netns_fd)
        peer = wire.attribute(wire.VETH_INFO_PEER | 0x8000, _ifinfo(0, None) + theirs)
        info = wire.nested(
            wire.IFLA_LINKINFO, wire.text(wire.IFLA_INFO_KIND, "veth"), wire.nested(wire.IFLA_INFO_DATA, peer)
        )
        body = _ifinfo(0, up or None) + mine + info
        self._add(wire.RTM_NEWLINK, _CREATE, body, f"create veth {name} with peer {peer_name}")

    def create_link(self, name: str, kind: str, *, mac: str | None = None, mtu: int = 0, up: bool = False) -> None:
        """A link of a kind that needs no parameters ("bridge", "ifb"). EEXIST if `name` exists."""
        info = wire.nested(wire.IFLA_LINKINFO, wire.text(wire.IFLA_INFO_KIND, kind))
        body = _ifinfo(0, up or None) + _link_attributes(name=name, mac=mac, mtu=mtu) + info
        self._add(wire.RTM_NEWLINK, _CREATE, body, f"create {kind} {name}")

    def create_vxlan(
        self, name: str, *, vni: int, local: IPAddress, port: int, mac: str | None = None, mtu: int = 0
    ) -> None:
        """A VXLAN interface that sends from `local`, learns nothing and floods nothing: it knows what
        `add_fdb` says. It comes without an IPv6 link-local address. EEXIST if `name` exists, or one like it.
        """
        local_kind = wire.IFLA_VXLAN_LOCAL if local.version == 4 else wire.IFLA_VXLAN_LOCAL6
        data = wire.nested(
            wire.IFLA_INFO_DATA,
            wire.u32(wire.IFLA_VXLAN_ID, vni),
            wire.attribute(local_kind, local.packed),
            wire.attribute(wire.IFLA_VXLAN_PORT, port.to_bytes(2, "big")),
            wire.attribute(wire.IFLA_VXLAN_LEARNING, b"\0"),
        )
        info = wire.nested(wire.IFLA_LINKINFO, wire.text(wire.IFLA_INFO_KIND, "vxlan"), data)
        body = _ifinfo(0, None) + _link_attributes(name=name, mac=mac, mtu=mtu) + info
        what = f"create VXLAN interface {name} (VNI {vni}, UDP port {port}, from {local})"
        self._add(wire.RTM_NEWLINK, _CREATE, body, what)

    def set_vxlan_local(self, link: int, local: IPAddress) -> None:
        """The address that a VXLAN interface sends from; of the same family as before."""
        local_kind = wire.IFLA_VXLAN_LOCAL if local.version == 4 else wire.IFLA_VXLAN_LOCAL6
        data = wire.nested(wire.IFLA_INFO_DATA, wire.attribute(local_kind, local.packed))
        info = wire.nested(wire.IFLA_LINKINFO, wire.text(wire.IFLA_INFO_KIND, "vxlan"), data)
        self._add(wire.RTM_NEWLINK, 0, _ifinfo(link, None) + info, f"set the address of VXLAN interface {link}")

    def set_link(
        self,
        link: int | str,
        *,
        up: bool | None = None,
        name: str | None = None,
        mac: str | None = None,
        mtu: int = 0,
        master: int | None = None,
        txqueuelen: int | None = None,
        netns_fd: int | None = None,
        ipv6_link_local: bool = True,
    ) -> None:
        """Change what is given. `master` 0 takes it out of its bridge; `name` renames (`link` must be an index then).

        `ipv6_link_local` False: the kernel makes no link-local address when the link comes up, so there is no
        duplicate address detection to wait for.
        """
        if name is not None and isinstance(link, str):
            raise ValueError(f"renaming {link} needs its index: rtnetlink finds by name or renames, not both")
        attrs = _link_attributes(name=name, mac=mac, mtu=mtu, txqueuelen=txqueuelen, master=master, netns_fd=netns_fd)
        if not ipv6_link_local:
            mode = wire.attribute(wire.IFLA_INET6_ADDR_GEN_MODE, bytes([wire.IN6_ADDR_GEN_MODE_NONE]))
            attrs += wire.nested(wire.IFLA_AF_SPEC, wire.nested(wire.AF_INET6, mode))
        self._add(wire.RTM_SETLINK, 0, _ifinfo_of(link, up) + attrs, f"change link {link}")

    def delete_link(self, link: int | str, *, missing_ok: bool = False) -> None:
        tolerated = MISSING if missing_ok else _NONE
        self._add(wire.RTM_DELLINK, 0, _ifinfo_of(link, None), f"delete link {link}", tolerated)

    def add_address(self, ifindex: int, address: IPInterface, *, nodad: bool = False, exist_ok: bool = False) -> None:
        """`nodad`: IPv6 only; the address is usable at once."""
        body = _address_body(ifindex, address)
        if nodad and address.version == 6:
            body += wire.u32(wire.IFA_FLAGS, wire.IFA_F_NODAD)
        what = f"add address {address} to interface {ifindex}"
        self._add(wire.RTM_NEWADDR, _CREATE, body, what, _EXISTS if exist_ok else _NONE)

    def delete_address(self, ifindex: int, address: IPInterface, *, missing_ok: bool = False) -> None:
        what = f"delete address {address} of interface {ifindex}"
        tolerated = MISSING if missing_ok else _NONE
        self._add(wire.RTM_DELADDR, 0, _address_body(ifindex, address), what, tolerated)

    def add_route(
        self,
        dst: IPNetwork,
        *,
        dev: int | None = None,
        via: IPAddress | None = None,
        src: IPAddress | None = None,
        onlink: bool = False,
        scope: int | None = None,
        protocol: int = RTPROT_WAGGLE,
        table: int = wire.RT_TABLE_MAIN,
        metric: int = 0,
        mtu: int = 0,
        kind: int = wire.RTN_UNICAST,
        replace: bool = False,
        exist_ok: bool = False,
    ) -> None:
        """A route to `dst`. Scope defaults to link without a gateway and to universe with one."""
        if via is not None and via.version != dst.version:
            raise ValueError(f"route to {dst} via {via}: gateway of the other address family")
        if scope is None:
            scope = wire.RT_SCOPE_LINK if via is None and kind == wire.RTN_UNICAST else wire.RT_SCOPE_UNIVERSE
        flags = wire.RTNH_F_ONLINK if onlink else 0
        body = _route_header(dst, table, protocol, scope, kind, flags)
        body += _route_attributes(dst, dev, via, src, table, metric)
        if mtu:
            body += wire.nested(wire.RTA_METRICS, wire.u32(wire.RTAX_MTU, mtu))
        what = f"{'replace' if replace else 'add'} route to {dst}{_where(dev, via, table)}"
        tolerated = _EXISTS if exist_ok else _NONE
        self._add(wire.RTM_NEWROUTE, _REPLACE if replace else _CREATE, body, what, tolerated)

    def delete_route(
        self,
        dst: IPNetwork,
        *,
        dev: int | None = None,
        via: IPAddress | None = None,
        protocol: int = RTPROT_WAGGLE,
        table: int = wire.RT_TABLE_MAIN,
        metric: int = 0,
        missing_ok: bool = False,
    ) -> None:
        """The route to `dst` that fits everything given; `protocol` 0 means any."""
        body = _route_header(dst, table, protocol, wire.RT_SCOPE_NOWHERE, 0, 0)
        body += _route_attributes(dst, dev, via, None, table, metric)
        what = f"delete route to {dst}{_where(dev, via, table)}"
        self._add(wire.RTM_DELROUTE, 0, body, what, MISSING if missing_ok else _NONE)

    def add_neighbour(self, ifindex: int, ip: IPAddress, mac: str) -> None:
        """A permanent entry, replacing what is there."""
        body = wire.NDMSG.pack(wire.family_of(ip), ifindex, wire.NUD_PERMANENT, 0, 0)
        body += wire.attribute(wire.NDA_DST, ip.packed) + wire.attribute(wire.NDA_LLADDR, wire.mac_bytes(mac))
        self._add(wire.RTM_NEWNEIGH, _REPLACE, body, f"add neighbour {ip} at {mac} on interface {ifindex}")

    def delete_neighbour(self, ifindex: int, ip: IPAddress, *, missing_ok: bool = False) -> None:
        body = wire.NDMSG.pack(wire.family_of(ip), ifindex, 0, 0, 0) + wire.attribute(wire.NDA_DST, ip.packed)
        what = f"delete neighbour {ip} of interface {ifindex}"
        self._add(wire.RTM_DELNEIGH, 0, body, what, MISSING if missing_ok else _NONE)

    def add_fdb(self, ifindex: int, mac: str, dst: IPAddress) -> None:
        """A VXLAN interface sends packets to `mac` to the machine at `dst`, and no longer to another one."""
        body = wire.NDMSG.pack(wire.AF_BRIDGE, ifindex, wire.NUD_PERMANENT, wire.NTF_SELF, 0)
        body += wire.attribute(wire.NDA_LLADDR, wire.mac_bytes(mac)) + wire.attribute(wire.NDA_DST, dst.packed)
        self._add(wire.RTM_NEWNEIGH, _REPLACE, body, f"send packets to {mac} on interface {ifindex} to {dst}")

    def delete_fdb(self, ifindex: int, mac: str, dst: IPAddress | None, *, missing_ok: bool = False) -> None:
        body = wire.NDMSG.pack(wire.AF_BRIDGE, ifindex, 0, wire.NTF_SELF, 0)
        body += wire.attribute(wire.NDA_LLADDR, wire.mac_bytes(mac))
        if dst is not None:
            body += wire.attribute(wire.NDA_DST, dst.packed)
        what = f"delete the forwarding entry of {mac} on interface {ifindex}"
        self._add(wire.RTM_DELNEIGH, 0, body, what, MISSING if missing_ok else _NONE)

    def add_rule(self, src: IPNetwork, *, table: int, priority: int) -> None:
        """Packets from `src` ask `table`; nothing where there is such a rule already."""
        what = f"add rule for packets from {src} to ask table {table}"
        self._add(wire.RTM_NEWRULE, _CREATE, _rule_body(src, table, priority), what, _EXISTS)

    def delete_rule(self, src: IPNetwork, *, table: int, priority: int, missing_ok: bool = False) -> None:
        what = f"delete rule for packets from {src} to ask table {table}"
        tolerated = MISSING if missing_ok else _NONE
        self._add(wire.RTM_DELRULE, 0, _rule_body(src, table, priority), what, tolerated)

    def run_programs(self, ifindex: int, *, ingress: tuple[str, int], egress: tuple[str, int]) -> None:
        """Programs (name, descriptor) run on what comes in and goes out by an interface, in place of those that did.

        By a clsact queue: its kernel code does not wait for a grace period of RCU, as tcx does, and tcx programs come
        before it.
        """
        head = wire.TCMSG.pack(wire.AF_UNSPEC, 0, 0, ifindex, 0xFFFF0000, wire.TC_H_CLSACT, 0)
        body = head + wire.text(wire.TCA_KIND, "clsact")
        self._add(wire.RTM_NEWQDISC, _CREATE, body, f"add a clsact queue to interface {ifindex}", _EXISTS)
        for head, (name, program) in zip(_filter_heads(ifindex), (ingress, egress), strict=True):
            options = wire.nested(
                wire.TCA_OPTIONS,
                wire.u32(wire.TCA_BPF_FD, program),
                wire.text(wire.TCA_BPF_NAME, name),
                wire.u32(wire.TCA_BPF_FLAGS, wire.TCA_BPF_FLAG_ACT_DIRECT),
            )
            self._add(wire.RTM_NEWTFILTER, _REPLACE, head + options, f"run {name} on interface {ifindex}")

    def stop_programs(self, ifindex: int) -> None:
        """Takes away what `run_programs` has put there; nothing where there is nothing. The queue stays, empty: without
        it, the kernel would stop the interface for a moment, and drop what is sent by it."""
        tolerated = MISSING | {errno.EINVAL}  # EINVAL: no such queue
        for head in _filter_heads(ifindex):
            self._add(wire.RTM_DELTFILTER, 0, head, f"stop programs on interface {ifindex}", tolerated)

    def limit_rate(self, ifindex: int, *, rate: int, burst: int, queue: int) -> None:
        """A token bucket as the interface's root queue, in place of what is there: `rate` in bytes per second, `burst`
        and `queue` in bytes. Larger GSO packets than `burst` are cut into their segments."""
        # with a link layer given, the kernel needs no table of transmission times
        slow = wire.TC_RATESPEC.pack(0, wire.TC_LINKLAYER_ETHERNET, 0, 0, 0, min(rate, 0xFFFFFFFF))
        options = wire.TC_TBF_QOPT.pack(slow, bytes(12), min(queue, 0xFFFFFFFF), 0, 0)
        body = wire.TCMSG.pack(wire.AF_UNSPEC, 0, 0, ifindex, 0x10000, wire.TC_H_ROOT, 0)
        body += wire.text(wire.TCA_KIND, "tbf")
        body += wire.nested(
            wire.TCA_OPTIONS,
            wire.attribute(wire.TCA_TBF_PARMS, options),
            wire.attribute(wire.TCA_TBF_RATE64, rate.to_bytes(8, "little")),
            wire.u32(wire.TCA_TBF_BURST, min(burst, 0xFFFFFFFF)),
        )
        self._add(wire.RTM_NEWQDISC, _REPLACE, body, f"limit interface {ifindex} to {rate} bytes per second")


def _filter_heads(ifindex: int) -> list[bytes]:
    """What identifies the one program on each side, ingress first, of an interface's clsact queue."""
    info = 1 << 16 | socket.htons(wire.ETH_P_ALL)  # priority, protocol
    parents = [wire.TC_H_CLSACT & 0xFFFF0000 | minor for minor in (wire.TC_H_MIN_INGRESS, wire.TC_H_MIN_EGRESS)]
    kind = wire.text(wire.TCA_KIND, "bpf")
    return [wire.TCMSG.pack(wire.AF_UNSPEC, 0, 0, ifindex, 1, parent, info) + kind for parent in parents]


def _rule_body(src: IPNetwork, table: int, priority: int) -> bytes:
    short_table = table if table < 256 else wire.RT_TABLE_COMPAT
    family, length = wire.family_of(src), src.prefixlen
    body = wire.RULE.pack(family, 0, length, 0, short_table, 0, 0, wire.FR_ACT_TO_TBL, 0)
    body += wire.attribute(wire.FRA_SRC, src.network_address.packed)
    body += wire.u32(wire.FRA_PRIORITY, priority) + wire.u32(wire.FRA_TABLE, table)
    return body + wire.attribute(wire.FRA_PROTOCOL, bytes([RTPROT_WAGGLE]))


def _ifinfo(index: int, up: bool | None) -> bytes:
    flags = wire.IFF_UP if up else 0
    return wire.IFINFOMSG.pack(wire.AF_UNSPEC, 0, index, flags, 0 if up is None else wire.IFF_UP)


def _ifinfo_of(link: int | str, up: bool | None) -> bytes:
    if isinstance(link, int):
        return _ifinfo(link, up)
    return _ifinfo(0, up) + wire.text(wire.IFLA_IFNAME, link)


def _link_attributes(
    *,
    name: str | None = None,
    mac: str | None = None,
    mtu: int = 0,
    txqueuelen: int | None = None,
    master: int | None = None,
    netns_fd: int | None = None,
) -> bytes:
    parts = []
    if name is not None:
        parts.append(wire.text(wire.IFLA_IFNAME, name))
    if mac is not None:
        parts.append(wire.attribute(wire.IFLA_ADDRESS, wire.mac_bytes(mac)))
    if mtu:
        parts.append(wire.u32(wire.IFLA_MTU, mtu))
    if txqueuelen is not None:
        parts.append(wire.u32(wire.IFLA_TXQLEN, txqueuelen))
    if master is not None:
        parts.append(wire.u32(wire.IFLA_MASTER, master))
    if netns_fd is not None:
        parts.append(wire.u32(wire.IFLA_NET_NS_FD, netns_fd))
    return b"".join(parts)


def _address_body(ifindex: int, address: IPInterface) -> bytes:
    ip, prefix = address.ip, address.network.prefixlen
    scope = wire.RT_SCOPE_LINK if ip.is_link_local else wire.RT_SCOPE_HOST if ip.is_loopback else 0
    body = wire.IFADDRMSG.pack(wire.family_of(ip), prefix, 0, scope, ifindex)
    body += wire.attribute(wire.IFA_LOCAL, ip.packed)
    return body + wire.attribute(wire.IFA_ADDRESS, ip.packed)


def _route_header(dst: IPNetwork, table: int, protocol: int, scope: int, kind: int, flags: int) -> bytes:
    short_table = table if table < 256 else wire.RT_TABLE_COMPAT
    family = wire.family_of(dst)
    if family == wire.AF_INET6 and scope != wire.RT_SCOPE_NOWHERE:
        scope = wire.RT_SCOPE_UNIVERSE  # IPv6 routes have no scope
    return wire.RTMSG.pack(family, dst.prefixlen, 0, 0, short_table, protocol, scope, kind, flags)


def _route_attributes(
    dst: IPNetwork, dev: int | None, via: IPAddress | None, src: IPAddress | None, table: int, metric: int
) -> bytes:
    parts = [wire.u32(wire.RTA_TABLE, table)]
    if dst.prefixlen:
        parts.append(wire.attribute(wire.RTA_DST, dst.network_address.packed))
    if dev is not None:
        parts.append(wire.u32(wire.RTA_OIF, dev))
    if via is not None:
        parts.append(wire.attribute(wire.RTA_GATEWAY, via.packed))
    if src is not None:
        parts.append(wire.attribute(wire.RTA_PREFSRC, src.packed))
    if metric:
        parts.append(wire.u32(wire.RTA_PRIORITY, metric))
    return b"".join(parts)


def _where(dev: int | None, via: IPAddress | None, table: int) -> str:
    return (
        (f" via {via}" if via is not None else "")
        + (f" on interface {dev}" if dev is not None else "")
        + (f" in table {table}" if table != wire.RT_TABLE_MAIN else "")
    )
