"""Reading one manifest file, complete or not at all.

Invariants:
- A file that somebody has open for writing is not read: its end may be missing, and at the end of a document that would
  look like objects being deleted.
- Nothing blocks: what is not a regular file (a pipe named x.yaml) is not read from.
- Unchanged files cost one stat.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from waggle.sources.yaml_objects import MAX_FILE_SIZE, Manifest, parse_manifest, too_large

#: Where leases do not work, a file that was written less than this many seconds ago may be in the middle of it.
_SETTLED_AFTER = 1.0


class Signature(NamedTuple):
    """What changes when the content of a path does."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class Absent(Enum):
    """Why there is nothing to parse."""

    GONE = "gone"
    BUSY = "busy"  # being written
    SAME = "same"  # as at the last reading


@dataclass(frozen=True, slots=True)
class Unusable:
    """The path is there and cannot be read. `transient`: it may be, later, without the path changing."""

    reason: str
    transient: bool = False


@dataclass(frozen=True, slots=True)
class Parsed:
    manifest: Manifest
    signature: Signature


Reading = Parsed | Unusable | Absent


def read_manifest(path: Path, shown: str, known: Signature | None = None, closed: bool = False) -> Reading:
    """What `path` says now. `shown` is its name for people.

    With `known`, a file that still has this signature is not read again. `closed` tells that a writer has just closed
    the file, so that a fresh modification time does not matter.
    """
    try:
        if known is not None and _signature(os.stat(path)) == known:  # noqa: PTH116  # 3x cheaper than Path.stat
            return Absent.SAME
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        return _unreadable(path, error)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return Unusable("not a regular file")
        if _being_written(descriptor, status, closed):
            return Absent.BUSY
        signature = _signature(status)
        if status.st_size > MAX_FILE_SIZE:
            return Parsed(Manifest(refusals=[too_large(shown, status.st_size)]), signature)
        data = _read_all(descriptor)
        if _signature(os.fstat(descriptor)) != signature:
            return Absent.BUSY
    except OSError as error:
        return Unusable(f"cannot be read: {error.strerror}", transient=True)
    finally:
        os.close(descriptor)
    return Parsed(parse_manifest(data, shown), signature)


def _unreadable(path: Path, error: OSError) -> Reading:
    if error.errno == errno.ENOENT and not path.is_symlink():
        return Absent.GONE
    if error.errno == errno.ENOENT:
        return Unusable(f"is a symlink to {os.readlink(path)}, which does not exist")  # noqa: PTH115
    return Unusable(f"cannot be read: {error.strerror}", transient=True)


def _signature(status: os.stat_result) -> Signature:
    return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _being_written(descriptor: int, status: os.stat_result, closed: bool) -> bool:
    """Whether some process has the file open for writing.

    The kernel tells through leases: a read lease is granted only while nobody has (fcntl(2)). It is given back at
    once, because a writer that opens the file meanwhile has to wait for it.
    """
    try:
        # The holder of a lease that is being broken gets SIGIO, which kills; SIGURG is ignored by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        # No leases here (network file systems, a file of another user): go by the time of the last write.
        return not closed and 0 <= time.time() - status.st_mtime < _SETTLED_AFTER
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _read_all(descriptor: int) -> bytes:
    """The file's content; one byte more than MAX_FILE_SIZE at most, which the parser then refuses."""
    parts: list[bytes] = []
    left = MAX_FILE_SIZE + 1
    while left > 0 and (part := os.read(descriptor, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)
