"""What the machine must have for a lab, checked before anything is made, each with a plain message.

What the data path needs of the kernel is probed by `waggle.kernel.probe`, as the agent does; here is what the lab
needs.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
from pathlib import Path

from waggle.errors import LabError, MissingFeature
from waggle.kernel import probe
from waggle.kernel.cgroup import cgroup2_mount

_TOOLS = {
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setsid": "util-linux",
    "umount": "mount",
    "hostname": "hostname",
}
_OBJECTS = ("socket.bpf.o", "pod.bpf.o", "node.bpf.o", "stale.bpf.o")


def require_root() -> None:
    """Raises LabError without root."""
    if os.geteuid() != 0:
        raise LabError("waggle lab makes network namespaces and loads BPF programs: run it as root (try sudo)")


def check_machine() -> None:
    """Raises LabError or MissingFeature for the first thing that is missing. Mounts bpffs where it is not."""
    require_root()
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise MissingFeature(f"the command {tool!r} is missing: apt-get install {package}")
    probe.mount_bpffs()
    probe.require()
    _check_cgroup_kill(cgroup2_mount())
    plugin()
    for name in _OBJECTS:
        if not package_file(name).is_file():
            raise MissingFeature(f"the BPF object {name} is not built: make -C bpf")


def plugin() -> Path:
    """The CNI plugin's binary."""
    path = package_file("waggle-cni")
    if not os.access(path, os.X_OK):
        raise MissingFeature("the CNI plugin waggle-cni is not built: make -C cni")
    return path


def package_file(name: str) -> Path:
    """A file that the package ships in waggle/bpf."""
    return Path(str(importlib.resources.files("waggle"))) / "bpf" / name


def _check_cgroup_kill(mount: Path) -> None:
    # The root cgroup has no cgroup.kill, so the lab's own directory is the probe.
    folder = mount / "waggle-lab"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MissingFeature(f"cannot make the cgroup {folder}: {error.strerror}") from error
    if not (folder / "cgroup.kill").exists():
        raise MissingFeature(f"cgroup2 at {mount} lacks cgroup.kill: the kernel is older than 5.14, waggle needs 6.6")
