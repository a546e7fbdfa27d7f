"""The lab's network and UTS namespaces, pinned to files so that they outlive processes.

Network namespaces are where iproute2 keeps them, so `ip netns` shows them. Making and removing is idempotent and
takes up what a crash left: a file without a namespace mounted on it counts as absent.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from waggle.errors import LabError
from waggle.kernel.netns import call_in_netns
from waggle.lab.layout import NETNS_ROOT, LabLayout, Place


def is_namespace(path: Path) -> bool:
    """Whether a namespace (of any kind) is mounted at `path`."""
    try:
        return path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except FileNotFoundError:
        return False


def create_netns(path: Path) -> bool:
    """Makes the network namespace unless it exists. True when it was made now."""
    if is_namespace(path):
        return False
    path.unlink(missing_ok=True)
    _run(["ip", "netns", "add", path.name])
    return True


def pin_own_netns(path: Path) -> None:
    """Gives the network namespace of the caller the name `path`, which leads there whoever opens it, and for ever.

    /proc/1/ns/net is no such name: it leads elsewhere where the caller has a network of its own, and even root may
    not open it where the first process has capabilities that others lack.
    """
    own = Path("/proc/self/ns/net")
    if is_namespace(path) and path.samefile(own):
        return
    remove_namespaces([path])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    _run(["mount", "--bind", str(own), str(path)])


def create_uts(path: Path, hostname: str) -> None:
    """Makes the UTS namespace with that host name unless it exists."""
    if is_namespace(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    _run(["unshare", f"--uts={path}", "hostname", "--", hostname])


def create_place(place: Place) -> bool:
    """Both namespaces of a machine or pod. True when the network namespace was made now."""
    create_uts(place.uts, place.name.rpartition("/")[2][:63])
    return create_netns(place.netns)


def remove_namespaces(paths: Iterable[Path]) -> None:
    """Unmounts and removes the files. The kernel frees a namespace, and every interface in it, with its last user."""
    for path in paths:
        while is_namespace(path):
            _run(["umount", "--lazy", str(path)])
        path.unlink(missing_ok=True)


def netns_files(lab: LabLayout) -> list[Path]:
    """Every file of `ip netns` that is the lab's, alive or left by a crash."""
    if not NETNS_ROOT.is_dir():
        return []
    return sorted(path for path in NETNS_ROOT.iterdir() if lab.owns_netns(path.name))


def processes_in(netns: Iterable[Path]) -> dict[int, str]:
    """{pid: command} of the processes that live in one of these network namespaces, whatever their cgroup."""
    wanted = {(status.st_dev, status.st_ino) for path in netns if is_namespace(path) for status in [path.stat()]}
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "ns" / "net").stat()
            if (status.st_dev, status.st_ino) in wanted:
                found[int(entry.name)] = (entry / "comm").read_text().strip()
        except OSError:  # it has ended meanwhile
            continue
    return found


def ip_batch(netns: Path, lines: Iterable[str], *, version: int | None = None) -> None:
    """Runs iproute2 commands (without the leading "ip") in one process inside `netns`. LabError names the line.

    `version`: of IP, where a command does not say it.
    """
    commands = list(lines)
    done = subprocess.run(
        ["ip", *([f"-{version}"] if version else []), "-netns", netns.name, "-batch", "-"],
        input="\n".join(commands),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"ip in {netns.name}: {' '.join(done.stderr.split())}")


def write_sysctls(netns: Path, values: Iterable[tuple[str, str]]) -> None:
    """Sets net.* sysctls inside `netns`; keys are paths below /proc/sys/net. A key the kernel lacks is left out."""

    def write() -> None:
        for key, value in values:
            path = Path("/proc/sys/net", key)
            if not path.exists():  # built without IPv6, for instance
                continue
            try:
                path.write_text(value)
            except OSError as error:
                raise LabError(f"cannot set net/{key} to {value}: {error.strerror}") from error

    call_in_netns(netns, write)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {' '.join(done.stderr.split()) or f'exit status {done.returncode}'}")
