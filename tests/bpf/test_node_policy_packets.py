"""The node's own traffic under its policies: packets in, verdicts out, with trials that end by themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from packets import CLIENT, MACS, NODE, REMOTE, VIP, A, B, both, build, tcp, udp
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkInit
from scapy.packet import Raw
from test_icmp import ROUTER, error

from waggle.abi._generated import EventKind, Hook, Outcome, Reason
from waggle.plan.policy_tables import ANY, NodeSets, PolicyTables, Step
from waggle.reconcile.policy import PolicyWriter
from waggle.testing.machine import DROP, PASS, REDIRECT, Machine

TCP_80 = (Step(0, 0, 0), Step(1 << 16 | 80, 1, 7), Step(1 << 16 | 81, 0, 0))
NOTHING = (Step(0, 0, 9),)
ALL = (Step(0, 1, 0),)
IN, OUT, NO_IN = 10, 12, 14
SETS = {IN: {ANY: NOTHING, 5: TCP_80}, OUT: {ANY: NOTHING, 5: TCP_80}, NO_IN: {ANY: NOTHING}}
SECOND = 10**9
OUTSIDE = {4: "203.0.113.9", 6: "2001:db8:cb::9"}  # masqueraded


class Ruled:
    """A machine whose node has these policies."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.writer = PolicyWriter(machine.maps, lambda _: None, keep=False)
        self.writer.adopt()
        self.classes = {CLIENT[4]: 5, CLIENT[6]: 5}

    def rule(self, *sets: int, sets_of: dict | None = None) -> None:
        """Writes what `NodeSets` takes."""
        tables = PolicyTables(classes=self.classes, sets=sets_of or SETS, node=NodeSets(*sets))
        self.writer.settle(self.writer.sync(tables))

    def comes(self, packet: bytes) -> bool:
        return self.machine.run("wag_node_ingress", packet).verdict == PASS

    def leaves(self, packet: bytes, mark: int = 0) -> bool:
        return self.machine.run("wag_node_egress", packet, mark=mark).verdict == PASS


@pytest.fixture
def own(node: Machine) -> Iterator[Ruled]:
    yield Ruled(node)


def in_seconds(seconds: float) -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + int(seconds * SECOND)


def echo(source: str, target: str, number: int, reply: bool = False) -> bytes:
    if ":" in source:
        return build(source, target, (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=number))
    return build(source, target, ICMP(type=0 if reply else 8, id=number))


@both
def test_without_policies_everything_passes(own: Ruled, v: int) -> None:
    assert own.comes(tcp(CLIENT[v], 1000, NODE[v], 22)) and own.leaves(udp(NODE[v], 1000, CLIENT[v], 53))
    assert not list(own.machine.maps["wag_conns"].keys())


@both
def test_what_a_rule_allows_comes_in_and_is_answered(own: Ruled, v: int) -> None:
    own.rule(IN, OUT)
    assert own.comes(tcp(CLIENT[v], 1000, NODE[v], 80))
    assert own.leaves(tcp(NODE[v], 80, CLIENT[v], 1000, flags="SA"))
    assert not own.comes(tcp(CLIENT[v], 1000, NODE[v], 81))
    assert not own.comes(udp(CLIENT[v], 1000, NODE[v], 80))
    assert not own.comes(tcp(REMOTE[v], 1000, NODE[v], 80))
    assert not own.leaves(udp(NODE[v], 80, CLIENT[v], 1001))
    assert own.machine.drops() == {
        ("node_policy_ingress", "node_ingress"): 3,
        ("node_policy_egress", "node_egress"): 1,
    }


@both
def test_who_decided_is_told(own: Ruled, v: int) -> None:
    own.rule(NO_IN)
    own.machine.events()
    assert not own.comes(tcp(CLIENT[v], 1000, NODE[v], 22))
    [event] = own.machine.events()
    assert (event.kind, event.reason, event.verdict) == (
        EventKind.POLICY,
        Reason.NODE_POLICY_INGRESS,
        Outcome.DROPPED,
    )
    assert (event.policy, event.rule, event.hook, event.direction) == (NO_IN, 9, Hook.NODE_INGRESS, 1)


@both
@pytest.mark.parametrize("make", [tcp, udp, lambda s, p, t, q, **k: echo(s, t, p)], ids=["tcp", "udp", "echo"])
def test_answers_to_what_the_node_asks_come_in(own: Ruled, v: int, make) -> None:
    own.rule(NO_IN)
    assert own.leaves(make(NODE[v], 1000, REMOTE[v], 443))
    if make in (tcp, udp):
        flags = {"flags": "SA"} if make is tcp else {}
        assert own.comes(make(REMOTE[v], 443, NODE[v], 1000, **flags))
        assert not own.comes(make(REMOTE[v], 444, NODE[v], 1001))
    else:
        assert own.comes(echo(REMOTE[v], NODE[v], 1000, reply=True))
        assert not own.comes(echo(REMOTE[v], NODE[v], 1001))


@both
def test_a_connection_that_is_not_known_goes_on_where_its_other_direction_may_begin(own: Ruled, v: int) -> None:
    own.rule(NO_IN)
    assert own.comes(tcp(CLIENT[v], 443, NODE[v], 1000, flags="A"))  # the node may ask there
    own.rule(NO_IN, NO_IN)
    assert not own.comes(tcp(CLIENT[v], 443, NODE[v], 1000, flags="A"))


@both
def test_pods_and_services_are_not_the_nodes_own(own: Ruled, v: int) -> None:
    own.rule(NO_IN, NO_IN)
    machine = own.machine
    machine.add_service(NODE[v], 30080, "TCP", [(B[v], 8080)])
    assert machine.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080)).verdict != DROP
    assert machine.run("wag_node_ingress", tcp(CLIENT[v], 1000, A[v], 80)).verdict != DROP
    out = machine.run("wag_pod_egress", tcp(A[v], 1000, OUTSIDE[v], 443))
    masqueraded = Ether(out.packet)[IPv6 if v == 6 else IP]
    assert out.verdict == REDIRECT and masqueraded.src == NODE[v]
    assert own.leaves(out.packet, mark=out.mark)
    assert own.comes(tcp(OUTSIDE[v], 443, NODE[v], masqueraded[TCP].sport, flags="SA")) is False  # it goes to the pod
    assert not own.leaves(tcp(NODE[v], 999, OUTSIDE[v], 443))  # from a process of the node
    assert own.leaves(tcp(A[v], 1000, CLIENT[v], 443))  # routed by the stack
    assert machine.drops() == {("node_policy_egress", "node_egress"): 1}


def test_dhcp_always_passes(own: Ruled) -> None:
    own.rule(NO_IN, NO_IN)
    assert own.leaves(udp(NODE[4], 68, CLIENT[4], 67)) and own.comes(udp(CLIENT[4], 67, NODE[4], 68))
    assert own.leaves(udp(NODE[6], 546, CLIENT[6], 547)) and own.comes(udp(CLIENT[6], 547, NODE[6], 546))
    assert not own.comes(udp(CLIENT[4], 68, NODE[4], 67))
    assert not own.leaves(udp(NODE[4], 67, CLIENT[4], 68))


def test_discovery_and_multicast_always_pass(own: Ruled) -> None:
    own.rule(NO_IN, NO_IN)
    ask = ICMPv6ND_NS(tgt=NODE[6])
    assert own.comes(build(CLIENT[6], NODE[6], ask, ttl=255, payload=b""))
    assert own.leaves(build(NODE[6], "ff02::1:ff00:1", ask, ttl=255, payload=b""))
    assert own.leaves(udp(NODE[4], 5353, "224.0.0.251", 5353))
    assert own.leaves(udp("fe80::1", 546, "ff02::1:2", 547))


def test_link_local_addresses_are_the_nodes(own: Ruled) -> None:
    own.rule(NO_IN, NO_IN)
    assert not own.comes(tcp("fe80::77", 1000, "fe80::1", 22))
    assert not own.leaves(tcp("fe80::1", 1000, "fe80::77", 22))


@both
def test_errors_always_pass(own: Ruled, v: int) -> None:
    own.rule(NO_IN, NO_IN)
    assert own.comes(error(v, ROUTER[v], NODE[v], udp(NODE[v], 1000, REMOTE[v], 53)))
    assert own.leaves(error(v, NODE[v], CLIENT[v], udp(CLIENT[v], 1000, A[v], 53)))
    assert not own.comes(echo(CLIENT[v], NODE[v], 1))


@both
def test_a_trial_ends_by_itself(own: Ruled, v: int) -> None:
    own.rule(0, 0, NO_IN, 0, in_seconds(1.0))
    assert not own.comes(tcp(CLIENT[v], 1000, NODE[v], 80))
    assert own.leaves(tcp(NODE[v], 1000, CLIENT[v], 80))
    time.sleep(1.05)
    assert own.comes(tcp(CLIENT[v], 1000, NODE[v], 80))


@both
def test_what_began_in_a_trial_ends_with_it(own: Ruled, v: int) -> None:
    """The other way round: what was tried let in more than what is confirmed."""
    own.rule(NO_IN, NO_IN, IN, IN, in_seconds(1.0))
    assert own.comes(udp(CLIENT[v], 1000, NODE[v], 80)) is False
    assert own.comes(tcp(CLIENT[v], 1000, NODE[v], 80))
    assert own.comes(tcp(CLIENT[v], 1000, NODE[v], 80, flags="A"))
    time.sleep(1.05)
    assert not own.comes(tcp(CLIENT[v], 1000, NODE[v], 80, flags="A"))
    assert not own.leaves(tcp(NODE[v], 80, CLIENT[v], 1000, flags="A"))


@both
def test_confirmed_it_stays(own: Ruled, v: int) -> None:
    own.rule(0, 0, NO_IN, 0, in_seconds(0.5))
    own.rule(NO_IN, 0)
    time.sleep(0.6)
    assert not own.comes(tcp(CLIENT[v], 1000, NODE[v], 80))


@both
def test_where_the_tables_know_nothing_of_its_set_a_node_can_be_reached(own: Ruled, v: int) -> None:
    own.rule(NO_IN, NO_IN, sets_of={99: {ANY: ALL}})
    assert own.comes(tcp(CLIENT[v], 1000, NODE[v], 22)) and own.leaves(tcp(NODE[v], 1000, CLIENT[v], 443))


@both
def test_what_would_be_denied_is_told_and_passes(own: Ruled, v: int) -> None:
    own.rule(20, sets_of={20: {ANY: (Step(0, 3, 4),)}})
    own.machine.events()
    assert own.comes(tcp(CLIENT[v], 1000, NODE[v], 22))
    [event] = [one for one in own.machine.events() if one.kind == EventKind.POLICY]
    assert (event.reason, event.verdict, event.rule) == (Reason.NODE_POLICY_INGRESS, Outcome.AUDIT, 4)


@both
def test_the_rest_of_a_datagram_goes_with_its_beginning(own: Ruled, v: int) -> None:
    dns = (Step(0, 0, 0), Step(2 << 16 | 53, 1, 1), Step(2 << 16 | 54, 0, 0))
    own.rule(30, sets_of={30: {ANY: dns}})
    layer, data = UDP(sport=1000, dport=53), Raw(b"x" * 1600)
    if v == 6:
        head = IPv6(src=CLIENT[6], dst=NODE[6]) / IPv6ExtHdrFragment(id=5)
        first, later, *_ = fragment6(head / layer / data, 1000)
    else:
        first, later, *_ = fragment(IP(src=CLIENT[4], dst=NODE[4], id=5) / layer / data, 800)
    assert not own.comes(bytes(Ether(**MACS) / later))  # nobody has seen its beginning
    assert own.comes(bytes(Ether(**MACS) / first)) and own.comes(bytes(Ether(**MACS) / later))


def test_clusters_addresses_are_looked_up_first(own: Ruled) -> None:
    """SCTP that no socket hook has seen is Service traffic, also from the node itself."""
    own.rule(NO_IN, NO_IN)
    machine = own.machine
    machine.set_service_ranges("10.96.0.0/16")
    machine.add_vip(VIP[4])
    machine.add_service(VIP[4], 80, "SCTP", [(REMOTE[4], 80)])
    out = machine.run("wag_node_egress", build(NODE[4], VIP[4], SCTP(sport=1, dport=80) / SCTPChunkInit(), payload=b""))
    assert out.verdict != DROP
