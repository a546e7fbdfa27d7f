"""The latest events, in as much memory as the setting allows."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator

from waggle.observe.events import Seen

_PLAIN_BYTES = 360  # of an event without names, in CPython
_TEXT_BYTES = 49


def size_of(seen: Seen) -> int:
    """Bytes that an event takes, were its names all its own. A test measures it."""
    names = (seen.source, seen.destination, seen.backend, seen.service)
    return _PLAIN_BYTES + sum(_TEXT_BYTES + len(name) for name in names if name)


class History:
    """Oldest first. An event's id is good for as long as it is here: those of another agent's life mean nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self._events: deque[Seen] = deque()
        self._limit = limit_bytes
        self.memory_bytes = 0  # what the events take, at most
        self._life = secrets.token_hex(2)

    def __len__(self) -> int:
        return len(self._events)

    def add(self, seen: Seen) -> None:
        """The oldest makes room."""
        self._events.append(seen)
        self.memory_bytes += size_of(seen)
        while self.memory_bytes > self._limit:
            self.memory_bytes -= size_of(self._events.popleft())

    def identity(self, seen: Seen) -> str:
        """ "9f3a-17": what `find` knows it by."""
        return f"{self._life}-{seen.number}"

    def find(self, identity: str) -> Seen | None:
        """The event with this id; None where it is not here any more, or never was."""
        life, _, number = identity.partition("-")
        if life != self._life or not (number.isascii() and number.isdigit()) or not self._events:
            return None
        index = int(number) - self._events[0].number
        return self._events[index] if 0 <= index < len(self._events) else None

    def newest_first(self) -> Iterator[Seen]:
        """All of them as they are now, whatever comes while they are looked at."""
        return reversed(list(self._events))
