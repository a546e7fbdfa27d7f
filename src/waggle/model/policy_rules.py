"""How a rule of a policy is named: in tables and events by a number, to people by object, direction and index.

The number is a hash of the name, so that a restart, another node and an event read later all mean the same rule.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from waggle.model.meta import ObjectKey

#: No rule decided: the default of an isolated pod, or of one that nothing isolates.
NO_RULE = 0


class Direction(StrEnum):
    """Seen from the pod that a policy selects, with the names of policyTypes."""

    INGRESS = "Ingress"
    EGRESS = "Egress"


@dataclass(frozen=True, slots=True)
class RuleRef:
    """A rule: the kind and key of its object, its place in the list of its direction, its own name where it has one."""

    kind: str
    key: ObjectKey
    direction: Direction
    index: int
    name: str = ""

    @property
    def id(self) -> int:
        """What stands for the rule in tables and events."""
        return rule_id(self.kind, self.key, self.direction, self.index)

    def __str__(self) -> str:
        name = f" {self.name!r}" if self.name else ""
        return f"{self.kind} {self.key} {self.direction.lower()}[{self.index}]{name}"


def rule_id(kind: str, key: ObjectKey, direction: Direction, index: int) -> int:
    """32 bits that name a rule; never NO_RULE. There is a slash before the name also where there is no namespace."""
    text = f"{kind} {key.namespace}/{key.name} {direction} {index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") or 1
