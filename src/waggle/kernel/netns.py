"""Running code in another network namespace, and telling namespaces apart.

setns(2) changes one thread only. So a function that must run elsewhere gets a thread of its own that enters the
namespace, runs it and ends: no thread of the agent is ever left in a foreign namespace, not even when the function
raises. Sockets keep the namespace they were made in, so it is enough to *make* a socket here and use it anywhere.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from waggle.errors import KernelError, NotFound

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703  # _IO(0xb7, 3), include/uapi/linux/nsfs.h
_SO_NETNS_COOKIE = 71

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)


@contextmanager
def open_netns(path: str | Path) -> Iterator[int]:
    """A file descriptor of the network namespace at `path`, closed at the end of the `with`.

    Raises NotFound where nothing is at `path`, KernelError where it is not a network namespace.
    """
    try:
        # O_NONBLOCK: a FIFO put at this path must not hang the caller.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"network namespace {path} does not exist", error.errno or 0) from error
    except OSError as error:
        raise KernelError(f"cannot open network namespace {path}: {error.strerror}", error.errno or 0) from error
    except ValueError as error:  # a NUL in the path
        raise KernelError(f"cannot open network namespace {path!r}: {error}", errno.EINVAL) from error
    try:
        try:
            kind = fcntl.ioctl(descriptor, _NS_GET_NSTYPE)
        except OSError as error:
            raise KernelError(f"{path} is not a network namespace", error.errno or 0) from error
        if kind != _CLONE_NEWNET:
            raise KernelError(f"{path} is a namespace, but not a network namespace", errno.EINVAL)
        yield descriptor
    finally:
        os.close(descriptor)


def call_in_netns(path: str | Path, function: Callable[[], T]) -> T:
    """`function()` as run by a fresh thread inside the network namespace at `path`.

    Returns its result or raises its exception. NotFound and KernelError as of `open_netns`.
    """
    with open_netns(path) as descriptor:
        return call_in_netns_fd(descriptor, function, name=str(path))


def call_in_netns_fd(descriptor: int, function: Callable[[], T], *, name: str = "") -> T:
    """As `call_in_netns`, for a namespace that is open already. `name` is only for error messages."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
                number = ctypes.get_errno()
                what = name or f"fd {descriptor}"
                raise KernelError(f"cannot enter network namespace {what}: {os.strerror(number)}", number)
            results.append(function())
        except BaseException as error:  # handed to the caller, whatever it is
            failures.append(error)

    thread = threading.Thread(target=run, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def netns_cookie_of_self() -> int:
    """The cookie of the calling thread's network namespace: unique until reboot, the same that BPF sees."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return netns_cookie_of(sock)


def netns_cookie_of(sock: socket.socket) -> int:
    """The cookie of the network namespace that a socket was made in."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


def netns_id(path: str | Path) -> tuple[int, int]:
    """(st_dev, st_ino) of the namespace: equal for two paths exactly when both name the same namespace.

    Raises NotFound where nothing is at `path`.
    """
    try:
        status = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"network namespace {path} does not exist", error.errno or 0) from error
    except OSError as error:
        raise KernelError(f"cannot look at network namespace {path}: {error.strerror}", error.errno or 0) from error
    except ValueError as error:
        raise KernelError(f"cannot look at network namespace {path!r}: {error}", errno.EINVAL) from error
    return status.st_dev, status.st_ino
