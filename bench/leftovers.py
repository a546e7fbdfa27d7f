"""What the benchmark puts on the machine, and how it goes away again, also after a run that was killed.

Everything carries `wagbench<pid>` in its name, in a place where only root makes names: network namespaces, cgroups,
directories on bpffs, directories for temporary files. What belongs to a process that is no more is a leftover.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.places import BenchError, checked

NETNS = Path("/run/netns")
BPFFS = Path("/sys/fs/bpf")
PREFIX = f"wagbench{os.getpid()}"


def remove_leftovers() -> None:
    """Everything of runs that were killed, labs excepted. Processes first: they hold the rest."""
    places: tuple[tuple[Path, Callable[[Path], None]], ...] = (
        (cgroup2(), remove_cgroups),
        (BPFFS, remove_bpffs),
        (NETNS, lambda path: delete_netns(path.name)),
        (Path(tempfile.gettempdir()), shutil.rmtree),
    )
    for parent, remove in places:
        for path in parent.glob("wagbench*-*"):
            match = re.match(r"wagbench(\d+)-", path.name)
            if match and not Path(f"/proc/{match[1]}").exists():
                remove(path)


def cgroup2() -> Path:
    """Where cgroup2 is mounted."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise BenchError("cgroup2 is not mounted")


def delete_netns(name: str) -> None:
    if (NETNS / name).exists():
        checked(["ip", "netns", "del", name])


def remove_bpffs(directory: Path) -> None:
    """Unpin everything below a directory of bpffs, and the directory. Unpinned links let go of their hooks."""
    if directory.exists():
        shutil.rmtree(directory)


def remove_cgroups(directory: Path) -> None:
    """Kill what runs in a cgroup made by the benchmark, and remove the cgroup and those below it."""
    if not directory.exists():
        return
    (directory / "cgroup.kill").write_text("1")
    until = time.monotonic() + 10
    for folder, _, _ in os.walk(directory, topdown=False):
        while True:
            try:
                Path(folder).rmdir()
                break
            except OSError as error:
                # the kernel takes a moment to let go of the last process
                if time.monotonic() > until:
                    raise BenchError(f"cannot remove {folder}: {error.strerror}") from error
                time.sleep(0.02)
