"""ClusterNetworkPolicy: tiers, priorities, order, Pass, peers, failing closed; and audit. One row per statement."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.policy_worlds import OUTSIDE, address, cluster_policy, policy, world

from waggle.model.policy import Cause, Decision, PolicyWorld, name_matches
from waggle.model.policy import decide as decide_between
from waggle.model.policy_objects import ClusterNetworkPolicy, NetworkPolicy

Policies = list[NetworkPolicy | ClusterNetworkPolicy]

FROM_Y = "from: [{namespaces: {matchLabels: {ns: y}}}]"
TO_Y = "to: [{namespaces: {matchLabels: {ns: y}}}]"
PORTS = "protocols: [{tcp: {destinationPort: {number: 80}}}, {udp: {destinationPort: {number: 53}}}]"


def decide(here: PolicyWorld, flow: str) -> Decision:
    """ "y/a>x/a:80/UDP", TCP where nothing is said; without a port as of ICMP."""
    source, _, rest = flow.partition(">")
    target, _, port = rest.partition(":")
    number, _, protocol = port.partition("/")
    if not number:
        return decide_between(here, address(source), address(target), protocol or "ICMP")
    return decide_between(here, address(source), address(target), protocol or "TCP", int(number))


def ingress(*rules: str, **changes: object) -> ClusterNetworkPolicy:
    return cluster_policy("{ingress: [" + ", ".join(rules) + "]}", **changes)  # type: ignore[arg-type]


def egress(*rules: str, **changes: object) -> ClusterNetworkPolicy:
    return cluster_policy("{egress: [" + ", ".join(rules) + "]}", **changes)  # type: ignore[arg-type]


ALLOW_Y = policy("{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}}]}]}", "allow-y")
DENY_ALL = policy("{podSelector: {}, policyTypes: [Ingress, Egress]}", "deny-all")

#: What it is about; the policies; flows that pass; flows that do not.
ROWS: list[tuple[str, Policies, str, str]] = [
    (
        "Accept then Deny: order decides",
        [ingress(f"{{action: Accept, {FROM_Y}}}", f"{{action: Deny, {FROM_Y}}}")],
        "y/a>x/a:80 y/b>x/b:9/SCTP y/a>x/a",
        "",
    ),
    (
        "Deny then Accept: order decides",
        [ingress(f"{{action: Deny, {FROM_Y}}}", f"{{action: Accept, {FROM_Y}}}")],
        "z/a>x/a:80",
        "y/a>x/a:80 y/b>x/b:9/SCTP y/a>x/a",
    ),
    ("egress alike", [egress(f"{{action: Deny, {TO_Y}}}")], "x/a>z/a:80 y/a>x/a:80", "x/a>y/a:80 x/a>y/a"),
    (
        "Deny of ports leaves others",
        [ingress(f"{{action: Deny, {FROM_Y}, {PORTS}}}")],
        "y/a>x/a:81 y/a>x/a:53 y/a>x/a:80/UDP y/a>x/a",
        "y/a>x/a:80 y/a>x/a:53/UDP",
    ),
    (
        "Accept of ports, then Deny",
        [ingress(f"{{action: Accept, {FROM_Y}, {PORTS}}}", f"{{action: Deny, {FROM_Y}}}")],
        "y/a>x/a:80",
        "y/a>x/a:81 y/a>x/a y/a>x/a:80/SCTP",
    ),
    (
        "ranges of ports",
        [
            ingress(
                f"{{action: Deny, {FROM_Y}, "
                f"protocols: [{{sctp: {{destinationPort: {{range: {{start: 80, end: 90}}}}}}}}]}}"
            )
        ],
        "y/a>x/a:79/SCTP y/a>x/a:91/SCTP y/a>x/a:80",
        "y/a>x/a:80/SCTP y/a>x/a:90/SCTP",
    ),
    (
        "all ports of a protocol, fragments too",
        [ingress(f"{{action: Deny, {FROM_Y}, protocols: [{{udp: {{}}}}]}}")],
        "y/a>x/a:80 y/a>x/a",
        "y/a>x/a:1/UDP y/a>x/a:/UDP",
    ),
    (
        "a fragment matches no rule with a port",
        [ingress(f"{{action: Deny, {FROM_Y}, protocols: [{{udp: {{destinationPort: {{number: 53}}}}}}]}}")],
        "y/a>x/a:/UDP",
        "y/a>x/a:53/UDP",
    ),
    (
        "a named port, with its protocol",
        [ingress(f"{{action: Deny, {FROM_Y}, protocols: [{{destinationNamedPort: serve-81-udp}}]}}")],
        "y/a>x/a:81 y/a>x/a:80/UDP",
        "y/a>x/a:81/UDP",
    ),
    (
        "a named port of the pod asked",
        [egress(f"{{action: Deny, {TO_Y}, protocols: [{{destinationNamedPort: serve-81-tcp}}]}}")],
        "x/a>y/a:80 x/a>z/a:81",
        "x/a>y/a:81",
    ),
    (
        "pods peer: both selectors",
        [
            ingress(
                "{action: Deny, from: [{pods: {namespaceSelector: {matchLabels: {ns: y}}, "
                "podSelector: {matchLabels: {pod: b}}}}]}"
            )
        ],
        "y/a>x/a:80 z/b>x/a:80",
        "y/b>x/a:80",
    ),
    (
        "pods peer without namespaceSelector: of every namespace",
        [ingress("{action: Deny, from: [{pods: {podSelector: {matchLabels: {pod: b}}}}]}")],
        "y/a>x/a:80",
        "y/b>x/a:80 z/b>x/a:80",
    ),
    (
        "pods subject",
        [
            cluster_policy(
                "{subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {pod: a}}}}, "
                "ingress: [{action: Deny, from: [{namespaces: {}}]}]}"
            )
        ],
        "y/a>x/b:80",
        "y/b>x/a:80 y/b>z/a:80",
    ),
    (
        "namespaces peer means no hosts, no world",
        [ingress("{action: Deny, from: [{namespaces: {}}]}")],
        f"node2>x/a:80 {OUTSIDE}>x/a:80",
        "y/a>x/a:80",
    ),
    (
        "lower priority is asked first",
        [
            ingress(f"{{action: Accept, {FROM_Y}}}", name="b", priority=5),
            ingress(f"{{action: Deny, {FROM_Y}}}", name="a", priority=6),
        ],
        "y/a>x/a:80",
        "",
    ),
    (
        "priority 0 is the first",
        [
            ingress(f"{{action: Accept, {FROM_Y}}}", name="b", priority=1000),
            ingress(f"{{action: Deny, {FROM_Y}}}", name="c", priority=0),
        ],
        "",
        "y/a>x/a:80",
    ),
    (
        "equal priorities: by name",
        [ingress(f"{{action: Deny, {FROM_Y}}}", name="a"), ingress(f"{{action: Accept, {FROM_Y}}}", name="b")],
        "",
        "y/a>x/a:80",
    ),
    (
        "equal priorities: all apply",
        [
            ingress(f"{{action: Deny, {FROM_Y}, {PORTS}}}", name="a"),
            ingress("{action: Deny, from: [{namespaces: {matchLabels: {ns: z}}}]}", name="b"),
        ],
        "y/a>x/a:81",
        "y/a>x/a:80 z/a>x/a:81",
    ),
    (
        "Admin Deny comes before NetworkPolicy",
        [ingress(f"{{action: Deny, {FROM_Y}}}"), ALLOW_Y],
        "",
        "y/a>x/a:80 z/a>x/a:80",
    ),
    (
        "Admin Accept comes before NetworkPolicy",
        [ingress(f"{{action: Accept, {FROM_Y}}}"), DENY_ALL],
        "y/a>x/a:80",
        "z/a>x/a:80 x/a>y/a:80",
    ),
    (
        "Pass goes on with NetworkPolicy, which allows",
        [ingress(f"{{action: Pass, {FROM_Y}}}", f"{{action: Deny, {FROM_Y}}}"), ALLOW_Y],
        "y/a>x/a:80",
        "z/a>x/a:80",
    ),
    (
        "Pass goes on with NetworkPolicy, which denies",
        [ingress(f"{{action: Pass, {FROM_Y}}}"), DENY_ALL],
        "",
        "y/a>x/a:80",
    ),
    (
        "Pass skips what comes later in its tier",
        [
            ingress(f"{{action: Pass, {FROM_Y}}}", name="a", priority=1),
            ingress(f"{{action: Deny, {FROM_Y}}}", name="b", priority=2),
        ],
        "y/a>x/a:80",
        "",
    ),
    (
        "Pass without NetworkPolicy goes on with Baseline",
        [
            ingress(f"{{action: Pass, {FROM_Y}}}"),
            ingress(f"{{action: Deny, {FROM_Y}}}", name="default", tier="Baseline"),
        ],
        "z/a>x/a:80",
        "y/a>x/a:80",
    ),
    (
        "NetworkPolicy comes before Baseline, also where it allows",
        [ALLOW_Y, ingress(f"{{action: Deny, {FROM_Y}}}", tier="Baseline")],
        "y/a>x/a:80",
        "z/a>x/a:80",
    ),
    (
        "NetworkPolicy comes before Baseline, also where it denies",
        [DENY_ALL, ingress(f"{{action: Accept, {FROM_Y}}}", tier="Baseline")],
        "",
        "y/a>x/a:80",
    ),
    (
        "a NetworkPolicy of the other direction leaves Baseline",
        [
            policy("{podSelector: {}, policyTypes: [Egress], egress: [{}]}"),
            ingress(f"{{action: Deny, {FROM_Y}}}", tier="Baseline"),
        ],
        "x/a>y/a:80",
        "y/a>x/a:80",
    ),
    (
        "Baseline: order, Pass allows",
        [ingress(f"{{action: Pass, {FROM_Y}, {PORTS}}}", "{action: Deny, from: [{namespaces: {}}]}", tier="Baseline")],
        "y/a>x/a:80",
        "y/a>x/a:81 z/a>x/a:80",
    ),
    (
        "Baseline: priority",
        [
            ingress(f"{{action: Accept, {FROM_Y}}}", name="b", tier="Baseline", priority=1),
            ingress("{action: Deny, from: [{namespaces: {}}]}", name="a", tier="Baseline", priority=2),
        ],
        "y/a>x/a:80",
        "z/a>x/a:80",
    ),
    (
        "networks hold pods too",
        [
            egress(
                "{action: Accept, to: [{pods: {podSelector: {matchLabels: {pod: b}}}}]}",
                "{action: Deny, to: [{networks: [0.0.0.0/0, '::/0']}]}",
            )
        ],
        "x/a>y/b:80",
        f"x/a>y/a:80 x/a>{OUTSIDE}:443 x/a>{OUTSIDE} x/a>node2:22",
    ),
    (
        "nodes by label",
        [egress("{action: Deny, to: [{nodes: {matchLabels: {role: node2}}}]}")],
        f"x/a>node1:80 x/c>node1:80 x/a>{OUTSIDE}:80",
        "x/a>node2:80 x/c>node2:80",
    ),
    (
        "nodes, on some ports",
        [
            egress(
                "{action: Accept, to: [{nodes: {}}], protocols: [{tcp: {destinationPort: {number: 6443}}}]}",
                "{action: Deny, to: [{nodes: {}}]}",
            )
        ],
        "x/a>node2:6443 x/a>node1:6443",
        "x/a>node2:22 x/a>node1:22",
    ),
    (
        "the own node is denied by Admin networks alone",
        [egress("{action: Deny, to: [{networks: [192.0.2.0/24]}]}")],
        "node1>x/a:80",
        "x/a>node1:80",
    ),
    ("not by Baseline", [egress("{action: Deny, to: [{nodes: {}}]}", tier="Baseline")], "x/a>node1:80", "x/a>node2:80"),
    (
        "not after Pass",
        [egress("{action: Pass, to: [{nodes: {}}]}", "{action: Deny, to: [{nodes: {}}]}"), DENY_ALL],
        "x/a>node1:80 node1>x/a:80",
        "x/a>node2:80",
    ),
    ("itself, before everything", [ingress("{action: Deny, from: [{namespaces: {}}]}")], "x/a>x/a:80", "x/b>x/a:80"),
    (
        "subjects alone are isolated",
        [ingress("{action: Deny, from: [{namespaces: {}}]}")],
        "y/a>z/a:80 x/a>y/a:80",
        "y/a>x/a:80",
    ),
    (
        "an unknown peer: Accept matches nothing",
        [ingress("{action: Accept, from: [{namespaces: {}}, {}]}"), DENY_ALL],
        "",
        "y/a>x/a:80",
    ),
    (
        "an unknown peer: Deny denies everything",
        [ingress(f"{{action: Deny, from: [{{}}], {PORTS}}}")],
        "x/a>y/a:80",
        f"y/a>x/a:81 z/a>x/a {OUTSIDE}>x/a:1",
    ),
    (
        "an unknown peer: Pass denies everything",
        [egress("{action: Pass, to: [{}]}")],
        "y/a>x/a:80 node1>x/a:80",
        f"x/a>y/a:81 x/a>{OUTSIDE}",
    ),
    (
        "one that fails closed keeps everybody out but the own node",
        [ingress("{action: Deny, from: [{}]}")],
        "node1>x/a:80",
        "node2>x/a:80 node1>x/c:80",
    ),
    (
        "earlier rules come before one that fails closed",
        [ingress(f"{{action: Accept, {FROM_Y}}}", "{action: Deny, from: [{}]}")],
        "y/a>x/a:80",
        "z/a>x/a:80",
    ),
    (
        "nodes and networks are no peers of ingress",
        [ingress("{action: Accept, from: [{networks: [0.0.0.0/0]}]}"), DENY_ALL],
        "",
        f"{OUTSIDE}>x/a:80",
    ),
    (
        "an unknown protocol: Accept matches nothing",
        [ingress(f"{{action: Accept, {FROM_Y}, protocols: [{{}}]}}"), DENY_ALL],
        "",
        "y/a>x/a:80",
    ),
    (
        "an unknown kind of port: Deny denies everything",
        [ingress(f"{{action: Deny, {FROM_Y}, protocols: [{{tcp: {{destinationPort: {{}}}}}}]}}")],
        "",
        "y/a>x/a:80 z/a>x/a",
    ),
    ("an unknown action denies everything", [ingress(f"{{action: Log, {FROM_Y}}}")], "", "z/a>x/a:80"),
    (
        "domain names in a Deny fail closed",
        [egress("{action: Deny, to: [{domainNames: [example.com]}]}")],
        "",
        "x/a>y/a:80",
    ),
]


@pytest.mark.parametrize(("policies", "passes", "denied"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_cluster_policies(policies: Policies, passes: str, denied: str) -> None:
    here = world(policies)
    assert {flow: decide(here, flow).allowed for flow in f"{passes} {denied}".split()} == {
        **dict.fromkeys(passes.split(), True),
        **dict.fromkeys(denied.split(), False),
    }


def test_networks_are_of_one_family() -> None:
    here = world([egress("{action: Deny, to: [{networks: ['::/0']}]}")])
    assert decide(here, f"x/a>{OUTSIDE}:443").allowed
    assert not decide_between(here, address("x/a", 6), "2001:db8::9", "TCP", 443).allowed


NAMES = "{action: Accept, to: [{domainNames: ['example.com', '*.example.org.']}], protocols: [{tcp: {}}]}"


def test_domain_names() -> None:
    closed = [egress(NAMES, "{action: Deny, to: [{networks: [0.0.0.0/0, '::/0']}]}")]
    names = {
        "203.0.113.1": ["example.com."],
        "203.0.113.2": ["WWW.Example.org"],
        "203.0.113.3": ["example.org", "other.example"],
        "2001:db8::5": ["a.b.example.org"],
    }
    here = replace(world(closed), names=names)
    for target, passes in (
        ("203.0.113.1", True),
        ("203.0.113.2", True),
        ("203.0.113.3", False),
        ("203.0.113.4", False),
        ("2001:db8::5", True),
    ):
        source = address("x/a", 6 if ":" in target else 4)
        assert decide_between(here, source, target, "TCP", 443).allowed is passes, target
        assert not decide_between(here, source, target, "UDP", 443).allowed
    assert not decide(world(closed), "x/a>203.0.113.1:443").allowed  # no answer said so


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("example.com", "example.com", True),
        ("example.com.", "EXAMPLE.com", True),
        ("example.com", "www.example.com", False),
        ("*.example.com", "www.example.com.", True),
        ("*.example.com", "a.b.example.com", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("*.example.com", ".example.com", False),
    ],
)
def test_patterns_of_names(pattern: str, name: str, matches: bool) -> None:
    assert name_matches(pattern, name) is matches


def test_the_rule_is_named() -> None:
    rules = ingress(f"{{action: Deny, {FROM_Y}, name: no-y}}", name="guard")
    side = decide(world([rules]), "y/a>x/a:80").ingress
    assert str(side.rule) == "ClusterNetworkPolicy guard ingress[0] 'no-y'"
    assert (side.cause, side.isolated) == (Cause.RULE, False)
    assert decide(world([rules]), "z/a>x/a:80").ingress.cause is Cause.NOTHING


#: What it is about; policies; flow; passes; the audit verdict of the ingress side: None, or what would deny it.
AUDIT: list[tuple[str, Policies, str, bool, str | None]] = [
    ("an audited policy isolates nobody", [policy("{podSelector: {}}", audit=True)], "y/a>x/a:80", True, "isolated"),
    ("what it allows is no drop", [policy("{podSelector: {}, ingress: [{}]}", audit=True)], "y/a>x/a:80", True, None),
    (
        "it allows nothing either",
        [DENY_ALL, policy("{podSelector: {}, ingress: [{}]}", audit=True)],
        "y/a>x/a:80",
        False,
        None,
    ),
    (
        "what others allow stays allowed",
        [ALLOW_Y, policy("{podSelector: {}}", "b", audit=True)],
        "y/a>x/a:80",
        True,
        None,
    ),
    ("an audited Deny", [ingress(f"{{action: Deny, {FROM_Y}}}", audit=True)], "y/a>x/a:80", True, "rule"),
    (
        "an audited Deny comes before an enforced Accept",
        [
            ingress(f"{{action: Deny, {FROM_Y}}}", name="a", priority=1, audit=True),
            ingress(f"{{action: Accept, {FROM_Y}}}", name="b", priority=2),
        ],
        "y/a>x/a:80",
        True,
        "rule",
    ),
    (
        "an audited Accept does not save",
        [
            ingress(f"{{action: Accept, {FROM_Y}}}", name="a", priority=1, audit=True),
            ingress(f"{{action: Deny, {FROM_Y}}}", name="b", priority=2),
        ],
        "y/a>x/a:80",
        False,
        None,
    ),
    (
        "an audited Pass before an enforced Accept",
        [
            ingress(f"{{action: Pass, {FROM_Y}}}", name="a", priority=1, audit=True),
            ingress(f"{{action: Accept, {FROM_Y}}}", name="b", priority=2),
            DENY_ALL,
        ],
        "y/a>x/a:80",
        True,
        "isolated",
    ),
    (
        "an audited Baseline Deny",
        [ingress(f"{{action: Deny, {FROM_Y}}}", tier="Baseline", audit=True)],
        "y/a>x/a:80",
        True,
        "rule",
    ),
    (
        "an audited NetworkPolicy takes the place of Baseline",
        [
            ingress(f"{{action: Deny, {FROM_Y}}}", tier="Baseline"),
            policy("{podSelector: {}, ingress: [{}]}", audit=True),
        ],
        "y/a>x/a:80",
        False,
        None,
    ),
    (
        "what is denied anyway is no report",
        [DENY_ALL, ingress(f"{{action: Deny, {FROM_Y}}}", audit=True)],
        "y/a>x/a:80",
        False,
        None,
    ),
    ("the own node", [policy("{podSelector: {}}", audit=True)], "node1>x/a:80", True, None),
]


@pytest.mark.parametrize(
    ("policies", "flow", "passes", "cause"), [row[1:] for row in AUDIT], ids=[row[0] for row in AUDIT]
)
def test_audit(policies: Policies, flow: str, passes: bool, cause: str | None) -> None:
    decision = decide(world(policies), flow)
    assert decision.allowed is passes
    assert (decision.ingress.audit.cause.value if decision.ingress.audit else None) == cause
    assert decision.audited is (cause is not None)
    if cause:
        assert decision.deciding is decision.ingress


def test_an_audit_of_egress_is_no_report_where_ingress_denies() -> None:
    quiet = policy("{podSelector: {}, policyTypes: [Egress]}", "quiet", audit=True)
    wall = policy("{podSelector: {}}", "wall", "y")
    decision = decide(world([quiet, wall]), "x/a>y/a:80")
    assert (decision.allowed, decision.audited) == (False, False)
    assert decision.egress.audit is not None
    assert decision.deciding is decision.ingress
