"""A node for the CNI tests: a network namespace with an agent process in it, pods' namespaces, and the real plugin.

Everything it makes is named after the test process and removed by `close`, whatever state the test left it in.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from waggle.kernel.netlink import Link, Netlink
from waggle.kernel.netlink_wire import RTPROT_WAGGLE
from waggle.kernel.netns import call_in_netns

ROOT = Path(__file__).resolve().parents[2]
NETNS = Path("/run/netns")
DUAL = ("10.244.7.0/24", "fd00:10:244:7::/64")

T = TypeVar("T")
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Answer:
    """What the plugin printed, and its exit code."""

    exit_code: int
    output: bytes

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.output)

    @property
    def code(self) -> int:
        """The error's code; 0 for success."""
        if self.exit_code == 0:
            return 0
        document = self.document
        assert document["msg"] and document["cniVersion"], document
        return document["code"]

    @property
    def addresses(self) -> list[str]:
        assert self.exit_code == 0, self.output
        return [entry["address"].partition("/")[0] for entry in self.document["ips"]]


@dataclass
class Node:
    """`ranges` are the pod ranges that the agent sees; change them with `set_ranges` at any time."""

    directory: Path
    plugin: Path
    prefix: str = field(default_factory=lambda: f"wagcni-{os.getpid()}-{next(_numbers)}")
    agent: asyncio.subprocess.Process | None = None
    made: list[str] = field(default_factory=list)

    @property
    def netns(self) -> Path:
        return NETNS / self.prefix

    @property
    def socket(self) -> Path:
        return self.directory / "agent.sock"

    def open(self, ranges: Iterable[str]) -> None:
        self.make_namespaces([self.prefix])
        self.set_ranges(ranges)
        run("ip", "-n", self.prefix, "link", "set", "lo", "up")
        run("ip", "-n", self.prefix, "address", "add", "192.0.2.1/32", "dev", "lo")
        run("ip", "-n", self.prefix, "-6", "address", "add", "2001:db8::1/128", "dev", "lo")
        for setting in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
            run("ip", "netns", "exec", self.prefix, "sh", "-c", f"echo 1 > /proc/sys/{setting}")

    async def close(self) -> None:
        try:
            await self.stop_agent()
        finally:
            self.remove_namespaces(self.made)

    def set_ranges(self, ranges: Iterable[str]) -> None:
        (self.directory / "ranges").write_text("\n".join(ranges))

    def make_namespaces(self, names: list[str]) -> None:
        self.made += names
        subprocess.run(["ip", "-batch", "-"], input="".join(f"netns add {n}\n" for n in names).encode(), check=True)

    def remove_namespaces(self, names: list[str]) -> None:
        """Goes on where one is gone already."""
        commands = "".join(f"netns delete {name}\n" for name in names)
        subprocess.run(["ip", "-force", "-batch", "-"], input=commands.encode(), check=False, capture_output=True)
        self.made = [name for name in self.made if name not in names]

    def make_pods(self, count: int) -> list[str]:
        names = [f"{self.prefix}-p{next(_numbers)}" for _ in range(count)]
        self.make_namespaces(names)
        return names

    async def start_agent(self, *, die_at: str = "", mtu: int = 0) -> None:
        assert self.agent is None
        self.socket.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("cni_agent.py"))]
        command += ["--state-dir", str(self.directory / "state"), "--socket", str(self.socket)]
        command += ["--ranges", str(self.directory / "ranges"), "--log", str(self.directory / "datapath.jsonl")]
        command += ["--die-at", die_at, "--mtu", str(mtu)]
        with (self.directory / "agent.log").open("a") as log:
            self.agent = await asyncio.create_subprocess_exec(
                "nsenter",
                f"--net={self.netns}",
                *command,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            )
        assert self.agent.stdout is not None
        line = await asyncio.wait_for(self.agent.stdout.readline(), 30)
        assert line == b"ready\n", (self.directory / "agent.log").read_text()

    async def stop_agent(self) -> None:
        """With SIGKILL: nothing here may depend on an orderly end."""
        if self.agent is not None:
            if self.agent.returncode is None:
                self.agent.kill()
            await self.agent.wait()
            self.agent = None

    async def call(
        self,
        command: str,
        pod: str = "",
        *,
        ifname: str = "eth0",
        version: str = "1.1.0",
        network: str = "pods",
        environment: dict[str, str] | None = None,
        raw: bytes | None = None,
        **configuration: Any,
    ) -> Answer:
        """Run the plugin as a runtime does, for the pod whose namespace is called `pod`."""
        variables = {"CNI_COMMAND": command, "CNI_PATH": "/opt/cni/bin"}
        if pod:
            variables |= {"CNI_CONTAINERID": pod, "CNI_IFNAME": ifname, "CNI_NETNS": str(NETNS / pod)}
        variables |= environment or {}
        document = {"cniVersion": version, "name": network, "type": "waggle-cni", "apiSocket": str(self.socket)}
        text = raw if raw is not None else json.dumps({**document, **configuration}).encode()
        process = await asyncio.create_subprocess_exec(
            str(self.plugin), env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(text), 120)
        assert process.returncode in (0, 1), (process.returncode, output)
        return Answer(process.returncode, output)

    async def add(self, pod: str, **more: Any) -> Answer:
        answer = await self.call("ADD", pod, **more)
        assert answer.exit_code == 0, answer.output
        return answer

    async def delete(self, pod: str, **more: Any) -> None:
        answer = await self.call("DEL", pod, **more)
        assert (answer.exit_code, answer.output) == (0, b""), answer

    async def pods(self) -> dict[str, Any]:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as session,
            session.get("http://agent/pods") as response,
        ):
            return await response.json()

    # -- what is there

    def host_links(self) -> dict[str, Link]:
        with Netlink(self.netns) as netlink:
            return {link.name: link for link in netlink.links() if link.name.startswith("wag")}

    def records(self) -> dict[str, dict[str, Any]]:
        files = (self.directory / "state" / "cni").glob("wag*.json")
        return {file.stem: json.loads(file.read_text()) for file in files}

    def datapath_calls(self) -> list[dict[str, Any]]:
        log = self.directory / "datapath.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def assert_nothing_left(self) -> None:
        assert self.host_links() == {}
        assert self.records() == {}
        with Netlink(self.netns) as netlink:
            assert netlink.routes(protocol=RTPROT_WAGGLE) == []
            assert [entry for entry in netlink.neighbours() if entry.permanent] == []
        assert [file.name for file in (self.directory / "state" / "cni").glob("*.tmp")] == []


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def build_plugin(directory: Path) -> Path:
    """The plugin, built from its sources by its own Makefile."""
    assert shutil.which("make"), "make is missing"
    binary = directory / "waggle-cni"
    run("make", "--no-print-directory", "-C", str(ROOT / "cni"), f"OUTPUT={binary}")
    return binary


def pod_view(pod: str, function: Callable[[Netlink], T]) -> T:
    with Netlink(NETNS / pod) as netlink:
        return function(netlink)


def echo(netns: Path, address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = call_in_netns(netns, lambda: socket.create_server((address, port), family=family))
    server.settimeout(10)
    return server


def talk(server: socket.socket, client_netns: Path, address: str, port: int) -> str:
    """One byte each way; the address the server saw."""
    client = call_in_netns(client_netns, lambda: socket.create_connection((address, port), timeout=10))
    with client:
        connection, peer = server.accept()
        with connection:
            client.sendall(b"?")
            assert connection.recv(1) == b"?"
            connection.sendall(b"!")
            assert client.recv(1) == b"!"
    return str(peer[0])


async def until(condition: Callable[[], bool]) -> None:
    """The kernel removes a namespace's interfaces some time after the namespace."""
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("did not happen within 10 s")
