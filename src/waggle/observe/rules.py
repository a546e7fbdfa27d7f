"""What numbers of rules and of sets of policies stand for: the programs know nothing else of policies.

Whoever plans policies knows, and implements `Rules`; an event is resolved when it is read, since what it names may be
gone when somebody looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class RuleRef:
    """One rule of a policy object. `index` counts the rules of its direction from 0; `file` and `line` (1-based) say
    where the object was read, None where it comes from an API."""

    kind: str
    namespace: str  # "" for objects of the cluster
    name: str
    direction: str  # "ingress", "egress"
    index: int
    file: str | None = None
    line: int | None = None

    @property
    def object(self) -> str:
        """ "NetworkPolicy t/web"."""
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"object": self.object, "direction": self.direction, "index": self.index}
        if self.file is not None:
            found |= {"file": self.file, "line": self.line}
        return found


class Rules(Protocol):
    """Resolves what policy events carry."""

    def rule(self, number: int) -> RuleRef | None:
        """The rule with this number; None for 0, and for one that is not known, or not any more."""

    def policies(self, number: int) -> tuple[str, ...]:
        """The policy objects that a set is made of, as `RuleRef.object` names them; () for a set that is not known."""


class NoRules:
    """Where there are no policies."""

    def rule(self, number: int) -> RuleRef | None:
        return None

    def policies(self, number: int) -> tuple[str, ...]:
        return ()
