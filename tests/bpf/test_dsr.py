"""Direct server return: what the node that is asked sends on, and what the backend's node makes of it."""

from __future__ import annotations

import pytest
from packets import ANY, CLIENT, MACS, NODE, REMOTE, VIP, A, B, at, both, check_sums, ends, source_port, tcp, udp
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from waggle.abi._generated import ServiceFlag
from waggle.testing.machine import DROP, PASS, REDIRECT, Flow, Machine

DSR = int(ServiceFlag.DSR)
NODES = (1 << 64) - 1  # WAG_RANGES_NODES
PEER = {4: "192.0.2.9", 6: "2001:db8::9"}  # another node
NARROW = {4: "10.244.3.10", 6: "fd00:10:244:3::10"}  # behind a way for packets of 1400 bytes
each = pytest.mark.parametrize(("make", "name"), [(tcp, "TCP"), (udp, "UDP")])


def know_nodes(machine: Machine) -> None:
    """Those alone may send packets inside others."""
    addresses = (*PEER.values(), *NODE.values())
    machine.add_ranges(NODES, *(f"{address}/{128 if ':' in address else 32}" for address in addresses))


def layer(v: int) -> type:
    return IPv6 if v == 6 else IP


def wrapped(v: int, packet: bytes, backend: str, *, source: str = "") -> bytes:
    """As the other node sends it."""
    outer = {"src": source or PEER[v], "dst": backend}
    head = IPv6(nh=41, **outer) if v == 6 else IP(proto=4, **outer)
    return bytes(Ether(**MACS) / head / Raw(packet[14:]))


def opened(v: int, packet: bytes, *, whole: bool = True) -> tuple[str, str, bytes]:
    """(outer source, outer destination, packet inside with an Ethernet header)."""
    outer = Ether(packet)[layer(v)]
    if whole:
        check_sums(Ether(packet))
    assert (outer.nh if v == 6 else outer.proto) == (41 if v == 6 else 4)
    return outer.src, outer.dst, packet[:14] + packet[14 + (40 if v == 6 else 20) :]


@both
@each
def test_what_goes_to_a_remote_backend(node: Machine, v: int, make, name: str) -> None:
    node.add_service(VIP[v], 80, name, [(REMOTE[v], 8080)], flags=DSR)
    asked = make(CLIENT[v], 1000, VIP[v], 80)
    out = node.run("wag_node_ingress", asked)
    assert out.verdict == REDIRECT
    source, target, inside = opened(v, out.packet)
    assert (source, target) == (NODE[v], REMOTE[v])
    assert ends(inside) == f"{name} {at(CLIENT[v], 1000)} > {at(VIP[v], 80)} ttl 63"
    assert node.nat() == {
        Flow(
            f"{name} {at(CLIENT[v], 1000)} > {at(VIP[v], 80)}",
            f"{name} {at(CLIENT[v], 1000)} > {at(REMOTE[v], 8080)}",
            True,
        )
    }


@both
def test_a_flow_stays_with_its_backend(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)], flags=DSR)
    node.run("wag_node_ingress", tcp(CLIENT[v], 1000, VIP[v], 80))
    node.add_service(VIP[v], 80, "TCP", [(NARROW[v], 8080)], flags=DSR)
    on = node.run("wag_node_ingress", tcp(CLIENT[v], 1000, VIP[v], 80, "A"))
    assert opened(v, on.packet)[1] == REMOTE[v]
    anew = node.run("wag_node_ingress", tcp(CLIENT[v], 1001, VIP[v], 80))
    assert opened(v, anew.packet)[1] == NARROW[v]


@both
def test_answers_under_way_when_udp_moves_to_another_node(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 53, "UDP", [(A[v], 5353)], flags=DSR)
    node.run("wag_node_ingress", udp(CLIENT[v], 1000, VIP[v], 53))
    node.add_service(VIP[v], 53, "UDP", [(REMOTE[v], 5353)], flags=DSR)
    moved = node.run("wag_node_ingress", udp(CLIENT[v], 1000, VIP[v], 53))
    assert opened(v, moved.packet)[1] == REMOTE[v]
    late = node.run("wag_pod_egress", udp(A[v], 5353, CLIENT[v], 1000))
    assert ends(late.packet) == f"UDP {at(VIP[v], 53)} > {at(CLIENT[v], 1000)} ttl 63"


@both
def test_local_backends_and_pods_need_no_tunnel(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30080, "TCP", [(A[v], 8080)], flags=DSR)
    out = node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080))
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(A[v], 8080)} ttl 63"
    node.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)], flags=DSR)
    out = node.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80))
    assert ends(out.packet) == f"TCP {at(A[v], 1000)} > {at(REMOTE[v], 8080)} ttl 63"


@pytest.fixture(autouse=True)
def peers(machine: Machine) -> None:
    know_nodes(machine)


@both
def test_nobody_else_may_send_so(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(A[v], 8080)], flags=DSR)
    packet = wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80), A[v], source=CLIENT[v])
    out = node.run("wag_node_ingress", packet)
    assert len(out.packet) == len(packet)
    assert node.nat() == set()


@both
@each
def test_a_pod_that_asked_another_node_is_answered_here(node: Machine, v: int, make, name: str) -> None:
    node.add_service(ANY[v], 30080, name, [(A[v], 8080)], flags=DSR)
    out = node.run("wag_node_ingress", wrapped(v, make(B[v], 1000, PEER[v], 30080), A[v]))
    assert ends(out.packet) == f"{name} {at(B[v], 1000)} > {at(A[v], 8080)} ttl 63"
    answer = node.run("wag_pod_egress", make(A[v], 8080, B[v], 1000))
    assert ends(answer.packet) == f"{name} {at(PEER[v], 30080)} > {at(B[v], 1000)} ttl 63"
    # and by itself
    out = node.run("wag_node_ingress", wrapped(v, make(A[v], 2000, PEER[v], 30080), A[v]))
    port = source_port(out.packet)
    assert ends(out.packet) == f"{name} {at(NODE[v], port)} > {at(A[v], 8080)} ttl 63"
    answer = node.run("wag_pod_egress", make(A[v], 8080, NODE[v], port))
    assert ends(answer.packet) == f"{name} {at(PEER[v], 30080)} > {at(A[v], 2000)} ttl 63"


@both
def test_flows_outlive_the_setting(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(A[v], 8080)], flags=DSR)
    node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80), A[v]))
    node.add_service(VIP[v], 80, "TCP", [(A[v], 8080)])
    out = node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80, "A"), A[v]))
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(A[v], 8080)} ttl 63"


@both
@each
def test_the_other_node_knows_first_that_a_service_is_forwarded_so(node: Machine, v: int, make, name: str) -> None:
    """Or has a flow from when it was."""
    node.add_service(VIP[v], 80, name, [(A[v], 8080)])
    out = node.run("wag_node_ingress", wrapped(v, make(CLIENT[v], 1000, VIP[v], 80), A[v]))
    assert ends(out.packet) == f"{name} {at(CLIENT[v], 1000)} > {at(A[v], 8080)} ttl 63"


@both
@each
def test_the_backends_node_answers_itself(node: Machine, v: int, make, name: str) -> None:
    node.add_service(VIP[v], 80, name, [(A[v], 8080), (REMOTE[v], 8080)], flags=DSR)
    asked = wrapped(v, make(CLIENT[v], 1000, VIP[v], 80), A[v])
    out = node.run("wag_node_ingress", asked)
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"{name} {at(CLIENT[v], 1000)} > {at(A[v], 8080)} ttl 63"
    assert Ether(out.packet).dst == "02:00:00:00:00:02"
    answer = node.run("wag_pod_egress", make(A[v], 8080, CLIENT[v], 1000))
    assert answer.verdict == REDIRECT
    assert ends(answer.packet) == f"{name} {at(VIP[v], 80)} > {at(CLIENT[v], 1000)} ttl 63"


@both
@each
def test_a_backend_that_hints_hide_from_its_own_node(node: Machine, v: int, make, name: str) -> None:
    node.add_service(VIP[v], 80, name, [(B[v], 8080)], draining=[(A[v], 8081)], flags=DSR)
    out = node.run("wag_node_ingress", wrapped(v, make(CLIENT[v], 1000, VIP[v], 80), A[v]))
    assert ends(out.packet) == f"{name} {at(CLIENT[v], 1000)} > {at(A[v], 8081)} ttl 63"


@both
def test_a_node_port_of_another_node(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30080, "TCP", [(A[v], 8080)], flags=DSR)
    out = node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, PEER[v], 30080), A[v]))
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(A[v], 8080)} ttl 63"
    answer = node.run("wag_pod_egress", tcp(A[v], 8080, CLIENT[v], 1000, "SA"))
    assert ends(answer.packet).startswith(f"TCP {at(PEER[v], 30080)} > {at(CLIENT[v], 1000)}")


@both
def test_the_node_itself_as_backend(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(NODE[v], 9000)], flags=DSR)
    out = node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80), NODE[v]))
    assert out.verdict == PASS
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(NODE[v], 9000)} ttl 64"
    answer = node.run("wag_node_egress", tcp(NODE[v], 9000, CLIENT[v], 1000, "SA"))
    assert ends(answer.packet) == f"TCP {at(VIP[v], 80)} > {at(CLIENT[v], 1000)} ttl 64"


@both
@each
def test_two_services_before_one_backend_and_one_client_port(node: Machine, v: int, make, name: str) -> None:
    other = {4: "10.96.0.11", 6: "fd00:10:96::11"}[v]
    for address in (VIP[v], other):
        node.add_service(address, 80, name, [(A[v], 8080)], flags=DSR)
    node.run("wag_node_ingress", wrapped(v, make(CLIENT[v], 1000, VIP[v], 80), A[v]))
    second = node.run("wag_node_ingress", wrapped(v, make(CLIENT[v], 1000, other, 80), A[v]))
    port = source_port(second.packet)
    assert 40000 <= port <= 50000
    for client_port, address in ((1000, VIP[v]), (port, other)):
        answer = node.run("wag_pod_egress", make(A[v], 8080, CLIENT[v], client_port))
        assert ends(answer.packet).startswith(f"{name} {at(address, 80)} > {at(CLIENT[v], 1000)}")


@both
def test_the_answer_to_a_syn_leaves_room_for_the_header(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(A[v], 8080)], flags=DSR)
    node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80), A[v]))
    answer = Ether(**MACS) / layer(v)(src=A[v], dst=CLIENT[v])
    answer /= TCP(sport=8080, dport=1000, flags="SA", options=[("MSS", 1460), ("NOP", None), ("WScale", 7)])
    out = Ether(node.run("wag_pod_egress", bytes(answer)).packet)
    check_sums(out)
    assert dict(out[TCP].options)["MSS"] == 1460 - (40 if v == 6 else 20)
    # one that is small already, and one from a backend that was asked without a tunnel
    answer[TCP].options = [("MSS", 500)]
    assert dict(Ether(node.run("wag_pod_egress", bytes(answer)).packet)[TCP].options)["MSS"] == 500
    node.add_service(ANY[v], 30080, "TCP", [(B[v], 8080)])
    node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080))
    answer[TCP].options = [("MSS", 1460)]
    answer[layer(v)].src = B[v]
    assert dict(Ether(node.run("wag_pod_egress", bytes(answer)).packet)[TCP].options)["MSS"] == 1460


@both
def test_what_does_not_fit_with_the_header(node: Machine, v: int) -> None:
    node.summed = False
    node.add_service(VIP[v], 80, "TCP", [(NARROW[v], 8080)], flags=DSR)
    head = IPv6(src=CLIENT[6], dst=VIP[6]) if v == 6 else IP(src=CLIENT[4], dst=VIP[4], flags="DF")
    room = 1400 - (40 if v == 6 else 20)
    for size, fits in ((room, True), (room + 1, False)):
        packet = bytes(Ether(**MACS) / head / TCP(sport=1000, dport=80) / Raw(b"x" * (size - len(head) - 20)))
        assert len(packet) == 14 + size
        out = node.run("wag_node_ingress", packet)
        assert out.verdict == REDIRECT
        if fits:
            assert opened(v, out.packet)[1] == NARROW[v]
            continue
        answer = Ether(out.packet)
        check_sums(answer)
        assert answer[layer(v)].dst == CLIENT[v]
        told = answer[ICMPv6PacketTooBig].mtu if v == 6 else answer[ICMP].nexthopmtu
        assert told == room


@both
def test_what_is_not_taken_out(node: Machine, v: int) -> None:
    """A tunnel of somebody else's goes where it is sent."""
    node.add_service(VIP[v], 80, "TCP", [(B[v], 8080)])  # neither forwarded so, nor with that backend
    node.add_service(VIP[v], 81, "TCP", [(B[v], 8080)], flags=DSR)
    for inner in (
        tcp(CLIENT[v], 1000, VIP[v], 80),
        tcp(CLIENT[v], 1000, VIP[v], 82),
        tcp(CLIENT[v], 1000, B[v], 81),
        b"\0" * 60,
        b"\0" * 14,
    ):
        packet = wrapped(v, inner, A[v])
        out = node.run("wag_node_ingress", packet)
        assert out.verdict == REDIRECT
        assert len(out.packet) == len(packet)
        assert node.run("wag_node_ingress", wrapped(v, inner, REMOTE[v])).verdict == PASS


@both
def test_what_is_taken_out_and_dropped(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(B[v], 8080)], flags=DSR)
    assert node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80), A[v])).verdict == DROP
    assert node.drops() == {("stale_backend", "node_ingress"): 1}
    node.add_ranges(7, {4: "198.51.100.0/24", 6: "2001:db8:1::/48"}[v])
    node.add_service(VIP[v], 81, "TCP", [(A[v], 8080)], flags=DSR, ranges=7)
    assert node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 81), A[v])).verdict == DROP
    assert node.drops()["source_range", "node_ingress"] == 1


@both
def test_an_established_connection_of_a_backend_that_is_gone(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(A[v], 8080)], flags=DSR)
    node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80), A[v]))
    node.add_service(VIP[v], 80, "TCP", [(B[v], 8080)], flags=DSR)
    out = node.run("wag_node_ingress", wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80, "A"), A[v]))
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(A[v], 8080)} ttl 63"
    # and where the Service is gone altogether, the asked node sends plain packets
    node.remove_service(VIP[v], 80, "TCP")
    node.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)], flags=DSR)
    node.run("wag_node_ingress", tcp(CLIENT[v], 1001, VIP[v], 80))
    node.remove_service(VIP[v], 80, "TCP")
    out = node.run("wag_node_ingress", tcp(CLIENT[v], 1001, VIP[v], 80, "A"))
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1001)} > {at(REMOTE[v], 8080)} ttl 63"


@both
def test_fragments(node: Machine, v: int) -> None:
    datagram = layer(v)(src=CLIENT[v], dst=VIP[v]) / UDP(sport=1000, dport=53) / Raw(b"x" * 2000)
    if v == 6:
        parts = fragment6(IPv6(src=CLIENT[6], dst=VIP[6]) / IPv6ExtHdrFragment(id=9) / datagram[UDP], 1280)
    else:
        parts = fragment(IP(src=CLIENT[4], dst=VIP[4], id=9) / datagram[UDP], 1000)
    raw = [bytes(Ether(**MACS) / part) for part in parts]
    assert len(raw) > 1
    node.add_service(VIP[v], 53, "UDP", [(REMOTE[v], 8053)], flags=DSR)
    sent = [node.run("wag_node_ingress", part).packet for part in raw]
    assert {opened(v, packet, whole=False)[1] for packet in sent} == {REMOTE[v]}
    node.reset()
    know_nodes(node)
    node.add_pod(A[v], 101)
    node.add_service(VIP[v], 53, "UDP", [(A[v], 8053)], flags=DSR)
    received = [
        Ether(node.run("wag_node_ingress", wrapped(v, opened(v, packet, whole=False)[2], A[v])).packet)
        for packet in sent
    ]
    assert {packet[layer(v)].dst for packet in received} == {A[v]}
    assert received[0][UDP].dport == 8053


@both
def test_an_error_about_an_answer_reaches_the_backend(node: Machine, v: int) -> None:
    """It comes to the node that was asked, which knows where the flow went."""
    node.add_service(VIP[v], 80, "UDP", [(REMOTE[v], 8080)], flags=DSR)
    node.run("wag_node_ingress", udp(CLIENT[v], 1000, VIP[v], 80))
    answer = layer(v)(udp(VIP[v], 80, CLIENT[v], 1000)[14:])
    if v == 4:
        error = IP(src="192.0.2.200", dst=VIP[4]) / ICMP(type=3, code=4, nexthopmtu=1300) / answer
    else:
        error = IPv6(src="2001:db8::200", dst=VIP[6]) / ICMPv6PacketTooBig(mtu=1300) / answer
    out = Ether(node.run("wag_node_ingress", bytes(Ether(**MACS) / error)).packet)
    assert out[layer(v)].dst == REMOTE[v]
    inner = layer(v)(bytes(out[ICMPv6PacketTooBig if v == 6 else ICMP].payload))
    assert (inner.src, inner.dst) == (REMOTE[v], CLIENT[v])
