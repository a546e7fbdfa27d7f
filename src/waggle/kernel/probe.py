"""What this machine can do. Features are tried, kernel versions are never compared."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from waggle.errors import KernelError, MissingFeature
from waggle.kernel.cgroup import cgroup2_mount
from waggle.kernel.links import AttachType, query_programs

_SYSCTLS = Path("/proc/sys")
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND = 2, 4, 8, 32, 4096  # include/uapi/linux/mount.h
_libc = ctypes.CDLL(None, use_errno=True)


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
    if os.geteuid() == 0:  # nobody else is told
        features.append(Feature("tcx", _has_tcx(), "use Linux 6.6 or newer"))
    return features


def require() -> None:
    """Raises MissingFeature with everything that is missing and how to get it."""
    missing = [f"{f.name}: {f.hint}" for f in probe() if not f.present]
    if missing:
        raise MissingFeature("this machine cannot run waggle yet:\n  " + "\n  ".join(missing))


def mount_bpffs() -> None:
    """Mounts bpffs at its usual place if nothing is there. MissingFeature when the kernel refuses."""
    where = Path("/sys/fs/bpf")
    if _is_bpffs(where) or os.geteuid() != 0:  # `require` tells who is not root first of all
        return
    result = subprocess.run(["mount", "-t", "bpf", "bpf", str(where)], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.partition("\n")[0].removeprefix(f"mount: {where}: ").rstrip(".")
        raise MissingFeature(
            f"bpffs is not mounted and cannot be mounted from here ({reason}): mount -t bpf bpf {where} on the host"
        )


def make_sysctls_writable() -> None:
    """Makes /proc/sys writable for this mount namespace where it is not: containers that are not privileged get it
    read-only, whatever they may do otherwise. MissingFeature when the kernel refuses."""
    if os.geteuid() != 0 or not os.statvfs(_SYSCTLS).f_flag & os.ST_RDONLY:
        return
    flags = _MS_REMOUNT | _MS_BIND | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    if _libc.mount(None, os.fsencode(_SYSCTLS), None, ctypes.c_ulong(flags), None) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise MissingFeature(
            f"{_SYSCTLS} is read-only and cannot be made writable ({reason}): run the container with SYS_ADMIN and "
            "without an AppArmor profile that forbids mounts"
        )


def _is_bpffs(where: Path) -> bool:
    return any(line.split()[1:3] == [str(where), "bpf"] for line in Path("/proc/self/mounts").read_text().splitlines())


def on_bpffs(path: Path) -> bool:
    """Whether `path`, or where it would be made, is on bpffs."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[2] == number and line.partition(" - ")[2].startswith("bpf ") for line in lines)


def _has_tcx() -> bool:
    try:
        query_programs(1, AttachType.TCX_INGRESS)  # loopback is interface 1 in every network namespace
    except KernelError:
        return False
    return True
