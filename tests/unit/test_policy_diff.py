"""The difference between two sets of policies: exact, against every pair, address and port that could matter."""

from __future__ import annotations

import ipaddress
from dataclasses import replace
from itertools import pairwise, product

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.policy_random import policy_lists
from tests.unit.policy_worlds import NAMESPACES, PODS, address, cluster_policy, pod, policy, world

from waggle.model.objects import PodIP
from waggle.model.policy import PolicyWorld, decide
from waggle.model.policy_diff import OTHER, Change, EndKind, Interval, State, differences, state, unjudged
from waggle.model.policy_space import intervals, regions
from waggle.model.service import Family

EVERY = [f"{n}/{p}" for n in NAMESPACES for p in PODS]
NODES = ["node1", "node2"]
#: One address in and one beside every block that random policies use, and none of a pod or a node.
OUTSIDE = {
    4: ["10.0.2.9", "10.0.2.200", "10.0.77.7", "192.0.2.77", "203.0.113.9", "0.0.0.1"],
    6: ["fd00::2:9", "2001:db8:1::1"],
}
PORTS = [1, 79, 80, 81, 89, 90, 91]


def brute(here: PolicyWorld) -> dict[tuple[str, str, str, int], State]:
    """The state of every flow, asked one by one."""
    found = {}
    for family in (4, 6):
        inside = [address(name, family) for name in EVERY]
        outside = [*OUTSIDE[family], *(address(name, family) for name in NODES)]
        for source, target in [*product(inside, inside), *product(inside, outside), *product(outside, inside)]:
            for protocol, port in [*product(("TCP", "UDP", "SCTP"), PORTS), (OTHER, 0)]:
                found[source, target, protocol, port] = state(decide(here, source, target, protocol, port or None))
    return found


def told(changes: list[Change]) -> dict[tuple[str, str, str, int], tuple[State, State]]:
    """Every flow of `brute` that is among the changes."""
    found: dict[tuple[str, str, str, int], tuple[State, State]] = {}
    for change in changes:
        for family in (4, 6):
            if (Family.IPV4 if family == 4 else Family.IPV6) not in change.families:
                continue
            for source in _addresses(change.sources, family):
                for target in _addresses(change.destinations, family):
                    own = {source, target} <= _both_own(family, source, target)
                    if source == target or not _meant(change, source, target, own):
                        continue
                    for interval in change.intervals:
                        ports = [0] if interval.protocol == OTHER else PORTS
                        for port in (p for p in ports if interval.first <= p <= interval.last):
                            flow = (source, target, interval.protocol, port)
                            assert flow not in found, f"{flow} is told twice"
                            found[flow] = interval.before, interval.after
    return found


def _addresses(ends: tuple, family: int) -> list[str]:
    found = []
    for end in ends:
        match end.kind:
            case EndKind.POD | EndKind.NODE:
                found += [address(name, family) for name in end.names]
            case EndKind.OWN_NODE:
                found += [address(name, family) for name in NODES]
            case EndKind.NETWORK:
                blocks = [ipaddress.ip_network(name) for name in end.names]
                found += [a for a in OUTSIDE[family] if any(ipaddress.ip_address(a) in block for block in blocks)]
    return list(dict.fromkeys(found))


def _both_own(family: int, source: str, target: str) -> set[str]:
    """The two addresses, where one is of a pod and the other of its node."""
    for name in EVERY:
        node = address("node2" if name.endswith("c") else "node1", family)
        if {address(name, family), node} == {source, target}:
            return {source, target}
    return set()


def _meant(change: Change, source: str, target: str, own: bool) -> bool:
    """Whether a pair of a pod and a node is of those that the change is about: "own node" stands for own ones alone,
    names of nodes for others."""
    nodes = {address(name, family) for name in NODES for family in (4, 6)}
    for one, ends in ((source, change.sources), (target, change.destinations)):
        if one in nodes:
            kinds = {end.kind for end in ends if end.kind is EndKind.OWN_NODE or (end.kind is EndKind.NODE)}
            return (EndKind.OWN_NODE if own else EndKind.NODE) in kinds
    return True


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(policy_lists, policy_lists, st.booleans())
def test_it_is_exact(before: list, after: list, relabel: bool) -> None:
    old, new = world(before), world([*before[:2], *after])
    if relabel:
        moved = pod("x/b", labels={"pod": "a"})
        new = replace(new, pods={**new.pods, moved.key: moved})
    flows, later = brute(old), brute(new)
    assert told(differences(old, new)) == {
        flow: (was, later[flow]) for flow, was in flows.items() if was is not later[flow]
    }


def test_nothing_changes() -> None:
    rule = policy("{podSelector: {}, ingress: [{ports: [{port: 80}]}]}")
    said_twice = policy("{podSelector: {}, ingress: [{ports: [{port: 80}, {port: 80, endPort: 80}]}]}")
    assert differences(world([rule]), world([said_twice])) == []


def test_ports_come_as_intervals_and_equal_ends_together() -> None:
    old = world([policy("{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}]}]}")])
    new = world(
        [
            policy(
                "{podSelector: {}, ingress: [{from: [{namespaceSelector: {}}], "
                "ports: [{port: 80, endPort: 89}, {port: 90}, {port: 443}]}]}"
            )
        ]
    )
    (change,) = differences(old, new)
    assert change.families == (Family.IPV4, Family.IPV6)
    assert [end.kind for end in change.sources] == [EndKind.POD]
    assert change.sources[0].names == tuple(EVERY)
    assert change.destinations[0].names == ("x/a", "x/b", "x/c")
    assert [interval[:3] for interval in change.intervals if interval.protocol == "TCP"] == [
        ("TCP", 1, 79),
        ("TCP", 91, 442),
        ("TCP", 444, 65535),
    ]
    assert change.intervals[0] == Interval(
        "TCP",
        1,
        79,
        State.ALLOW,
        State.DENY,
        "NetworkPolicy x/policy ingress[0]",
        "no rule allows: ingress isolated by NetworkPolicy x/policy",
    )
    assert change.intervals[-1].protocol == OTHER


def test_addresses_come_as_blocks() -> None:
    closed = policy("{podSelector: {}, policyTypes: [Egress]}")
    old = world([closed])
    new = world(
        [
            policy(
                "{podSelector: {}, policyTypes: [Egress], "
                "egress: [{to: [{ipBlock: {cidr: 203.0.112.0/23, except: [203.0.113.0/25]}}], ports: [{port: 443}]}]}"
            )
        ]
    )
    (change,) = differences(old, new)
    assert change.families == (Family.IPV4,)
    assert change.destinations == ((EndKind.NETWORK, ("203.0.112.0/24", "203.0.113.128/25")),)


def test_an_audited_policy_is_a_change() -> None:
    quiet = policy("{podSelector: {}}", audit=True)
    changes = differences(world(), world([quiet]))
    assert {(i.before, i.after) for change in changes for i in change.intervals} == {(State.ALLOW, State.AUDIT)}
    enforced = differences(world([quiet]), world([policy("{podSelector: {}}")]))
    assert {(i.before, i.after) for change in enforced for i in change.intervals} == {(State.AUDIT, State.DENY)}


def test_domain_names() -> None:
    closed = "{action: Deny, to: [{networks: [0.0.0.0/0]}]}"
    rule = cluster_policy(f"{{egress: [{closed}]}}")
    open_ = cluster_policy(f"{{egress: [{{action: Accept, to: [{{domainNames: ['*.example.com']}}]}}, {closed}]}}")
    (change,) = differences(world([rule]), world([open_]))
    assert change.destinations == ((EndKind.NAME, ("*.example.com",)),)


def test_pods_that_only_one_side_knows() -> None:
    wall = policy("{podSelector: {}}")
    old, new = world(), world([wall])
    some = {key: pod for key, pod in old.pods.items() if key.namespace != "y"}
    assert differences(replace(old, pods=some), new) == differences(old, new)
    assert differences(old, replace(new, pods=some)) == differences(old, new)
    assert differences(replace(old, pods=some), old) == []


def test_an_address_that_moves_to_another_pod_cannot_be_compared() -> None:
    old = world()
    assert unjudged(old, old) == []
    heir = pod("z/c", labels={})
    heir = msgspec.structs.replace(
        heir,
        metadata=msgspec.structs.replace(heir.metadata, name="heir"),
        status=msgspec.structs.replace(heir.status, pod_ips=[PodIP(address("x/a"))]),
    )
    assert unjudged(old, replace(old, pods={heir.key: heir})) == ["z/heir"]


def test_regions_cover_everything_once() -> None:
    blocks = [ipaddress.ip_network(text) for text in ("10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/1", "255.0.0.0/8", "::/0")]
    found = list(regions(blocks, 4))
    ranges = sorted(pair for region in found for pair in region.ranges)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == (1 << 32) - 1
    assert all(left[1] + 1 == right[0] for left, right in pairwise(ranges))
    for region in found:
        inside = {
            frozenset(block for block in blocks if block.version == 4 and ipaddress.IPv4Address(edge) in block)
            for pair in region.ranges
            for edge in pair
        }
        assert len(inside) == 1


def test_intervals() -> None:
    assert intervals([]) == [(1, 65535)]
    assert intervals([80, 81, 65536, 0]) == [(1, 79), (80, 80), (81, 65535)]
