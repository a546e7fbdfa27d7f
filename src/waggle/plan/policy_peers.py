"""Which class every address has: kept up as pods, namespaces, nodes and the predicates in use change.

Pods with equal namespace, labels and named ports have one profile. What is asked of a profile is remembered, so that
work follows what differs between pods and not their number: a changed pod is matched only against terms that ask for
a label it has (or for none), and a new term only against profiles that may have what it asks for.
"""

from __future__ import annotations

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from waggle.model.meta import ObjectKey
from waggle.model.objects import Pod
from waggle.model.policy_objects import LabelSelector, Namespace
from waggle.model.selectors import namespace_labels, requirements, selects
from waggle.plan.policy_compile import MOST_PORTS
from waggle.plan.policy_predicates import (
    Block,
    NodeTerm,
    PodTerm,
    PortName,
    PortTerm,
    Predicate,
    Predicates,
    class_text,
)
from waggle.plan.policy_ranges import NOWHERE, BlockRanges, Prefix, SortedAddresses
from waggle.plan.policy_tables import NOBODY, PROTOCOL_INDEX, SELF

Terms = frozenset[Predicate]
NO_TERMS: Terms = frozenset()


class PodFacts(NamedTuple):
    """What policies see of a pod. `ports`: its named ports and their numbers."""

    namespace: str
    labels: Mapping[str, str]
    addresses: frozenset[str]
    ports: frozenset[tuple[PortName, int]]
    ending: bool = False
    here: frozenset[str] = frozenset()  # addresses that an interface of this node says are this pod's


def pod_facts(pod: Pod, here: Iterable[str] = ()) -> PodFacts | None:
    """None for pods that policies cannot mean: those in the node's network, and those that have ended."""
    if pod.spec.host_network or pod.status.phase in ("Succeeded", "Failed"):
        return None
    listed = [entry.ip for entry in pod.status.pod_ips] or [pod.status.pod_ip]
    mine = frozenset(map(canonical, here))
    sidecars = (container for container in pod.spec.init_containers if container.restart_policy == "Always")
    ports = frozenset(
        (PortName(port.name, PROTOCOL_INDEX[protocol]), port.container_port)
        for container in (*pod.spec.containers, *sidecars)
        for port in container.ports
        if port.name
        and (protocol := port.protocol or "TCP") in PROTOCOL_INDEX
        and 0 < port.container_port <= MOST_PORTS
    )
    addresses = mine | {canonical(address) for address in listed if is_address(address)}
    ending = bool(pod.metadata.deletion_timestamp)
    return PodFacts(pod.metadata.namespace, pod.metadata.labels or {}, addresses, ports, ending, mine)


def canonical(address: str) -> str:
    """The one text of an address."""
    return str(ipaddress.ip_address(address))


def is_address(text: str) -> bool:
    """Whether it is an address: nodes list host names among theirs."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@dataclass(slots=True, eq=False)
class PeerClass:
    """Addresses of which the same predicates hold. `own`: they are this node's."""

    id: int
    terms: Terms
    ports: tuple[PortTerm, ...]
    own: bool
    users: int = 0  # addresses and prefixes


@dataclass(slots=True, eq=False)
class _Profile:
    namespace: str
    labels: Mapping[str, str]
    ports: frozenset[tuple[PortName, int]]
    key: Hashable
    terms: Terms = NO_TERMS
    addresses: set[_Address] = field(default_factory=set)
    pods: int = 0


@dataclass(slots=True, eq=False)
class _Address:
    text: str
    version: int
    value: int
    claims: set[ObjectKey] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    own: bool = False
    profile: _Profile | None = None
    blocks: frozenset[Block] = NOWHERE
    peer_class: PeerClass | None = None
    exact: bool = False


@dataclass(slots=True)
class _Node:
    labels: Mapping[str, str]
    addresses: frozenset[str]
    terms: Terms = NO_TERMS


@dataclass(slots=True)
class PeerChanges:
    """What one `settle` did. Classes that are `gone` have no address and no prefix any more."""

    classes: dict[str, int | None] = field(default_factory=dict)
    ranges: dict[str, int | None] = field(default_factory=dict)
    new: list[PeerClass] = field(default_factory=list)
    gone: list[PeerClass] = field(default_factory=list)


class Peers:
    """Every address that policies may mean, and its class under the terms in use.

    `take_id` and `drop_id` hand out the id of a text (`policy_ids`). Changes are recorded at once and take effect in
    `settle`.
    """

    def __init__(self, predicates: Predicates, take_id: Callable[[str], int], drop_id: Callable[[int], None]) -> None:
        self._predicates = predicates
        self._take_id, self._drop_id = take_id, drop_id
        self.nobody = PeerClass(NOBODY, NO_TERMS, (), own=False, users=1)
        self.classes: dict[tuple[bool, Terms], PeerClass] = {(False, NO_TERMS): self.nobody}
        self.by_term: defaultdict[Predicate, set[PeerClass]] = defaultdict(set)
        self.by_port: defaultdict[PortName, set[PeerClass]] = defaultdict(set)
        self.own_classes: set[PeerClass] = set()
        self.facts: dict[ObjectKey, PodFacts] = {}
        self._profiles: dict[Hashable, _Profile] = {}
        self._profile_of: dict[ObjectKey, _Profile] = {}
        self._by_label: defaultdict[tuple[str, str], set[_Profile]] = defaultdict(set)
        self._by_namespace: defaultdict[str, set[_Profile]] = defaultdict(set)
        self._with_port: defaultdict[PortName, set[_Profile]] = defaultdict(set)
        self._labels: dict[str, dict[str, str]] = {}  # of namespaces with an object
        self._nodes: dict[str, _Node] = {}
        self._addresses: dict[str, _Address] = {}
        self._own: frozenset[str] = frozenset()
        self._sorted = SortedAddresses()
        self._by_value: dict[tuple[int, int], _Address] = {}
        self._terms: Counter[Predicate] = Counter()  # in use, by how many sets
        self._own_terms: Counter[Predicate] = Counter()
        self._ports: Counter[PortName] = Counter()
        self._asking: defaultdict[Hashable, set[PodTerm]] = defaultdict(set)
        self._ranges = BlockRanges()
        self._range_classes: dict[Prefix, PeerClass] = {}
        self._dirty: set[_Address] = set()
        self._dirty_ranges: set[Prefix] = set()
        self._touched: set[PeerClass] = set()
        self._new: set[PeerClass] = set()

    # -- what there is

    def set_pod(self, key: ObjectKey, facts: PodFacts | None) -> None:
        """A pod as it is now; None for one that is gone, or that policies cannot mean."""
        old = self.facts.get(key)
        if old == facts:
            return
        old_profile = self._profile_of.pop(key, None)
        if facts is None:
            del self.facts[key]
        else:
            self.facts[key] = facts
            profile = self._profile_of[key] = self._profile(facts)
            profile.pods += 1
        before, after = (old.addresses if old else frozenset()), (facts.addresses if facts else frozenset())
        for text in before - after:
            self._addresses[text].claims.discard(key)
        for text in after:
            self._address(text).claims.add(key)
        for text in before | after:
            self._own_up(self._addresses[text])
        if old_profile is not None:
            old_profile.pods -= 1
            if not old_profile.pods:
                self._forget(old_profile)

    def set_namespace(self, name: str, namespace: Namespace | None) -> None:
        """The object of a namespace; None where there is none."""
        labels = namespace_labels(name, namespace)
        if labels == self.labels_of(name):
            return
        self._labels[name] = labels
        if namespace is None:
            del self._labels[name]
        for profile in self._by_namespace.get(name, ()):
            self._set_terms(profile, self._terms_of(profile))

    def set_node(self, name: str, labels: Mapping[str, str], addresses: Iterable[str]) -> None:
        """A node as its object says; without addresses, it is gone."""
        old = self._nodes.pop(name, None)
        node = _Node(labels, frozenset(map(canonical, addresses)))
        node.terms = frozenset(t for t in self._terms if isinstance(t, NodeTerm) and t.holds(labels))
        for text in old.addresses - node.addresses if old else ():
            address = self._addresses[text]
            address.nodes.discard(name)
            self._dirty.add(address)
        if node.addresses:
            self._nodes[name] = node
        for text in node.addresses:
            address = self._address(text)
            address.nodes.add(name)
            self._dirty.add(address)

    def set_own(self, addresses: Iterable[str]) -> None:
        """The addresses of this node itself."""
        own = frozenset(map(canonical, addresses))
        for text in own ^ self._own:
            address = self._address(text)
            address.own = text in own
            self._dirty.add(address)
        self._own = own

    def labels_of(self, namespace: str) -> Mapping[str, str]:
        """The labels of a namespace, with or without an object of it."""
        return self._labels.get(namespace) or namespace_labels(namespace, None)

    def owner(self, address: str) -> ObjectKey | None:
        """The pod that an address means: the one with an interface here, then one that does not end."""
        found = self._addresses.get(address)
        return self._owner(found) if found else None

    # -- what is asked

    def use(self, terms: Iterable[Predicate], own_terms: Iterable[Predicate], ports: Iterable[PortName]) -> None:
        """A set came into use that asks for these."""
        for term in terms:
            self._terms[term] += 1
            if self._terms[term] == 1:
                self._begin(term)
        for port in ports:
            self._ports[port] += 1
            if self._ports[port] == 1:
                self._begin_port(port)
        self._count_own(own_terms, 1)

    def leave(self, terms: Iterable[Predicate], own_terms: Iterable[Predicate], ports: Iterable[PortName]) -> None:
        """A set is in use no more that asked for these."""
        for term in terms:
            self._terms[term] -= 1
            if not self._terms[term]:
                del self._terms[term]
                self._end(term)
        for port in ports:
            self._ports[port] -= 1
            if not self._ports[port]:
                del self._ports[port]
                self._end_port(port)
        self._count_own(own_terms, -1)

    def _count_own(self, terms: Iterable[Predicate], by: int) -> None:
        for term in terms:
            before = self._own_terms[term]
            self._own_terms[term] += by
            if not self._own_terms[term]:
                del self._own_terms[term]
            if not before or before + by == 0:
                self._dirty.update(self._addresses[text] for text in self._own)

    def _begin(self, term: Predicate) -> None:
        if isinstance(term, PodTerm):
            for bucket in _buckets(term):
                self._asking[bucket].add(term)
            for profile in self._candidates(term):
                if term.holds(profile.namespace, self.labels_of(profile.namespace), profile.labels):
                    self._set_terms(profile, profile.terms | {term})
        elif isinstance(term, NodeTerm):
            for node in self._nodes.values():
                if term.holds(node.labels):
                    node.terms |= {term}
                    self._dirty.update(self._addresses[text] for text in node.addresses)
        elif isinstance(term, Block):
            self._ranges_changed(self._ranges.add(term))

    def _end(self, term: Predicate) -> None:
        if isinstance(term, PodTerm):
            for bucket in _buckets(term):
                _discard(self._asking, bucket, term)
            for profile in self._candidates(term):
                if term in profile.terms:
                    self._set_terms(profile, profile.terms - {term})
        elif isinstance(term, NodeTerm):
            for node in self._nodes.values():
                if term in node.terms:
                    node.terms -= {term}
                    self._dirty.update(self._addresses[text] for text in node.addresses)
        elif isinstance(term, Block):
            self._ranges_changed(self._ranges.remove(term))

    def _begin_port(self, name: PortName) -> None:
        for profile in self._with_port.get(name, ()):
            numbers = {self._predicates.port(name, number) for port, number in profile.ports if port == name}
            self._set_terms(profile, profile.terms | numbers)

    def _end_port(self, name: PortName) -> None:
        for profile in self._with_port.get(name, ()):
            kept = (term for term in profile.terms if not (isinstance(term, PortTerm) and term.port == name))
            self._set_terms(profile, frozenset(kept))

    def _ranges_changed(self, prefixes: set[Prefix]) -> None:
        self._dirty_ranges |= prefixes

    # -- profiles

    def _profile(self, facts: PodFacts) -> _Profile:
        key = (facts.namespace, frozenset(facts.labels.items()), facts.ports)
        found = self._profiles.get(key)
        if found is not None:
            return found
        profile = self._profiles[key] = _Profile(facts.namespace, facts.labels, facts.ports, key)
        profile.terms = self._terms_of(profile)
        for label in profile.labels.items():
            self._by_label[label].add(profile)
        for port, _ in profile.ports:
            self._with_port[port].add(profile)
        self._by_namespace[profile.namespace].add(profile)
        return profile

    def _forget(self, profile: _Profile) -> None:
        del self._profiles[profile.key]
        for label in profile.labels.items():
            _discard(self._by_label, label, profile)
        for port, _ in profile.ports:
            _discard(self._with_port, port, profile)
        _discard(self._by_namespace, profile.namespace, profile)

    def _terms_of(self, profile: _Profile) -> Terms:
        where = self.labels_of(profile.namespace)
        keys: list[Hashable] = [None, profile.namespace, *profile.labels.items()]
        keys += [("namespace", *label) for label in where.items()]
        held: set[Predicate] = {
            term
            for key in keys
            for term in self._asking.get(key, ())
            if term.holds(profile.namespace, where, profile.labels)
        }
        held |= {self._predicates.port(port, number) for port, number in profile.ports if self._ports[port]}
        return frozenset(held)

    def _set_terms(self, profile: _Profile, terms: Terms) -> None:
        if terms != profile.terms:
            profile.terms = terms
            self._dirty |= profile.addresses

    def _candidates(self, term: PodTerm) -> Iterable[_Profile]:
        """Profiles among which are all that a term means."""
        one = _one_of(term.pods)
        if one is not None:
            return {profile for label in one for profile in self._by_label.get(label, ())}
        if term.namespace is not None:
            return self._by_namespace.get(term.namespace, ())
        return [
            profile
            for namespace, profiles in self._by_namespace.items()
            if selects(term.namespaces, self.labels_of(namespace))
            for profile in profiles
        ]

    # -- addresses

    def _address(self, text: str) -> _Address:
        found = self._addresses.get(text)
        if found is None:
            parsed = ipaddress.ip_address(text)
            found = self._addresses[text] = _Address(text, parsed.version, int(parsed))
            found.blocks = self._ranges.at(found.version, found.value)
            self._sorted.add(found.version, found.value)
            self._by_value[found.version, found.value] = found
        return found

    def _owner(self, address: _Address) -> ObjectKey | None:
        def order(key: ObjectKey) -> tuple[bool, bool, ObjectKey]:
            facts = self.facts[key]
            return address.text not in facts.here, facts.ending, key

        return min(address.claims, key=order, default=None)

    def _own_up(self, address: _Address) -> None:
        """The address belongs to the profile of the pod that it means now."""
        owner = self._owner(address)
        profile = self._profile_of[owner] if owner else None
        if profile is not address.profile:
            if address.profile:
                address.profile.addresses.discard(address)
            if profile:
                profile.addresses.add(address)
            address.profile = profile
        self._dirty.add(address)

    # -- classes

    def settle(self) -> PeerChanges:
        """Gives every address and prefix the class it now has; says what changed since the last time."""
        changes = PeerChanges()
        moved: set[_Address] = set()
        for version, value in self._sorted.inside(self._dirty_ranges):
            address = self._by_value[version, value]
            address.blocks = self._ranges.at(version, value)
            moved.add(address)
        for prefix in self._dirty_ranges:
            self._settle_range(prefix, changes)
        self._dirty_ranges = set()
        for address in self._dirty | moved:
            self._settle_address(address, changes)
        self._dirty = set()
        for found in self._touched:
            if not found.users:
                self._drop(found)
                if found not in self._new:
                    changes.gone.append(found)
                self._new.discard(found)
        changes.new = list(self._new)
        self._touched, self._new = set(), set()
        return changes

    def _settle_range(self, prefix: Prefix, changes: PeerChanges) -> None:
        old = self._range_classes.pop(prefix, None)
        blocks = self._ranges.entries.get(prefix)
        new = None if blocks is None else self._class(blocks, own=False)
        self._swap(old, new)
        if new is not None:
            self._range_classes[prefix] = new
        if new is not old:
            changes.ranges[prefix.cidr] = None if new is None else new.id

    def _settle_address(self, address: _Address, changes: PeerChanges) -> None:
        old = address.peer_class
        new = self._class_of(address)
        by_range = self.classes.get((False, address.blocks), self.nobody)
        exact = new is not None and new is not by_range
        self._swap(old, new)
        address.peer_class = new
        if exact and not (address.exact and new is old):
            assert new is not None
            changes.classes[address.text] = new.id
        elif address.exact and not exact:
            changes.classes[address.text] = None
        address.exact = exact
        if new is None:
            del self._addresses[address.text]
            del self._by_value[address.version, address.value]
            self._sorted.remove(address.version, address.value)

    def _class_of(self, address: _Address) -> PeerClass | None:
        """None for an address that nothing claims any more."""
        if not (address.own or address.profile or address.nodes):
            return None
        nodes = frozenset().union(*(self._nodes[name].terms for name in address.nodes)) if address.nodes else NO_TERMS
        if address.own:
            return self._class((nodes | address.blocks) & self._own_terms.keys(), own=True)
        terms: Terms = address.blocks
        if address.profile and address.profile.terms:
            terms |= address.profile.terms
        return self._class(terms | nodes if nodes else terms, own=False)

    def _class(self, terms: Iterable[Predicate], *, own: bool) -> PeerClass:
        held = frozenset(terms)
        found = self.classes.get((own, held))
        if found is None:
            text = class_text(held)
            class_id = SELF if own and not held else self._take_id(f"own\n{text}" if own else text)
            ports = tuple(term for term in held if isinstance(term, PortTerm))
            found = self.classes[own, held] = PeerClass(class_id, held, ports, own)
            self._new.add(found)
            self._touched.add(found)
            if own:
                self.own_classes.add(found)
            else:
                for term in held:
                    self.by_term[term].add(found)
                for port in ports:
                    self.by_port[port.port].add(found)
        return found

    def _swap(self, old: PeerClass | None, new: PeerClass | None) -> None:
        if old is not new:
            if old is not None:
                old.users -= 1
                self._touched.add(old)
            if new is not None:
                new.users += 1

    def _drop(self, found: PeerClass) -> None:
        del self.classes[found.own, found.terms]
        if found.id != SELF:
            self._drop_id(found.id)
        if found.own:
            self.own_classes.discard(found)
            return
        for term in found.terms:
            _discard(self.by_term, term, found)
        for port in found.ports:
            _discard(self.by_port, port.port, found)


Key = TypeVar("Key")
Value = TypeVar("Value")


def _discard(index: dict[Key, set[Value]], key: Key, value: Value) -> None:
    index[key].discard(value)
    if not index[key]:
        del index[key]


def _buckets(term: PodTerm) -> list[Hashable]:
    """Where a profile that a term may mean looks for it: under a label, its namespace, a label of that, or None."""
    one = _one_of(term.pods)
    if one is not None:
        return [*one]
    if term.namespace is not None:
        return [term.namespace]
    one = _one_of(term.namespaces)
    return [None] if one is None else [("namespace", *label) for label in one]


def _one_of(selector: LabelSelector) -> set[tuple[str, str]] | None:
    """Labels of which one must be there; None where a selector demands no label by its value."""
    for requirement in requirements(selector):
        if requirement.operator == "In":
            return {(requirement.key, value) for value in requirement.values}
    return None
