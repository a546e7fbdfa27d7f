"""A node with container runtimes: their real daemons and programs beside a real agent, in mounts of their own.

What runtimes have at fixed places (/run/netns, /etc/cni/net.d, /opt/cni/bin) are directories of the test in there, and
everything else they keep is in directories that are named to them. So nothing of theirs is on the machine afterwards.
The network finds its way to them as on a user's machine: by the agent's settings cni-bin-dir and cni-conf-dir.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_node import AgentNode

from waggle.kernel.cgroup import cgroup2_mount
from waggle.kernel.maps import Map
from waggle.kernel.netlink import RTPROT_WAGGLE, Netlink
from waggle.kernel.netns import call_in_netns

BUSYBOX = Path("/usr/bin/busybox")
DEBIAN_PLUGINS = Path("/usr/lib/cni")
IMAGE = "localhost/waggle-test:1"
#: Says its pod's name to whoever connects.
SERVER = ("/bin/nc", "-ll", "-p", "8080", "-e", "/bin/hostname")
#: Where runtimes and libcni look and write, whatever they are told.
FIXED = ("/etc/cni/net.d", "/opt/cni/bin", "/var/lib/cni")
#: What the image does when nothing is asked of it: as the first process of a pod it only has to be there.
PAUSE = ["/bin/busybox", "sleep", "1000000"]
_MOUNTS = """
set -e
mount --bind "$1" /etc/cni/net.d
mount --bind "$2" /opt/cni/bin
for private in /run/netns /var/lib/cni /dev/shm; do mount -t tmpfs tmpfs $private; done
echo ready
exec sleep 1000000
"""


@dataclass
class RuntimeNode(AgentNode):
    """`run` is where runtimes' commands run: in the node's network, its cgroup and its mounts."""

    holder: subprocess.Popen[bytes] | None = None
    made: list[str] = field(default_factory=list)  # places that this machine did not have

    @property
    def slice(self) -> Path:
        """The cgroup of all of the node; nothing runs right in it, so it may have controllers."""
        return cgroup2_mount() / self.name

    @property
    def cgroup(self) -> Path:
        return self.slice / "node"

    @property
    def conf_dir(self) -> Path:
        return self.directory / "net.d"

    @property
    def bin_dir(self) -> Path:
        return self.directory / "bin"

    def open(self) -> None:
        self.slice.mkdir()
        super().open()
        for directory in (self.conf_dir, self.bin_dir):
            directory.mkdir()
        for plugin in DEBIAN_PLUGINS.iterdir():  # containerd makes the loopback interface by one of them
            (self.bin_dir / plugin.name).symlink_to(plugin)
        self.made = [directory for directory in FIXED if not Path(directory).exists()]
        for directory in self.made:
            Path(directory).mkdir(parents=True, exist_ok=True)
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "slave", "sh", "-c", _MOUNTS, "sh", self.conf_dir, self.bin_dir],
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout is not None and self.holder.stdout.readline() == b"ready\n"

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for directory in self.made:
                stack.callback(_remove_if_empty, Path(directory))
            for root in _hierarchies():
                stack.callback(_remove_tree, root / self.name)
            stack.callback(super().close)
            if self.holder is not None:
                stack.callback(self._end_holder, self.holder)
            stack.callback(self._end_everything)

    def _end_holder(self, holder: subprocess.Popen[bytes]) -> None:
        holder.kill()
        holder.wait(10)
        assert holder.stdout is not None
        holder.stdout.close()

    def _end_everything(self) -> None:
        """Whatever runs in the node's mounts or its cgroup: containers outlive their runtime on purpose."""
        (self.slice / "cgroup.kill").write_text("1")
        assert self.holder is not None
        deadline = time.monotonic() + 10
        while left := [pid for pid in _in_mounts(self.holder.pid) if pid != self.holder.pid]:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < deadline, left
            time.sleep(0.02)

    # -- commands -----------------------------------------------------------------------------------------------

    @property
    def mounts(self) -> list[str]:
        """What a command line begins with to run in the node's mounts."""
        assert self.holder is not None
        return ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "--"]

    def start(self, **changes: Any) -> subprocess.Popen[bytes]:
        settings = {"cgroup_root": self.slice, "cni_bin_dir": self.bin_dir, "cni_conf_dir": self.conf_dir}
        process = super().start(before=self.mounts, **(settings | changes))
        self.until(lambda: (self.conf_dir / "05-waggle.conflist").exists())
        return process

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        line = self.inside([*self.mounts, *map(str, command)])
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, **options)
        assert not check or done.returncode == 0, (command, done.returncode, done.stdout, done.stderr)
        return done

    def spawn(self, *command: str | Path, log: str) -> subprocess.Popen[bytes]:
        """Something that runs until `close`; what it says goes to a file of the node's directory."""
        with (self.directory / log).open("ab") as stream:
            process = subprocess.Popen(
                self.inside([*self.mounts, *map(str, command)]),
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
            )
        self.running.append(process)
        return process

    def pod_says(self, address: str, port: int, *, outside: bool = False) -> str:
        """What a process of the node, or one beyond its uplink, hears there."""
        return self.connect(address, port, netns=self.peer if outside else None, cgroup=not outside)

    def plugin(self, command: str, pod: str = "", **config: Any) -> subprocess.Popen[str]:
        """The plugin as a runtime executes it, for the namespace `pod` of the node's mounts."""
        variables = [f"CNI_COMMAND={command}", "CNI_PATH=/opt/cni/bin"]
        if pod:
            variables += [f"CNI_CONTAINERID={pod}", "CNI_IFNAME=eth0", f"CNI_NETNS=/run/netns/{pod}"]
        process = subprocess.Popen(
            [*self.mounts, "env", *variables, str(self.bin_dir / "waggle-cni")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        base = {"cniVersion": "1.1.0", "name": "waggle", "type": "waggle-cni", "apiSocket": str(self.socket)}
        process.stdin.write(json.dumps(base | config))
        process.stdin.close()
        return process

    def collect_garbage(self, *containers: str) -> None:
        """What newer runtimes send: which containers there are."""
        valid = [{"containerID": container, "ifname": "eth0"} for container in containers]
        assert finished(self.plugin("GC", **{"cni.dev/valid-attachments": valid})) == ""

    # -- what is left -------------------------------------------------------------------------------------------

    def kept(self) -> dict[str, Any]:
        """Everything that a pod leaves somewhere, if it does."""

        def of_the_network() -> dict[str, Any]:
            with Netlink() as netlink:
                return {
                    "interfaces": sorted(link.name for link in netlink.links() if link.name.startswith("wag")),
                    "routes": sorted(str(route.dst) for route in netlink.routes(protocol=RTPROT_WAGGLE)),
                    "neighbours": sorted(str(entry.ip) for entry in netlink.neighbours() if entry.permanent),
                }

        return call_in_netns(self.netns, of_the_network) | {
            "records": self.records(),
            "pins": sorted(pin.name for pin in (self.bpf_root / "links").glob("pod-*")),
            "entries": {name: self._keys(name) for name in ("wag_endpoints", "wag_netns", "wag_services")},
            "namespaces": sorted(self.run("ls", "/run/netns").stdout.split()),
        }

    def _keys(self, name: str) -> list[bytes]:
        with contextlib.closing(Map.pinned(self.bpf_root / "maps" / name)) as table:
            return sorted(key for key, _ in table.dump())

    def plugins(self) -> list[int]:
        """Plugins of waggle that a runtime of this node waits for."""
        assert self.holder is not None
        return [pid for pid in _in_mounts(self.holder.pid) if _name_of(pid) == "waggle-cni"]

    def records(self) -> list[str]:
        return sorted(file.name for file in (self.state / "cni").glob("wag*"))


def finished(process: subprocess.Popen[str]) -> str:
    """What a plugin printed, which did not fail."""
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    assert process.wait(60) == 0, output
    return output


def image_archive(path: Path) -> Path:
    """An image with busybox in it, as `docker save` writes one."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for name in ("bin", "tmp", "etc", "www", "proc", "sys", "dev"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        archive.add(BUSYBOX.resolve(), "bin/busybox")
        for applet in ("sh", "sleep", "httpd", "wget", "nc", "cat", "echo", "ip", "hostname"):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
    data = layer.getvalue()
    config = json.dumps(
        {
            "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Entrypoint": PAUSE},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]},
        }
    ).encode()
    names = f"{hashlib.sha256(config).hexdigest()}.json", "layer.tar"
    manifest = json.dumps([{"Config": names[0], "RepoTags": [IMAGE], "Layers": [names[1]]}]).encode()
    with tarfile.open(path, "w") as archive:
        for name, content in ((names[0], config), (names[1], data), ("manifest.json", manifest)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def missing(*programs: str) -> str:
    """Why these runtimes cannot be tested here, or ""."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    absent = [name for name in programs if shutil.which(name, path=path) is None]
    if os.geteuid() != 0:
        return "makes network and mount namespaces: needs root"
    return f"not installed: {', '.join(absent)} (tools/setup.sh test)" if absent else ""


def _hierarchies() -> Iterator[Path]:
    """The roots of all cgroup hierarchies: runtimes make a group in each."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup":
            yield Path(path)
    yield cgroup2_mount()


def _remove_if_empty(directory: Path) -> None:
    """Unless somebody else uses it by now."""
    try:
        os.removedirs(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def _remove_tree(cgroup: Path) -> None:
    if not cgroup.is_dir():
        return
    for child in cgroup.iterdir():
        if child.is_dir():
            _remove_tree(child)
    for _ in range(200):
        try:
            cgroup.rmdir()
            return
        except OSError:  # the kernel takes a moment to let go of the last process
            time.sleep(0.02)
    raise AssertionError(f"{cgroup} stays")


def _in_mounts(pid: int) -> list[int]:
    """Processes in the mount namespace of `pid`, containers of theirs apart."""
    wanted = Path(f"/proc/{pid}/ns/mnt").readlink()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "ns/mnt").readlink() == wanted:
                    found.append(int(entry.name))
    return found


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""  # it has ended
