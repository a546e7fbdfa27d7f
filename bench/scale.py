"""The agent with very many Services: how long it takes, and what it holds.

Cold start: nothing pinned, from the agent's process being made until the observer sees every frontend with all of
its endpoints in the map. (The agent writes backends before the frontend that points to them.)

Burst: many Services change at once, their events handed to the socket together: until the observer has seen all of
their frontends changed.

Change: from the moment the API server hands one EndpointSlice event to its socket until the observer sees the
frontend's value changed. Each change is checked: the backends are those of the slice that was sent.

Sync: what a peer takes to load the rules for the same, see `peer_sync`.

Memory: of the agent, its proportional and resident set; of the maps, what the kernel accounts for them.
"""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import objects
from bench.disturbance import CpuMeter
from bench.observer import BurstWatch, ChangeWatch, Filled, FillWatch, Tables, frontend_key, map_memory
from bench.peer_sync import measure_syncs
from bench.places import BenchError
from bench.rounds import repeated
from bench.rule_sets import RuleSet
from bench.scale_node import ScaleNode
from bench.stand_in import StandInApi

_START_LIMIT = 120.0
_CHANGE_LIMIT_MS = 10_000


@dataclass(frozen=True, slots=True)
class ScaleSettings:
    """How large, and how often. `attempts`: at most so many where something else takes CPU time."""

    services: int
    endpoints: int
    starts: int
    changes: int
    burst: int
    attempts: int
    cpu: int | None
    peers: Sequence[RuleSet]
    sync_limit: float
    settle: float


def measure_scale(settings: ScaleSettings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Everything this module measures, as a document for the JSON file."""
    services, endpoints = settings.services, settings.endpoints
    with ExitStack() as stack:
        node = stack.enter_context(ScaleNode())
        progress(f"a Kubernetes API with {services} Services of {endpoints} endpoints")
        api = stack.enter_context(StandInApi(node.place, node.folder, node.api_port, services, endpoints))
        node.configure({"kubeconfig": str(api.kubeconfig), "kubernetes-netns": str(node.place.netns)})
        meter = CpuMeter(lambda: [*node.pids(), *api.pids()])
        cold = []
        for number in range(settings.starts):
            progress(f"cold start {number + 1} of {settings.starts}")
            cold.append(_undisturbed(meter, settings.attempts, lambda: _cold_start(node, services, endpoints)))
        tables = Tables(node.pin("wag_services"), node.pin("wag_backends"))
        stack.callback(tables.close)
        _check(tables, services, endpoints)
        at_start = _memory(node)
        before = meter.snapshot()
        latencies = _changes(node, api, tables, settings, progress)
        during_changes = meter.since(before)
        progress(f"{settings.burst} changes at once")
        bursts = [
            _undisturbed(meter, settings.attempts, lambda: _burst(node, api, tables, settings))
            for _ in range(settings.starts)
        ]
        idle = _idle_cpu(node, settings.settle)
        after = _memory(node)
        maps = map_memory(node.bpf_root)
        progress("restarts with everything pinned")
        warm = [
            _undisturbed(meter, settings.attempts, lambda: _restart(node, api, tables, services))
            for _ in range(settings.starts)
        ]
    syncs = {peer.name: measure_syncs(peer, services, endpoints, settings, progress) for peer in settings.peers}
    return {
        "services": services,
        "endpoints": endpoints,
        "cold_start_s": cold,
        "restart_s": warm,
        "change_ms": latencies,
        "change_disturbance": dataclasses.asdict(during_changes),
        "burst": settings.burst,
        "burst_s": bursts,
        "peers": syncs,
        "agent_memory": {"after start": at_start, f"after {settings.changes} changes": after},
        "agent_idle_cpu": idle,
        "maps": maps,
    }


def _undisturbed(meter: CpuMeter, attempts: int, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    figures, disturbance, made = repeated(meter, attempts, run)
    return figures | dataclasses.asdict(disturbance) | {"attempts": made}


def _cold_start(node: ScaleNode, services: int, endpoints: int) -> dict[str, float]:
    """Seconds from the start of the process until maps exist, the first frontend is there, all are."""
    node.stop_agent()
    if node.bpf_root.exists():
        node.clean()
    watch = FillWatch(node.pin("wag_services"), services, endpoints, _START_LIMIT)
    try:
        started = node.start_agent()
        node.wait(f"{services} Services are in the maps", watch.done, _START_LIMIT + 5)
        filled: Filled = watch.result()
    finally:
        watch.close()
    assert node.agent is not None
    return {
        "maps": (filled.appeared_ns - started) / 1e9,
        "first": (filled.first_ns - started) / 1e9,
        "all": (filled.full_ns - started) / 1e9,
        "cpu": _cpu_seconds(node.agent.pid),
    }


def _check(tables: Tables, services: int, endpoints: int) -> None:
    """Some of the Services, picked at random, have exactly the backends they should."""
    for number in random.sample(range(services), min(services, 200)):
        wanted = sorted((objects.endpoint_ip(number, index), objects.TARGET_PORT) for index in range(endpoints))
        _expect(tables, number, wanted)


def _expect(tables: Tables, number: int, wanted: list[tuple[str, int]]) -> None:
    found = tables.backends_of(_key(number))
    if found != wanted:
        raise BenchError(f"Service {number} has the backends {found} instead of {wanted}")


def _key(number: int) -> bytes:
    return frontend_key(objects.cluster_ip(number), objects.FILLER_PORT)


def _changes(
    node: ScaleNode, api: StandInApi, tables: Tables, settings: ScaleSettings, progress: Callable[[str], None]
) -> list[float]:
    """Milliseconds of every single change, in the order they were made."""
    latencies = []
    with ChangeWatch(node.pin("wag_services"), settings.cpu) as watch:
        for count in range(settings.changes):
            if count % 100 == 0:
                progress(f"change {count + 1} of {settings.changes}")
            # not in step with any timer of the agent
            time.sleep(random.uniform(0.02, 0.06))
            number = random.randrange(settings.services)
            watch.arm(_key(number), _CHANGE_LIMIT_MS)
            sent, addresses = api.change(number)
            latencies.append((watch.changed() - sent) / 1e6)
            _expect(tables, number, sorted((address, objects.TARGET_PORT) for address in addresses))
    return latencies


def _burst(node: ScaleNode, api: StandInApi, tables: Tables, settings: ScaleSettings) -> dict[str, float]:
    """Seconds from the first event until the last of all the frontends has changed."""
    numbers = random.sample(range(settings.services), settings.burst)
    watch = BurstWatch(node.pin("wag_services"), [_key(number) for number in numbers], _START_LIMIT)
    try:
        sent, endpoints = api.burst(numbers)
        changed = watch.changed()
    finally:
        watch.close()
    for number, addresses in zip(numbers, endpoints, strict=True):
        _expect(tables, number, sorted((address, objects.TARGET_PORT) for address in addresses))
    return {"applied": (changed - sent) / 1e9}


def _restart(node: ScaleNode, api: StandInApi, tables: Tables, services: int) -> dict[str, float]:
    """The agent is killed, one Service changes meanwhile, and it is started again: seconds until that is applied."""
    assert node.agent is not None
    number = random.randrange(services)
    with ChangeWatch(node.pin("wag_services"), None) as watch:
        node.stop_agent(kill=True)
        _, addresses = api.change(number)
        api.make_lists()
        watch.arm(_key(number), int(_START_LIMIT * 1000))
        started = node.start_agent()
        seconds = (watch.changed() - started) / 1e9
    _expect(tables, number, sorted((address, objects.TARGET_PORT) for address in addresses))
    return {"applied": seconds}


def _memory(node: ScaleNode) -> dict[str, int]:
    """Bytes of the agent's whole process tree."""
    assert node.agent_place.cgroup is not None
    total = {"rss": 0, "pss": 0}
    pids = (node.agent_place.cgroup / "cgroup.procs").read_text().split()
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss"):
                total[name.lower()] += int(rest.split()[0]) * 1024
    return total | {"processes": len(pids)}


def _idle_cpu(node: ScaleNode, seconds: float) -> float:
    """Share of one CPU that the agent takes while nothing changes."""
    assert node.agent is not None
    time.sleep(1)
    before = _cpu_seconds(node.agent.pid)
    time.sleep(seconds)
    return (_cpu_seconds(node.agent.pid) - before) / seconds


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
