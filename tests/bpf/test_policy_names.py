"""Domain names in policies: what the programs learn from DNS answers on their way to a pod, and what it opens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from ipaddress import ip_address

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest
from dns_answers import answer, told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packets import NODE, REMOTE, VIP, A, B, both, build, tcp, udp
from scapy.layers.inet import IP, TCP, UDP, fragment
from scapy.layers.l2 import Ether

from waggle.abi._generated import Conn, Counter, Name, NameShare
from waggle.abi.learned_names import Learned, learned
from waggle.observe.counters import counters
from waggle.plan.policy_tables import ALLOW, AUDIT, DENY, LAST, NAMED, OPEN, STRICT, Step
from waggle.plan.policy_tables import ANY as EVERY_CLASS
from waggle.testing.machine import DROP, NAMES_SHARE, Machine
from waggle.testing.policed import PolicedMachine, Sets

SERVER = REMOTE  # of DNS
WORLD = {4: "203.0.113.50", 6: "2001:db8:cb::50"}
OTHER = {4: "203.0.113.51", 6: "2001:db8:cb::51"}
TYPE = {4: "A", 6: "AAAA"}
OUT, IN = 0x23, 0x44  # a set with names is odd
PATTERNS = {"www.example.com": 5, "*.example.com": 6, "*.com": 7, "example.org": 8}
EXAMPLES = int(os.environ.get("EXAMPLES", "150"))

#: At place 2 the rule about names, at place 3 the one that denies everything, after one for DNS.
DENIES = Step(0, DENY, 9, 3, 0)
DNS_ALONE = (
    DENIES,
    Step(1 << 16 | 53, ALLOW, 1, 1, 0),
    Step(1 << 16 | 54, DENY, 9, 3, 0),
    Step(2 << 16 | 53, ALLOW, 1, 1, 0),
    Step(2 << 16 | 54, DENY, 9, 3, 0),
)
ACCEPTS = (Step(0, ALLOW, 2, 2, LAST),)


class Named(PolicedMachine):
    """The node; its pod A may ask DNS servers, and go where names say."""

    def accept(self, *patterns: str, steps=ACCEPTS, others=DNS_ALONE, pods: dict[str, Sets] | None = None) -> None:
        numbers = {pattern: PATTERNS[pattern] for pattern in patterns}
        entries = {NAMED | number: steps for number in numbers.values()}
        self.put(
            sets={OUT: {EVERY_CLASS: others, **entries}},
            pods=pods or {A[v]: (OPEN, OUT) for v in (4, 6)},
            patterns=numbers,
        )

    def sends(self, packet: bytes, program: str = "pod_egress") -> bool:
        self.machine.summed = False
        return self.machine.run(f"wag_{program}", packet).verdict != DROP

    def asks(self, v: int, *, port: int = 4000, server: str = "", make=udp) -> None:
        assert self.sends(make(A[v], port, server or SERVER[v], 53))

    def is_told(self, v: int, message: bytes, *, port: int = 4000, server: str = "", by: str = "node_ingress") -> None:
        assert self.sends(udp(server or SERVER[v], 53, A[v], port, payload=message), by)

    def reaches(self, v: int, address: str = "", port: int = 443) -> bool:
        return self.sends(tcp(A[v], 5000 + port % 1000, address or WORLD[v], port))

    @property
    def names(self) -> dict[str, set[int]]:
        """Address → patterns, of the pod A."""
        return {one.address: set(one.patterns) for one in self.learned}

    @property
    def learned(self) -> list[Learned]:
        return list(learned(self.machine.maps["wag_names"].dump(), time.monotonic()))

    def forget(self, *tables: str) -> None:
        for name in tables or ("wag_names", "wag_conns"):
            table = self.machine.maps[name]
            table.delete_many(list(table.keys()))
        self.machine.forget_open_flows()

    def pass_time(self, seconds: int) -> None:
        table = self.machine.maps["wag_names"]
        for key, raw in table.dump():
            found = Name.unpack(raw)
            until = [int.from_bytes(found.until[i : i + 4], "little") for i in range(0, 64, 4)]
            table.update(
                key, found._replace(until=b"".join(max(1, u - seconds).to_bytes(4, "little") for u in until)).pack()
            )

    def count(self, counter: Counter) -> int:
        return counters(self.machine.maps["wag_counters"])[counter.name.lower()]


@pytest.fixture
def named(node: Machine) -> Named:
    made = Named(node)
    made.accept("www.example.com", "*.example.com")
    return made


# -- what an answer opens --------------------------------------------------------------------------------------------


@both
def test_an_answer_opens_what_it_names(named: Named, v: int) -> None:
    assert not named.reaches(v)
    named.asks(v)
    named.is_told(v, answer("www.example.com", ("www.example.com", TYPE[v], 300, WORLD[v]), kind=TYPE[v]))
    assert named.reaches(v)
    assert not named.reaches(v, OTHER[v])
    (found,) = named.learned
    assert (found.ifindex, found.address, found.name) == (101, WORLD[v], "www.example.com")
    assert {pattern: 298 <= left <= 300 for pattern, left in found.patterns.items()} == {5: True, 6: True}
    assert named.sends(tcp(B[v], 5000, A[v], 80), "node_ingress") is not False  # ingress is open, and stays so


@pytest.mark.parametrize(("out", "into"), [(4, 6), (6, 4)])
def test_asked_by_one_family_about_the_other(named: Named, out: int, into: int) -> None:
    named.asks(out)
    named.is_told(out, answer("www.example.com", ("www.example.com", TYPE[into], 300, WORLD[into]), kind=TYPE[into]))
    assert named.reaches(into)


@both
def test_only_for_the_pod_that_asked(named: Named, v: int) -> None:
    named.accept("www.example.com", pods={address[v]: (OPEN, OUT) for address in (A, B)})
    named.asks(v)
    named.is_told(v, answer("www.example.com", ("www.example.com", TYPE[v], 300, WORLD[v]), kind=TYPE[v]))
    assert named.reaches(v)
    assert not named.sends(tcp(B[v], 5000, WORLD[v], 443))


@pytest.mark.parametrize(
    ("asked", "patterns"),
    [
        ("www.example.com", {5, 6}),
        ("WwW.eXAMple.coM", {5, 6}),
        ("a.b.c.d.example.com", {6}),
        ("x.example.com", {6}),
        ("example.com", set()),
        ("wwwexample.com", set()),
        ("www.example.com.evil.org", set()),
        ("com", set()),
        ("example.org", set()),
        ("bad!.example.com", set()),
        (r"a\.example.com", set()),
        ("_tcp.x-1.example.com", {6}),
        ("a" * 63 + "." + "b" * 63 + "." + "c" * 63 + ".d." + "e" * 40 + ".example.com", {6}),
        (".".join("x" * 120) + ".example.com", {6}),
    ],
)
def test_which_names_are_meant(named: Named, asked: str, patterns: set[int]) -> None:
    named.asks(4)
    named.is_told(4, answer(asked, (asked, "A", 300, WORLD[4])))
    assert named.names.get(WORLD[4], set()) == patterns
    assert named.reaches(4) is bool(patterns)


def test_aliases_lead_to_the_name_that_was_asked_for(named: Named) -> None:
    chain = [("www.example.com", "CNAME", 60, "a.cdn.net."), ("a.cdn.net", "CNAME", 5, "b.cdn.net.")]
    ends = [("b.cdn.net", "A", 5, WORLD[4]), ("b.cdn.net", "A", 5, OTHER[4])]
    named.asks(4)
    named.is_told(4, answer("www.example.com", *chain, *ends))
    assert named.reaches(4)
    assert named.reaches(4, OTHER[4])
    assert {min(one.patterns.values()) for one in named.learned} <= {29, 30}


def test_other_records_open_nothing(named: Named) -> None:
    made = dns.message.from_wire(answer("www.example.com", ("www.example.com", "TXT", 60, "203.0.113.50")))
    made.additional.append(dns.rrset.from_text("www.example.com.", 60, "IN", "A", WORLD[4]))
    made.authority.append(dns.rrset.from_text("www.example.com.", 60, "IN", "A", OTHER[4]))
    named.asks(4)
    named.is_told(4, made.to_wire())
    assert named.names == {}


@pytest.mark.parametrize("count", [1, 28, 73, 200], ids=["short", "512", "1232", "3264"])
def test_long_answers(named: Named, count: int) -> None:
    records = [("www.example.com", "A", 60, f"198.51.100.{n}") for n in range(1, count + 1)]
    message = answer("www.example.com", *records)
    named.asks(4)
    named.is_told(4, message)
    assert named.names.keys() == {f"198.51.100.{n}" for n in range(1, count + 1)}


def test_the_first_of_several_fragments_counts(named: Named) -> None:
    message = answer("www.example.com", *[("www.example.com", "A", 60, f"198.51.100.{n}") for n in range(1, 200)])
    named.asks(4)
    whole = Ether(udp(SERVER[4], 53, A[4], 4000, payload=message))
    for part in fragment(whole[IP], 1480):
        assert named.sends(bytes(Ether(src=whole.src, dst=whole.dst) / part), "node_ingress")
    assert 80 < len(named.names) < 95


# -- by which ways ---------------------------------------------------------------------------------------------------


def segment(v: int, message: bytes, port: int = 4000) -> bytes:
    return build(SERVER[v], A[v], TCP(sport=53, dport=port, flags="PA", seq=1), payload=message)


@both
@pytest.mark.parametrize("ahead", [True, False], ids=["length and message", "message alone"])
def test_by_tcp(named: Named, v: int, ahead: bool) -> None:
    message = answer("www.example.com", ("www.example.com", TYPE[v], 300, WORLD[v]), kind=TYPE[v])
    named.asks(v, make=tcp)
    assert named.sends(segment(v, len(message).to_bytes(2, "big") * ahead + message), "node_ingress")
    assert named.reaches(v)


@both
def test_from_a_pod_of_this_node(named: Named, v: int) -> None:
    named.asks(v, server=B[v])
    message = answer("www.example.com", ("www.example.com", TYPE[v], 300, WORLD[v]), kind=TYPE[v])
    named.is_told(v, message, server=B[v], by="pod_egress")
    assert named.reaches(v)


@both
def test_from_this_node(named: Named, v: int) -> None:
    named.asks(v, server=NODE[v])
    message = answer("www.example.com", ("www.example.com", TYPE[v], 300, WORLD[v]), kind=TYPE[v])
    named.is_told(v, message, server=NODE[v], by="pod_ingress")
    assert named.reaches(v)


@both
def test_through_a_service_and_back(named: Named, v: int) -> None:
    """What no socket hook has translated: the answer is the Service's when the pod gets it."""
    named.machine.add_service(VIP[v], 53, "UDP", [(SERVER[v], 53)])
    named.asks(v, server=VIP[v])
    named.is_told(v, answer("www.example.com", ("www.example.com", TYPE[v], 300, WORLD[v]), kind=TYPE[v]))
    assert named.reaches(v)


@both
def test_from_outside_behind_the_nodes_address(named: Named, v: int) -> None:
    outside = {4: "203.0.113.9", 6: "2001:db8:cb::9"}[v]
    machine = named.machine
    machine.summed = False
    out = machine.run("wag_pod_egress", udp(A[v], 4000, outside, 53))
    port = Ether(out.packet)[UDP].sport
    message = answer("www.example.com", ("www.example.com", TYPE[v], 300, WORLD[v]), kind=TYPE[v])
    assert named.sends(udp(outside, 53, NODE[v], port, payload=message), "node_ingress")
    assert named.reaches(v)


# -- what teaches nothing --------------------------------------------------------------------------------------------


def good(name: str = "www.example.com") -> bytes:
    return answer(name, (name, "A", 300, WORLD[4]))


def test_what_was_not_asked_for(named: Named) -> None:
    named.is_told(4, good())
    named.asks(4)
    named.is_told(4, good(), port=4001)
    named.is_told(4, good(), server=WORLD[4])
    assert named.names == {}
    named.is_told(4, good())
    assert named.names


def test_from_another_port(named: Named) -> None:
    named.asks(4)
    assert named.sends(udp(SERVER[4], 5353, A[4], 4000, payload=good()), "node_ingress")
    assert named.names == {}


def test_a_pod_whose_policies_know_no_names_teaches_nobody(named: Named) -> None:
    named.put(sets={OUT - 1: {EVERY_CLASS: DNS_ALONE}}, pods={A[4]: (OPEN, OUT - 1)}, patterns=PATTERNS)
    named.asks(4)
    named.is_told(4, good())
    assert named.names == {}


def test_patterns_of_other_pods_alone(named: Named) -> None:
    sets = {OUT: {EVERY_CLASS: DNS_ALONE, NAMED | 5: ACCEPTS}, OUT + 2: {EVERY_CLASS: DNS_ALONE, NAMED | 6: ACCEPTS}}
    named.put(sets=sets, pods={A[4]: (OPEN, OUT), B[4]: (OPEN, OUT + 2)}, patterns=PATTERNS)
    named.asks(4)
    named.is_told(4, good("other.example.com"))
    assert named.names == {}
    named.is_told(4, good())
    assert named.names == {WORLD[4]: {5}}


def test_errors_questions_and_what_is_cut_short(named: Named) -> None:
    named.asks(4)
    for change in (
        lambda m: m.set_rcode(dns.rcode.SERVFAIL),
        lambda m: setattr(m, "flags", m.flags | dns.flags.TC),
        lambda m: setattr(m, "flags", m.flags & ~dns.flags.QR),
        lambda m: m.set_opcode(5),
        lambda m: m.question.append(dns.rrset.RRset(dns.name.from_text("x.example.com"), 1, 1)),
        lambda m: m.question.clear(),
    ):
        made = dns.message.from_wire(good())
        change(made)
        named.is_told(4, made.to_wire())
    assert named.names == {}


HEAD = bytes.fromhex("12348180 0001 0001 0000 0000")
ASKED = b"\3www\7example\3com\0\0\1\0\1"
RECORD = b"\0\1\0\1\0\0\1\0\0\4" + bytes([203, 0, 113, 50])


@pytest.mark.parametrize(
    ("message", "is_read"),
    [
        (HEAD + ASKED + b"\xc0\x0c" + RECORD, True),
        (HEAD + ASKED + b"\xff\xff" + RECORD, True),  # a pointer that nobody follows
        (HEAD + ASKED + b"\xc0\x21" + RECORD, True),  # to itself
        (HEAD + ASKED + b"\0" + RECORD, True),
        (HEAD + ASKED + b"\1a\1b\xc0\x0c" + RECORD, True),
        (HEAD + ASKED + b"\x41a\0" + RECORD, False),  # a kind of label that there is not
        (HEAD + ASKED + b"\xc0\x0c" + RECORD[:-1], False),
        (HEAD + ASKED + b"\xc0\x0c" + RECORD[:9], False),
        (HEAD + ASKED + b"\xc0", False),
        (HEAD + ASKED, False),
        (HEAD + b"\xc0\x0c\0\1\0\1" + b"\xc0\x0c" + RECORD, False),  # a question that points to itself
        (HEAD + b"\3www\7example\xc0\x0c\0\1\0\1" + RECORD, False),
        (HEAD + b"\3www", False),
        (HEAD + b"\77" * 70 + RECORD, False),
        (HEAD + (b"\1a" * 130) + b"\7example\3com\0\0\1\0\1\xc0\x0c" + RECORD, False),  # more than 255 bytes
        (HEAD + ASKED + b"\xc0\x0c" + RECORD[:8] + b"\0\3" + RECORD[10:], False),  # an address of three bytes
        (HEAD + ASKED + b"\xc0\x0c" + RECORD[:8] + b"\xff\xff" + RECORD[10:], False),
        (HEAD + ASKED + b"\xc0\x0c\0\1\0\3" + RECORD[4:], False),  # of another class
        (HEAD[:11], False),
        (HEAD, False),
        (b"", False),
        (b"\xff" * 300, False),
    ],
)
def test_messages_made_by_hand(named: Named, message: bytes, is_read: bool) -> None:
    named.asks(4)
    named.is_told(4, message)
    assert named.names == ({WORLD[4]: {5, 6}} if is_read else {})


def test_what_is_cut_in_the_middle_counts_up_to_there(named: Named) -> None:
    second = RECORD[:-1] + b"\x33"
    head = HEAD[:6] + b"\0\2" + HEAD[8:]
    named.asks(4)
    named.is_told(4, head + ASKED + b"\xc0\x0c" + RECORD + b"\xc0\x0c" + second[:-2])
    assert named.names.keys() == {WORLD[4]}
    assert named.count(Counter.NAME_UNREADABLE) == 1


# -- random answers, against dnspython -------------------------------------------------------------------------------

LABEL = st.sampled_from(["www", "WWW", "a", "example", "com", "org", "x-1", "_u", "b" * 63, "q!", "EXAMPLE"])
OWNER = st.lists(LABEL, min_size=1, max_size=5).map(".".join).filter(lambda name: len(name) < 254) | st.sampled_from(
    ["www.example.com", "x.example.com", "example.org", "a.b.example.com", "example.com"]
)
ADDRESS4 = st.integers(1, 40).map(lambda n: f"198.51.100.{n}")
ADDRESS6 = st.integers(1, 40).map(lambda n: f"2001:db8::{n:x}")
TTL = st.sampled_from([0, 1, 29, 30, 31, 300, 86400, 86401, 0x7FFFFFFF])
RECORDS = st.one_of(
    st.tuples(OWNER, st.just("A"), TTL, ADDRESS4),
    st.tuples(OWNER, st.just("AAAA"), TTL, ADDRESS6),
    st.tuples(OWNER, st.just("CNAME"), TTL, OWNER.map(lambda name: name + ".")),
    st.tuples(OWNER, st.just("TXT"), TTL, st.sampled_from(["x", "y" * 200])),
    st.tuples(OWNER, st.just("MX"), TTL, OWNER.map(lambda name: f"10 {name}.")),
)
CHANGES = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4)
ANSWERS = st.builds(lambda name, records: answer(name, *records), OWNER, st.lists(RECORDS, max_size=12))


@pytest.fixture(scope="module")
def learner(loaded: Machine) -> Iterator[Named]:
    loaded.reset()
    loaded.add_pod(A[4], 101)
    made = Named(loaded)
    made.accept(*PATTERNS)
    yield made
    loaded.reset()


def learns(learner: Named, message: bytes) -> dict[str, tuple[set[int], int]]:
    learner.forget("wag_names", "wag_name_shares")
    learner.is_told(4, message)
    return {one.address: (set(one.patterns), min(one.patterns.values())) for one in learner.learned}


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANSWERS)
def test_well_formed_answers_teach_what_dnspython_reads(learner: Named, message: bytes) -> None:
    learner.asks(4)
    found = learns(learner, message)
    expected = told(message, PATTERNS)
    assert {a: patterns for a, (patterns, _) in found.items()} == {
        a: {PATTERNS[pattern] for pattern in of} for a, (_, of) in expected.items()
    }
    for address, (_, left) in found.items():
        assert expected[address][0] - 3 <= left <= expected[address][0]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ANSWERS, st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 9)
)
def test_broken_answers_teach_no_more_than_their_bytes_say(
    learner: Named, message: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    """What dnspython can still read, the programs read alike. Of the rest, they may have read the beginning: addresses
    that stand in the message, for a question that is of a pattern."""
    broken = bytearray(message)
    for at, byte in changes:
        broken[at % len(broken)] = byte
    sent = bytes(broken[: len(broken) - cut])
    learner.asks(4)
    found = learns(learner, sent)
    expected = told(sent, PATTERNS)
    for address in expected:
        assert address in found
    for address in found:
        assert ip_address(address).packed in sent
    if any(address not in expected for address in found):
        assert sent[2] & 0xFA == 0x80
        assert sent[3] & 0x0F == 0


def test_a_question_counts_in_a_flow_that_the_server_has_opened_meanwhile(named: Named, one_cpu: None) -> None:
    named.asks(4)
    conns = named.machine.maps["wag_conns"]
    conns.delete_many(list(conns.keys()))
    named.is_told(4, good())
    assert not named.learned
    named.asks(4)
    named.is_told(4, good())
    assert named.learned


# -- where a name stands ---------------------------------------------------------------------------------------------


def test_a_rule_before_the_one_about_names_stays(named: Named) -> None:
    named.asks(4)
    named.is_told(4, good())
    for place, passes in ((1, False), (2, False), (3, True), (LAST, True)):
        named.forget("wag_conns")
        named.accept("www.example.com", others=(Step(0, DENY, 9, place, 0),))
        assert named.reaches(4) is passes, place


def test_names_of_tier_baseline(named: Named) -> None:
    named.asks(4)
    named.is_told(4, good())
    for baseline, passes in ((0, False), (4, False), (5, True)):  # 0: a NetworkPolicy isolates, nobody asks this tier
        named.forget("wag_conns")
        accepts = (Step(0, ALLOW, 2, LAST, 4),)
        named.accept("www.example.com", steps=accepts, others=(Step(0, DENY, 9, LAST, baseline),))
        assert named.reaches(4) is passes, baseline


def test_ports_of_the_rule_count(named: Named) -> None:
    only = (
        Step(0, DENY, 0, LAST, LAST),
        Step(1 << 16 | 443, ALLOW, 2, 2, LAST),
        Step(1 << 16 | 444, DENY, 0, LAST, LAST),
    )
    named.accept("www.example.com", steps=only)
    named.asks(4)
    named.is_told(4, good())
    assert named.reaches(4, port=443)
    assert not named.reaches(4, port=444)


def test_one_of_several_patterns_is_enough(named: Named) -> None:
    nothing = (Step(0, DENY, 0, LAST, LAST),)
    named.asks(4)
    named.is_told(4, good())
    for first, second in ((nothing, ACCEPTS), (ACCEPTS, nothing)):
        named.forget("wag_conns")
        named.put(sets={OUT: {EVERY_CLASS: DNS_ALONE, NAMED | 5: first, NAMED | 6: second}})
        assert named.reaches(4)


def test_what_audited_policies_would_deny(named: Named) -> None:
    """The whole policy is on trial: what it would accept by its name is not reported."""
    others = (Step(0, ALLOW | AUDIT, 9, 3, 0),)
    strict = {STRICT | NAMED | 5: ACCEPTS, NAMED | 5: (Step(0, DENY, 0, LAST, LAST),)}
    named.put(sets={OUT: {EVERY_CLASS: others, **strict}}, patterns=PATTERNS)
    named.asks(4)
    named.machine.events()
    named.is_told(4, good())
    assert named.reaches(4)
    assert [event.rule for event in named.machine.events() if event.rule] == []
    assert named.reaches(4, OTHER[4])
    assert 9 in [event.rule for event in named.machine.events()]


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_name_is_for_its_time_and_its_flows_for_as_long_as_they_live(named: Named) -> None:
    named.asks(4)
    named.is_told(4, good())
    assert named.reaches(4, port=443)
    named.pass_time(299)
    assert named.reaches(4, port=444)
    named.pass_time(3)
    assert not named.reaches(4, port=445)
    assert named.reaches(4, port=443)
    named.accept("www.example.com")  # judged again
    assert named.reaches(4, port=443)
    named.forget("wag_names")
    named.accept("www.example.com", "*.example.com")
    assert named.reaches(4, port=443)
    named.accept(
        "*.example.com"
    )  # it was allowed by this name, or by another one: which, nobody remembers but the flow
    named.accept("example.org")
    assert not named.reaches(4, port=443)


def test_asking_again_makes_it_longer_and_never_shorter(named: Named) -> None:
    named.asks(4)
    for ttl, least in ((60, 58), (600, 598), (30, 598)):
        named.is_told(4, answer("www.example.com", ("www.example.com", "A", ttl, WORLD[4])))
        assert min(named.learned[0].patterns.values()) >= least


def test_what_policies_share_survives_a_change_of_them(named: Named) -> None:
    """Sets come and go; a pattern is the same in all of them."""
    named.asks(4)
    named.is_told(4, good())
    sets = {OUT + 2: {EVERY_CLASS: DNS_ALONE, NAMED | 5: ACCEPTS}}
    named.put(sets=sets, pods={A[4]: (OPEN, OUT + 2)}, patterns={"www.example.com": 5})
    assert named.reaches(4)


def test_an_address_of_more_names_than_it_has_room_for(named: Named) -> None:
    numbers = {f"n{n}.example.org": 100 + n for n in range(20)}
    entries = {NAMED | number: ACCEPTS for number in numbers.values()}
    named.put(sets={OUT: {EVERY_CLASS: DNS_ALONE, **entries}}, patterns=numbers)
    named.asks(4)
    for n, name in enumerate(numbers):
        named.is_told(4, answer(name, (name, "A", 100 + n, WORLD[4])))
    assert named.names == {WORLD[4]: set(range(104, 120))}
    assert named.count(Counter.NAME_SLOT) == 4
    assert named.reaches(4)


def test_a_pod_cannot_fill_the_table_at_once(named: Named) -> None:
    named.accept("www.example.com", "*.example.com", pods={address[4]: (OPEN, OUT) for address in (A, B)})
    named.asks(4)
    for n in range(12):
        records = [("www.example.com", "A", 60, f"198.18.{n}.{k}") for k in range(100)]
        named.is_told(4, answer("www.example.com", *records))
    assert len(named.learned) == NAMES_SHARE
    assert named.count(Counter.NAME_REFUSED) == 12 * 100 - NAMES_SHARE
    assert named.sends(udp(B[4], 4000, SERVER[4], 53))  # another pod has its own share
    assert named.sends(udp(SERVER[4], 53, B[4], 4000, payload=good()), "node_ingress")
    assert named.sends(tcp(B[4], 5000, WORLD[4], 443))
    table = named.machine.maps["wag_name_shares"]
    for key, raw in table.dump():
        found = NameShare.unpack(raw)
        table.update(key, found._replace(since=max(0, found.since - 61)).pack())
    named.is_told(4, good())
    assert named.reaches(4)


def test_flows_remember_the_pattern(named: Named) -> None:
    named.asks(4)
    named.is_told(4, good())
    named.reaches(4)
    found = [Conn.unpack(raw).pattern for _, raw in named.machine.maps["wag_conns"].dump()]
    assert sorted(found)[0] == 0
    assert max(found) in (5, 6)
