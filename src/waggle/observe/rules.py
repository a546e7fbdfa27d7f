"""What numbers of rules and of sets of policies stand for: the programs know nothing else of policies.

An event is resolved when it is read, since what it names may be gone when somebody looks at it. What was resolved
lately is remembered: a policy may change before an event of it is read, and what it counted stays counted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from waggle.model.objects import ObjectKey
from waggle.model.policy_rules import RuleRef
from waggle.plan.policy_node import ESSENTIALS
from waggle.plan.policy_tables import PolicyTables

#: An object's origin as the store has it ("file:" and a path), and the line in it where that is known.
Place = Callable[[str, ObjectKey], tuple[str, int | None]]
MOST_REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class PlacedRule:
    """A rule, and where its object was read. `file` is None where that was an API, `line` where it is not known."""

    ref: RuleRef
    file: str | None = None
    line: int | None = None

    @property
    def object(self) -> str:
        """ "NetworkPolicy t/web"."""
        return object_name(self.ref.kind, self.ref.key)

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "object": self.object,
            "direction": self.ref.direction.lower(),
            "index": self.ref.index,
        }
        if self.ref.name:
            found["name"] = self.ref.name
        if self.file is not None:
            found |= {"file": self.file, "line": self.line}
        return found


def object_name(kind: str, key: ObjectKey) -> str:
    """ "NetworkPolicy t/web", "ClusterNetworkPolicy no-metadata"."""
    return f"{kind} {key}" if key.namespace else f"{kind} {key.name}"


class Rules(Protocol):
    """Resolves what policy events carry."""

    def rule(self, number: int) -> PlacedRule | None:
        """The rule with this number; None for 0, and for one that is not known, or not any more."""

    def policies(self, number: int) -> tuple[str, ...]:
        """The policy objects that a set is made of, as `object_name` has them; () for a set that is not known."""


class PlannedRules:
    """Those of the planner's tables."""

    def __init__(self, tables: Callable[[], PolicyTables], place: Place) -> None:
        self._tables = tables
        self._place = place
        self._rules: OrderedDict[int, PlacedRule] = OrderedDict()
        self._policies: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def rule(self, number: int) -> PlacedRule | None:
        ref = self._tables().rules.get(number)
        if ref is None:
            return self._rules.get(number)
        origin, line = self._place(ref.kind, ref.key)
        file = origin.removeprefix("file:") if origin.startswith("file:") else None
        found = PlacedRule(ref, file, line if file is not None else None)
        if (known := self._rules.get(number)) == found:
            return known  # one for all events
        _remember(self._rules, number, found)
        return found

    def policies(self, number: int) -> tuple[str, ...]:
        ref = self._tables().set_names.get(number)
        if ref is None or number in self._policies:  # a number never means another set
            return self._policies.get(number, ())
        found = tuple(object_name(kind, key) for kind, key in ref.policies if kind != ESSENTIALS)
        _remember(self._policies, number, found)
        return found


def _remember(known: OrderedDict[int, Any], number: int, what: object) -> None:
    known[number] = what
    known.move_to_end(number)
    if len(known) > MOST_REMEMBERED:
        known.popitem(last=False)
