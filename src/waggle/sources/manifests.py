"""A directory of Kubernetes YAML, watched: the source that needs no cluster.

Every `*.yaml`, `*.yml` and `*.json` in the directory itself is read (no subdirectories, no hidden files). Invariants:

- What cannot be read says nothing, which is not the same as saying that there is nothing. The last good version of an
  object stays while its document is broken, its file is being written or unreadable, or the directory is missing.
- Objects go when their document is gone from a good file, or their file is gone from the directory for longer than
  `grace`: editors and `git checkout` replace a file by removing it first.
- An object that two files give belongs to the one that gave it first (at start: the first by name) until it goes there.
- All files that changed together are applied together: objects appear before others disappear, without a moment
  between in which the event loop runs, so an object that moves to another file is never away.
- `synced` is set when the directory has been read once. While it is missing from the start, there is no view.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from waggle.model.objects import ObjectKey
from waggle.sources.cluster_addresses import ClusterAddresses
from waggle.sources.directory_watch import DirectoryWatch, Hints
from waggle.sources.manifest_file import Absent, Parsed, Reading, Signature, Unusable, read_manifest
from waggle.sources.manifest_rows import ManifestRows
from waggle.sources.problem import Problem, ProblemSet
from waggle.sources.yaml_objects import Identity
from waggle.store.store import Store

SUFFIXES = (".yaml", ".yml", ".json")

_LOG = logging.getLogger(__name__)
_SUBJECT = "manifests"
#: A file that is being written when waggle starts holds up `synced` for this long at most, in seconds.
_WAIT_FOR_WRITERS = 5.0
_RETRY_BUSY = 1.0
_LONG_WRITE = 10.0
_POLL = 2.0  # between scans where inotify cannot be had
#: More than this is read and parsed in a thread: bytes, files.
_INLINE_BYTES = 64 << 10
_INLINE_FILES = 8


@dataclass(frozen=True, slots=True)
class _Request:
    """A file to read."""

    name: str
    known: Signature | None
    closed: bool


class ManifestSource:
    """Keeps the store equal to the manifests in `directory`.

    `grace` is how long a file may be away before its objects go; `resync` is how often everything is looked at without
    a hint from the kernel. Both in seconds. `addresses` gives Services the cluster addresses they come without.
    """

    def __init__(
        self,
        store: Store,
        directory: Path,
        *,
        addresses: ClusterAddresses | None = None,
        grace: float = 0.25,
        resync: float = 60.0,
    ) -> None:
        self.synced = asyncio.Event()
        self.policies_synced = self.synced  # files hold everything at once
        self._directory = directory.absolute()
        self._grace = grace
        self._resync = resync
        self._addresses = addresses
        self._rows = ManifestRows(store, addresses)
        self._signatures: dict[str, Signature | None] = {}  # of every file that is known, by name
        self._busy: dict[str, float] = {}  # name → since when it is known to be open for writing, monotonic
        self._unreadable: set[str] = set()  # names that are tried again: no descriptors were left, the disk failed
        self._leaving: dict[str, float] = {}  # name → when its objects go, on the monotonic clock
        self._with_duplicates: set[str] = set()
        self._link_targets: set[Path] = set()
        self._next_scan = 0.0
        self._started = 0.0
        self._stopping = False
        self._problems = ProblemSet(_LOG)
        self._duplicates = ProblemSet(_LOG)
        self._notes = ProblemSet(_LOG, logging.INFO)

    def problems(self) -> list[Problem]:
        """Everything that is refused or cannot be read now."""
        self._report_duplicates()
        return self._problems.all() + self._duplicates.all() + (self._addresses.problems() if self._addresses else [])

    def notes(self) -> list[Problem]:
        """What is fine but worth knowing: kinds that are passed over, Services without an address."""
        return self._notes.all()

    def line_of(self, kind: str, key: ObjectKey) -> int | None:
        """The line in which an object begins that a file gives; None where none does, or nobody looked for it."""
        return self._rows.line_of(Identity(kind, key))

    async def run(self) -> None:
        """Follow the directory until cancelled."""
        self._started = time.monotonic()
        self._stopping = False
        try:
            async with DirectoryWatch(self._directory) as watch:
                hints = Hints(everything=True)
                while True:
                    await self._look(watch, hints)
                    hints = await watch.next(self._pause())
        finally:
            self._stopping = True

    def _pause(self) -> float:
        """Seconds until something is to be done without a hint."""
        due = [self._next_scan, *self._leaving.values()]
        pause = min(due) - time.monotonic()
        return max(0.0, min(pause, _RETRY_BUSY) if self._busy or self._unreadable else pause)

    # -- one pass -------------------------------------------------------------------------------------------------

    async def _look(self, watch: DirectoryWatch, hints: Hints) -> None:
        """Read what may have changed, then apply it in one go."""
        now = time.monotonic()
        names = {name: closed for name, closed in hints.names.items() if _is_manifest(name)}
        due = [name for name, deadline in self._leaving.items() if deadline <= now]
        for name in (*due, *self._busy, *self._unreadable):
            names.setdefault(name, False)
        links = any((self._directory / name).is_symlink() for name in names)
        if hints.everything or links or now >= self._next_scan or (due and not self._directory.is_dir()):
            listed = self._scan(watch)
            if listed is None:
                return
            names = {name: names.get(name, False) for name in sorted({*listed, *self._signatures, *names})}
        requests = [
            _Request(name, None if closed else self._signatures.get(name), closed) for name, closed in names.items()
        ]
        if self._is_small(requests):
            readings = self._read(requests)
        else:
            readings = await asyncio.to_thread(self._read, requests)
        self._apply(readings)
        if not self._busy or time.monotonic() - self._started > _WAIT_FOR_WRITERS:
            self.synced.set()

    def _scan(self, watch: DirectoryWatch) -> list[str] | None:
        """The names of all manifests, watches being in place; None where the directory cannot be read."""
        watch.rewatch(self._link_targets)
        try:
            with os.scandir(self._directory) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            self._report_unreadable(error)
            self._leaving.clear()
            self._next_scan = time.monotonic() + min(self._resync, _POLL)
            return None
        targets = {
            Path(os.path.realpath(entry.path)).parent
            for entry in entries
            if entry.is_symlink() and _is_manifest(entry.name)
        } - {self._directory}
        if targets != self._link_targets:
            self._link_targets = targets
            watch.rewatch(targets)
        self._next_scan = time.monotonic() + (min(self._resync, _POLL) if watch.problem else self._resync)
        shown = self._shown("")
        self._problems.report(shown, [Problem(_SUBJECT, watch.problem, shown)] if watch.problem else [])
        self._notes.report(shown, [self._subdirectory(entry) for entry in entries if _is_subdirectory(entry)])
        return [entry.name for entry in entries if _is_manifest(entry.name) and not _is_subdirectory(entry)]

    def _subdirectory(self, entry: os.DirEntry[str]) -> Problem:
        return Problem(_SUBJECT, "subdirectories are not read", self._shown(entry.name))

    def _report_unreadable(self, error: OSError) -> None:
        shown = self._shown("")
        what = "the directory does not exist" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        kept = f"; the {len(self._rows)} objects it held stay in force" if len(self._rows) else ""
        self._problems.report(shown, [Problem(_SUBJECT, f"{what}{kept}; waiting for it", shown)])

    def _is_small(self, requests: list[_Request]) -> bool:
        if len(requests) > _INLINE_FILES:
            return False
        size = 0
        for request in requests:
            try:
                size += (self._directory / request.name).stat().st_size
            except OSError:
                continue  # gone: costs nothing, and reading it will say so
        return size <= _INLINE_BYTES

    def _read(self, requests: Iterable[_Request]) -> list[tuple[str, Reading]]:
        """May run in a thread: touches no state but the flag that ends it early."""
        readings: list[tuple[str, Reading]] = []
        for request in requests:
            if self._stopping:
                break
            path = self._directory / request.name
            reading = read_manifest(path, self._shown(request.name), request.known, request.closed)
            if reading is not Absent.SAME or request.name in self._busy or request.name in self._leaving:
                readings.append((request.name, reading))
        return readings

    # -- applying -------------------------------------------------------------------------------------------------

    def _apply(self, readings: Iterable[tuple[str, Reading]]) -> None:
        for name, reading in readings:
            self._unreadable.discard(name)
            if reading is Absent.GONE:
                self._gone(name)
                continue
            self._leaving.pop(name, None)
            file = self._shown(name)
            if reading is Absent.BUSY:
                self._wait_for_writer(name, file)
                continue
            self._written(name)
            if isinstance(reading, Unusable):
                self._signatures[name] = None
                if reading.transient:
                    self._unreadable.add(name)
                self._problems.report(file, [Problem(_SUBJECT, reading.reason, file)])
            elif isinstance(reading, Parsed):
                self._signatures[name] = reading.signature
                self._problems.report(file, self._rows.update(file, reading.manifest))
                self._notes.report(file, reading.manifest.notes)
        self._rows.commit()
        self._report_duplicates()

    def _gone(self, name: str) -> None:
        """The file is not there: its objects go when it has been away for the grace period."""
        self._written(name)
        if name not in self._signatures:
            return
        now = time.monotonic()
        if now < self._leaving.setdefault(name, now + self._grace):
            return
        del self._leaving[name]
        del self._signatures[name]
        file = self._shown(name)
        self._rows.remove(file)
        self._problems.clear(file)
        self._notes.clear(file)

    def _wait_for_writer(self, name: str, file: str) -> None:
        """The file is read when it is closed; until then what it said before stays. Long writes are worth a note."""
        since = self._busy.setdefault(name, time.monotonic())
        if time.monotonic() - since > _LONG_WRITE:
            reason = "a process has had the file open for writing for a long time; it is read when that closes it"
            self._notes.report(f"{file} (open)", [Problem(_SUBJECT, reason, file)])

    def _written(self, name: str) -> None:
        if self._busy.pop(name, None) is not None:
            self._notes.clear(f"{self._shown(name)} (open)")

    def _report_duplicates(self) -> None:
        found = self._rows.duplicates(ignoring={self._shown(name) for name in self._leaving})
        for file in {*self._with_duplicates, *found}:
            self._duplicates.report(file, found.get(file, []))
        self._with_duplicates = set(found)

    def _shown(self, name: str) -> str:
        """The absolute path as people and the store see it: names may be any bytes, logs and JSON may not."""
        path = os.fsencode(self._directory / name).decode(errors="replace")
        return path if path.isprintable() else "".join(char if char.isprintable() else "�" for char in path)


def _is_manifest(name: str) -> bool:
    """Hidden files are left out: editors and atomic writers keep their temporaries there."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def _is_subdirectory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a symlink that loops, say; reading it will say what is wrong
