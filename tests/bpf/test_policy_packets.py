"""Who may talk to whom, packet by packet: what is the programs' own. Tables are written as the agent does it."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from packets import ANY, CLIENT, MACS, NODE, REMOTE, VIP, A, B, at, both, build, ends, source_port, tcp, udp
from scapy.layers.inet import ICMP, IP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, Raw
from test_dsr import DSR, know_nodes, wrapped
from test_icmp import ROUTER, error

from waggle.abi._generated import Conn, Direction, EventKind, Outcome, PolicyRun, Reason
from waggle.kernel.netns import call_in_netns
from waggle.plan.policy_tables import ALLOW, AUDIT, DENY, OPEN, PENDING, SELF, Step, step_key
from waggle.plan.policy_tables import ANY as EVERY_CLASS
from waggle.reconcile.policy import pack_key
from waggle.testing.machine import DROP, PASS, REDIRECT, SNAT_PORTS, Machine, flow_text
from waggle.testing.policed import ALLOWS, DENIES, EVERYTHING, NOTHING, PolicedMachine, steps

WEB = steps(("TCP", 80, 80))
#: Sets, which are even where they have no rules about names, and a class.
IN, OUT, FRIENDS = 0x10, 0x20, 0x33
OUTSIDE = {4: "203.0.113.50", 6: "2001:db8:cb::50"}  # beyond the cluster: masqueraded
LINK = {4: "224.0.0.251", 6: "ff02::fb"}

Make = Callable[..., bytes]


def sctp(source: str, sport: int, target: str, dport: int, flags: str = "S", **kwargs) -> bytes:
    chunk = SCTPChunkInit(init_tag=9) if flags == "S" else SCTPChunkData(data=b"hello")
    return build(source, target, SCTP(sport=sport, dport=dport, tag=1) / chunk, payload=b"", **kwargs)


def datagram(source: str, sport: int, target: str, dport: int, flags: str = "", **kwargs) -> bytes:
    return udp(source, sport, target, dport, **kwargs)


def echo(source: str, target: str, number: int = 7, *, reply: bool = False) -> bytes:
    if ":" in source:
        layer: Packet = (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=number)
    else:
        layer = ICMP(type=0 if reply else 8, id=number)
    return build(source, target, layer)


protocols = pytest.mark.parametrize(
    ("name", "make"), [("TCP", tcp), ("UDP", datagram), ("SCTP", sctp)], ids=["tcp", "udp", "sctp"]
)


class Policed(PolicedMachine):
    """The node with its two pods. A packet that a test sends comes from the pod that it says, or by the wire."""

    def isolate(self, *, ingress=None, egress=None, pod=A, **more) -> None:
        """The pod's sets: what they say by class; None: nothing is asked."""
        sets = {IN: ingress, OUT: egress}
        given = {
            number: said if isinstance(said, dict) else {EVERY_CLASS: said} for number, said in sets.items() if said
        }
        numbers = (IN if ingress else OPEN), (OUT if egress else OPEN)
        self.put(sets=given, pods={pod[v]: numbers for v in (4, 6)}, **more)

    def sends(self, packet: bytes, *, by: str = "") -> bool:
        """Whether it goes on. `by`: the program, where it is not the pod's or the wire's."""
        source = Ether(packet)[IPv6 if IPv6 in Ether(packet) else IP].src
        program = by or ("pod_egress" if source in (*A.values(), *B.values()) else "node_ingress")
        self.machine.summed = False
        return self.machine.run(f"wag_{program}", packet).verdict != DROP

    @property
    def reasons(self) -> set[str]:
        return {reason for reason, _ in self.machine.drops()}

    def flows(self) -> dict[str, Conn]:
        from waggle.abi._generated import Tuple

        return {flow_text(Tuple.unpack(k)): Conn.unpack(v) for k, v in self.machine.maps["wag_conns"].dump()}

    def age(self, seconds: int) -> None:
        table = self.machine.maps["wag_conns"]
        for key, raw in table.dump():
            conn = Conn.unpack(raw)
            table.update(key, conn._replace(seen_ns=(conn.seen_ns - seconds * 10**9) % (1 << 64)).pack())
        self.machine.forget_open_flows(older=seconds)

    def forget(self) -> None:
        table = self.machine.maps["wag_conns"]
        table.delete_many(list(table.keys()))
        self.machine.forget_open_flows()


@pytest.fixture
def policed(node: Machine) -> Policed:
    return Policed(node)


# -- isolation by direction --------------------------------------------------------------------------------------------


@both
@protocols
@pytest.mark.parametrize("peer", [B, REMOTE, CLIENT], ids=["local", "remote", "outside"])
def test_ingress_and_egress_are_isolated_apart(policed: Policed, v: int, name: str, make: Make, peer: dict) -> None:
    policed.isolate(ingress=steps((name, 80, 80)))
    assert policed.sends(make(peer[v], 1000, A[v], 80))
    assert not policed.sends(make(peer[v], 1000, A[v], 81))
    assert policed.sends(make(A[v], 2000, peer[v], 81))
    assert policed.reasons == {"policy_ingress"}
    policed.isolate(egress=steps((name, 80, 80)))
    assert policed.sends(make(A[v], 1001, peer[v], 80))
    assert not policed.sends(make(A[v], 1001, peer[v], 81))
    assert policed.sends(make(peer[v], 2001, A[v], 81))
    assert policed.reasons == {"policy_ingress", "policy_egress"}


@both
def test_both_ends_must_allow(policed: Policed, v: int) -> None:
    for out, into, passes in ((WEB, WEB, True), (WEB, NOTHING, False), (NOTHING, WEB, False)):
        policed.forget()
        policed.put(sets={OUT: {EVERY_CLASS: out}, IN: {EVERY_CLASS: into}}, pods={A[v]: (OPEN, OUT), B[v]: (IN, OPEN)})
        assert policed.sends(tcp(A[v], 1000, B[v], 80)) is passes


@both
def test_protocols_without_ports(policed: Policed, v: int) -> None:
    policed.isolate(ingress=steps("TCP", "UDP", "SCTP"))
    assert not policed.sends(echo(B[v], A[v]))
    assert not policed.sends(build(B[v], A[v], Raw(b"x" * 20), **({"nh": 47} if v == 6 else {"proto": 47})))
    policed.isolate(ingress=steps("OTHER"))
    assert policed.sends(echo(B[v], A[v]))
    assert policed.sends(build(B[v], A[v], Raw(b"x" * 20), **({"nh": 47} if v == 6 else {"proto": 47})))
    assert not policed.sends(tcp(B[v], 1000, A[v], 80))


@both
def test_peers_by_address_before_ranges_and_the_longest_of_these(policed: Policed, v: int) -> None:
    wide, narrow = {4: ("10.244.0.0/16", "10.244.2.0/24"), 6: ("fd00:10:244::/48", "fd00:10:244:2::/64")}[v]
    policed.isolate(ingress={EVERY_CLASS: NOTHING, 71: WEB, 72: NOTHING, FRIENDS: EVERYTHING})
    policed.put(ranges={wide: 71, narrow: 72}, classes={REMOTE[v]: FRIENDS})
    near = {4: "10.244.2.99", 6: "fd00:10:244:2::99"}[v]
    far = {4: "10.244.3.99", 6: "fd00:10:244:3::99"}[v]
    verdicts = {who: policed.sends(tcp(who, 1000, A[v], 80)) for who in (REMOTE[v], near, far, CLIENT[v])}
    assert verdicts == {REMOTE[v]: True, near: False, far: True, CLIENT[v]: False}
    assert policed.sends(tcp(REMOTE[v], 1001, A[v], 9)) and not policed.sends(tcp(far, 1001, A[v], 9))


@both
def test_a_pod_may_talk_to_itself(policed: Policed, v: int) -> None:
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    assert policed.sends(tcp(A[v], 1000, A[v], 80))
    assert policed.sends(echo(A[v], A[v]))


# -- what a flow is ----------------------------------------------------------------------------------------------------


@both
@protocols
@pytest.mark.parametrize("peer", [B, REMOTE], ids=["local", "remote"])
def test_replies_pass_and_nothing_else_does(policed: Policed, v: int, name: str, make: Make, peer: dict) -> None:
    policed.isolate(ingress=NOTHING, egress=steps((name, 80, 80)))
    answer = make(peer[v], 80, A[v], 1000, "SA" if name == "TCP" else "A")
    if name == "UDP":
        assert not policed.sends(answer)
    assert policed.sends(make(A[v], 1000, peer[v], 80))
    assert policed.sends(answer)
    assert policed.sends(make(A[v], 1000, peer[v], 80, "A"))
    assert not policed.sends(make(peer[v], 80, A[v], 1001))  # another flow: a SYN, an INIT, a datagram
    assert not policed.sends(make(peer[v], 81, A[v], 1000))
    assert len(policed.flows()) == 1


@both
def test_echo_replies_follow_requests(policed: Policed, v: int) -> None:
    policed.isolate(ingress=NOTHING, egress=EVERYTHING)
    assert not policed.sends(echo(REMOTE[v], A[v], 7, reply=True))
    assert policed.sends(echo(A[v], REMOTE[v], 7))
    assert policed.sends(echo(REMOTE[v], A[v], 7, reply=True))
    assert not policed.sends(echo(REMOTE[v], A[v], 8, reply=True))
    assert not policed.sends(echo(REMOTE[v], A[v], 7))


@both
@pytest.mark.parametrize(("name", "make"), [("TCP", tcp), ("SCTP", sctp)], ids=["tcp", "sctp"])
def test_the_middle_of_a_connection_that_nobody_remembers(policed: Policed, v: int, name: str, make: Make) -> None:
    policed.isolate(ingress=NOTHING, egress=steps((name, 80, 80)))
    assert policed.sends(make(REMOTE[v], 80, A[v], 1000, "A"))  # an answer to what A may ask
    assert not policed.sends(make(REMOTE[v], 81, A[v], 1000, "A"))
    assert not policed.sends(make(REMOTE[v], 80, A[v], 1001, "S"))
    assert policed.sends(make(A[v], 1000, REMOTE[v], 80, "A"))
    policed.put(sets={IN: {EVERY_CLASS: NOTHING}, OUT: {EVERY_CLASS: NOTHING}})
    assert not policed.sends(make(REMOTE[v], 80, A[v], 1000, "A"))
    assert not policed.sends(make(A[v], 1000, REMOTE[v], 80, "A"))


@both
def test_datagrams_do_not_say_who_asked(policed: Policed, v: int) -> None:
    policed.isolate(ingress=NOTHING, egress=steps(("UDP", 53, 53)))
    assert policed.sends(udp(A[v], 1000, REMOTE[v], 53))
    policed.age(181)
    assert not policed.sends(udp(REMOTE[v], 53, A[v], 1000))
    assert policed.sends(udp(A[v], 1000, REMOTE[v], 53))
    assert policed.sends(udp(REMOTE[v], 53, A[v], 1000))
    policed.age(170)
    assert policed.sends(udp(REMOTE[v], 53, A[v], 1000))  # and is young again
    policed.age(170)
    assert policed.sends(udp(REMOTE[v], 53, A[v], 1000))


@both
@protocols
def test_a_port_that_is_used_again_by_the_other_end(policed: Policed, v: int, name: str, make: Make) -> None:
    """A flow that has ended still has its entry: who comes the other way with its ports must be allowed
    himself, once the verdict over the first is another."""
    policed.isolate(ingress=steps((name, 1000, 1000)), egress=steps((name, 80, 80)))
    assert policed.sends(make(A[v], 1000, REMOTE[v], 80))
    policed.isolate(ingress=steps((name, 1000, 1000)), egress=NOTHING)
    if name == "UDP":  # nobody can tell it from an answer
        assert not policed.sends(make(REMOTE[v], 80, A[v], 1000))
        policed.age(31)
    assert policed.sends(make(REMOTE[v], 80, A[v], 1000))
    assert policed.sends(make(A[v], 1000, REMOTE[v], 80, "A"))  # now the answer
    assert not policed.sends(make(A[v], 1001, REMOTE[v], 80))


@both
def test_a_flow_that_was_evicted_is_judged_again(policed: Policed, v: int) -> None:
    policed.isolate(ingress=NOTHING, egress=steps(("UDP", 53, 53), ("TCP", 80, 80)))
    for make, port in ((udp, 53), (tcp, 80)):
        assert policed.sends(make(A[v], 1000, REMOTE[v], port))
    policed.forget()
    assert policed.sends(tcp(REMOTE[v], 80, A[v], 1000, "A"))
    assert not policed.sends(udp(REMOTE[v], 53, A[v], 1000))
    assert policed.sends(udp(A[v], 1000, REMOTE[v], 53))
    assert policed.sends(udp(REMOTE[v], 53, A[v], 1000))


# -- changes -----------------------------------------------------------------------------------------------------------


@both
def test_for_a_second_a_cpu_knows_a_flow_by_itself(policed: Policed, one_cpu: None, v: int) -> None:
    """The very flow, in its direction, unless anything changes."""
    policed.isolate(ingress=NOTHING, egress=steps(("UDP", 90, 90)))
    asked, answer = udp(A[v], 1000, REMOTE[v], 90), udp(REMOTE[v], 90, A[v], 1000)
    others = (
        udp(REMOTE[v], 90, A[v], 1001),
        udp(REMOTE[v], 91, A[v], 1000),
        udp(CLIENT[v], 90, A[v], 1000),
        tcp(REMOTE[v], 90, A[v], 1000),
    )
    conns = policed.machine.maps["wag_conns"]
    assert policed.sends(asked) and policed.sends(answer)
    conns.delete_many(list(conns.keys()))
    assert policed.sends(answer)
    assert not any(policed.sends(other) for other in others)
    policed.machine.forget_open_flows(older=1)
    assert not policed.sends(answer)
    assert policed.sends(asked) and policed.sends(answer)
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    assert not policed.sends(asked) and not policed.sends(answer)


@both
@protocols
@pytest.mark.parametrize("keep", [False, True], ids=["cut", "keep"])
def test_a_policy_that_denies_now(node: Machine, v: int, name: str, make: Make, keep: bool) -> None:
    policed = Policed(node, keep=keep)
    policed.isolate(ingress=NOTHING, egress=steps((name, 80, 80)))
    assert policed.sends(make(A[v], 1000, REMOTE[v], 80))
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    assert policed.sends(make(A[v], 1000, REMOTE[v], 80, "A")) is keep
    assert policed.sends(make(REMOTE[v], 80, A[v], 1000, "A")) is keep
    assert not policed.sends(make(A[v], 1001, REMOTE[v], 80))
    policed.isolate(ingress=NOTHING, egress=steps((name, 80, 80)))
    assert policed.sends(make(A[v], 1000, REMOTE[v], 80, "A"))
    assert policed.sends(make(REMOTE[v], 80, A[v], 1000, "A"))


@both
def test_what_changes_elsewhere_leaves_a_flow_alone(policed: Policed, v: int) -> None:
    policed.isolate(ingress=NOTHING, egress=steps(("UDP", 53, 53)))
    assert policed.sends(udp(A[v], 1000, REMOTE[v], 53))
    (before,) = policed.flows().values()
    policed.put(classes={CLIENT[v]: FRIENDS})
    assert policed.sends(udp(REMOTE[v], 53, A[v], 1000))
    (after,) = policed.flows().values()
    assert after.revision == before.revision + 1 and after.opened == before.opened


@both
def test_a_pod_that_becomes_isolated_goes_on_as_its_policies_say(policed: Policed, v: int) -> None:
    """Nothing was remembered of it before."""
    assert policed.sends(tcp(A[v], 1000, REMOTE[v], 80))
    assert policed.flows() == {}
    policed.isolate(ingress=NOTHING, egress=WEB)
    assert policed.sends(tcp(REMOTE[v], 80, A[v], 1000, "A"))
    assert policed.sends(tcp(A[v], 1000, REMOTE[v], 80, "A"))


# -- the node, and who is not ready ------------------------------------------------------------------------------------


@both
def test_nothing_but_the_node_while_policies_are_not_known(policed: Policed, v: int) -> None:
    policed.put(pods={A[v]: (PENDING, PENDING)})
    for peer in (B, REMOTE, CLIENT):
        assert not policed.sends(tcp(peer[v], 1000, A[v], 80))
        assert not policed.sends(tcp(A[v], 1000, peer[v], 80))
    assert policed.reasons == {"policy_pending"}
    assert policed.sends(tcp(NODE[v], 1000, A[v], 80), by="pod_ingress")
    assert policed.sends(tcp(A[v], 80, NODE[v], 1000, "SA"))
    assert policed.sends(tcp(A[v], 1001, NODE[v], 22))
    assert policed.sends(tcp(A[v], 1000, A[v], 80))
    assert not policed.sends(tcp(NODE[v], 1000, A[v], 80), by="node_ingress")  # by the wire nobody is the node
    assert not policed.sends(tcp(REMOTE[v], 1000, A[v], 80), by="pod_ingress")


@both
def test_flows_of_who_had_the_address_before_are_not_the_new_pods(policed: Policed, v: int) -> None:
    policed.isolate(ingress=EVERYTHING, egress=EVERYTHING)
    assert policed.sends(tcp(A[v], 1000, REMOTE[v], 80))
    policed.put(pods={A[v]: (PENDING, PENDING)})
    assert not policed.sends(tcp(REMOTE[v], 80, A[v], 1000, "A"))
    assert not policed.sends(tcp(A[v], 1000, REMOTE[v], 80, "A"))


@both
def test_services_are_not_reached_by_a_pod_that_is_pending_nor_is_it(policed: Policed, v: int) -> None:
    policed.put(pods={A[v]: (PENDING, PENDING)})
    policed.machine.add_service(VIP[v], 80, "TCP", [(B[v], 8080)])
    policed.machine.add_service(VIP[v], 81, "TCP", [(A[v], 8080)])
    assert not policed.sends(tcp(A[v], 1000, VIP[v], 80))
    assert not policed.sends(tcp(B[v], 1000, VIP[v], 81))
    assert policed.machine.nat() == set()


@both
def test_the_node_has_its_own_class_where_it_cannot_be_somebody_else(policed: Policed, v: int) -> None:
    policed.isolate(ingress={EVERY_CLASS: NOTHING, SELF: EVERYTHING}, egress={EVERY_CLASS: NOTHING, SELF: EVERYTHING})
    assert policed.sends(tcp(NODE[v], 1000, A[v], 80), by="pod_ingress")
    assert policed.sends(tcp(A[v], 80, NODE[v], 1000, "SA"))
    assert policed.sends(tcp(A[v], 2000, NODE[v], 22))
    assert not policed.sends(tcp(NODE[v], 1001, A[v], 80), by="node_ingress")
    policed.put(classes={NODE[v]: 44})  # a class of its own, where policies tell nodes apart
    assert not policed.sends(tcp(NODE[v], 1002, A[v], 80), by="pod_ingress")


@both
def test_what_the_stack_brings_is_judged(policed: Policed, v: int) -> None:
    policed.isolate(ingress=WEB)
    assert policed.sends(tcp(CLIENT[v], 1000, A[v], 80), by="pod_ingress")
    assert not policed.sends(tcp(CLIENT[v], 1000, A[v], 81), by="pod_ingress")
    assert not policed.sends(echo(CLIENT[v], A[v]), by="pod_ingress")
    assert policed.machine.drops() == {("policy_ingress", "pod_ingress"): 2}


# -- Services ----------------------------------------------------------------------------------------------------------


@both
def test_what_is_judged_is_the_backend(policed: Policed, v: int) -> None:
    policed.machine.add_service(VIP[v], 443, "TCP", [(B[v], 8080)])
    policed.isolate(egress={EVERY_CLASS: NOTHING, FRIENDS: steps(("TCP", 8080, 8080))}, classes={B[v]: FRIENDS})
    assert policed.sends(tcp(A[v], 1000, VIP[v], 443))
    assert policed.sends(tcp(B[v], 8080, A[v], 1000, "SA"))
    assert list(policed.flows()) == [f"TCP {at(A[v], 1000)} > {at(B[v], 8080)}"]
    # allowed as an address, and not as what it stands for
    policed.forget()
    policed.isolate(egress={EVERY_CLASS: NOTHING, FRIENDS: EVERYTHING}, classes={VIP[v]: FRIENDS})
    assert not policed.sends(tcp(A[v], 1001, VIP[v], 443))


@both
@pytest.mark.parametrize("backend", [B, REMOTE], ids=["local", "remote"])
def test_nothing_is_remembered_of_a_translation_that_policies_deny(policed: Policed, v: int, backend: dict) -> None:
    policed.machine.add_service(VIP[v], 80, "TCP", [(backend[v], 8080)])
    policed.isolate(egress=WEB)
    assert not policed.sends(tcp(A[v], 1000, VIP[v], 80))
    assert policed.machine.nat() == set() and policed.flows() == {}
    assert not policed.machine.nat_used(A[v])


@both
def test_a_translated_flow_is_cut(policed: Policed, v: int) -> None:
    policed.machine.add_service(VIP[v], 80, "TCP", [(B[v], 8080)])
    policed.isolate(egress=EVERYTHING)
    assert policed.sends(tcp(A[v], 1000, VIP[v], 80))
    assert policed.sends(tcp(B[v], 8080, A[v], 1000, "SA"))
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    assert not policed.sends(tcp(A[v], 1000, VIP[v], 80, "A"))
    assert not policed.sends(tcp(B[v], 8080, A[v], 1000, "A"))


@both
def test_a_pod_behind_its_own_service(policed: Policed, v: int) -> None:
    policed.machine.add_service(VIP[v], 80, "TCP", [(A[v], 8080)])
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    out = policed.machine.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT
    port = source_port(out.packet)
    back = policed.machine.run("wag_pod_egress", tcp(A[v], 8080, NODE[v], port, "SA"))
    assert back.verdict == REDIRECT
    assert ends(back.packet) == f"TCP {at(VIP[v], 80)} > {at(A[v], 1000)} ttl 63"


@both
def test_a_node_port_is_judged_by_its_client(policed: Policed, v: int) -> None:
    policed.machine.add_service(ANY[v], 30080, "TCP", [(A[v], 8080)])
    policed.isolate(
        ingress={EVERY_CLASS: NOTHING, FRIENDS: steps(("TCP", 8080, 8080))},
        egress=NOTHING,
        classes={CLIENT[v]: FRIENDS},
    )
    other = {4: "192.0.2.78", 6: "2001:db8::78"}[v]
    assert not policed.sends(tcp(other, 1000, NODE[v], 30080))
    assert policed.machine.nat() == set()
    assert policed.sends(tcp(CLIENT[v], 1000, NODE[v], 30080))
    back = policed.machine.run("wag_pod_egress", tcp(A[v], 8080, CLIENT[v], 1000, "SA"))
    assert ends(back.packet) == f"TCP {at(NODE[v], 30080)} > {at(CLIENT[v], 1000)} ttl 63"


@both
def test_direct_server_return_is_judged_where_the_backend_is(policed: Policed, v: int) -> None:
    know_nodes(policed.machine)
    policed.machine.add_service(VIP[v], 80, "TCP", [(A[v], 8080)], flags=DSR)
    policed.isolate(
        ingress={EVERY_CLASS: NOTHING, FRIENDS: steps(("TCP", 8080, 8080))},
        egress=NOTHING,
        classes={CLIENT[v]: FRIENDS},
    )
    other = {4: "192.0.2.78", 6: "2001:db8::78"}[v]
    assert not policed.sends(wrapped(v, tcp(other, 1000, VIP[v], 80), A[v]))
    assert policed.machine.nat() == set()
    assert policed.sends(wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80), A[v]))
    back = policed.machine.run("wag_pod_egress", tcp(A[v], 8080, CLIENT[v], 1000, "SA"))
    assert ends(back.packet) == f"TCP {at(VIP[v], 80)} > {at(CLIENT[v], 1000)} ttl 63"
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    assert not policed.sends(wrapped(v, tcp(CLIENT[v], 1000, VIP[v], 80, "A"), A[v]))


@both
@pytest.mark.parametrize("make", [tcp, udp])
def test_what_leaves_the_cluster_is_judged_by_who_it_is(policed: Policed, v: int, make: Make) -> None:
    policed.isolate(ingress=NOTHING, egress=steps(("TCP", 80, 80), ("UDP", 80, 80)))
    assert not policed.sends(make(A[v], 1000, OUTSIDE[v], 81))
    assert policed.machine.nat() == set()
    out = policed.machine.run("wag_pod_egress", make(A[v], 1000, OUTSIDE[v], 80))
    port = source_port(out.packet)
    assert port in SNAT_PORTS
    back = policed.machine.run(
        "wag_node_ingress", make(OUTSIDE[v], 80, NODE[v], port, **({"flags": "SA"} if make is tcp else {}))
    )
    assert back.verdict == REDIRECT and at(A[v], 1000) in ends(back.packet)
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    more = {"flags": "A"} if make is tcp else {}
    assert not policed.sends(make(A[v], 1000, OUTSIDE[v], 80, **more))
    assert not policed.sends(make(OUTSIDE[v], 80, NODE[v], port, **more))


# -- ICMP errors -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("make", [tcp, udp])
def test_an_error_about_a_flow_passes_and_none_about_another(policed: Policed, v: int, make: Make) -> None:
    policed.isolate(ingress=NOTHING, egress=steps(("TCP", 80, 80), ("UDP", 80, 80)))
    asked = make(A[v], 1000, REMOTE[v], 80)
    assert policed.sends(asked)
    assert policed.sends(error(v, ROUTER[v], A[v], asked))
    assert policed.sends(error(v, ROUTER[v], A[v], asked), by="pod_ingress")
    assert not policed.sends(error(v, ROUTER[v], A[v], make(A[v], 1000, REMOTE[v], 81)))
    assert not policed.sends(error(v, ROUTER[v], A[v], make(REMOTE[v], 80, A[v], 1000)))  # not what A has sent
    assert not policed.sends(error(v, ROUTER[v], A[v], make(B[v], 1000, REMOTE[v], 80)))
    assert not policed.sends(echo(ROUTER[v], A[v]))
    policed.isolate(ingress=NOTHING, egress=NOTHING)
    assert not policed.sends(error(v, ROUTER[v], A[v], asked))


@both
def test_a_pod_complains_about_what_it_got_alone(policed: Policed, v: int) -> None:
    """An error has room for a whole packet: it must not be a way out for who has none."""
    policed.isolate(ingress=steps(("UDP", 53, 53)), egress=NOTHING)
    asked = udp(REMOTE[v], 1000, A[v], 53)
    assert policed.sends(asked)
    assert policed.sends(error(v, A[v], REMOTE[v], asked, "port unreachable"))
    for made_up in (
        udp(REMOTE[v], 1000, A[v], 54),
        udp(REMOTE[v], 1000, B[v], 53),
        udp(REMOTE[v], 1000, CLIENT[v], 53),
        udp(A[v], 53, REMOTE[v], 1000),
    ):
        assert not policed.sends(error(v, A[v], REMOTE[v], made_up, "port unreachable"))
    assert not policed.sends(error(v, A[v], CLIENT[v], udp(CLIENT[v], 1000, REMOTE[v], 53), "port unreachable"))
    assert not policed.sends(error(v, A[v], B[v], udp(B[v], 1000, REMOTE[v], 53), "port unreachable"))


@both
def test_errors_about_translated_flows_are_judged_too(policed: Policed, v: int) -> None:
    policed.machine.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)])
    policed.isolate(egress=steps(("TCP", 8080, 8080)), ingress=NOTHING)
    sent = policed.machine.run("wag_pod_egress", tcp(A[v], 1000, VIP[v], 80)).packet
    assert policed.sends(error(v, ROUTER[v], A[v], sent))
    policed.isolate(egress=NOTHING, ingress=NOTHING)
    assert not policed.sends(error(v, ROUTER[v], A[v], sent))
    # who has no part in a flow does not complain about it
    policed.isolate(egress=EVERYTHING, ingress=EVERYTHING)
    sent = policed.machine.run("wag_pod_egress", tcp(A[v], 1001, VIP[v], 80)).packet
    policed.put(sets={OUT: {EVERY_CLASS: NOTHING}}, pods={B[v]: (OPEN, OUT)})
    assert not policed.sends(error(v, B[v], A[v], sent))


@both
def test_errors_of_a_local_backend(policed: Policed, v: int) -> None:
    policed.machine.add_service(VIP[v], 53, "UDP", [(B[v], 5353)])
    policed.isolate(ingress=steps(("UDP", 5353, 5353)), egress=NOTHING, pod=B)
    sent = policed.machine.run("wag_pod_egress", udp(A[v], 1000, VIP[v], 53)).packet
    assert policed.sends(error(v, B[v], A[v], sent, "port unreachable"))
    policed.isolate(ingress=NOTHING, egress=NOTHING, pod=B)
    assert not policed.sends(error(v, B[v], A[v], sent, "port unreachable"))


# -- fragments ---------------------------------------------------------------------------------------------------------


def pieces(source: str, sport: int, target: str, dport: int, number: int = 7) -> list[bytes]:
    layer = UDP(sport=sport, dport=dport) / Raw(bytes(3000))
    if ":" in source:
        full = IPv6(bytes(IPv6(src=source, dst=target) / layer))
        parts = fragment6(IPv6(src=source, dst=target) / IPv6ExtHdrFragment(id=number) / full.payload, 1500)
    else:
        parts = fragment(IP(bytes(IP(src=source, dst=target, id=number) / layer)), 1480)
    assert len(parts) == 3
    return [bytes(Ether(**MACS) / part) for part in parts]


@both
@pytest.mark.parametrize("who", ["out", "in"])
def test_fragments_share_the_verdict_of_their_first(policed: Policed, v: int, who: str) -> None:
    said = {"egress" if who == "out" else "ingress": steps(("UDP", 53, 53))}
    policed.isolate(**said)
    ends_of = (A[v], REMOTE[v]) if who == "out" else (REMOTE[v], A[v])
    allowed = pieces(ends_of[0], 1000, ends_of[1], 53)
    denied = pieces(ends_of[0], 1000, ends_of[1], 54, 8)
    assert [policed.sends(piece) for piece in allowed] == [True] * 3
    assert [policed.sends(piece) for piece in denied] == [False] * 3
    answer = pieces(ends_of[1], 53, ends_of[0], 1000, 9)
    policed.isolate(**{"ingress": NOTHING, "egress": NOTHING} | said)
    assert [policed.sends(piece) for piece in answer] == [True] * 3


@both
def test_fragments_before_their_first_need_all_ports(policed: Policed, v: int) -> None:
    policed.isolate(ingress=steps(("UDP", 53, 53)))
    first, *later = pieces(REMOTE[v], 1000, A[v], 53)
    assert [policed.sends(piece) for piece in later] == [False] * 2
    assert policed.sends(first)
    assert [policed.sends(piece) for piece in later] == [True] * 2
    policed.isolate(ingress=steps("UDP"))
    assert [policed.sends(piece) for piece in pieces(REMOTE[v], 1000, A[v], 53, 11)[1:]] == [True] * 2


# -- who a pod says it is ----------------------------------------------------------------------------------------------


@both
def test_addresses_and_macs_that_are_not_the_pods(policed: Policed, v: int) -> None:
    machine = policed.machine
    packet = Ether(tcp(A[v], 1000, REMOTE[v], 80))
    assert machine.run_by(101, "wag_pod_egress", bytes(packet)).verdict != DROP
    assert machine.run_by(102, "wag_pod_egress", bytes(packet)).verdict == DROP  # B sends it
    for source in (B[v], REMOTE[v], CLIENT[v], NODE[v], {4: "127.0.0.1", 6: "::1"}[v], ANY[v]):
        assert machine.run_by(101, "wag_pod_egress", tcp(source, 1000, REMOTE[v], 80)).verdict == DROP, source
    packet.src = "02:00:00:00:00:03"
    assert machine.run_by(101, "wag_pod_egress", bytes(packet)).verdict == DROP
    assert policed.reasons == {"spoofed"}
    assert machine.nat() == set() and policed.flows() == {}


def test_what_stays_on_the_link_is_left_to_the_stack(policed: Policed) -> None:
    machine = policed.machine
    asks = bytes(Ether(**MACS) / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67))
    assert machine.run_by(101, "wag_pod_egress", asks).verdict == PASS
    assert machine.run_by(101, "wag_pod_egress", udp("fe80::99", 5353, LINK[6], 5353)).verdict == PASS
    assert machine.run_by(101, "wag_pod_egress", udp("fe80::99", 546, "fe80::1", 547)).verdict == PASS
    assert machine.run_by(101, "wag_pod_egress", udp("fe80::99", 1000, REMOTE[6], 53)).verdict == DROP
    assert machine.run_by(101, "wag_pod_egress", udp("0.0.0.0", 1000, REMOTE[4], 53)).verdict == DROP


def interface_mac(machine: Machine, ifindex: int) -> str:
    from pathlib import Path

    def read() -> str:
        import fcntl
        import socket

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            name = socket.if_indextoname(ifindex)
            raw = fcntl.ioctl(sock, 0x8927, struct.pack("16s16x", name.encode()))  # SIOCGIFHWADDR
        return ":".join(f"{byte:02x}" for byte in raw[18:24])

    return call_in_netns(Path(f"/run/netns/{machine.netns}"), read)


def test_neighbour_discovery_ends_on_the_link(policed: Policed) -> None:
    """What has its type and its hop limit, and is for somebody behind a router, is a packet as any other: the
    stack would forward it."""
    policed.isolate(egress=NOTHING)
    machine = policed.machine
    router = interface_mac(machine, 101)

    def solicits(source: str, target: str, mac: str) -> int:
        frame = Ether(src=MACS["src"], dst=mac) / IPv6(src=source, dst=target, hlim=255) / ICMPv6ND_NS(tgt=target)
        return machine.run_by(101, "wag_pod_egress", bytes(frame)).verdict

    assert solicits(A[6], LINK[6], "33:33:00:00:00:fb") == PASS
    assert solicits(A[6], NODE[6], router) == PASS
    assert solicits(A[6], "fe80::77", router) == PASS
    assert solicits(A[6], B[6], "02:00:00:00:00:77") == PASS  # of another machine on its link
    assert solicits(A[6], REMOTE[6], router) == DROP
    assert solicits(REMOTE[6], CLIENT[6], router) == DROP
    assert policed.reasons == {"policy_egress", "spoofed"}


# -- what is said of it ------------------------------------------------------------------------------------------------


def shown(event) -> tuple:
    return event.kind, event.verdict, event.reason, event.direction, event.policy, event.rule


@both
def test_a_drop_names_the_set_and_the_rule(policed: Policed, v: int) -> None:
    policed.isolate(ingress=WEB, egress=NOTHING)
    policed.machine.events()
    policed.sends(tcp(CLIENT[v], 1000, A[v], 81))
    policed.sends(tcp(A[v], 1000, CLIENT[v], 81))
    policed.sends(tcp(CLIENT[v], 1000, A[v], 81))
    kind, dropped = EventKind.POLICY, Outcome.DROPPED
    into = (kind, dropped, Reason.POLICY_INGRESS, Direction.INGRESS, IN, DENIES)
    assert [shown(event) for event in policed.machine.events()] == [
        into,
        (kind, dropped, Reason.POLICY_EGRESS, Direction.EGRESS, OUT, DENIES),
        into,
    ]


@both
def test_audited_policies_say_what_they_would_do(policed: Policed, v: int) -> None:
    policed.isolate(ingress=steps("TCP", verdict=ALLOW | AUDIT), egress=EVERYTHING)
    policed.machine.events()
    assert policed.sends(tcp(CLIENT[v], 1000, A[v], 80))
    assert policed.sends(tcp(CLIENT[v], 1000, A[v], 80, "A"))
    assert policed.sends(tcp(A[v], 80, CLIENT[v], 1000, "SA"))
    told = [shown(event) for event in policed.machine.events() if event.kind == EventKind.POLICY]
    assert told == [(EventKind.POLICY, Outcome.AUDIT, Reason.POLICY_INGRESS, Direction.INGRESS, IN, ALLOWS)]
    assert policed.machine.drops() == {}


@both
def test_nothing_is_audited_of_what_is_dropped(policed: Policed, v: int) -> None:
    policed.put(
        sets={OUT: {EVERY_CLASS: steps("TCP", verdict=ALLOW | AUDIT)}, IN: {EVERY_CLASS: NOTHING}},
        pods={A[v]: (OPEN, OUT), B[v]: (IN, OPEN)},
    )
    policed.machine.events()
    assert not policed.sends(tcp(A[v], 1000, B[v], 80))
    (event,) = policed.machine.events()
    assert shown(event) == (EventKind.POLICY, Outcome.DROPPED, Reason.POLICY_INGRESS, Direction.INGRESS, IN, DENIES)


@both
def test_answers_are_not_audited_for_what_they_would_be_as_questions(policed: Policed, v: int) -> None:
    """In the middle of a connection that nobody remembers only the direction counts by which it passes."""
    policed.put(
        sets={OUT: {EVERY_CLASS: steps(("TCP", 1000, 1000), verdict=ALLOW | AUDIT)}, IN: {EVERY_CLASS: WEB}},
        pods={A[v]: (IN, OUT), B[v]: (IN, OPEN)},
    )
    policed.machine.events()
    assert policed.sends(tcp(A[v], 80, B[v], 1000, "SA"))
    assert [event for event in policed.machine.events() if event.kind == EventKind.POLICY] == []


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 9, 64, 333, 1000])
def test_every_step_of_a_list_is_found(policed: Policed, count: int) -> None:
    """Verdicts by turns, at every boundary and on both sides of it. Other lists lie before and behind."""
    gap = 60
    said = [Step(0, DENY, 1), *(Step(step_key("TCP", 10 + gap * i), (i + 1) % 2, i + 2) for i in range(count - 1))]
    before = {EVERY_CLASS: EVERYTHING, 60: steps(("TCP", 1, 3), ("TCP", 9, 11))}
    policed.put(
        sets={IN: {EVERY_CLASS: tuple(said)}, OUT: before, 0x44: {EVERY_CLASS: steps("UDP", ("TCP", 5, 5))}},
        pods={A[4]: (IN, OPEN)},
    )
    keys = {step.start for step in said}
    keys = {key + more for key in keys for more in (-1, 0, 1, gap // 2)} | {step_key("TCP", 0), step_key("TCP", 65535)}
    machine, wrong = policed.machine, []
    frame = bytearray(tcp(CLIENT[4], 1000, A[4], 80))

    def probe() -> None:
        for key in sorted(keys):
            if key >> 16 != 1:
                continue
            frame[36:38] = (key & 0xFFFF).to_bytes(2, "big")
            passes = machine.run_here("wag_node_ingress", bytes(frame)).verdict != DROP
            wanted = [step for step in said if step.start <= key][-1].verdict == ALLOW
            if passes != wanted:
                wrong.append((key, passes))

    machine.summed = False
    machine.inside(probe)
    assert not wrong


@both
def test_broken_tables_deny(policed: Policed, v: int) -> None:
    policed.isolate(ingress=EVERYTHING)
    policy = policed.machine.maps["wag_policy"]
    key = pack_key(IN, EVERY_CLASS)
    assert policed.sends(tcp(CLIENT[v], 1000, A[v], 80))
    right = policy.lookup(key)
    assert right is not None
    for number, broken in enumerate((PolicyRun(0, 0), PolicyRun(1 << 31, 3)), 1):
        policy.update(key, broken.pack())
        assert not policed.sends(tcp(CLIENT[v], 1000 + number, A[v], 80)), broken
    policy.delete(key)
    assert not policed.sends(tcp(CLIENT[v], 1010, A[v], 80))
    policy.update(key, right)
    assert policed.sends(tcp(CLIENT[v], 1011, A[v], 80))
