"""One command at a time may change a lab.

The lock is flock(2) on a file beside the lab's run directory: the kernel lets go of it when its holder dies, however
it dies. `down` removes the file while holding it, so whoever gets a lock checks that the file is still the one at
that path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from waggle.errors import LabError
from waggle.lab.layout import LabLayout

Say = Callable[[str], None]
"""Tells the user what is going on, one line per call."""


@contextmanager
def lab_lock(lab: LabLayout, say: Say, *, wait: float = 120.0) -> Iterator[None]:
    """Holds the lab for the `with`. Raises LabError when somebody else still holds it after `wait` seconds."""
    descriptor = _acquire(lab, say, time.monotonic() + wait)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(lab: LabLayout, say: Say, deadline: float) -> int:
    lab.lock.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    told = False
    while True:
        descriptor = os.open(lab.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lab):
                return descriptor
            os.close(descriptor)  # removed by a `down` that ended meanwhile: take the new file
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise LabError(f"cannot lock {lab.lock}: {error.strerror}") from error
        if time.monotonic() > deadline:
            raise LabError(f"another command has been working on lab {lab.name!r} all the time; try again later")
        if not told:
            say(f"waiting: another command is working on lab {lab.name!r}")
            told = True
        time.sleep(0.1)


def _is_at(descriptor: int, lab: LabLayout) -> bool:
    ours = os.fstat(descriptor)
    try:
        there = lab.lock.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
