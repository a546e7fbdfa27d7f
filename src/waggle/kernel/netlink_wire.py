"""rtnetlink's messages: constants, attribute encoding, and decoding into values.

Knows bytes only, makes no system call. Integers of netlink are in host order except where a field is marked as
network order; addresses go in and out as `ipaddress` objects, MACs as "02:00:00:00:00:01", so no caller sees an order.
Source: Linux include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,neighbour,veth}.h.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

#: Marks every route waggle adds (rtm_protocol), so that cleanup finds them and leaves others alone. A number that no
#: routing daemon uses (iproute2 etc/iproute2/rt_protos; 186 to 189 are FRR's).
RTPROT_WAGGLE = 119
ARPHRD_ETHER = 1

AF_UNSPEC, AF_INET, AF_BRIDGE, AF_INET6 = 0, 2, 7, 10

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x2, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSGERR_ATTR_MSG = 1

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_NEWQDISC = 36
RTM_NEWTFILTER, RTM_DELTFILTER = 44, 45

IFF_UP, IFF_RUNNING = 0x1, 0x40
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_TXQLEN = 1, 3, 4, 5, 10, 13
IFLA_LINKINFO, IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_NET_NS_FD, IFLA_LINK_NETNSID = 18, 20, 26, 28, 37
IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS = 29, 8
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE = 8, 1
VETH_INFO_PEER = 1
IFLA_VXLAN_ID, IFLA_VXLAN_LOCAL, IFLA_VXLAN_LEARNING, IFLA_VXLAN_PORT, IFLA_VXLAN_LOCAL6 = 1, 4, 7, 15, 17

IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD = 0x02

RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS = 1, 4, 5, 6, 7, 8
RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 9, 15, 18
RTAX_MTU = 2
RT_TABLE_COMPAT, RT_TABLE_MAIN = 252, 254
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_HOST, RT_SCOPE_NOWHERE = 0, 253, 254, 255
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
RTM_F_CLONED = 0x200

NDA_DST, NDA_LLADDR = 1, 2
NUD_PERMANENT = 0x80
NTF_SELF = 0x02

FRA_SRC, FRA_PRIORITY, FRA_TABLE, FRA_PROTOCOL = 2, 6, 15, 21
FR_ACT_TO_TBL = 1

NLMSG_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
IFINFOMSG = struct.Struct("=BxHiII")  # family, type, index, flags, change
IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
TCMSG = struct.Struct("=BBHiIII")  # family, pad, pad, index, handle, parent, info
TC_RATESPEC = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell align, mpu, rate
TC_TBF_QOPT = struct.Struct("=12s12sIII")  # rate, peak rate, limit, buffer, mtu
RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst len, src len, tos, table, protocol, scope, type, flags
NDMSG = struct.Struct("=BxxxiHBB")  # family, ifindex, state, flags, type
RULE = RTMSG  # struct fib_rule_hdr: family, dst len, src len, tos, table, -, -, action, flags
RTNEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, ifindex
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_U32 = struct.Struct("=I")
_I32 = struct.Struct("=i")
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_NESTED = 0x8000
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


@dataclass(frozen=True, slots=True)
class Vxlan:
    """What makes a VXLAN interface: `local` is the address its packets are sent from."""

    vni: int
    local: IPAddress | None
    port: int
    learning: bool


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `type` is ARPHRD_*. `peer_index` is IFLA_LINK: a veth's peer, in the namespace
    `peer_netnsid` if not None. `vxlan`: of such an interface.
    """

    index: int
    name: str
    mac: str
    mtu: int
    flags: int
    kind: str
    master: int
    peer_index: int
    peer_netnsid: int | None
    type: int = ARPHRD_ETHER
    vxlan: Vxlan | None = None

    @property
    def up(self) -> bool:
        """Set up by the administrator (not: has a carrier)."""
        return bool(self.flags & IFF_UP)


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface, with its prefix length."""

    ifindex: int
    interface: IPInterface
    flags: int
    scope: int

    @property
    def ip(self) -> IPAddress:
        return self.interface.ip


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where a route leads: an interface and, unless the destination is on the link, a gateway."""

    ifindex: int
    via: IPAddress | None


@dataclass(frozen=True, slots=True)
class Route:
    """A route as the kernel has it. `kind` is RTN_*; `metric` 0 means none given; `mtu` 0 means the interface's."""

    dst: IPNetwork
    nexthops: tuple[NextHop, ...]
    src: IPAddress | None
    table: int
    protocol: int
    scope: int
    kind: int
    metric: int
    mtu: int

    @property
    def ifindex(self) -> int:
        """Interface of the first next hop, 0 where there is none (blackhole)."""
        return self.nexthops[0].ifindex if self.nexthops else 0

    @property
    def via(self) -> IPAddress | None:
        """Gateway of the first next hop."""
        return self.nexthops[0].via if self.nexthops else None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour entry. `mac` is "" while unresolved; `state` is NUD_*."""

    ifindex: int
    ip: IPAddress
    mac: str
    state: int

    @property
    def permanent(self) -> bool:
        return bool(self.state & NUD_PERMANENT)


TC_H_ROOT, TC_H_CLSACT = 0xFFFFFFFF, 0xFFFFFFF1
TC_H_MIN_INGRESS, TC_H_MIN_EGRESS = 0xFFF2, 0xFFF3
TC_LINKLAYER_ETHERNET = 1
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
TCA_BPF_FD, TCA_BPF_NAME, TCA_BPF_FLAGS = 6, 7, 8
TCA_BPF_FLAG_ACT_DIRECT = 1
ETH_P_ALL = 3


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """An entry of a VXLAN interface: packets to `mac` go to the machine at `dst`."""

    ifindex: int
    mac: str
    dst: IPAddress | None


@dataclass(frozen=True, slots=True)
class Rule:
    """A routing rule: packets from `src` (None: from anywhere) ask `table`."""

    family: int
    src: IPNetwork | None
    table: int
    priority: int
    protocol: int


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute with header and padding."""
    length = 4 + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + _PADDING[length & 3]


def u32(kind: int, value: int) -> bytes:
    return attribute(kind, _U32.pack(value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(kind | _NESTED, b"".join(parts))


def mac_bytes(mac: str) -> bytes:
    """Six bytes from "02:00:00:00:00:01". Raises ValueError."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6:
        raise ValueError(f"{mac!r} is not a MAC address")
    return raw


def family_of(address: IPAddress | IPNetwork | IPInterface) -> int:
    return AF_INET if address.version == 4 else AF_INET6


def attributes(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(type, payload) of each attribute in `data`; stops at the first that does not fit."""
    offset, end = 0, len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & _TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _ip(raw: memoryview) -> IPAddress:
    return ipaddress.ip_address(bytes(raw))


def _number(raw: memoryview) -> int:
    return int(_U32.unpack_from(raw)[0])


def _string(raw: memoryview) -> str:
    return bytes(raw).rstrip(b"\0").decode(errors="replace")


def _mac(raw: memoryview) -> str:
    return bytes(raw).hex(":")


_LINK_ATTRIBUTES = frozenset(
    {IFLA_IFNAME, IFLA_ADDRESS, IFLA_MTU, IFLA_MASTER, IFLA_LINK, IFLA_LINK_NETNSID, IFLA_LINKINFO}
)


def decode_link(body: memoryview) -> Link:
    """From the body of RTM_NEWLINK or RTM_DELLINK."""
    _, hardware, index, flags, _ = IFINFOMSG.unpack_from(body)
    found = _selected(body, IFINFOMSG.size, _LINK_ATTRIBUTES)
    netnsid = found.get(IFLA_LINK_NETNSID)
    info = dict(attributes(found[IFLA_LINKINFO])) if IFLA_LINKINFO in found else {}
    kind = _string(info[IFLA_INFO_KIND]) if IFLA_INFO_KIND in info else ""
    return Link(
        index=index,
        name=_string(found[IFLA_IFNAME]) if IFLA_IFNAME in found else "",
        mac=_mac(found[IFLA_ADDRESS]) if IFLA_ADDRESS in found else "",
        mtu=_number(found[IFLA_MTU]) if IFLA_MTU in found else 0,
        flags=flags,
        kind=kind,
        master=_number(found[IFLA_MASTER]) if IFLA_MASTER in found else 0,
        peer_index=_number(found[IFLA_LINK]) if IFLA_LINK in found else 0,
        peer_netnsid=_I32.unpack_from(netnsid)[0] if netnsid is not None else None,
        type=hardware,
        vxlan=_vxlan(info[IFLA_INFO_DATA]) if kind == "vxlan" and IFLA_INFO_DATA in info else None,
    )


def _vxlan(data: memoryview) -> Vxlan:
    found = dict(attributes(data))
    local = found.get(IFLA_VXLAN_LOCAL, found.get(IFLA_VXLAN_LOCAL6))
    return Vxlan(
        vni=_number(found[IFLA_VXLAN_ID]) if IFLA_VXLAN_ID in found else 0,
        local=_ip(local) if local is not None else None,
        port=int.from_bytes(found[IFLA_VXLAN_PORT], "big") if IFLA_VXLAN_PORT in found else 0,
        learning=bool(found[IFLA_VXLAN_LEARNING][0]) if IFLA_VXLAN_LEARNING in found else False,
    )


def _selected(data: memoryview, offset: int, kinds: frozenset[int]) -> dict[int, memoryview]:
    """Attributes of `kinds` only. A link has more than forty: not touching the others halves the time of a dump."""
    found: dict[int, memoryview] = {}
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            break
        kind &= _TYPE_MASK
        if kind in kinds:
            found[kind] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def decode_address(body: memoryview) -> Address:
    """From the body of RTM_NEWADDR or RTM_DELADDR. On a point-to-point link the local address is taken."""
    _, prefix, flags, scope, index = IFADDRMSG.unpack_from(body)
    local: memoryview | None = None
    peer: memoryview | None = None
    for type_, raw in attributes(body[IFADDRMSG.size :]):
        if type_ == IFA_LOCAL:
            local = raw
        elif type_ == IFA_ADDRESS:
            peer = raw
        elif type_ == IFA_FLAGS:
            flags = _number(raw)
    raw_address = local if local is not None else peer
    if raw_address is None:
        raise ValueError("an address message without an address")
    return Address(index, ipaddress.ip_interface((bytes(raw_address), prefix)), flags, scope)


def decode_route(body: memoryview) -> Route:
    """From the body of RTM_NEWROUTE or RTM_DELROUTE (families IPv4 and IPv6)."""
    family, length, _, _, table, protocol, scope, kind, _ = RTMSG.unpack_from(body)
    raw_dst = bytes(4 if family == AF_INET else 16)
    src: IPAddress | None = None
    via: IPAddress | None = None
    ifindex = metric = mtu = 0
    hops: list[NextHop] = []
    for type_, raw in attributes(body[RTMSG.size :]):
        if type_ == RTA_DST:
            raw_dst = bytes(raw)
        elif type_ == RTA_OIF:
            ifindex = _number(raw)
        elif type_ in (RTA_GATEWAY, RTA_VIA):
            via = _gateway(type_, raw)
        elif type_ == RTA_PREFSRC:
            src = _ip(raw)
        elif type_ == RTA_PRIORITY:
            metric = _number(raw)
        elif type_ == RTA_TABLE:
            table = _number(raw)
        elif type_ == RTA_METRICS:
            mtu = next((_number(value) for inner, value in attributes(raw) if inner == RTAX_MTU), 0)
        elif type_ == RTA_MULTIPATH:
            hops.extend(_nexthops(raw))
    if ifindex and not hops:
        hops.append(NextHop(ifindex, via))
    dst = ipaddress.ip_network((raw_dst, length))
    return Route(dst, tuple(hops), src, table, protocol, scope, kind, metric, mtu)


def _gateway(type_: int, raw: memoryview) -> IPAddress:
    # RTA_VIA is a gateway of the other family: two bytes of family, then the address.
    return _ip(raw[2:]) if type_ == RTA_VIA else _ip(raw)


def _nexthops(data: memoryview) -> Iterator[NextHop]:
    while len(data) >= RTNEXTHOP.size:
        length, _, _, ifindex = RTNEXTHOP.unpack_from(data)
        if not RTNEXTHOP.size <= length <= len(data):
            return
        via = None
        for type_, raw in attributes(data[RTNEXTHOP.size : length]):
            if type_ in (RTA_GATEWAY, RTA_VIA):
                via = _gateway(type_, raw)
        yield NextHop(ifindex, via)
        data = data[(length + 3) & ~3 :]


def decode_neighbour(body: memoryview) -> Neighbour:
    """From the body of RTM_NEWNEIGH (families IPv4 and IPv6)."""
    _, ifindex, state, _, _ = NDMSG.unpack_from(body)
    ip: IPAddress | None = None
    mac = ""
    for type_, raw in attributes(body[NDMSG.size :]):
        if type_ == NDA_DST:
            ip = _ip(raw)
        elif type_ == NDA_LLADDR:
            mac = _mac(raw)
    if ip is None:
        raise ValueError("a neighbour message without an address")
    return Neighbour(ifindex, ip, mac, state)


def decode_fdb(body: memoryview) -> FdbEntry:
    """From the body of RTM_NEWNEIGH (family AF_BRIDGE)."""
    _, ifindex, _, _, _ = NDMSG.unpack_from(body)
    found = dict(attributes(body[NDMSG.size :]))
    return FdbEntry(
        ifindex,
        _mac(found[NDA_LLADDR]) if NDA_LLADDR in found else "",
        _ip(found[NDA_DST]) if NDA_DST in found else None,
    )


def decode_rule(body: memoryview) -> Rule:
    """From the body of RTM_NEWRULE (families IPv4 and IPv6)."""
    family, _, length, _, table, _, _, _, _ = RULE.unpack_from(body)
    found = dict(attributes(body[RULE.size :]))
    return Rule(
        family=family,
        src=ipaddress.ip_network((bytes(found[FRA_SRC]), length)) if FRA_SRC in found else None,
        table=_number(found[FRA_TABLE]) if FRA_TABLE in found else table,
        priority=_number(found[FRA_PRIORITY]) if FRA_PRIORITY in found else 0,
        protocol=found[FRA_PROTOCOL][0] if FRA_PROTOCOL in found else 0,
    )
