"""`waggle why` asks a real agent: what it says is what happens to packets, and what it proposes lets them pass."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import yaml
from agent_node import NODE4, PEER4, AgentNode, endpoints, service

from waggle.abi._generated import PolicyStep
from waggle.kernel.maps import Map
from waggle.plan.policy_tables import ALLOW

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

VIP = "10.96.0.10"


class Cluster(AgentNode):
    """A node with the pods t/client and t/server, which nobody but the node may ask."""

    def fill(self) -> None:
        self.add_pods("t", "client", "server")
        self.serve(self.pod_netns["server"], "server")
        self.apply("web", service("web", VIP), endpoints("web", self.pod_address["server"]))
        self.apply("wall", {**WALL, "spec": {"podSelector": {}, "policyTypes": ["Ingress"]}})
        self.until(lambda: self.ask(self.pod_address["server"], 8080) == "TimeoutError", 20)

    def why(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        done = self.waggle("why", *arguments, "-o", "json", "--api-socket", str(self.socket), cgroup=False)
        assert done.returncode in (0, 3), done.stderr
        return done.returncode, json.loads(done.stdout)

    def ask(self, address: str, port: int) -> str:
        return self.connect(address, port, netns=self.pod_netns["client"], timeout=0.5)


WALL = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "wall", "namespace": "t"},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("why")) as made:
        made.agent = made.start(service_cidr="10.96.0.0/16")
        made.fill()
        yield made


def test_a_service_behind_a_wall(cluster: Cluster) -> None:
    code, answer = cluster.why("t/client", "t/web:80")
    (path,) = answer["paths"]
    assert (code, answer["verdict"], path["text"]) == (3, "dropped", f"{cluster.pod_address['server']}:8080")
    assert path["egress"]["kernel"] == {"allowed": True, "audited": False, "rule": 0, "behind": False, "agrees": True}
    assert path["ingress"]["kernel"] == {"allowed": False, "audited": False, "rule": 0, "behind": False, "agrees": True}
    (wall,) = path["ingress"]["policies"]
    assert (wall["name"], wall["file"]) == ("wall", str(cluster.manifests / "wall.json"))
    words = cluster.waggle("why", "t/client", "t/web:80", "--api-socket", str(cluster.socket), cgroup=False).stdout
    assert "ingress of t/server: policies isolate the pod, and no rule allows it" in words
    assert "the kernel's tables say the same" in words


def test_the_node_may_and_the_model_says_so(cluster: Cluster) -> None:
    code, answer = cluster.why(NODE4, "pod/t/server:8080")
    assert (code, answer["paths"][0]["ingress"]["kernel"]["agrees"]) == (0, True)
    assert cluster.connect(cluster.pod_address["server"], 8080) == "server"
    assert cluster.why(PEER4, "pod/t/server:8080")[0] == 3


def test_a_drop_by_its_id(cluster: Cluster) -> None:
    assert cluster.ask(cluster.pod_address["server"], 8080) == "TimeoutError"
    found: list[dict[str, Any]] = []

    def dropped() -> bool:
        asked = ("--verdict", "dropped", "--to", "t/server", "--port", "8080", "-o", "json")
        done = cluster.waggle("flows", *asked, "--since", "1m", "--api-socket", str(cluster.socket), cgroup=False)
        found[:] = [json.loads(line) for line in done.stdout.splitlines()]
        return bool(found)

    cluster.until(dropped)
    code, answer = cluster.why("--drop", found[-1]["id"])
    assert (code, answer["verdict"], answer["event"]["id"]) == (3, "dropped", found[-1]["id"])
    assert (answer["source"]["text"], answer["destination"]["text"]) == ("t/client", "t/server")
    gone = cluster.waggle("why", "--drop", "0-0", "--api-socket", str(cluster.socket), cgroup=False)
    assert gone.returncode == 1 and "no event 0-0" in gone.stderr


def test_questions_that_make_no_sense(cluster: Cluster) -> None:
    socket = ("--api-socket", str(cluster.socket))
    done = cluster.waggle("why", "t/nobody", "t/web:80", *socket, cgroup=False)
    assert done.returncode == 1 and "t/nobody: there is no such pod" in done.stderr
    assert cluster.waggle("why", "t/client", *socket, cgroup=False).returncode == 2


def test_tables_that_somebody_wrote_are_seen_to_differ(cluster: Cluster) -> None:
    """The only list of steps there is says deny; here somebody makes it say allow, and mends it."""
    first = bytes(4)
    with closing(Map.pinned(cluster.bpf_root / "maps" / "wag_policy_steps")) as steps:
        kept = steps.lookup(first)
        assert kept is not None
        try:
            steps.update(first, PolicyStep(0, 7, ALLOW, 0, 0).pack())
            code, answer = cluster.why("t/client", "pod/t/server:8080")
        finally:
            steps.update(first, kept)
    kernel = answer["paths"][0]["ingress"]["kernel"]
    assert (code, kernel["allowed"], kernel["rule"], kernel["agrees"]) == (3, True, 7, False)
    assert cluster.why("t/client", "pod/t/server:8080")[1]["paths"][0]["ingress"]["kernel"]["agrees"]


def test_what_is_proposed_lets_it_pass(cluster: Cluster) -> None:
    """Last: the policy stays."""
    (fix,) = cluster.why("t/client", "pod/t/server:8080")[1]["paths"][0]["fixes"]
    (cluster.manifests / "fix.yaml").write_text(yaml.safe_dump(fix["manifest"]))
    cluster.until(lambda: cluster.ask(cluster.pod_address["server"], 8080) == "server", 20)
    code, answer = cluster.why("t/client", "t/web")
    assert (code, answer["verdict"]) == (0, "passes")
    assert answer["paths"][0]["ingress"]["kernel"]["agrees"]
    assert answer["paths"][0]["ingress"]["kernel"]["rule"] == answer["paths"][0]["ingress"]["rule"]["id"]
