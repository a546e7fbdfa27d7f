"""Packets to addresses of Services that no frontend takes: the programs against the rule of waggle.model.vip."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import pytest
from packets import CLIENT, NODE, REMOTE, VIP, A, B, at, both, build, check_sums, ends, macs, tcp, udp
from scapy.layers.inet import GRE, ICMP, IP, TCP, fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Raw

from waggle.model.vip import Beyond, beyond_frontends
from waggle.testing.machine import DROP, PASS, REDIRECT, Machine

RANGES = {4: "10.96.0.0/16", 6: "fd00:10:96::/112"}
FREE = {4: "10.96.0.99", 6: "fd00:10:96::99"}
STRAY = {4: "10.50.0.1", 6: "fd00:50::1"}  # a cluster address outside of the range
EXTERNAL = {4: "203.0.113.5", 6: "2001:db8:113::5"}
INSIDE = {4: "10.96.0.50", 6: "fd00:10:96::50"}  # a load balancer's address within the range
OTHER = {4: "198.51.100.7", 6: "2001:db8:51::7"}
PLACES = {"used": VIP, "free": FREE, "stray": STRAY, "external": EXTERNAL, "inside": INSIDE, "other": OTHER}
#: hook → who sends
SENDERS = {"pod_egress": A, "node_ingress": CLIENT, "node_egress": NODE}
hooks = pytest.mark.parametrize("hook", SENDERS)


def ping(source: str, target: str, **kwargs) -> bytes:
    layer = ICMPv6EchoRequest(id=7, seq=3) if ":" in source else ICMP(id=7, seq=3)
    return build(source, target, layer, **kwargs)


def sctp(source: str, target: str) -> bytes:
    return build(source, target, SCTP(sport=1000, dport=81, tag=0) / SCTPChunkInit(init_tag=9), payload=b"")


def gre(source: str, target: str) -> bytes:
    return build(source, target, GRE())


def error(source: str, target: str) -> bytes:
    """An ICMP error about a flow that nobody knows."""
    inside = bytes(Ether(udp(target, 53, source, 999)).payload)
    if ":" in source:
        return build(source, target, ICMPv6DestUnreach(code=4), payload=inside)
    return build(source, target, ICMP(type=3, code=3), payload=inside)


KINDS: dict[str, Callable[[str, str], bytes]] = {
    "tcp": lambda source, target: tcp(source, 1000, target, 81, payload=b""),
    "tcp-established": lambda source, target: tcp(source, 1000, target, 81, flags="A", payload=b""),
    "udp": lambda source, target: udp(source, 1000, target, 81),
    "sctp": sctp,
    "gre": gre,
    "ping": ping,
    "icmp-error": error,
}


@pytest.fixture
def services(node: Machine) -> Machine:
    """Every kind of address, each with port 80 served."""
    for v in (4, 6):
        for place in (VIP, STRAY, EXTERNAL, INSIDE):
            node.add_service(place[v], 80, "TCP", [(B[v], 8080)])
            node.add_vip(place[v], cluster=place in (VIP, STRAY))
    node.set_service_ranges(*RANGES.values(), strays=True)
    return node


def used(v: int) -> dict[str, bool]:
    return {VIP[v]: True, STRAY[v]: True, EXTERNAL[v]: False, INSIDE[v]: False}


def outcome(machine: Machine, hook: str, packet: bytes) -> Beyond:
    """What became of a packet, as the model names it."""
    before = machine.drops()
    out = machine.run(f"wag_{hook}", packet)
    dropped = {reason for (reason, _), count in machine.drops().items() if count > before.get((reason, _), 0)}
    sent_back = out.verdict == REDIRECT and macs(out.packet) == macs(packet)[::-1]
    if out.verdict == DROP:
        assert dropped <= {"free_address", "no_port"} and dropped
        return Beyond.DROP
    if sent_back:
        check_sums(Ether(out.packet))
        assert dropped <= {"no_port"}
        return Beyond.REJECT if dropped else Beyond.ECHO
    assert not dropped
    assert out.verdict == (REDIRECT if hook == "pod_egress" else PASS)
    return Beyond.PASS


@both
@hooks
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_as_the_model_says(services: Machine, v: int, hook: str, kind: str, place: str) -> None:
    services.summed = False
    packet = KINDS[kind](SENDERS[hook][v], PLACES[place][v])
    expected = beyond_frontends(
        PLACES[place][v],
        echo=kind == "ping",
        used=used(v),
        ranges=[ipaddress.ip_network(RANGES[v])],
        errors=kind not in ("ping", "icmp-error"),
        established=kind == "tcp-established",
    )
    assert outcome(services, hook, packet) is expected


@pytest.mark.parametrize(
    ("place", "kind", "expected"),
    [
        ("used", "tcp", "reject"),
        ("used", "udp", "reject"),
        ("used", "tcp-established", "pass"),
        ("used", "ping", "echo"),
        ("used", "icmp-error", "drop"),
        ("free", "tcp", "drop"),
        ("free", "ping", "drop"),
        ("stray", "tcp", "reject"),
        ("external", "tcp", "pass"),  # the address may be a machine's own
        ("external", "ping", "echo"),
        ("inside", "tcp", "drop"),
        ("other", "tcp", "pass"),
        ("other", "ping", "pass"),
    ],
)
def test_what_the_model_says(services: Machine, place: str, kind: str, expected: str) -> None:
    """The rule itself, written out once."""
    services.summed = False
    assert outcome(services, "pod_egress", KINDS[kind](A[4], PLACES[place][4])) == expected


# -- answers ---------------------------------------------------------------------------------------------------------


@both
@hooks
@pytest.mark.parametrize("size", [0, 1, 56, 1400])
def test_an_echo_is_answered(services: Machine, v: int, hook: str, size: int) -> None:
    source = SENDERS[hook][v]
    packet = ping(source, VIP[v], ttl=5, payload=bytes(range(256)) * 6 if size > 256 else bytes(size))
    out = services.run(f"wag_{hook}", packet)
    answer, asked = Ether(out.packet), Ether(packet)
    assert (answer.src, answer.dst) == (asked.dst, asked.src)
    if v == 4:
        check_sums(answer)
        assert (answer[IP].src, answer[IP].dst, answer[IP].ttl) == (VIP[v], source, 64)
        assert (answer[ICMP].type, answer[ICMP].id, answer[ICMP].seq) == (0, 7, 3)
        assert bytes(answer[ICMP].payload) == bytes(asked[ICMP].payload)
    else:
        assert (answer[IPv6].src, answer[IPv6].dst, answer[IPv6].hlim) == (VIP[v], source, 64)
        reply = answer[ICMPv6EchoReply]
        assert (reply.id, reply.seq, reply.data) == (7, 3, asked[ICMPv6EchoRequest].data)
        fresh = answer.copy()
        fresh[ICMPv6EchoReply].cksum = None
        assert Ether(bytes(fresh))[ICMPv6EchoReply].cksum == reply.cksum
    assert services.drops() == {}


def test_an_echo_in_fragments_is_answered_in_fragments(services: Machine) -> None:
    whole = Ether(ping(A[4], VIP[4], payload=bytes(range(256)) * 12, id=77))
    pieces = [bytes(Ether(dst=whole.dst, src=whole.src) / piece) for piece in fragment(whole[IP], 1480)]
    assert len(pieces) == 3
    message = b""
    for piece in pieces:
        out = services.run("wag_pod_egress", piece)
        assert out.verdict == REDIRECT
        answer = Ether(out.packet)[IP]
        assert (answer.src, answer.dst, answer.id, answer.frag * 8) == (VIP[4], A[4], 77, len(message))
        message += bytes(answer.payload)
    reply = ICMP(message)
    again = reply.copy()
    again.chksum = None
    assert (reply.type, ICMP(bytes(again)).chksum) == (0, reply.chksum)


@both
def test_a_later_fragment_is_not_answered_with_an_error(services: Machine, v: int) -> None:
    if v == 4:
        packet = build(A[4], VIP[4], Raw(b"x" * 64), proto=17, frag=100, id=9)
    else:
        from scapy.layers.inet6 import IPv6ExtHdrFragment

        packet = build(A[6], VIP[6], IPv6ExtHdrFragment(nh=17, offset=100, id=9) / Raw(b"x" * 64))
    assert services.run("wag_pod_egress", packet).verdict == DROP
    assert services.drops() == {("no_port", "pod_egress"): 1}


@both
@hooks
def test_a_reset_from_an_undefined_port(services: Machine, v: int, hook: str) -> None:
    source = SENDERS[hook][v]
    out = services.run(f"wag_{hook}", tcp(source, 1000, VIP[v], 81, payload=b""))
    assert ends(out.packet) == f"TCP {at(VIP[v], 81)} > {at(source, 1000)} ttl 64"
    assert (Ether(out.packet)[TCP].flags, Ether(out.packet)[TCP].ack) == ("RA", 1001)


# -- what is left alone ----------------------------------------------------------------------------------------------


@both
def test_without_ranges_nothing_is_dropped(services: Machine, v: int) -> None:
    """And without cluster addresses outside of them, no address is looked up."""
    services.summed = False
    services.set_service_ranges()
    for place, kind in ((FREE, "udp"), (FREE, "ping"), (VIP, "udp"), (STRAY, "tcp")):
        assert outcome(services, "pod_egress", KINDS[kind](A[v], place[v])) is Beyond.PASS
    services.set_service_ranges(strays=True)
    assert outcome(services, "pod_egress", KINDS["udp"](A[v], VIP[v])) is Beyond.REJECT
    assert outcome(services, "pod_egress", KINDS["udp"](A[v], FREE[v])) is Beyond.PASS


@both
def test_every_range_counts(services: Machine, v: int) -> None:
    more = [f"10.{n}.0.0/20" if v == 4 else f"fd00:{n}::/64" for n in range(200, 208)]
    services.set_service_ranges(*more)
    for network in map(ipaddress.ip_network, more):
        inside = str(network.network_address + 77)
        beyond = str(network.network_address + network.num_addresses)
        assert outcome(services, "pod_egress", KINDS["tcp"](A[v], inside)) is Beyond.DROP
        assert outcome(services, "pod_egress", KINDS["tcp"](A[v], beyond)) is Beyond.PASS


@both
def test_addresses_of_pods_and_of_the_node_are_not_asked_about(services: Machine, v: int) -> None:
    services.set_service_ranges("10.0.0.0/8", "192.0.2.0/24", "::/0")
    for hook, source in (("pod_egress", A), ("node_ingress", CLIENT)):
        assert services.run(f"wag_{hook}", tcp(source[v], 1000, B[v], 81)).verdict == REDIRECT
        assert services.run(f"wag_{hook}", tcp(source[v], 1000, NODE[v], 22)).verdict == PASS
    assert services.drops() == {}


@both
def test_established_flows_of_a_port_that_is_gone_go_on(services: Machine, v: int) -> None:
    out = services.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT
    services.remove_service(VIP[v], 80, "TCP")
    going = services.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80, flags="A"))
    assert ends(going.packet) == f"TCP {at(A[v], 1000)} > {at(B[v], 8080)} ttl 63"
    new = services.run("wag_pod_egress", tcp(A[v], 1001, VIP[v], 80, payload=b""))
    assert ends(new.packet) == f"TCP {at(VIP[v], 80)} > {at(A[v], 1001)} ttl 64"
    assert services.drops() == {("no_port", "pod_egress"): 1}


@both
def test_answers_to_a_translated_client_are_not_asked_about(services: Machine, v: int) -> None:
    """The reply of a remote backend to a pod that asked through a Service."""
    services.add_service(VIP[v], 82, "TCP", [(REMOTE[v], 8080)])
    services.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 82))
    back = services.run("wag_node_ingress", tcp(REMOTE[v], 8080, A[v], 1000, flags="SA"))
    assert ends(back.packet) == f"TCP {at(VIP[v], 82)} > {at(A[v], 1000)} ttl 63"
