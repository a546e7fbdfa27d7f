"""What one real agent tells of real traffic: flows and drops with names, from its history and as they come."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from agent_node import NODE4, PEER4, WAGGLE, AgentNode, endpoints, service

from waggle.kernel.netns import call_in_netns

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

VIP, EMPTY, FREE = "10.96.0.10", "10.96.0.11", "10.96.0.77"
RATE = 50
SETTINGS = {"metrics_address": "127.0.0.1:9970", "service_cidr": "10.96.0.0/16", "event_rate": RATE}


class Cluster(AgentNode):
    """A node with the pods t/client and t/server, and a peer that is the world."""

    def fill(self) -> None:
        self.add_pods("t", "client", "server")
        self.serve(self.pod_netns["server"], "server")
        self.serve(self.peer, "peer")
        route = ["ip", "-n", self.peer.name, "route", "add", "10.244.1.0/24", "via", NODE4]
        subprocess.run(route, check=True)
        self.apply("web", service("web", VIP), endpoints("web", self.pod_address["server"]))
        self.apply("empty", service("empty", EMPTY))
        self.until(lambda: self.connect(VIP, 80) == "server")

    def flows(self, *questions: str) -> list[dict[str, Any]]:
        """`waggle flows` to its end."""
        done = self.waggle("flows", "-o", "json", *questions, "--api-socket", str(self.socket), cgroup=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def soon(self, *questions: str) -> list[dict[str, Any]]:
        """As `flows`, when there is something: the agent looks ten times a second."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = self.flows("--since", "1m", *questions)
            return bool(found)

        self.until(look)
        return found

    def ask(self, address: str, port: int, *, of: str = "client", cgroup: bool = True) -> str:
        return self.connect(address, port, netns=self.pod_netns[of], cgroup=cgroup)

    def datagrams(self, address: str, port: int, count: int) -> None:
        """From the client pod, past the socket hooks."""
        script = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for _ in range(int(sys.argv[3])):\n"
            "    s.sendto(b'x', (sys.argv[1], int(sys.argv[2])))\n"
        )
        command = [sys.executable, "-c", script, address, str(port), str(count)]
        subprocess.run(self.inside(command, cgroup=False, netns=self.pod_netns["client"]), check=True, timeout=30)

    def metrics(self) -> dict[str, float]:
        def get() -> str:
            with urllib.request.urlopen("http://127.0.0.1:9970/metrics", timeout=10) as answer:
                return answer.read().decode()

        lines = call_in_netns(self.netns, get).splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("flows")) as made:
        made.agent = made.start(flow_log=made.directory / "log" / "flows.jsonl", **SETTINGS)
        made.fill()
        yield made


def test_pod_to_pod_by_name(cluster: Cluster) -> None:
    assert cluster.ask(cluster.pod_address["server"], 8080) == "server"
    (flow,) = cluster.soon("--from", "t/client", "--to", "pod:t/server", "--port", "8080")[:1]
    assert (flow["kind"], flow["verdict"], flow["hook"], flow["protocol"]) == ("flow", "forwarded", "pod_egress", "TCP")
    assert (flow["source"]["name"], flow["destination"]["name"]) == ("pod t/client", "pod t/server")
    assert flow["destination"]["text"] == f"{cluster.pod_address['server']}:8080" and "service" not in flow


def test_pod_to_a_service_as_the_socket_and_as_its_packets_are(cluster: Cluster) -> None:
    time.sleep(1.1)  # these ends may just have been told of
    assert cluster.ask(VIP, 80) == "server"
    cluster.until(lambda: {"socket", "pod_egress"} <= {f["hook"] for f in cluster.flows("--service", "t/web")})
    at = {flow["hook"]: flow for flow in cluster.flows("--service", "t/web", "--from", "t/client")}
    assert at["socket"]["destination"]["text"] == f"{VIP}:80"
    assert at["socket"]["backend"]["name"] == "pod t/server"
    assert at["pod_egress"]["destination"]["name"] == "pod t/server"
    assert {flow["hook"] for flow in cluster.flows("--to", "service:t/web", "--from", "t/")} == {"socket", "pod_egress"}


def test_pod_to_the_world_and_back(cluster: Cluster) -> None:
    assert cluster.ask(PEER4, 8080) == "peer"
    assert cluster.connect(cluster.pod_address["server"], 8080, cgroup=False, netns=cluster.peer) == "server"
    (out,) = cluster.soon("--from", "t/client", "--to", f"{PEER4}/32")
    assert (out["hook"], out["source"]["name"], out["destination"]["name"]) == ("pod_egress", "pod t/client", "")
    (come,) = cluster.soon("--from", PEER4, "--to", "t/server")
    assert (come["hook"], come["destination"]["name"]) == ("node_ingress", "pod t/server")


def test_the_node_to_a_pod(cluster: Cluster) -> None:
    assert cluster.connect(cluster.pod_address["client"], 81) == "ConnectionRefusedError"
    (flow,) = cluster.soon("--from", NODE4, "--to", "t/client")
    assert (flow["hook"], flow["destination"]["port"]) == ("pod_ingress", 81)


def test_a_drop_is_found_again_by_its_id(cluster: Cluster) -> None:
    assert cluster.ask(EMPTY, 80, cgroup=False) == "ConnectionRefusedError"  # by a packet
    (drop,) = cluster.soon("--verdict", "rejected", "--from", "t/client")
    assert (drop["reason"], drop["service"], drop["source"]["name"]) == ("no_backend", "t/empty", "pod t/client")
    assert cluster.get(f"/events/{drop['id']}") == drop
    assert cluster.request(f"/events/{drop['id']}9")[0] == 404
    done = cluster.waggle("flows", "--verdict", "drop", "--api-socket", str(cluster.socket), cgroup=False)
    assert f"#{drop['id']}" in done.stdout and "pod t/client" in done.stdout, done


def test_last_and_since(cluster: Cluster) -> None:
    cluster.soon()
    every = cluster.flows("--since", "10m")
    assert len(every) > 2
    assert cluster.flows("--last", "2") == every[-2:]
    assert cluster.flows("--last", "0") == []
    time.sleep(0.3)
    assert cluster.flows("--since", "0.1") == []


def test_follow_goes_on_after_what_is_remembered(cluster: Cluster) -> None:
    cluster.soon("--from", "t/client")
    command = ["flows", "--follow", "--last", "1", "--limit", "2", "--from", "t/client", "-o", "json"]
    command += ["--api-socket", str(cluster.socket)]
    with subprocess.Popen(cluster.inside([*WAGGLE, *command]), stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout is not None
            first = json.loads(reader.stdout.readline())
            assert cluster.ask(PEER4, 4321) == "ConnectionRefusedError"
            second = json.loads(reader.stdout.readline())
            assert reader.wait(10) == 0
        finally:
            reader.kill()
    assert first["time"] < second["time"] and second["destination"]["text"] == f"{PEER4}:4321"


def test_a_wrong_question_is_said_to_be_wrong(cluster: Cluster) -> None:
    done = cluster.waggle("flows", "--port", "http", "--api-socket", str(cluster.socket), cgroup=False)
    assert done.returncode == 2 and "--port" in done.stderr
    status, words = cluster.request("/events?port=http")
    assert (status, words) == (400, b"port: 'http' is no port, nor a range such as 8000-8080")


def policy(name: str, audit: bool = False, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "t", "annotations": {"waggle.io/audit": "true"} if audit else {}}
    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    return kind | {"metadata": metadata, "spec": {"podSelector": {}, **spec}}


@pytest.fixture
def policies(cluster: Cluster) -> Iterator[Cluster]:
    """Pods of t are only asked at their port 8080; and would ask nobody, were that enforced."""
    cluster.apply(
        "policies",
        policy("only-8080", ingress=[{"ports": [{"port": 8080}]}]),
        policy("silence", audit=True, policyTypes=["Egress"]),
    )
    yield cluster
    cluster.apply("policies")
    cluster.until(lambda: not cluster.get("/policies"))


def test_what_policies_decide_is_told_by_object_file_and_line(policies: Cluster) -> None:
    policies.until(lambda: policies.ask(policies.pod_address["server"], 9090) == "TimeoutError", 20)
    (drop, *_) = policies.soon("--verdict", "dropped", "--to", "t/server", "--port", "9090")
    assert (drop["kind"], drop["reason"], drop["direction"]) == ("policy", "policy_ingress", "ingress")
    assert (drop["source"]["name"], drop["destination"]["name"]) == ("pod t/client", "pod t/server")
    assert (drop["rule"], drop["policies"]) == (None, ["NetworkPolicy t/only-8080"])
    assert policies.ask(policies.pod_address["server"], 8080) == "server"
    (audit, *_) = policies.soon("--verdict", "audit", "--from", "t/client", "--to", "t/server", "--port", "8080")
    assert (audit["kind"], audit["direction"], audit["policies"]) == ("policy", "egress", ["NetworkPolicy t/silence"])
    values = policies.metrics()
    denied = 'waggle_policy_denials_total{direction="ingress",policy="NetworkPolicy t/only-8080",verdict="dropped"}'
    assert values[denied] >= 1
    assert values['waggle_verdicts_total{direction="egress",verdict="audit"}'] >= 1


def test_a_rule_that_denies_is_named_with_its_place(policies: Cluster) -> None:
    deny = {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "guard"},
        "spec": {
            "tier": "Admin",
            "priority": 10,
            "subject": {"namespaces": {}},
            "egress": [
                {"action": "Accept", "to": [{"networks": ["198.51.100.0/24"]}]},
                {"name": "no-peer", "action": "Deny", "to": [{"networks": [f"{PEER4}/32"]}]},
            ],
        },
    }
    policies.apply("policies", deny)
    policies.until(lambda: policies.ask(PEER4, 8080) == "TimeoutError", 20)
    (drop, *_) = policies.soon("--reason", "policy", "--to", PEER4)
    rule = drop["rule"]
    assert (rule["object"], rule["direction"], rule["index"]) == ("ClusterNetworkPolicy guard", "egress", 1)
    assert rule["name"] == "no-peer"
    assert rule["file"] == str(policies.manifests / "policies.json") and rule["line"] >= 1
    done = policies.waggle("flows", "--reason", "policy", "--api-socket", str(policies.socket), cgroup=False)
    assert "egress rule 1 of ClusterNetworkPolicy guard" in done.stdout, done


FLOOD = 20_000


def test_a_flood_is_counted_exactly_and_told_in_part(cluster: Cluster) -> None:
    name = 'waggle_drops_total{hook="pod_egress",reason="free_address"}'
    before = cluster.metrics()
    cluster.datagrams(FREE, 53, FLOOD)
    cluster.soon("--reason", "free_address")
    after = cluster.metrics()
    assert after[name] - before.get(name, 0) == FLOOD
    told = len(cluster.flows("--since", "1m", "--reason", "free_address"))
    cpus = os.cpu_count() or 1
    assert 0 < told < 10 * RATE * cpus
    left_out = 'waggle_events_suppressed_total{kind="drop"}'
    assert after[left_out] - before[left_out] == FLOOD - told
    assert after["waggle_events_lost_total"] == 0
    time.sleep(1.5)  # the buckets fill again
    cluster.datagrams(FREE, 53, 1)
    (last,) = cluster.flows("--last", "1", "--reason", "free_address")
    assert last["verdict"] == "dropped"


def test_metrics_by_verdict(cluster: Cluster) -> None:
    cluster.ask(EMPTY, 80)
    values = cluster.metrics()
    assert values['waggle_verdicts_total{direction="egress",verdict="forwarded"}'] >= 1
    assert values['waggle_verdicts_total{direction="ingress",verdict="forwarded"}'] >= 1
    assert values['waggle_verdicts_total{direction="egress",verdict="rejected"}'] >= 1
    assert values['waggle_verdicts_total{direction="ingress",verdict="audit"}'] == 0
    assert values["waggle_flow_history_events"] >= 1
    assert 0 < values["waggle_flow_history_bytes"] <= 8 << 20


def test_the_log_has_what_the_history_has(cluster: Cluster) -> None:
    cluster.ask(PEER4, 4322)
    (flow,) = cluster.soon("--port", "4322")
    file = cluster.directory / "log" / "flows.jsonl"
    cluster.until(lambda: '"port":4322' in file.read_text())
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert flow in written
    assert (file.stat().st_mode & 0o777, cluster.metrics()["waggle_flow_log_lost_total"]) == (0o600, 0)


def test_drops_while_no_agent_lives_are_known_to_the_next_one(cluster: Cluster) -> None:
    """Last: the agent is another one afterwards."""
    assert cluster.agent is not None
    cluster.stop(cluster.agent)
    cluster.datagrams("10.96.0.78", 53, 1)
    cluster.agent = cluster.start(flow_log=cluster.directory / "log" / "flows.jsonl", **SETTINGS)
    (drop,) = cluster.soon("--to", "10.96.0.78")
    assert (drop["reason"], drop["source"]["name"]) == ("free_address", "pod t/client")
