"""What each manifest file says, as rows of the store: which objects it gives, which it only wishes to give.

Invariants:
- The last good version of an object stays while its document is refused. While a document cannot be told apart at all,
  nothing that its file gave is taken away.
- New rows are in the store before old ones go: an object that moves to another file is never away.
- The store decides who owns an object; what it says is turned into problems for the files that came too late.
"""

from __future__ import annotations

from collections.abc import Container

from waggle.model.objects import Service
from waggle.sources.cluster_addresses import ClusterAddresses
from waggle.sources.problem import Problem
from waggle.sources.yaml_objects import Identity, Manifest, Placed
from waggle.store.store import Store

_ORIGIN = "file:"


class ManifestRows:
    """The rows of one directory's files. A file is named by its absolute path."""

    def __init__(self, store: Store, addresses: ClusterAddresses | None = None) -> None:
        """`addresses` gives Services the cluster addresses they come without."""
        self._store = store
        self._addresses = addresses
        self._files: dict[str, dict[Identity, Placed]] = {}
        self._leaving: list[tuple[str, Identity]] = []
        #: Given by a file while another origin owned it.
        self._contested: set[tuple[str, Identity]] = set()

    def __len__(self) -> int:
        """Number of objects that files give, those that are not used included."""
        return sum(map(len, self._files.values()))

    def update(self, file: str, manifest: Manifest) -> list[Problem]:
        """Make `manifest` what `file` says; what it no longer says goes at `commit`. The refusals, as problems."""
        before = self._files.get(file, {})
        refused = {refusal.identity for refusal in manifest.refusals}
        now = self._completed(manifest.objects)
        for identity, placed in before.items():
            if identity not in now and (None in refused or identity in refused):
                now[identity] = placed
            elif identity in now and now[identity].obj == placed.obj:
                now[identity] = Placed(placed.obj, now[identity].line)  # one copy in memory, the store's
        for identity, placed in now.items():
            self._store.upsert(placed.obj, _ORIGIN + file)
            if self._store.owner(*identity) != _ORIGIN + file:
                self._contested.add((file, identity))
        self._leaving += [(file, identity) for identity in before.keys() - now.keys()]
        if now:
            self._files[file] = now
        else:
            self._files.pop(file, None)
        return [
            Problem(
                error.subject,
                error.reason + _kept(refusal.identity, manifest, before),
                error.file,
                error.line,
            )
            for refusal in manifest.refusals
            for error in refusal.errors
        ]

    def _completed(self, objects: dict[Identity, Placed]) -> dict[Identity, Placed]:
        now = dict(objects)
        if self._addresses is not None:
            services = [placed.obj for placed in objects.values() if isinstance(placed.obj, Service)]
            for key, service in self._addresses.complete(services).items():
                identity = Identity("Service", key)
                now[identity] = Placed(service, now[identity].line)
        return now

    def remove(self, file: str) -> None:
        """The file is gone; its objects go at `commit`."""
        self._leaving += [(file, identity) for identity in self._files.pop(file, {})]

    def commit(self) -> None:
        """Take away what files no longer say."""
        for file, identity in self._leaving:
            self._store.delete(identity.kind, identity.key, _ORIGIN + file)
            gone = identity.kind == "Service" and identity.key not in self._store.services
            if gone and self._addresses is not None:
                self._addresses.release(identity.key)
        self._leaving.clear()
        self._contested = {
            (file, identity)
            for file, identity in self._contested
            if identity in self._files.get(file, {}) and self._store.owner(*identity) != _ORIGIN + file
        }

    def duplicates(self, ignoring: Container[str]) -> dict[str, list[Problem]]:
        """Per file, the objects that are not used because another origin gave them first.

        A first file among `ignoring` is about to go, and then there is no problem.
        """
        found: dict[str, list[Problem]] = {}
        for file, identity in self._contested:
            owner = self._store.owner(*identity)
            placed = self._files.get(file, {}).get(identity)
            if owner is None or owner == _ORIGIN + file or placed is None:
                continue
            first = owner.removeprefix(_ORIGIN)
            if first in ignoring:
                continue
            reason = f"is given by {self._where(first, identity)} already; this one is not used"
            found.setdefault(file, []).append(Problem(str(identity), reason, file, placed.line))
        return found

    def line_of(self, identity: Identity) -> int | None:
        """The line of an object in the file that owns it."""
        owner = self._store.owner(*identity) or ""
        placed = self._files.get(owner.removeprefix(_ORIGIN), {}).get(identity)
        return placed.line if placed is not None else None

    def _where(self, first: str, identity: Identity) -> str:
        placed = self._files.get(first, {}).get(identity)
        return f"{first}:{placed.line}" if placed is not None and placed.line else first


def _kept(identity: Identity | None, manifest: Manifest, before: dict[Identity, Placed]) -> str:
    """What becomes of the good version there was, for the end of a refusal."""
    if identity is None and any(known not in manifest.objects for known in before):
        return " (nothing that this file gave is taken away meanwhile)"
    if identity in before and identity not in manifest.objects:
        return " (the last good version stays in force)"
    return ""
