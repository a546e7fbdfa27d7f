"""Policies of this node's pods, and of itself: from what is known to what the programs look up.

Fails closed: a pod that nobody has told of yet has no policies that could be in force, and gets nothing, unless there
are no policies at all. What is in force stays so while not everything is known that policies are about.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from waggle.abi.address import pack_address, unpack_address
from waggle.agent.node_policies import NodePolicies
from waggle.errors import WaggleError
from waggle.model.interface import PodInterface
from waggle.model.node_trace import NodeLook
from waggle.model.objects import ObjectKey, Pod
from waggle.model.policy import Side, Traffic
from waggle.model.policy_rules import NO_RULE, Direction
from waggle.plan.policy import PolicyPlanner
from waggle.plan.policy_tables import ALLOW, AUDIT, OPEN, PENDING, step_key
from waggle.reconcile.datapath import Datapath, pod_title
from waggle.reconcile.drift import Drift
from waggle.reconcile.policy import PolicyWriter
from waggle.sources.problem import Problem
from waggle.store import Store
from waggle.store.store import Changes

log = logging.getLogger(__name__)

SETTLE_SECONDS = 0.25  # no packet is on its way through a program that long
RETRY_SECONDS = 1.0
SLICE = 1000  # objects handed to the planner before other work gets its turn
MANY = 200  # so many changes are planned beside the event loop

Sets = tuple[int, int]


class InForce(NamedTuple):
    """What the kernel's tables say of one side of a packet. `rule`: its number there, 0 for none. `behind`: something
    has changed that the tables do not hold yet."""

    allowed: bool
    audited: bool
    rule: int
    behind: bool


@dataclass(slots=True)
class _Due:
    """What has changed and was not planned."""

    policies: set[ObjectKey] = field(default_factory=set)
    cluster_policies: set[ObjectKey] = field(default_factory=set)
    namespaces: set[ObjectKey] = field(default_factory=set)
    nodes: set[ObjectKey] = field(default_factory=set)
    pods: set[ObjectKey] = field(default_factory=set)

    def add(self, changes: Changes) -> None:
        self.policies |= changes.policies
        self.cluster_policies |= changes.cluster_policies
        self.namespaces |= changes.namespaces
        self.nodes |= changes.nodes
        self.pods |= changes.pods

    def __len__(self) -> int:
        return sum(map(len, (self.policies, self.cluster_policies, self.namespaces, self.nodes, self.pods)))


class Policies:
    """`known`: whether everything is known that policies are about; `pods`: the interfaces there are; `own`: addresses
    of this node itself; `own_policies`: NodePolicies; `retry` is called where something failed that may work later."""

    def __init__(
        self,
        store: Store,
        datapath: Datapath,
        known: Callable[[], bool],
        pods: Callable[[], Iterable[PodInterface]],
        own: Callable[[], Iterable[str]],
        own_policies: NodePolicies,
        *,
        retry: Callable[[], None],
        node: str,
        keep: bool,
    ) -> None:
        self._store = store
        self._datapath = datapath
        self._known = known
        self._pods = pods
        self._own = own
        self._own_policies = own_policies
        self._retry = retry
        self._node = node
        self._keep = keep
        self.planner = PolicyPlanner()
        self.writer: PolicyWriter
        self._due = _Due()
        self._here: dict[str, ObjectKey] = {}
        self._sets: dict[bytes, Sets] = {}  # of pods that are planned
        self._found: Mapping[bytes, Sets] = {}  # what was in force when this agent started
        self._open = False  # there are no policies
        self._behind = True  # the tables may hold something else than what was planned
        self._looks = True  # interfaces may be others
        self._seen_own: frozenset[str] = frozenset()  # addresses of this node, as they were planned last
        self.failed = ""

    @property
    def pending(self) -> bool:
        """Whether `follow` has something to do, as far as it is known."""
        return self._behind or bool(len(self._due))

    def start(self) -> None:
        """Takes over what is in force. Blocking."""
        self._own_policies.load()
        self._datapath.load_policy_assignment()
        self._found = self._datapath.policies_in_force()
        if self._datapath.knew_no_policies:  # an earlier version's pods have none
            addresses = (str(address) for pod in self._pods() for address in pod.addresses)
            self._found = {pack_address(address): (OPEN, OPEN) for address in addresses}
        self._datapath.policies_of = self.sets_of
        self.writer = PolicyWriter(self._datapath.maps, self._datapath.assign_policies, keep=self._keep)
        self.writer.adopt()

    def sets_of(self, address: bytes) -> Sets:
        """The sets of a pod's packed address, ingress and egress. From any thread."""
        if self._open:
            return OPEN, OPEN
        return self._sets.get(address) or self._found.get(address) or (PENDING, PENDING)

    def take(self, changes: Changes) -> None:
        """What has changed in the store."""
        self._due.add(changes)

    def pods_changed(self) -> None:
        """The interfaces of this node's pods are others."""
        self._looks = True

    async def follow(self) -> None:
        """Brings the tables to what is known, if enough is. A failure leaves in force what was, and Services go on."""
        try:
            await self._follow()
        except Exception as error:  # a fault in planning, too, must not cost the node its Services
            known = isinstance(error, WaggleError | OSError)
            if self.failed != str(error):
                log.error("policies cannot be brought into force, trying again: %s", error, exc_info=not known)
            self.failed = str(error) if known else f"{type(error).__name__}: {error}"
            self._begin_again()
            asyncio.get_running_loop().call_later(RETRY_SECONDS, self._retry)
        else:
            self.failed = ""

    def _begin_again(self) -> None:
        """A planner that failed in the middle may be half changed: the next one is told everything."""
        store = self._store
        self.planner, self._here = PolicyPlanner(), {}
        self._behind = self._looks = True
        self._due = _Due(
            set(store.policies),
            set(store.cluster_policies),
            set(store.namespaces),
            set(store.nodes),
            set(store.pods),
        )

    async def _follow(self) -> None:
        if not self._known():
            if self._open and self._store.has_pod_policies:
                self._open = False  # pods that come from now on have to wait
                self._found = dict.fromkeys(self._datapath.policies_in_force(), (OPEN, OPEN))
            return
        own = frozenset(self._own())
        # where NodePolicies are in force, what they must not cut may be others
        if not (self.pending or self._looks or own != self._seen_own or self._own_policies.is_active):
            return  # the pass is about something else
        self._looks, self._seen_own = False, own
        many = len(self._due) > MANY or self._behind
        await self._tell()
        deltas = await asyncio.to_thread(self.planner.plan) if many else self.planner.plan()
        planned = {pack_address(text): sets for text, sets in self.planner.tables.pods.items()}
        is_open = not self._store.has_pod_policies
        if not deltas and not self._behind and is_open == self._open and planned.keys() == self._sets.keys():
            return
        self._sets, self._open, self._found = planned, is_open, {}
        if self._behind:
            tickets = [await asyncio.to_thread(self.writer.sync, self.planner.tables)]
        else:
            tickets = [self.writer.write(delta) for delta in deltas]
        self._datapath.assign_policies()  # pods that nobody knows, too
        self._own_policies.written(self.planner.tables.node.until_ns)
        self._behind = False
        for ticket in filter(None, tickets):
            asyncio.get_running_loop().call_later(SETTLE_SECONDS, self.writer.settle, ticket)

    async def _tell(self) -> None:
        """Hands what has changed to the planner."""
        due, self._due = self._due, _Due()
        planner, store = self.planner, self._store
        planner.set_own_addresses(self._seen_own)
        planner.set_node_plan(await self._own_policies.plan())
        self._attach()
        for key in due.namespaces:
            planner.set_namespace(key.name, store.namespaces.get(key))
        for key in due.nodes:
            planner.set_node(key.name, store.nodes.get(key))
        for key in due.policies:
            planner.set_policy(key, store.policies.get(key))
        for key in due.cluster_policies:
            planner.set_cluster_policy(key, store.cluster_policies.get(key))
        for number, key in enumerate(due.pods, 1):
            planner.set_pod(key, store.pods.get(key))
            if number % SLICE == 0:
                await asyncio.sleep(0)

    def _attach(self) -> None:
        """Whose the addresses of this node's interfaces are."""
        by_address = {ip: pod.key for pod in self._store.pods_on(self._node) for ip in pod_addresses(pod)}
        here = {}
        for interface in self._pods():
            named = ObjectKey(interface.namespace, interface.name)
            for address in map(str, interface.addresses):
                here[address] = named if named in self._store.pods else by_address.get(address, named)
        for address in self._here.keys() - here.keys():
            self.planner.detach(address)
        for address, key in here.items():
            if self._here.get(address) != key:
                self.planner.attach(address, key)
        self._here = here

    # -- for people ---------------------------------------------------------------------------------------------

    def problems(self) -> list[Problem]:
        """Pods that get nothing because nobody knows what they may."""
        own = self._own_policies.problems()
        if self.failed:
            return [*own, Problem("policies", f"what has changed is not in force: {self.failed}")]
        if self._open:
            return own
        why = "its Pod object is not known: nothing passes but to and from this node"
        if not self._known():
            why = "not everything is known yet that policies are about: nothing passes but to and from this node"
        return own + [
            Problem(pod_title(pod), why)
            for pod in self._pods()
            if any(self.sets_of(pack_address(str(address))) == (PENDING, PENDING) for address in pod.addresses)
        ]

    def in_force(self, side: Side | NodeLook, traffic: Traffic) -> InForce | None:
        """What the kernel's tables say of a side that the model has judged; None where they are not asked: it is no pod
        of this node, and not this node, or it talks to itself. Blocking."""
        own, peer = traffic.source, traffic.destination
        if side.direction is Direction.INGRESS:
            own, peer = peer, own
        if isinstance(side, NodeLook):
            if not side.own.known:
                return None
            node_set = self.writer.set_of_node(side.direction, on_trial=side.own.on_trial)
            if node_set == OPEN:
                return InForce(True, False, NO_RULE, self.pending)
            return self._said(node_set, peer, traffic, is_self=False)
        sets = self._datapath.policies_in_force().get(pack_address(own))
        if sets is None or own == peer:
            return None
        policy_set = sets[0] if side.direction is Direction.INGRESS else sets[1]
        is_self = peer in set(self._own())
        if policy_set in (OPEN, PENDING):
            return InForce(policy_set == OPEN or is_self, False, NO_RULE, self.pending)
        asker = next((pod.host_ifindex for pod in self._pods() if own in map(str, pod.addresses)), 0)
        return self._said(policy_set, peer, traffic, is_self=is_self, asker=asker)

    def _said(self, policy_set: int, peer: str, traffic: Traffic, *, is_self: bool, asker: int = 0) -> InForce:
        key = step_key(traffic.protocol, traffic.port)
        step = self.writer.answer(policy_set, peer, key, is_self=is_self, asker=asker)
        return InForce(bool(step.verdict & ALLOW), bool(step.verdict & AUDIT), step.rule, self.pending)

    def check(self, *, repair: bool) -> tuple[int, list[Drift]]:
        """How many entries of the tables were looked at, and what was wrong. Blocking."""
        if self.pending:
            return 0, []
        number, found = self.writer.check(self.planner.tables)
        in_force = self._datapath.policies_in_force()
        for key, sets in in_force.items():
            if sets != self.sets_of(key):
                entry = unpack_address(key)
                what = f"has sets {sets}, not {self.sets_of(key)}"
                found.append(Drift("wag_endpoints", "policies", entry, what, key))
        if found and repair:
            ticket = self.writer.repair(self.planner.tables)
            self._datapath.assign_policies()
            self.writer.settle(ticket)
        return number + len(in_force), found


def pod_addresses(pod: Pod) -> set[str]:
    """Addresses that a Pod object says it has."""
    return {entry.ip for entry in pod.status.pod_ips if entry.ip} | ({pod.status.pod_ip} - {""})
