"""What a source could not use, told to people: in `waggle status`, once in the log, and as a count.

A problem is never an exception: the source goes on with everything else. `ProblemSet` keeps the problems of one source
by scope (a file, a watch), so that reporting a scope again replaces what it said before. Invariant: a problem that is
reported again unchanged keeps its `since` and is not logged a second time.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or worth knowing.

    `subject` is what it is about ("Service default/web", "manifests"); `file` and `line` (1-based) say where it was
    read, None where it has no file; `since` is in Unix seconds.
    """

    subject: str
    reason: str
    file: str | None = None
    line: int | None = None
    since: float = field(default_factory=time.time, compare=False)

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        return f"{where}{self.subject}: {self.reason}" if self.subject else f"{where}{self.reason}"


class ProblemSet:
    """The problems one source has now, by scope."""

    def __init__(self, logger: logging.Logger, level: int = logging.WARNING) -> None:
        self._logger = logger
        self._level = level
        self._by_scope: dict[str, tuple[Problem, ...]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_scope.values()))

    def report(self, scope: str, problems: Iterable[Problem]) -> None:
        """Make `problems` all that is wrong with `scope`. New ones are logged; when the last is gone, that too."""
        # A problem that only moved to another line is the same problem.
        before = {(known.subject, known.reason): known for known in self._by_scope.get(scope, ())}
        now: list[Problem] = []
        for problem in problems:
            known = before.get((problem.subject, problem.reason))
            if known is None:
                self._logger.log(self._level, "%s", problem)
                now.append(problem)
            else:
                now.append(dataclasses.replace(problem, since=known.since))
        if now:
            self._by_scope[scope] = tuple(now)
        elif self._by_scope.pop(scope, None):
            self._logger.info("%s: no problem any more", scope)

    def clear(self, scope: str) -> None:
        """Nothing is wrong with `scope` any more."""
        self.report(scope, ())

    def all(self) -> list[Problem]:
        """Every problem there is now, in the order of file and line."""
        found = [problem for problems in self._by_scope.values() for problem in problems]
        return sorted(found, key=lambda problem: (problem.file or "", problem.line or 0, problem.subject))
