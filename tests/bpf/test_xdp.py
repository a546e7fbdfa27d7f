"""XDP on uplinks: what it finishes is what tc would have made of it, and the rest reaches tc untouched."""

from __future__ import annotations

import pytest
from packets import ANY, CLIENT, MACS, NODE, NOWHERE, REMOTE, VIP, A, at, both, build, ends, macs, source_port, tcp, udp
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_Timestamp, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Raw

from waggle.abi._generated import ServiceFlag
from waggle.testing.machine import REDIRECT, UPLINK_MAC, XDP_DROP, XDP_PASS, XDP_TX, Machine

ROUTER_MAC = "02:00:00:00:00:fe"
NARROW = {4: "10.244.3.10", 6: "fd00:10:244:3::10"}
OTHER_WAY = {4: "192.0.2.78", 6: "2001:db8::78"}  # on the uplink's network, and no neighbour yet
each = pytest.mark.parametrize(("make", "name"), [(tcp, "TCP"), (udp, "UDP")])


def run(node: Machine, packet: bytes):
    return node.run("wag_xdp_uplink", packet)


@both
@each
def test_snat_and_back(node: Machine, v: int, make, name: str) -> None:
    node.add_service(ANY[v], 30080, name, [(REMOTE[v], 8080)])
    out = run(node, make(CLIENT[v], 1000, NODE[v], 30080))
    assert out.verdict == XDP_TX
    port = source_port(out.packet)
    assert 40000 <= port <= 50000
    assert ends(out.packet) == f"{name} {at(NODE[v], port)} > {at(REMOTE[v], 8080)} ttl 63"
    assert macs(out.packet) == (UPLINK_MAC, ROUTER_MAC)
    node_client = {4: "192.0.2.254", 6: "2001:db8::fe"}[v]  # a client whose address is that of a known neighbour
    out = run(node, make(node_client, 1000, NODE[v], 30080))
    back = run(node, make(REMOTE[v], 8080, NODE[v], source_port(out.packet)))
    assert back.verdict == XDP_TX
    assert ends(back.packet) == f"{name} {at(NODE[v], 30080)} > {at(node_client, 1000)} ttl 63"
    assert macs(back.packet) == (UPLINK_MAC, ROUTER_MAC)


@both
@each
def test_flows_are_shared_with_tc(node: Machine, v: int, make, name: str) -> None:
    node.add_service(ANY[v], 30080, name, [(REMOTE[v], 8080), (NARROW[v], 8080)])
    for first, second in (("wag_node_ingress", "wag_xdp_uplink"), ("wag_xdp_uplink", "wag_node_ingress")):
        for client_port in range(1000, 1008):
            packet = make(CLIENT[v], client_port, NODE[v], 30080)
            one, other = node.run(first, packet), node.run(second, packet)
            assert {one.verdict, other.verdict} == {REDIRECT, XDP_TX}
            assert one.packet[12:] == other.packet[12:]  # but for MACs, which tc leaves to the neighbour's entry


@both
@each
def test_dsr(node: Machine, v: int, make, name: str) -> None:
    node.add_service(VIP[v], 80, name, [(REMOTE[v], 8080)], flags=int(ServiceFlag.DSR))
    packet = make(CLIENT[v], 1000, VIP[v], 80)
    out, by_tc = run(node, packet), node.run("wag_node_ingress", packet)
    assert out.verdict == XDP_TX
    assert out.packet[12:] == by_tc.packet[12:]
    assert macs(out.packet) == (UPLINK_MAC, ROUTER_MAC)


@both
def test_what_is_left_to_tc_is_untouched(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30080, "TCP", [(A[v], 8080)])
    node.add_service(ANY[v], 30081, "TCP", [])
    node.add_service(ANY[v], 30082, "TCP", [(NARROW[v], 8080)])
    node.add_service(ANY[v], 30083, "TCP", [(REMOTE[v], 8080)])
    node.add_service(ANY[v], 30084, "TCP", [(OTHER_WAY[v], 8080)])
    node.add_service(ANY[v], 30085, "TCP", [(NOWHERE[v], 8080)])
    node.add_service(ANY[v], 30086, "TCP", [(NODE[v], 8080)])
    asked = tcp(CLIENT[v], 1000, NODE[v], 30083)
    layer = IPv6 if v == 6 else IP
    big = layer(src=CLIENT[v], dst=NODE[v], **({} if v == 6 else {"flags": "DF"}))
    for name, packet in {
        "local backend": tcp(CLIENT[v], 1000, NODE[v], 30080),
        "no backend": tcp(CLIENT[v], 1000, NODE[v], 30081),
        "does not fit": bytes(Ether(**MACS) / big / TCP(sport=1000, dport=30082, flags="S") / Raw(b"x" * 1380)),
        "last hop": tcp(CLIENT[v], 1001, NODE[v], 30083, ttl=1),
        "no neighbour": tcp(CLIENT[v], 1002, NODE[v], 30084),
        "no route": tcp(CLIENT[v], 1003, NODE[v], 30085),
        "the node is the backend": tcp(CLIENT[v], 1004, NODE[v], 30086),
        "no Service": tcp(CLIENT[v], 1000, NODE[v], 30099),
        "to a pod": tcp(CLIENT[v], 1000, A[v], 8080),
        "echo": build(CLIENT[v], NODE[v], ICMP() if v == 4 else Raw(b"")),
        "another machine's": b"\x02\xbb\xbb\xbb\xbb\xbb" + asked[6:],
        "of a VLAN": bytes(Ether(**MACS) / Dot1Q(vlan=7) / layer(asked[14:])),
        "cut short": asked[:40],
        "no IP": asked[:12] + b"\x08\x06" + asked[14:],
    }.items():
        out = run(node, packet)
        assert (out.verdict, out.packet) == (XDP_PASS, packet), name
    assert node.drops() == {}
    # and tc goes on with what XDP began
    assert ends(node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080)).packet).endswith("ttl 63")


@both
def test_what_is_dropped(node: Machine, v: int) -> None:
    node.add_ranges(7, {4: "198.51.100.0/24", 6: "2001:db8:1::/48"}[v])
    node.add_service(VIP[v], 80, "UDP", [(REMOTE[v], 8080)], ranges=7)
    node.add_service(VIP[v], 81, "UDP", [], flags=int(ServiceFlag.EMPTY_DROP))
    for port in (80, 81):
        assert run(node, udp(CLIENT[v], 1000, VIP[v], port)).verdict == XDP_DROP
    assert node.drops() == {("source_range", "xdp"): 1, ("no_local_backend", "xdp"): 1}


def test_a_datagram_without_a_checksum_stays_without(node: Machine) -> None:
    node.add_service("0.0.0.0", 30053, "UDP", [(REMOTE[4], 8053)])
    asked = Ether(**MACS) / IP(src=CLIENT[4], dst=NODE[4]) / UDP(sport=1000, dport=30053, chksum=0) / Raw(b"x")
    out = run(node, bytes(asked))
    assert out.verdict == XDP_TX
    assert Ether(out.packet)[UDP].chksum == 0


@both
def test_sctp(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30080, "SCTP", [(REMOTE[v], 8080)])
    asked = build(CLIENT[v], NODE[v], SCTP(sport=1000, dport=30080, tag=0) / SCTPChunkInit(init_tag=9), payload=b"")
    out = Ether(run(node, asked).packet)
    assert out[SCTP].dport == 8080
    sum_was = out[SCTP].chksum
    del out[SCTP].chksum
    assert Ether(bytes(out))[SCTP].chksum == sum_was


@both
def test_fragments(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30053, "UDP", [(REMOTE[v], 8053)])
    layer = IPv6 if v == 6 else IP
    if v == 6:
        whole = IPv6(src=CLIENT[6], dst=NODE[6]) / IPv6ExtHdrFragment(id=9) / UDP(sport=1000, dport=30053)
        parts = fragment6(whole / Raw(b"x" * 2000), 1280)
    else:
        parts = fragment(IP(src=CLIENT[4], dst=NODE[4], id=9) / UDP(sport=1000, dport=30053) / Raw(b"x" * 2000), 1000)
    sent = [run(node, bytes(Ether(**MACS) / part)) for part in parts]
    assert len(sent) > 1
    assert {out.verdict for out in sent} == {XDP_TX}
    assert {(Ether(out.packet)[layer].src, Ether(out.packet)[layer].dst) for out in sent} == {(NODE[v], REMOTE[v])}


@pytest.mark.parametrize("program", ["wag_xdp_uplink", "wag_node_ingress"])
def test_packets_with_options(node: Machine, program: str) -> None:
    node.add_service("0.0.0.0", 30080, "TCP", [(REMOTE[4], 8080)])
    option = IPOption_Timestamp(length=12, pointer=5, flg=0, timestamp=1)
    asked = Ether(**MACS) / IP(src=CLIENT[4], dst=NODE[4], options=[option]) / TCP(sport=1000, dport=30080, flags="S")
    out = node.run(program, bytes(asked))
    assert out.verdict in (XDP_TX, REDIRECT)
    assert Ether(out.packet)[IP].ihl == Ether(bytes(asked))[IP].ihl
    assert ends(out.packet) == f"TCP {at(NODE[4], source_port(out.packet))} > {at(REMOTE[4], 8080)} ttl 63"
