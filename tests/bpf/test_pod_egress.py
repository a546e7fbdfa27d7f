"""What a pod sends: delivery, load balancing per packet, replies, drops. Packets, not only verdicts."""

from __future__ import annotations

import pytest
from packets import ANY, NODE, REMOTE, VIP, A, B, at, both, build, check_sums, ends, macs, source_port, tcp, udp
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from waggle.kernel.testrun import run_packet
from waggle.testing.machine import DROP, HOST_MAC, PASS, POD_MAC, REDIRECT, Flow

VIP2 = {4: "10.96.0.11", 6: "fd00:10:96::11"}
each = pytest.mark.parametrize("make, name", [(tcp, "TCP"), (udp, "UDP")])


@both
@each
def test_to_a_pod_of_this_node_goes_straight_in(node, v, make, name):
    out = node.run("wag_pod_egress", make(A[v], 1000, B[v], 80))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"{name} {at(A[v], 1000)} > {at(B[v], 80)} ttl 63"
    assert macs(out.packet) == (HOST_MAC, POD_MAC)
    assert node.nat() == set()


@both
def test_to_a_pod_elsewhere_leaves_by_the_routes(node, v):
    out = node.run("wag_pod_egress", tcp(A[v], 1000, REMOTE[v], 80))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"TCP {at(A[v], 1000)} > {at(REMOTE[v], 80)} ttl 63"
    assert node.nat() == set()


@both
def test_to_the_node_goes_up_the_stack_unchanged(node, v):
    packet = tcp(A[v], 1000, NODE[v], 22)
    out = node.run("wag_pod_egress", packet)
    assert (out.verdict, out.packet) == (PASS, packet)


@both
@pytest.mark.parametrize("target", ["local", "remote"])
def test_last_hop_goes_up_the_stack_which_answers_time_exceeded(node, v, target):
    packet = udp(A[v], 1000, B[v] if target == "local" else REMOTE[v], 33434, ttl=1)
    out = node.run("wag_pod_egress", packet)
    assert (out.verdict, out.packet) == (PASS, packet)


def test_arp_goes_up_the_stack(node):
    packet = bytes(Ether(src=POD_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst="169.254.1.1"))
    out = node.run("wag_pod_egress", packet)
    assert (out.verdict, out.packet) == (PASS, packet)


@pytest.mark.parametrize("kind", [ICMPv6ND_NS, ICMPv6ND_NA])
@pytest.mark.parametrize("target", [B[6], REMOTE[6], "fe80::1", "ff02::1:ff00:6"])
def test_neighbour_discovery_stays_on_its_link(node, kind, target):
    """Its hop limit is 255, or it is void: no program may take it for a packet to a pod."""
    packet = build(A[6], target, kind(), ttl=255, payload=b"")
    out = node.run("wag_pod_egress", packet)
    assert (out.verdict, out.packet) == (PASS, packet)


@pytest.fixture
def asking(node):
    """The pod A is behind the interface that the tests' packets come by."""
    for address in A.values():
        node.add_pod(address, node.uplink)
    return node


def test_the_gateway_is_told_to_who_asks_by_arp(asking):
    asked = ARP(hwsrc=POD_MAC, psrc=A[4], pdst="169.254.1.1")
    out = asking.run("wag_pod_egress", bytes(Ether(src=POD_MAC, dst="ff:ff:ff:ff:ff:ff") / asked))
    assert out.verdict == REDIRECT
    answer = Ether(out.packet)
    assert (answer.dst, answer.src) == (POD_MAC, answer[ARP].hwsrc) and answer.src != POD_MAC
    assert (answer[ARP].op, answer[ARP].psrc, answer[ARP].pdst, answer[ARP].hwdst) == (2, "169.254.1.1", A[4], POD_MAC)


def test_the_gateway_is_told_to_who_asks_by_neighbour_discovery(asking):
    solicitation = ICMPv6ND_NS(tgt="fe80::1") / ICMPv6NDOptSrcLLAddr(lladdr=POD_MAC)
    out = asking.run("wag_pod_egress", build(A[6], "ff02::1:ff00:1", solicitation, ttl=255, payload=b""))
    assert out.verdict == REDIRECT
    answer = Ether(out.packet)
    check_sums(answer)
    assert (answer[IPv6].src, answer[IPv6].dst, answer[IPv6].hlim) == ("fe80::1", A[6], 255)
    told = answer[ICMPv6ND_NA]
    assert (told.tgt, told.R, told.S, told.O) == ("fe80::1", 1, 1, 1)
    assert answer.src == answer[ICMPv6NDOptDstLLAddr].lladdr != POD_MAC


def test_others_are_not_told_and_nothing_else_is(asking):
    stranger = {4: "10.244.1.77", 6: "fd00:10:244:1::77"}
    asked = [
        bytes(Ether(src=POD_MAC, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=POD_MAC, psrc=source, pdst=target, op=op))
        for source, target, op in (
            (stranger[4], "169.254.1.1", 1),
            (A[4], "169.254.1.2", 1),
            (A[4], "169.254.1.1", 2),
            (B[4], "169.254.1.1", 1),  # of another interface
        )
    ]
    for source, target in ((stranger[6], "fe80::1"), (A[6], "fe80::2"), (B[6], "fe80::1")):
        layer = ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr=POD_MAC)
        asked.append(build(source, "ff02::1:ff00:1", layer, ttl=255, payload=b""))
    for packet in asked:
        out = asking.run_by(asking.uplink, "wag_pod_egress", packet)
        assert (out.verdict, out.packet) == (PASS, packet)


@pytest.mark.parametrize("target", ["fe80::7", "ff02::fb", "224.0.0.251", "255.255.255.255"])
def test_what_stays_on_its_link_is_not_routed(node, target):
    packet = udp(A[6 if ":" in target else 4], 5353, target, 5353)
    out = node.run("wag_pod_egress", packet)
    assert (out.verdict, out.packet) == (PASS, packet)
    assert node.nat() == set()


def test_echo_to_a_pod_is_delivered(node):
    out = node.run("wag_pod_egress", build(A[4], B[4], ICMP()))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"{A[4]} > {B[4]} ttl 63"


@both
@each
def test_service_becomes_its_backend_and_the_reply_the_service(node, v, make, name):
    node.add_service(VIP[v], 80, name, [(B[v], 8080)])
    out = node.run("wag_pod_egress", make(A[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"{name} {at(A[v], 1000)} > {at(B[v], 8080)} ttl 63"
    assert node.nat() == {
        Flow(f"{name} {at(A[v], 1000)} > {at(VIP[v], 80)}", f"{name} {at(A[v], 1000)} > {at(B[v], 8080)}", True),
        Flow(f"{name} {at(B[v], 8080)} > {at(A[v], 1000)}", f"{name} {at(VIP[v], 80)} > {at(A[v], 1000)}", False),
    }
    reply = node.run("wag_pod_egress", make(B[v], 8080, A[v], 1000))
    assert reply.verdict == REDIRECT
    assert ends(reply.packet) == f"{name} {at(VIP[v], 80)} > {at(A[v], 1000)} ttl 63"


@both
def test_reply_of_a_remote_backend_is_turned_back_at_the_uplink(node, v):
    node.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)])
    out = node.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"TCP {at(A[v], 1000)} > {at(REMOTE[v], 8080)} ttl 63"
    reply = node.run("wag_node_ingress", tcp(REMOTE[v], 8080, A[v], 1000, flags="SA"))
    assert reply.verdict == REDIRECT
    assert ends(reply.packet) == f"TCP {at(VIP[v], 80)} > {at(A[v], 1000)} ttl 63"


@both
def test_a_pod_that_reaches_itself_through_a_service_gets_its_answer(node, v):
    node.add_service(VIP[v], 80, "TCP", [(A[v], 8080)])
    out = node.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT
    port = source_port(out.packet)
    assert ends(out.packet) == f"TCP {at(NODE[v], port)} > {at(A[v], 8080)} ttl 63"
    reply = node.run("wag_pod_egress", tcp(A[v], 8080, NODE[v], port, flags="SA"))
    assert reply.verdict == REDIRECT
    assert ends(reply.packet) == f"TCP {at(VIP[v], 80)} > {at(A[v], 1000)} ttl 63"


@both
def test_a_nodeport_of_this_node_from_a_pod(node, v):
    node.add_service(ANY[v], 30080, "UDP", [(B[v], 8080)])
    out = node.run("wag_pod_egress", udp(A[v], 1000, NODE[v], 30080))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"UDP {at(A[v], 1000)} > {at(B[v], 8080)} ttl 63"
    reply = node.run("wag_pod_egress", udp(B[v], 8080, A[v], 1000))
    assert ends(reply.packet) == f"UDP {at(NODE[v], 30080)} > {at(A[v], 1000)} ttl 63"


@both
def test_a_backend_that_is_a_process_of_the_node(node, v):
    node.add_service(VIP[v], 80, "TCP", [(NODE[v], 8080)])
    out = node.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80))
    assert out.verdict == PASS
    assert ends(out.packet) == f"TCP {at(A[v], 1000)} > {at(NODE[v], 8080)} ttl 64"
    reply = node.run("wag_pod_ingress", tcp(NODE[v], 8080, A[v], 1000, flags="SA"))
    assert reply.verdict == PASS
    assert ends(reply.packet) == f"TCP {at(VIP[v], 80)} > {at(A[v], 1000)} ttl 64"


def test_one_client_port_to_two_services_with_one_backend_stays_two_flows(node):
    for vip in (VIP[4], VIP2[4]):
        node.add_service(vip, 80, "TCP", [(B[4], 8080)])
    first = node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    second = node.run("wag_pod_egress", tcp(A[4], 1000, VIP2[4], 80))
    assert ends(first.packet) == f"TCP {A[4]}:1000 > {B[4]}:8080 ttl 63"
    changed = Ether(second.packet)[TCP].sport
    assert 40000 <= changed <= 50000
    assert ends(second.packet) == f"TCP {A[4]}:{changed} > {B[4]}:8080 ttl 63"
    for port, vip in ((1000, VIP[4]), (changed, VIP2[4])):
        reply = node.run("wag_pod_egress", tcp(B[4], 8080, A[4], port, flags="SA"))
        assert ends(reply.packet) == f"TCP {vip}:80 > {A[4]}:1000 ttl 63"


def test_choice_among_backends_is_even(node):
    backends = [f"10.244.3.{i}" for i in range(1, 5)]
    node.add_service(VIP[4], 80, "UDP", [(b, 80) for b in backends])
    counts = dict.fromkeys(backends, 0)
    for port in range(2000, 2400):
        out = node.run("wag_pod_egress", udp(A[4], port, VIP[4], 80))
        counts[Ether(out.packet)[IP].dst] += 1
    # 400 draws with p = 1/4: mean 100, standard deviation 8.7
    assert all(50 < n < 150 for n in counts.values()), counts


def test_an_established_connection_keeps_its_backend_and_a_new_one_gets_a_live_one(node):
    node.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
    node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    node.add_service(VIP[4], 80, "TCP", [(REMOTE[4], 8080)])
    kept = node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80, flags="A"))
    assert ends(kept.packet) == f"TCP {A[4]}:1000 > {B[4]}:8080 ttl 63"
    fresh = node.run("wag_pod_egress", tcp(A[4], 1001, VIP[4], 80))
    assert ends(fresh.packet) == f"TCP {A[4]}:1001 > {REMOTE[4]}:8080 ttl 63"


def test_a_connection_outlives_its_service(node):
    node.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
    node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    node.remove_service(VIP[4], 80, "TCP")
    kept = node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80, flags="A"))
    assert ends(kept.packet) == f"TCP {A[4]}:1000 > {B[4]}:8080 ttl 63"
    anew = node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    assert ends(anew.packet) == f"TCP {A[4]}:1000 > {VIP[4]}:80 ttl 63"


def test_a_udp_flow_ends_with_its_service(node):
    node.add_service(VIP[4], 53, "UDP", [(B[4], 53)])
    node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53))
    node.remove_service(VIP[4], 53, "UDP")
    out = node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53))
    assert ends(out.packet) == f"UDP {A[4]}:1000 > {VIP[4]}:53 ttl 63"


@pytest.mark.parametrize("group", ["224.0.0.251", "239.1.1.1", "255.255.255.255", "ff02::fb"])
def test_multicast_goes_up_the_stack(node, group):
    packet = udp(A[6 if ":" in group else 4], 5353, group, 5353)
    out = node.run("wag_pod_egress", packet)
    assert (out.verdict, out.packet) == (PASS, packet)


def test_a_client_port_used_again_after_close_is_a_new_connection(node):
    node.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
    node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80, flags="FA"))
    node.add_service(VIP[4], 80, "TCP", [(REMOTE[4], 8080)])
    fresh = node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    assert ends(fresh.packet) == f"TCP {A[4]}:1000 > {REMOTE[4]}:8080 ttl 63"


def test_udp_moves_off_a_backend_that_is_gone_and_stays_on_one_that_is_not(node):
    node.add_service(VIP[4], 53, "UDP", [(B[4], 53)])
    node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53))
    node.add_service(VIP[4], 53, "UDP", [(B[4], 53), (REMOTE[4], 53)])
    for _ in range(10):
        kept = node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53))
        assert ends(kept.packet) == f"UDP {A[4]}:1000 > {B[4]}:53 ttl 63"
    node.add_service(VIP[4], 53, "UDP", [(REMOTE[4], 53)], draining=[(B[4], 53)])
    kept = node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53))
    assert ends(kept.packet) == f"UDP {A[4]}:1000 > {B[4]}:53 ttl 63"
    for port in range(2000, 2020):
        fresh = node.run("wag_pod_egress", udp(A[4], port, VIP[4], 53))
        assert ends(fresh.packet) == f"UDP {A[4]}:{port} > {REMOTE[4]}:53 ttl 63"
    node.add_service(VIP[4], 53, "UDP", [(REMOTE[4], 53)])
    moved = node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53))
    assert ends(moved.packet) == f"UDP {A[4]}:1000 > {REMOTE[4]}:53 ttl 63"


@pytest.mark.parametrize(
    "cut",
    [14 + 10, 14 + 20, 14 + 25],
    ids=["inside the IP header", "no transport header", "inside the transport header"],
)
def test_packets_cut_short_are_dropped_with_a_reason(node, cut):
    whole = bytearray(tcp(A[4], 1000, B[4], 80))
    # the test harness wants at least an Ethernet and an IP header
    packet = bytes(whole[: max(cut, 34)])
    out = node.run("wag_pod_egress", packet)
    if cut >= 34:
        assert out.verdict == DROP
        assert node.drops() == {("malformed", "pod_egress"): 1}
    else:
        assert out.verdict in (DROP, REDIRECT, PASS)


@pytest.mark.parametrize("first_byte", [0x44, 0x65, 0x05, 0x40])
def test_an_impossible_ip_header_is_dropped(node, first_byte):
    packet = bytearray(tcp(A[4], 1000, B[4], 80))
    packet[14] = first_byte
    out = node.run("wag_pod_egress", bytes(packet))
    assert out.verdict == DROP
    assert node.drops() == {("malformed", "pod_egress"): 1}


def test_ip_options_are_stepped_over(node):
    from scapy.layers.inet import IPOption_Router_Alert

    node.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
    packet = tcp(A[4], 1000, VIP[4], 80, options=[IPOption_Router_Alert()])
    out = node.run("wag_pod_egress", packet)
    assert ends(out.packet) == f"TCP {A[4]}:1000 > {B[4]}:8080 ttl 63"


def test_udp_without_checksum_stays_without(node):
    from scapy.layers.inet import UDP

    node.add_service(VIP[4], 53, "UDP", [(B[4], 53)])
    packet = build(A[4], VIP[4], UDP(sport=1000, dport=53, chksum=0))
    out = node.run("wag_pod_egress", packet)
    parsed = Ether(out.packet)
    assert (parsed[IP].dst, parsed[UDP].chksum) == (B[4], 0)


def test_garbage_never_breaks_the_programs(node):
    import random

    rng = random.Random(1)
    for program in ("wag_pod_egress", "wag_pod_ingress", "wag_node_ingress", "wag_node_egress"):
        for _ in range(300):
            head = Ether(src=POD_MAC, dst=HOST_MAC, type=rng.choice([0x0800, 0x86DD, 0x1234]))
            packet = bytes(head) + rng.randbytes(rng.randrange(40, 120))
            assert node.run(program, packet).verdict in (PASS, DROP, REDIRECT)


def test_a_drop_is_also_an_event(node):
    from waggle.abi._generated import Event, EventKind, Reason
    from waggle.kernel.ringbuf import RingBuffer

    node.summed = False
    node.add_service(VIP[4], 80, "TCP", [])
    ring = RingBuffer(node.maps["wag_events_rb"])
    node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    (event,) = [Event.unpack(raw) for raw in ring.read()]
    assert (event.kind, event.reason, event.dport) == (EventKind.DROP, Reason.NO_BACKEND, 80)
    ring.close()


def test_a_flow_emits_one_event_however_many_packets(node):
    from waggle.abi._generated import Event, EventKind, Flow
    from waggle.kernel.ringbuf import RingBuffer

    node.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
    ring = RingBuffer(node.maps["wag_events_rb"])
    for port in range(3000, 3050):
        node.run("wag_pod_egress", tcp(A[4], port, VIP[4], 80))
    (event,) = [Event.unpack(raw) for raw in ring.read()]
    ring.close()
    assert (event.kind, event.dport, event.bport, event.count) == (EventKind.FLOW, 80, 8080, 1)
    ((_, raw),) = node.maps["wag_flows"].dump()
    assert Flow.unpack(raw).count == 50


def test_run_packet_reports_time(node):
    packet = tcp(A[4], 1000, B[4], 80, ttl=255)
    assert node.run("wag_pod_egress", packet, repeat=100).duration_ns > 0
    assert run_packet is not None
