"""Processes by descriptor (pidfd): ending one, and copies of the sockets it listens on."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
from pathlib import Path

from waggle.kernel.syscall import Fd

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_SYS_PIDFD_GETFD = 438  # on every architecture


def kill(pid: int, seconds: float = 2.0) -> None:
    """Kills a process and waits until it is gone. One that is gone already is no error."""
    try:
        with Fd(os.pidfd_open(pid)) as process:
            signal.pidfd_send_signal(process.number, signal.SIGKILL)
            wait_gone(process, seconds)
    except ProcessLookupError:
        return


def wait_gone(process: Fd, seconds: float) -> bool:
    """Whether a process ends within so many seconds."""
    poller = select.poll()
    poller.register(process.number, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def listening_sockets(pid: int) -> list[socket.socket]:
    """Copies of the TCP sockets that a process listens on. Raises OSError where the kernel does not give them."""
    found = []
    for one in sockets(pid):
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            found.append(one)
        else:
            one.close()
    return found


def sockets(pid: int) -> list[socket.socket]:
    """Copies of all sockets of a process but unix ones. Raises OSError where the kernel does not give them."""
    found: list[socket.socket] = []
    with Fd(os.pidfd_open(pid)) as process:
        for entry in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name)):
            if not str(entry.readlink()).startswith("socket:"):
                continue
            copy = _libc.syscall(_SYS_PIDFD_GETFD, process.number, int(entry.name), 0)
            if copy < 0:
                for one in found:
                    one.close()
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            one = socket.socket(fileno=copy)
            if one.family != socket.AF_UNIX:
                found.append(one)
            else:
                one.close()
    return found
