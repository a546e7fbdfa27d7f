"""What policies have dropped, or would have: exact counts by the object that decided, from wag_denials.

The table is keyed by numbers that go out of use when policies change. Its entries are summed under the names of their
objects; when it fills up, those that nobody can name any more are taken out, and what they counted stays counted.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from waggle.abi._generated import DenialKey
from waggle.kernel.maps import Map
from waggle.observe.reasons import direction_name, verdict_name
from waggle.observe.rules import Rules

MOST_POLICIES = 1000  # that are counted by name; others are counted together
OTHERS = "others"
UNKNOWN = ""


class Denied(NamedTuple):
    """`policy`: the object that decided; those of the set, where none of its rules did; UNKNOWN, or OTHERS."""

    policy: str
    direction: str
    verdict: str


class Denials:
    """Reads the table when asked."""

    def __init__(self, table: Map, rules: Rules) -> None:
        self._table = table
        self._rules = rules
        self._gone: Counter[Denied] = Counter()
        self._named: set[str] = {UNKNOWN, OTHERS}

    def counts(self) -> Counter[Denied]:
        """Packets so far, since the table was made."""
        found = Counter(self._gone)
        nameless: list[tuple[bytes, Denied, int]] = []
        entries = self._table.dump()
        for raw, value in entries:
            key = DenialKey.unpack(raw)
            count = int.from_bytes(value, "little")
            who = self._who(key)
            denied = Denied(who, direction_name(key.direction), verdict_name(key.verdict))
            found[denied] += count
            if who == UNKNOWN:
                nameless.append((raw, denied, count))
        if len(entries) > self._table.info.max_entries // 2:
            for raw, denied, count in nameless:
                self._table.delete(raw)  # a packet that is counted meanwhile is lost: they are of nobody's policies
                self._gone[denied] += count
        return found

    def _who(self, key: DenialKey) -> str:
        if not key.policy:
            return OTHERS
        rule = self._rules.rule(key.rule) if key.rule else None
        who = rule.object if rule is not None else ", ".join(self._rules.policies(key.policy))
        if who not in self._named:
            if len(self._named) >= MOST_POLICIES:
                return OTHERS
            self._named.add(who)
        return who
