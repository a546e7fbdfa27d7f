"""A node moves from kube-proxy to waggle and back, under connections that last: none is lost, whichever way it came.

Each of kube-proxy's modes: its rules are those of the benchmark's generators, its process a stand-in with its name.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import NODE4, PEER4, AgentNode, endpoints, service
from bench import iptables_rules, nftables_rules
from bench.service_ports import Endpoint, ServicePort
from ledger import LedgerLoad, Way, server_command

SECOND4 = "192.0.2.3"  # a second backend beyond the uplink
LOCAL_VIP, REMOTE_VIP = "10.96.0.10", "10.96.0.11"
LOCAL_PORT, REMOTE_PORT = 30080, 30081
POD_CIDR, SERVICE_CIDR = "10.244.1.0/24", "10.96.0.0/16"
NAT_ENTRIES = 1 << 16  # short connections come by the hundred a second, and stay for a while after their end
MODES = ("iptables-legacy", "iptables-nft", "nft")


class Node(AgentNode):
    """With two pods that serve, one that asks, and two backends beyond the uplink."""

    def prepare(self) -> None:
        self.open()
        subprocess.run(["ip", "-n", self.peer.name, "address", "add", f"{SECOND4}/24", "dev", "up0"], check=True)
        subprocess.run(["ip", "-n", self.peer.name, "route", "add", POD_CIDR, "via", NODE4], check=True)
        agent = self.start(max_nat=NAT_ENTRIES)
        self.client, _ = self.add_pod("client")
        self.backends = []
        for number in (1, 2):
            name, address = self.add_pod(f"b{number}")
            self.backends.append(address)
            self.answer(Path("/run/netns") / name)
        self.answer(self.peer)
        for name, vip, port, addresses in self.services():
            slices = [endpoints(name, *addresses), endpoints(name, *self.of_udp(addresses))]
            for one, protocol in zip(slices, ("TCP", "UDP"), strict=True):
                one["metadata"]["name"] = f"{name}-{protocol.lower()}"
                one["ports"] = [{"name": protocol.lower(), "port": 8080, "protocol": protocol}]
            one = service(name, vip, type="NodePort")
            one["spec"]["ports"] = [
                {"name": p.lower(), "port": 80, "protocol": p, "targetPort": 8080, "nodePort": port}
                for p in ("TCP", "UDP")
            ]
            self.apply(name, one, *slices)
        assert self.stop(agent, signal.SIGTERM) == 0
        # pods and routes are there, programs are not: a node that another proxy serves
        assert self.takeover("--restore").returncode == 0

    def services(self) -> list[tuple[str, str, int, list[str]]]:
        return [
            ("local", LOCAL_VIP, LOCAL_PORT, self.backends),
            ("remote", REMOTE_VIP, REMOTE_PORT, [PEER4, SECOND4]),
        ]

    @staticmethod
    def of_udp(addresses: list[str]) -> list[str]:
        """The peer's second address is not one that it answers datagrams from."""
        return [address for address in addresses if address != SECOND4]

    def answer(self, netns: Path) -> None:
        self.running.append(subprocess.Popen(["nsenter", f"--net={netns}", *server_command(8080)]))

    def rules(self, mode: str) -> None:
        """What kube-proxy writes in this mode."""
        ports = [
            ServicePort("t", name, protocol.lower(), protocol, vip, 80, [Endpoint(a, 8080) for a in served], port)
            for name, vip, port, addresses in self.services()
            for protocol, served in (("TCP", addresses), ("UDP", self.of_udp(addresses)))
        ]
        if mode == "nft":
            self.tool("nft", "-f", "-", stdin=nftables_rules.full_sync(ports, POD_CIDR, SERVICE_CIDR))
            return
        self.tool(f"{mode}-restore", "--noflush", stdin=iptables_rules.jumps())
        self.tool(f"{mode}-restore", "--noflush", stdin=iptables_rules.sync(ports, POD_CIDR))

    def tool(self, *command: str, stdin: str = "") -> str:
        done = subprocess.run(self.inside(command), input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def rule_text(self, mode: str) -> str:
        if mode == "nft":
            return self.tool("nft", "--stateless", "list", "ruleset")
        lines = self.tool(f"{mode}-save").splitlines()
        return "\n".join(line.partition(" [")[0] for line in lines if not line.startswith("#"))

    def takeover(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.waggle(
            "takeover", "--api-socket", str(self.socket), "--bpf-root", str(self.bpf_root), "--state-dir",
            str(self.state), *arguments, cgroup=False,
        )  # fmt: skip

    def start_beside(self) -> subprocess.Popen[bytes]:
        """The agent, although kube-proxy runs: by the file, as on a real node."""
        file = self.directory / "agent.yaml"
        file.write_text("beside-kube-proxy: true\n")
        return self.start(config=file, max_nat=NAT_ENTRIES)

    def kube_proxy(self) -> subprocess.Popen[bytes]:
        program = self.directory / "kube-proxy"
        shutil.copy("/bin/sleep", program)
        process = subprocess.Popen(["nsenter", f"--net={self.netns}", str(program), "600"])
        self.running.append(process)
        self.until(lambda: Path(f"/proc/{process.pid}/comm").read_text().strip() == "kube-proxy")
        return process


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    missing = [tool for mode in MODES if not shutil.which(tool := mode if mode == "nft" else f"{mode}-restore")]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    node = Node(tmp_path_factory.mktemp("takeover"))
    try:
        node.prepare()
        yield node
    finally:
        node.close()


def ways(*addresses: tuple[str, int]) -> list[Way]:
    return [
        Way(f"{kind}-{host}-{port}", kind, host, port, pause=0.02)
        for host, port in addresses
        for kind in ("tcp-long", "udp-long", "tcp-new")
    ]


@pytest.mark.parametrize("mode", MODES)
def test_no_connection_is_lost_on_the_way_to_waggle_and_back(node: Node, mode: str) -> None:
    node.rules(mode)
    before = node.rule_text(mode)
    assert "KUBE-" in before or "kube-proxy" in before
    pod = Path("/run/netns") / node.client
    loads = [
        LedgerLoad(["nsenter", f"--net={pod}", "--"], ways((LOCAL_VIP, 80), (REMOTE_VIP, 80))),
        LedgerLoad(["nsenter", f"--net={node.peer}", "--"], ways((NODE4, LOCAL_PORT), (NODE4, REMOTE_PORT))),
    ]

    def goes_on() -> None:
        for load in loads:
            load.await_answers(10)

    proxy = node.kube_proxy()
    try:
        goes_on()
        assert f"kube-proxy runs on this node (process {proxy.pid})" in node.refused()
        agent = node.start_beside()
        goes_on()
        assert int(node.dump("wag_nat_counts")[0]["begun"]) > 0  # what begins now is waggle's
        assert "still runs" in node.takeover().stderr
        node.stop(proxy)
        dry = json.loads(node.takeover("--dry-run", "-o", "json").stdout)
        assert dry["rules"] and node.rule_text(mode) == before
        done = node.takeover("-o", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rules"] == dry["rules"]
        now = node.rule_text(mode)
        assert "KUBE-SERVICES" not in now and "table ip kube-proxy" not in now
        goes_on()
        node.tool("conntrack", "-F")  # nothing hangs on it any more
        goes_on()
        assert node.stop(agent, signal.SIGTERM) == 0
        back = node.takeover("--restore", "-o", "json")
        assert back.returncode == 0, back.stderr
        assert json.loads(back.stdout)["flows"] >= 8
        assert not list((node.bpf_root / "links").iterdir())
        # kube-proxy puts its jumps first as well; the kubelet's may have stood before them
        assert sorted(node.rule_text(mode).splitlines()) == sorted(before.splitlines())
        goes_on()
        accounts = [item for load in loads for item in load.finish().items()]
        broken = {name: account for name, account in accounts if account.errors or account.open_items}
        assert not [name for name in broken if "-long-" in name], broken
        # one that begins in the very moment in which programs come or go can meet half of each
        assert sum(account.errors.total() for account in broken.values()) <= 2, broken
    finally:
        for load in loads:
            load.close()
        if proxy in node.running:
            node.stop(proxy)
        remaining = [one for one in node.running if "waggle.cli.main" in one.args]
        for one in remaining:
            node.stop(one)
        node.takeover("--restore")
        node.tool("nft", "flush", "ruleset")
        node.tool("iptables-legacy-restore", stdin="*nat\nCOMMIT\n*filter\nCOMMIT\n")
        node.tool("conntrack", "-F")
