"""Sockets that outlive the agent: a process in a cgroup of its own does nothing but hold them.

What is asked while no agent is there waits in the sockets until the next one reads it, instead of being refused: a
client that is refused asks the next resolver, which calls names of Services missing. The next agent takes copies of the
sockets. Whatever goes wrong with the process, the sockets work; only a restart is then a gap.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from waggle.errors import KernelError
from waggle.kernel import pidfd
from waggle.kernel.netns import netns_cookie_of, netns_cookie_of_self
from waggle.kernel.sockets import bound_sockets, socket_owners
from waggle.reconcile.health_process import remove_cgroup

log = logging.getLogger(__name__)

NAME = "waggle-dns"
_BUFFER = 1 << 20  # questions that come while nobody reads
_KINDS = (socket.SOCK_DGRAM, socket.SOCK_STREAM)


class HeldSockets:
    """Of one node. `cgroup_root` is where the process gets its cgroup."""

    def __init__(self, cgroup_root: Path) -> None:
        self._cgroup = cgroup_root / NAME

    def take(self, addresses: Sequence[str], port: int) -> list[socket.socket]:
        """UDP and TCP sockets on each address: those that are held already, else new ones, held from now on.

        Raises OSError with what is in the way.
        """
        held = self._held()
        if {_place(one) for one in held} == {(address, port, kind) for address in addresses for kind in _KINDS}:
            log.info("taking over the sockets of the agent before")
            return held
        for one in held:
            one.close()
        self.end()
        made = bind_all(addresses, port)
        try:
            self._hold(made)
        except (OSError, KernelError) as error:
            log.warning("names will not be resolved while the agent restarts: cannot keep its sockets: %s", error)
        return made

    def end(self) -> None:
        """Nothing is held any more."""
        for pid in holders(self._cgroup):
            pidfd.kill(pid)
        remove_cgroup(self._cgroup)

    def _held(self) -> list[socket.socket]:
        found: dict[tuple[str, int, int], socket.socket] = {}
        here = netns_cookie_of_self()
        for pid in holders(self._cgroup):
            try:
                copies = pidfd.sockets(pid)
            except OSError as error:
                log.warning("cannot take the sockets of process %d: %s", pid, error.strerror)
                continue
            for one in copies:
                if netns_cookie_of(one) != here or _place(one) in found:
                    one.close()
                    continue
                one.setblocking(False)
                found[_place(one)] = one
        return list(found.values())

    def _hold(self, sockets: Sequence[socket.socket]) -> None:
        self._cgroup.mkdir(exist_ok=True)
        numbers = [one.fileno() for one in sockets]
        process = subprocess.Popen(
            ["sleep", "infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=numbers,
            start_new_session=True,
            cwd="/",
            env={"PATH": os.defpath},
        )
        try:
            (self._cgroup / "cgroup.procs").write_text(str(process.pid))
        except OSError:
            process.kill()
            process.wait()
            raise
        process.returncode = 0  # it is the node's from now on: nobody waits for it


def holders(cgroup: Path) -> list[int]:
    """The processes that hold sockets."""
    try:
        return [int(line) for line in (cgroup / "cgroup.procs").read_text().split()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def bind_all(addresses: Sequence[str], port: int) -> list[socket.socket]:
    """A UDP and a TCP socket on each address, the latter listening. OSError names who is there already."""
    made: list[socket.socket] = []
    for address in addresses:
        for kind in _KINDS:
            try:
                made.append(_bound(address, port, kind))
            except OSError as error:
                for one in made:
                    one.close()
                reason = os.strerror(error.errno or 0) + _who_is_on(port)
                raise OSError(error.errno, f"cannot listen on {address} port {port}: {reason}") from error
    return made


def _bound(address: str, port: int, kind: socket.SocketKind) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    try:
        if kind == socket.SOCK_STREAM:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an agent before this one
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        bound.bind((address, port))
        if kind == socket.SOCK_STREAM:
            bound.listen(128)
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound


def _place(one: socket.socket) -> tuple[str, int, int]:
    address, port = one.getsockname()[:2]
    return address, port, one.type


def _who_is_on(port: int) -> str:
    """As the end of a sentence."""
    found = sorted(set(socket_owners(one.inode for one in bound_sockets() if one.port == port).values()))
    return f": {', '.join(found)} is there" if found else ""
