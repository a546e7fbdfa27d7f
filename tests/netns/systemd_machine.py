"""A machine of its own that systemd has booted: namespaces of every kind over a copy-on-write view of this one's files.

Nothing of it outlives its init: the files are on a tmpfs in its mount namespace, its network in its network namespace.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from waggle.kernel.cgroup import cgroup2_mount

_BOOT = """
set -e
mount --make-rprivate /
mount -t tmpfs t "$1"
mkdir "$1"/upper "$1"/work "$1"/root
mount -t overlay o -o lowerdir=/,upperdir="$1"/upper,workdir="$1"/work "$1"/root
cd "$1"/root
mount -t proc proc proc
head -n 1 /proc/cgroups > tmp/cgroups && mount --bind tmp/cgroups proc/cgroups # leaves controllers alone
mount -t sysfs sysfs sys
mount -t bpf bpf sys/fs/bpf
if [ "$2" = hybrid ]; then
    mount -t tmpfs t sys/fs/cgroup -o mode=755
    mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
    mount -t cgroup2 c sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd c sys/fs/cgroup/systemd
else
    mount -t cgroup2 c sys/fs/cgroup
fi
mount -t tmpfs t run
mount --rbind /dev dev
mkdir -p etc/systemd/system
for unit in dev-hugepages.mount sys-kernel-debug.mount sys-kernel-tracing.mount systemd-logind.service dbus.service \\
        tmp.mount systemd-tmpfiles-setup.service dbus.socket getty.target \\
        systemd-udevd.service systemd-udev-trigger.service console-getty.service; do
    ln -sf /dev/null etc/systemd/system/$unit
done
# the tree under test may be below /tmp, which systemd would cover or empty
printf '[Unit]\\nRequires=basic.target\\nAfter=basic.target\\n' > etc/systemd/system/test.target
export container=other
exec chroot . /lib/systemd/systemd --system --unit=test.target --log-target=journal --show-status=0
"""


class SystemdMachine:
    """`directory` is an empty one of the test."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._cgroups = [cgroup2_mount() / f"waggle-systemd-{os.getpid()}"]
        self.hybrid = cgroup2_mount() != Path("/sys/fs/cgroup")
        if self.hybrid:
            self._cgroups.append(Path("/sys/fs/cgroup/systemd") / self._cgroups[0].name)
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    @staticmethod
    def missing() -> str:
        """Why there cannot be one here; nothing where there can."""
        if not Path("/lib/systemd/systemd").exists():
            return "no systemd is installed"
        if cgroup2_mount() != Path("/sys/fs/cgroup") and not Path("/sys/fs/cgroup/systemd").is_dir():
            return "no cgroup hierarchy for systemd beside the others"
        if "overlay" not in Path("/proc/filesystems").read_text():
            return "the kernel has no overlay file system"
        return ""

    def boot(self, seconds: float = 30.0) -> None:
        """Starts init and waits until it has reached its target."""
        for cgroup in self._cgroups:
            cgroup.mkdir()
        enter = "".join(f"echo 0 > {cgroup}/cgroup.procs; " for cgroup in self._cgroups)
        unshare = (
            'exec unshare --mount --pid --fork --uts --ipc --cgroup --net --kill-child bash -c "$1" boot "$2" "$3"'
        )
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                enter + unshare,
                "start",
                _BOOT,
                str(self._directory),
                "hybrid" if self.hybrid else "unified",
            ],
            stdin=subprocess.DEVNULL,
            stdout=(self._directory.parent / "boot.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + seconds
        while not self._is_up():
            log = (self._directory.parent / "boot.log").read_text()
            assert self._process.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.1)

    def _is_up(self) -> bool:
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self._init = int(children[0]) if children else 0
        return bool(self._init) and self.run("systemctl", "is-active", "test.target", check=False).returncode == 0

    def run(self, *command: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A command of the machine, to its end."""
        join = "".join(f"echo 0 > {cgroup}/cgroup.procs; " for cgroup in self._cgroups) + 'exec "$@"'
        enter = [
            "sh",
            "-c",
            join,
            "join",
            "nsenter",
            f"--target={self._init}",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--net",
            "--root",
            "--wd",
        ]
        done = subprocess.run(
            [*enter, "--", *command], input=stdin, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
        return done

    def sh(self, script: str, *arguments: str) -> str:
        """What a shell script prints."""
        return self.run("sh", "-ec", script, "sh", *arguments).stdout

    def close(self) -> None:
        if self._process is not None:
            if self._init:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._init, 9)
            else:
                self._process.kill()
            self._process.wait(20)
        for cgroup in self._cgroups:
            _remove_cgroup(cgroup)
        shutil.rmtree(self._directory, ignore_errors=True)


def _remove_cgroup(cgroup: Path) -> None:
    deadline = time.monotonic() + 10
    while cgroup.exists():
        for folder, _, _ in sorted(os.walk(cgroup), reverse=True):
            with contextlib.suppress(OSError):  # the kernel takes a moment to let go of the last process
                os.rmdir(folder)  # noqa: PTH106
        assert time.monotonic() < deadline, f"{cgroup} stays"
        time.sleep(0.02)


def lines(text: str, *, without: Sequence[str] = ()) -> list[str]:
    return [line for line in text.splitlines() if not any(word in line for word in without)]
