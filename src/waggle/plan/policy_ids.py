"""Ids that are made of what they stand for."""

from __future__ import annotations

from collections.abc import Callable

from waggle.plan.policy_predicates import hash64
from waggle.plan.policy_tables import ANY, NOBODY, SELF

_RESERVED = frozenset((NOBODY, SELF, ANY))  # as ids of sets: OPEN, PENDING


class PolicyIds:
    """The ids in use. Two texts with one hash would be one entry in the maps: the second gets the hash of a longer
    text.

    Somebody who looks for it can find such a pair in about 2^32 hashes.
    """

    def __init__(self, hashed: Callable[[str], int] = hash64) -> None:
        self._hashed = hashed
        self._taken: set[int] = set()

    def take(self, text: str, *, odd: bool | None = None) -> int:
        """An id for a text that has none now; `odd`: its lowest bit says something."""
        found = self._of(text, odd)
        while found in _RESERVED or found in self._taken:
            text += "#"
            found = self._of(text, odd)
        self._taken.add(found)
        return found

    def _of(self, text: str, odd: bool | None) -> int:
        found = self._hashed(text)
        return found if odd is None else found & ~1 | odd

    def drop(self, taken: int) -> None:
        """What had the id is no more."""
        self._taken.discard(taken)
