"""What Services need of a table whose entries never change: each is there for as long as somebody needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Generic, TypeVar

from waggle.model.objects import ObjectKey

K = TypeVar("K")
V = TypeVar("V")


class Claims(Generic[K, V]):
    """Keeps count; its owner writes `missing` before, and removes `unused` after, what refers to the entries.

    `present`: keys that the table holds. `missing`: those that are needed and not there, with what they are made of.
    """

    def __init__(self) -> None:
        self.present: set[K] = set()
        self.missing: dict[K, V] = {}
        self.unused: set[K] = set()
        self._of: dict[ObjectKey, Mapping[K, V]] = {}
        self._users: Counter[K] = Counter()

    def complete(self) -> None:
        """The plan has seen every Service: what none of them claimed goes."""
        self.unused |= self.present - self._users.keys()

    def claim(self, service: ObjectKey, wanted: Mapping[K, V]) -> None:
        """Makes `wanted` what a Service needs."""
        before = self._of.pop(service, {})
        if wanted:
            self._of[service] = wanted
        for key in wanted.keys() - before.keys():
            self._users[key] += 1
            self.unused.discard(key)
            if key not in self.present:
                self.missing[key] = wanted[key]
        for key in before.keys() - wanted.keys():
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self.missing.pop(key, None)
                self.unused.add(key)

    def written(self, key: K) -> None:
        """An entry that was missing is there."""
        self.present.add(key)
        self.missing.pop(key, None)

    def needed(self) -> set[K]:
        """What is there and needed."""
        return self.present & self._users.keys()

    def owners(self, key: K) -> list[ObjectKey]:
        """The Services that need an entry."""
        return sorted(service for service, keys in self._of.items() if key in keys)
