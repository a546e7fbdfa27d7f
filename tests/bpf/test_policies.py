"""Rejecting and dropping, traffic policies, source ranges, session affinity: packets in, packets out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from packets import ANY, CLIENT, NODE, REMOTE, VIP, A, B, at, both, build, check_sums, ends, tcp, udp
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPerror6, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import (
    SCTP,
    SCTPChunkAbort,
    SCTPChunkCookieAck,
    SCTPChunkData,
    SCTPChunkInit,
    SCTPChunkShutdownComplete,
)
from scapy.packet import Packet

from waggle.abi._generated import Scope, ServiceFlag
from waggle.model.packets import End
from waggle.testing.frames import parse
from waggle.testing.machine import DROP, NODE4, REDIRECT, Machine

each = pytest.mark.parametrize("make", [tcp, udp], ids=["tcp", "udp"])
hooks = pytest.mark.parametrize("hook", ["pod_egress", "node_ingress"])


def client_of(hook: str, v: int) -> str:
    return A[v] if hook == "pod_egress" else CLIENT[v]


# -- reject ----------------------------------------------------------------------------------------------------------


@both
@hooks
def test_a_connection_to_nothing_is_reset(node: Machine, v: int, hook: str) -> None:
    node.add_service(VIP[v], 80, "TCP", [])
    source = client_of(hook, v)
    packet = tcp(source, 1000, VIP[v], 80, payload=b"")
    out = node.run(f"wag_{hook}", packet)
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"TCP {at(VIP[v], 80)} > {at(source, 1000)} ttl 64"
    answer, asked = Ether(out.packet), Ether(packet)
    assert (answer.dst, answer.src) == (asked.src, asked.dst)
    assert (answer[TCP].flags, answer[TCP].seq, answer[TCP].ack) == ("RA", 0, 1001)
    assert len(out.packet) == 14 + (20 if v == 4 else 40) + 20
    assert node.drops() == {("no_backend", hook): 1}


@both
@pytest.mark.parametrize(
    ("flags", "payload", "answer"),
    [
        ("S", b"", ("RA", 0, 1001)),
        ("S", b"x" * 9, ("RA", 0, 1010)),  # TCP Fast Open
        ("F", b"x" * 5, ("RA", 0, 1006)),
        ("PA", b"x" * 700, ("R", 555, 0)),
        ("A", b"", ("R", 555, 0)),
    ],
)
def test_what_a_reset_acknowledges(node: Machine, v: int, flags: str, payload: bytes, answer: tuple) -> None:
    node.summed = False
    node.add_service(VIP[v], 80, "TCP", [])
    layer = TCP(sport=1000, dport=80, flags=flags, seq=1000, ack=555 if "A" in flags else 0)
    out = node.run("wag_pod_egress", build(A[v], VIP[v], layer, payload=payload))
    check_sums(Ether(out.packet))
    found = Ether(out.packet)[TCP]
    assert (found.flags, found.seq, found.ack) == answer


@both
def test_options_are_stepped_over(node: Machine, v: int) -> None:
    node.summed = False
    node.add_service(VIP[v], 80, "TCP", [])
    layer = TCP(sport=1000, dport=80, flags="S", seq=1000, options=[("MSS", 1460), ("SAckOK", ""), ("WScale", 7)])
    out = node.run("wag_pod_egress", build(A[v], VIP[v], layer, payload=b""))
    check_sums(Ether(out.packet))
    assert Ether(out.packet)[TCP].ack == 1001


@both
def test_a_reset_is_not_answered(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [])
    assert node.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80, flags="R")).verdict == DROP


@both
@hooks
@pytest.mark.parametrize(
    ("chunk", "tag", "answered"),
    [
        (SCTPChunkInit(init_tag=9), 9, 0),
        (SCTPChunkData(data=b"hello"), 7, 1),
        (SCTPChunkCookieAck(), 7, 1),
        (SCTPChunkAbort(), 7, None),
        (SCTPChunkShutdownComplete(), 7, None),
    ],
    ids=["init", "data", "cookie ack", "abort", "shutdown complete"],
)
def test_an_association_to_nothing_is_aborted(
    node: Machine, v: int, hook: str, chunk: Packet, tag: int, answered: int | None
) -> None:
    """`answered`: whether the tag is the one that was sent."""
    node.summed = False
    node.add_service(VIP[v], 80, "SCTP", [])
    asked = SCTP(sport=1000, dport=80, tag=0 if chunk.name == "SCTPChunkInit" else 7) / chunk
    out = node.run(f"wag_{hook}", build(client_of(hook, v), VIP[v], asked, payload=b""))
    if answered is None:
        assert out.verdict == DROP
        return
    assert out.verdict == REDIRECT
    told = Ether(out.packet)
    check_sums(told)
    assert (told[SCTP].sport, told[SCTP].dport, told[SCTP].tag) == (80, 1000, tag)
    assert bytes(told[SCTP].payload) == bytes([6, answered, 0, 4])
    assert node.drops() == {("no_backend", hook): 1}


@both
def test_a_checksum_that_is_yet_to_be_computed_stays_so(node: Machine, v: int) -> None:
    """Virtual interfaces carry SCTP without one: what is computed in the end is to cover zeros."""
    node.summed = False
    node.add_service(VIP[v], 80, "SCTP", [])
    asked = SCTP(sport=1000, dport=80, tag=0, chksum=0) / SCTPChunkInit(init_tag=9)
    out = node.run("wag_pod_egress", build(A[v], VIP[v], asked, payload=b""))
    assert Ether(out.packet)[SCTP].chksum == 0


@both
@hooks
@pytest.mark.parametrize("size", [0, 5, 1200])
def test_a_datagram_to_nothing_is_unreachable(node: Machine, v: int, hook: str, size: int) -> None:
    node.summed = False
    node.add_service(VIP[v], 53, "UDP", [])
    source = client_of(hook, v)
    out = node.run(f"wag_{hook}", udp(source, 1000, VIP[v], 53, payload=b"x" * size))
    assert out.verdict == REDIRECT
    parsed = Ether(out.packet)
    check_sums(parsed)
    if v == 4:
        assert (parsed[IP].src, parsed[IP].dst) == (VIP[v], source)
        assert (parsed[ICMP].type, parsed[ICMP].code) == (3, 3)
        inner = IP(bytes(parsed[ICMP].payload))
    else:
        assert (parsed[IPv6].src, parsed[IPv6].dst) == (VIP[v], source)
        message = parsed[ICMPv6DestUnreach]
        assert message.code == 4
        fresh = parsed.copy()
        fresh[ICMPv6DestUnreach].cksum = None
        assert Ether(bytes(fresh))[ICMPv6DestUnreach].cksum == message.cksum
        inner = IPv6(bytes(parsed[IPerror6]))
    assert (inner.src, inner.dst, inner[UDP].sport, inner[UDP].dport) == (source, VIP[v], 1000, 53)
    assert node.drops() == {("no_backend", hook): 1}


def test_a_datagram_with_ip_options_is_quoted_with_them(node: Machine) -> None:
    node.summed = False
    from scapy.layers.inet import IPOption_Router_Alert

    node.add_service(VIP[4], 53, "UDP", [])
    out = node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53, options=[IPOption_Router_Alert()]))
    parsed = Ether(out.packet)
    check_sums(parsed)
    assert IP(bytes(parsed[ICMP].payload)).ihl == 6


# -- traffic policies ------------------------------------------------------------------------------------------------


@both
@each
def test_nothing_on_this_node_is_dropped(node: Machine, v: int, make: Callable[..., bytes]) -> None:
    node.add_service(VIP[v], 80, make.__name__.upper(), [], flags=ServiceFlag.EMPTY_DROP)
    assert node.run("wag_pod_egress", make(A[v], 1000, VIP[v], 80)).verdict == DROP
    assert node.drops() == {("no_local_backend", "pod_egress"): 1}


@both
@each
def test_the_wire_gets_the_external_entry_and_keeps_its_address(
    node: Machine, v: int, make: Callable[..., bytes]
) -> None:
    name = make.__name__.upper()
    for address, port in ((ANY[v], 30080), (VIP[v], 80)):
        node.add_service(address, port, name, [(REMOTE[v], 8080)], flags=ServiceFlag.HAS_EXTERNAL)
        node.add_service(address, port, name, [(B[v], 8080)], scope=Scope.EXTERNAL, flags=ServiceFlag.KEEP_CLIENT)
    for target, port in ((NODE[v], 30080), (VIP[v], 80)):
        out = node.run("wag_node_ingress", make(CLIENT[v], 1000 + port, target, port))
        assert ends(out.packet) == f"{name} {at(CLIENT[v], 1000 + port)} > {at(B[v], 8080)} ttl 63"
        inside = node.run("wag_pod_egress", make(A[v], 1000 + port, target, port))
        assert ends(inside.packet) == f"{name} {at(A[v], 1000 + port)} > {at(REMOTE[v], 8080)} ttl 63"


@both
def test_the_wire_is_left_waiting_where_only_other_nodes_serve(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30080, "TCP", [(REMOTE[v], 8080)], flags=ServiceFlag.HAS_EXTERNAL)
    node.add_service(ANY[v], 30080, "TCP", [], scope=Scope.EXTERNAL, flags=ServiceFlag.EMPTY_DROP)
    assert node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080)).verdict == DROP
    assert node.drops() == {("no_local_backend", "node_ingress"): 1}


@both
def test_a_load_balancer_address_may_be_the_nodes_own(node: Machine, v: int) -> None:
    node.add_service(NODE[v], 80, "TCP", [(B[v], 8080)])
    out = node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 80))
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(B[v], 8080)} ttl 63"


@both
def test_an_address_that_serves_no_node_ports(node: Machine, v: int) -> None:
    other = {4: "192.0.2.2", 6: "2001:db8::2"}[v]
    node.add_node(other, nodeports=False)
    node.add_service(ANY[v], 30080, "TCP", [(B[v], 8080)])
    packet = tcp(CLIENT[v], 1000, other, 30080)
    out = node.run("wag_node_ingress", packet)
    assert (out.verdict, out.packet) == (0, packet)


# -- source ranges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("v", "networks", "client", "admitted"),
    [
        (4, ["192.0.2.0/25"], "192.0.2.77", True),
        (4, ["192.0.2.128/25"], "192.0.2.77", False),
        (4, ["198.51.100.0/24", "192.0.2.77/32"], "192.0.2.77", True),
        (4, ["0.0.0.0/1", "128.0.0.0/1"], "192.0.2.77", True),
        (4, ["192.0.2.76/32"], "192.0.2.77", False),
        (4, ["2001:db8::/32"], "192.0.2.77", False),
        (4, [], "192.0.2.77", False),
        (6, ["2001:db8::/64"], "2001:db8::77", True),
        (6, ["2001:db8:0:1::/64"], "2001:db8::77", False),
        (6, ["2001:db8::77/128"], "2001:db8::77", True),
    ],
)
def test_source_ranges(node: Machine, v: int, networks: list[str], client: str, admitted: bool) -> None:
    node.add_ranges(7, *networks)
    node.add_ranges(8, f"{client}/{32 if v == 4 else 128}")  # another list
    node.add_service(VIP[v], 80, "TCP", [(B[v], 8080)], ranges=7)
    out = node.run("wag_node_ingress", tcp(client, 1000, VIP[v], 80))
    assert out.verdict == (REDIRECT if admitted else DROP)
    assert node.drops() == ({} if admitted else {("source_range", "node_ingress"): 1})


def test_source_ranges_hold_for_pods_and_not_for_established_flows(node: Machine) -> None:
    node.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
    node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    node.add_ranges(7, "192.0.2.0/24")
    node.add_service(VIP[4], 80, "TCP", [(B[4], 8080)], ranges=7)
    assert node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80, flags="A")).verdict == REDIRECT
    assert node.run("wag_pod_egress", tcp(A[4], 1001, VIP[4], 80)).verdict == DROP


# -- affinity --------------------------------------------------------------------------------------------------------

MANY = [(f"10.244.3.{i}", 80) for i in range(1, 21)]


def backend(node: Machine, source: str, port: int, target: str = VIP[4], target_port: int = 80) -> str:
    return Ether(node.run("wag_pod_egress", udp(source, port, target, target_port)).packet)[IP].dst


def test_a_client_stays_with_its_backend_on_every_frontend(node: Machine) -> None:
    node.add_service(VIP[4], 80, "UDP", MANY, affinity_s=100)
    node.add_service("0.0.0.0", 30080, "UDP", MANY, affinity_s=100)
    first = backend(node, A[4], 2000)
    assert {backend(node, A[4], port) for port in range(2001, 2030)} == {first}
    assert backend(node, A[4], 2040, NODE4, 30080) == first
    others = [f"10.244.1.{i}" for i in range(100, 160)]
    for address in others:
        node.add_pod(address, 103)
    assert len({backend(node, address, 2000) for address in others}) > 5


def test_affinity_ends_with_its_time_and_with_its_backend(node: Machine) -> None:
    node.add_service(VIP[4], 80, "UDP", MANY, affinity_s=100)
    first = backend(node, A[4], 2000)
    node.add_service(VIP[4], 80, "UDP", [end for end in MANY if end[0] != first], affinity_s=100)
    second = backend(node, A[4], 2001)
    assert second != first
    assert {backend(node, A[4], port) for port in range(2002, 2020)} == {second}
    node.age_affinity(101)
    assert len({backend(node, A[4], port) for port in range(3000, 3030)}) == 1  # a new one, and it is kept again
    node.add_service(VIP[4], 80, "UDP", MANY)
    assert len({backend(node, A[4], port) for port in range(4000, 4030)}) > 5


def test_each_new_flow_begins_the_time_anew(node: Machine) -> None:
    node.add_service(VIP[4], 80, "UDP", MANY, affinity_s=100)
    first = backend(node, A[4], 2000)
    for port in range(2001, 2020):
        node.age_affinity(60)
        assert backend(node, A[4], port) == first


# -- flows whose backend goes ----------------------------------------------------------------------------------------


@both
@hooks
def test_a_udp_flow_is_left_alone_when_nothing_serves_any_more(node: Machine, v: int, hook: str) -> None:
    node.summed = False
    source = client_of(hook, v)
    node.add_service(VIP[v], 53, "UDP", [(B[v], 5353)])
    first = node.run(f"wag_{hook}", udp(source, 1000, VIP[v], 53))
    node.add_service(VIP[v], 53, "UDP", [])
    again = node.run(f"wag_{hook}", udp(source, 1000, VIP[v], 53))
    assert (again.verdict, again.packet) == (first.verdict, first.packet)
    assert node.run(f"wag_{hook}", udp(source, 1001, VIP[v], 53)).packet != first.packet
    assert node.drops() == {("no_backend", hook): 1}  # of the flow that is new
    node.add_service(VIP[v], 53, "UDP", [(A[v], 5353)])
    other = B[v] if hook == "pod_egress" else CLIENT[v]
    moved = node.run(f"wag_{hook}", udp(other, 1000, VIP[v], 53))
    assert at(A[v], 5353) in ends(moved.packet)


@both
@hooks
def test_an_sctp_association_keeps_the_backend_that_left_the_set(node: Machine, v: int, hook: str) -> None:
    source = client_of(hook, v)
    init, data = (
        build(source, VIP[v], SCTP(sport=1000, dport=80, tag=1) / chunk, payload=b"")
        for chunk in (SCTPChunkInit(init_tag=9), SCTPChunkData(data=b"hello"))
    )

    def sent_to(packet: bytes) -> End:
        return parse(node.run(f"wag_{hook}", packet).packet).flow.destination

    node.add_service(VIP[v], 80, "SCTP", [(B[v], 8080)])
    assert sent_to(init) == End(B[v], 8080)
    node.add_service(VIP[v], 80, "SCTP", [(REMOTE[v], 8080)])
    assert sent_to(data) == End(B[v], 8080)
    node.remove_service(VIP[v], 80, "SCTP")
    assert sent_to(data) == End(B[v], 8080)
    node.add_service(VIP[v], 80, "SCTP", [(REMOTE[v], 8080)])
    assert sent_to(init) == End(REMOTE[v], 8080)
