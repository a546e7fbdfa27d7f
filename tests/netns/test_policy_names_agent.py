"""A pod that may go where names say: a real agent, a real resolver (dnsmasq), the pod's own C library as its client."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from agent_node import NODE4, NODE6, PEER4, PEER6, AgentNode

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root"),
    pytest.mark.skipif(shutil.which("dnsmasq") is None, reason="needs dnsmasq (Debian: dnsmasq-base)"),
]

PORT = 8080
OWN_DNS = "169.254.53.53"  # of the agent, which forwards what it does not know
MANY = 60  # names that are asked for and used at once
RECORDS = {
    "www.example.com": 1,
    "other.example.com": 2,
    "late.apps.example.com": 3,
    "gone.apps.example.com": 4,
    "target.example.com": 5,
    "own.apps.example.com": 6,
}
RECORDS |= {f"n{n}.apps.example.com": 100 + n for n in range(MANY)}

POLICY = {
    "apiVersion": "policy.networking.k8s.io/v1beta1",
    "kind": "ClusterNetworkPolicy",
    "metadata": {"name": "names"},
    "spec": {
        "tier": "Admin",
        "priority": 10,
        "subject": {"pods": {"namespaceSelector": {}, "podSelector": {}}},
        "egress": [
            {
                "action": "Accept",
                "to": [{"networks": [f"{PEER4}/32", f"{PEER6}/128", f"{OWN_DNS}/32"]}],
                "protocols": [{kind: {"destinationPort": {"number": 53}}} for kind in ("udp", "tcp")],
            },
            {
                "action": "Accept",
                "to": [{"domainNames": ["www.example.com", "*.apps.example.com"]}],
                "protocols": [{"tcp": {"destinationPort": {"number": PORT}}}],
            },
            {"action": "Deny", "to": [{"networks": ["0.0.0.0/0", "::/0"]}]},
        ],
    },
}

#: Resolves each name as any program does, and connects to every address at once. "name address what" for each.
CLIENT = """
import socket, sys
for name in sys.argv[3:]:
    try:
        found = socket.getaddrinfo(name, int(sys.argv[1]), type=socket.SOCK_STREAM)
    except OSError as error:
        print(name, "-", type(error).__name__)
        continue
    for family, kind, number, _, address in found:
        with socket.socket(family, kind, number) as s:
            s.settimeout(float(sys.argv[2]))
            try:
                s.connect(address)
                print(name, address[0], s.recv(100).decode())
            except OSError as error:
                print(name, address[0], type(error).__name__)
"""


def world(number: int) -> tuple[str, str]:
    return f"203.0.113.{number}", f"2001:db8:cb::{number:x}"


class Cluster(AgentNode):
    """A node with the pod t/client. The peer is the world, with a resolver."""

    def asking(self, server: str) -> list[str]:
        """The beginning of a command line whose names are resolved by a server."""
        file = self.directory / f"resolv-{server}.conf"
        file.write_text(f"nameserver {server}\noptions timeout:2 attempts:3\n")
        mounted = f'mount --bind {file} /etc/resolv.conf && exec "$@"'
        return ["unshare", "--mount", "--propagation", "slave", "sh", "-c", mounted, "sh"]

    def run_agent(self) -> None:
        self.agent = self.start(before=self.asking(PEER4), dns_address=OWN_DNS, metrics_address="127.0.0.1:9971")

    def fill(self) -> None:
        self.pod = f"{self.name}-client"
        subprocess.run(["ip", "netns", "add", self.pod], check=True)
        self.pods.append(self.pod)
        done = self.cni("ADD", self.pod, "IgnoreUnknown=1;K8S_POD_NAMESPACE=t;K8S_POD_NAME=client")
        assert done.returncode == 0, done.stdout
        for line in (
            f"route add 10.244.1.0/24 via {NODE4}",
            f"-6 route add fd00:10:244:1::/64 via {NODE6}",
            "route add local 203.0.113.0/24 dev lo",
            "-6 route add local 2001:db8:cb::/48 dev lo",
        ):
            subprocess.run(["ip", "-n", self.peer.name, *line.split()], check=True)
        self.serve(self.peer, "world", PORT)
        self._resolve()
        self.apply("names", POLICY)
        self.until(lambda: self.reaches(world(1)[0]) == ["TimeoutError"], 20)

    def _resolve(self) -> None:
        options = ["--no-daemon", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user=root", "--pid-file="]
        records = [f"--host-record={name},{','.join(world(number))},60" for name, number in RECORDS.items()]
        aliases = ["--cname=alias.apps.example.com,target.example.com,60"]
        big = [f"--host-record=big.apps.example.com,203.0.113.{number},60" for number in range(170, 250)]
        command = [
            "dnsmasq",
            *options,
            "--bind-interfaces",
            f"--listen-address={PEER4},{PEER6}",
            *records,
            *aliases,
            *big,
        ]
        log = (self.directory / "dnsmasq.log").open("wb")
        self.running.append(subprocess.Popen(["nsenter", f"--net={self.peer}", "--", *command], stdout=log, stderr=log))

    def ask(self, *names: str, timeout: float = 3.0, server: str = PEER4) -> dict[tuple[str, str], str]:
        """What becomes of connections to names, from the pod: (name, address) → what the server says, or the error."""
        inside = ["nsenter", f"--net=/run/netns/{self.pod}", *self.asking(server)]
        command = [*inside, sys.executable, "-c", CLIENT, str(PORT), str(timeout), *names]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found = (line.split(" ", 2) for line in done.stdout.splitlines())
        return {(name, address): what for name, address, what in found}

    def reaches(self, *addresses: str, timeout: float = 0.3) -> list[str]:
        return list(self.ask(*addresses, timeout=timeout).values())

    def names(self) -> list[dict[str, Any]]:
        """`waggle policy names`."""
        done = self.waggle("policy", "names", "-o", "json", "--api-socket", str(self.socket), cgroup=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("names")) as made:
        made.run_agent()
        made.fill()
        yield made


def test_an_address_opens_before_the_client_has_the_answer(cluster: Cluster) -> None:
    """Each name and address is new, and connected to at once. None may have to try again: that takes a second."""
    names = [f"n{n}.apps.example.com" for n in range(MANY)]
    found = cluster.ask(*names, timeout=0.9)
    assert found == {(name, address): "world" for n, name in enumerate(names) for address in world(100 + n)}


def test_what_no_pattern_means_stays_closed(cluster: Cluster) -> None:
    found = cluster.ask("www.example.com", "other.example.com", timeout=0.5)
    assert {what for (name, _), what in found.items() if name == "www.example.com"} == {"world"}
    assert {what for (name, _), what in found.items() if name == "other.example.com"} == {"TimeoutError"}
    assert len(found) == 4


def test_what_was_learned_is_shown(cluster: Cluster) -> None:
    cluster.ask("late.apps.example.com")
    rows = [row for row in cluster.names() if row["name"] == "late.apps.example.com"]
    assert {row["address"] for row in rows} == set(world(3))
    assert {(row["namespace"], row["pod"], row["pattern"]) for row in rows} == {("t", "client", "*.apps.example.com")}
    assert all(50 < row["seconds"] <= 60 for row in rows)
    shown = cluster.waggle("policy", "names", "--api-socket", str(cluster.socket), cgroup=False).stdout
    assert "t/client" in shown
    assert "late.apps.example.com" in shown
    metrics = cluster.request("/metrics")[1].decode()
    assert float(metrics.split("\nwaggle_names ")[1].split()[0]) >= 2
    assert float(metrics.split("\nwaggle_name_learned_total ")[1].split()[0]) >= 2


def test_why_knows_what_the_pod_was_told(cluster: Cluster) -> None:
    cluster.ask("www.example.com")
    done = cluster.waggle(
        "why", "t/client", f"www.example.com:{PORT}", "-o", "json", "--api-socket", str(cluster.socket), cgroup=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    (path, *_) = answer["paths"]
    assert (answer["verdict"], path["egress"]["kernel"]["agrees"]) == ("passes", True)
    assert "egress[1]" in path["egress"]["because"]


def test_aliases_and_answers_by_tcp(cluster: Cluster) -> None:
    """More addresses than a datagram of 512 bytes holds: the C library asks again by TCP."""
    found = cluster.ask("big.apps.example.com", timeout=0.9)
    assert len(found) == 80
    assert set(found.values()) == {"world"}
    assert set(cluster.ask("alias.apps.example.com", timeout=0.9).values()) == {"world"}
    # who asks for it by a name that no pattern means, has been told nothing new
    cluster.ask("target.example.com")
    assert {row["pattern"] for row in cluster.names() if row["address"] in world(5)} == {"*.apps.example.com"}


def test_the_nodes_own_server(cluster: Cluster) -> None:
    found = cluster.ask("own.apps.example.com", timeout=0.9, server=OWN_DNS)
    assert found == {("own.apps.example.com", address): "world" for address in world(6)}


def test_without_the_agent_and_after_it(cluster: Cluster) -> None:
    cluster.ask("www.example.com")
    assert cluster.agent is not None
    cluster.stop(cluster.agent, signal.SIGKILL)
    assert cluster.reaches(world(1)[0], timeout=2) == ["world"]
    assert cluster.reaches(world(4)[0]) == ["TimeoutError"]
    assert set(cluster.ask("gone.apps.example.com").values()) == {"world"}  # learned while nobody is there
    cluster.run_agent()
    assert cluster.reaches(world(1)[0], world(4)[0], timeout=2) == ["world", "world"]
    assert cluster.reaches(world(2)[0]) == ["TimeoutError"]
    assert "gone.apps.example.com" in {row["name"] for row in cluster.names()}
    done = cluster.waggle("doctor", "-o", "json", "--api-socket", str(cluster.socket), cgroup=False)
    assert done.returncode == 0, done.stdout


def test_what_policies_accept_no_more_is_cut(cluster: Cluster) -> None:
    cluster.ask("www.example.com", "late.apps.example.com")
    changed = json.loads(json.dumps(POLICY))
    changed["spec"]["egress"][1]["to"][0]["domainNames"] = ["*.apps.example.com"]
    cluster.apply("names", changed)
    cluster.until(lambda: cluster.reaches(world(1)[0]) == ["TimeoutError"])
    assert cluster.reaches(world(3)[0], timeout=2) == ["world"]  # what is left of the policy knows what it knew
    cluster.apply("names", POLICY)
    cluster.until(lambda: set(cluster.ask("www.example.com", timeout=0.5).values()) == {"world"})
