"""One node with one agent, made for timing it: a network namespace with an uplink, a cgroup, nothing else.

The agent is the real `waggle agent`, started as a service manager would start it. Everything it leaves is its own
and is taken away: by `waggle cleanup` first, because that is what a user would run, and then, whatever that left, by
removing the directories on bpffs and cgroup2 that were made for this node.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from bench.leftovers import BPFFS, NETNS, PREFIX, cgroup2, delete_netns, remove_bpffs, remove_cgroups
from bench.places import BenchError, Place, checked

_API_PORT = 6443
NODE_IP, _POD_CIDR = "10.77.0.11", "10.244.1.0/24"


class ScaleNode:
    """A context manager; `start_agent` may be called again after `stop_agent` and `clean`."""

    def __init__(self, settings: Mapping[str, object] | None = None, name: str = "scale") -> None:
        self._settings = settings or {}
        self._folder = tempfile.TemporaryDirectory(prefix=f"{PREFIX}-")
        self.folder = Path(self._folder.name)
        name = f"{PREFIX}-{name}"
        self._cgroup = cgroup2() / name
        self.place = Place(name, NETNS / name, (NODE_IP,))
        #: The other side of the node's uplink.
        self.wire = Place(f"{name}-wire", NETNS / f"{name}-wire", ())
        self.agent_place = Place("agent", NETNS / name, (NODE_IP,), self._cgroup / "agent")
        self.bpf_root = BPFFS / name
        self.config = self.folder / "agent.yaml"
        self.log = self.folder / "agent.log"
        self.agent: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ScaleNode:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; safe to call more than once."""
        self.stop_agent()
        if self.config.exists() and self.place.netns.exists():
            self.clean()
        remove_bpffs(self.bpf_root)
        remove_cgroups(self._cgroup)
        delete_netns(self.place.name)
        delete_netns(self.wire.name)
        self._folder.cleanup()

    @property
    def api_port(self) -> int:
        return _API_PORT

    def pin(self, name: str) -> Path:
        """Where the agent pins one of its maps."""
        return self.bpf_root / "maps" / name

    def configure(self, source: dict[str, object]) -> None:
        """Write the agent's configuration; `source` says where its objects come from."""
        settings: dict[str, object] = {
            "node-name": "bench",
            "node-ip": [NODE_IP],
            "pod-cidr": [_POD_CIDR],
            "cgroup-root": str(self._cgroup),
            "bpf-root": str(self.bpf_root),
            "state-dir": str(self.folder / "state"),
            "api-socket": str(self.folder / "agent.sock"),
            **source,
            **self._settings,
        }
        self.config.write_text(yaml.safe_dump(settings, sort_keys=False))

    def pids(self) -> list[int]:
        return [self.agent.pid] if self.agent is not None else []

    def start_agent(self) -> int:
        """CLOCK_MONOTONIC right before the process was made, in nanoseconds."""
        command = self.agent_place.command(
            [sys.executable, "-m", "waggle.cli.main", "agent", "--config", str(self.config)]
        )
        with self.log.open("ab") as log:
            started = time.monotonic_ns()
            self.agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return started

    def stop_agent(self, *, kill: bool = False) -> None:
        if self.agent is None:
            return
        if self.agent.poll() is None:
            if kill:
                self.agent.kill()
            else:
                self.agent.terminate()
            try:
                self.agent.wait(10)
            except subprocess.TimeoutExpired:
                self.agent.kill()
                self.agent.wait()
        self.agent = None

    def clean(self) -> None:
        """`waggle cleanup` for this node: the next start is a cold one."""
        command = [sys.executable, "-m", "waggle.cli.main", "cleanup", "--bpf-root", str(self.bpf_root)]
        command += ["--state-dir", str(self.folder / "state"), "--api-socket", str(self.folder / "agent.sock")]
        try:
            self.place.run(command, timeout=120)
        except BenchError as error:
            print(f"bench: {error}", file=sys.stderr)
        remove_bpffs(self.bpf_root)

    def wait(self, what: str, ready: Callable[[], bool], seconds: float) -> None:
        """Until `ready()`; BenchError with the end of the agent's log when it dies or takes too long."""
        until = time.monotonic() + seconds
        while not ready():
            if self.agent is None or self.agent.poll() is not None:
                raise BenchError(f"the agent ended before {what}:\n{self.log_tail()}")
            if time.monotonic() > until:
                raise BenchError(f"{what}: not within {seconds:g} s; the agent's log ends with\n{self.log_tail()}")
            time.sleep(0.01)

    def log_tail(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(f"  {line}" for line in text.splitlines()[-15:])

    def _build(self) -> None:
        for name in (self.place.name, self.wire.name):
            checked(["ip", "netns", "add", name])
            checked(["ip", "-n", name, "link", "set", "lo", "up"])
        lines = [
            f"link add eth0 type veth peer name eth0 netns {self.wire.name}",
            f"addr add {NODE_IP}/24 dev eth0",
            "link set eth0 up",
            "route add default via 10.77.0.1",
        ]
        checked(["ip", "-n", self.place.name, "-batch", "-"], stdin="\n".join(lines) + "\n")
        checked(["ip", "-n", self.wire.name, "link", "set", "eth0", "up"])
        assert self.agent_place.cgroup is not None
        self.agent_place.cgroup.mkdir(parents=True)
