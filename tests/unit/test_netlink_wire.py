"""rtnetlink's bytes: what is built is what is decoded, and nothing that arrives can break the decoder's bounds."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waggle.kernel import netlink_wire as wire
from waggle.kernel.netlink import Batch


def address_message(prefix: int, *attributes: bytes, family: int = 2, flags: int = 0) -> memoryview:
    return memoryview(wire.IFADDRMSG.pack(family, prefix, flags, 0, 7) + b"".join(attributes))


def test_attributes_are_padded_and_read_back() -> None:
    data = wire.text(1, "ab") + wire.u32(2, 7) + wire.nested(3, wire.attribute(4, b"xyz"))
    assert len(data) % 4 == 0
    read = list(wire.attributes(memoryview(data)))
    assert [(kind, bytes(raw)) for kind, raw in read[:2]] == [(1, b"ab\0"), (2, struct.pack("=I", 7))]
    assert [(kind, bytes(raw)) for kind, raw in wire.attributes(read[2][1])] == [(4, b"xyz")]


@given(st.binary(max_size=64))
def test_attributes_stay_within_their_bytes(data: bytes) -> None:
    for _, raw in wire.attributes(memoryview(data)):
        assert len(raw) <= len(data) - 4


def test_address_on_a_point_to_point_link_is_the_local_one() -> None:
    peer, local = wire.attribute(1, bytes([10, 0, 0, 2])), wire.attribute(2, bytes([10, 0, 0, 1]))
    assert wire.decode_address(address_message(32, peer, local)).interface == ipaddress.ip_interface("10.0.0.1/32")


def test_wide_flags_of_an_address_win() -> None:
    raw = wire.attribute(1, ipaddress.ip_address("fd00::1").packed) + wire.u32(8, 0x302)
    address = wire.decode_address(address_message(64, raw, family=10, flags=2))
    assert (address.flags, str(address.interface)) == (0x302, "fd00::1/64")


def test_address_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match="without an address"):
        wire.decode_address(address_message(32))


def test_route_that_the_batch_builds_is_the_route_that_is_decoded() -> None:
    for dst, via, src in (("10.1.0.0/24", "10.0.0.1", "10.0.0.9"), ("fd00:1::/64", "fe80::1", "fd00::9")):
        batch = Batch()
        network = ipaddress.ip_network(dst)
        batch.add_route(
            network, dev=3, via=ipaddress.ip_address(via), src=ipaddress.ip_address(src), table=1000, metric=5, mtu=1400
        )
        route = wire.decode_route(memoryview(batch.requests[0].body))
        assert route == wire.Route(
            dst=network,
            nexthops=(wire.NextHop(3, ipaddress.ip_address(via)),),
            src=ipaddress.ip_address(src),
            table=1000,
            protocol=wire.RTPROT_WAGGLE,
            scope=0,
            kind=1,
            metric=5,
            mtu=1400,
        )
        assert (route.ifindex, str(route.via)) == (3, via)


def test_route_with_several_next_hops() -> None:
    def hop(index: int, gateway: bytes) -> bytes:
        attribute = wire.attribute(5, gateway)
        return wire.RTNEXTHOP.pack(8 + len(attribute), 0, 0, index) + attribute

    header = wire.RTMSG.pack(2, 0, 0, 0, 254, 4, 0, 1, 0)
    hops = wire.attribute(9, hop(4, bytes([10, 0, 0, 1])) + hop(5, bytes([10, 0, 1, 1])))
    route = wire.decode_route(memoryview(header + hops))
    assert [(h.ifindex, str(h.via)) for h in route.nexthops] == [(4, "10.0.0.1"), (5, "10.0.1.1")]
    assert str(route.dst) == "0.0.0.0/0"


def test_ipv4_route_through_an_ipv6_gateway() -> None:
    header = wire.RTMSG.pack(2, 0, 0, 0, 254, 4, 0, 1, 0)
    via = wire.attribute(18, struct.pack("=H", 10) + ipaddress.ip_address("fe80::1").packed)
    assert str(wire.decode_route(memoryview(header + wire.u32(4, 2) + via)).via) == "fe80::1"


def test_gateway_of_the_other_family_is_refused_where_it_cannot_be_said() -> None:
    with pytest.raises(ValueError, match="other address family"):
        Batch().add_route(ipaddress.ip_network("10.0.0.0/8"), via=ipaddress.ip_address("fe80::1"))


def test_renaming_needs_an_index() -> None:
    with pytest.raises(ValueError, match="needs its index"):
        Batch().set_link("eth0", name="eth1")


@pytest.mark.parametrize("mac", ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "zz:00:00:00:00:00"])
def test_mac_that_is_none(mac: str) -> None:
    with pytest.raises(ValueError):
        wire.mac_bytes(mac)
