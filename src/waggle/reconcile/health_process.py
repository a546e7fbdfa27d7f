"""The process that answers health ports (health/waggle-health.c): found, started, replaced, ended.

It belongs to the node, not to an agent: it lives in a cgroup of its own, in a session of its own, and nobody ends it
but an agent that has nothing for it to do, `waggle cleanup` and `waggle lab down`. Which process is the one of a bpf
root shows in the maps it holds, whatever became of sockets and directories; so there is never a second one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from waggle.errors import KernelError
from waggle.kernel import pidfd, syscall
from waggle.kernel.objects import OBJECT_DIR
from waggle.kernel.syscall import Fd

NAME = "waggle-health"
BINARY = OBJECT_DIR / NAME
MAX_PACKET = 64 << 10
PATIENCE_SECONDS = 5.0


class Status(NamedTuple):
    """What the process says: which version it is, and (port, family) → errno of what it cannot open."""

    tag: str
    failed: dict[tuple[int, int], int]


class HealthProcess:
    """The process of one node. Methods block, for milliseconds; `tables` are the directory of pinned maps."""

    def __init__(self, tables: Path, table_id: int, api_socket: Path, cgroup_root: Path) -> None:
        self._tables = tables
        self._table_id = table_id
        self._socket = control_socket(api_socket)
        self._root = empty_root(api_socket)
        self._cgroup = cgroup_root / NAME

    @property
    def tag(self) -> str:
        """What a process that fits says: it runs this program, and answers from this table."""
        return f"{_digest(BINARY)}-{self._table_id}"

    def connect(self, addresses: Iterable[str]) -> socket.socket:
        """A control connection to the process, which is started, or replaced, where that is needed.

        Raises KernelError, or OSError, with what is in the way.
        """
        control = self._connect()
        status = _ask(control, addresses) if control is not None else None
        if control is not None and status is not None and status.tag == self.tag:
            control.setblocking(False)
            return control
        running = self.find()
        if control is not None and status is not None:
            self._replace(control, running)
        else:  # it cannot be talked to
            if control is not None:
                control.close()
            _kill(running)
            self._start([])
        control = self._connect()
        if control is None or _ask(control, addresses) is None:
            raise KernelError(f"{NAME} does not answer on {self._socket}")
        control.setblocking(False)
        return control

    def _replace(self, control: socket.socket, running: list[int]) -> None:
        """A process of another version makes way. Both listen on the same sockets meanwhile, so that no client finds a
        port closed."""
        listening = _listening(running)
        try:
            self._start([one.fileno() for one in listening])
        finally:
            for one in listening:
                one.close()
        _ask_to_end(control)
        _kill(running)

    def end(self) -> bool:
        """Ends the process and removes what it had. False where there was none."""
        running = self.find()
        control = self._connect()
        if control is not None:
            _ask_to_end(control)
        _kill(running)
        self._socket.unlink(missing_ok=True)
        remove_cgroup(self._cgroup)
        return bool(running)

    def find(self) -> list[int]:
        """Its process id; more than one where somebody started what only an agent should start."""
        return find_processes(self._table_id, self._cgroup)

    def _connect(self) -> socket.socket | None:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.settimeout(PATIENCE_SECONDS)
        try:
            control.connect(str(self._socket))
        except OSError:  # nobody is there, or nobody listens any more
            control.close()
            return None
        return control

    def _start(self, listening: Sequence[int]) -> None:
        with ExitStack() as stack:
            control = stack.enter_context(self._bind())
            table = stack.enter_context(syscall.obj_get(self._tables / "wag_health", syscall.BPF_F_RDONLY))
            overdue = stack.enter_context(syscall.obj_get(self._tables / "wag_overdue", syscall.BPF_F_RDONLY))
            self._cgroup.mkdir(exist_ok=True)
            cgroup = stack.enter_context(Fd(os.open(self._cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)))
            self._root.mkdir(mode=0o755, exist_ok=True)
            stack.callback(self._root.rmdir)  # at once: what it is shut into has no name
            passed = [control.fileno(), table.number, overdue.number, cgroup.number]
            try:
                done = subprocess.run(
                    [BINARY, *map(str, passed), self.tag, *map(str, listening)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=[*passed, *listening],
                    cwd=self._root,
                    env={},
                    timeout=PATIENCE_SECONDS,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise KernelError(f"{NAME} does not start within {PATIENCE_SECONDS:g} s") from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
            raise KernelError(f"{NAME} does not start: {said}")

    def _bind(self) -> socket.socket:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.fchmod(control.fileno(), 0o600)  # what the file gets that bind makes
        try:
            self._socket.unlink(missing_ok=True)
            control.bind(str(self._socket))
        except OSError as error:
            control.close()
            raise KernelError(f"cannot listen on {self._socket}: {error.strerror or error}") from error
        control.listen(4)
        return control


def control_socket(api_socket: Path) -> Path:
    """Where the process is talked to: beside the agent's socket."""
    return api_socket.with_suffix(".health")


def empty_root(api_socket: Path) -> Path:
    """The directory that the process makes its root; it is there for a moment only."""
    return api_socket.with_suffix(".health-root")


def listen_request(addresses: Iterable[str]) -> bytes:
    """What tells the process where to listen ("*": everywhere), and to read the table again."""
    return " ".join(["listen", *addresses]).encode()


def read_status(packet: bytes) -> Status:
    """What the process answers."""
    tag, *lines = packet.decode(errors="replace").splitlines() or [""]
    failed = {}
    for line in lines:
        port, family, number = map(int, line.split())
        failed[port, family] = number
    return Status(tag, failed)


def find_processes(table_id: int, cgroup: Path | None) -> list[int]:
    """Processes of that name that hold the table, or live in the cgroup."""
    inside = _lines(cgroup / "cgroup.procs") if cgroup is not None else []
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or _lines(folder / "comm") != [NAME]:
            continue
        if folder.name in inside or _holds(folder, table_id):
            found.append(int(folder.name))
    return sorted(found)


def remove_cgroup(cgroup: Path) -> None:
    """Removes the cgroup of the process, unless something else lives there."""
    for _ in range(100):
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise KernelError(f"cannot remove {cgroup}: {error.strerror}", error.errno or 0) from error
            if _lines(cgroup / "cgroup.procs"):
                return
            time.sleep(0.01)  # the kernel takes a moment to let go of the last process


def _holds(process: Path, table_id: int) -> bool:
    try:
        descriptors = list((process / "fdinfo").iterdir())
    except OSError:  # it has ended, or is none of ours
        return False
    return any(f"map_id:\t{table_id}" in _lines(descriptor) for descriptor in descriptors)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:  # gone since it was listed
        return []


def _listening(pids: Iterable[int]) -> list[socket.socket]:
    """What processes listen on, for the one after them; nothing where the kernel does not let it be copied. Then the
    ports are closed for the moment that the change takes."""
    try:
        return [one for pid in pids for one in pidfd.listening_sockets(pid)]
    except OSError:
        return []


def _ask(control: socket.socket, addresses: Iterable[str]) -> Status | None:
    try:
        control.send(listen_request(addresses))
        packet = control.recv(MAX_PACKET)
        return read_status(packet) if packet else None
    except (OSError, ValueError):  # it hangs, has just ended, or speaks otherwise
        return None


def _ask_to_end(control: socket.socket) -> None:
    """Lets it answer whom it has accepted. What does not end by itself is killed afterwards."""
    try:
        control.send(b"end")
        while control.recv(MAX_PACKET):
            continue
    except OSError:
        return
    finally:
        control.close()


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        pidfd.kill(pid)


def _digest(program: Path) -> str:
    try:
        return hashlib.sha256(program.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise KernelError(f"{program} is missing: build it with `make -C health`", error.errno or 0) from error
