"""NodePolicies: what they say, what the tables make of it, and what becomes of a change that is tried."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from policy_worlds import NAMESPACES, PODS, address, namespace, node, pod, world

from waggle.agent.ssh_sessions import SshSession, parse
from waggle.kernel.sockets import Connection
from waggle.model.meta import ObjectKey, ObjectMeta
from waggle.model.node_policy import (
    Clock,
    Essentials,
    Guests,
    Peers,
    State,
    allows,
    confirmed,
    cuts_nothing,
    digest,
    essential,
    expired,
    follow,
    is_audited,
    of_node,
    policy_types,
    refused,
)
from waggle.model.node_trace import OwnPolicies, look_node
from waggle.model.objects import KINDS, NodePolicy
from waggle.model.policy import Traffic
from waggle.model.policy_objects import NodePolicySpec
from waggle.model.policy_rules import Direction
from waggle.model.policy_schema import node_policy_definition
from waggle.plan.policy import PolicyPlanner
from waggle.plan.policy_node import NodePlan, NodeTrial
from waggle.plan.policy_tables import ANY, OPEN, NodeSets, PolicyTables, step_key
from waggle.sources.yaml_objects import parse_manifest

SECOND = 10**9


def policy(name: str = "p", *, audit: bool = False, **spec: Any) -> NodePolicy:
    annotations = {"waggle.io/audit": "true"} if audit else None
    return msgspec.convert({"metadata": {"name": name, "annotations": annotations}, "spec": spec}, NodePolicy)


def policies(*given: NodePolicy) -> dict[str, NodePolicy]:
    return {one.metadata.name: one for one in given}


DENY = policy("deny", policyTypes=["Ingress"])
SSH = policy("ssh", policyTypes=["Ingress"], ingress=[{"ports": [{"port": 22}]}])


# -- manifests ------------------------------------------------------------------------------------------------------


def manifest(spec: dict[str, Any]) -> Any:
    document = {"apiVersion": KINDS["NodePolicy"][0], "kind": "NodePolicy", "metadata": {"name": "x"}, "spec": spec}
    return parse_manifest(json.dumps(document).encode(), "f.yaml")


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"nodeSelector": {"matchLabels": {"role": "db"}}, "policyTypes": ["Egress"], "confirmSeconds": 0},
        {
            "ingress": [
                {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}], "ports": [{"port": 22}]}
            ]
        },
        {"egress": [{"to": [{"nodeSelector": {}}, {"podSelector": {}, "namespaceSelector": {}}]}]},
        {"ingress": [{"ports": [{"protocol": "UDP", "port": 1000, "endPort": 2000}, {"protocol": "SCTP"}]}]},
    ],
)
def test_what_is_taken_says_the_same_again(spec: dict[str, Any]) -> None:
    found = manifest(spec)
    assert [str(error) for error in found.errors] == []
    [placed] = found.objects.values()
    again = manifest(msgspec.to_builtins(placed.obj)["spec"])
    assert [one.obj for one in again.objects.values()] == [placed.obj]


@pytest.mark.parametrize(
    ("spec", "path", "reason"),
    [
        ({"podSelector": {}}, "spec.podSelector", "there is no such field"),
        ({"policyTypes": ["ingress"]}, "spec.policyTypes[0]", "must be one of Ingress, Egress"),
        ({"confirmSeconds": 4000}, "spec.confirmSeconds", "must lie between 0 and 3600"),
        ({"ingress": [{"from": [{}]}]}, "spec.ingress[0].from[0]", "needs one of ipBlock"),
        (
            {"egress": [{"to": [{"nodeSelector": {}, "podSelector": {}}]}]},
            "spec.egress[0].to[0]",
            "needs one of ipBlock",
        ),
        ({"ingress": [{"ports": [{"port": "ssh"}]}]}, "spec.ingress[0].ports[0].port", ""),
        ({"ingress": [{"ports": [{"endPort": 22}]}]}, "spec.ingress[0].ports[0].endPort", "needs a number in port"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.1/8"}}]}]}, "spec.ingress[0].from[0].ipBlock.cidr", ""),
    ],
)
def test_what_is_wrong_is_refused(spec: dict[str, Any], path: str, reason: str) -> None:
    found = manifest(spec)
    assert not found.objects
    [error] = found.errors
    assert path in error.reason and reason in error.reason


def test_the_schema_has_the_fields_of_the_structs_and_says_what_they_mean() -> None:
    def look(schema: dict[str, Any]) -> None:
        for inner in schema.get("properties", {}).values():
            assert inner["description"]
            look(inner)
        if "items" in schema:
            look(schema["items"])

    [version] = node_policy_definition()["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert set(spec["properties"]) == {field.encode_name for field in msgspec.structs.fields(NodePolicySpec)}
    look(spec)


# -- the tables ------------------------------------------------------------------------------------------------------

CIDRS = ("0.0.0.0/0", "::/0", "10.0.0.0/8", "10.0.1.0/24", "192.0.2.0/30", "203.0.113.9/32", "fd00::/16")
labels = st.sampled_from(
    [{}, {"matchLabels": {"pod": "a"}}, {"matchExpressions": [{"key": "pod", "operator": "Exists"}]}]
)
spaces = st.sampled_from([{}, {"matchLabels": {"ns": "x"}}, {"matchLabels": {"ns": "nowhere"}}])
roles = st.sampled_from([{}, {"matchLabels": {"role": "node2"}}, {"matchLabels": {"role": "none"}}])
peers = st.one_of(
    st.fixed_dictionaries({"ipBlock": st.fixed_dictionaries({"cidr": st.sampled_from(CIDRS)})}),
    st.just({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.1.0/24"]}}),
    st.fixed_dictionaries({"nodeSelector": roles}),
    st.fixed_dictionaries({"podSelector": labels}, optional={"namespaceSelector": spaces}),
    st.fixed_dictionaries({"namespaceSelector": spaces}),
)
ports = st.one_of(
    st.fixed_dictionaries({"protocol": st.sampled_from(["TCP", "UDP", "SCTP"])}),
    st.fixed_dictionaries({"port": st.sampled_from([22, 80, 65535])}, optional={"protocol": st.sampled_from(["UDP"])}),
    st.just({"port": 80, "endPort": 90}),
)
rules = st.tuples(st.lists(peers, max_size=2), st.lists(ports, max_size=2))


@st.composite
def random_policies(draw: st.DrawFn) -> list[NodePolicy]:
    found = []
    for number in range(draw(st.integers(0, 3))):
        spec: dict[str, Any] = {"policyTypes": draw(st.sampled_from([["Ingress"], ["Egress"], ["Ingress", "Egress"]]))}
        for way, where in (("ingress", "from"), ("egress", "to")):
            spec[way] = [{where: f, "ports": p} for f, p in draw(st.lists(rules, max_size=2))]
        found.append(policy(f"p{number}", audit=draw(st.integers(0, 4)) == 0, **spec))
    return found


PEOPLE = [f"{n}/{p}" for n in NAMESPACES for p in PODS] + ["node2", "203.0.113.9", "198.51.100.1", "2001:db8::99"]
KNOWN = Peers(
    [pod(f"{n}/{p}") for n in NAMESPACES for p in PODS],
    {n: namespace(n) for n in NAMESPACES},
    [node(n, role=n) for n in ("node1", "node2")],
)
NOTHING_ESSENTIAL = Essentials(vxlan_port=8472)


def planner_of(plan: NodePlan | None) -> PolicyPlanner:
    made = PolicyPlanner()
    made.set_own_addresses([address("node1"), address("node1", 6)])
    for one in KNOWN.pods:
        made.set_pod(one.key, one)
    for name, one_namespace in KNOWN.namespaces.items():
        made.set_namespace(name, one_namespace)
    for one_node in KNOWN.nodes:
        made.set_node(one_node.metadata.name, one_node)
    made.set_node_plan(plan)
    made.plan()
    return made


def answers(tables: PolicyTables, number: int, peer: str, protocol: str, port: int) -> bool:
    """What programs make of the tables."""
    import ipaddress

    if number == OPEN:
        return True
    value = ipaddress.ip_address(peer)
    holding = [cidr for cidr in tables.ranges if value in ipaddress.ip_network(cidr)]
    longest = max(holding, key=lambda cidr: ipaddress.ip_network(cidr).prefixlen, default="")
    found = tables.classes.get(peer, tables.ranges.get(longest, 0))
    steps = tables.sets[number].get(found, tables.sets[number][ANY])
    key = step_key(protocol, port)
    return bool([step for step in steps if step.start <= key][-1].verdict & 1)


@settings(max_examples=120, deadline=None)
@given(random_policies())
def test_the_tables_say_what_the_policies_say(given: list[NodePolicy]) -> None:
    tables = planner_of(NodePlan(NOTHING_ESSENTIAL, tuple(given))).tables
    numbers = {Direction.INGRESS: tables.node.ingress, Direction.EGRESS: tables.node.egress}
    for person in PEOPLE:
        for family in (4, 6):
            peer = address(person, family)
            for direction in Direction:
                for protocol, port in (("TCP", 22), ("TCP", 80), ("TCP", 85), ("UDP", 22), ("UDP", 80), ("SCTP", 7)):
                    wanted = allows(given, direction, peer, protocol, port, KNOWN)
                    got = answers(tables, numbers[direction], peer, protocol, port)
                    assert got == wanted, (person, family, direction, protocol, port)
                    explained(given, direction, peer, protocol, port, wanted)


def explained(given: list[NodePolicy], direction: Direction, peer: str, protocol: str, port: int, wanted: bool) -> None:
    """`waggle why` says the same, and something of every rule that does not match."""
    here = address("node1", 6 if ":" in peer else 4)
    ends = (peer, here) if direction is Direction.INGRESS else (here, peer)
    own = OwnPolicies(tuple(given), NOTHING_ESSENTIAL, known=True)
    look = look_node(world(), "node1", own, direction, Traffic(*ends, protocol, port))
    if look is None:
        assert wanted and not any(direction in policy_types(one) for one in given)
        return
    assert look.allowed == wanted
    whole = [msgspec.structs.replace(one, metadata=ObjectMeta(name=one.metadata.name)) for one in given]
    assert look.audited == (wanted and not allows(whole, direction, peer, protocol, port, KNOWN))
    for one in look.policies:
        for asked in one.rules:
            assert bool(asked.why) != asked.matches
    if look.rule is not None:
        assert look.rule.key.name in {one.metadata.name for one in given if not is_audited(one)}


def test_what_is_essential_passes_whatever_policies_say() -> None:
    both = policy(policyTypes=["Ingress", "Egress"])
    essentials = Essentials(
        vxlan_port=8472,
        apiservers=frozenset({("198.51.100.1", 6443), (address("node1"), 6444)}),
        own=frozenset({address("node1")}),
        resolvers=frozenset({"203.0.113.9"}),
        open_ports=frozenset({30000}),
    )
    tables = planner_of(NodePlan(essentials, (both,))).tables
    ingress, egress = tables.node.ingress, tables.node.egress
    assert answers(tables, egress, "198.51.100.1", "TCP", 6443)
    assert not answers(tables, egress, "198.51.100.1", "TCP", 443)
    assert not answers(tables, egress, "203.0.113.9", "TCP", 6443)
    assert answers(tables, egress, "203.0.113.9", "UDP", 53) and answers(tables, egress, "203.0.113.9", "TCP", 53)
    for number in (ingress, egress):
        assert answers(tables, number, address("node2"), "UDP", 8472)
        assert not answers(tables, number, "198.51.100.1", "UDP", 8472)
    for direction, number in ((Direction.INGRESS, ingress), (Direction.EGRESS, egress)):
        for peer in ("198.51.100.1", "203.0.113.9", address("node2")):
            for protocol, port in itertools.product(("TCP", "UDP"), (22, 53, 443, 6443, 6444, 8472, 30000)):
                named = essential(essentials, Guests(), direction, peer, protocol, port, KNOWN.nodes)
                assert bool(named) == answers(tables, number, peer, protocol, port), (direction, peer, protocol, port)
    assert answers(tables, ingress, "198.51.100.1", "TCP", 30000)
    assert answers(tables, ingress, "198.51.100.1", "TCP", 6444)  # this node is an API server
    assert not answers(tables, ingress, "198.51.100.1", "TCP", 6443)
    assert not answers(tables, ingress, "198.51.100.1", "TCP", 22)


def test_who_is_logged_in_is_let_in_while_it_is_tried() -> None:
    trial = NodeTrial((DENY,), Guests(("203.0.113.9", "2001:db8::99"), (22, 2222)), 5 * SECOND)
    planner = planner_of(NodePlan(NOTHING_ESSENTIAL, (), trial))
    tables = planner.tables
    assert tables.node.ingress == OPEN and tables.node.until_ns == 5 * SECOND
    for guest in trial.guests.addresses:
        assert answers(tables, tables.node.trial_ingress, guest, "TCP", 22)
        assert answers(tables, tables.node.trial_ingress, guest, "TCP", 2222)
        assert not answers(tables, tables.node.trial_ingress, guest, "TCP", 80)
    assert not answers(tables, tables.node.trial_ingress, "198.51.100.1", "TCP", 22)

    planner.set_node_plan(NodePlan(NOTHING_ESSENTIAL, (DENY,)))
    planner.plan()
    assert not answers(tables, tables.node.ingress, "203.0.113.9", "TCP", 22)
    assert tables.node == NodeSets(tables.node.ingress)

    planner.set_node_plan(None)
    planner.plan()
    assert (tables.node, tables.sets, tables.ranges, tables.rules) == (NodeSets(), {}, {}, {})


def test_audited_alone_isolates_nothing_and_is_told() -> None:
    audited = policy(audit=True, policyTypes=["Ingress"], ingress=[{"ports": [{"port": 22}]}])
    tables = planner_of(NodePlan(NOTHING_ESSENTIAL, (audited,))).tables
    steps = tables.sets[tables.node.ingress][ANY]
    at = {
        key: [step for step in steps if step.start <= key][-1].verdict for key in (step_key("TCP", p) for p in (22, 80))
    }
    assert [at[step_key("TCP", 22)], at[step_key("TCP", 80)]] == [1, 3]


# -- what becomes of a change ---------------------------------------------------------------------------------------


def at(seconds: float, boot: str = "b") -> Clock:
    return Clock(1000 + seconds, int(seconds * SECOND), boot)


def test_a_new_policy_is_tried_and_taken_back() -> None:
    wanted = policies(DENY)
    state = follow(State(), wanted, at(0))
    assert state.confirmed == {} and state.trial is not None
    assert (state.trial.policies, state.trial.changed, state.trial.until_ns) == (wanted, ("deny",), 60 * SECOND)
    assert follow(state, wanted, at(59)) == state
    after = follow(state, wanted, at(60))
    assert (after.confirmed, after.trial, after.refused) == ({}, None, digest(wanted))
    assert follow(after, wanted, at(1000)) == after  # and not tried again
    changed = policies(policy("deny", policyTypes=["Ingress"], ingress=[{}]))
    assert follow(after, changed, at(1000)).trial is not None


def test_confirmed_it_is_in_force() -> None:
    wanted = policies(DENY)
    state = confirmed(follow(State(), wanted, at(0)))
    assert state == State(wanted)
    assert follow(state, wanted, at(100, "after a reboot")) == state


def test_a_reboot_ends_a_trial() -> None:
    state = follow(State(), policies(DENY), at(50))
    assert expired(state, at(51)).trial is not None
    assert expired(state, at(1, "another")).trial is None


def test_another_change_begins_a_trial_of_its_own_that_goes_back_to_what_is_confirmed() -> None:
    state = confirmed(follow(State(), policies(SSH), at(0)))
    state = follow(state, policies(SSH, DENY), at(10))
    other = policy("other", policyTypes=["Egress"], confirmSeconds=300)
    state = follow(state, policies(SSH, DENY, other), at(20))
    assert state.trial is not None and state.trial.until_ns == 320 * SECOND
    assert follow(state, policies(SSH, DENY, other), at(400)).confirmed == policies(SSH)


def test_a_change_that_is_taken_away_while_it_is_tried_leaves_nothing() -> None:
    state = follow(follow(State(), policies(DENY), at(0)), {}, at(1))
    assert state == State()


@pytest.mark.parametrize(
    ("before", "after", "harmless"),
    [
        ([DENY], [], True),
        ([DENY, SSH], [DENY], False),  # nobody could log in
        ([DENY, SSH], [SSH], False),
        ([], [policy("deny", audit=True, policyTypes=["Ingress"])], True),
        ([DENY], [DENY, policy("new", audit=True)], True),
        ([DENY], [policy("deny", audit=True, policyTypes=["Ingress"])], True),
        ([], [DENY], False),
    ],
)
def test_only_what_can_cut_something_is_tried(
    before: list[NodePolicy], after: list[NodePolicy], harmless: bool
) -> None:
    assert cuts_nothing(policies(*before), policies(*after)) is harmless
    state = follow(State(policies(*before)), policies(*after), at(0))
    assert (state.trial is None) is harmless


def test_without_a_time_nobody_has_to_confirm() -> None:
    wanted = policies(policy(policyTypes=["Ingress"], confirmSeconds=0))
    assert follow(State(), wanted, at(0)) == State(wanted)


def test_a_removal_that_is_not_confirmed_leaves_the_policy_in_force() -> None:
    state = follow(State(policies(DENY, SSH)), policies(DENY), at(0))
    assert state.trial is not None and state.trial.changed == ("ssh",)
    assert follow(state, policies(DENY), at(60)).confirmed == policies(DENY, SSH)


def test_a_node_has_the_policies_that_select_it_and_only_what_they_say() -> None:
    db = policy("db", nodeSelector={"matchLabels": {"role": "db"}})
    noted = msgspec.convert({"metadata": {"name": "n", "uid": "1", "annotations": {"other": "x"}}}, NodePolicy)
    assert list(of_node([db, noted], {"role": "web"})) == ["n"]
    assert of_node([noted], {})["n"].metadata.annotations is None
    assert set(of_node([db, noted], {"role": "db"})) == {"db", "n"}


def test_state_survives_being_written_down() -> None:
    state = follow(State(policies(SSH)), policies(SSH, policy(policyTypes=["Egress"], egress=[])), at(3))
    assert msgspec.json.decode(msgspec.json.encode(state), type=State) == state


class Trials(RuleBasedStateMachine):
    """Whatever happens: nothing that can cut anything stays without having been confirmed."""

    @initialize()
    def begin(self) -> None:
        self.state, self.now, self.wanted = State(), 0.0, policies()
        self.approved: list[dict[str, NodePolicy]] = [{}]

    @rule(given=random_policies())
    def change(self, given: list[NodePolicy]) -> None:
        self.wanted = policies(*given)

    @rule(seconds=st.sampled_from([1, 30, 61]))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule()
    def confirm(self) -> None:
        self.state = expired(self.state, at(self.now))
        if self.state.trial is not None:
            self.approved.append(self.state.trial.policies)
        self.state = confirmed(self.state)

    @rule()
    def revert(self) -> None:
        self.state = refused(self.state)

    @rule()
    def step(self) -> None:
        before = self.state.confirmed
        self.state = follow(self.state, self.wanted, at(self.now))
        if self.state.confirmed != before and cuts_nothing(before, self.state.confirmed):
            self.approved.append(self.state.confirmed)

    @invariant()
    def only_what_was_confirmed_is_in_force(self) -> None:
        assert self.state.confirmed in self.approved
        if self.state.trial is not None:
            assert self.state.trial.until_ns - self.state.trial.began_ns == 60 * SECOND


TestTrials = Trials.TestCase
TestTrials.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


# -- who is logged in -----------------------------------------------------------------------------------------------


def test_sessions_are_found_among_connections() -> None:
    session = parse("192.0.2.9 50000 192.0.2.1 22")
    assert session == SshSession("192.0.2.9", 50000, "192.0.2.1", 22)
    assert session.is_of(Connection("192.0.2.1", 22, "192.0.2.9", 50000, 0))
    assert not session.is_of(Connection("192.0.2.1", 22, "192.0.2.9", 50001, 0))
    assert parse("fe80::9%eth0 1 fe80::1%eth0 22") == SshSession("fe80::9", 1, "fe80::1", 22)
    assert parse("") is None and parse("a b c d") is None


def test_the_key_of_a_node_policy_has_no_namespace() -> None:
    assert DENY.key == ObjectKey("", "deny")
