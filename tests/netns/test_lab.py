"""The lab as a user sees it: real agents, the real plugin, real traffic, and nothing left afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_machine import COMMAND, ECHO, Lab, echo_pod, pod, service, unique_name

from waggle.kernel.netns import netns_id
from waggle.lab.traffic import Probe

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

SLEEP = ("sleep", "infinity")
WAGGLE = (sys.executable, "-m", "waggle.cli.main")


@contextlib.contextmanager
def running_lab(suffix: str, nodes: int) -> Iterator[Lab]:
    lab = Lab(unique_name(suffix))
    try:
        lab.run("up", "--nodes", str(nodes))
        yield lab
    finally:
        lab.close()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two nodes with a Service of two pods, and a pod to ask from. Tests put back what they change."""
    with running_lab("m", 2) as made:
        yield made


@pytest.fixture
def web(lab: Lab, tmp_path: Path) -> Lab:
    lab.apply(
        tmp_path,
        service("web", type="NodePort"),
        echo_pod("web-1", nodeName="node1"),
        echo_pod("web-2", nodeName="node2"),
        pod("asker", *SLEEP, nodeName="node1"),
    )
    return lab


def every_way(lab: Lab, name: str, count: int = 8) -> list[Probe]:
    """The Service's cluster addresses, TCP and UDP."""
    addresses = lab.service(name)["clusterIPs"]
    return [Probe(address, 80, protocol, count) for address in addresses for protocol in ("tcp", "udp")]


def assert_served(lab: Lab, origin: str, probes: list[Probe], by: set[str]) -> None:
    for probe, outcome in zip(probes, lab.ask(origin, *probes), strict=True):
        assert not outcome.failed, (origin, probe, outcome.failed)
        assert outcome.ok == probe.count
        assert set(outcome.answers) <= by, (origin, probe, outcome.answers)


# -- up and exec -----------------------------------------------------------------------------------------------------


def test_nodes_agents_and_client_are_there(lab: Lab) -> None:
    status = lab.status()
    assert [node["agent"]["state"] for node in status["nodes"]] == ["ready", "ready"]
    assert status["client"]["present"]
    shown = json.loads(lab.run("exec", "node2", "--", "ip", "-json", "address", "show", "eth0").stdout)
    local = {info["local"] for info in shown[0]["addr_info"]}
    assert {"10.77.0.12", "fd00:77::12"} <= local
    # Nothing listens there, and saying so takes a machine that is reached.
    for outcome in lab.ask("client", *(Probe(address, 1) for address in ("10.77.0.11", "fd00:77::12", "10.77.0.1"))):
        assert dict(outcome.failed) == {"Connection refused": 1}


def test_exec_passes_input_exit_status_and_place(lab: Lab) -> None:
    script = "cat; hostname; cat /proc/self/cgroup | grep ^0::; exit 42"
    done = lab.run("exec", "node1", "--", "sh", "-c", script, stdin="hello\n", check=False)
    assert done.returncode == 42
    assert done.stdout.splitlines() == ["hello", "node1", f"0::/waggle-lab/{lab.name}/node1/exec"]


def test_exec_of_nothing_known(lab: Lab) -> None:
    done = lab.run("exec", "node3", "--", "true", check=False)
    assert done.returncode == 1
    assert "no node or pod 'node3'" in done.stderr
    assert lab.run("exec", "node1", "--", "no-such-command", check=False).returncode == 127


def test_the_callers_network_is_left_alone(lab: Lab) -> None:
    links = subprocess.run(["ip", "-json", "link"], capture_output=True, text=True, check=True).stdout
    names = {link["ifname"] for link in json.loads(links)}
    assert not names & {"br0", "node1", "node2", "client"}
    assert not any(name.startswith("wag") and len(name) == 14 for name in names)


def test_no_netfilter_rule_inside(web: Lab) -> None:
    for place in ("node1", "asker", "client"):
        count = web.run("exec", place, "--", "cat", "/proc/sys/net/netfilter/nf_conntrack_count").stdout
        assert int(count) == 0, place


# -- apply -----------------------------------------------------------------------------------------------------------


def test_service_from_pod_nodes_and_outside(web: Lab) -> None:
    by = {"web-1", "web-2"}
    inside = every_way(web, "web")
    assert len(inside) == 4
    for origin in ("asker", "node1", "node2"):
        assert_served(web, origin, inside, by)
    ports = {port["protocol"].lower(): port["nodePort"] for port in web.service("web")["ports"]}
    outside = [
        Probe(address, port, protocol, 8)
        for address in ("10.77.0.11", "10.77.0.12", "fd00:77::11", "fd00:77::12")
        for protocol, port in ports.items()
    ]
    assert_served(web, "client", outside, by)


def test_apply_again_changes_nothing(web: Lab, tmp_path: Path) -> None:
    before = web.status()
    # A pod that names no node stays on the one it has.
    done = web.apply(tmp_path, service("web", type="NodePort"), echo_pod("web-1"))
    assert [entry["action"] for entry in json.loads(done.stdout)] == ["unchanged", "unchanged"]
    assert web.status() == before


def test_changed_labels_do_not_restart_a_pod(web: Lab, tmp_path: Path) -> None:
    document = echo_pod("labelled-1", nodeName="node1")
    web.apply(tmp_path, document)
    addresses = web.pod("labelled-1")["addresses"]
    document["metadata"]["labels"]["app"] = "web"
    done = web.apply(tmp_path, document)
    assert [entry["action"] for entry in json.loads(done.stdout)] == ["configured"]
    assert web.pod("labelled-1")["addresses"] == addresses
    assert_served(web, "asker", every_way(web, "web", 40), {"web-1", "web-2", "labelled-1"})
    (outcome,) = web.ask("asker", Probe(web.service("web")["clusterIPs"][0], 80, "tcp", 60))
    assert "labelled-1" in outcome.answers
    web.run("delete", "-f", str(web.manifest(tmp_path, document)))


def test_policies_and_namespaces_reach_every_agent_and_leave_again(web: Lab, tmp_path: Path) -> None:
    allow = {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"], "ingress": [{}]}
    peers = [{"namespaces": {"matchLabels": {"team": "nobody"}}}]
    rules = {"ingress": [{"action": "Deny", "from": peers}]}
    file = web.manifest(
        tmp_path,
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "web"}, "spec": allow},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": {"team": "front"}}},
        {
            "apiVersion": "policy.networking.k8s.io/v1beta1",
            "kind": "ClusterNetworkPolicy",
            "metadata": {"name": "admin"},
            "spec": {
                "tier": "Admin",
                "priority": 1,
                "subject": {"namespaces": {"matchLabels": {"team": "front"}}},
                **rules,
            },
        },
    )

    def listed(node: str) -> dict[str, tuple[int, bool]]:
        """By name: how many pods of the node it selects, and whether it comes from a file of the lab."""
        socket = web.layout.node_named(node, 2).socket
        command = [*WAGGLE, "policy", "list", "--api-socket", str(socket), "-o", "json"]
        rows = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
        return {row["name"]: (row["selects"], Path(row["file"]).parent == web.layout.manifests) for row in rows}

    def await_listed(wanted: dict[str, dict[str, tuple[int, bool]]]) -> None:
        deadline = time.monotonic() + 30
        while (found := {node: listed(node) for node in wanted}) != wanted and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == wanted

    try:
        web.run("apply", "-f", str(file))
        both = {"admin": (1, True), "web": (1, True)}
        await_listed({"node1": both | {"admin": (2, True)}, "node2": both})  # the asker is on node1
        assert web.layout.manifests.joinpath("clusternetworkpolicy__admin.yaml").exists()
    finally:
        web.run("delete", "-f", str(file))
    await_listed({"node1": {}, "node2": {}})


def test_nothing_is_applied_when_one_object_is_refused(lab: Lab, tmp_path: Path) -> None:
    bad = service("bad")
    bad["spec"]["ports"][0]["port"] = 99999
    done = lab.apply(tmp_path, echo_pod("good-1"), bad, check=False)
    assert done.returncode == 1
    assert "99999" in done.stderr and "manifest.yaml" in done.stderr
    assert "good-1" not in {entry["name"] for entry in lab.status()["pods"]}


def test_container_that_ends_is_no_backend(web: Lab, tmp_path: Path) -> None:
    script = f"{' '.join(ECHO)} --port 8080 & sleep 1; exit 3"
    mortal = pod("web-3", "sh", "-c", script, ports=[("TCP", 8080)], nodeName="node1", restartPolicy="Never")
    web.apply(tmp_path, mortal)
    deadline = time.monotonic() + 10
    while (shown := web.pod("web-3"))["phase"] == "Running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (shown["phase"], shown["ready"], shown["reason"]) == ("Failed", False, "exited with status 3")
    # Nobody but the container's shell has told the agents.
    time.sleep(0.5)
    assert_served(web, "asker", every_way(web, "web", 40), {"web-1", "web-2"})
    web.run("delete", "-f", str(web.manifest(tmp_path, mortal)))


def test_a_command_that_succeeds_and_one_that_does_not_exist(lab: Lab, tmp_path: Path) -> None:
    fine = pod("job", "sh", "-c", "echo $(NODE_NAME) $POD_NAME; exit 0", restartPolicy="Never")
    done = lab.apply(tmp_path, fine, pod("broken", "no-such-command"), check=False)
    assert done.returncode == 3
    problems = {entry["name"]: entry["problem"] for entry in json.loads(done.stdout)}
    assert "no-such-command" in problems["broken"]
    assert lab.pod("job")["phase"] == "Succeeded"
    assert lab.run("logs", "job").stdout.split() == [lab.pod("job")["node"], "job"]
    lab.run("delete", "-f", str(tmp_path / "manifest.yaml"))
    assert {"job", "broken"} & {entry["name"] for entry in lab.status()["pods"]} == set()


def test_delete_frees_everything_of_a_pod(lab: Lab, tmp_path: Path) -> None:
    lab.apply(tmp_path, echo_pod("gone-1", nodeName="node1"))
    layout = lab.layout
    netns = layout.machine("pod-default_gone-1").netns
    cgroup = layout.node(1).place.cgroup / "pods" / "default_gone-1"
    state = layout.node(1).state
    assert netns.exists() and cgroup.exists()
    reserved = {path for path in state.rglob("*") if path.is_file()}
    lab.run("delete", "-f", str(tmp_path / "manifest.yaml"))
    assert not netns.exists() and not cgroup.exists()
    assert len({path for path in state.rglob("*") if path.is_file()}) < len(reserved)
    # Again: nothing to do, and no error.
    assert "not found" in lab.run("delete", "-f", str(tmp_path / "manifest.yaml")).stderr


# -- up again --------------------------------------------------------------------------------------------------------


def test_up_brings_back_an_agent(web: Lab) -> None:
    pid = web.agent_pid("node1")
    os.kill(pid, signal.SIGKILL)
    done = web.run("status", "-o", "json", check=False)
    assert done.returncode == 3
    # What worked goes on without the agent.
    assert_served(web, "asker", every_way(web, "web"), {"web-1", "web-2"})
    other = web.agent_pid("node2")
    web.run("up")
    assert web.agent_pid("node1") not in (None, pid)
    assert web.agent_pid("node2") == other
    assert_served(web, "asker", every_way(web, "web"), {"web-1", "web-2"})


def test_up_brings_back_containers_and_pod_namespaces(web: Lab) -> None:
    layout = web.layout
    container = layout.node(1).place.cgroup / "pods" / "default_web-1" / "main"
    (container / "cgroup.kill").write_text("1")
    subprocess.run(["ip", "netns", "del", layout.machine("pod-default_web-2").netns.name], check=True)
    assert web.run("status", check=False).returncode == 3
    web.run("up")
    assert web.run("status").returncode == 0
    for name in ("web-1", "web-2"):
        (outcome,) = web.ask("asker", Probe(web.pod(name)["addresses"][0], 8080))
        assert dict(outcome.answers) == {name: 1}
    assert_served(web, "asker", every_way(web, "web"), {"web-1", "web-2"})


def test_up_brings_back_a_node(web: Lab) -> None:
    """Its network namespace is gone, and with it its pods' interfaces: as after a reboot of that machine."""
    node = web.layout.node(2)
    before = netns_id(node.place.netns)
    subprocess.run(["ip", "netns", "del", node.place.netns.name], check=True)
    web.run("up")
    assert netns_id(node.place.netns) != before
    assert web.run("status").returncode == 0
    for origin in ("asker", "node1", "node2"):
        assert_served(web, origin, every_way(web, "web"), {"web-1", "web-2"})


def test_up_brings_back_a_process_on_the_network_of_a_lost_node(web: Lab, tmp_path: Path) -> None:
    database = pod("database-1", *ECHO, "--tcp", "9090", ports=[("TCP", 9090)], hostNetwork=True, nodeName="node2")
    web.apply(tmp_path, database)
    assert web.pod("database-1")["addresses"] == ["10.77.0.12", "fd00:77::12"]
    subprocess.run(["ip", "netns", "del", web.layout.node(2).place.netns.name], check=True)
    web.run("up")
    (outcome,) = web.ask("client", Probe("10.77.0.12", 9090, count=4))
    assert dict(outcome.answers) == {"database-1": 4}
    web.run("delete", "-f", str(web.manifest(tmp_path, database)))
    (outcome,) = web.ask("client", Probe("10.77.0.12", 9090))
    assert dict(outcome.failed) == {"Connection refused": 1}


def test_up_brings_back_the_network_between_the_nodes(web: Lab) -> None:
    """All uplinks are gone, then there are new ones: every agent has to notice by itself."""
    pids = [web.agent_pid(name) for name in ("node1", "node2")]
    subprocess.run(["ip", "netns", "del", web.layout.underlay.netns.name], check=True)
    web.run("up")
    assert [web.agent_pid(name) for name in ("node1", "node2")] == pids
    deadline = time.monotonic() + 10
    while any(outcome.failed for outcome in web.ask("node1", *every_way(web, "web", 4))):
        assert time.monotonic() < deadline
    for origin in ("asker", "node1", "node2"):
        assert_served(web, origin, every_way(web, "web"), {"web-1", "web-2"})
    ports = {port["protocol"].lower(): port["nodePort"] for port in web.service("web")["ports"]}
    assert_served(
        web, "client", [Probe("fd00:77::12", port, how, 8) for how, port in ports.items()], {"web-1", "web-2"}
    )


def test_one_pod_that_cannot_come_back_keeps_no_other_from_it(web: Lab, tmp_path: Path) -> None:
    command = tmp_path / "mortal"
    command.write_text("#!/bin/sh\nexec sleep infinity\n")
    command.chmod(0o755)
    doomed = pod("a-doomed", str(command), nodeName="node1")
    web.apply(tmp_path, doomed)
    command.unlink()
    for name in ("a-doomed", "web-1"):
        folder = web.layout.node(1).place.cgroup / "pods" / f"default_{name}"
        (folder / "cgroup.kill").write_text("1")
    done = web.run("up", check=False)
    assert done.returncode == 3 and f"no command '{command}'" in done.stderr
    assert web.pod("web-1")["ready"] and not web.pod("a-doomed")["ready"]
    web.run("delete", "-f", str(web.manifest(tmp_path, doomed)))


def test_up_adds_nodes_but_does_not_remove_any(tmp_path: Path) -> None:
    with running_lab("g", 1) as lab:
        lab.run("up", "--nodes", "2")
        assert [node["name"] for node in lab.status()["nodes"]] == ["node1", "node2"]
        lab.apply(tmp_path, service("web"), echo_pod("web-1", nodeName="node2"))
        assert_served(lab, "node1", every_way(lab, "web"), {"web-1"})
        done = lab.run("up", "--nodes", "1", check=False)
        assert done.returncode == 1 and "cannot" not in done.stdout and "not removed" in done.stderr


def test_two_ups_at_once(tmp_path: Path) -> None:
    lab = Lab(unique_name("u"))
    try:
        both = [
            subprocess.Popen([*COMMAND, "up", "--name", lab.name, "--nodes", "1"], stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        answers = [process.communicate(timeout=90)[1] for process in both]
        assert [process.returncode for process in both] == [0, 0], answers
        assert lab.run("status").returncode == 0
    finally:
        lab.close()


# -- two labs, crashes, down -----------------------------------------------------------------------------------------


def test_two_labs_do_not_disturb_each_other(web: Lab, tmp_path: Path) -> None:
    with running_lab("o", 1) as other:
        other.apply(tmp_path, service("web", clusterIP=web.service("web")["clusterIPs"][0]), echo_pod("web-9"))
        assert_served(other, "node1", every_way(other, "web"), {"web-9"})
        assert_served(web, "node1", every_way(web, "web"), {"web-1", "web-2"})
    assert other.leftovers() == []
    assert web.run("status").returncode == 0
    assert_served(web, "node1", every_way(web, "web"), {"web-1", "web-2"})


@pytest.mark.parametrize("delay", [0.35, 0.5, 0.7, 1.0, 1.5])
def test_killed_in_the_middle(delay: float, tmp_path: Path) -> None:
    """`up` killed, then `up`; `apply` killed, then `up`; `down` killed, then `down`."""
    lab = Lab(unique_name("k"))
    try:
        killed_after(delay, [*COMMAND, "up", "--name", lab.name, "--nodes", "2"])
        lab.run("up", "--nodes", "2")
        assert lab.run("status").returncode == 0

        manifest = lab.manifest(tmp_path, service("web"), *(echo_pod(f"web-{number}") for number in range(4)))
        killed_after(delay, [*COMMAND, "apply", "--name", lab.name, "-f", str(manifest)])
        lab.run("up")
        lab.run("apply", "-f", str(manifest))
        assert lab.run("status").returncode == 0
        assert_served(lab, "node1", every_way(lab, "web"), {f"web-{number}" for number in range(4)})

        killed_after(delay, [*COMMAND, "down", "--name", lab.name])
    finally:
        lab.close()


def killed_after(delay: float, command: list[str]) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(delay)
    process.kill()
    process.wait()


def test_down_after_everything_was_killed(tmp_path: Path) -> None:
    with running_lab("d", 2) as lab:
        lab.apply(tmp_path, echo_pod("web-1"), echo_pod("web-2"))
        shell = subprocess.Popen(
            [*COMMAND, "exec", "--name", lab.name, "web-1", "--", "sleep", "1000"], stdin=subprocess.DEVNULL
        )
        for node in ("node1", "node2"):
            os.kill(lab.agent_pid(node), signal.SIGKILL)
        lab.run("down")
        assert lab.leftovers() == []
        assert shell.wait(timeout=5) == -signal.SIGKILL
        assert "there was nothing" in lab.run("down").stderr


def test_down_names_strangers_and_leaves_them_alone() -> None:
    with running_lab("s", 1) as lab:
        node = lab.layout.node(1).place
        stranger = subprocess.Popen(["nsenter", f"--net={node.netns}", "sleep", "1000"])
        try:
            while Path(f"/proc/{stranger.pid}/comm").read_text().strip() != "sleep":
                time.sleep(0.01)
            done = lab.run("down")
            assert f"{stranger.pid} (sleep)" in done.stderr
            assert stranger.poll() is None
            assert lab.leftovers() == []
        finally:
            stranger.kill()
            stranger.wait()


def test_with_kubernetes_node_objects_are_the_clusters_business(tmp_path: Path) -> None:
    """The API is away here: the lab still comes up, its pods still get addresses, manifests are still served."""
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )
    lab = Lab(unique_name("q"))
    try:
        lab.run("up", "--nodes", "1", "--kubeconfig", str(kubeconfig))
        assert list(lab.layout.manifests.iterdir()) == []
        assert lab.layout.api_netns.samefile("/proc/self/ns/net")  # where `up` was called, and the API is
        told = lab.run("exec", "node1", "--", *WAGGLE, "status", "-o", "json", check=False).stdout
        reasons = [problem["reason"] for problem in json.loads(told)["problems"]]
        assert "cannot connect to http://127.0.0.1:1: connection refused" in reasons
        lab.apply(tmp_path, service("web"), echo_pod("web-1"))
        assert lab.pod("web-1")["addresses"] == ["10.244.1.2", "fd00:10:244:1::2"]
        assert_served(lab, "node1", every_way(lab, "web"), {"web-1"})
        dump = ("exec", "node1", "--", *WAGGLE, "map", "dump", "services", "-o", "json")
        assert len(json.loads(lab.run(*dump).stdout)) == 4
        lab.run("delete", "-f", str(tmp_path / "manifest.yaml"))
        assert json.loads(lab.run(*dump).stdout) == []
    finally:
        lab.close()


def test_unusable_names() -> None:
    for name in ("a-b", "A", "../x", "", "1a", "x" * 21):
        done = subprocess.run(
            [sys.executable, "-m", "waggle.cli.main", "lab", "up", "--name", name],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, name
        assert "cannot name a lab" in done.stderr


# -- the demonstration ------------------------------------------------------------------------------------------------


def test_demo_answers_every_request_and_leaves_nothing(tmp_path: Path) -> None:
    lab = Lab(unique_name("e"))
    try:
        manifest = lab.manifest(tmp_path, service("web", type="NodePort"), echo_pod("web-1"), echo_pod("web-2"))
        done = lab.run("demo", "--examples", str(manifest), "--requests", "5", "-o", "json")
        report = json.loads(done.stdout)
        assert report["passed"] and report["requests"]["failed"] == 0
        ways = {(path["from"], path["protocol"], path["family"]) for path in report["paths"]}
        assert len(ways) == 4 * 4  # a pod, two nodes, outside; two protocols in two families
        assert all(path["ok"] == 5 for path in report["paths"])
        assert all(set(entry["answers"]) == {"web-1", "web-2"} for entry in report["services"])
        assert all(entry["serviceMedianMicroseconds"] > 0 for entry in report["latencies"])
        assert {entry["namespace"] for entry in report["netfilter"]} >= {"node1", "node3", "client", "web-1"}
        assert lab.leftovers() == []
    finally:
        lab.close()


def test_demo_that_is_kept(tmp_path: Path) -> None:
    lab = Lab(unique_name("p"))
    try:
        manifest = lab.manifest(tmp_path, service("web"), echo_pod("web-1"))
        arguments = ("--examples", str(manifest), "--requests", "2", "--nodes", "1", "--keep")
        assert f"waggle lab status --name {lab.name}" in lab.run("demo", *arguments).stdout
        assert lab.run("status").returncode == 0
    finally:
        lab.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["agent ready", "sending traffic"])
def test_demo_that_is_interrupted_leaves_nothing(number: signal.Signals, moment: str, tmp_path: Path) -> None:
    lab = Lab(unique_name("i"))
    try:
        manifest = lab.manifest(tmp_path, service("web"), echo_pod("web-1"))
        process = subprocess.Popen(
            [*COMMAND, "demo", "--name", lab.name, "--examples", str(manifest), "--keep", "--requests", "2000"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        while moment not in (line := process.stderr.readline()):
            assert line, "the demo has ended"
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert lab.leftovers() == []
    finally:
        lab.close()


def test_demo_with_a_failure_fails_and_leaves_nothing(tmp_path: Path) -> None:
    lab = Lab(unique_name("f"))
    try:
        liar = pod("web-1", *ECHO, "--port", "9999", ports=[("TCP", 9999)])  # the Service leads to port 8080
        manifest = lab.manifest(tmp_path, service("web"), liar)
        done = lab.run("demo", "--examples", str(manifest), "--requests", "1", "--nodes", "1", check=False)
        assert done.returncode == 1
        assert "failed (" in done.stdout and "Connection refused" in " ".join(done.stdout.split())
        assert lab.leftovers() == []
    finally:
        lab.close()
