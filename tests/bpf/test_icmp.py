"""ICMP errors about translated flows reach who sent the packet, about the packet as he knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from packets import ANY, CLIENT, MACS, NODE, REMOTE, VIP, A, B, at, both, check_sums, source_port, tcp, udp
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from waggle.testing.machine import PASS, REDIRECT, Machine

ROUTER = {4: "203.0.113.9", 6: "2001:db8:9::9"}
each = pytest.mark.parametrize("make", [tcp, udp], ids=["tcp", "udp"])


def error(v: int, source: str, target: str, cause: bytes, kind: str = "too big") -> bytes:
    """An ICMP error about `cause` (a frame), as a router or a host sends it: at most 1,280 bytes."""
    frame = Ether(**MACS)
    inside = Raw(bytes(Ether(cause).payload)[: 548 if v == 4 else 1200])
    if v == 4:
        layer = ICMP(type=3, code=4 if kind == "too big" else 3, nexthopmtu=1400 if kind == "too big" else 0)
        return bytes(frame / IP(src=source, dst=target) / layer / inside)
    layer6: Packet = ICMPv6PacketTooBig(mtu=1400) if kind == "too big" else ICMPv6DestUnreach(code=4)
    return bytes(frame / IPv6(src=source, dst=target) / layer6 / inside)


@dataclass(frozen=True)
class Seen:
    """An error as its receiver reads it."""

    outside: str
    inside: str


def seen(frame: bytes) -> Seen:
    """Fails when a checksum is wrong: of the IP header outside, of the one inside, of the ICMP message."""
    parsed = Ether(frame)
    check_sums(parsed)
    if IPv6 in parsed:
        outer = parsed[IPv6]
        again = outer.copy()
        again.payload.cksum = None
        assert IPv6(bytes(again)).payload.cksum == outer.payload.cksum
        inner = IPv6(bytes(outer.payload.payload))
    else:
        outer = parsed[IP]
        inner = IP(bytes(outer.payload.payload))
        fresh = inner.copy()
        fresh.chksum = None
        assert IP(bytes(fresh)).chksum == inner.chksum
    return Seen(
        f"{outer.src} > {outer.dst}",
        f"{at(inner.src, inner.payload.sport)} > {at(inner.dst, inner.payload.dport)}",
    )


@both
@each
def test_too_big_on_the_way_to_a_backend_reaches_the_pod(node: Machine, v: int, make: Callable[..., bytes]) -> None:
    node.add_service(VIP[v], 80, make.__name__.upper(), [(REMOTE[v], 8080)])
    sent = node.run("wag_pod_egress", make(A[v], 1000, VIP[v], 80)).packet
    out = node.run("wag_node_ingress", error(v, ROUTER[v], A[v], sent))
    assert out.verdict == REDIRECT
    assert seen(out.packet) == Seen(f"{ROUTER[v]} > {A[v]}", f"{at(A[v], 1000)} > {at(VIP[v], 80)}")


@both
@each
def test_error_of_a_local_backend_comes_from_the_service(node: Machine, v: int, make: Callable[..., bytes]) -> None:
    node.add_service(VIP[v], 80, make.__name__.upper(), [(B[v], 8080)])
    sent = node.run("wag_pod_egress", make(A[v], 1000, VIP[v], 80)).packet
    out = node.run("wag_pod_egress", error(v, B[v], A[v], sent, "port unreachable"))
    assert out.verdict == REDIRECT
    assert seen(out.packet) == Seen(f"{VIP[v]} > {A[v]}", f"{at(A[v], 1000)} > {at(VIP[v], 80)}")


@both
@each
def test_errors_behind_snat_reach_the_client(node: Machine, v: int, make: Callable[..., bytes]) -> None:
    node.add_service(ANY[v], 30080, make.__name__.upper(), [(REMOTE[v], 8080)])
    sent = node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080)).packet
    for source, shown in ((ROUTER[v], ROUTER[v]), (REMOTE[v], NODE[v])):
        out = node.run("wag_node_ingress", error(v, source, NODE[v], sent))
        assert out.verdict == REDIRECT
        assert seen(out.packet) == Seen(f"{shown} > {CLIENT[v]}", f"{at(CLIENT[v], 1000)} > {at(NODE[v], 30080)}")


@both
@each
@pytest.mark.parametrize("backend", ["local", "remote"])
def test_error_about_an_answer_reaches_the_backend(
    node: Machine, v: int, make: Callable[..., bytes], backend: str
) -> None:
    server = B[v] if backend == "local" else REMOTE[v]
    client_of_server = CLIENT[v] if backend == "local" else NODE[v]
    node.add_service(ANY[v], 30080, make.__name__.upper(), [(server, 8080)])
    port = source_port(node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080)).packet)
    hook = "wag_pod_egress" if backend == "local" else "wag_node_ingress"
    answer = node.run(hook, make(server, 8080, client_of_server, port)).packet
    out = node.run("wag_node_ingress", error(v, ROUTER[v], NODE[v], answer))
    assert out.verdict == REDIRECT
    assert seen(out.packet) == Seen(f"{ROUTER[v]} > {server}", f"{at(server, 8080)} > {at(client_of_server, port)}")


@both
def test_error_that_the_host_stack_sends_to_a_pod(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)])
    sent = node.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80)).packet
    out = node.run("wag_pod_ingress", error(v, NODE[v], A[v], sent))
    assert out.verdict == PASS
    assert seen(out.packet) == Seen(f"{NODE[v]} > {A[v]}", f"{at(A[v], 1000)} > {at(VIP[v], 80)}")


@both
def test_error_of_a_process_of_the_node_that_is_a_backend(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30080, "UDP", [(NODE[v], 8080)])
    sent = node.run("wag_node_ingress", udp(CLIENT[v], 1000, NODE[v], 30080)).packet
    out = node.run("wag_node_egress", error(v, NODE[v], CLIENT[v], sent, "port unreachable"))
    assert out.verdict == PASS
    assert seen(out.packet) == Seen(f"{NODE[v]} > {CLIENT[v]}", f"{at(CLIENT[v], 1000)} > {at(NODE[v], 30080)}")


@both
def test_errors_about_other_flows_and_echo_pass_unchanged(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)])
    node.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80))
    direct = tcp(A[v], 1001, REMOTE[v], 8080)
    out = node.run("wag_node_ingress", error(v, ROUTER[v], A[v], direct))
    assert out.verdict == REDIRECT
    assert seen(out.packet) == Seen(f"{ROUTER[v]} > {A[v]}", f"{at(A[v], 1001)} > {at(REMOTE[v], 8080)}")
    echo: Packet = ICMP() if v == 4 else ICMPv6EchoRequest()
    head = IP(src=ROUTER[v], dst=NODE[v]) if v == 4 else IPv6(src=ROUTER[v], dst=NODE[v])
    ping = bytes(Ether() / head / echo / Raw(b"x" * 64))
    out = node.run("wag_node_ingress", ping)
    assert (out.verdict, out.packet) == (PASS, ping)


@both
@pytest.mark.parametrize("missing", [1, 4, 5, 12, 24, 31, 32])
def test_errors_cut_short_are_left_alone(node: Machine, v: int, missing: int) -> None:
    """`missing` bytes of what must be there after the outer IP header: the error, the IP header inside, two ports."""
    node.add_service(VIP[v], 80, "UDP", [(REMOTE[v], 8080)])
    sent = node.run("wag_pod_egress", udp(A[v], 1000, VIP[v], 80)).packet
    head = 14 + (20 if v == 4 else 40)
    needed = head + 8 + (20 if v == 4 else 40) + 4
    whole = error(v, ROUTER[v], A[v], sent)
    for packet, changed in ((whole[:needed], True), (whole[: needed - missing], False)):
        out = node.run("wag_node_ingress", packet)
        assert out.verdict == REDIRECT
        assert (out.packet[head:] != packet[head:]) == changed
