"""How long translated flows live, who makes room for whom, and what a full table does."""

from __future__ import annotations

import time

import pytest
from packets import ANY, CLIENT, NODE, REMOTE, VIP, A, at, both, build, ends, source_port, tcp, udp
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoRequest

from waggle.abi._generated import Nat, NatCount, NatFlag, ServiceFlag, Tuple
from waggle.abi.address import pack_address
from waggle.reconcile.nat_table import start_sweeping
from waggle.testing.machine import DROP, REDIRECT, YOUNG, Machine

OUTSIDE = {4: "203.0.113.9", 6: "2001:db8:cb::9"}
SIZE = 1024  # of the machine's table


def service(node: Machine, v: int, name: str = "TCP", **more) -> None:
    node.add_service(VIP[v], 80, name, [(REMOTE[v], 8080)], **more)


def connect(node: Machine, v: int, port: int) -> None:
    """A handshake through the Service, from a pod."""
    node.run("wag_pod_egress", tcp(A[v], port, VIP[v], 80))
    node.run("wag_node_ingress", tcp(REMOTE[v], 8080, A[v], port, "SA"))
    node.run("wag_pod_egress", tcp(A[v], port, VIP[v], 80, "A"))


def client(node: Machine, v: int, port: int, flags: str) -> None:
    node.run("wag_pod_egress", tcp(A[v], port, VIP[v], 80, flags))


def backend(node: Machine, v: int, port: int, flags: str) -> None:
    node.run("wag_node_ingress", tcp(REMOTE[v], 8080, A[v], port, flags))


def lives(node: Machine, seconds: int) -> bool:
    """Whether the flow is still there after so long without a packet."""
    node.age_nat(seconds)
    node.sweep()
    return bool(node.nat())


@both
@pytest.mark.parametrize(
    ("story", "seconds"),
    [
        ("client S", 60),
        ("client S, backend SA", 60),
        ("connect", 600),
        ("connect, client FA", 100),
        ("connect, client FA, backend FA", 10),
        ("connect, backend R", 10),
    ],
)
def test_a_tcp_flow_lives_as_long_as_its_state_says(node: Machine, v: int, story: str, seconds: int) -> None:
    for whole in (seconds - 2, seconds + 2):
        node.reset()
        node.add_pod(A[v], 101)
        service(node, v)
        for step in story.split(", "):
            who, _, flags = step.partition(" ")
            if who == "connect":
                connect(node, v, 1000)
            else:
                (client if who == "client" else backend)(node, v, 1000, flags)
        assert len(node.nat()) == 2
        assert lives(node, whole) is (whole < seconds)


@both
def test_a_connection_that_begins_again_leaves_nothing_of_the_last(node: Machine, v: int) -> None:
    """From the same port, with a port of SNAT each time."""
    node.add_service(ANY[v], 30080, "TCP", [(REMOTE[v], 8080)])

    def asked(flags: str) -> int:
        return source_port(node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080, flags)).packet)

    for _ in range(20):
        asked("S")
        asked("R")
    assert len(node.nat()) == 2
    port = asked("S")
    node.run("wag_node_ingress", tcp(REMOTE[v], 8080, NODE[v], port, "SA"))
    asked("A")
    assert lives(node, 300)


@both
def test_a_masqueraded_connection_that_begins_again(node: Machine, v: int) -> None:
    def talk(*steps: str) -> None:
        for step in steps:
            if step[0] == ">":
                out = node.run("wag_pod_egress", tcp(A[v], 1000, OUTSIDE[v], 443, step[1:]))
                ports.append(source_port(out.packet))
            else:
                node.run("wag_node_ingress", tcp(OUTSIDE[v], 443, NODE[v], ports[-1], step[1:]))

    ports: list[int] = []
    talk(">S", "<SA", ">A", ">FA", "<FA", ">A")
    talk(">S", "<SA", ">A")
    assert lives(node, 300)
    talk(">A")
    assert 40000 <= ports[-1] <= 50000


@both
def test_resets_confirm_nothing(node: Machine, v: int) -> None:
    """A flood whose backends reset what it sends is displaced as any other."""
    service(node, v)
    for port in range(10000, 10000 + 4 * YOUNG):
        client(node, v, port, "A")
        backend(node, v, port, "R")
        client(node, v, port, "A")
    assert len(node.nat()) <= 2 * YOUNG
    node.reset()
    node.add_pod(A[v], 101)
    service(node, v)
    connect(node, v, 1000)
    backend(node, v, 1000, "R")  # by somebody else: the connection goes on
    client(node, v, 1000, "A")
    backend(node, v, 1000, "A")
    assert lives(node, 300)


@both
def test_udp_and_echo(node: Machine, v: int) -> None:
    service(node, v, "UDP")

    def asked() -> None:
        node.run("wag_pod_egress", udp(A[v], 1000, VIP[v], 80))

    asked()
    assert lives(node, 28)
    assert not lives(node, 4)
    asked()
    node.run("wag_node_ingress", udp(REMOTE[v], 8080, A[v], 1000))
    asked()
    assert lives(node, 178)
    assert not lives(node, 4)
    node.run("wag_pod_egress", build(A[v], OUTSIDE[v], ICMPv6EchoRequest(id=7) if v == 6 else ICMP(id=7)))
    assert lives(node, 28)
    assert not lives(node, 4)


@both
def test_a_packet_in_either_direction_keeps_both_halves(node: Machine, v: int) -> None:
    service(node, v)
    connect(node, v, 1000)
    for send in (client, backend):
        node.age_nat(590)
        send(node, v, 1000, "A")
        assert lives(node, 590)
        assert len(node.nat()) == 2
        send(node, v, 1000, "A")


def test_the_sweep_counts(node: Machine) -> None:
    service(node, 4)
    connect(node, 4, 1000)
    client(node, 4, 1001, "S")
    before = node.sweep()
    assert (before.entries, before.confirmed) == (4, 1)
    node.age_nat(100)
    after = node.sweep()
    assert (after.entries, after.confirmed, after.expired - before.expired) == (2, 1, 2)
    assert after.sweeps == before.sweeps + 1


def counts(node: Machine) -> NatCount:
    raw = node.maps["wag_nat_counts"].lookup(bytes(4))
    assert raw is not None
    return NatCount.unpack(raw)


@both
def test_a_flood_of_beginnings_leaves_the_confirmed_alone(node: Machine, v: int) -> None:
    """Also one whose addresses are answered: what a client never goes on with does not count."""
    service(node, v)
    for port in range(1000, 1100):
        connect(node, v, port)
    for port in range(10000, 10000 + 10 * YOUNG):
        client(node, v, port, "S")
        backend(node, v, port, "SA")
    assert len(node.nat()) <= 2 * (100 + YOUNG)
    assert counts(node).displaced >= 9 * YOUNG - 100
    for port in range(1000, 1100):
        out = node.run("wag_pod_egress", tcp(A[v], port, VIP[v], 80, "A"))
        assert ends(out.packet) == f"TCP {at(A[v], port)} > {at(REMOTE[v], 8080)} ttl 63"
    assert node.drops() == {}


def test_a_flow_that_reuses_the_tuple_of_another_is_not_displaced_for_it(node: Machine) -> None:
    service(node, 4)
    client(node, 4, 1000, "S")
    node.age_nat(100)
    node.sweep()
    for port in range(10000, 10000 + YOUNG - 10):
        client(node, 4, port, "S")
    client(node, 4, 1000, "S")
    for port in range(20000, 20050):
        client(node, 4, port, "S")
    assert any(flow.packet.startswith("TCP 10.244.1.10:1000 ") for flow in node.nat())


@both
def test_flows_to_other_nodes_are_confirmed_by_the_client_alone(node: Machine, v: int) -> None:
    """Of direct server return only one direction comes by."""
    service(node, v, flags=int(ServiceFlag.DSR))
    node.run("wag_node_ingress", tcp(CLIENT[v], 1000, VIP[v], 80))
    node.run("wag_node_ingress", tcp(CLIENT[v], 1000, VIP[v], 80, "A"))
    for port in range(10000, 10000 + 3 * YOUNG):
        node.run("wag_node_ingress", tcp(CLIENT[v], port, VIP[v], 80))
    assert len(node.nat()) <= 1 + YOUNG
    (kept,) = [flow for flow in node.nat() if flow.packet.startswith(f"TCP {at(CLIENT[v], 1000)} ")]
    assert kept.forward
    assert lives(node, 100)
    assert len(node.nat()) == 1


def test_a_full_table_refuses_beginnings_and_nothing_else(node: Machine) -> None:
    service(node, 4)
    connect(node, 4, 999)
    nat = node.maps["wag_nat"]
    value = Nat.unpack(nat.dump()[0][1])._replace(flags=NatFlag.CONFIRMED, seen_ns=time.monotonic_ns()).pack()
    for number in range(SIZE - 2):
        nat.update(Tuple(pack_address("192.0.2.99"), pack_address("192.0.2.98"), number, 1, 6).pack(), value)
    out = node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
    assert out.verdict == DROP
    assert node.drops() == {("nat_full", "pod_egress"): 1}
    assert node.run("wag_pod_egress", tcp(A[4], 999, VIP[4], 80, "A")).verdict == REDIRECT
    node.age_nat(700)
    node.sweep()
    assert node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80)).verdict == REDIRECT


def test_the_kernel_sweeps_by_itself(node: Machine) -> None:
    service(node, 4)
    client(node, 4, 1000, "S")
    node.age_nat(100)
    for _ in range(2):  # a second agent gives it its code
        assert start_sweeping(node.programs["wag_sweep_start"]) == 0
    deadline = time.monotonic() + 20
    while node.nat():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ages_are_differences_whatever_the_clock_says(node: Machine) -> None:
    """Here the clock was negative when the flow was used: as in a machine that has just started, aged by a test."""
    service(node, 4)
    client(node, 4, 1000, "S")
    node.age_nat(int(time.monotonic()) + 1000)
    node.sweep()
    assert not node.nat()
