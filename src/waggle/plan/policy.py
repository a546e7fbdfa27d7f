"""Policy as tables, for the pods of one node, kept up as objects change.

Records of changes come in by `set_…` and `attach`; `plan` works out what to write, in one or two steps:

1. Sets that come into use, and with them finer classes. What was in use still is, so that its sets have entries for
   the finer classes too. Then addresses move to their classes, and pods to their sets.
2. Where sets went out of use: addresses move to coarser classes, for which the sets that are left get entries first.

Only policies that select a pod of this node are compiled, and only what their rules ask makes classes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from waggle.model.meta import ObjectKey
from waggle.model.node_policy import Guests
from waggle.model.objects import Node, Pod
from waggle.model.policy_objects import ClusterNetworkPolicy, Namespace, NetworkPolicy, NodePolicy
from waggle.model.policy_rules import Direction
from waggle.plan.policy_compile import Compiled, Policy, compile_policy, pods_of
from waggle.plan.policy_ids import PolicyIds
from waggle.plan.policy_node import NodePlan, compile_node
from waggle.plan.policy_peers import PeerChanges, PeerClass, Peers, canonical, is_address, pod_facts
from waggle.plan.policy_predicates import PodTerm, PortName, Predicate, Predicates, hash64
from waggle.plan.policy_sets import KnownAnswers, PolicySet, asked_of, port_names, set_text
from waggle.plan.policy_tables import (
    ANY,
    NAMED,
    OPEN,
    STRICT,
    NodeSets,
    PolicyDelta,
    PolicyTables,
    Steps,
    in_writing_order,
)

#: Answers that are remembered for sets to come, besides two for each entry there is.
MOST_KNOWN = 10_000

MOST_NAMES = (1 << 32) - 1  # ids of patterns have 32 bits

DIRECTIONS = (Direction.INGRESS, Direction.EGRESS)


@dataclass(slots=True, eq=False)
class _Policy:
    """A policy as it is now. It is compiled when it first selects a pod here."""

    policy: Policy
    subject: PodTerm | None
    order: tuple[int, ObjectKey]  # within a tier
    compiled: dict[Direction, Compiled | None] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Used:
    """A set that pods have."""

    id: int
    set: PolicySet
    users: int = 0


class _Local(NamedTuple):
    """The sets of a pod of this node; None where nothing is asked."""

    ingress: _Used | None
    egress: _Used | None

    @property
    def ids(self) -> tuple[int, int]:
        return (self.ingress.id if self.ingress else OPEN), (self.egress.id if self.egress else OPEN)


class PolicyPlanner:
    """`tables` are those after the last `plan`. `hashed` is for tests of ids that collide."""

    def __init__(self, hashed: Callable[[str], int] = hash64) -> None:
        self.tables = PolicyTables()
        self._predicates = Predicates()
        self._class_ids = PolicyIds(hashed)
        self._set_ids = PolicyIds(hashed)
        self._name_ids = PolicyIds(lambda text: hashed(text) & MOST_NAMES)
        self._peers = Peers(self._predicates, self._class_ids.take, self._class_ids.drop)
        self._pods: dict[ObjectKey, Pod] = {}
        self._here: dict[str, ObjectKey] = {}  # addresses of interfaces of this node
        self._here_of: defaultdict[ObjectKey, set[str]] = defaultdict(set)
        self._cluster: dict[ObjectKey, _Policy] = {}
        self._network: defaultdict[str, dict[ObjectKey, _Policy]] = defaultdict(dict)
        self._selected: dict[ObjectKey, frozenset[_Policy]] = {}  # of pods of this node
        self._local: dict[ObjectKey, _Local] = {}
        self._node_plan: NodePlan | None = None
        self._node: tuple[_Local, _Local] = (_Local(None, None), _Local(None, None))  # confirmed, on trial
        self._node_stale = False
        self._sets: dict[str, _Used] = {}
        self._by_term: defaultdict[Predicate, set[_Used]] = defaultdict(set)
        self._by_port: defaultdict[PortName, set[_Used]] = defaultdict(set)
        self._with_base: set[_Used] = set()
        self._known: KnownAnswers = {}
        self._names: dict[str, int] = {}  # pattern → id
        self._name_users: Counter[str] = Counter()
        self._rule_users: Counter[int] = Counter()
        self._stale: set[ObjectKey] = set()  # pods of this node whose sets may be others now
        self._stale_addresses: set[str] = set()

    # -- what there is

    def attach(self, address: str, pod: ObjectKey) -> None:
        """An interface of this node has an address, and is the pod's. Until the pod is known, `tables.pods` lacks
        it."""
        address = canonical(address)
        if self._here.get(address) == pod:
            return
        self.detach(address)
        self._here[address] = pod
        self._here_of[pod].add(address)
        self._pod_changed(pod)

    def detach(self, address: str) -> None:
        """No interface of this node has that address."""
        address = canonical(address)
        pod = self._here.pop(address, None)
        if pod is None:
            return
        self._stale_addresses.add(address)
        self._here_of[pod].discard(address)
        if not self._here_of[pod]:
            del self._here_of[pod]
        self._pod_changed(pod)

    def set_pod(self, key: ObjectKey, pod: Pod | None) -> None:
        """A pod of any node as it is now; None where it is gone."""
        if pod is None:
            self._pods.pop(key, None)
        else:
            self._pods[key] = pod
        self._pod_changed(key)

    def set_namespace(self, name: str, namespace: Namespace | None) -> None:
        """The object of a namespace; None where there is none (any more)."""
        self._peers.set_namespace(name, namespace)
        for key in self._here_of:
            if key.namespace == name:
                self._select(key)

    def set_node(self, name: str, node: Node | None) -> None:
        """A node, this one too; None where it is gone."""
        addresses = [entry.address for entry in node.status.addresses if is_address(entry.address)] if node else []
        self._peers.set_node(name, (node.metadata.labels or {}) if node else {}, addresses)

    def set_own_addresses(self, addresses: Iterable[str]) -> None:
        """Every address of this node itself."""
        self._peers.set_own(addresses)

    def set_policy(self, key: ObjectKey, policy: NetworkPolicy | None) -> None:
        """A NetworkPolicy as it is now; None where it is gone."""
        self._set_policy(self._network[key.namespace], key, policy)

    def set_cluster_policy(self, key: ObjectKey, policy: ClusterNetworkPolicy | None) -> None:
        """A ClusterNetworkPolicy as it is now; None where it is gone."""
        self._set_policy(self._cluster, key, policy)

    def set_node_plan(self, plan: NodePlan | None) -> None:
        """What is to be in force for the node's own traffic; None for nothing."""
        if plan != self._node_plan:
            self._node_plan = plan
            self._node_stale = True

    def _set_policy(self, among: dict[ObjectKey, _Policy], key: ObjectKey, policy: Policy | None) -> None:
        old = among.pop(key, None)
        new = None
        if policy is not None:
            priority = policy.spec.priority if isinstance(policy, ClusterNetworkPolicy) else 0
            new = among[key] = _Policy(policy, pods_of(policy, self._predicates), (priority, key))
        made: dict[tuple[frozenset[_Policy], bool], frozenset[_Policy]] = {}  # pods with equal policies share these
        for pod, selected in self._selected.items():
            comes = new is not None and self._selects(new, pod)
            if not comes and old not in selected:
                continue
            others = made.get((selected, comes))
            if others is None:
                others = made[selected, comes] = (selected - {old}) | ({new} if new and comes else frozenset())
            self._selected[pod] = others
            self._stale.add(pod)

    def _pod_changed(self, key: ObjectKey) -> None:
        pod, here = self._pods.get(key), self._here_of.get(key, ())
        self._peers.set_pod(key, pod_facts(pod, here) if pod else None)
        if here or key in self._selected:
            self._stale_addresses.update(here)
            self._select(key)

    def _select(self, key: ObjectKey) -> None:
        """Finds the policies that select a pod of this node."""
        self._stale.add(key)
        if key not in self._here_of or key not in self._peers.facts:
            self._selected.pop(key, None)
            return
        every = (*self._network.get(key.namespace, {}).values(), *self._cluster.values())
        self._selected[key] = frozenset(policy for policy in every if self._selects(policy, key))

    def _selects(self, policy: _Policy, key: ObjectKey) -> bool:
        facts = self._peers.facts[key]
        where = self._peers.labels_of(facts.namespace)
        return policy.subject is not None and policy.subject.holds(facts.namespace, where, facts.labels)

    # -- what to write

    def plan(self) -> list[PolicyDelta]:
        """What changed since the last time, as one or two deltas to be written one after the other; none for
        nothing."""
        first = PolicyDelta()
        unused = [*self._move_pods(first), *self._move_node(first)]
        self._settle(first, new_sets=[used for used in self._sets.values() if used.id not in self.tables.sets])
        deltas = [first]
        self.tables.apply(first)
        if unused:
            second = PolicyDelta()
            for used in unused:
                self._retire(used, second)
            self._settle(second, new_sets=[])
            deltas.append(second)
            self.tables.apply(second)
        if sum(map(len, self._known.values())) > MOST_KNOWN + 2 * sum(map(len, self.tables.sets.values())):
            self._known.clear()  # what is asked again is worked out again
        return [delta for delta in deltas if delta]

    def _move_pods(self, delta: PolicyDelta) -> list[_Used]:
        """Gives pods their sets; returns the sets that no pod has any more."""
        made: dict[object, _Used | None] = {}
        left: set[_Used] = set()
        for key in self._stale:
            old = self._local.pop(key, _Local(None, None))
            new = _Local(None, None)
            if key in self._selected:
                ingress, egress = (self._set_of(key, direction, made) for direction in DIRECTIONS)
                new = self._local[key] = _Local(ingress, egress)
            for used in new:
                if used is not None:
                    used.users += 1
            for used in old:
                if used is not None:
                    used.users -= 1
                    left.add(used)
            self._stale_addresses.update(self._here_of.get(key, ()))
        for address in self._stale_addresses:
            ids = self._ids_of(address)
            if ids != self.tables.pods.get(address):
                delta.pods[address] = ids
        self._stale, self._stale_addresses = set(), set()
        return [used for used in left if not used.users]

    def _move_node(self, delta: PolicyDelta) -> list[_Used]:
        """Gives the node its sets; returns those that nobody has any more."""
        if not self._node_stale:
            return []
        self._node_stale = False
        old, plan = self._node, self._node_plan
        trial = plan.trial if plan else None
        confirmed = self._sets_of_node(plan, plan.confirmed if plan else (), Guests())
        tried = self._sets_of_node(plan, trial.policies, trial.guests) if trial else _Local(None, None)
        self._node = (confirmed, tried)
        delta.node = NodeSets(*confirmed.ids, *tried.ids, trial.until_ns if trial else 0)
        for used in (*confirmed, *tried):
            if used is not None:
                used.users += 1
        left = [used for local in old for used in local if used is not None]
        for used in left:
            used.users -= 1
        return [used for used in set(left) if not used.users]

    def _sets_of_node(self, plan: NodePlan | None, policies: Iterable[NodePolicy], guests: Guests) -> _Local:
        def one(direction: Direction) -> _Used | None:
            if plan is None:
                return None
            compiled = compile_node(tuple(policies), plan.essentials, guests, direction, self._predicates)
            return self._used(direction, compiled, frozenset()) if compiled else None

        return _Local(one(Direction.INGRESS), one(Direction.EGRESS))

    def _ids_of(self, address: str) -> tuple[int, int] | None:
        """The sets of an address; None where it is none of this node, or nobody knows what it is."""
        key = self._here.get(address)
        if key is None or key not in self._pods:
            return None
        local = self._local.get(key)
        return local.ids if local else (OPEN, OPEN)

    def _set_of(self, key: ObjectKey, direction: Direction, made: dict[object, _Used | None]) -> _Used | None:
        """The set of a pod; `made`: what this `plan` has found already."""
        selected = self._selected[key]
        ports = self._peers.facts[key].ports if direction is Direction.INGRESS else frozenset()
        memo = (direction, selected, ports)
        if memo in made:
            return made[memo]
        compiled = (self._compiled(policy, direction) for policy in sorted(selected, key=lambda p: p.order))
        policies = asked_of(one for one in compiled if one is not None)
        found = made[memo] = self._used(direction, policies, ports) if policies else None
        return found

    def _compiled(self, policy: _Policy, direction: Direction) -> Compiled | None:
        if direction not in policy.compiled:
            policy.compiled[direction] = compile_policy(policy.policy, direction, self._predicates)
        return policy.compiled[direction]

    def _used(
        self, direction: Direction, policies: tuple[Compiled, ...], ports: frozenset[tuple[PortName, int]]
    ) -> _Used:
        resolved: dict[PortName, list[int]] = {}
        asked = port_names(policies) if ports else frozenset()
        for port, number in ports:
            if port in asked:
                resolved.setdefault(port, []).append(number)
        text = set_text(direction, policies, resolved)
        found = self._sets.get(text)
        if found is None:
            policy_set = PolicySet(direction, policies, resolved, self._known)
            found = self._sets[text] = _Used(self._set_ids.take(text, odd=bool(policy_set.names)), policy_set)
            self._begin(found)
        return found

    def _begin(self, used: _Used) -> None:
        policy_set = used.set
        self._peers.use(policy_set.terms, policy_set.own_terms, policy_set.ports)
        for term in policy_set.terms:
            self._by_term[term].add(used)
        for port in policy_set.ports:
            self._by_port[port].add(used)
        if policy_set.base:
            self._with_base.add(used)

    def _retire(self, used: _Used, delta: PolicyDelta) -> None:
        policy_set = used.set
        self._peers.leave(policy_set.terms, policy_set.own_terms, policy_set.ports)
        for term in policy_set.terms:
            self._by_term[term].discard(used)
            if not self._by_term[term]:
                del self._by_term[term]
        for port in policy_set.ports:
            self._by_port[port].discard(used)
        self._with_base.discard(used)
        del self._sets[policy_set.text]
        self._set_ids.drop(used.id)
        delta.entries_gone += [(used.id, class_id) for class_id in self.tables.sets[used.id]]
        delta.sets_gone.append(used.id)
        for rule in policy_set.rules:
            self._rule_users[rule.id] -= 1
            if not self._rule_users[rule.id]:
                del self._rule_users[rule.id]
                delta.rules_gone.append(rule.id)
        for name in policy_set.names:
            self._name_users[name.pattern] -= 1
            if not self._name_users[name.pattern]:
                del self._name_users[name.pattern]
                self._name_ids.drop(self._names.pop(name.pattern))
                delta.patterns_gone.append(name.pattern)

    # -- entries

    def _settle(self, delta: PolicyDelta, new_sets: list[_Used]) -> None:
        """Moves addresses to their classes, with entries for new classes in all sets and for new sets in all
        classes."""
        changes = self._peers.settle()
        for used in new_sets:
            self._describe(used, delta)
            for peer_class in self._classes_for(used):
                self._enter(used, peer_class, delta)
        fresh = set(new_sets)
        for peer_class in changes.new:
            for used in self._sets_for(peer_class):
                if used not in fresh:
                    self._enter(used, peer_class, delta)
        for peer_class in changes.gone:
            for used in self._sets_for(peer_class):
                if peer_class.id in self.tables.sets.get(used.id, ()):
                    delta.entries_gone.append((used.id, peer_class.id))
        self._move(changes, delta)

    @staticmethod
    def _move(changes: PeerChanges, delta: PolicyDelta) -> None:
        delta.classes = {address: found for address, found in changes.classes.items() if found is not None}
        delta.classes_gone = [address for address, found in changes.classes.items() if found is None]
        delta.ranges = in_writing_order(changes.ranges)

    def _describe(self, used: _Used, delta: PolicyDelta) -> None:
        """What a new set has whatever classes there are."""
        policy_set = used.set
        delta.set_names[used.id] = policy_set.ref
        self._write(used, ANY, policy_set.default, delta)
        for rule in policy_set.rules:
            self._rule_users[rule.id] += 1
            if self._rule_users[rule.id] == 1:
                delta.rules[rule.id] = rule.ref
        for name in policy_set.names:
            self._name_users[name.pattern] += 1
            if name.pattern not in self._names:
                delta.patterns[name.pattern] = self._names[name.pattern] = self._name_ids.take(name.text)
            class_id = NAMED | self._names[name.pattern]
            self._write(used, class_id, policy_set.name_answer(name), delta)
            if policy_set.has_audited:
                self._write(used, STRICT | class_id, policy_set.name_answer(name, strict=True), delta)

    def _classes_for(self, used: _Used) -> set[PeerClass]:
        """The classes for which a set may have an entry."""
        peers = self._peers
        found = set(peers.own_classes)
        if used.set.base:
            found.update(peers.classes.values())
        for term in used.set.terms:
            found |= peers.by_term.get(term, set())
        for port in used.set.ports:
            found |= peers.by_port.get(port, set())
        return found

    def _sets_for(self, peer_class: PeerClass) -> set[_Used]:
        """The sets that may have an entry for a class."""
        if peer_class.own:
            return set(self._sets.values())
        found = set(self._with_base)
        for term in peer_class.terms:
            found |= self._by_term.get(term, set())
        for port in peer_class.ports:
            found |= self._by_port.get(port.port, set())
        return found

    def _enter(self, used: _Used, peer_class: PeerClass, delta: PolicyDelta) -> None:
        """An entry for a class, where it gets something else than the set's default."""
        policy_set = used.set
        if peer_class.own:
            answer = policy_set.own_answer(peer_class.terms)
        else:
            answer = policy_set.answer(policy_set.restricted(peer_class.terms, peer_class.ports))
        if answer != policy_set.default:
            self._write(used, peer_class.id, answer, delta)

    @staticmethod
    def _write(used: _Used, class_id: int, steps: Steps, delta: PolicyDelta) -> None:
        delta.entries.setdefault(used.id, {})[class_id] = steps


def full_tables(
    *,
    here: Mapping[str, ObjectKey],
    own_addresses: Iterable[str],
    pods: Mapping[ObjectKey, Pod],
    namespaces: Mapping[ObjectKey, Namespace],
    nodes: Mapping[ObjectKey, Node],
    policies: Mapping[ObjectKey, NetworkPolicy],
    cluster_policies: Mapping[ObjectKey, ClusterNetworkPolicy],
) -> PolicyTables:
    """The tables of these objects, at once. `here`: address of an interface of this node → the pod that has it."""
    planner = PolicyPlanner()
    planner.set_own_addresses(own_addresses)
    for address, key in here.items():
        planner.attach(address, key)
    for key, namespace in namespaces.items():
        planner.set_namespace(key.name, namespace)
    for key, node in nodes.items():
        planner.set_node(key.name, node)
    for key, policy in policies.items():
        planner.set_policy(key, policy)
    for key, cluster_policy in cluster_policies.items():
        planner.set_cluster_policy(key, cluster_policy)
    for key, pod in pods.items():
        planner.set_pod(key, pod)
    planner.plan()
    return planner.tables
