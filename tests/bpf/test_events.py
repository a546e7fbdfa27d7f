"""Events: which packets begin a flow, what is told of drops, and what a flood is allowed to cost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from packets import CLIENT, NODE, REMOTE, VIP, A, B, both, build, tcp, udp
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit

from waggle.abi._generated import (
    Bucket,
    Counter,
    DenialKey,
    Direction,
    Event,
    EventKind,
    EventsOf,
    Flow,
    Hook,
    Outcome,
    PolicyFlag,
    PolicyKey,
    PolicyRun,
    PolicyState,
    PolicyStep,
    Reason,
)
from waggle.abi.address import protocol_name, unpack_address
from waggle.kernel.maps import Map
from waggle.testing.machine import DROP, REDIRECT, Machine

OUTSIDE = {4: "203.0.113.9", 6: "2001:db8:cb::9"}


def shown(event: Event) -> str:
    """ "TCP a > b 80 at pod_egress"."""
    ends = f"{unpack_address(event.src)} > {unpack_address(event.dst)} {event.dport}"
    return f"{protocol_name(event.proto)} {ends} at {Hook(event.hook).name.lower()}"


def flows(machine: Machine) -> list[str]:
    """The flows without a Service that were reported since the last time."""
    found = machine.events()
    assert all(
        (e.kind, e.verdict, e.reason, any(e.backend)) == (EventKind.FLOW, Outcome.FORWARDED, 0, False) for e in found
    )
    return [shown(event) for event in found]


def counts(table: Map) -> dict[int, int]:
    return {
        int.from_bytes(key, "little"): sum(int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8))
        for key, raw in table.dump()
    }


# -- flows without a Service ------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("program", "source", "target", "hook"),
    [
        ("wag_pod_egress", A, B, "pod_egress"),
        ("wag_pod_egress", A, REMOTE, "pod_egress"),
        ("wag_pod_egress", A, NODE, "pod_egress"),
        ("wag_node_ingress", REMOTE, A, "node_ingress"),
        ("wag_node_ingress", CLIENT, A, "node_ingress"),
        ("wag_pod_ingress", NODE, A, "pod_ingress"),
    ],
)
def test_whoever_begins_to_talk_to_a_pod_or_as_one_is_reported(node, v, program, source, target, hook):
    node.run(program, tcp(source[v], 1000, target[v], 80))
    assert flows(node) == [f"TCP {source[v]} > {target[v]} 80 at {hook}"]
    node.run(program, udp(source[v], 1000, target[v], 53))
    assert flows(node) == [f"UDP {source[v]} > {target[v]} 53 at {hook}"]
    assert counts(node.maps["wag_flow_counts"])[Hook[hook.upper()]] == 2


@both
def test_what_leaves_the_cluster_is_reported_as_the_pod_sent_it(node, v):
    for packet, name in ((tcp, "TCP"), (udp, "UDP")):
        for _ in range(3):
            node.run("wag_pod_egress", packet(A[v], 1000, OUTSIDE[v], 443))
        assert flows(node) == [f"{name} {A[v]} > {OUTSIDE[v]} 443 at pod_egress"]


@both
def test_the_first_event_has_the_clients_port(node, v):
    node.run("wag_pod_egress", tcp(A[v], 1234, B[v], 80))
    (event,) = node.events()
    assert (event.sport, event.dport, event.count, event.netns) == (1234, 80, 1, 0)


def test_a_connection_begins_with_syn_alone(node):
    for flags in ("SA", "A", "FA", "R", "RA", "PA"):
        node.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80, flags=flags))
        node.run("wag_node_ingress", tcp(REMOTE[4], 1000, A[4], 80, flags=flags))
    assert flows(node) == []


def test_an_association_begins_with_init_alone(node):
    for chunk in (SCTPChunkData(), SCTPChunkInit()):
        node.run("wag_pod_egress", build(A[4], B[4], SCTP(sport=1000, dport=80) / chunk, payload=b""))
    assert flows(node) == [f"SCTP {A[4]} > {B[4]} 80 at pod_egress"]


def test_an_echo_is_reported_and_its_answer_is_not(node):
    for number in range(3):
        node.run("wag_pod_egress", build(A[4], B[4], ICMP(type=8, id=7, seq=number)))
        node.run("wag_pod_egress", build(B[4], A[4], ICMP(type=0, id=7, seq=number)))
        node.run("wag_pod_egress", build(A[6], B[6], ICMPv6EchoRequest(id=7, seq=number)))
        node.run("wag_pod_egress", build(B[6], A[6], ICMPv6EchoReply(id=7, seq=number)))
    assert flows(node) == [f"ICMP {A[4]} > {B[4]} 0 at pod_egress", f"ICMPv6 {A[6]} > {B[6]} 0 at pod_egress"]
    node.run("wag_pod_egress", build(B[4], A[4], ICMP(type=8, id=7)))  # who was asked may ask as well
    assert flows(node) == [f"ICMP {B[4]} > {A[4]} 0 at pod_egress"]


def age_flows(machine: Machine, seconds: int) -> None:
    """As if so much time had passed without a packet."""
    table = machine.maps["wag_flows"]
    for key, raw in table.dump():
        value = Flow.unpack(raw)
        past = {name: getattr(value, name) - seconds * 10**9 for name in ("emitted_ns", "seen_ns")}
        table.update(key, value._replace(**{name: time % (1 << 64) for name, time in past.items()}).pack())
    forget_seen(machine)


def forget_seen(machine: Machine) -> None:
    seen = machine.maps["wag_seen"]
    for key, raw in seen.dump():
        if any(raw):
            seen.update(key, bytes(len(raw)))


@both
@pytest.mark.parametrize("remembered", [True, False])
def test_datagrams_of_a_flow_and_their_answers_are_one_event(node, v, remembered):
    """Whether the CPU knows by itself that it has seen them, or wag_flows has to be asked."""
    for _ in range(5):
        node.run("wag_pod_egress", udp(A[v], 40000, B[v], 53))
        node.run("wag_pod_egress", udp(B[v], 53, A[v], 40000))
        if not remembered:
            forget_seen(node)
    assert flows(node) == [f"UDP {A[v]} > {B[v]} 53 at pod_egress"]
    assert len(list(node.maps["wag_flows"].keys())) == 1


def test_answers_from_the_wire_begin_nothing(node):
    node.run("wag_pod_egress", udp(A[4], 40000, REMOTE[4], 53))
    forget_seen(node)  # they may come by another CPU
    node.run("wag_node_ingress", udp(REMOTE[4], 53, A[4], 40000))
    assert flows(node) == [f"UDP {A[4]} > {REMOTE[4]} 53 at pod_egress"]


def test_many_clients_ports_are_one_flow(node):
    for port in range(2000, 2050):
        node.run("wag_pod_egress", tcp(A[4], port, B[4], 80))
        node.run("wag_pod_egress", udp(A[4], port, B[4], 53))
        node.run("wag_pod_egress", udp(B[4], 53, A[4], port))
    assert len(flows(node)) == 2
    found = sorted(Flow.unpack(raw).count for _, raw in node.maps["wag_flows"].dump())
    assert found == [1, 50]  # datagrams are not counted, connections are


def test_a_flow_is_told_again_after_a_while_with_its_count(node):
    for port in range(2000, 2005):
        node.run("wag_pod_egress", tcp(A[4], port, B[4], 80))
    node.events()
    age_flows(node, 61)
    node.run("wag_pod_egress", tcp(A[4], 3000, B[4], 80))
    (event,) = node.events()
    assert event.count == 6


def test_a_conversation_by_datagrams_is_told_again_only_when_it_begins_anew(node):
    node.run("wag_pod_egress", udp(A[4], 40000, B[4], 53))
    node.events()
    age_flows(node, 100)
    node.run("wag_pod_egress", udp(A[4], 40000, B[4], 53))
    assert node.events() == []
    age_flows(node, 200)  # longer than wag_udp_seconds
    node.run("wag_pod_egress", udp(A[4], 40000, B[4], 53))
    (event,) = node.events()
    assert event.count == 2


def test_answers_keep_a_conversation_alive(node):
    node.run("wag_pod_egress", udp(A[4], 40000, B[4], 53))
    node.events()
    for _ in range(3):
        age_flows(node, 100)
        node.run("wag_pod_egress", udp(B[4], 53, A[4], 40000))
    assert node.events() == []


@pytest.mark.parametrize("target", ["224.0.0.251", "255.255.255.255", "ff02::fb", "fe80::7"])
def test_what_stays_on_its_link_is_no_flow(node, target):
    node.run("wag_pod_egress", udp(A[6 if ":" in target else 4], 5353, target, 5353))
    assert flows(node) == []


def test_what_goes_through_the_stack_is_reported_once(node):
    """From a pod whose packets reach another one by its queue: both programs see them."""
    node.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80))
    node.run("wag_pod_ingress", tcp(A[4], 1000, B[4], 80))
    node.run("wag_pod_ingress", udp(REMOTE[4], 1000, B[4], 80))
    assert flows(node) == [f"TCP {A[4]} > {B[4]} 80 at pod_egress"]


def test_a_flow_to_a_service_is_reported_as_such_alone(node):
    node.add_service(VIP[4], 53, "UDP", [(B[4], 5353)])
    for _ in range(3):
        node.run("wag_pod_egress", udp(A[4], 1000, VIP[4], 53))
        node.run("wag_pod_egress", udp(B[4], 5353, A[4], 1000))
        forget_seen(node)
    (event,) = node.events()
    assert shown(event) == f"UDP {A[4]} > {VIP[4]} 53 at pod_egress"
    assert (unpack_address(event.backend), event.bport, event.verdict) == (B[4], 5353, Outcome.FORWARDED)


# -- drops ------------------------------------------------------------------------------------------------------------


def test_a_drop_says_whether_the_sender_was_told(node):
    node.add_vip(VIP[4])
    node.set_service_ranges("10.96.0.0/16")
    node.summed = False  # answers have none
    node.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 81))
    node.run("wag_pod_egress", tcp(A[4], 1000, "10.96.0.77", 81))
    rejected, dropped = node.events()
    assert (rejected.kind, rejected.reason, rejected.verdict) == (EventKind.DROP, Reason.NO_PORT, Outcome.REJECTED)
    assert (dropped.kind, dropped.reason, dropped.verdict) == (EventKind.DROP, Reason.FREE_ADDRESS, Outcome.DROPPED)
    assert (dropped.policy, dropped.rule, dropped.sport) == (0, 0, 1000)


# -- policies ---------------------------------------------------------------------------------------------------------

ANY_CLASS = 2**64 - 1
ALLOW, AUDIT = int(PolicyFlag.ALLOW), int(PolicyFlag.ALLOW | PolicyFlag.AUDIT)


def add_set(machine: Machine, number: int, first: int, verdict: int, rule: int) -> None:
    """A set that says the same of everything."""
    machine.maps["wag_policy_steps"].update(first.to_bytes(4, "little"), PolicyStep(0, rule, verdict, 0, 0).pack())
    machine.maps["wag_policy"].update(PolicyKey(number, ANY_CLASS).pack(), PolicyRun(first, 1).pack())


@pytest.fixture
def guarded(node: Machine) -> Machine:
    """A may send by set 11, B is asked by set 22; neither is there yet."""
    for v in (4, 6):
        node.add_pod(A[v], 101, egress=11)
        node.add_pod(B[v], 102, ingress=22)
    return node


def told(machine: Machine) -> list[tuple[str, str, str, int, int]]:
    """Verdict, reason, direction, set and rule of what policies decided."""
    found = machine.events()
    return [
        (Outcome(e.verdict).name, Reason(e.reason).name, Direction(e.direction).name, e.policy, e.rule)
        for e in found
        if e.kind == EventKind.POLICY
    ]


def denials(machine: Machine) -> dict[tuple[int, int, str, str], int]:
    return {
        (k.policy, k.rule, Direction(k.direction).name, Outcome(k.verdict).name): int.from_bytes(raw, "little")
        for k, raw in ((DenialKey.unpack(key), raw) for key, raw in machine.maps["wag_denials"].dump())
    }


@both
def test_what_a_rule_denies_is_told_with_the_rule(guarded, v):
    add_set(guarded, 11, 0, ALLOW, 5)
    add_set(guarded, 22, 1, 0, 7)
    for port in (1000, 1001):
        assert guarded.run("wag_pod_egress", tcp(A[v], port, B[v], 80)).verdict == DROP
    assert told(guarded) == [("DROPPED", "POLICY_INGRESS", "INGRESS", 22, 7)] * 2
    assert denials(guarded) == {(22, 7, "INGRESS", "DROPPED"): 2}


def test_what_no_rule_allows_is_told_with_the_set_alone(guarded):
    assert guarded.run("wag_pod_egress", udp(A[4], 1000, B[4], 80)).verdict == DROP
    assert told(guarded) == [("DROPPED", "POLICY_EGRESS", "EGRESS", 11, 0)]
    assert denials(guarded) == {(11, 0, "EGRESS", "DROPPED"): 1}


def test_what_would_be_dropped_is_told_once_for_a_flow_and_passes(guarded):
    add_set(guarded, 11, 0, AUDIT, 5)
    add_set(guarded, 22, 1, ALLOW, 7)
    for _ in range(3):
        assert guarded.run("wag_pod_egress", udp(A[4], 1000, B[4], 80)).verdict == REDIRECT
        assert guarded.run("wag_pod_egress", udp(B[4], 80, A[4], 1000)).verdict == REDIRECT
    found = guarded.events()
    assert [(shown(e), Outcome(e.verdict).name) for e in found] == [
        (f"UDP {A[4]} > {B[4]} 80 at pod_egress", "AUDIT"),
        (f"UDP {A[4]} > {B[4]} 80 at pod_egress", "FORWARDED"),
    ]
    assert (found[0].policy, found[0].rule, found[0].direction) == (11, 5, Direction.EGRESS)
    assert denials(guarded) == {(11, 5, "EGRESS", "AUDIT"): 1}


def test_both_ends_would_have_dropped_it(guarded):
    add_set(guarded, 11, 0, AUDIT, 5)
    add_set(guarded, 22, 1, AUDIT, 7)
    assert guarded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80)).verdict == REDIRECT
    assert told(guarded) == [
        ("AUDIT", "POLICY_EGRESS", "EGRESS", 11, 5),
        ("AUDIT", "POLICY_INGRESS", "INGRESS", 22, 7),
    ]


def test_what_one_end_would_drop_and_the_other_does_is_a_drop_alone(guarded):
    add_set(guarded, 11, 0, AUDIT, 5)
    assert guarded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80)).verdict == DROP
    assert told(guarded) == [("DROPPED", "POLICY_INGRESS", "INGRESS", 22, 0)]


def test_known_flows_are_told_of_again_when_policies_change(guarded):
    add_set(guarded, 11, 0, ALLOW, 5)
    add_set(guarded, 22, 1, ALLOW, 7)
    guarded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80))
    add_set(guarded, 22, 1, AUDIT, 9)
    guarded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80, flags="A"))
    assert told(guarded) == []
    guarded.maps["wag_policy_state"].update(bytes(4), PolicyState(1, 0).pack())
    for _ in range(2):
        assert guarded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80, flags="A")).verdict == REDIRECT
    assert told(guarded) == [("AUDIT", "POLICY_INGRESS", "INGRESS", 22, 9)]


def test_behind_a_service_the_event_says_who_was_asked_and_who_was_judged(guarded):
    guarded.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
    add_set(guarded, 11, 0, ALLOW, 5)
    assert guarded.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80)).verdict == DROP
    (event,) = guarded.events()
    assert shown(event) == f"TCP {A[4]} > {VIP[4]} 80 at pod_egress"
    assert (unpack_address(event.backend), event.bport, event.policy) == (B[4], 8080, 22)


def test_a_denied_flow_is_no_new_flow(guarded):
    guarded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80))
    guarded.run("wag_node_ingress", tcp(REMOTE[4], 1000, B[4], 80))
    assert [event.kind for event in guarded.events()] == [EventKind.POLICY, EventKind.POLICY]


def test_denials_beyond_what_the_table_holds_are_counted_together(guarded):
    table = guarded.maps["wag_denials"]
    room = table.info.max_entries
    other = DenialKey(0, 0, Direction.EGRESS, Outcome.DROPPED).pack()
    table.update(other, bytes(8))
    table.update_many([(DenialKey(n, 1, 1, 2).pack(), bytes(8)) for n in range(1, room)])
    for _ in range(3):
        guarded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80))
    assert int.from_bytes(table.lookup(other), "little") == 3


# -- floods -----------------------------------------------------------------------------------------------------------

RATE = 10


@pytest.fixture(scope="module")
def rare() -> Iterator[Machine]:
    """A node that may emit few events."""
    made = Machine("rare", events_per_second=RATE)
    yield made
    made.close()


@pytest.fixture
def flooded(rare: Machine) -> Machine:
    rare.reset()
    for v in (4, 6):
        rare.add_pod(A[v], 101)
        rare.add_pod(B[v], 102)
    rare.set_service_ranges("10.96.0.0/16")
    return rare


def left_out(machine: Machine, kind: EventKind) -> int:
    raw = machine.maps["wag_buckets"].lookup(int(kind).to_bytes(4, "little"))
    assert raw is not None
    size = len(Bucket(0, 0, 0).pack())
    return sum(Bucket.unpack(raw[at : at + size]).left_out for at in range(0, len(raw), size))


def test_a_flood_of_drops_is_counted_and_told_in_part(flooded):
    packet = udp(A[4], 1000, "10.96.0.77", 53)
    assert flooded.run("wag_pod_egress", packet, repeat=10_000).verdict == DROP
    told = len(flooded.events())
    assert RATE // 2 <= told < 1_000  # on few CPUs, and for a moment, though the machine be busy
    assert flooded.drop_count("free_address", Hook.POD_EGRESS) == 10_000
    assert left_out(flooded, EventKind.DROP) == 10_000 - told


def test_the_next_event_says_how_many_were_left_out(flooded):
    packet = udp(A[4], 1000, "10.96.0.77", 53)
    flooded.run("wag_pod_egress", packet, repeat=10_000)
    missing = left_out(flooded, EventKind.DROP) - sum(event.suppressed for event in flooded.events())
    assert missing > 5_000
    table = flooded.maps["wag_buckets"]
    key = int(EventKind.DROP).to_bytes(4, "little")
    raw = table.lookup(key)
    size = len(Bucket(0, 0, 0).pack())
    fresh = [Bucket.unpack(raw[at : at + size])._replace(full_ns=0).pack() for at in range(0, len(raw), size)]
    table.update(key, b"".join(fresh))  # time passes
    told = 0
    for _ in range(200):  # until the CPU that saw the flood has had its turn
        flooded.run("wag_pod_egress", packet)
        told += sum(event.suppressed for event in flooded.events())
        if told >= missing:
            break
    assert told >= missing


def test_drops_leave_room_for_flows(flooded):
    flooded.run("wag_pod_egress", udp(A[4], 1000, "10.96.0.77", 53), repeat=10_000)
    flooded.events()
    flooded.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80))
    assert flows(flooded) == [f"TCP {A[4]} > {B[4]} 80 at pod_egress"]


def test_a_port_scan_does_not_fill_the_table_of_flows(flooded):
    ports = range(1, 1001)

    def scan() -> None:
        for port in ports:
            assert flooded.run_here("wag_pod_egress", tcp(A[4], 1000, B[4], port)).verdict == REDIRECT

    flooded.inside(scan)
    told = len(flooded.events())
    assert RATE // 2 <= told < len(ports) // 2
    assert len(list(flooded.maps["wag_flows"].keys())) == told
    assert counts(flooded.maps["wag_flow_counts"])[Hook.POD_EGRESS] == len(ports)
    assert left_out(flooded, EventKind.FLOW) == len(ports) - told
    assert counts(flooded.maps["wag_counters"])[Counter.EVENTS_LOST] == 0


# -- fewer events -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "told"), [(EventsOf.OFF, 0), (EventsOf.SERVICES, 1)])
def test_flows_can_be_left_out(setting, told):
    with_less = Machine("less", events=setting)
    try:
        with_less.add_pod(A[4], 101)
        with_less.add_pod(B[4], 102)
        with_less.set_service_ranges("10.96.0.0/16")
        with_less.add_service(VIP[4], 80, "TCP", [(B[4], 8080)])
        with_less.run("wag_pod_egress", tcp(A[4], 1000, B[4], 80))
        with_less.run("wag_pod_egress", udp(A[4], 1000, OUTSIDE[4], 53))
        assert with_less.events() == []
        with_less.run("wag_pod_egress", tcp(A[4], 1000, VIP[4], 80))
        assert len(with_less.events()) == told
        with_less.run("wag_pod_egress", udp(A[4], 1000, "10.96.0.77", 53))
        assert [event.reason for event in with_less.events()] == [Reason.FREE_ADDRESS]
    finally:
        with_less.close()
