"""The command line without a kernel: help, usage, an absent agent, and what a stand-in agent's answers become."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from standin_agent import Running, StandInAgent, answering
from typer.main import get_command

from waggle import __version__
from waggle.cli import client
from waggle.cli import main as entry
from waggle.errors import ApiError
from waggle.model.interface import HostPort, PodInterface
from waggle.model.objects import (
    SERVICE_NAME_LABEL,
    EndpointPort,
    EndpointSlice,
    ObjectKey,
    ObjectMeta,
    ObjectReference,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
)
from waggle.model.objects import Endpoint as SliceEndpoint
from waggle.model.policy_objects import (
    ClusterEgressRule,
    ClusterNetworkPolicy,
    ClusterNetworkPolicySpec,
    ClusterPeer,
    ClusterSubject,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicySpec,
)
from waggle.observe.flow_filter import parse_filter
from waggle.reconcile.drift import Drift

HOSTILE = [
    "two\nlines",
    "\x1b[31mred\x1b[0m",
    "[red]markup[/red]",
    "[/]",
    "tab\tand\rreturn",
    "a:b:c",
    "\u202eright",
    "\x9b2J",
]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@pytest.fixture
def waggle(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, through the entry point that users run."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["waggle", *arguments])
        capsys.readouterr()
        code = 0
        try:
            entry.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "agent.sock"
    monkeypatch.setenv("WAGGLE_API_SOCKET", str(path))
    one = Running(path)
    yield one
    one.stop()


@pytest.fixture
def agent(running: Running) -> StandInAgent:
    return running.agent


def walk(command: typer.core.TyperCommand, path: tuple[str, ...] = ()):
    """Every command and group, with the words that lead to it."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, (*path, name))


COMMANDS = list(walk(get_command(entry.app)))
IDS = [" ".join(path) or "waggle" for path, _ in COMMANDS]
ASKING = [("status",), ("service", "list"), ("endpoint", "list"), ("policy", "list"), ("flows",)]


def one_line(ran: Ran) -> str:
    """The error of a command that failed: one line that says who speaks, no traceback, nothing on standard output."""
    assert (ran.code, ran.out) == (1, "")
    (line,) = ran.err.splitlines()
    assert line.startswith("waggle: ")
    return line


# -- help and usage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=IDS)
def test_help_exits_with_0_and_names_every_argument_and_option(waggle, monkeypatch, path, command):
    monkeypatch.setenv("COLUMNS", "200")
    ran = waggle(*path, "--help")
    assert (ran.code, ran.err) == (0, "")
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        names = [*parameter.opts, parameter.metavar or parameter.name]
        assert any(name.lower() in ran.out.lower() for name in names), f"{parameter.name} is missing"
    for name in getattr(command, "commands", {}):
        assert name in ran.out


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=IDS)
def test_every_command_and_option_says_what_it_is_for(path, command):
    assert command.help or command.callback.__doc__
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            assert getattr(parameter, "help", None), f"{' '.join(path)}: {parameter.name}"


def test_short_help(waggle):
    assert waggle("status", "-h") == waggle("status", "--help")


def test_help_says_what_exit_statuses_mean(waggle):
    out = waggle("--help").out
    for number in "0123":
        assert any(line.strip().startswith(f"{number} ") for line in out.splitlines()), number


def test_groups_alone_show_their_help(waggle):
    for path, command in COMMANDS:
        if getattr(command, "commands", None):
            ran = waggle(*path)
            assert ran.code in (0, 2)
            assert all(name in ran.out + ran.err for name in command.commands)


def test_version(waggle):
    assert waggle("--version") == (0, f"waggle {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nope",), "nope"),
        (("service", "nope"), "nope"),
        (("lab", "nope"), "nope"),
        (("status", "--nope"), "--nope"),
        (("status", "extra"), "extra"),
        (("map", "dump"), "name"),
        (("flows", "--verdict", "maybe"), "not one of forwarded"),
        (("flows", "--from", "a b"), "is no pod, namespace/, Service, address"),
        (("flows", "--to", "10.0.0.1/8"), "host bits"),
        (("flows", "--port", "http"), "no port"),
        (("flows", "--since", "yesterday"), "no time such as"),
        (("flows", "--last", "-1"), "must not be negative"),
        (("flows", "--limit", "-1"), "must not be negative"),
        (("flows", "--limit", "many"), "--limit"),
        (("status", "-o", "yaml"), "yaml"),
        (("agent", "--max-nat", "many"), "--max-nat"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(waggle, arguments, words: str):
    ran = waggle(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err and "Traceback" not in ran.err


def test_a_wrong_setting_of_the_agent_is_one_line(waggle):
    assert one_line(waggle("agent", "--pod-cidr", "10.0.0.0/33")).startswith("waggle: pod-cidr: ")
    assert one_line(waggle("agent", "--config", "/nonexistent")) == (
        "waggle: config: cannot read /nonexistent: No such file or directory"
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str):
    """In a process of its own: typer reads the environment while the program starts."""

    def run(**environment: str) -> str:
        program = Path(sys.executable).with_name("waggle")
        done = subprocess.run([program], env=os.environ | environment, capture_output=True, text=True, timeout=30)
        return done.stdout

    assert "_WAGGLE_COMPLETE" in run(_WAGGLE_COMPLETE=f"source_{shell}")
    words = {
        "bash": {"COMP_WORDS": "waggle service l", "COMP_CWORD": "2"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "waggle service l"},
        "fish": {"_TYPER_COMPLETE_ARGS": "waggle service l", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    assert "list" in run(_WAGGLE_COMPLETE=f"complete_{shell}", **words)


# -- no agent ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ASKING, ids=" ".join)
@pytest.mark.parametrize("form", ["table", "json"])
def test_without_an_agent_a_command_says_so_in_one_line(waggle, tmp_path: Path, command, form: str):
    path = tmp_path / "agent.sock"
    line = one_line(waggle(*command, "--api-socket", str(path), "-o", form))
    assert line == f"waggle: no agent: {path} does not exist. Start one with `waggle agent`, or name its --api-socket"


@pytest.mark.parametrize("command", ASKING, ids=" ".join)
def test_an_agent_that_was_killed_left_its_socket(waggle, running: Running, command):
    path = running.agent.config.api_socket
    running.stop()
    path.touch()
    assert one_line(waggle(*command)) == f"waggle: no agent answers on {path}: it is not running"


@pytest.mark.parametrize("command", ASKING, ids=" ".join)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<htm>",
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n[",
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"a"',
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xfe\xff\n",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 12\r\n\r\n\x1b[31mbroken\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nNot\nFound",
    ],
    ids=["hangs up", "other protocol", "no JSON", "cut short", "chunk cut short", "no text", "500", "404"],
)
def test_an_answer_that_is_none_is_one_line(waggle, tmp_path: Path, command, raw: bytes):
    path = tmp_path / "agent.sock"
    with answering(path, raw):
        line = one_line(waggle(*command, "--api-socket", str(path)))
    assert "the agent" in line and "\x1b" not in line


def test_maps_of_a_node_where_no_agent_has_run(waggle, tmp_path: Path):
    root = tmp_path / "bpf"
    assert one_line(waggle("map", "dump", "nat", "--bpf-root", str(root))) == (
        f"waggle: no map nat: there is none under {root}: has an agent run here?"
    )
    assert waggle("map", "list", "--bpf-root", str(root)) == (0, "no maps\n", "")
    assert waggle("map", "list", "--bpf-root", str(root), "-o", "json") == (0, "[]\n", "")


@pytest.mark.parametrize("name", ["../escape", "a/b", "\x1b[31m"])
def test_a_map_name_is_no_path(waggle, tmp_path: Path, name: str):
    line = one_line(waggle("map", "dump", name, "--bpf-root", str(tmp_path)))
    assert "no map" in line and "\x1b" not in line


def test_maps_that_may_not_be_read_are_one_line(waggle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    line = one_line(waggle("map", "list", "--bpf-root", str(tmp_path)))
    assert str(tmp_path) in line and "root" in line


# -- status -----------------------------------------------------------------------------------------------------------


def test_status(waggle, agent: StandInAgent):
    ran = waggle("status")
    assert (ran.code, ran.err) == (0, "")
    shown = dict(line.split(":", 1) for line in ran.lines)
    shown.pop("Up")
    assert {name: value.strip() for name, value in shown.items()} == {
        "Node": "node1",
        "State": "in sync",
        "Sources": "manifests (in sync)",
        "Addresses": "192.168.1.10",
        "Uplinks": "eth0",
        "Tunnels": "waggle-vxlan4 (2 nodes)",
        "Pod ranges": "10.244.1.0/24",
        "DNS": "169.254.53.53",
        "Services": "1 (5 frontends, 6 backend records)",
        "Policies": "7",
        "Pods": "3",
        "Nodes": "4",
        "Maps": "3.0 MiB in /sys/fs/bpf/waggle",
        "cgroup": "/sys/fs/cgroup",
    }
    assert json.loads(waggle("status", "-o", "json").out) == agent.facts


def test_status_with_problems_exits_with_3(waggle, agent: StandInAgent):
    agent.facts["problems"] = [
        {"subject": "Service default/web", "reason": "no room", "file": None, "line": None, "since": 0.0},
        {"subject": "Service", "reason": "bad", "file": "web.yaml", "line": 7, "since": 0.0},
    ]
    ran = waggle("status")
    assert ran.code == 3
    assert ran.lines[-2:] == [
        "Problem:    Service default/web: no room",
        "Problem:    web.yaml:7: Service: bad",
    ]
    code, out, _ = waggle("status", "-o", "json")
    assert (code, len(json.loads(out)["problems"])) == (3, 2)


def test_status_of_a_node_with_ipv6_alone_and_of_one_that_waits(waggle, agent: StandInAgent):
    agent.facts |= {"addresses": {"ipv4": "", "ipv6": "fd00:a::1"}, "synced": False, "devices": [], "podRanges": []}
    agent.facts["sources"] = {
        "kubernetes": {"synced": False, "policiesSynced": False},
        "manifests": {"synced": True, "policiesSynced": False},
    }
    out = waggle("status").out
    assert "Addresses:  fd00:a::1\n" in out
    assert "State:      waiting for its sources\n" in out
    assert "Sources:    kubernetes (waiting), manifests (policies not known yet)\n" in out


@pytest.mark.parametrize("name", HOSTILE)
def test_status_with_names_that_want_to_be_more_than_names(waggle, agent: StandInAgent, name: str):
    agent.facts |= {"node": name, "devices": [name]}
    agent.facts["problems"] = [{"subject": name, "reason": name, "file": name, "line": 1, "since": 0.0}]
    ran = waggle("status")
    assert (ran.code, ran.out.count("\n")) == (3, 16)
    assert_harmless(ran.out, name)
    assert json.loads(waggle("status", "-o", "json").out)["node"] == name


def assert_harmless(out: str, name: str) -> None:
    """Nothing reached the terminal that it acts on, and what can be shown is shown as it is."""
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "".join(c if c.isprintable() else "?" for c in name) in out


# -- policies ---------------------------------------------------------------------------------------------------------


def pod(name: str, namespace: str = "default", node: str = "node1", host_network: bool = False, **labels: str) -> Pod:
    status = PodStatus("Running", "10.1.0.1", [PodIP("10.1.0.1")])
    return Pod(ObjectMeta(name, namespace, labels=labels), PodSpec(node, host_network), status)


def network_policy(name: str, namespace: str = "default", audit: str = "", types=("Ingress",), **labels: str):
    meta = ObjectMeta(name, namespace, annotations={"waggle.io/audit": audit} if audit else None)
    return NetworkPolicy(meta, NetworkPolicySpec(LabelSelector(labels), list(types)))


def cluster_policy(name: str, tier: str, priority: int, subject: ClusterSubject, **rules) -> ClusterNetworkPolicy:
    return ClusterNetworkPolicy(ObjectMeta(name), ClusterNetworkPolicySpec(tier, priority, subject, **rules))


def test_policies_in_the_order_in_which_they_are_asked(waggle, agent: StandInAgent):
    assert waggle("policy", "list") == (0, "no policies\n", "")
    assert waggle("policy", "list", "-o", "json") == (0, "[]\n", "")
    everybody = ClusterSubject(namespaces=LabelSelector())
    front = ClusterSubject(namespaces=LabelSelector({"tier": "front"}))
    deny = [ClusterEgressRule("Deny", [ClusterPeer(networks=["10.0.0.0/8"])])]
    fill(
        agent,
        pod("a", app="web"),
        pod("b", app="web"),
        pod("c", namespace="shop"),
        pod("elsewhere", node="node2", app="web"),
        pod("host", host_network=True, app="web"),
        Namespace(ObjectMeta("shop", labels={"tier": "front"})),
        cluster_policy("late", "Admin", 20, front, egress=deny),
        cluster_policy("zeta", "Admin", 10, everybody),
        cluster_policy("base", "Baseline", 0, everybody, egress=deny),
        network_policy("all", namespace="shop", types=("Ingress", "Egress"), audit="true"),
    )
    agent.store.upsert(network_policy("web", app="web"), "file:/etc/waggle/web.yaml")
    agent.lines[ObjectKey("default", "web")] = 7
    assert waggle("policy", "list").lines[0].split() == (
        ["POLICY", "KIND", "TIER", "DIRECTIONS", "PODS", "HERE", "MODE", "FROM"]
    )
    table = [line.split("  ") for line in waggle("policy", "list").lines[1:]]
    assert [[cell.strip() for cell in row if cell.strip()] for row in table] == [
        ["zeta", "ClusterNetworkPolicy", "Admin 10", "-", "3", "enforce", "test"],
        ["late", "ClusterNetworkPolicy", "Admin 20", "Egress", "1", "enforce", "test"],
        ["default/web", "NetworkPolicy", "-", "Ingress", "2", "enforce", "/etc/waggle/web.yaml:7"],
        ["shop/all", "NetworkPolicy", "-", "Ingress, Egress", "1", "audit", "test"],
        ["base", "ClusterNetworkPolicy", "Baseline 0", "Egress", "3", "enforce", "test"],
    ]
    [web] = [row for row in json.loads(waggle("policy", "list", "-o", "json").out) if row["name"] == "web"]
    assert web == {
        "kind": "NetworkPolicy",
        "namespace": "default",
        "name": "web",
        "tier": None,
        "priority": None,
        "directions": ["Ingress"],
        "audit": False,
        "selects": 2,
        "origin": "file",
        "file": "/etc/waggle/web.yaml",
        "line": 7,
    }
    rows = json.loads(waggle("policy", "list", "-n", "shop", "-o", "json").out)
    assert [(row["name"], row["origin"], row["file"]) for row in rows] == [("all", "test", None)]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_name_of_a_policy(waggle, agent: StandInAgent, name: str):
    agent.store.upsert(network_policy("web"), f"file:/m/{name}.yaml")
    assert_harmless(waggle("policy", "list").out, name)


# -- services and endpoints -------------------------------------------------------------------------------------------


def service(name: str = "web", namespace: str = "default", *, address: str = "10.96.0.1", **spec) -> Service:
    spec.setdefault("ports", [ServicePort(80, "http")])
    return Service(ObjectMeta(name, namespace), ServiceSpec(cluster_ip=address, **spec))


def piece(of: str, *addresses: str, namespace: str = "default", pod: str = "") -> EndpointSlice:
    family = "IPv6" if any(":" in a for a in addresses) else "IPv4"
    return EndpointSlice(
        ObjectMeta(f"{of}-{family}", namespace, labels={SERVICE_NAME_LABEL: of}),
        family,
        [SliceEndpoint([a], target_ref=ObjectReference("Pod", namespace, pod) if pod else None) for a in addresses],
        [EndpointPort("http", "TCP", 8080)],
    )


def fill(agent: StandInAgent, *objects) -> None:
    for obj in objects:
        agent.store.upsert(obj, "test")
    agent.names.follow(agent.store.take_changes())


def test_no_services_and_no_endpoints(waggle, agent: StandInAgent):
    assert waggle("service", "list") == (0, "no Services\n", "")
    assert waggle("endpoint", "list") == (0, "no pods on this node\n", "")
    for command in (("service", "list"), ("endpoint", "list")):
        assert waggle(*command, "-o", "json") == (0, "[]\n", "")


def cells(ran: Ran) -> list[list[str]]:
    """The table, cut where the columns of its header begin."""
    header, *rows = ran.lines
    starts = [at for at in range(len(header)) if header[at] != " " and (at == 0 or header[at - 1] == " ")]
    return [[row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for row in rows]


def test_services_as_a_table(waggle, agent: StandInAgent):
    fill(
        agent,
        service(type="NodePort", ports=[ServicePort(80, "http", node_port=30080)]),
        piece("web", "10.0.0.1", "10.0.0.2", pod="web-1"),
        service("idle", address="10.96.0.2"),
        service("outside", type="ExternalName", address=""),
    )
    ran = waggle("service", "list")
    assert (ran.code, ran.err) == (0, "")
    assert cells(ran) == [
        ["default/idle", "ClusterIP", "TCP", "10.96.0.2:80", "none usable of 0"],
        ["default/outside", "ExternalName", "-", "-", "not served"],
        ["default/web", "NodePort", "TCP", "10.96.0.1:80", "10.0.0.1:8080 (pod default/web-1)"],
        ["", "", "", "*:30080", "10.0.0.2:8080 (pod default/web-1)"],
    ]


def test_services_as_json(waggle, agent: StandInAgent):
    fill(agent, service(), piece("web", "10.0.0.1", pod="web-1"))
    (one,) = json.loads(waggle("service", "list", "-o", "json").out)
    assert (one["namespace"], one["name"], one["type"], one["problem"]) == ("default", "web", "ClusterIP", None)
    (port,) = one["ports"]
    assert port["frontends"] == [{"type": "ClusterIP", "address": "10.96.0.1", "port": 80, "text": "10.96.0.1:80"}]
    assert port["backends"] == [{"address": "10.0.0.1", "port": 8080, "node": None, "name": "pod default/web-1"}]
    assert (port["name"], port["protocol"], port["family"], port["endpoints"]) == ("http", "TCP", "IPv4", 1)


def test_services_of_one_namespace(waggle, agent: StandInAgent):
    fill(agent, service(), service("web", "other"))
    assert [row[0] for row in cells(waggle("service", "list", "-n", "other"))] == ["other/web"]
    assert waggle("service", "list", "-n", "nowhere").out == "no Services\n"


def test_a_service_with_ipv6_alone(waggle, agent: StandInAgent):
    """fd00:a::1 has :a: in it, which is an emoji elsewhere."""
    fill(agent, service(address="fd00:a::1"), piece("web", "fd00:b::1"))
    assert cells(waggle("service", "list")) == [
        ["default/web", "ClusterIP", "TCP", "[fd00:a::1]:80", "[fd00:b::1]:8080"]
    ]


def test_more_than_ten_backends_are_counted(waggle, agent: StandInAgent):
    fill(agent, service(), piece("web", *(f"10.0.0.{n}" for n in range(1, 14))))
    rows = cells(waggle("service", "list"))
    assert len(rows) == 11
    assert rows[-1][-1] == "and 3 more"


def test_a_service_in_trouble_says_why(waggle, agent: StandInAgent):
    fill(agent, service(), service("out", type="ExternalName", address=""))
    agent.tables.problems |= {ObjectKey("default", name): "no room: raise max-services" for name in ("web", "out")}
    rows = [row[-1] for row in cells(waggle("service", "list"))]
    assert rows == ["no room: raise max-services", "none usable of 0", "problem: no room: raise max-services"]


def test_a_thousand_services(waggle, agent: StandInAgent):
    for n in range(1000):
        fill(agent, service(f"web-{n:04}", address=f"10.96.{n // 250}.{n % 250 + 1}"), piece(f"web-{n:04}", "10.0.0.1"))
    ran = waggle("service", "list")
    assert (ran.code, len(ran.lines)) == (0, 1001)
    assert [row[0] for row in cells(ran)] == [f"default/web-{n:04}" for n in range(1000)]
    assert len(json.loads(waggle("service", "list", "-o", "json").out)) == 1000


@pytest.mark.parametrize("name", HOSTILE)
def test_services_with_names_that_want_to_be_more_than_names(waggle, agent: StandInAgent, name: str):
    fill(agent, service(name), piece(name, "10.0.0.1", pod=name))
    ran = waggle("service", "list")
    assert (ran.code, len(ran.out.split("\n"))) == (0, 3)
    assert_harmless(ran.out, f"default/{name}")
    assert_harmless(ran.out, f"(pod default/{name})")
    (one,) = json.loads(waggle("service", "list", "-o", "json").out)
    assert one["name"] == name


def interface(name: str, *addresses: str, namespace: str = "default", container: str = "c0ffee" * 8) -> PodInterface:
    return PodInterface(
        container,
        "eth0",
        "wag1234",
        7,
        "02:00:00:00:00:01",
        "02:00:00:00:00:02",
        tuple(ip_address(a) for a in addresses),
        Path("/run/netns/a"),
        namespace,
        name,
    )


def test_endpoints_as_a_table(waggle, agent: StandInAgent):
    agent.pods = [
        interface("web-1", "10.244.1.2", "fd00:a::2"),
        interface("", "10.244.1.3", namespace=""),
        interface("six", "fd00:b::3", namespace="other"),
    ]
    assert cells(waggle("endpoint", "list")) == [
        ["c0ffeec0ffee", "10.244.1.3", "wag1234", "02:00:00:00:00:02"],
        ["default/web-1", "10.244.1.2", "wag1234", "02:00:00:00:00:02"],
        ["", "fd00:a::2", "", ""],
        ["other/six", "fd00:b::3", "wag1234", "02:00:00:00:00:02"],
    ]


def test_endpoints_as_json(waggle, agent: StandInAgent):
    pod = interface("web-1", "10.244.1.2", "fd00:a::2")
    agent.pods = [replace(pod, host_ports=(HostPort("TCP", 8080, 80, "127.0.0.1"),))]
    assert json.loads(waggle("endpoint", "list", "-o", "json").out) == [
        {
            "namespace": "default",
            "name": "web-1",
            "containerID": "c0ffee" * 8,
            "addresses": ["10.244.1.2", "fd00:a::2"],
            "interface": "wag1234",
            "ifindex": 7,
            "mac": "02:00:00:00:00:02",
            "netns": "/run/netns/a",
            "hostPorts": [{"protocol": "TCP", "hostPort": 8080, "hostIP": "127.0.0.1", "containerPort": 80}],
        }
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_endpoints_with_names_that_want_to_be_more_than_names(waggle, agent: StandInAgent, name: str):
    agent.pods = [interface(name, "10.244.1.2")]
    ran = waggle("endpoint", "list")
    assert (ran.code, len(ran.out.split("\n"))) == (0, 3)
    assert_harmless(ran.out, f"default/{name}")
    assert json.loads(waggle("endpoint", "list", "-o", "json").out)[0]["name"] == name


# -- flows ------------------------------------------------------------------------------------------------------------


def at(address: str, port: int, name: str = "") -> dict[str, object]:
    text = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return {"address": address, "port": port, "name": name, "text": text}


DROP = {
    "time": 1_700_000_000.25,
    "id": "9f3a-17",
    "kind": "drop",
    "verdict": "rejected",
    "hook": "pod_egress",
    "protocol": "TCP",
    "source": at("10.0.0.1", 40000, "pod default/client"),
    "destination": at("10.96.0.1", 80),
    "service": "default/web",
    "reason": "no_backend",
    "explanation": "the Service has no usable endpoint",
    "ifindex": 7,
}
FLOW = {
    "time": 1_700_000_000.5,
    "id": "9f3a-18",
    "kind": "flow",
    "verdict": "forwarded",
    "hook": "socket",
    "protocol": "UDP",
    "source": at("", 0, "default/client"),
    "destination": at("fd00:a::1", 53),
    "service": "default/dns",
    "backend": at("fd00:b::2", 5353, "pod kube-system/dns-1"),
    "count": 3,
}


def test_flows_as_lines(waggle, agent: StandInAgent):
    agent.told = [DROP, FLOW, DROP]
    ran = waggle("flows", "--limit", "2")
    assert (ran.code, ran.err) == (0, "")
    drop, flow = (line.split(" ", 1) for line in ran.lines)
    assert (drop[0][-4:], flow[0][-4:]) == (".250", ".500")
    assert drop[1] == (
        "REJECTED  TCP pod default/client 10.0.0.1:40000 → 10.96.0.1:80 (Service default/web): "
        "the Service has no usable endpoint [no_backend] at pod_egress #9f3a-17"
    )
    assert flow[1] == (
        "FORWARDED UDP default/client → [fd00:a::1]:53 (Service default/dns) → "
        "pod kube-system/dns-1 [fd00:b::2]:5353 ×3 at socket"
    )


def test_flows_as_json_lines(waggle, agent: StandInAgent):
    agent.told = [DROP, FLOW]
    ran = waggle("flows", "--limit", "2", "-o", "json")
    assert [json.loads(line) for line in ran.lines] == [DROP, FLOW]


def test_a_flow_without_a_service_as_a_line(waggle, agent: StandInAgent):
    direct = {key: value for key, value in FLOW.items() if key not in ("service", "backend")}
    agent.told = [direct]
    (line,) = waggle("flows").lines
    assert line.split(" ", 1)[1] == "FORWARDED UDP default/client → [fd00:a::1]:53 ×3 at socket"


POLICY = DROP | {
    "kind": "policy",
    "verdict": "dropped",
    "reason": "policy_ingress",
    "direction": "ingress",
    "rule": {"object": "NetworkPolicy t/web", "direction": "ingress", "index": 2, "file": "web.yaml", "line": 12},
    "policies": [],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {},
            "DROPPED   TCP {ends}: ingress rule 2 of NetworkPolicy t/web (web.yaml:12) [policy_ingress] at pod_egress",
        ),
        (
            {"rule": None, "policies": ["NetworkPolicy t/a", "NetworkPolicy t/b"]},
            "no ingress rule allows it: isolated by NetworkPolicy t/a, NetworkPolicy t/b [policy_ingress] at",
        ),
        (
            {"verdict": "audit", "rule": None},
            "AUDIT     TCP {ends}: no ingress rule allows it: isolated [policy_ingress] at",
        ),
        ({"suppressed": 7}, "at pod_egress #9f3a-17  (7 more before it were left out)"),
    ],
)
def test_what_policies_decided_as_a_line(waggle, agent: StandInAgent, change, words: str):
    agent.told = [POLICY | change]
    (line,) = waggle("flows").lines
    ends = "pod default/client 10.0.0.1:40000 → 10.96.0.1:80 (Service default/web)"
    assert words.format(ends=ends) in line


def test_questions_reach_the_agent(waggle, agent: StandInAgent):
    asked = (
        "--from",
        "t/",
        "--from",
        "10.0.0.0/8",
        "--to",
        "web",
        "--service",
        "t/dns",
        "--verdict",
        "drop",
        "--port",
        "53",
    )
    ran = waggle("flows", *asked, "--proto", "udp", "--reason", "policy_ingress", "--since", "1h30m", "--last", "5")
    assert (ran.code, ran.err) == (0, "")
    wanted, how = agent.asked
    assert wanted == parse_filter(
        {
            "from": ["t/", "10.0.0.0/8"],
            "to": ["web"],
            "service": ["t/dns"],
            "verdict": ["drop"],
            "port": ["53"],
            "proto": ["udp"],
            "reason": ["policy_ingress"],
        }
    )
    assert how == {"since": 5400.0, "last": 5, "follow": False}


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ((), {"since": None, "last": 20, "follow": False}),
        (("--follow", "--limit", "1"), {"since": None, "last": None, "follow": True}),
        (("--since", "5m", "-f", "--limit", "1"), {"since": 300.0, "last": None, "follow": True}),
        (("--last", "0"), {"since": None, "last": 0, "follow": False}),
    ],
)
def test_what_flows_shows_without_questions(waggle, agent: StandInAgent, options, how):
    agent.told = [DROP]
    assert waggle("flows", *options).code == 0
    assert agent.asked == (parse_filter({}), how)


@pytest.mark.parametrize(
    "target", ["/events?since=soon", "/events?last=-1", "/events?colour=red", "/events?verdict=maybe"]
)
def test_the_agent_says_which_question_is_wrong(agent: StandInAgent, target: str):
    with pytest.raises(ApiError, match=target.partition("?")[2].partition("=")[0]):
        client.get(agent.config.api_socket, target)


def test_one_event_by_its_id(agent: StandInAgent):
    agent.told = [DROP]
    assert client.get(agent.config.api_socket, "/events/9f3a-17") == DROP
    with pytest.raises(ApiError, match="no event 9f3a-99: the setting flow-history"):
        client.get(agent.config.api_socket, "/events/9f3a-99")


def test_a_reader_that_was_too_slow_is_told(waggle, agent: StandInAgent):
    agent.told = [DROP | {"lost": 5}]
    assert waggle("flows", "--limit", "1").out.endswith("(5 events lost: this reader was too slow)\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_flows_with_names_that_want_to_be_more_than_names(waggle, agent: StandInAgent, name: str):
    agent.told = [DROP | {"service": name, "source": at("10.0.0.1", 1, name)}]
    ran = waggle("flows", "--limit", "1")
    assert (ran.code, ran.out.count("\n")) == (0, 1)
    assert_harmless(ran.out, name)
    assert json.loads(waggle("flows", "--limit", "1", "-o", "json").out)["service"] == name


def test_who_hangs_up_is_forgotten_though_nothing_happens(agent: StandInAgent):
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(str(agent.config.api_socket))
        reader.sendall(b"GET /events?follow=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reader.recv(15) == b"HTTP/1.1 200 OK"
        assert agent.listening.wait(10) and not agent.left.is_set()
    assert agent.left.wait(10)


def test_flows_end_with_the_agent_which_does_not_wait_for_them(waggle, running: Running):
    running.agent.told = [DROP]
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(running.agent.listening.wait(10))
        running.stop()  # fails when it takes ten seconds

    thread = threading.Thread(target=stop)
    thread.start()
    ran = waggle("flows", "--follow", "-o", "json")
    thread.join(20)
    assert stopped == [True] and not running.alive
    assert (ran.code, ran.err, json.loads(ran.out)) == (0, "", DROP)


# -- doctor ------------------------------------------------------------------------------------------------------------

ASTRAY = Drift("wag_services", "Service default/web", "TCP 10.96.0.1:80", "is missing")


def test_doctor_that_finds_nothing(waggle, agent: StandInAgent):
    ran = waggle("doctor")
    assert (ran.code, ran.out) == (0, "checked 2 of services, 3 of wag_services: nothing wrong\n")


def test_doctor_names_what_it_found_and_repaired(waggle, agent: StandInAgent):
    agent.doctor.report.found = [ASTRAY]
    agent.doctor.earlier = [(0.0, ASTRAY._replace(entry="TCP 10.96.0.2:80"))]
    ran = waggle("doctor")
    assert ran.code == 3
    assert ran.lines[0] == "wag_services: Service default/web: TCP 10.96.0.1:80: is missing; repaired"
    assert ran.lines[1].endswith(": wag_services: Service default/web: TCP 10.96.0.2:80: is missing")
    assert ran.lines[2].endswith(": 1 wrong")
    only = waggle("doctor", "--dry-run")
    assert (only.code, only.lines[0]) == (3, ran.lines[0].removesuffix("; repaired"))


def test_doctor_as_json(waggle, agent: StandInAgent):
    agent.doctor.report.found = [ASTRAY]
    ran = waggle("doctor", "-o", "json")
    assert ran.code == 3
    assert json.loads(ran.out) == {
        "checked": {"services": 2, "wag_services": 3},
        "found": [
            {
                "table": "wag_services",
                "subject": "Service default/web",
                "entry": "TCP 10.96.0.1:80",
                "problem": "is missing",
                "repaired": True,
            }
        ],
        "error": "",
        "earlier": [],
    }


def test_doctor_of_what_cannot_be_repaired(waggle, agent: StandInAgent):
    agent.doctor.report.failed = "no room"
    ran = waggle("doctor")
    assert (ran.code, ran.lines[0]) == (3, "no room")


def test_doctor_before_the_agent_knows(waggle, agent: StandInAgent):
    agent.doctor.report = None
    ran = waggle("doctor")
    assert ran.code == 1 and "first full view" in ran.err


# -- pipes ------------------------------------------------------------------------------------------------------------


def test_a_reader_that_has_seen_enough_is_no_error(agent: StandInAgent):
    """`waggle service list | head -1`: in a process of its own, with a pipe that nobody reads."""
    for n in range(1000):
        fill(agent, service(f"web-{n:04}"))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        for form in ("table", "json"):
            ran = subprocess.run(
                [sys.executable, "-m", "waggle.cli.main", "service", "list", "-o", form],
                stdout=writer,
                stderr=subprocess.PIPE,
                text=True,
                timeout=30,
            )
            assert (ran.returncode in (0, 1), ran.stderr) == (True, "")
    finally:
        os.close(writer)
