"""NodePolicies with a real agent, real TCP, and somebody who is logged in while a change is tried."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_node import NODE4, NODE6, PEER4, WAGGLE, AgentNode

from waggle.abi._generated import NodePolicy
from waggle.kernel.maps import Map
from waggle.kernel.netns import call_in_netns

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

#: A session: says back what it is told, line by line.
ECHO = """
import ctypes, socket, sys, threading
if len(sys.argv) > 2:
    ctypes.CDLL(None).prctl(15, sys.argv[2].encode(), 0, 0, 0)
s = socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True)
print("ready", flush=True)
def talk(c):
    with c, c.makefile("rwb") as f:
        for line in f:
            f.write(line)
            f.flush()
while True:
    c, _ = s.accept()
    threading.Thread(target=talk, args=(c,), daemon=True).start()
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentNode]:
    with AgentNode(tmp_path_factory.mktemp("node")) as made:
        made.serve(made.netns, "web", 80)
        run(made, made.netns, ECHO, "22")
        made.serve(made.peer, "outside", 8080)
        run(made, made.netns, ECHO, "2222")
        run(made, made.netns, ECHO, "2022", "sshd")
        made.agent = made.start(log_level="debug")
        yield made


@pytest.fixture(autouse=True)
def clean(node: AgentNode) -> Iterator[None]:
    """Every test begins and ends with no NodePolicy, and with an agent."""
    yield
    assert node.agent is not None
    if node.agent.poll() is not None or node.agent not in node.running:
        node.agent = node.start()
    node.apply("policy")
    node.until(lambda: status(node) == {"confirmed": [], "trial": None, "notConfirmed": []})
    node.until(lambda: in_force(node) == (0, 0, False))


def run(node: AgentNode, netns: Path, script: str, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["nsenter", f"--net={netns}", sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    node.running.append(process)
    assert process.stdout is not None and process.stdout.readline()
    return process


class Session:
    """A TCP connection from the neighbour that stays."""

    def __init__(self, node: AgentNode, port: int, address: str) -> None:
        self.socket = call_in_netns(node.peer, lambda: socket.create_connection((address, port), timeout=2))
        self.port = self.socket.getsockname()[1]

    def says(self, text: str = "hello") -> bool:
        """Whether what is said comes back."""
        try:
            self.socket.sendall(text.encode() + b"\n")
            return self.socket.recv(100) == text.encode() + b"\n"
        except TimeoutError:
            return False


@contextlib.contextmanager
def session(node: AgentNode, port: int, address: str = NODE4) -> Iterator[Session]:
    made = Session(node, port, address)
    with made.socket:
        yield made


def policy(name: str = "p", *, audit: bool = False, **spec: Any) -> dict[str, Any]:
    annotations = {"annotations": {"waggle.io/audit": "true"}} if audit else {}
    return {
        "apiVersion": "waggle.io/v1alpha1",
        "kind": "NodePolicy",
        "metadata": {"name": name, **annotations},
        "spec": spec,
    }


def status(node: AgentNode) -> dict[str, Any]:
    return {name: value for name, value in node.get("/node-policies").items() if name != "policies"}


def sets_of(node: AgentNode) -> NodePolicy:
    raw = Map.pinned(node.bpf_root / "maps" / "wag_node_policy").lookup(bytes(4))
    assert raw is not None
    return NodePolicy.unpack(raw)


def in_force(node: AgentNode) -> tuple[int, int, bool]:
    """Sets that are confirmed, and whether there is a trial, as the map has them."""
    value = sets_of(node)
    return value.ingress, value.egress, bool(value.trial_until_ns)


def on_trial(node: AgentNode) -> bool:
    return status(node)["trial"] is not None and in_force(node)[2]


def waggle(node: AgentNode, *arguments: str, ssh: str | None = None) -> subprocess.CompletedProcess[str]:
    """A command; `ssh`: what SSH_CONNECTION is in the shell that it runs in."""
    variables = {key: value for key, value in os.environ.items() if key != "SSH_CONNECTION"}
    command = [*WAGGLE, "node-policy", *arguments, "--api-socket", str(node.socket)]
    if ssh is not None:  # sudo forgets the variable, the shell before it does not
        variables["SSH_CONNECTION"] = ssh
        command = ["sh", "-c", 'env -u SSH_CONNECTION "$@"; exit $?', "sh", *command]
    return subprocess.run(node.inside(command), env=variables, capture_output=True, text=True, timeout=60, check=False)


def reaches(node: AgentNode, address: str, port: int) -> bool:
    """Whether a connection from the neighbour comes about."""
    try:
        call_in_netns(node.peer, lambda: socket.create_connection((address, port), timeout=0.4)).close()
    except TimeoutError:
        return False
    return True


DENY = {"policyTypes": ["Ingress"]}
DENY_ALL = {"policyTypes": ["Ingress", "Egress"]}
SSH = {"policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 22}]}]}
WEB = {"policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 80}]}]}


def test_a_denied_session_goes_on_and_the_policy_reverts(node: AgentNode) -> None:
    assert reaches(node, NODE4, 80)
    with session(node, 2222) as old, session(node, 2222, NODE6) as other:
        assert old.says() and other.says()
        node.apply("policy", policy(**DENY_ALL, confirmSeconds=3))
        node.until(lambda: on_trial(node))
        assert not reaches(node, NODE4, 80)
        assert not reaches(node, NODE6, 80)
        assert node.connect(PEER4, 8080, timeout=0.5) == "TimeoutError"
        assert old.says() and other.says()
        node.until(lambda: status(node)["notConfirmed"] == ["p"], 5)
        assert reaches(node, NODE4, 80) and reaches(node, NODE6, 80)
        assert node.connect(PEER4, 8080) == "outside"
        assert old.says()
    [problem] = [one for one in node.get("/status")["problems"] if "NodePolicy" in one["subject"]]
    assert problem["subject"] == "NodePolicy p" and "not confirmed" in problem["reason"]


def test_why_says_what_the_tables_say(node: AgentNode) -> None:
    def asked(source: str, destination: str) -> dict[str, Any]:
        command = [*WAGGLE, "why", source, destination, "--api-socket", str(node.socket), "-o", "json"]
        done = subprocess.run(node.inside(command), capture_output=True, text=True, timeout=60, check=False)
        answer: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == (0 if answer["verdict"] == "passes" else 3), done.stderr
        [look] = answer["paths"][0]["nodes"]
        assert look["kernel"]["agrees"] and look["known"]
        return {"verdict": answer["verdict"], "onTrial": look["onTrial"], "because": look["because"]}

    with session(node, 2022):
        node.apply("policy", policy(**SSH, confirmSeconds=30))
        node.until(lambda: on_trial(node))
        for port, verdict in ((22, "passes"), (80, "dropped"), (2022, "passes")):
            assert reaches(node, NODE4, port) is (verdict == "passes")
            answer = asked(PEER4, f"{NODE4}:{port}")
            assert (answer["verdict"], answer["onTrial"]) == (verdict, True)
        assert "logged in" in answer["because"]
        assert waggle(node, "confirm", "--local").returncode == 0
        node.until(lambda: not on_trial(node))
        for port, verdict in ((22, "passes"), (80, "dropped"), (2022, "dropped")):
            answer = asked(PEER4, f"{NODE4}:{port}")
            assert (answer["verdict"], answer["onTrial"]) == (verdict, False)


def test_answers_come_in_and_drops_are_told_with_what_decided(node: AgentNode) -> None:
    node.apply("policy", policy(**DENY, confirmSeconds=60))
    node.until(lambda: on_trial(node))
    assert node.connect(PEER4, 8080) == "outside"
    assert not reaches(node, NODE4, 80)

    def told() -> bool:
        done = node.waggle("flows", "--last", "20", "-o", "json", "--api-socket", str(node.socket), cgroup=False)
        events = [json.loads(line) for line in done.stdout.splitlines()]
        found = [one for one in events if one.get("reason") == "node_policy_ingress"]
        return bool(found) and found[-1]["policies"] == ["NodePolicy p"] and found[-1]["destination"]["port"] == 80

    node.until(told)


def test_ssh_gets_in_from_where_somebody_is_logged_in_and_no_one_else(node: AgentNode) -> None:
    with session(node, 22):
        node.apply("policy", policy(**DENY, confirmSeconds=60))
        node.until(lambda: on_trial(node))
        assert f"{PEER4}: TCP 22" in status(node)["trial"]["letIn"]
        assert reaches(node, NODE4, 22)
        assert not reaches(node, NODE6, 22)  # nobody was logged in from there
        assert not reaches(node, NODE4, 80)


def test_whatever_sshd_listens_on_is_ssh(node: AgentNode) -> None:
    with session(node, 2022):
        node.apply("policy", policy(**DENY, confirmSeconds=60))
        node.until(lambda: on_trial(node))
        assert status(node)["trial"]["letIn"] == [f"{PEER4}: TCP 22", f"{PEER4}: TCP 2022"]
        assert reaches(node, NODE4, 2022) and not reaches(node, NODE4, 2222)


def test_confirmed_over_a_session_it_stays_and_cuts_what_it_does_not_allow(node: AgentNode) -> None:
    with session(node, 22) as shell, session(node, 2222) as old:
        assert old.says()
        node.apply("policy", policy(**SSH))
        node.until(lambda: on_trial(node))
        assert old.says()
        ssh = f"{PEER4} {shell.port} {NODE4} 22"
        silent = waggle(node, "confirm", "p", ssh=ssh)
        assert silent.returncode == 1 and "nothing has come by the SSH connection" in silent.stderr
        shell.says()
        other = waggle(node, "confirm", "q", ssh=ssh)
        assert other.returncode == 1 and "q is not on trial, but p" in other.stderr
        done = waggle(node, "confirm", "p", ssh=ssh)
        assert done.returncode == 0 and "confirmed p" in done.stdout, done.stderr
        node.until(lambda: in_force(node)[0] != 0 and not in_force(node)[2])
        assert status(node)["confirmed"] == ["p"]
        assert reaches(node, NODE4, 22) and not reaches(node, NODE4, 80)
        assert shell.says()
        assert not old.says()


def test_who_could_not_log_in_again_is_not_let_confirm(node: AgentNode) -> None:
    with session(node, 22) as shell:
        node.apply("policy", policy(**DENY, confirmSeconds=60))
        node.until(lambda: on_trial(node))
        shell.says()
        ssh = f"{PEER4} {shell.port} {NODE4} 22"
        done = waggle(node, "confirm", ssh=ssh)
        assert done.returncode == 1 and "let nobody log in from" in done.stderr
        assert on_trial(node)
        forced = waggle(node, "confirm", "--force", ssh=ssh)
        assert forced.returncode == 0 and "beware" in forced.stdout, forced.stderr
    node.until(lambda: not reaches(node, NODE4, 22))


def test_only_a_living_session_or_the_console_confirms(node: AgentNode) -> None:
    node.apply("policy", policy(**DENY, confirmSeconds=60))
    node.until(lambda: on_trial(node))
    nowhere = waggle(node, "confirm")
    assert nowhere.returncode == 1 and "runs in no SSH session" in nowhere.stderr
    gone = waggle(node, "confirm", ssh=f"{PEER4} 1 {NODE4} 22")
    assert gone.returncode == 1 and "is no more" in gone.stderr
    assert waggle(node, "confirm", "--local").returncode == 0
    node.until(lambda: status(node)["confirmed"] == ["p"])
    listed = waggle(node, "list")
    assert "confirmed" in listed.stdout and "policy.json" in listed.stdout
    again = waggle(node, "confirm", "--local")
    assert again.returncode == 1 and "no NodePolicy is on trial" in again.stderr


def test_it_reverts_when_the_agent_is_gone(node: AgentNode) -> None:
    assert node.agent is not None
    with session(node, 2222) as old:
        assert old.says()
        node.apply("policy", policy(**DENY_ALL, confirmSeconds=3))
        node.until(lambda: on_trial(node))
        began = time.monotonic()
        node.stop(node.agent, signal.SIGKILL)
        assert not reaches(node, NODE4, 80)
        assert old.says()
        node.until(lambda: reaches(node, NODE4, 80), 5)
        assert 2 < time.monotonic() - began < 4.5
        assert node.connect(PEER4, 8080) == "outside"
        node.agent = node.start()
        node.until(lambda: status(node)["notConfirmed"] == ["p"])
        assert reaches(node, NODE4, 80) and old.says()


def test_what_is_confirmed_and_what_is_tried_outlive_agents(node: AgentNode) -> None:
    assert node.agent is not None
    node.apply("policy", policy(**SSH))
    node.until(lambda: on_trial(node))
    assert waggle(node, "confirm", "--local").returncode == 0
    node.until(lambda: in_force(node)[0] != 0 and not in_force(node)[2])
    node.apply("policy", policy(**WEB, confirmSeconds=600))
    node.until(lambda: on_trial(node))
    before = sets_of(node)
    node.stop(node.agent, signal.SIGKILL)
    assert reaches(node, NODE4, 80) and not reaches(node, NODE4, 22)
    node.agent = node.start()
    node.until(lambda: on_trial(node))
    assert sets_of(node) == before
    assert reaches(node, NODE4, 80) and not reaches(node, NODE4, 22)
    assert waggle(node, "revert").returncode == 0
    node.until(lambda: not in_force(node)[2])
    assert reaches(node, NODE4, 22) and not reaches(node, NODE4, 80)
    assert status(node) == {"confirmed": ["p"], "trial": None, "notConfirmed": ["p"]}
    checked = node.waggle("doctor", "--api-socket", str(node.socket), cgroup=False)
    assert checked.returncode == 0, checked.stdout


def test_taken_back_by_hand_and_tried_again(node: AgentNode) -> None:
    node.apply("policy", policy(**DENY, confirmSeconds=60))
    node.until(lambda: on_trial(node))
    assert "took back p" in waggle(node, "revert", "p").stdout
    node.until(lambda: reaches(node, NODE4, 80))
    assert "on trial again: p" in waggle(node, "retry").stdout
    node.until(lambda: on_trial(node))
    assert not reaches(node, NODE4, 80)


def test_a_rule_that_is_taken_away_is_tried_too(node: AgentNode) -> None:
    node.apply("policy", policy("deny", **DENY, confirmSeconds=2), policy("web", **WEB, confirmSeconds=2))
    node.until(lambda: on_trial(node))
    assert waggle(node, "confirm", "--local").returncode == 0
    node.until(lambda: status(node)["confirmed"] == ["deny", "web"])
    node.until(lambda: reaches(node, NODE4, 80))
    node.apply("policy", policy("deny", **DENY, confirmSeconds=2))
    node.until(lambda: on_trial(node))
    node.until(lambda: not reaches(node, NODE4, 80))
    node.until(lambda: status(node)["notConfirmed"] == ["web"], 4)
    node.until(lambda: reaches(node, NODE4, 80))
    node.apply("policy")  # what denies nothing any more waits for nobody
    node.until(lambda: status(node)["confirmed"] == [])


def test_what_cannot_be_written_down_is_not_tried(node: AgentNode) -> None:
    obstacle = node.state / "node-policies.tmp"
    obstacle.mkdir()
    try:
        node.apply("policy", policy(**DENY))
        node.until(lambda: any("cannot write" in one["reason"] for one in node.get("/status")["problems"]))
        assert not on_trial(node) and reaches(node, NODE4, 80)
    finally:
        obstacle.rmdir()
    node.until(lambda: on_trial(node))
    assert not any("cannot write" in one["reason"] for one in node.get("/status")["problems"])


def test_audited_it_only_tells(node: AgentNode) -> None:
    node.apply("policy", policy(audit=True, **DENY))
    node.until(lambda: status(node)["confirmed"] == ["p"])
    node.until(lambda: in_force(node)[0] != 0)
    assert reaches(node, NODE4, 80)
    node.until(lambda: '"audit"' in node.request("/events?last=20")[1].decode())


def test_another_node_is_meant(node: AgentNode) -> None:
    labelled = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "here", "labels": {"role": "web"}}}
    selector = {"matchLabels": {"role": "db"}}
    node.apply("policy", labelled, policy(**DENY, nodeSelector=selector, confirmSeconds=0), policy("w", **WEB))
    node.until(lambda: on_trial(node))
    assert status(node)["trial"]["policies"] == ["w"]
    labelled["metadata"]["labels"]["role"] = "db"
    node.apply("policy", labelled, policy(**DENY, nodeSelector=selector, confirmSeconds=0))
    node.until(lambda: status(node)["confirmed"] == ["p"])
    node.until(lambda: not reaches(node, NODE4, 80))
