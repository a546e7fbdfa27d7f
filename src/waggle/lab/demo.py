"""`waggle lab demo`: a lab, the example manifests, real traffic through every Service, and an account of it.

Requests go from a pod, from two nodes and from outside the cluster; to cluster addresses and node ports, TCP and UDP,
IPv4 and IPv6. Everything is asked for real by `waggle.lab.traffic` inside the namespaces, and every request counts:
one that fails makes the demo fail. Whatever happens, the lab is taken down at the end unless it was asked to stay.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from waggle.errors import LabError
from waggle.lab import agents, applying, entering, lifecycle, netfilter, processes
from waggle.lab.demo_report import Latency, PathResult, PortResult, Report
from waggle.lab.layout import CLIENT, LabLayout, Place
from waggle.lab.lock import Say
from waggle.lab.record import LabRecord, load_pods
from waggle.lab.traffic import GIVE_UP_AFTER, Outcome, Probe, outcome_from
from waggle.model.choice import NodeFacts
from waggle.model.objects import ObjectKey
from waggle.model.service import Family, FrontendKind
from waggle.plan.services import PlanContext, PortView, view_service
from waggle.sources.yaml_objects import parse_manifest
from waggle.store import Store

_SETTLE_TIMEOUT = 30.0
#: Requests per latency figure; enough that a median of them is steady.
_LATENCY_REQUESTS = 300


@dataclass(frozen=True, slots=True)
class Target:
    """One way to reach a Service port."""

    service: ObjectKey
    view: PortView
    kind: FrontendKind
    label: str
    probe: Probe


@dataclass(frozen=True, slots=True)
class Origin:
    """Where requests come from."""

    name: str
    label: str
    place: Place
    environment: dict[str, str]


def run(name: str, examples: Path, say: Say, *, nodes: int = 3, requests: int = 60, keep: bool = False) -> Report:
    """Runs the whole demonstration. Raises LabError when it cannot even be carried out."""
    if not examples.exists():
        raise LabError(f"there are no manifests at {examples}: give their directory with --examples")
    report: Report | None = None
    try:
        with _terminable():
            report = _demonstrate(name, examples, say, nodes, requests)
    finally:
        if keep and report is not None:
            say(f"lab {name!r} is left up, as asked")
        else:
            lifecycle.down(name, say)
    report.kept = keep
    return report


def _demonstrate(name: str, examples: Path, say: Say, nodes: int, requests: int) -> Report:
    lifecycle.up(name, say, nodes=nodes)
    unready = [item for item in applying.apply(name, [examples], say) if item.problem]
    if unready:
        raise LabError("; ".join(f"{item.kind} {item.key}: {item.problem}" for item in unready))
    lab, record = lifecycle.find_lab(name)
    views = _views(lab)
    _await_agents(lab, record, views)
    origins = _origins(lab, record)
    report = Report(name)
    report.without_backends = sorted({str(key) for key, view in views if not view.backends})
    served = [(key, view) for key, view in views if view.backends]
    if not served:
        raise LabError(f"no Service in {examples} has a backend: nothing to show")
    say("sending traffic through every Service, from a pod, from nodes and from outside")
    _measure_paths(lab, record, served, origins, requests, report)
    say("comparing latency through Services with going to the pods directly")
    _measure_latency(served, origins[0], report)
    say("looking for traces of Netfilter in every network namespace of the lab")
    places = {"net": lab.underlay, CLIENT: lab.client}
    places |= {node.name: node.place for node in lab.nodes(record.nodes)}
    places |= {entering.shown_name(key): pod.place for key, (pod, _) in load_pods(lab, record.nodes).items()}
    report.netfilter = [netfilter.inspect(shown, place.netns) for shown, place in places.items()]
    return report


@contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM an orderly end, as Ctrl-C is, so that the lab is taken down."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _views(lab: LabLayout) -> list[tuple[ObjectKey, PortView]]:
    """What the lab's live objects mean, by the rules that the agents program the kernel from."""
    store = Store()
    for path in sorted(lab.manifests.glob("*.yaml")):
        for placed in parse_manifest(path.read_bytes(), str(path)).objects.values():
            store.upsert(placed.obj, str(path))
    found = [
        (key, view) for key in sorted(store.services) for view in view_service(store, key, PlanContext(NodeFacts("")))
    ]
    return [(key, view) for key, view in found if view.port.protocol in ("TCP", "UDP")]


def _await_agents(lab: LabLayout, record: LabRecord, views: list[tuple[ObjectKey, PortView]]) -> None:
    """Waits until every agent knows the backends. What Kubernetes calls eventual is not what is to be measured."""
    wanted = {
        (str(key), view.port.name, view.port.protocol, view.family.value): {
            (endpoint.address, endpoint.port) for endpoint in view.backends
        }
        for key, view in views
    }
    deadline = time.monotonic() + _SETTLE_TIMEOUT
    for node in lab.nodes(record.nodes):
        while True:
            known = {
                (f"{service['namespace']}/{service['name']}", port["name"], port["protocol"], port["family"]): {
                    (backend["address"], backend["port"]) for backend in port["backends"]
                }
                for service in agents.get_json(node, "/services")
                for port in service["ports"]
            }
            if all(known.get(key) == backends for key, backends in wanted.items()) and agents.is_ready(node):
                break
            if time.monotonic() > deadline:
                raise LabError(f"the agent of {node.name} does not know all backends: waggle lab logs {node.name}")
            time.sleep(0.05)
    # The kernel's tables follow what an agent knows within milliseconds.
    time.sleep(0.2)


def _origins(lab: LabLayout, record: LabRecord) -> list[Origin]:
    """A pod first: one made for asking (its name begins with "client"), else any that has its own network."""
    candidates = [key for key, (pod, _) in load_pods(lab, record.nodes).items() if pod.place.name == str(key)]
    pods = sorted(candidates, key=lambda key: (not key.name.startswith(CLIENT), key))
    if not pods:
        raise LabError("the manifests have no Pod: traffic has to come from one")
    names = [entering.shown_name(pods[0]), *(node.name for node in lab.nodes(record.nodes)[:2]), CLIENT]
    origins = []
    for name in names:
        place, extra = entering.place_named(lab, record, name)
        label = f"pod {name}" if name == names[0] else "outside the cluster" if name == CLIENT else name
        origins.append(Origin(name, label, place, entering.command_environment(place, extra)))
    return origins


def _targets(
    lab: LabLayout, record: LabRecord, served: list[tuple[ObjectKey, PortView]], origin: Origin, count: int
) -> Iterator[Target]:
    """Every way from `origin` to the Services. Outside the cluster, cluster addresses mean nothing."""
    for key, view in served:
        protocol = view.port.protocol.lower()
        for frontend in view.frontends:
            if frontend.kind is FrontendKind.CLUSTER_IP:
                if origin.name != CLIENT:
                    probe = Probe(frontend.address, frontend.port, protocol, count)
                    yield Target(key, view, frontend.kind, "ClusterIP", probe)
                continue
            for node in lab.nodes(record.nodes):
                if node.name == origin.name:
                    continue
                address = node.addresses[1 if view.family is Family.IPV6 else 0]
                probe = Probe(address, frontend.port, protocol, count)
                yield Target(key, view, frontend.kind, f"NodePort of {node.name}", probe)


def _measure_paths(
    lab: LabLayout,
    record: LabRecord,
    served: list[tuple[ObjectKey, PortView]],
    origins: list[Origin],
    requests: int,
    report: Report,
) -> None:
    ports = {(key, view.port.name, view.port.protocol): PortResult(str(key), view.port) for key, view in served}
    names = {
        address: entering.shown_name(key)
        for key, (_, pod_record) in load_pods(lab, record.nodes).items()
        for address in pod_record.addresses
    }
    for key, view in served:
        ports[key, view.port.name, view.port.protocol].add_view(view, names)

    def ask(origin: Origin) -> list[tuple[Origin, Target, Outcome]]:
        targets = list(_targets(lab, record, served, origin, requests))
        outcomes = _ask(origin, [target.probe for target in targets])
        return [(origin, target, outcome) for target, outcome in zip(targets, outcomes, strict=True)]

    with ThreadPoolExecutor(max_workers=len(origins)) as pool:
        for origin, target, outcome in (entry for entries in pool.map(ask, origins) for entry in entries):
            view = target.view
            ports[target.service, view.port.name, view.port.protocol].add_outcome(outcome)
            report.paths.append(
                PathResult(
                    origin.label, target.label, view.port.protocol, view.family.value, str(target.service), outcome
                )
            )
    report.ports = list(ports.values())


def _measure_latency(served: list[tuple[ObjectKey, PortView]], origin: Origin, report: Report) -> None:
    """Per Service port and family: through the cluster address, and directly to each of its backends in turn."""
    for key, view in served:
        frontend = next((f for f in view.frontends if f.kind is FrontendKind.CLUSTER_IP), None)
        if frontend is None:
            continue
        protocol = view.port.protocol.lower()
        each = max(1, _LATENCY_REQUESTS // len(view.backends))
        through = Probe(frontend.address, frontend.port, protocol, each * len(view.backends), timeout=1.0)
        direct = [Probe(backend.address, backend.port, protocol, each, timeout=1.0) for backend in view.backends]
        service, *single = _ask(origin, [through, *direct])
        merged = single[0]
        for outcome in single[1:]:
            merged = merged.merged(outcome)
        report.latencies.append(Latency(str(key), view.port, view.family.value, service, merged))


def _ask(origin: Origin, probes: list[Probe]) -> list[Outcome]:
    """The outcomes of the probes, sent from `origin`. Raises LabError when the client there does not work."""
    if not probes:
        return []
    # Generous: failures cost their timeouts, and answers up to a tenth of a second on a busy machine.
    allowed = 30.0 + sum(min(probe.count, GIVE_UP_AFTER) * probe.timeout + probe.count * 0.1 for probe in probes)
    done = processes.run_in(
        origin.place,
        origin.place.exec_cgroup,
        [sys.executable, "-m", "waggle.lab.traffic"],
        env=origin.environment,
        stdin=json.dumps([asdict(probe) for probe in probes]).encode(),
        timeout=allowed,
    )
    if done.returncode != 0:
        raise LabError(f"the client in {origin.name} failed:\n{done.stderr.decode(errors='replace').strip()}")
    return [outcome_from(document) for document in json.loads(done.stdout)]
