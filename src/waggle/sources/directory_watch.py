"""What changed in a directory, from inotify: names, or "look at everything".

Invariants:
- Events are hints. Whoever gets one looks at the file; a lost, doubled or late hint does no harm because everything is
  looked at again from time to time.
- A hint for a file says whether its writer has just closed it (or renamed it into place): then it is complete.
- The directory may be missing, may be replaced (by a rename, or as the target of a symlink), and may hold symlinks:
  its nearest existing parent and the directories that symlinks lead to are watched as well.
- Where inotify cannot be had, `problem` says why and the caller polls.
"""

from __future__ import annotations

import asyncio
import errno
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from asyncinotify import Event, Inotify, Mask, Watch

_FILES = (
    Mask.CLOSE_WRITE
    | Mask.MOVED_TO
    | Mask.MOVED_FROM
    | Mask.DELETE
    | Mask.CREATE  # symlinks and hard links are never closed after writing
    | Mask.ATTRIB  # chmod can make a file readable
    | Mask.DELETE_SELF
    | Mask.MOVE_SELF
    | Mask.ONLYDIR
)
_NAMES = Mask.CREATE | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.DELETE | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.ONLYDIR
_LOST = Mask.IGNORED | Mask.DELETE_SELF | Mask.MOVE_SELF | Mask.UNMOUNT
#: Several agents share these limits; what a full table means for the user.
_LIMITS = {
    errno.EMFILE: "no inotify instance is left (raise fs.inotify.max_user_instances)",
    errno.ENOSPC: "no inotify watch is left (raise fs.inotify.max_user_watches)",
}
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP)
_EVENTS_PER_READ = 256


@dataclass(slots=True)
class Hints:
    """Names in the directory that may have changed; `everything` when any may have.

    The value of a name is True where its last writer has just closed it, or it was renamed into place.
    """

    names: dict[str, bool] = field(default_factory=dict)
    everything: bool = False

    def __bool__(self) -> bool:
        return self.everything or bool(self.names)


class _Inode(NamedTuple):
    device: int
    number: int


class _Place(NamedTuple):
    """A directory to watch. `names` are the entries that matter; None for all of them."""

    path: Path
    names: frozenset[str] | None


class DirectoryWatch:
    """Use as an async context manager; call `rewatch` before each look at the whole directory, and `next` for ever."""

    def __init__(self, directory: Path) -> None:
        #: Why changes are not noticed at once; "" where they are.
        self.problem = ""
        self._directory = directory
        self._hints = Hints()
        self._woken = asyncio.Event()
        self._inotify: Inotify | None = None
        self._reader: asyncio.Task[None] | None = None
        # By inode, because two paths may lead to one directory, which has one watch.
        self._watches: dict[_Inode, tuple[Watch, _Place]] = {}
        self._places: dict[int, _Place] = {}  # the same by watch descriptor

    async def __aenter__(self) -> Self:
        try:
            self._inotify = Inotify(cache_size=_EVENTS_PER_READ)
        except OSError as error:
            self._say(error)
            return self
        # A task of its own: cancelling asyncinotify's `get`, as a timeout would, loses the events just read.
        self._reader = asyncio.create_task(self._read_events(self._inotify), name=f"inotify {self._directory}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._inotify is not None:
            self._inotify.close()

    async def next(self, timeout: float) -> Hints:
        """The hints since the last call; waits up to `timeout` seconds for the first. Raises what ended the reader."""
        if not self._hints:
            try:
                # Not wait_for: before Python 3.12 it loses a cancellation that comes together with the event.
                async with asyncio.timeout(timeout):
                    await self._woken.wait()
            except TimeoutError:
                pass  # nothing happened, which is an answer
        if self._reader is not None and self._reader.done():
            self._reader.result()
        self._woken.clear()
        hints, self._hints = self._hints, Hints()
        return hints

    def rewatch(self, link_targets: Iterable[Path]) -> None:
        """Put the watches where they belong now. What changes after this call gives a hint.

        `link_targets` are the directories that symlinks in the directory lead to.
        """
        if self._inotify is None:
            return
        self.problem = ""
        wanted = self._wanted(link_targets)
        for inode in self._watches.keys() - wanted.keys():
            self._forget(self._inotify, inode)
        for inode, place in wanted.items():
            known = self._watches.get(inode)
            if known is not None and known[1] == place:
                continue
            mask = _FILES if place.names is None else _NAMES
            try:
                watch = self._inotify.add_watch(place.path, mask)
            except OSError as error:
                if error.errno not in _ABSENT:
                    self._say(error)
                continue
            self._watches[inode] = (watch, place)
            self._places[watch.wd] = place

    def _wanted(self, link_targets: Iterable[Path]) -> dict[_Inode, _Place]:
        wanted: dict[_Inode, _Place] = {}
        for path in (self._directory, *link_targets):
            if inode := _directory_inode(path):
                wanted.setdefault(inode, _Place(path, None))
        # Upwards to the first parent that exists: there the missing part will appear, or be replaced.
        below = self._directory
        for parent in self._directory.parents:
            if inode := _directory_inode(parent):
                wanted.setdefault(inode, _Place(parent, frozenset({below.name})))
                break
            below = parent
        return wanted

    def _forget(self, inotify: Inotify, inode: _Inode) -> None:
        watch, _ = self._watches.pop(inode)
        self._places.pop(watch.wd, None)
        try:
            inotify.rm_watch(watch)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: the directory is gone, and the watch went with it
                raise

    def _say(self, error: OSError) -> None:
        reason = _LIMITS.get(error.errno or 0, f"inotify does not work here: {error.strerror}")
        self.problem = f"changes are noticed late: {reason}"

    # -- events ---------------------------------------------------------------------------------------------------

    async def _read_events(self, inotify: Inotify) -> None:
        try:
            while True:
                self._take(await inotify.get())
        finally:
            self._woken.set()

    def _take(self, event: Event) -> None:
        if Mask.Q_OVERFLOW in event.mask:
            self._hint_everything()
            return
        watch = event.watch
        place = self._places.get(watch.wd) if watch is not None else None
        if watch is None or place is None:
            return  # of a watch that was given up
        if event.mask & _LOST:
            if Mask.IGNORED in event.mask:
                del self._places[watch.wd]
                self._watches = {inode: known for inode, known in self._watches.items() if known[0].wd != watch.wd}
            self._hint_everything()
            return
        name = str(event.name) if event.name is not None else ""
        if place.names is not None:
            if name in place.names:
                self._hint_everything()
        elif place.path != self._directory or not name or name.startswith(".."):
            # Names that begin with ".." are the machinery of Kubernetes volumes: `..data` changes what all links mean.
            self._hint_everything()
        else:
            closed = bool(event.mask & (Mask.CLOSE_WRITE | Mask.MOVED_TO))
            self._hints.names[name] = closed or self._hints.names.get(name, False)
            self._woken.set()

    def _hint_everything(self) -> None:
        self._hints.everything = True
        self._woken.set()


def _directory_inode(path: Path) -> _Inode | None:
    try:
        status = path.stat()
    except OSError:
        return None  # absent, or not ours to see: the watch on its parent tells when that changes
    return _Inode(status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None
