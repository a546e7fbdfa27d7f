"""Policies and flows: replies, forgotten flows, changes under established ones, ICMP errors; and names of rules."""

from __future__ import annotations

from tests.unit.policy_worlds import address, policy, world

from waggle.model.meta import ObjectKey
from waggle.model.packets import End
from waggle.model.policy_flows import PolicyFlows, PolicyPacket
from waggle.model.policy_rules import NO_RULE, Direction, RuleRef, rule_id

DENY = policy("{podSelector: {}, policyTypes: [Ingress, Egress]}", "deny")
OUT_80 = policy("{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 80}, {port: 53, protocol: UDP}]}]}")
IN_80 = policy("{podSelector: {}, policyTypes: [Ingress], ingress: [{ports: [{port: 80}]}]}", "in")


def packet(
    source: str, destination: str, port: int = 80, *, protocol: str = "TCP", own: int = 40000, begins: bool = True
) -> PolicyPacket:
    return PolicyPacket(protocol, End(address(source), own), End(address(destination), port), begins)


def test_replies_of_a_flow_that_was_allowed_pass() -> None:
    here, flows = world([DENY, OUT_80]), PolicyFlows()
    query = packet("x/a", "y/a", 53, protocol="UDP")
    assert not flows.saw(here, query.reversed())  # unasked
    assert flows.saw(here, query)
    assert flows.saw(here, query.reversed())
    assert not flows.saw(here, packet("y/a", "x/a", own=53, port=40001, protocol="UDP"))  # another flow


def test_a_connection_that_the_node_forgot_goes_on() -> None:
    here, flows = world([DENY, OUT_80]), PolicyFlows()
    opens = packet("x/a", "y/a")
    assert not flows.allows(here, opens.reversed()._replace(begins=True))  # a SYN is none of a flow
    assert flows.allows(here, opens.reversed())  # nobody remembers it, and the other direction may
    assert flows.saw(here, opens)
    flows.forget(opens)
    assert flows.allows(here, opens.reversed())
    datagram = packet("x/a", "y/a", 53, protocol="UDP")
    flows.saw(here, datagram)
    flows.forget(datagram)
    assert not flows.allows(here, datagram.reversed())  # UDP does not tell who began


def test_sockets_tell_who_opened_a_connection_that_is_not_known() -> None:
    closed = world([policy("{podSelector: {}, policyTypes: [Ingress]}", "closed", "y")])
    opens = packet("x/a", "y/a")
    for known in (opens, opens.reversed()):
        flows = PolicyFlows(sockets=lambda _, known=known: known)
        passes = known != opens  # nobody may ask y, but y may ask x
        assert flows.saw(closed, opens.reversed()) is passes
        assert flows.saw(closed, opens._replace(begins=False)) is passes
    assert PolicyFlows().saw(closed, opens._replace(begins=False))  # nobody tells: y may have asked


def test_a_policy_that_comes_cuts_or_keeps() -> None:
    before, after = world(), world([DENY])
    for keep in (False, True):
        flows, opens = PolicyFlows(keep=keep), packet("x/a", "y/a")
        assert flows.saw(before, opens)
        middle = opens._replace(begins=False)
        assert flows.saw(after, middle) is keep
        assert flows.saw(after, middle.reversed()) is keep
        assert not flows.saw(after, packet("x/a", "y/a", own=40001))


def test_a_flow_whose_direction_is_closed_is_cut_for_both_ends() -> None:
    for protocol in ("TCP", "UDP"):
        flows, opens = PolicyFlows(), packet("x/a", "y/a", protocol=protocol)
        assert flows.saw(world(), opens)
        # nobody may ask y any more, who may send whatever it likes: not what it has still to say to who asked
        closed = world([policy("{podSelector: {}, policyTypes: [Ingress]}", "closed", "y")])
        assert not flows.saw(closed, opens.reversed())
        assert not flows.saw(closed, opens._replace(begins=False))
        assert flows.saw(closed, PolicyPacket(protocol, opens.destination, End(opens.source.address, 40001)))
        assert flows.saw(world(), opens._replace(begins=False))  # allowed again


def test_who_was_asked_may_begin_a_connection_where_one_was_cut() -> None:
    flows, opens = PolicyFlows(), packet("x/a", "y/a")
    assert flows.saw(world(), opens)
    closed = world([policy("{podSelector: {}, policyTypes: [Ingress]}", "closed", "y")])
    assert not flows.saw(closed, opens._replace(begins=False))
    assert flows.saw(closed, opens.reversed()._replace(begins=True))
    assert flows.saw(closed, opens._replace(begins=False))


def test_cut_flows_stay_cut_until_they_are_allowed_again() -> None:
    flows, query = PolicyFlows(), packet("x/a", "y/a", 53, protocol="UDP")
    assert flows.saw(world(), query)
    assert not flows.saw(world([DENY]), query.reversed())
    assert not flows.saw(world([DENY]), query)
    assert flows.saw(world([DENY, OUT_80]), query.reversed())
    assert flows.saw(world([DENY, OUT_80]), query)


def test_echo_replies_follow_requests() -> None:
    here = world([policy("{podSelector: {}, policyTypes: [Ingress, Egress], egress: [{}]}")])
    flows, ping = PolicyFlows(), packet("x/a", "y/a", port=7, own=7, protocol="ICMP")
    assert not flows.saw(here, ping.reversed())
    assert flows.saw(here, ping)
    assert flows.saw(here, ping.reversed())


def test_icmp_errors_follow_what_they_are_about() -> None:
    here, flows = world([DENY, IN_80]), PolicyFlows()
    asked = packet("y/a", "x/a")
    answer = asked.reversed()  # what x/a sent back, and a router says is too big
    assert flows.allows_error(here, "ICMP", "203.0.113.1", address("x/a"), answer)
    assert not flows.allows_error(here, "ICMP", "203.0.113.1", address("x/a"), packet("x/a", "y/a", 443))
    # no flow of theirs, but ICMP itself is allowed
    open_to_icmp = world([policy("{podSelector: {}, ingress: [{}]}")])
    assert flows.allows_error(open_to_icmp, "ICMP", "203.0.113.1", address("x/a"), packet("x/a", "y/a", 443))


def test_an_error_is_no_way_out() -> None:
    here, flows = world([DENY, IN_80]), PolicyFlows()
    asked = packet("203.0.113.9", "x/a")
    back = address("x/a"), "203.0.113.9"
    assert flows.allows_error(here, "ICMP", *back, asked)
    assert not flows.allows_error(here, "ICMP", *back, packet("203.0.113.9", "x/a", 443))
    # about what others have got: nothing is said of them, and nothing of it
    assert not flows.allows_error(here, "ICMP", *back, packet("203.0.113.9", "203.0.113.10"))
    # about what somebody else has sent
    assert not flows.allows_error(here, "ICMP", *back, packet("203.0.113.8", "x/a"))


def test_names_of_rules() -> None:
    ref = RuleRef("NetworkPolicy", ObjectKey("x", "web"), Direction.INGRESS, 3)
    assert ref.id == rule_id("NetworkPolicy", ObjectKey("x", "web"), Direction.INGRESS, 3) == 0xAC9A6456
    others = {
        rule_id(kind, key, direction, index)
        for kind in ("NetworkPolicy", "ClusterNetworkPolicy")
        for key in (ObjectKey("x", "web"), ObjectKey("", "web"), ObjectKey("x", "we"))
        for direction in Direction
        for index in range(20)
    }
    assert len(others) == 2 * 3 * 2 * 20
    assert NO_RULE not in others
