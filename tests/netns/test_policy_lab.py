"""Policies with real sockets: who reaches whom among nine pods on two nodes, and what changes while traffic goes on.

The cases are those of Kubernetes' own tests (Netpol): tests/unit/netpol_cases.py. Pods x/… and z/… are on node1, y/… on
node2, so that the pod range of node2 is namespace y.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lab_machine import Lab, pod, unique_name
from tests.unit.netpol_cases import EVERY, NETPOL, A, Expected
from tests.unit.policy_worlds import NAMESPACES, PODS, policy

from waggle.lab import published
from waggle.model.policy_objects import NetworkPolicy

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

PROBER = Path(__file__).with_name("netpol_prober.py")
PORTS = (80, 81)
PATIENCE = 10.0  # a busy machine may take its time; what is right at last counts
DENY_X = policy("{podSelector: {}, policyTypes: [Ingress, Egress]}", "deny")
Way = tuple[str, str, str, int]  # source, destination, protocol, port


class PolicyLab(Lab):
    """Two nodes, nine pods that ask and answer."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name)
        self.directory = directory
        self.addresses: dict[str, tuple[str, str]] = {}
        self.threads = ThreadPoolExecutor(20)

    def fill(self) -> None:
        self.run("up", "--nodes", "2")
        documents = [namespace(name) for name in NAMESPACES]
        documents += [self.prober(*name.split("/")) for name in EVERY]
        self.apply(self.directory, *documents)
        for found in self.status()["pods"]:
            four, six = sorted(found["addresses"], key=lambda address: ":" in address)
            self.addresses[f"{found['namespace']}/{found['name']}"] = four, six

    def prober(self, where: str, name: str) -> dict[str, Any]:
        made = pod(name, sys.executable, str(PROBER), str(self.control(f"{where}/{name}")), *map(str, PORTS))
        made["metadata"] = {"name": name, "namespace": where, "labels": {"pod": name}}
        made["spec"]["nodeName"] = "node2" if where == "y" else "node1"
        made["spec"]["containers"][0]["ports"] = [
            {"containerPort": port, "protocol": protocol, "name": f"serve-{port}-{protocol.lower()}"}
            for port in PORTS
            for protocol in ("TCP", "UDP")
        ]
        return made

    def control(self, name: str) -> Path:
        return self.directory / name.replace("/", "-")

    def close(self) -> None:
        self.threads.shutdown()
        super().close()

    # -- policies ----------------------------------------------------------------------------------------------------

    def enforce(self, policies: Iterable[NetworkPolicy], *more: dict[str, Any]) -> None:
        """These policies and no others, from one moment on. Networks are those of this lab."""
        text = json.dumps([*map(document, policies), *more])
        four, six = self.addresses["y/b"]
        for there, here in (
            ("10.0.2.2/32", f"{four}/32"),
            ("fd00::2:2/128", f"{six}/128"),
            ("10.0.2.0/24", "10.244.2.0/24"),
            ("fd00::2:0/112", "fd00:10:244:2::/64"),
        ):
            text = text.replace(f'"{there}"', f'"{here}"')
        scratch = self.layout.manifests / ".policies.tmp"
        scratch.write_text("\n---\n".join(map(json.dumps, json.loads(text))))
        scratch.rename(self.layout.manifests / "policies.yaml")

    def label(self, name: str, **labels: str) -> None:
        """A pod has other labels, as a controller would give them."""
        key = published.ObjectKey(*name.split("/"))
        live = published.find(self.layout, "Pod", key)
        assert live is not None
        live["metadata"]["labels"] = labels
        published.publish(self.layout, live)

    # -- traffic -----------------------------------------------------------------------------------------------------

    def tell(self, name: str, *command: Any) -> Any:
        """One command to the process of a pod, to its end."""
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(60)
            one.connect(str(self.control(name)))
            with one.makefile("rw") as lines:
                lines.write(json.dumps(command) + "\n")
                lines.flush()
                return json.loads(lines.readline() or "null")

    def begin(self, name: str, *command: Any) -> Future[Any]:
        """The same, while the test goes on."""
        return self.threads.submit(self.tell, name, *command)

    def reached(self, v: int, timeout: float) -> dict[Way, bool]:
        """Everybody asks everybody, at once."""
        ends = [(d, p, n) for d in EVERY for p in ("TCP", "UDP") for n in PORTS]
        wire = [(p, self.addresses[d][v], n) for d, p, n in ends]
        asked = {source: self.begin(source, "probe", wire, timeout) for source in EVERY}
        return {
            (source, *end): found
            for source, future in asked.items()
            for end, found in zip(ends, future.result(), strict=True)
        }

    def comes_to(self, expected: Expected, v: int = 0) -> None:
        """The whole matrix is as expected within seconds: every pair, both protocols, both ports."""
        wanted = {
            (s, d, p, n): s == d or expected(s, d, p, n)
            for s in EVERY
            for d in EVERY
            for p in ("TCP", "UDP")
            for n in PORTS
        }
        deadline, timeout = time.monotonic() + PATIENCE, 0.2
        while wrong := {way: f for way, f in self.reached(v, timeout).items() if f is not wanted[way]}:
            assert time.monotonic() < deadline, f"{len(wrong)} of {len(wanted)} are wrong: {list(wrong.items())[:10]}"
            timeout = min(timeout * 1.5, 0.9)

    def reaches(self, source: str, target: str, port: int = 80, timeout: float = 0.5) -> bool:
        return bool(self.tell(source, "probe", [("TCP", self.addresses[target][0], port)], timeout)[0])

    def until(self, condition: Callable[[], bool]) -> float:
        """Waits for it; how long it took."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() < begin + PATIENCE
        return time.monotonic() - begin


def document(found: NetworkPolicy) -> dict[str, Any]:
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", **msgspec.to_builtins(found)}


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"ns": name, **labels}}}


def everybody(*_: object) -> bool:
    return True


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PolicyLab]:
    made = PolicyLab(unique_name("p"), tmp_path_factory.mktemp("probers"))
    try:
        made.fill()
        yield made
    finally:
        made.close()


@pytest.fixture
def lab(shared: PolicyLab) -> Iterator[PolicyLab]:
    yield shared
    with contextlib.suppress(FileNotFoundError):
        (shared.layout.manifests / "policies.yaml").unlink()


# -- who reaches whom --------------------------------------------------------------------------------------------------


def test_without_policies_everybody_is_reached(lab: PolicyLab) -> None:
    for v in (0, 1):
        lab.comes_to(everybody, v)


@pytest.mark.parametrize("number", range(len(NETPOL)), ids=[row[0] for row in NETPOL])
def test_netpol(lab: PolicyLab, number: int) -> None:
    """IPv4 and IPv6 by turns."""
    _, policies, expected = NETPOL[number]
    lab.enforce(policies)
    lab.comes_to(expected, number % 2)


def test_updated_policy_and_the_end_of_it(lab: PolicyLab) -> None:
    lab.enforce([DENY_X])
    lab.comes_to(lambda s, d, _, __: not (s.startswith("x/") or d.startswith("x/")))
    lab.enforce([policy("{podSelector: {}, policyTypes: [Ingress, Egress], egress: [{}]}", "deny")])
    lab.comes_to(lambda s, d, _, __: not d.startswith("x/"))
    lab.enforce([])
    lab.comes_to(everybody)


def test_updated_labels_of_pods_and_namespaces(lab: PolicyLab) -> None:
    peers = "[{podSelector: {matchLabels: {role: client}}}, {namespaceSelector: {matchLabels: {team: blue}}}]"
    guarded = [policy(f"{{{A}, ingress: [{{from: {peers}}}]}}")]
    lab.enforce(guarded)
    lab.comes_to(lambda s, d, _, __: d != "x/a")
    try:
        lab.label("x/b", pod="b", role="client")
        published.publish(lab.layout, namespace("y", team="blue"))
        lab.comes_to(lambda s, d, _, __: d != "x/a" or s == "x/b" or s.startswith("y/"))
        lab.label("x/a", pod="another")  # no policy selects it any more
        lab.comes_to(everybody)
    finally:
        lab.label("x/a", pod="a")
        lab.label("x/b", pod="b")
        published.publish(lab.layout, namespace("y"))
    lab.comes_to(lambda s, d, _, __: d != "x/a")


# -- while traffic goes on ---------------------------------------------------------------------------------------------

ALLOW = policy(f"{{{A}, policyTypes: [Ingress, Egress], egress: [{{to: [{{namespaceSelector: {{}}}}]}}]}}", "allow")


def test_fifty_updates_cost_no_request(lab: PolicyLab, tmp_path: Path) -> None:
    """Of policies and labels that have to do with the flow, and of others. Who is denied stays so."""
    lab.enforce([ALLOW])
    lab.until(lambda: not lab.reaches("y/a", "x/a", timeout=0.2))
    target = lab.addresses["y/b"][0]
    stop = tmp_path / "stop"
    loads = [lab.begin("x/a", "load", target, port, 60, 0.002, str(stop)) for port in PORTS]
    knocks = lab.begin("y/a", "load", lab.addresses["x/a"][0], 80, 60, 0.0, str(stop))
    others = [
        policy("{podSelector: {}, ingress: []}", "z", "z"),
        policy(f"{{{A}, policyTypes: [Egress], egress: [{{ports: [{{port: 80}}]}}]}}", "more"),
        policy("{podSelector: {}, ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}}]}]}", "y", "y"),
        policy(f"{{{A}, policyTypes: [Egress], egress: [{{to: [{{ipBlock: {{cidr: 10.0.2.2/32}}}}]}}]}}", "block"),
    ]
    try:
        for number in range(50):
            lab.enforce([ALLOW, *(one for bit, one in enumerate(others) if number >> bit & 1)])
            if number % 5 == 0:
                lab.label("y/b", pod="b", turn=str(number))
                published.publish(lab.layout, namespace("y", turn=str(number)))
            time.sleep(0.05)
        stop.touch()
        done = [load.result() for load in loads]
        denied = knocks.result()
    finally:
        stop.touch()
        lab.label("y/b", pod="b")
        published.publish(lab.layout, namespace("y"))
    assert [load["failed"] for load in done] == [[], []]
    assert all(load["asked"] > 50 for load in done), done
    assert len(denied["failed"]) >= denied["asked"] > 0, denied


def test_what_is_denied_now_is_cut_within_a_second(lab: PolicyLab) -> None:
    target = lab.addresses["y/b"][0]
    held = [lab.begin(source, "hold", target, 80, 3.0) for source in ("x/a", "z/a")]
    time.sleep(0.7)
    cut = time.monotonic()
    lab.enforce([policy(f"{{{A}, policyTypes: [Egress]}}")])
    mine, others = (future.result() for future in held)
    assert len([at for at in mine if at < cut]) > 5
    assert [at - cut for at in mine if at > cut + 1.0] == []
    assert len([at for at in others if at > cut + 1.0]) > 10  # of another pod: it goes on


def test_a_pod_gets_nothing_before_its_policies_are_in_force(lab: PolicyLab, tmp_path: Path) -> None:
    """It asks and is asked from its first moment on."""
    lab.enforce([DENY_X])
    lab.until(lambda: not lab.reaches("x/b", "y/b", timeout=0.2))
    result = tmp_path / "result"
    script = (
        "import socket, sys, time\n"
        "target, result = sys.argv[1:]\n"
        "end, asked, reached = time.monotonic() + 2, 0, 0\n"
        "while time.monotonic() < end:\n"
        "    one = socket.socket()\n"
        "    one.settimeout(0.05)\n"
        "    asked += 1\n"
        "    reached += one.connect_ex((target, 80)) == 0\n"
        "    one.close()\n"
        "open(result, 'w').write(f'{asked} {reached}')\n"
        "time.sleep(1000)\n"
    )
    made = pod("eager", sys.executable, "-c", script, lab.addresses["y/b"][0], str(result), nodeName="node1")
    made["metadata"] = {"name": "eager", "namespace": "x", "labels": {"pod": "eager"}}
    lab.apply(tmp_path, made)
    try:
        lab.until(lambda: result.exists() and bool(result.read_text()))
        asked, reached = map(int, result.read_text().split())
        assert asked > 10 and reached == 0
    finally:
        lab.run("delete", "-f", str(lab.manifest(tmp_path, made)))


def test_verdicts_outlive_the_agent_and_a_restart_opens_and_cuts_nothing(lab: PolicyLab, tmp_path: Path) -> None:
    lab.enforce([ALLOW, policy("{podSelector: {}, policyTypes: [Egress]}", "z", "z")])

    def expected(source: str, destination: str, _: str, __: int) -> bool:
        return destination != "x/a" and not source.startswith("z/")

    lab.comes_to(expected)
    lab.kill_agent("node1")
    lab.comes_to(expected)
    target, stop = lab.addresses["y/b"][0], tmp_path / "stop"
    load = lab.begin("x/a", "load", target, 80, 60, 0.005, str(stop))
    held = lab.begin("x/a", "hold", target, 81, 60, str(stop))
    ways = ("z/a", target), ("y/a", lab.addresses["x/a"][0])
    knocks = [lab.begin(source, "load", address, 80, 60, 0.0, str(stop)) for source, address in ways]
    try:
        lab.run("up")
        time.sleep(0.5)
    finally:
        stop.touch()
    done, answers, denied = load.result(), held.result(), [knock.result() for knock in knocks]
    assert done["failed"] == [] and done["asked"] > 50
    assert max(b - a for a, b in itertools.pairwise(answers)) < 1.0
    assert all(len(one["failed"]) >= one["asked"] > 0 for one in denied), denied
    lab.comes_to(expected)


def test_a_tag_without_a_number_is_no_way_past_policies(lab: PolicyLab) -> None:
    """The stack takes such a packet for one without a tag."""
    mine, other, target = (lab.addresses[name][0] for name in ("z/a", "x/a", "y/a"))
    lab.until(lambda: lab.reaches("z/a", "y/a"))  # what was in force is not, and it knows its router
    ways = [(mine, []), (mine, [0]), (mine, [0, 0]), (other, []), (other, [0]), (other, [0, 0])]

    def arrives() -> list[str]:
        heard = lab.begin("y/a", "listen", 9, 1.0)
        time.sleep(0.3)
        for source, tags in ways:
            lab.tell("z/a", "tagged", source, target, 9, tags)
        return list(heard.result())

    assert arrives() == [mine, mine]
    lab.enforce([policy("{podSelector: {}, policyTypes: [Egress]}", "z", "z")])
    lab.until(lambda: not lab.reaches("z/a", "y/a", timeout=0.2))
    assert arrives() == []


def test_every_pod_is_there(lab: PolicyLab) -> None:
    """What the table is about: nine pods."""
    assert len(EVERY) == len(NAMESPACES) * len(PODS) == len(lab.addresses)
