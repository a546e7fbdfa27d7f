"""What policies cost: pods with and without 1, 100 and 1,000 policies that apply to them, and 10,000 pods elsewhere;
and what flow events cost.

There are two labs. One of them has what is measured and the other has not, their runs take turns, a fraction of a
second apart, and at half time they change roles: labs that are made alike differ by more than policies cost, for as
long as they live, and a machine is now slower and now faster.

Every policy selects every pod that is measured, in both directions. One of them allows what is measured; the others
allow somebody else on some other port, so that each has to be there and none decides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from bench import objects
from bench.disturbance import cpu_seconds
from bench.east_west import drop_time_wait
from bench.figures import Figures
from bench.lab_network import Direct, LabNetwork, remove_leftover_labs
from bench.places import BenchError
from bench.rounds import measure
from bench.traffic import ClientSettings, Sample, cpus
from waggle.abi._generated import Endpoint, EndpointFlag
from waggle.abi.address import pack_address
from waggle.kernel.maps import Map
from waggle.lab import processes
from waggle.lab.layout import NodeLayout

KEY = "policy"
TESTS = ("connect", "request", "request16", "udp16")
#: The maps that policies are in.
MAPS = ("wag_policy", "wag_policy_steps", "wag_classes", "wag_class_ranges", "wag_policy_state", "wag_conns")
NO_POLICY = "no-policy"
_APPS = 1000  # what remote pods and policies are divided into
_FILES_OF = 500
_FIRST_REMOTE = IPv4Address("10.192.0.0")
_LIMIT = 180.0
_IDLE = 0.08  # of one CPU, of all agents together
_LABELS = 30


@dataclass(frozen=True, slots=True)
class Case:
    """What the lab has, besides its pods."""

    name: str
    title: str
    policies: int = 0
    remote_pods: int = 0
    events: str = "all"

    @property
    def base(self) -> str:
        """The way without it that takes turns with it."""
        return f"{self.name}/{NO_POLICY}"


BASE = Case(NO_POLICY, "no policy")
CASES = (
    Case("policies-1", "1 policy", 1),
    Case("policies-100", "100 policies", 100),
    Case("policies-1000", "1,000 policies", 1000),
    Case("remote-10000", "1,000 policies and 10,000 pods elsewhere", 1000, 10_000),
    Case("quiet", "flow-events: off", events="off"),
)


def measure_policy(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    """Every test, on one node and across, in every case; skips what `figures` holds already. There are `options.rounds`
    rounds in each role, numbered on from the first to the second."""
    tests = [test for test in options.policy_tests if test.key in TESTS]
    cells = [(placement, test) for placement in options.places for test in tests]
    wanted = 4 * options.rounds * len(cells)
    asked = [case for case in CASES if case.name in options.cases]
    todo = [case for case in asked if not figures.complete(KEY, wanted, case=case.name)]
    if not todo or not cells:
        return
    remove_leftover_labs()
    client_cpu, server_cpu = cpus()
    settings = ClientSettings(options.seconds, options.warmup, options.close, client_cpu, options.attempts)
    rows = figures.rows(KEY)
    with ExitStack() as stack:
        labs = []
        for tag in ("policya", "policyb"):
            network = stack.enter_context(LabNetwork(options.servers, server_cpu, tag, flow_events=BASE.events))
            labs.append(_Lab(network, figures.document.setdefault("policy_tables", {})))
        drop_time_wait([lab.way(options.family, BASE.name, BASE.title) for lab in labs])
        for case in todo:
            for half, (subject, other) in enumerate(itertools.permutations(labs)):
                other.become(BASE)
                subject.become(case)
                ways = [
                    other.way(options.family, case.base, BASE.title),
                    subject.way(options.family, case.name, case.title),
                ]
                for placement, test in cells:
                    progress(f"{case.title}, {placement}: {test.title}, {('first', 'second')[half]} half")
                    first = half * options.rounds
                    measure(ways, test, placement, 0, options.rounds, settings, partial(_record, rows, case), first)
            figures.save()


def _record(rows: list[dict[str, Any]], case: Case, sample: Sample) -> None:
    rows.append(dataclasses.asdict(sample) | {"case": case.name})


class _Lab:
    """Gives a lab what a case asks for, and takes it away again. `facts`: what was found of each case, once."""

    def __init__(self, network: LabNetwork, facts: dict[str, dict[str, Any]]) -> None:
        self.network = network
        self._facts = facts
        self._now = BASE

    def way(self, family: int, name: str, title: str) -> Direct:
        return Direct(self.network, family, name, title)

    def become(self, case: Case) -> None:
        """Returns when it is in force on both nodes, and the agents are idle."""
        before, self._now = self._now, case
        if case.events != before.events:
            self.network.change(flow_events=case.events)
        if case.remote_pods != before.remote_pods:
            _write(self.network, "remote", remote_pods(case.remote_pods))
        if case.policies != before.policies:
            _write(self.network, "policy", policies(case.policies))
        for node in self.network.lab.nodes(2):
            with contextlib.closing(Map.pinned(node.bpf / "maps" / "wag_endpoints")) as endpoints:
                _until(partial(_isolated, endpoints, bool(case.policies)), f"{case.title}: not in force")
            with contextlib.closing(Map.pinned(node.bpf / "maps" / "wag_classes")) as classes:
                _until(partial(_holds, classes, case.remote_pods), f"{case.title}: pods are not known")
        _until(lambda: _cpu_share(self.network.agents()) < _IDLE, f"{case.title}: the agents do not become idle")
        if case.name not in self._facts:
            self._facts[case.name] = self._found(case)

    def _found(self, case: Case) -> dict[str, Any]:
        """What the tables of the first node hold and weigh, and how fast it follows."""
        node = self.network.lab.nodes(2)[0]
        with ExitStack() as stack:
            tables = {
                name: stack.enter_context(contextlib.closing(Map.pinned(node.bpf / "maps" / name))) for name in MAPS
            }
            return {
                "policies": case.policies,
                "remote_pods": case.remote_pods,
                "entries": _count(tables["wag_policy"]),
                "classes": _count(tables["wag_classes"]),
                "bytes": {name: table.memory_bytes() for name, table in tables.items()},
                "agent_bytes": agent_bytes(node),
                "enforcement_ms": enforcement(self.network, tables["wag_classes"]) if case.remote_pods else [],
            }


def _isolated(endpoints: Map, wanted: bool) -> bool:
    """Have all pods of a node policies in both directions, or none of them any?"""
    pods = [Endpoint.unpack(value) for _, value in endpoints.dump()]
    found = {
        bool(sets) for pod in pods if pod.flags & EndpointFlag.POD for sets in (pod.ingress_policy, pod.egress_policy)
    }
    return found == {wanted}


def _cpu_share(pids: Iterable[int], seconds: float = 0.4) -> float:
    """Of one CPU, that processes take now."""
    pids = list(pids)
    before = sum(map(cpu_seconds, pids))
    time.sleep(seconds)
    return (sum(map(cpu_seconds, pids)) - before) / seconds


def agent_bytes(node: NodeLayout) -> int:
    """Memory of a node's agent: its share of what it has with others included (PSS)."""
    total = 0
    for pid in processes.pids_below(node.agent_cgroup):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def enforcement(network: LabNetwork, classes: Map) -> list[float]:
    """Milliseconds from a pod's new label, in a manifest of its own, to its address having another class: the watch
    of the directory, YAML, planning and writing."""
    address = str(_FIRST_REMOTE - 1)
    key = pack_address(address)
    _write(network, "label", [_remote_pod("relabelled", 0, address)])
    _until(lambda: classes.lookup(key) is not None, "the pod that is relabelled is not known")
    found = []
    for number in range(1, _LABELS + 1):
        before = classes.lookup(key)
        begin = time.monotonic()
        _write(network, "label", [_remote_pod("relabelled", number, address)])
        while classes.lookup(key) == before:
            if time.monotonic() - begin > _LIMIT:
                raise BenchError(f"a pod's new label is not in force after {_LIMIT:g} s")
            time.sleep(0.0005)
        found.append((time.monotonic() - begin) * 1000)
        time.sleep(0.1)
    return found


def _holds(table: Map, entries: int) -> bool:
    return _count(table) >= entries


def _count(table: Map) -> int:
    return sum(1 for _ in table.dump())


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{otherwise} after {_LIMIT:g} s")
        time.sleep(0.2)


def _write(network: LabNetwork, name: str, documents: Iterable[dict[str, Any]]) -> None:
    """Manifests of all nodes, in place of those of that name; complete as soon as they have theirs."""
    part: list[str] = []

    def flush(number: int) -> None:
        if part:
            temporary = network.lab.manifests / f".bench-{name}-{number:05d}.tmp"
            temporary.write_text("".join(part))
            temporary.rename(network.lab.manifests / f"bench-{name}-{number:05d}.yaml")
            part.clear()
            written.add(f"bench-{name}-{number:05d}.yaml")

    written: set[str] = set()
    number = 0
    for number, document in enumerate(documents, 1):
        part.append(f"---\n{json.dumps(document)}\n")
        if number % _FILES_OF == 0:
            flush(number)
    flush(number + 1)
    for path in network.lab.manifests.glob(f"bench-{name}-*.yaml"):
        if path.name not in written:
            path.unlink()


def policies(count: int) -> Iterator[dict[str, Any]]:
    """The first one allows what is measured."""
    for number in range(count):
        peer: dict[str, Any] = {"podSelector": {}} if not number else {"podSelector": {"matchLabels": _app(number)}}
        rule: dict[str, Any] = {"ports": [{"port": 1024 + number}]} if number else {}
        yield {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"policy-{number}", "namespace": objects.NAMESPACE},
            "spec": {
                "podSelector": {},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": [{"from": [peer], **rule}],
                "egress": [{"to": [peer], **rule}],
            },
        }


def remote_pods(count: int) -> Iterator[dict[str, Any]]:
    """Pods of a node that is not there: ten of each app, if there are 10,000."""
    for number in range(count):
        yield _remote_pod(f"remote-{number}", number, str(_FIRST_REMOTE + number + 1))


def _remote_pod(name: str, number: int, address: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": objects.NAMESPACE, "labels": _app(number)},
        "spec": {"nodeName": f"far-{number // 100}", "containers": [{"name": "main", "image": "none"}]},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    }


def _app(number: int) -> dict[str, str]:
    return {"app": f"remote-{number % _APPS}"}
