"""cgroup2: where it is mounted, and ids of its directories."""

from __future__ import annotations

import os
from pathlib import Path

from waggle.errors import MissingFeature


def cgroup2_mount() -> Path:
    """The mount point of cgroup2, hybrid layouts included. MissingFeature when there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise MissingFeature("no cgroup2 file system is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


def cgroup_id(directory: Path) -> int:
    """The kernel's id of a cgroup: the inode of its directory. NotFound-like OSError is left to the caller."""
    return os.stat(directory).st_ino  # noqa: PTH116 - one call, no Path object behind it
