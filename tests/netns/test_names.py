"""One machine with real Podman and no Kubernetes: containers join Services by their labels and find them by name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dns.message
import dns.query
import dns.rcode
import pytest
from agent_node import NODE4, PEER4, PLUGIN, AgentNode

from waggle.config import DNS_ADDRESSES
from waggle.kernel.netlink import Netlink
from waggle.kernel.netns import call_in_netns
from waggle.observe.dump import dump_map

PROGRAMS = ("podman", "runc", "conmon", "catatonit", "busybox", "curl")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/libexec") is None]
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed (tools/setup.sh test): {', '.join(MISSING)}"),
]

IMAGE = "localhost/names:1"
DNS4, DNS6 = DNS_ADDRESSES
#: Says its container's name to whoever asks by HTTP.
SERVER = ("sh", "-c", "mkdir -p /www && hostname > /www/index.html && exec httpd -f -p 8080 -h /www")
#: A Podman that keeps nothing on this machine: what it has at fixed places is the node's own.
_MOUNTS = """
set -e
cd "$1"
mount --bind resolv.conf /etc/resolv.conf
for private in /run /var/lib /dev/shm /etc/containers; do mount -t tmpfs tmpfs $private; done
cp containers.conf storage.conf policy.json /etc/containers/
mkdir -p /run/netns
echo ready
exec sleep 1000000
"""
_CONTAINERS = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
helper_binaries_dir = ["/usr/libexec/podman", "/usr/lib/podman", "/usr/bin"]
[network]
network_backend = "cni"
network_config_dir = "{0}/net.d"
cni_plugin_dirs = ["{0}/bin"]
default_network = "waggle"
"""
_STORAGE = '[storage]\ndriver = "vfs"\ngraphroot = "/var/lib/containers/storage"\nrunroot = "/run/containers"\n'
#: The resolver of the network outside: knows one name.
_UPSTREAM = """
import dns.message, dns.rcode, dns.rrset, socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
s.bind((sys.argv[1], 53))
print("ready", flush=True)
while True:
    wire, client = s.recvfrom(65535)
    query = dns.message.from_wire(wire)
    reply = dns.message.make_response(query, recursion_available=True)
    if query.question[0].name.to_text() == "outside.example.":
        reply.answer.append(dns.rrset.from_text("outside.example.", 60, "IN", "A", sys.argv[1]))
    else:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    s.sendto(reply.to_wire(), client)
"""


@dataclass
class PodmanNode(AgentNode):
    """A node whose runtime is Podman, in mounts of its own."""

    holder: subprocess.Popen[bytes] | None = None
    agent: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        super().open()
        for name in ("net.d", "bin"):
            (self.directory / name).mkdir()
        (self.directory / "resolv.conf").write_text(f"nameserver {PEER4}\n")
        (self.directory / "containers.conf").write_text(_CONTAINERS.format(self.directory))
        (self.directory / "storage.conf").write_text(_STORAGE)
        (self.directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        self.holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNTS, "sh", self.directory],
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout is not None and self.holder.stdout.readline() == b"ready\n"
        upstream = subprocess.Popen(
            ["nsenter", f"--net={self.peer}", sys.executable, "-c", _UPSTREAM, PEER4], stdout=subprocess.PIPE
        )
        self.running.append(upstream)
        assert upstream.stdout is not None and upstream.stdout.readline() == b"ready\n"

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            mounts = Path("/sys/fs/cgroup")  # of all hierarchies, or the only one
            for root in {mounts, *(path.parent for path in mounts.glob("*/cgroup.procs"))}:
                stack.callback(_remove_cgroups, root / f"{self.name}-podman")
            stack.callback(super().close)
            if self.holder is not None:
                stack.callback(self._end_holder, self.holder)
                stack.callback(self.podman, "rm", "--all", "--force", "--time", "0", check=False)
                stack.callback(self.podman, "pod", "rm", "--all", "--force", "--time", "0", check=False)

    def _end_holder(self, holder: subprocess.Popen[bytes]) -> None:
        mounts = Path(f"/proc/{holder.pid}/ns/mnt").stat().st_ino
        for process in Path("/proc").iterdir():  # a container that could not be removed, a podman that hangs
            with contextlib.suppress(OSError):
                pid = int(process.name) if process.name.isdecimal() else holder.pid
                if pid != holder.pid and (process / "ns/mnt").stat().st_ino == mounts:
                    os.kill(pid, signal.SIGKILL)
        holder.kill()
        holder.wait(10)
        assert holder.stdout is not None
        holder.stdout.close()

    def mounted(self, *command: object) -> list[str]:
        assert self.holder is not None
        return ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "--", *map(str, command)]

    def run_agent(self) -> None:
        self.agent = self.start(
            before=self.mounted(),
            service_cidr="10.96.0.0/16,fd00:10:96::/112",
            cni_bin_dir=self.directory / "bin",
            cni_conf_dir=self.directory / "net.d",
            podman="auto",
        )
        self.until(lambda: (self.directory / "net.d" / "05-waggle.conflist").exists())

    def podman(self, *arguments: object, check: bool = True) -> str:
        command = self.inside(self.mounted("podman", *arguments))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert not check or done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout.strip()

    def container(self, *arguments: object, serve: bool = True) -> str:
        """A container in the background: its ID."""
        parent = ("--cgroup-parent", f"/{self.name}-podman")
        return self.podman("run", "--detach", *parent, *arguments, IMAGE, *(SERVER if serve else ("sleep", "1000")))

    def curl(self, url: str, client: str = "client") -> str:
        return self.podman("exec", client, "curl", "-sS", "--max-time", "10", url)

    def netns_of(self, container: str) -> Path:
        return Path("/proc") / self.podman("inspect", "--format", "{{.State.Pid}}", container) / "ns/net"

    def backends(self, service: str) -> set[str]:
        """Names of the pods that the Service leads to."""
        (row,) = [row for row in self.get("/services") if row["name"] == service]
        return {backend["name"].removeprefix("pod ") for port in row["ports"] for backend in port["backends"]}

    def problems(self) -> list[str]:
        return [f"{p['subject']}: {p['reason']}" for p in self.get("/status")["problems"]]


def _remove_cgroups(cgroup: Path) -> None:
    for child in cgroup.glob("*/"):
        _remove_cgroups(child)
    with contextlib.suppress(FileNotFoundError):
        cgroup.rmdir()


def service(name: str, port: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    ports = [{"name": "http", "port": 80, "targetPort": 8080} | (port or {})]
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"ports": ports, **spec}}


def ask(netns: Path, name: str, kind: str = "A", server: str = DNS4, *, tcp: bool = False) -> dns.message.Message:
    how = dns.query.tcp if tcp else dns.query.udp
    return call_in_netns(netns, lambda: how(dns.message.make_query(name, kind), server, timeout=5))


def addresses(reply: dns.message.Message) -> set[str]:
    return {item.to_text() for rrset in reply.answer for item in rrset}


def tables(node: PodmanNode) -> list[Any]:
    """What the programs read, whether an agent is there or not."""
    return [dump_map(node.bpf_root, name) for name in ("services", "backends")]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodmanNode]:
    """A node with one client and one server, found by label; tests leave it so."""
    made = PodmanNode(tmp_path_factory.mktemp("names"))
    try:
        made.open()
        made.apply("web", service("web", selector={"app": "web"}))
        made.apply("headless", service("headless", selector={"app": "web"}, clusterIP="None"))
        made.run_agent()
        _import_image(made)
        made.container("--name", "web1", "--label", "app=web")
        made.container("--name", "client", serve=False)
        made.until(lambda: made.backends("web") == {"default/web1"})
        yield made
    finally:
        made.close()


def _import_image(node: PodmanNode) -> None:
    root = node.directory / "image"
    (root / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", root / "bin/busybox")
    for applet in ("sh", "httpd", "hostname", "sleep", "mkdir", "cat"):
        (root / "bin" / applet).symlink_to("busybox")
    curl = Path(shutil.which("curl") or "")
    libraries = subprocess.run(["ldd", curl], capture_output=True, text=True, check=True).stdout.split()
    for file in {curl, *(Path(word) for word in libraries if word.startswith("/"))}:
        target = root / str(file).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    archive = node.directory / "image.tar"
    subprocess.run(["tar", "-C", root, "-cf", archive, "."], check=True)
    node.podman("import", archive, IMAGE)


def test_a_label_and_a_service_are_enough(node: PodmanNode) -> None:
    web = node.podman("exec", "web1", "hostname")
    for url in ("http://web.default.svc", "http://web", "http://web.default", "http://web.default.svc.cluster.local"):
        assert node.curl(url) == web
    assert node.problems() == []
    lines = node.podman("exec", "client", "cat", "/etc/resolv.conf").splitlines()
    assert lines[0] == "search default.svc.cluster.local svc.cluster.local cluster.local"
    assert lines[1:3] == [f"nameserver {DNS4}", f"nameserver {DNS6}"]


def test_containers_come_stop_start_and_go(node: PodmanNode) -> None:
    node.container("--name", "web2", "--label", "app=web")
    node.until(lambda: node.backends("web") == {"default/web1", "default/web2"})
    both = addresses(ask(node.netns_of("client"), "headless.default.svc"))
    assert len(both) == 2
    node.podman("stop", "--time", "0", "web2")
    node.until(lambda: node.backends("web") == {"default/web1"})
    node.podman("start", "web2")
    node.until(lambda: node.backends("web") == {"default/web1", "default/web2"})
    node.podman("restart", "--time", "0", "web2")
    node.until(lambda: node.backends("web") == {"default/web1", "default/web2"})
    node.podman("pause", "web2")
    node.until(lambda: node.backends("web") == {"default/web1"})
    node.podman("unpause", "web2")
    node.until(lambda: node.backends("web") == {"default/web1", "default/web2"})
    node.podman("rm", "--force", "--time", "0", "web2")
    node.until(lambda: node.backends("web") == {"default/web1"})
    assert len(addresses(ask(node.netns_of("client"), "headless.default.svc"))) == 1


def test_a_pod_of_podman_is_one_pod(node: PodmanNode) -> None:
    node.apply("pod", service("pod", selector={"app": "inside", "tier": "front"}))
    parent = ("--cgroup-parent", f"/{node.name}-podman")
    node.podman("pod", "create", "--name", "shop", "--label", "tier=front", "--infra-command", "/bin/sleep 1000",
                "--infra-image", IMAGE, *parent)  # fmt: skip
    node.podman(
        "run", "--detach", "--pod", "shop", "--name", "inside", "--label", "app=inside", *parent, IMAGE, *SERVER
    )
    node.until(lambda: node.backends("pod") == {"default/shop"})
    assert node.curl("http://pod")
    node.podman("stop", "--time", "0", "inside")
    node.until(lambda: node.backends("pod") == set())
    node.podman("start", "inside")
    node.until(lambda: node.backends("pod") == {"default/shop"})
    node.podman("pod", "rm", "--force", "--time", "0", "shop")
    node.until(lambda: node.backends("pod") == set())
    (node.manifests / "pod.json").unlink()


def test_names(node: PodmanNode) -> None:
    client = node.netns_of("client")
    for server in DNS_ADDRESSES:
        for tcp in (False, True):
            (address,) = addresses(ask(client, "web.default.svc.cluster.local", server=server, tcp=tcp))
            assert address.startswith("10.96.")
    assert ask(client, "web.default.svc", "AAAA").rcode() == dns.rcode.NOERROR
    assert ask(client, "nope.default.svc").rcode() == dns.rcode.NXDOMAIN
    assert addresses(ask(client, "_http._tcp.web.default.svc", "SRV")) == {"0 100 80 web.default.svc."}
    reverse = ".".join(reversed(address.split("."))) + ".in-addr.arpa"
    assert addresses(ask(client, reverse, "PTR")) == {"web.default.svc.cluster.local."}
    assert addresses(ask(client, "outside.example")) == {PEER4}, "from the node's resolver"
    assert ask(client, "nope.example").rcode() == dns.rcode.NXDOMAIN
    assert addresses(ask(node.netns, "web.default.svc")) == {address}, "the node asks too"


def test_it_is_no_open_resolver(node: PodmanNode) -> None:
    for server in DNS_ADDRESSES:
        via = NODE4 if server == DNS4 else "2001:db8::1"
        subprocess.run(["ip", "-n", node.peer.name, "route", "add", server, "via", via], check=True)
    query = dns.message.make_query("outside.example", "A")
    for server in DNS_ADDRESSES:
        with pytest.raises(dns.exception.Timeout):
            call_in_netns(node.peer, lambda server=server: dns.query.udp(query, server, timeout=0.5))
        with pytest.raises((EOFError, ConnectionError, dns.exception.Timeout)):
            call_in_netns(node.peer, lambda server=server: dns.query.tcp(query, server, timeout=2))


def test_labels_from_the_network_configuration(node: PodmanNode) -> None:
    """Any runtime may give them, by CNI's convention."""
    sleeper = subprocess.Popen(["unshare", "--net", "sleep", "1000"])
    node.running.append(sleeper)
    config = {
        "cniVersion": "1.1.0",
        "name": "w",
        "type": "waggle-cni",
        "apiSocket": str(node.socket),
        "args": {"cni": {"labels": [{"key": "app", "value": "plain"}]}},
    }
    variables = {
        "CNI_CONTAINERID": "plain-1",
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": f"/proc/{sleeper.pid}/ns/net",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": "K8S_POD_NAME=plain;K8S_POD_NAMESPACE=shop",
    }

    node.until(lambda: Path(variables["CNI_NETNS"]).stat().st_ino != Path("/proc/self/ns/net").stat().st_ino)

    def cni(command: str, **more: str) -> dict[str, Any]:
        env = variables | {"CNI_COMMAND": command} | more
        done = subprocess.run([PLUGIN], env=env, input=json.dumps(config), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return json.loads(done.stdout or "{}")

    spec = service("plain", selector={"app": "plain"})
    spec["metadata"]["namespace"] = "shop"
    node.apply("plain", spec)
    result = cni("ADD")
    assert result["dns"]["search"][0] == "shop.svc.cluster.local" and result["dns"]["nameservers"] == list(
        DNS_ADDRESSES
    )
    node.until(lambda: node.backends("plain") == {"shop/plain"})
    cni("DEL")
    node.until(lambda: node.backends("plain") == set())
    # what an orchestrator made is its own to describe
    cni("ADD", CNI_ARGS="K8S_POD_NAME=plain;K8S_POD_NAMESPACE=shop;K8S_POD_UID=1")
    time.sleep(0.3)
    assert node.backends("plain") == set()
    cni("DEL")
    (node.manifests / "plain.json").unlink()


def test_a_target_port_with_a_name_is_told(node: PodmanNode) -> None:
    node.apply("named", service("named", {"targetPort": "http"}, selector={"app": "web"}))
    node.until(lambda: node.problems() != [])
    assert node.problems() == [
        "Service default/named: targetPort 'http' means nothing to containers without Kubernetes: give a number"
    ]
    (node.manifests / "named.json").unlink()
    node.until(lambda: node.problems() == [])


def test_podman_gone(node: PodmanNode) -> None:
    """What was known stays, the status says so, and what happened meanwhile is followed when it is back."""
    podman = shutil.which("podman")
    subprocess.run(node.mounted("mount", "--bind", "/bin/false", podman), check=True)
    try:
        listener = _children(node)
        for pid in listener:  # its events end too
            os.kill(pid, signal.SIGKILL)
        node.until(lambda: any("podman" in problem for problem in node.problems()))
        assert node.backends("web") == {"default/web1"}
    finally:
        subprocess.run(node.mounted("umount", podman), check=True)
    node.until(lambda: node.problems() == [], 40)


def _children(node: PodmanNode) -> list[int]:
    """Processes of Podman that the agent keeps."""
    assert node.agent is not None
    return [int(pid) for pid in Path(f"/proc/{node.agent.pid}/task/{node.agent.pid}/children").read_text().split()]


def test_agent_killed_and_started(node: PodmanNode) -> None:
    """Endpoints stay as they are, Podman's processes end with the agent, and every question is answered."""
    client = node.netns_of("client")
    web = node.podman("exec", "web1", "hostname")
    before = tables(node)
    children = _children(node)
    assert len(children) == 1, "one that listens for Podman's events"
    took: list[float] = []
    refused: list[str] = []
    stop = threading.Event()

    def resolve() -> None:
        """As the C library asks: by a connected socket, which is told when nobody listens."""
        query = dns.message.make_query("web.default.svc", "A")
        with call_in_netns(client, lambda: socket.socket(type=socket.SOCK_DGRAM)) as connected:
            connected.settimeout(30)
            connected.connect((DNS4, 53))
            while not stop.is_set():
                begin = time.monotonic()
                try:
                    connected.send(query.to_wire())
                    assert addresses(dns.message.from_wire(connected.recv(65535)))
                except (OSError, AssertionError) as error:
                    refused.append(repr(error))
                took.append(time.monotonic() - begin)
                time.sleep(0.01)

    thread = threading.Thread(target=resolve)
    thread.start()
    try:
        assert node.agent is not None
        node.until(lambda: len(took) > 10)
        node.stop(node.agent)
        node.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
        assert tables(node) == before
        node.run_agent()
        assert tables(node) == before
        assert node.backends("web") == {"default/web1"}
    finally:
        stop.set()
        thread.join()
    print(f"{len(took)} answers, the slowest after {max(took):.2f} s")
    assert refused == [] and len(took) > 10
    assert "taking over the sockets of the agent before" in node.log.read_text()
    assert node.curl("http://web") == web


def test_cleanup_takes_the_address_away(node: PodmanNode) -> None:
    """Last: the node has no agent afterwards."""

    def present() -> set[str]:
        def look() -> set[str]:
            with Netlink() as netlink:
                return {str(address.ip) for address in netlink.addresses()} & set(DNS_ADDRESSES)

        return call_in_netns(node.netns, look)

    assert present() == set(DNS_ADDRESSES)
    node.podman("rm", "--all", "--force", "--time", "0")
    assert node.agent is not None
    node.stop(node.agent, signal.SIGTERM)
    done = node.waggle(
        *("cleanup", "--bpf-root", str(node.bpf_root), "--state-dir", str(node.state)),
        *("--api-socket", str(node.socket), "--cni-bin-dir", str(node.directory / "bin")),
        *("--cni-conf-dir", str(node.directory / "net.d")),
    )
    assert done.returncode == 0 and f"removed address {DNS4}" in done.stdout, (done.stdout, done.stderr)
    assert present() == set() and "removed process waggle-dns" in done.stdout
