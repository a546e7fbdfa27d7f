"""A set: the policies of a pod in one direction, in order, and what they make of each class.

What a class gets depends on those of its predicates alone that the set's rules are made of. So the steps are worked
out once for each combination of these, however many classes there are.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from waggle.model.policy_rules import NO_RULE, Direction
from waggle.plan.policy_compile import Action, Compiled, Rule, Span, Tier
from waggle.plan.policy_predicates import Block, NameTerm, NodeTerm, PortName, PortTerm, Predicate
from waggle.plan.policy_tables import (
    ALLOW,
    AUDIT,
    DENY,
    END,
    FIRST,
    LAST,
    PORT_BITS,
    SetRef,
    Step,
    Steps,
)

#: Port name → its numbers on the pod that the set is of.
Resolved = Mapping[PortName, Sequence[int]]
Held = frozenset[Predicate]


class _Ends(NamedTuple):
    """The places where the tiers ended (`policy_tables.Step`)."""

    admin: int
    baseline: int


class _Decided(NamedTuple):
    """What is decided from a key on."""

    start: int
    allowed: bool
    rule: int
    ends: _Ends


#: What rules make of a packet, for all sets: a policy more or less makes a new set, most of whose answers are known.
KnownAnswers = dict[Hashable, dict[Hashable, Steps]]


class PolicySet:
    """`policies`: those of a pod in one direction that say something, in the order in which they are asked.

    `default` is for every class without an entry: what an address gets of which nothing is true that the set asks,
    except what is broad (all pods, all addresses of a family). Else a rule for all pods would need an entry for each
    class of pods.
    """

    def __init__(
        self, direction: Direction, policies: Sequence[Compiled], resolved: Resolved, known: KnownAnswers | None = None
    ) -> None:
        self.ref = SetRef(direction, tuple(policy.ref for policy in policies))
        self.text = set_text(direction, policies, resolved)
        self.rules = [rule for policy in policies for rule in policy.rules]
        #: Rule → its spans, where that is not what it says of itself.
        self._spans = {} if direction is Direction.EGRESS else _resolved_spans(self.rules, resolved)
        self._isolated = {
            with_audited: any(p.tier is Tier.NETWORK and (with_audited or not p.audited) for p in policies)
            for with_audited in (False, True)
        }
        numbers = tuple(sorted((port, *sorted(found)) for port, found in resolved.items()))
        circumstances = (direction, numbers, *self._isolated.values())
        self._known = ({} if known is None else known).setdefault(circumstances, {})
        self.has_audited = any(policy.audited for policy in policies)
        self._always: list[int] = []  # places in the order
        self._by_term: dict[Predicate, list[int]] = {}
        self._by_port: dict[PortName, list[int]] = {}
        for place, rule in enumerate(self.rules):
            for term in rule.peers or ():
                self._by_term.setdefault(term, []).append(place)
            if rule.peers is None:
                self._always.append(place)
            for port in rule.named if direction is Direction.EGRESS else ():
                self._by_port.setdefault(port, []).append(place)
        self.ports = frozenset(self._by_port)
        self.names = tuple(sorted((t for t in self._by_term if isinstance(t, NameTerm)), key=lambda t: t.text))
        self.terms: Held = frozenset(self._by_term) - frozenset(self.names)
        #: What may keep a pod from the node it runs on: what can mean a node's address, in tier Admin towards it.
        self.own_terms: Held = frozenset(
            term
            for rule in self.rules
            if rule.tier is Tier.ADMIN and direction is Direction.EGRESS
            for term in rule.peers or ()
            if isinstance(term, Block | NodeTerm)
        )
        self._egress = direction is Direction.EGRESS
        self.base: Held = frozenset(term for term in self.terms if term.broad)
        self._answers: dict[Held, Steps] = {}
        self._own_answers: dict[Held, Steps] = {}
        self.default = self.answer(self.base)

    def restricted(self, terms: Held, ports: Iterable[PortTerm] = ()) -> Held:
        """What of a class makes a difference here. `ports` are those of its predicates that are named ports."""
        held = terms & self.terms
        if self.ports:
            held |= {port for port in ports if port.port in self.ports}
        return held

    def answer(self, held: Held) -> Steps:
        """What a class gets of which `restricted` is `held`."""
        found = self._answers.get(held)
        if found is None:
            found = self._answers[held] = self._evaluate(held)
        return found

    def own_answer(self, held: Held) -> Steps:
        """What this node gets, of whose address `held` is true: all, unless tier Admin denies what goes to the node."""
        held &= self.own_terms
        found = self._own_answers.get(held)
        if found is None:
            found = self._own_answers[held] = self._evaluate_own(held)
        return found

    def name_answer(self, name: NameTerm, *, strict: bool = False) -> Steps:
        """What having a name adds: where it allows, and the places of the rules that do. `strict`: audited ones too. Of
        named ports, which an apiserver refuses beside domain names, nothing matches."""
        places = [place for place in self._by_term[name] if strict or not self.rules[place].audited]
        decided = []
        for start, (admin, _, baseline) in self._winners(places, held=frozenset((name,))):
            first = admin if admin is not None else baseline
            rule = NO_RULE if first is None else self.rules[first].id
            ends = _Ends(_place(admin, LAST), _place(baseline, LAST))
            decided.append(_Decided(start, first is not None, rule, ends))
        return self._answer(decided, decided)

    # -- which rules match, and the first of each tier

    def _matching(self, held: Held) -> list[int]:
        # a rule for everybody that names pods by the port alone is among those that always match
        found = [self._by_term[term] for term in held if not isinstance(term, PortTerm)]
        if self._always:
            found.append(self._always)
        if len(found) == 1:
            return found[0]
        return sorted({place for places in found for place in places})

    def _winners(
        self, places: Iterable[int], held: Held
    ) -> Iterator[tuple[int, tuple[int | None, int | None, int | None]]]:
        """From each key on where one of them changes: the first rule of each tier that matches."""
        spans: dict[Tier, list[tuple[int, int, int]]] = {tier: [] for tier in Tier}
        numbers: dict[PortName, list[int]] = {}
        for term in held:
            if isinstance(term, PortTerm):
                numbers.setdefault(term.port, []).append(term.number)
        for place in places:
            rule = self.rules[place]
            found = spans[rule.tier]
            found += [(first, end, place) for first, end in self._spans.get(rule, rule.spans)]
            if self._egress and rule.named and numbers:
                for port in rule.named:
                    keys = (port.protocol << PORT_BITS | number for number in numbers.get(port, ()))
                    found += [(key, key + 1, place) for key in keys]
        admin, network, baseline = (dict(first_of_each(spans[tier])) for tier in Tier)
        current: tuple[int | None, int | None, int | None] = (None, None, None)
        for start in sorted({0, *admin, *network, *baseline} - {END}):
            current = (
                admin.get(start, current[0]),
                network.get(start, current[1]),
                baseline.get(start, current[2]),
            )
            yield start, current

    # -- what is decided

    def _evaluate(self, held: Held) -> Steps:
        places = self._matching(held)
        if self.names:  # these answers depend on places in the order
            return self._work_out(places, held)
        ports = frozenset(term for term in held if isinstance(term, PortTerm)) if self.ports else None
        key = ports, tuple(map(self.rules.__getitem__, places))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._work_out(places, held)
        return found

    def _work_out(self, places: list[int], held: Held) -> Steps:
        enforced = self._decide(places, held, with_audited=False)
        return self._answer(enforced, self._decide(places, held, with_audited=True) if self.has_audited else enforced)

    def _decide(self, places: list[int], held: Held, *, with_audited: bool) -> list[_Decided]:
        asked = [place for place in places if with_audited or not self.rules[place].audited]
        isolated = self._isolated[with_audited]
        return [self._decided(start, winners, isolated=isolated) for start, winners in self._winners(asked, held=held)]

    def _decided(self, start: int, winners: tuple[int | None, int | None, int | None], *, isolated: bool) -> _Decided:
        admin, network, baseline = winners
        ended = _place(admin, LAST)
        if admin is not None and self.rules[admin].action is not Action.PASS:
            rule = self.rules[admin]
            return _Decided(start, rule.action is Action.ACCEPT, rule.id, _Ends(ended, FIRST))
        if isolated:
            rule_id = NO_RULE if network is None else self.rules[network].id
            return _Decided(start, network is not None, rule_id, _Ends(ended, FIRST))
        ends = _Ends(ended, _place(baseline, LAST))
        if baseline is None:
            return _Decided(start, True, NO_RULE, ends)
        rule = self.rules[baseline]
        return _Decided(start, rule.action is not Action.DENY, rule.id, ends)

    def _evaluate_own(self, held: Held) -> Steps:
        places = [place for place in self._matching(held) if self.rules[place].tier is Tier.ADMIN and self._egress]

        def decide(*, with_audited: bool) -> list[_Decided]:
            asked = [place for place in places if with_audited or not self.rules[place].audited]
            found = []
            for start, (admin, _, _) in self._winners(asked, held=held):
                denied = admin is not None and self.rules[admin].action is Action.DENY
                rule = self.rules[admin].id if admin is not None and denied else NO_RULE
                ends = _Ends(_place(admin, LAST) if denied else FIRST, FIRST)
                found.append(_Decided(start, not denied, rule, ends))
            return found

        enforced = decide(with_audited=False)
        return self._answer(enforced, decide(with_audited=True) if self.has_audited else enforced)

    def _answer(self, enforced: Sequence[_Decided], strict: Sequence[_Decided]) -> Steps:
        """`strict`: with the audited policies enforced too."""
        found: list[Step] = []
        for start, one, other in _beside(enforced, strict):
            audited = one.allowed and not other.allowed
            verdict = ALLOW | AUDIT if audited else ALLOW if one.allowed else DENY
            by = other if audited else one
            step = Step(start, verdict, by.rule, *(by.ends if self.names else ()))
            if not found or found[-1][1:] != step[1:]:
                found.append(step)
        return tuple(found)


def set_text(direction: Direction, policies: Sequence[Compiled], resolved: Resolved) -> str:
    """What the id of a set is a hash of."""
    numbers = sorted((*port, *sorted(found)) for port, found in resolved.items())
    return "\n".join([direction, json.dumps(numbers), *(policy.digest for policy in policies)])


def asked_of(policies: Iterable[Compiled]) -> tuple[Compiled, ...]:
    """The policies that select a pod in the order in which they are asked, without those that never are: what
    isolates a pod comes before tier Baseline. `policies` of a tier are in order."""
    every = sorted(policies, key=lambda policy: policy.tier)
    if any(policy.tier is Tier.NETWORK and not policy.audited for policy in every):
        every = [policy for policy in every if policy.tier is not Tier.BASELINE]
    return tuple(every)


def port_names(policies: Iterable[Compiled]) -> frozenset[PortName]:
    """The named ports that rules are about."""
    return frozenset(port for policy in policies for rule in policy.rules for port in rule.named)


def first_of_each(spans: list[tuple[int, int, int]]) -> list[tuple[int, int | None]]:
    """Of spans (first key, end, place): from each key on where it changes, the lowest place there; None for no span."""
    if len(spans) == 1:
        first, end, place = spans[0]
        return [(first, place), (end, None)]
    spans.sort()
    found: list[tuple[int, int | None]] = []
    active: list[tuple[int, int]] = []  # (place, end), a heap
    at = 0
    for key in sorted({edge for first, end, _ in spans for edge in (first, end)}):
        while at < len(spans) and spans[at][0] <= key:
            heapq.heappush(active, (spans[at][2], spans[at][1]))
            at += 1
        while active and active[0][1] <= key:
            heapq.heappop(active)
        winner = active[0][0] if active else None
        if not found or found[-1][1] != winner:
            found.append((key, winner))
    return found


def _resolved_spans(rules: Iterable[Rule], resolved: Resolved) -> dict[Rule, tuple[Span, ...]]:
    """Keys of rules for ingress that have named ports, whose numbers are those of the pod itself."""
    found = {}
    for rule in rules:
        if rule.named:
            keys = {port.protocol << PORT_BITS | number for port in rule.named for number in resolved.get(port, ())}
            found[rule] = (*rule.spans, *((key, key + 1) for key in sorted(keys)))
    return found


def _place(place: int | None, otherwise: int) -> int:
    """A place as the programs compare it; all beyond the last count as one."""
    return otherwise if place is None else min(place + 1, LAST - 1)


def _beside(one: Sequence[_Decided], other: Sequence[_Decided]) -> Iterator[tuple[int, _Decided, _Decided]]:
    """Two step functions over the same keys as one."""
    at, to = {step.start: step for step in one}, {step.start: step for step in other}
    current, beside = one[0], other[0]
    for start in sorted({*at, *to}):
        current, beside = at.get(start, current), to.get(start, beside)
        yield start, current, beside
