"""One real agent on a node of its own: a network namespace with an uplink to a neighbour, a cgroup, directories.

Everything is named after the test process and removed by `close`, whatever state the test left it in.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from waggle.kernel.cgroup import cgroup2_mount
from waggle.kernel.links import query_programs
from waggle.kernel.netlink import Netlink
from waggle.kernel.netns import call_in_netns
from waggle.reconcile.datapath import CGROUP_HOOKS

WAGGLE = [sys.executable, "-m", "waggle.cli.main"]
PLUGIN = Path(__file__).resolve().parents[2] / "src" / "waggle" / "bpf" / "waggle-cni"
NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
PEER4, PEER6 = "192.0.2.2", "2001:db8::2"
BPFFS = Path("/sys/fs/bpf")
SYSCTLS = ("net/ipv4/ip_forward", "net/ipv[46]/conf/*/forwarding", "net/ipv4/conf/*/accept_redirects")
_JOIN = 'echo 0 > "$1/cgroup.procs" || exit 125; shift; exec "$@"'
_numbers = itertools.count(1)


@dataclass
class AgentNode:
    """`directory` holds manifests, state and logs. `families`: of the node's own addresses."""

    directory: Path
    families: tuple[int, ...] = (4, 6)
    name: str = field(default_factory=lambda: f"wagag-{os.getpid()}-{next(_numbers)}")
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    agent: subprocess.Popen[bytes] | None = None  # for tests that replace it
    pods: list[str] = field(default_factory=list)
    pod_netns: dict[str, Path] = field(default_factory=dict)  # of pods that `add_pods` made, by name
    pod_address: dict[str, str] = field(default_factory=dict)

    @property
    def netns(self) -> Path:
        return Path("/run/netns") / self.name

    @property
    def peer(self) -> Path:
        return Path("/run/netns") / f"{self.name}-peer"

    @property
    def cgroup(self) -> Path:
        return cgroup2_mount() / self.name

    @property
    def bpf_root(self) -> Path:
        return BPFFS / self.name

    @property
    def manifests(self) -> Path:
        return self.directory / "manifests"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "agent.sock"

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        for namespace in (self.netns, self.peer):
            _run("ip", "netns", "add", namespace.name)
            _run("ip", "-n", namespace.name, "link", "set", "lo", "up")
            for setting in ("accept_dad", "router_solicitations"):  # else addresses and routes come when they like
                call_in_netns(namespace, lambda s=setting: Path(f"/proc/sys/net/ipv6/conf/default/{s}").write_text("0"))
        _run("ip", "-n", self.name, "link", "add", "up0", "type", "veth", "peer", "up0", "netns", self.peer.name)
        for namespace, addresses in ((self.netns, (NODE4, NODE6)), (self.peer, (PEER4, PEER6))):
            for address in addresses:
                if (6 if ":" in address else 4) in self.families:
                    length = "/64" if ":" in address else "/24"
                    nodad = ["nodad"] if ":" in address else []
                    _run("ip", "-n", namespace.name, "address", "add", address + length, "dev", "up0", *nodad)
            _run("ip", "-n", namespace.name, "link", "set", "up0", "up")
        for family, gateway in ((4, PEER4), (6, PEER6)):
            if family in self.families:
                _run("ip", "-n", self.name, f"-{family}", "route", "add", "default", "via", gateway)
        self.cgroup.mkdir()
        self.manifests.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for name in (self.name, self.peer.name, *self.pods):
                stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True, check=False)
            stack.callback(_remove_cgroup, self.cgroup)
            stack.callback(lambda: shutil.rmtree(self.bpf_root, ignore_errors=True))
            for process in self.running:
                stack.callback(_end, process)
        left = [p for p in (self.netns, self.peer, self.cgroup, self.bpf_root) if p.exists()]
        assert not left, left

    # -- agents and commands ------------------------------------------------------------------------------------

    def settings(self, **changes: object) -> list[str]:
        """The command line of this node's agent; a change to None leaves the setting out."""
        values: dict[str, object] = {
            "node-name": "here",
            "manifests": self.manifests,
            "pod-cidr": "10.244.1.0/24,fd00:10:244:1::/64",
            "cgroup-root": self.cgroup,
            "bpf-root": self.bpf_root,
            "state-dir": self.state,
            "api-socket": self.socket,
            "metrics-address": "",
            "max-services": 1024,
            "max-backends": 1024,
            "max-nat": 1024,
        } | {name.replace("_", "-"): value for name, value in changes.items()}
        return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]

    def inside(self, command: Sequence[str], *, cgroup: bool = True, netns: Path | None = None) -> list[str]:
        """The command line that runs `command` in the node's network, as one of its processes."""
        entered = ["nsenter", f"--net={netns or self.netns}", "--", *command]
        return ["sh", "-c", _JOIN, "sh", str(self.cgroup), *entered] if cgroup else entered

    def waggle(self, *arguments: str, cgroup: bool = True) -> subprocess.CompletedProcess[str]:
        """A waggle command to its end."""
        command = self.inside([*WAGGLE, *arguments], cgroup=cgroup)
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def refused(self, **changes: object) -> str:
        """Starts an agent that cannot start: what it says, in the one line that it may say."""
        done = self.waggle("agent", *self.settings(log_level="error", **changes))
        assert done.returncode == 1, done
        assert done.stdout == "" and "Traceback" not in done.stderr, done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("waggle: "), done.stderr
        return lines[0]

    def start(self, *, wait: str = "/readyz", before: Sequence[str] = (), **changes: object) -> subprocess.Popen[bytes]:
        """Starts an agent, and waits until its tables hold what the manifests say, or for what `wait` asks."""
        command = self.inside([*before, *WAGGLE, "agent", *self.settings(**changes)])
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.running.append(process)
        if wait:
            self.until(lambda: process.poll() is not None or self.answers(wait), 60)
            assert process.poll() is None, self.log.read_text()
        return process

    def stop(self, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> int:
        process.send_signal(number)
        code = process.wait(20)
        self.running.remove(process)
        return code

    @property
    def log(self) -> Path:
        return self.directory / "agent.log"

    def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:] if self.log.exists() else "no log"
            time.sleep(0.02)

    def request(self, target: str) -> tuple[int, bytes]:
        """(status, body) of GET on the unix socket."""
        connection = http.client.HTTPConnection("localhost", timeout=10)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(10)
        try:
            connection.sock.connect(str(self.socket))
            connection.request("GET", target)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def answers(self, target: str) -> bool:
        try:
            return self.request(target)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def get(self, target: str) -> Any:
        status, body = self.request(target)
        assert status == 200, body
        return json.loads(body)

    def dump(self, name: str) -> list[dict[str, Any]]:
        """`waggle map dump`, as JSON."""
        done = self.waggle("map", "dump", name, "--bpf-root", str(self.bpf_root), "-o", "json", cgroup=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    # -- what there is ------------------------------------------------------------------------------------------

    def apply(self, name: str, *documents: dict[str, Any]) -> None:
        """A manifest, replaced in one step."""
        scratch = self.directory / f"{name}.tmp"
        scratch.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)}))
        scratch.rename(self.manifests / f"{name}.json")

    def add_pod(self, suffix: str, **config: Any) -> tuple[str, str]:
        """A pod by the real plugin: the name of its namespace, its IPv4 address. `config`: of the network's."""
        name = f"{self.name}-{suffix}"
        _run("ip", "netns", "add", name)
        self.pods.append(name)
        done = self.cni("ADD", name, **config)
        assert done.returncode == 0, done.stdout
        return name, json.loads(done.stdout)["ips"][0]["address"].partition("/")[0]

    def add_pods(self, namespace: str, *names: str) -> None:
        """The same, with names as Kubernetes gives them."""
        for name in names:
            arguments = f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}"
            made, self.pod_address[name] = self.add_pod(name, arguments=arguments)
            self.pod_netns[name] = Path("/run/netns") / made

    def cni(self, command: str, pod: str, arguments: str = "", **config: Any) -> subprocess.CompletedProcess[str]:
        """The plugin, as a runtime runs it. `arguments`: CNI_ARGS."""
        variables = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": f"/run/netns/{pod}",
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": arguments,
        }
        base = {"cniVersion": "1.1.0", "name": "w", "type": "waggle-cni", "apiSocket": str(self.socket)}
        text = json.dumps(base | config)
        return subprocess.run(
            [str(PLUGIN)], env=variables, input=text, capture_output=True, text=True, timeout=60, check=False
        )

    def facts(self) -> dict[str, Any]:
        """Everything of this node that an agent may change, sysctls apart."""
        found: dict[str, Any] = {"hooks": self.hooks()}
        for what in ("link", "address", "route", "-6 route", "rule", "-6 rule"):
            found[what] = _run("ip", "-n", self.name, *what.split(), "show")
        found["pins"] = sorted(str(p) for p in self.bpf_root.rglob("*")) if self.bpf_root.exists() else None
        found["files"] = sorted(str(p) for p in self.directory.rglob("*") if p != self.log)
        return found

    def hooks(self) -> dict[str, list[str]]:
        """Hook → names of the programs there, of the cgroup and of the node's interfaces."""
        descriptor = os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            found = {h.name: [n for _, n in query_programs(descriptor, h)] for h in CGROUP_HOOKS.values()}
        finally:
            os.close(descriptor)

        def interfaces() -> dict[str, list[str]]:
            from waggle.kernel.links import AttachType

            with Netlink() as netlink:
                return {
                    f"{link.name} {hook.name}": [n for _, n in query_programs(link.index, hook)]
                    for link in netlink.links()
                    for hook in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS)
                }

        return found | call_in_netns(self.netns, interfaces)

    def sysctls(self) -> dict[str, str]:
        root = Path("/proc/sys")
        return call_in_netns(
            self.netns,
            lambda: {str(p): p.read_text().strip() for pattern in SYSCTLS for p in sorted(root.glob(pattern))},
        )

    # -- traffic ------------------------------------------------------------------------------------------------

    def connect(
        self, address: str, port: int, *, cgroup: bool = True, netns: Path | None = None, timeout: float = 2.0
    ) -> str:
        """What a server says to a connection from the node: its text, or the name of the error."""
        script = (
            "import socket, sys\n"
            "try:\n"
            "    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))\n"
            "    print(s.recv(100).decode())\n"
            "except OSError as error:\n"
            "    print(type(error).__name__)\n"
        )
        command = [sys.executable, "-c", script, address, str(port), str(timeout)]
        done = subprocess.run(
            self.inside(command, cgroup=cgroup, netns=netns), capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    def serve(self, netns: Path, text: str, port: int = 8080) -> None:
        """A server in `netns` that says `text` to whoever connects, until `close`."""
        script = (
            "import socket, sys\n"
            "s = socket.create_server(('::', int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)\n"
            "print('ready', flush=True)\n"
            "while True:\n"
            "    c, _ = s.accept()\n"
            "    c.sendall(sys.argv[2].encode())\n"
            "    c.close()\n"
        )
        process = subprocess.Popen(
            ["nsenter", f"--net={netns}", sys.executable, "-c", script, str(port), text], stdout=subprocess.PIPE
        )
        self.running.append(process)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"


def service(name: str, address: str, *, port: int = 80, **spec: Any) -> dict[str, Any]:
    """A Service without a selector."""
    ports = [{"name": "p", "port": port, "protocol": "TCP", "targetPort": 8080}]
    for entry in ports:
        if "nodePort" in spec:
            entry["nodePort"] = spec.pop("nodePort")
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "t"},
        "spec": {"clusterIP": address, "ports": ports, **spec},
    }


def endpoints(name: str, *addresses: str, port: int = 8080) -> dict[str, Any]:
    """The EndpointSlice of a Service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "t", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv6" if any(":" in a for a in addresses) else "IPv4",
        "ports": [{"name": "p", "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
    }


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(10)
    if process.stdout is not None:
        process.stdout.close()


def _remove_cgroup(cgroup: Path) -> None:
    for child in cgroup.glob("*/"):  # what outlives agents on purpose
        (child / "cgroup.kill").write_text("1")
        _remove_cgroup(child)
    for _ in range(200):  # the kernel takes a moment to let go of the last process
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
