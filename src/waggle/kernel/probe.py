"""What this machine can do. Features are tried, kernel versions are never compared."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from waggle.errors import KernelError, MissingFeature
from waggle.kernel.cgroup import cgroup2_mount
from waggle.kernel.links import AttachType, query_programs

BPFFS_MAGIC = 0xCAFE4A11


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing waggle needs: whether it is there, and what to do when it is not."""

    name: str
    present: bool
    hint: str


def probe() -> list[Feature]:
    """Everything the agent needs of the machine. Takes milliseconds and changes nothing."""
    features = [
        Feature("root", os.geteuid() == 0, "run as root (sudo)"),
        Feature(
            "kernel BTF", Path("/sys/kernel/btf/vmlinux").exists(), "use a kernel built with CONFIG_DEBUG_INFO_BTF"
        ),
        Feature("bpffs", _is_bpffs(Path("/sys/fs/bpf")), "mount -t bpf bpf /sys/fs/bpf"),
    ]
    try:
        cgroup2_mount()
        features.append(Feature("cgroup2", True, ""))
    except MissingFeature as error:
        features.append(Feature("cgroup2", False, str(error)))
    features.append(Feature("tcx", os.geteuid() == 0 and _has_tcx(), "use Linux 6.6 or newer"))
    return features


def require() -> None:
    """Raises MissingFeature with everything that is missing and how to get it."""
    missing = [f"{f.name}: {f.hint}" for f in probe() if not f.present]
    if missing:
        raise MissingFeature("this machine cannot run waggle yet:\n  " + "\n  ".join(missing))


def mount_bpffs() -> None:
    """Mounts bpffs at its usual place if nothing is there. MissingFeature when the kernel refuses."""
    where = Path("/sys/fs/bpf")
    if _is_bpffs(where):
        return
    result = subprocess.run(["mount", "-t", "bpf", "bpf", str(where)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise MissingFeature(f"cannot mount bpffs at {where}: {result.stderr.strip()}")


def _is_bpffs(where: Path) -> bool:
    return any(line.split()[1:3] == [str(where), "bpf"] for line in Path("/proc/self/mounts").read_text().splitlines())


def _has_tcx() -> bool:
    try:
        query_programs(1, AttachType.TCX_INGRESS)  # loopback is interface 1 in every network namespace
    except KernelError:
        return False
    return True
