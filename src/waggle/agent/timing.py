"""How long changes take until the maps hold them, per Service (kube-proxy's network programming latency)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from waggle.model.objects import ObjectKey


class ChangeTimes:
    """`noticed` when the store changes, `take` what changed, `written` when a Service's rows are in the maps.

    Times are those of the wall: the cause of a change happened on another machine. What happened before `started`
    was not ours to program, and does not count.
    """

    def __init__(self, started: float, clock: Callable[[], float] = time.time) -> None:
        self._started = started
        self._clock = clock
        self._seen: float | None = None
        self._waiting: dict[ObjectKey, list[float]] = {}

    def noticed(self) -> None:
        """Something has changed; the first time since `take` counts."""
        if self._seen is None:
            self._seen = self._clock()

    def take(self, triggers: Mapping[ObjectKey, Sequence[str]], *, initial: bool) -> None:
        """`triggers`: what `Changes` holds. `initial`: these are first lists, in which only a time given says when."""
        seen, self._seen = self._seen, None
        for key, texts in triggers.items():
            found = [_parse(text) if text else None if initial else seen for text in texts]
            since = [at for at in found if at is not None and at >= self._started]
            if since:
                self._waiting.setdefault(key, []).extend(since)

    def written(self, key: ObjectKey) -> list[float]:
        """Seconds that each change took; clocks of two machines may differ, but nothing takes less than no time."""
        now = self._clock()
        return [max(now - at, 0.0) for at in self._waiting.pop(key, ())]


def _parse(text: str) -> float | None:
    """Seconds since the epoch of an RFC 3339 time; None for anything else."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
