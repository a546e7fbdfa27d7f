"""What pods send out of the cluster gets the node's address; nothing else does."""

from __future__ import annotations

import pytest
from packets import MACS, NODE, REMOTE, A, B, at, both, build, check_sums, ends, source_port, tcp, udp
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit

from waggle.testing.machine import DROP, PASS, REDIRECT, Flow, Machine

OUTSIDE = {4: "203.0.113.9", 6: "2001:db8:cb::9"}
each = pytest.mark.parametrize(("make", "name"), [(tcp, "TCP"), (udp, "UDP")])


def echo(v: int, source: str, target: str, number: int, *, reply: bool = False) -> bytes:
    if v == 4:
        return build(source, target, ICMP(type=0 if reply else 8, id=number, seq=7))
    return build(source, target, (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=number, seq=7))


def number_of(packet: bytes) -> int:
    parsed = Ether(packet)
    check_sums(parsed)
    for kind in (ICMP, ICMPv6EchoRequest, ICMPv6EchoReply):
        if kind in parsed:
            return parsed[kind].id
    raise AssertionError(parsed.summary())


@both
@each
def test_out_and_back(node: Machine, v: int, make, name: str) -> None:
    out = node.run("wag_pod_egress", make(A[v], 1000, OUTSIDE[v], 443))
    port = source_port(out.packet)
    assert out.verdict == REDIRECT
    assert 40000 <= port <= 50000
    assert ends(out.packet) == f"{name} {at(NODE[v], port)} > {at(OUTSIDE[v], 443)} ttl 63"
    assert node.nat_used(A[v])
    assert node.nat_used(NODE[v])
    back = node.run("wag_node_ingress", make(OUTSIDE[v], 443, NODE[v], port))
    assert back.verdict == REDIRECT
    assert ends(back.packet) == f"{name} {at(OUTSIDE[v], 443)} > {at(A[v], 1000)} ttl 63"


@both
@each
def test_one_flow_has_one_port(node: Machine, v: int, make, name: str) -> None:
    first = node.run("wag_pod_egress", make(A[v], 1000, OUTSIDE[v], 443))
    options = {"flags": "A"} if name == "TCP" else {}
    second = node.run("wag_pod_egress", make(A[v], 1000, OUTSIDE[v], 443, **options))
    assert source_port(second.packet) == source_port(first.packet)
    other = node.run("wag_pod_egress", make(B[v], 1000, OUTSIDE[v], 443))
    assert source_port(other.packet) != source_port(first.packet)
    assert len(node.nat()) == 4


@both
def test_echo(node: Machine, v: int) -> None:
    out = node.run("wag_pod_egress", echo(v, A[v], OUTSIDE[v], 77))
    number = number_of(out.packet)
    assert 40000 <= number <= 50000
    assert ends(out.packet) == f"{NODE[v]} > {OUTSIDE[v]} ttl 63"
    back = node.run("wag_node_ingress", echo(v, OUTSIDE[v], NODE[v], number, reply=True))
    assert back.verdict == REDIRECT
    assert ends(back.packet) == f"{OUTSIDE[v]} > {A[v]} ttl 63"
    assert number_of(back.packet) == 77
    # the node's own echo, and one that nobody asked for, are the stack's
    for number in (78, 77):
        assert node.run("wag_node_ingress", echo(v, OUTSIDE[v], NODE[v], number, reply=True)).verdict == PASS


@both
def test_error_about_an_echo_comes_back_to_the_pod(node: Machine, v: int) -> None:
    out = node.run("wag_pod_egress", echo(v, A[v], OUTSIDE[v], 77))
    sent = Ether(out.packet)[IPv6 if v == 6 else IP]
    if v == 4:
        answer = build("203.0.113.1", NODE[4], ICMP(type=11) / sent, payload=b"")
    else:
        from scapy.layers.inet6 import ICMPv6TimeExceeded

        answer = build("2001:db8:cb::1", NODE[6], ICMPv6TimeExceeded() / sent, payload=b"")
    back = node.run("wag_node_ingress", answer)
    assert back.verdict == REDIRECT
    raw = bytes(Ether(back.packet))
    head = 14 + (20 if v == 4 else 40)
    inner = raw[head + 8 :]
    asked = echo(v, A[v], OUTSIDE[v], 77)[14:]
    size = 20 if v == 4 else 40
    assert inner[size + 4 : size + 6] == asked[size + 4 : size + 6]  # the identifier it knows
    where = slice(12, 20) if v == 4 else slice(8, 40)
    assert inner[where] == asked[where]


@both
@each
def test_what_stays_as_it_is(node: Machine, v: int, make, name: str) -> None:
    for target in (REMOTE[v], B[v], NODE[v]):
        out = node.run("wag_pod_egress", make(A[v], 1000, target, 443))
        assert ends(out.packet).startswith(f"{name} {at(A[v], 1000)} > ")
    # a host's packet that merely comes by, and a pod that everybody knows a way to
    strange = {4: "203.0.113.200", 6: "2001:db8:cb::200"}[v]
    node.add_pod(strange, 103)
    out = node.run("wag_pod_egress", make(strange, 1000, OUTSIDE[v], 443))
    assert ends(out.packet).startswith(f"{name} {at(strange, 1000)} > ")
    assert node.nat() == set()


@both
def test_answers_to_the_outside_stay_as_they_are(node: Machine, v: int) -> None:
    """Somebody out there knows a way to the pod's own address."""
    for flags in ("SA", "A", "R", "FA"):
        out = node.run("wag_pod_egress", tcp(A[v], 80, OUTSIDE[v], 5000, flags))
        assert ends(out.packet).startswith(f"TCP {at(A[v], 80)} > ")
    out = node.run("wag_pod_egress", echo(v, A[v], OUTSIDE[v], 5, reply=True))
    assert ends(out.packet) == f"{A[v]} > {OUTSIDE[v]} ttl 63"
    for _ in range(2):
        asked = node.run("wag_node_ingress", udp(OUTSIDE[v], 5000, A[v], 53))
        assert ends(asked.packet) == f"UDP {at(OUTSIDE[v], 5000)} > {at(A[v], 53)} ttl 63"
        out = node.run("wag_pod_egress", udp(A[v], 53, OUTSIDE[v], 5000))
        assert ends(out.packet) == f"UDP {at(A[v], 53)} > {at(OUTSIDE[v], 5000)} ttl 63"


@both
def test_sctp_gets_a_port_and_its_checksum(node: Machine, v: int) -> None:
    def packet(chunk, source: str, sport: int, target: str, dport: int) -> bytes:
        return build(source, target, SCTP(sport=sport, dport=dport, tag=1) / chunk, payload=b"")

    out = node.run("wag_pod_egress", packet(SCTPChunkInit(init_tag=9), A[v], 1000, OUTSIDE[v], 38412))
    sent = Ether(out.packet)[SCTP]
    assert 40000 <= sent.sport <= 50000
    assert is_sound(out.packet)
    data = packet(SCTPChunkData(data=b"x" * 1001), OUTSIDE[v], 38412, NODE[v], sent.sport)
    back = node.run("wag_node_ingress", data)
    assert (Ether(back.packet)[SCTP].sport, Ether(back.packet)[SCTP].dport) == (38412, 1000)
    assert is_sound(back.packet)
    # of a flow that began before, nothing is known
    out = node.run("wag_pod_egress", packet(SCTPChunkData(data=b"x"), A[v], 1001, OUTSIDE[v], 38412))
    assert Ether(out.packet)[SCTP].sport == 1001


def is_sound(packet: bytes) -> bool:
    again = Ether(packet)
    before = again[SCTP].chksum
    del again[SCTP].chksum
    return Ether(bytes(again))[SCTP].chksum == before


@both
def test_a_node_without_an_address_of_the_family_drops(v: int) -> None:
    machine = Machine("bare", node4="", node6="")
    try:
        machine.add_pod(A[v], 101)
        assert machine.run("wag_pod_egress", udp(A[v], 1000, OUTSIDE[v], 443)).verdict == DROP
        assert machine.drops() == {("no_node_ip", "pod_egress"): 1}
    finally:
        machine.close()


@both
def test_a_port_that_a_socket_of_the_node_has_stays_its_own(node: Machine, v: int) -> None:
    """The node's own flow to the same place is not taken for the pod's."""
    out = node.run("wag_pod_egress", udp(A[v], 1000, OUTSIDE[v], 443))
    port = source_port(out.packet)
    own = node.run("wag_node_egress", udp(NODE[v], port, OUTSIDE[v], 443))
    assert source_port(own.packet) != port
    assert (
        Flow(f"UDP {at(A[v], 1000)} > {at(OUTSIDE[v], 443)}", f"UDP {at(NODE[v], port)} > {at(OUTSIDE[v], 443)}", True)
        in node.nat()
    )


@both
def test_what_does_not_fit_is_told_about_what_it_sent(node: Machine, v: int) -> None:
    """The packet inside is the pod's own, before it was translated."""
    node.summed = False
    target = {4: "10.244.3.10", 6: "fd00:10:244:3::10"}[v]
    vip = {4: "10.96.0.10", 6: "fd00:10:96::10"}[v]
    node.add_service(vip, 80, "TCP", [(target, 8080)])
    options = {"flags": "DF"} if v == 4 else {}
    head = IPv6(src=A[6], dst=vip) if v == 6 else IP(src=A[4], dst=vip, **options)
    big = bytes(Ether(**MACS) / head / TCP(sport=1000, dport=80) / (b"x" * 1380))
    out = node.run("wag_pod_egress", big)
    assert out.verdict == REDIRECT
    answer = Ether(out.packet)
    check_sums(answer)
    if v == 4:
        assert (answer[ICMP].type, answer[ICMP].code, answer[ICMP].nexthopmtu) == (3, 4, 1400)
    else:
        from scapy.layers.inet6 import ICMPv6PacketTooBig

        assert answer[ICMPv6PacketTooBig].mtu == 1400
    assert answer[IPv6 if v == 6 else IP].dst == A[v]
    quoted = bytes(answer)[14 + (20 if v == 4 else 40) + 8 :]
    assert big[14:].startswith(quoted)
    assert node.drops() == {("too_big", "pod_egress"): 1}
    small = bytes(Ether(**MACS) / head / TCP(sport=1000, dport=80) / (b"x" * 1300))
    assert ends(node.run("wag_pod_egress", small).packet).startswith(f"TCP {at(A[v], 1000)} > {at(target, 8080)}")


def test_what_may_be_cut_up_is_left_to_the_stack(node: Machine) -> None:
    node.add_service("10.96.0.10", 80, "UDP", [("10.244.3.10", 8080)])
    out = node.run("wag_pod_egress", udp(A[4], 1000, "10.96.0.10", 80, payload=b"x" * 1380))
    assert out.verdict == PASS
    assert ends(out.packet) == "UDP 10.244.1.10:1000 > 10.244.3.10:8080 ttl 64"


@both
def test_time_exceeded_is_told_about_what_was_sent(node: Machine, v: int) -> None:
    node.summed = False
    vip = {4: "10.96.0.10", 6: "fd00:10:96::10"}[v]
    node.add_service(vip, 80, "UDP", [(REMOTE[v], 8080)])
    asked = udp(A[v], 1000, vip, 80, ttl=1)
    out = node.run("wag_pod_egress", asked)
    answer = Ether(out.packet)
    check_sums(answer)
    head = 14 + (20 if v == 4 else 40)
    assert (out.packet[head], out.packet[head + 1]) == ((11, 0) if v == 4 else (3, 0))
    assert out.packet[head + 8 :] == asked[14 : 14 + len(out.packet) - head - 8]
