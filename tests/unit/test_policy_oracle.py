"""Every line of semantics.md section 6, Netpol: policies, and every pair of nine pods on every port."""

from __future__ import annotations

from itertools import product

import msgspec
import pytest
from tests.unit.netpol_cases import EVERY, NETPOL, PROTOCOLS, A, B, Expected
from tests.unit.policy_worlds import address, namespace, pod, policy, world

from waggle.model.meta import ObjectKey
from waggle.model.policy import decide
from waggle.model.policy_objects import NetworkPolicy


@pytest.mark.parametrize(("policies", "expected"), [row[1:] for row in NETPOL], ids=[row[0] for row in NETPOL])
def test_netpol(policies: list[NetworkPolicy], expected: Expected) -> None:
    here = world(policies)
    for source, target, protocol, port, family in product(EVERY, EVERY, PROTOCOLS, (80, 81), (4, 6)):
        passes = source == target or expected(source, target, protocol, port)
        decision = decide(here, address(source, family), address(target, family), protocol, port)
        assert decision.allowed is passes, f"{source} → {target} {protocol} {port}: {decision}"


DENY_X = policy("{podSelector: {}, policyTypes: [Ingress, Egress]}", "deny")


def test_after_a_policy_is_gone_everything_passes() -> None:
    assert not decide(world([DENY_X]), address("y/a"), address("x/a"), "TCP", 80).allowed
    assert decide(world(), address("y/a"), address("x/a"), "TCP", 80).allowed


def test_updated_labels_of_pods_and_namespaces() -> None:
    guarded = policy(f"{{{A}, ingress: [{{from: [{{podSelector: {{matchLabels: {{role: client}}}}}}]}}]}}")
    by_namespace = policy(
        f"{{{A}, ingress: [{{from: [{{namespaceSelector: {{matchLabels: {{team: blue}}}}}}]}}]}}", "by-namespace"
    )
    before = world([guarded, by_namespace])
    assert not decide(before, address("x/b"), address("x/a"), "TCP", 80).allowed
    assert not decide(before, address("y/b"), address("x/a"), "TCP", 80).allowed
    client = pod("x/b", labels={"role": "client"})
    after = world(
        [guarded, by_namespace],
        pods={**before.pods, client.key: client},
        namespaces={**before.namespaces, ObjectKey("", "y"): namespace("y", team="blue")},
    )
    assert decide(after, address("x/b"), address("x/a"), "TCP", 80).allowed
    assert decide(after, address("y/b"), address("x/a"), "TCP", 80).allowed
    # the target's own label, too: what no policy selects is open
    stranger = pod("x/a", labels={})
    assert decide(world([guarded], pods={**before.pods, stranger.key: stranger}), "10.0.3.3", "10.0.1.1", "TCP").allowed


def test_namespaces_need_no_objects() -> None:
    rule = "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}"
    here = world([policy(f"{{{A}, ingress: [{{from: [{{{rule}}}]}}]}}")], namespaces={})
    assert decide(here, address("y/a"), address("x/a"), "TCP", 80).allowed
    assert not decide(here, address("z/a"), address("x/a"), "TCP", 80).allowed


def test_host_network_pods_are_neither_selected_nor_peers() -> None:
    on_host = pod("x/b")
    on_host = msgspec.structs.replace(
        on_host,
        spec=msgspec.structs.replace(on_host.spec, host_network=True),
        status=msgspec.structs.replace(on_host.status, pod_ips=[], pod_ip=address("node2")),
    )
    every_pod = policy(f"{{{A}, ingress: [{{from: [{{namespaceSelector: {{}}}}]}}]}}")
    here = world([every_pod, DENY_X])
    here = world([every_pod, DENY_X], pods={**here.pods, on_host.key: on_host})
    # x/a runs on node1; the process on node2 is no pod to it, and no policy is about what comes to it
    assert not decide(here, address("node2"), address("x/a"), "TCP", 80).allowed
    assert decide(here, address("y/a"), address("node2"), "TCP", 80).allowed


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_pods_that_ended_have_no_address(phase: str) -> None:
    ended = pod("x/b")
    ended = msgspec.structs.replace(ended, status=msgspec.structs.replace(ended.status, phase=phase))
    from_b = policy(f"{{{A}, ingress: [{{from: [{{{B}}}]}}]}}")
    here = world([from_b])
    assert decide(here, address("x/b"), address("x/a"), "TCP", 80).allowed
    assert not decide(world([from_b], pods={**here.pods, ended.key: ended}), "10.0.1.2", "10.0.1.1", "TCP", 80).allowed


def test_of_two_pods_with_one_address_the_one_that_stays_counts() -> None:
    leaving = pod("x/a", labels={"pod": "leaving"})
    leaving = msgspec.structs.replace(
        leaving, metadata=msgspec.structs.replace(leaving.metadata, name="0", deletion_timestamp="2026-01-01T00:00:00Z")
    )
    here = world([policy("{podSelector: {matchLabels: {pod: leaving}}, policyTypes: [Ingress]}")])
    here = world(here.policies.values(), pods={leaving.key: leaving, **here.pods})
    assert decide(here, address("y/a"), address("x/a"), "TCP", 80).allowed


def test_ip_blocks_hold_pods_nodes_and_everything_else() -> None:
    block = policy(f"{{{A}, ingress: [{{from: [{{ipBlock: {{cidr: 192.0.2.0/24, except: [192.0.2.128/25]}}}}]}}]}}")
    here = world([block])
    for source, passes in (
        ("192.0.2.2", True),  # another node
        ("192.0.2.77", True),
        ("192.0.2.200", False),
        ("203.0.113.9", False),
        (address("x/b"), False),
        ("2001:db8::77", False),  # the other family is not in it
    ):
        target = address("x/a", 6 if ":" in source else 4)
        assert decide(here, source, target, "TCP", 80).allowed is passes, source


def test_the_own_node_may_always() -> None:
    here = world([DENY_X])
    for node, passes in (("node1", True), ("node2", False)):  # x/a runs on node1
        for family in (4, 6):
            assert decide(here, address(node, family), address("x/a", family), "TCP", 80).allowed is passes
            assert decide(here, address("x/a", family), address(node, family), "ICMP").allowed is passes
    assert decide(here, address("node2"), address("x/c"), "TCP", 80).allowed


def test_a_pod_may_always_talk_to_itself() -> None:
    here = world([DENY_X])
    assert decide(here, address("x/a"), address("x/a"), "TCP", 80).allowed
    assert not decide(here, address("x/a"), address("x/b"), "TCP", 80).allowed


@pytest.mark.parametrize(
    ("rule", "protocol", "passes"),
    [
        ("{}", "ICMP", True),
        ("{}", "ESP", True),
        ("{ports: []}", "ICMP", True),
        ("{ports: [{protocol: TCP}]}", "ICMP", False),
        ("{ports: [{protocol: TCP}, {protocol: UDP}, {protocol: SCTP}]}", "ICMP", False),
        # a fragment whose ports are not known
        ("{}", "UDP", True),
        ("{ports: [{protocol: UDP}]}", "UDP", True),
        ("{ports: [{protocol: UDP, port: 80}]}", "UDP", False),
        ("{ports: [{protocol: UDP, port: 1, endPort: 65535}]}", "UDP", False),
        ("{ports: [{protocol: UDP, port: serve-80-udp}]}", "UDP", False),
        ("{ports: [{protocol: TCP}]}", "UDP", False),
    ],
)
def test_packets_without_ports(rule: str, protocol: str, passes: bool) -> None:
    here = world([policy(f"{{{A}, ingress: [{rule}]}}")])
    assert decide(here, address("y/a"), address("x/a"), protocol).allowed is passes


def test_ports_of_protocols_without_ports_do_not_count() -> None:
    here = world([policy(f"{{{A}, ingress: [{{ports: [{{port: 80}}]}}]}}")])
    assert not decide(here, address("y/a"), address("x/a"), "ICMP", 80).allowed


def test_named_ports_are_those_of_the_destination() -> None:
    web = msgspec.convert(
        {
            "metadata": {"name": "b", "namespace": "y", "labels": {"pod": "b"}},
            "spec": {
                "containers": [{"ports": [{"containerPort": 8080, "name": "web"}]}],
                "initContainers": [
                    {"restartPolicy": "Always", "ports": [{"containerPort": 15000, "name": "proxy"}]},
                    {"ports": [{"containerPort": 16000, "name": "setup"}]},
                ],
            },
            "status": {"podIPs": [{"ip": address("y/b")}]},
        },
        type(pod("y/b")),
    )
    allow = policy(
        f"{{{A}, policyTypes: [Egress], egress: [{{ports: [{{port: web}}, {{port: proxy}}, {{port: setup}}]}}]}}"
    )
    here = world([allow])
    here = world([allow], pods={**here.pods, web.key: web})
    assert decide(here, address("x/a"), address("y/b"), "TCP", 8080).allowed
    assert decide(here, address("x/a"), address("y/b"), "TCP", 15000).allowed
    assert not decide(here, address("x/a"), address("y/b"), "TCP", 16000).allowed  # it does not keep running
    assert not decide(here, address("x/a"), address("y/b"), "UDP", 8080).allowed
    assert not decide(here, address("x/a"), address("y/a"), "TCP", 8080).allowed  # no such name there
    assert not decide(here, address("x/a"), "203.0.113.9", "TCP", 8080).allowed  # no pod, no names


def test_only_the_pods_of_this_node_are_judged_here() -> None:
    deny_egress = policy(f"{{{A}, policyTypes: [Egress]}}")
    mine, others_ = frozenset((address("x/a"),)), frozenset((address("x/c"),))
    ask = (address("x/a"), address("y/a"), "TCP", 80)
    assert not decide(world([deny_egress], here=mine), *ask).allowed
    assert decide(world([deny_egress], here=others_), *ask).allowed


def test_the_rule_that_decided_is_named() -> None:
    two = policy(f"{{{A}, ingress: [{{from: [{{{B}}}]}}, {{ports: [{{port: 81}}]}}]}}", "two")
    decision = decide(world([two]), address("y/a"), address("x/a"), "TCP", 81)
    assert str(decision.ingress.rule) == "NetworkPolicy x/two ingress[1]"
    assert decision.ingress.isolated
    assert not decision.egress.isolated
    denied = decide(world([two]), address("y/a"), address("x/a"), "TCP", 80)
    assert denied.deciding.direction == "Ingress"
    assert denied.deciding.rule is None
    assert denied.deciding.cause == "isolated"
