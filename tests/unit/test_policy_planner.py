"""The planner of policy: its tables answer as the standard says, whatever way they came about, and on the way too."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace as altered
from policy_brute import (
    CLUSTER_POLICY,
    EVERY,
    HERE,
    NAMED_POLICY,
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

from waggle.model.policy import PolicyWorld, Traffic, judge
from waggle.model.policy_rules import NO_RULE, Direction
from waggle.plan.policy import PolicyPlanner
from waggle.plan.policy_tables import ALLOW, AUDIT, DENY

DEV = (Phase.generate,)
NO_NAMES = frozenset()


def questions(world: World):
    for own in sorted(world.here):
        for direction in Direction:
            for peer in EVERY:
                if peer != own:  # a pod may talk to itself: nothing is looked up
                    for protocol, port in PACKETS:
                        yield direction, own, peer, protocol, port


def compare(world: World, tables, names=NO_NAMES) -> None:
    for question in questions(world):
        assert look_up(tables, *question, names) == verdict(world, *question, names), (question, names)


@settings(max_examples=150, deadline=None, phases=DEV)
@given(worlds())
def test_tables_answer_as_the_standard_says(world):
    compare(world, world.tables())


def enforced(policies):
    """The policies without audit."""
    return {key: altered(found, metadata=altered(found.metadata, annotations=None)) for key, found in policies.items()}


@settings(max_examples=60, deadline=None, phases=DEV)
@given(worlds(NAMED_POLICY), st.sets(st.sampled_from(PATTERNS), min_size=1).map(frozenset))
def test_names_count_at_the_place_of_their_rule(world, names):
    world = replace(world, policies=enforced(world.policies))
    compare(world, world.tables(), names)  # what a name allows is not audited


@settings(max_examples=150, deadline=None, phases=DEV)
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
    tables.names.update(delta.names)
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


@settings(max_examples=60, deadline=None, phases=DEV)
@given(histories())
def test_every_write_on_the_way_answers_as_before_or_as_after(history):
    planner, old = PolicyPlanner(), World()
    for world in history:
        before = old.tables()
        feed(planner, old, world)
        deltas = planner.plan()
        after = world.tables()
        asked = [q for q in questions(world) if q[1] in old.here]
        fine = [(q, {look_up(before, *q), look_up(after, *q)}) for q in asked]
        tables = before
        for delta in deltas:
            for _ in writes(tables, delta):
                for question, answers in fine:
                    if question[1] in tables.pods:
                        assert look_up(tables, *question) in answers, question
        old = world


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


@settings(max_examples=100, deadline=None, phases=DEV)
@given(worlds(NAMED_POLICY | CLUSTER_POLICY), st.sets(st.sampled_from(PATTERNS)).map(frozenset))
def test_the_model_says_the_same(world, names):
    if names:  # what a name allows is not audited
        enforced = {
            key: altered(p, metadata=altered(p.metadata, annotations=None)) for key, p in world.policies.items()
        }
        cluster = {
            key: altered(p, metadata=altered(p.metadata, annotations=None)) for key, p in world.cluster_policies.items()
        }
        world = replace(world, policies=enforced, cluster_policies=cluster)
    tables, model = world.tables(), oracle_world(world, names)
    for question in questions(world):
        assert look_up(tables, *question, names) == said_by_the_model(model, *question), (question, names)
