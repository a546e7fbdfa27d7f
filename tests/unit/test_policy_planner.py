"""The planner of policy: its tables answer as the standard says, whatever way they came about, and on the way too."""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as altered
from policy_brute import (
    EVERY,
    HERE,
    OWN,
    PACKETS,
    PATTERNS,
    World,
    feed,
    histories,
    look_up,
    verdict,
    worlds,
)

from waggle.model.meta import ObjectKey
from waggle.model.policy import PolicyWorld, Traffic, judge
from waggle.model.policy_rules import NO_RULE, Direction
from waggle.plan.policy import PolicyPlanner
from waggle.plan.policy_tables import ALLOW, AUDIT, DENY

EXAMPLES = int(os.environ.get("EXAMPLES", "40"))  # of each kind; more find more
NO_NAMES = frozenset()


def questions(world: World):
    for own in sorted(world.here):
        for direction in Direction:
            for peer in EVERY:
                if peer != own:  # a pod may talk to itself: nothing is looked up
                    for protocol, port in PACKETS:
                        yield direction, own, peer, protocol, port


def oracle_world(world: World, names) -> PolicyWorld:
    return PolicyWorld(
        pods=world.pods,
        namespaces=world.namespaces,
        nodes=world.nodes,
        policies=world.policies,
        cluster_policies=world.cluster_policies,
        here=frozenset(world.here),
        node=HERE,
        node_addresses=OWN,
        names={peer: [pattern.replace("*", "a") for pattern in names] for peer in EVERY},
    )


def said_by_the_model(world: PolicyWorld, direction, own, peer, protocol, port) -> tuple[int, int]:
    source, destination = (own, peer) if direction == Direction.EGRESS else (peer, own)
    side = judge(world, direction, Traffic(source, destination, protocol, port))
    if side.audit:
        return ALLOW | AUDIT, side.audit.rule.id if side.audit.rule else NO_RULE
    return (ALLOW if side.allowed else DENY), side.rule.id if side.rule else NO_RULE


def enforced(policies):
    """The policies without audit."""
    return {key: altered(found, metadata=altered(found.metadata, annotations=None)) for key, found in policies.items()}


@settings(max_examples=EXAMPLES, deadline=None)
@given(worlds(), st.sets(st.sampled_from(PATTERNS)).map(frozenset))
def test_tables_answer_as_the_standard_and_the_model_say(world, names):
    if names:  # what a name allows is not audited
        world = replace(world, policies=enforced(world.policies), cluster_policies=enforced(world.cluster_policies))
    tables, model = world.tables(), oracle_world(world, names)
    for question in questions(world):
        said = look_up(tables, *question, names)
        expected, modelled = verdict(world, *question, names), said_by_the_model(model, *question)
        # what lets a name in is named here; the standard needs no rule for the node, and what is allowed asks no name
        if names and (question[2] in OWN or said[0] == ALLOW):
            said, expected, modelled = said[:1], expected[:1], modelled[:1]
        assert said == expected == modelled, (question, names)


@settings(max_examples=EXAMPLES, deadline=None)
@given(histories())
def test_whatever_happened_before_the_tables_are_the_same(history):
    planner, old = PolicyPlanner(), World()
    for world in history:
        feed(planner, old, world)
        planner.plan()
        old, fresh = world, world.tables()
        for name in fresh.__slots__:
            assert getattr(planner.tables, name) == getattr(fresh, name), name


def writes(tables, delta):
    """Applies a delta one write at a time, as entries of maps are written."""
    tables.set_names.update(delta.set_names)
    tables.patterns.update(delta.patterns)
    for set_id, entries in delta.entries.items():
        for class_id, steps in entries.items():
            assert class_id not in tables.sets.get(set_id, {}), "an entry is changed in place"
            tables.sets.setdefault(set_id, {})[class_id] = steps
            yield
    for address, class_id in delta.classes.items():
        tables.classes[address] = class_id
        yield
    for cidr, class_id in delta.ranges.items():
        if class_id is None:
            del tables.ranges[cidr]
        else:
            tables.ranges[cidr] = class_id
        yield
    for address in delta.classes_gone:
        del tables.classes[address]
        yield
    for address, sets in delta.pods.items():
        if sets is None:
            del tables.pods[address]
        else:
            tables.pods[address] = sets
        yield
    for set_id, class_id in delta.entries_gone:
        del tables.sets[set_id][class_id]
        yield


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(histories(one_at_a_time=True))
def test_every_write_on_the_way_answers_as_before_or_as_after(history):
    """Where one end changes. If both do (the labels of their namespace, say), they do so one after the other."""
    planner, old = PolicyPlanner(), World()
    for world in history:
        before = old.tables()
        feed(planner, old, world)
        deltas = planner.plan()
        after = world.tables()
        fine = [
            (question, {look_up(before, *question), look_up(after, *question)})
            for question in questions(world)
            if question[1] in old.here and not both_change(old, world, *question[1:3])
        ]
        tables = before
        for delta in deltas:
            for _ in writes(tables, delta):
                for question, answers in fine:
                    assert look_up(tables, *question) in answers, question
        old = world


def both_change(old: World, new: World, *addresses: str) -> bool:
    def facts(world: World, address: str):
        pod = world.by_address.get(address)
        return pod, world.namespaces.get(ObjectKey("", pod.metadata.namespace)) if pod else None

    return all(facts(old, address) != facts(new, address) for address in addresses)
