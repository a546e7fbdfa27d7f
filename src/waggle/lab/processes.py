"""Starting processes in a place of the lab, and finding and ending them again.

Invariants:
- A process joins its cgroup before it does anything else and before it is detached. Everything it starts is born in
  that cgroup, so the cgroups alone say which processes belong to the lab; there are no pid files.
- A detached process belongs to init: no process of waggle stays behind for it, and a crash of the command that
  started it changes nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from waggle.errors import LabError
from waggle.lab.layout import Place

# "0" is the writing process itself. The shell is replaced at once: what follows runs in the cgroup.
_JOIN = 'echo 0 > "$1/cgroup.procs" || exit 125; shift; exec "$@"'


def enter_command(place: Place, command: Sequence[str]) -> list[str]:
    """The command line that runs `command` in the namespaces of `place`."""
    return ["nsenter", f"--net={place.netns}", f"--uts={place.uts}", "--", *command]


def run_in(
    place: Place, cgroup: Path, command: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout: float
) -> subprocess.CompletedProcess[bytes]:
    """Runs `command` to its end in `place`, output captured. Raises LabError when it takes too long."""
    cgroup.mkdir(parents=True, exist_ok=True)
    arguments = ["sh", "-c", _JOIN, "sh", str(cgroup), *enter_command(place, command)]
    try:
        return subprocess.run(arguments, input=stdin, capture_output=True, env=env, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{command[0]} in {place.name} did not end within {timeout:g} s") from error


def start_detached(
    place: Place, cgroup: Path, command: Sequence[str], *, env: Mapping[str, str], log: Path, directory: str = ""
) -> None:
    """Starts `command` in `place`, its output appended to `log`, and returns as soon as it is in its cgroup."""
    cgroup.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    detached = ["setsid", "--fork", *enter_command(place, command)]
    with log.open("ab") as output:
        try:
            done = subprocess.run(
                ["sh", "-c", _JOIN, "sh", str(cgroup), *detached],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd=directory or "/",
                check=False,
            )
        except OSError as error:
            raise LabError(f"cannot start {command[0]} in {place.name}: {error.strerror}: {error.filename}") from error
    if done.returncode != 0:
        raise LabError(f"cannot start {command[0]} in {place.name}: see {log}")


def replace_self(place: Place, cgroup: Path, command: Sequence[str], env: Mapping[str, str]) -> None:
    """Becomes `command` in `place`: terminal, standard streams, signals and exit status are its own. Never returns.

    Raises LabError where that is not possible.
    """
    try:
        cgroup.mkdir(parents=True, exist_ok=True)
        (cgroup / "cgroup.procs").write_text("0")
        arguments = enter_command(place, command)
        os.execvpe(arguments[0], arguments, dict(env))
    except OSError as error:
        raise LabError(f"cannot enter {place.name}: {error.strerror}: {error.filename or cgroup}") from error


def pids_below(cgroup: Path) -> list[int]:
    """Every process in `cgroup` and in the cgroups below it."""
    pids: list[int] = []
    for folder, _, _ in os.walk(cgroup):
        try:
            pids += [int(line) for line in Path(folder, "cgroup.procs").read_text().split()]
        except (FileNotFoundError, OSError):  # ENODEV when it vanished between the two calls
            continue
    return pids


def is_populated(cgroup: Path) -> bool:
    """Whether any process lives in `cgroup` or below."""
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError:  # no such cgroup, or just removed
        return False


def terminate(cgroups: Iterable[Path], *, grace: float) -> None:
    """Ends everything in the `cgroups`: SIGTERM, `grace` seconds to react, then SIGKILL that nothing escapes."""
    alive = [cgroup for cgroup in cgroups if is_populated(cgroup)]
    if grace > 0:
        for cgroup in alive:
            for pid in pids_below(cgroup):
                try:
                    os.kill(pid, signal.SIGTERM)
                except ProcessLookupError:
                    continue
        wait_until_empty(alive, grace)
    kill(alive)


def kill(cgroups: Iterable[Path]) -> None:
    """Kills everything in the `cgroups` and waits until it is gone. Raises LabError when something stays."""
    alive = [cgroup for cgroup in cgroups if is_populated(cgroup)]
    for cgroup in alive:
        try:
            (cgroup / "cgroup.kill").write_text("1")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LabError(f"cannot kill the processes in {cgroup}: {error.strerror}") from error
    if not wait_until_empty(alive, 10.0):
        left = sorted(pid for cgroup in alive for pid in pids_below(cgroup))
        raise LabError(f"processes do not end although killed: {', '.join(map(str, left))}")


def wait_until_empty(cgroups: Sequence[Path], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(is_populated(cgroup) for cgroup in cgroups):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def remove_cgroup(cgroup: Path) -> None:
    """Removes an empty cgroup and all below it. Absent is fine; LabError when a process is inside."""
    deadline = time.monotonic() + 5.0
    for folder, _, _ in os.walk(cgroup, topdown=False):
        while True:
            try:
                Path(folder).rmdir()
                break
            except FileNotFoundError:
                break
            except OSError as error:
                # The kernel takes a moment to let go of the last process.
                if time.monotonic() > deadline:
                    raise LabError(f"cannot remove {folder}: {error.strerror}") from error
                time.sleep(0.01)
