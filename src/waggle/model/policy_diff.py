"""What a change of policies changes: which flows pass under the new objects and not under the old, and the reverse.

The answer is exact. Pods that no policy of either side can tell apart stand together, as do the addresses outside the
cluster that are in the same blocks, and the ports between two bounds; one pair of each is judged by the model. A pod
that only one side knows is judged under both, as that side has it: what changes is what policies say, not who is there.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from waggle.model.objects import Node, Pod
from waggle.model.policy import (
    Decision,
    Policy,
    PolicyWorld,
    container_ports,
    decide,
    name_matches,
    node_addresses,
    pod_addresses,
)
from waggle.model.policy_rules import Direction
from waggle.model.policy_space import (
    PORT_PROTOCOLS,
    Region,
    holding,
    intervals,
    keys,
    networks,
    port_starts,
    regions,
)
from waggle.model.service import Family, family_of

#: Stands for ICMP and every other protocol that has no ports.
OTHER = "other"
#: Where an address that is known by its name alone is put: reserved for ever (RFC 1112), so nobody's.
_NAMED = "241.0.0."


class State(StrEnum):
    """What happens to a flow. AUDIT: it passes and is reported."""

    ALLOW = "allow"
    AUDIT = "audit"
    DENY = "deny"


class EndKind(StrEnum):
    """What stands at one end of flows."""

    POD = "pod"
    NODE = "node"
    OWN_NODE = "own node"  # that of the pod at the other end
    NETWORK = "network"  # addresses that are of no pod and no node
    NAME = "name"  # addresses with such a domain name


class Ends(NamedTuple):
    """A set of what may stand at one end: names of pods and nodes, blocks, patterns of domain names."""

    kind: EndKind
    names: tuple[str, ...]


class Interval(NamedTuple):
    """Ports of a protocol whose flows change, inclusive; of OTHER there are none. What decided, before and after."""

    protocol: str
    first: int
    last: int
    before: State
    after: State
    reason_before: str
    reason_after: str


class Change(NamedTuple):
    """Every flow from one of `sources` to one of `destinations` changes so."""

    families: tuple[Family, ...]
    sources: tuple[Ends, ...]
    destinations: tuple[Ends, ...]
    intervals: tuple[Interval, ...]


def differences(old: PolicyWorld, new: PolicyWorld) -> list[Change]:
    """Everything that changes, as few sets as are found by merging equal ones."""
    return _merged(_Comparison(*_with_each_others_objects(old, new)).pairs())


def unjudged(old: PolicyWorld, new: PolicyWorld) -> list[str]:
    """Pods that cannot be compared: they have no address, or on one side another pod has it."""
    judged = {
        member.name for group in _Comparison(*_with_each_others_objects(old, new)).pods for member in group.members
    }
    return sorted({str(pod.key) for world in (old, new) for pod in world.pod_by_address.values()} - judged)


def state(decision: Decision) -> State:
    """A decision in one word."""
    if not decision.allowed:
        return State.DENY
    return State.AUDIT if decision.audited else State.ALLOW


def reason(world: PolicyWorld, decision: Decision) -> str:
    """What decided, in a few words."""
    side = decision.deciding
    said = side.audit if decision.audited and side.audit else side
    if said.rule is not None:
        return str(said.rule)
    if decision.allowed and not decision.audited and decision.ingress.rule is not None:
        return str(decision.ingress.rule)
    if said.cause == "isolated" and side.pod is not None:
        policies = world.policies_of(world.pods[side.pod], side.direction, with_audited=decision.audited)
        names = [f"NetworkPolicy {policy.key}" for policy in policies]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"no rule allows: {side.direction.lower()} isolated by {names[0]}{more}"
    words = {"nothing": "no policy decides", "no pod": "no policy decides", "own node": "the pod's own node"}
    return words.get(said.cause, said.cause)


def _with_each_others_objects(old: PolicyWorld, new: PolicyWorld) -> tuple[PolicyWorld, PolicyWorld]:
    """Both worlds with the same pods, nodes and namespaces, each as it has them where it has them."""
    return (
        replace(
            old,
            pods={**new.pods, **old.pods},
            nodes={**new.nodes, **old.nodes},
            namespaces={**new.namespaces, **old.namespaces},
        ),
        replace(
            new,
            pods={**old.pods, **new.pods},
            nodes={**old.nodes, **new.nodes},
            namespaces={**old.namespaces, **new.namespaces},
        ),
    )


@dataclass(frozen=True, slots=True)
class _Member:
    """Something with addresses: (before, after) by family. `node`: of a pod, where it runs."""

    name: str
    addresses: dict[Family, tuple[str, str]]
    node: str = ""


@dataclass(frozen=True)
class _Group:
    """What policies cannot tell apart, on either side. `changed`: the two sides may tell it from itself, so that flows
    may change where no policy does."""

    kind: EndKind
    members: tuple[_Member, ...]
    shown: Ends
    changed: bool = False

    @cached_property
    def families(self) -> frozenset[Family]:
        return frozenset(self.members[0].addresses)


class _Pair(NamedTuple):
    """One flow that stands for all between two groups."""

    source: _Member
    destination: _Member
    shown_source: Ends
    shown_destination: Ends


class _Comparison:
    """Two worlds with the same pods and nodes."""

    def __init__(self, old: PolicyWorld, new: PolicyWorld) -> None:
        every: list[Policy] = [p for world in (old, new) for p in _policies(world)]
        patterns = _name_patterns(every)
        named = {f"{_NAMED}{number}": [_example(pattern)] for number, pattern in enumerate(patterns)}
        self._old, self._new = replace(old, names=named), replace(new, names=named)
        self._keys = keys(every)
        self._blocks = networks(every)
        self._namespaces = {policy.key.namespace for policy in every}
        self._patterns = {pattern: f"{_NAMED}{number}" for number, pattern in enumerate(patterns)}

    @cached_property
    def pods(self) -> list[_Group]:
        found: dict[object, list[_Member]] = {}
        changed: dict[object, bool] = {}
        for key in sorted(self._new.pods):
            before, after = self._old.pods[key], self._new.pods[key]
            addresses = _paired(_meant(self._old, before), _meant(self._new, after))
            if not addresses:
                continue
            member = _Member(str(key), addresses, after.spec.node_name)
            looks = (
                self._pod_looks(self._old, before, [a for a, _ in addresses.values()]),
                self._pod_looks(self._new, after, [a for _, a in addresses.values()]),
            )
            found.setdefault(looks, []).append(member)
            changed[looks] = looks[0] != looks[1]
        return [
            _Group(EndKind.POD, tuple(members), Ends(EndKind.POD, tuple(m.name for m in members)), changed[looks])
            for looks, members in found.items()
        ]

    def _pod_looks(self, world: PolicyWorld, pod: Pod, addresses: list[str]) -> object:
        """All that policies can tell of a pod."""
        namespace = pod.metadata.namespace
        labels, around = pod.metadata.labels or {}, world.labels_of(namespace)
        return (
            namespace if namespace in self._namespaces else "",
            frozenset((key, labels[key]) for key in self._keys.pods & labels.keys()),
            frozenset((key, around[key]) for key in self._keys.namespaces & around.keys()),
            frozenset(port for port in container_ports(pod) if port[0] in self._keys.ports),
            tuple((family_of(address), holding(address, self._blocks)) for address in addresses),
        )

    @cached_property
    def nodes(self) -> list[_Group]:
        found: dict[object, list[_Member]] = {}
        changed: dict[object, bool] = {}
        for key in sorted(self._new.nodes):
            before, after = self._old.nodes[key], self._new.nodes[key]
            addresses = _paired(node_addresses(before), node_addresses(after))
            if not addresses:
                continue
            looks = (
                self._node_looks(before, [a for a, _ in addresses.values()]),
                self._node_looks(after, [a for _, a in addresses.values()]),
            )
            found.setdefault(looks, []).append(_Member(key.name, addresses, key.name))
            changed[looks] = looks[0] != looks[1]
        return [
            _Group(EndKind.NODE, tuple(members), Ends(EndKind.NODE, tuple(m.name for m in members)), changed[looks])
            for looks, members in found.items()
        ]

    def _node_looks(self, node: Node, addresses: list[str]) -> object:
        labels = node.metadata.labels or {}
        return (
            frozenset((key, labels[key]) for key in self._keys.nodes & labels.keys()),
            tuple((family_of(address), holding(address, self._blocks)) for address in addresses),
        )

    @cached_property
    def outside(self) -> list[_Group]:
        taken = frozenset(
            address
            for world in (self._old, self._new)
            for address in (
                *world.pod_by_address,
                *(a for node in world.nodes.values() for a in node_addresses(node)),
                *self._patterns.values(),
            )
        )
        found = []
        for family, version in ((Family.IPV4, 4), (Family.IPV6, 6)):
            for region in regions(self._blocks, version):
                address = region.address(taken)
                if address is not None:
                    shown = Ends(EndKind.NETWORK, _block_names(region))
                    found.append(_Group(EndKind.NETWORK, (_Member("", {family: (address, address)}),), shown))
        for pattern, address in self._patterns.items():
            shown = Ends(EndKind.NAME, (pattern,))
            found.append(_Group(EndKind.NAME, (_Member("", {Family.IPV4: (address, address)}),), shown))
        return found

    def pairs(self) -> Iterator[tuple[Family, Ends, Ends, tuple[Interval, ...]]]:
        """Every pair of groups between which something changes."""
        for family in Family:
            pods = [group for group in self.pods if family in group.families]
            others = [group for group in (*self.nodes, *self.outside) if family in group.families]
            ends = [*pods, *others]
            sending = {id(group) for group in ends if group.changed or self._differ(family, group, Direction.EGRESS)}
            getting = {id(group) for group in ends if group.changed or self._differ(family, group, Direction.INGRESS)}
            # where the policies of neither end differ, nothing does
            for one in ends:
                for other in ends if id(one) in sending else (group for group in ends if id(group) in getting):
                    if EndKind.POD in (one.kind, other.kind):
                        yield from self._compared(family, one, other)

    def _compared(
        self, family: Family, sources: _Group, destinations: _Group
    ) -> Iterator[tuple[Family, Ends, Ends, tuple[Interval, ...]]]:
        for pair in _representatives(sources, destinations):
            changed = self._intervals(family, pair)
            if changed:
                yield family, pair.shown_source, pair.shown_destination, changed

    def _differ(self, family: Family, group: _Group, direction: Direction) -> bool:
        """Whether other policies are asked about a group than before."""
        before, after = group.members[0].addresses[family]
        return self._asked(self._old, before, direction) != self._asked(self._new, after, direction)

    def _asked(self, world: PolicyWorld, address: str, direction: Direction) -> list[tuple[Policy, Direction]]:
        """The policies whose rules may decide at an address, in one direction."""
        pod = world.pod_by_address.get(address)
        if pod is None:
            return []
        found: list[Policy] = [*world.policies_of(pod, direction, with_audited=True)]
        for tier in ("Admin", "Baseline"):
            found += world.cluster_policies_of(pod, tier, with_audited=True)
        return [(policy, direction) for policy in found]

    def _intervals(self, family: Family, pair: _Pair) -> tuple[Interval, ...]:
        (source_before, source_after) = pair.source.addresses[family]
        (target_before, target_after) = pair.destination.addresses[family]
        starts: dict[str, set[int]] = {protocol: set() for protocol in PORT_PROTOCOLS}
        for world, source, target in (
            (self._old, source_before, target_before),
            (self._new, source_after, target_after),
        ):
            asked = self._asked(world, source, Direction.EGRESS) + self._asked(world, target, Direction.INGRESS)
            for protocol, found in port_starts(asked, world, target).items():
                starts[protocol] |= found
        changed: list[Interval] = []
        ports = [(protocol, first, last) for protocol in PORT_PROTOCOLS for first, last in intervals(starts[protocol])]
        for protocol, first, last in [*ports, (OTHER, 0, 0)]:
            number = first or None
            before = decide(self._old, source_before, target_before, protocol, number)
            after = decide(self._new, source_after, target_after, protocol, number)
            if state(before) is state(after):
                continue
            here = Interval(
                protocol, first, last, state(before), state(after), reason(self._old, before), reason(self._new, after)
            )
            previous = changed[-1] if changed else None
            if previous and previous[0] == protocol and previous.last == first - 1 and previous[3:5] == here[3:5]:
                changed[-1] = previous._replace(last=last)
            else:
                changed.append(here)
        return tuple(changed)


def _policies(world: PolicyWorld) -> list[Policy]:
    return [*world.policies.values(), *world.cluster_policies.values()]


def _meant(world: PolicyWorld, pod: Pod) -> list[str]:
    """The addresses that mean this pod, and no other that has them too."""
    return [address for address in pod_addresses(pod) if world.pod_by_address.get(address) is pod]


def _paired(before: Iterable[str], after: Iterable[str]) -> dict[Family, tuple[str, str]]:
    """The first address of each family that both sides have."""
    first: dict[Family, str] = {}
    for address in before:
        first.setdefault(family_of(address), address)
    found: dict[Family, tuple[str, str]] = {}
    for address in after:
        family = family_of(address)
        if family in first:
            found.setdefault(family, (first[family], address))
    return found


def _name_patterns(policies: Iterable[Policy]) -> list[str]:
    """Every domain name that a rule of egress speaks of."""
    found: set[str] = set()
    for policy in policies:
        if not hasattr(policy.spec, "tier"):
            continue
        for rule in policy.spec.egress or ():
            for peer in rule.to or ():
                found.update(getattr(peer, "domain_names", None) or ())
    return sorted(found)


def _example(pattern: str) -> str:
    """A name that a pattern matches."""
    name = pattern.replace("*", "any", 1)
    assert name_matches(pattern, name)
    return name


def _block_names(region: Region) -> tuple[str, ...]:
    return tuple(str(network) for network in region.networks())


def _representatives(sources: _Group, destinations: _Group) -> Iterator[_Pair]:
    """A pair of members for every way in which the two may stand to each other: a pod and its own node are not like a
    pod and other nodes, and a pod and itself are not to be asked about."""
    kinds = {sources.kind, destinations.kind}
    if kinds == {EndKind.POD, EndKind.NODE}:
        pods, nodes = (sources, destinations) if sources.kind is EndKind.POD else (destinations, sources)
        for own in (True, False):
            found = [(p, n) for p in pods.members for n in nodes.members if (p.node == n.node) is own]
            if not found:
                continue
            with_pods = Ends(EndKind.POD, tuple(sorted({pod.name for pod, _ in found})))
            with_nodes = Ends(EndKind.OWN_NODE, ()) if own else nodes.shown
            pod, node = found[0]
            if pods is sources:
                yield _Pair(pod, node, with_pods, with_nodes)
            else:
                yield _Pair(node, pod, with_nodes, with_pods)
        return
    if sources is destinations:
        if len(sources.members) > 1:
            yield _Pair(sources.members[0], sources.members[1], sources.shown, sources.shown)
        return
    yield _Pair(sources.members[0], destinations.members[0], sources.shown, destinations.shown)


# -- merging --------------------------------------------------------------------------------------------------------


def _merged(pairs: Iterable[tuple[Family, Ends, Ends, tuple[Interval, ...]]]) -> list[Change]:
    """Equal changes as one: first over families, then over destinations, then over sources."""
    by_pair: dict[tuple[Ends, Ends, object], list[tuple[Family, tuple[Interval, ...]]]] = {}
    for family, source, destination, changed in pairs:
        by_pair.setdefault((source, destination, _what(changed)), []).append((family, changed))
    by_source: dict[object, tuple[list[Ends], tuple[Interval, ...], Ends, tuple[Family, ...]]] = {}
    for (source, destination, what), found in by_pair.items():
        families = tuple(family for family, _ in found)
        entry = by_source.setdefault((source, families, what), ([], found[0][1], source, families))
        entry[0].append(destination)
    by_both: dict[object, tuple[list[Ends], Change]] = {}
    for destinations, changed, source, families in by_source.values():
        change = Change(families, (), _united(destinations), changed)
        by_both.setdefault((change.destinations, families, _what(changed)), ([], change))[0].append(source)
    return [change._replace(sources=_united(sources)) for sources, change in by_both.values()]


def _what(changed: tuple[Interval, ...]) -> object:
    """What changes, whatever decided it."""
    return tuple(interval[:5] for interval in changed)


def _united(ends: Iterable[Ends]) -> tuple[Ends, ...]:
    found: dict[EndKind, set[str]] = {}
    for end in ends:
        found.setdefault(end.kind, set()).update(end.names)
    return tuple(Ends(kind, _sorted(kind, found[kind])) for kind in EndKind if kind in found)


def _sorted(kind: EndKind, names: set[str]) -> tuple[str, ...]:
    if kind is not EndKind.NETWORK:
        return tuple(sorted(names))
    return collapsed(names)


def collapsed(names: Iterable[str]) -> tuple[str, ...]:
    """Blocks as few as hold the same addresses."""
    blocks = [ipaddress.ip_network(name) for name in names]
    four = [block for block in blocks if isinstance(block, ipaddress.IPv4Network)]
    six = [block for block in blocks if isinstance(block, ipaddress.IPv6Network)]
    return tuple(map(str, (*ipaddress.collapse_addresses(four), *ipaddress.collapse_addresses(six))))
