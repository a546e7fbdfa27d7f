"""What policies cost: the same pods in labs without policies, with 1, 100 and 1,000 that apply, and with 10,000 pods
elsewhere.

Every policy selects every pod that is measured, in both directions. One of them allows what is measured; the others
allow somebody else on some other port, so that each has to be there and none decides. The lab without policies with
`flow-events: off` says what events cost.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from bench import objects
from bench.east_west import drop_time_wait
from bench.figures import Figures
from bench.lab_network import Direct, LabNetwork, remove_leftover_labs
from bench.places import BenchError
from bench.rounds import measure
from bench.traffic import ClientSettings, Sample, cpus
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
_LABELS = 30


@dataclass(frozen=True, slots=True)
class Case:
    """One lab."""

    name: str
    title: str
    policies: int = 0
    remote_pods: int = 0
    events: str = "all"


CASES = (
    Case(NO_POLICY, "no policy"),
    Case("policies-1", "1 policy", 1),
    Case("policies-100", "100 policies", 100),
    Case("policies-1000", "1,000 policies", 1000),
    Case("remote-10000", "1,000 policies and 10,000 pods elsewhere", 1000, 10_000),
    Case("quiet", "no policy, flow-events: off", events="off"),
)


def measure_policy(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    """Every test, on one node and across, in every lab; skips what `figures` holds already."""
    tests = [test for test in options.policy_tests if test.key in TESTS]
    cells = [(placement, test) for placement in options.places for test in tests]
    wanted = options.rounds * len(CASES)

    def is_there(placement: str, test: str) -> bool:
        return figures.complete(KEY, wanted, placement=placement, test=test)

    if all(is_there(placement, test.key) for placement, test in cells):
        return
    remove_leftover_labs()
    client_cpu, server_cpu = cpus()
    settings = ClientSettings(options.seconds, options.warmup, options.close, client_cpu, options.attempts)
    with ExitStack() as stack:
        ways = []
        facts = figures.document.setdefault("policy_tables", {})
        for number, case in enumerate(CASES):
            progress(f"lab: {case.title}")
            tag = f"policy{chr(ord('a') + number)}"
            network = stack.enter_context(LabNetwork(options.servers, server_cpu, tag, flow_events=case.events))
            facts[case.name] = fill(network, case)
            ways.append(Direct(network, options.family, case.name, case.title))
        figures.save()
        drop_time_wait(ways)
        for placement, test in cells:
            if is_there(placement, test.key):
                continue
            progress(f"policy, {placement}: {test.title}")
            rows = figures.rows(KEY)

            def record(sample: Sample, rows: list[dict[str, object]] = rows) -> None:
                rows.append(dataclasses.asdict(sample))

            measure(ways, test, placement, 0, options.rounds, settings, record)
            figures.save()


def fill(network: LabNetwork, case: Case) -> dict[str, Any]:
    """Gives a lab its policies and remote pods, waits until they are in force, and says what the tables of the first
    node then hold."""
    _write(network, "remote", remote_pods(case.remote_pods))
    _write(network, "policy", policies(case.policies))
    node = network.lab.nodes(2)[0]
    tables = {name: Map.pinned(node.bpf / "maps" / name) for name in MAPS}
    try:
        if case.policies:
            _until(lambda: _peers(tables) >= case.remote_pods and _entries(tables) > 0, f"{case.title}: not in force")
            _until(lambda: _is_quiet(tables), f"{case.title}: the tables do not settle")
        return {
            "policies": case.policies,
            "remote_pods": case.remote_pods,
            "entries": _entries(tables),
            "classes": _peers(tables),
            "bytes": {name: table.memory_bytes() for name, table in tables.items()},
            "agent_bytes": agent_bytes(node),
            "enforcement_ms": enforcement(network, tables["wag_classes"]) if case.remote_pods else [],
        }
    finally:
        for table in tables.values():
            table.close()


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


def _peers(tables: dict[str, Map]) -> int:
    return sum(1 for _ in tables["wag_classes"].dump())


def _entries(tables: dict[str, Map]) -> int:
    return sum(1 for _ in tables["wag_policy"].dump())


def _is_quiet(tables: dict[str, Map]) -> bool:
    before = tables["wag_policy_state"].lookup(bytes(4))
    time.sleep(2)
    return before == tables["wag_policy_state"].lookup(bytes(4))


def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _LIMIT
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{otherwise} after {_LIMIT:g} s")
        time.sleep(0.2)


def _write(network: LabNetwork, name: str, documents: Iterable[dict[str, Any]]) -> None:
    """Manifests of all nodes, complete as soon as they have their name."""
    part: list[str] = []

    def flush(number: int) -> None:
        if part:
            temporary = network.lab.manifests / f".bench-{name}-{number:05d}.tmp"
            temporary.write_text("".join(part))
            temporary.rename(network.lab.manifests / f"bench-{name}-{number:05d}.yaml")
            part.clear()

    number = 0
    for number, document in enumerate(documents, 1):
        part.append(f"---\n{json.dumps(document)}\n")
        if number % _FILES_OF == 0:
            flush(number)
    flush(number + 1)


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
