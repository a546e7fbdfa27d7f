"""The same Services programmed as kube-proxy would: its rules, in namespaces that are like those of `plain`.

Every node of such a network has the whole rule set, as in a cluster; connection tracking and NAT are in these
namespaces only. kube-proxy itself does not run: what its rules do to packets is all that is measured here, and what
loading them takes is measured in `peer_sync`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.leftovers import PREFIX
from bench.places import BenchError, Place
from bench.plain import ACROSS_NODES, ONE_NODE, PORT, PlainNetwork
from bench.rule_sets import Load, RuleSet, load_environment
from bench.service_ports import Endpoint, ServicePort, filler
from bench.traffic import Test, target
from bench.ways import CLUSTER_IPS, SERVICE_NAMES, SERVICE_PORTS, Way, filler_addresses

#: Loading may take minutes with 50,000 Services: a set per Service, and the kernel walks all of them for each.
_LOAD_LIMIT = 900.0


class RuleNetwork(PlainNetwork):
    """Plain routed namespaces whose nodes have the rules of kube-proxy."""

    def __init__(self, rules: RuleSet, servers: int, server_cpu: int | None) -> None:
        super().__init__(servers, server_cpu, rules.name)
        self.rules = rules
        self._present: set[str] = set()

    def program(self, services: int) -> None:
        """That many Services, the two that are measured included, on both nodes; the nodes are loaded side by side."""
        loads = []
        for number, place in enumerate(self.nodes, start=1):
            ports = self._ports(number, services)
            added = [port for port in ports if str(port) not in self._present]
            loads.append((place, self.rules.loads(ports, added)))
        load_rules(loads)
        self._present |= {str(port) for port in ports}

    def forget_connections(self) -> None:
        """No run finds the connections of the one before in the table, nor fills it up for the next."""
        for place in self.nodes:
            place.run(["conntrack", "-F"], timeout=60)

    def _ports(self, node: int, services: int) -> list[ServicePort]:
        """As seen from one node, in the order in which iptables tries them. kube-proxy's order is a random one; in the
        middle, those that are measured are where a Service is on average."""
        measured = []
        for placement, on in ((ONE_NODE, 1), (ACROSS_NODES, 2)):
            endpoints = self._endpoints(placement)
            for key, protocol, number in SERVICE_PORTS:
                here = [Endpoint(address, number, node == on) for address in endpoints]
                name, address = SERVICE_NAMES[placement], CLUSTER_IPS[placement][0]
                measured.append(ServicePort("bench", name, key, protocol, address, number, here))
        serving = [Endpoint(address, PORT, node == 1) for address in self._endpoints(ONE_NODE)]
        others = [filler(number, serving) for number in range(max(0, services - len(SERVICE_NAMES)))]
        return [*others[: len(others) // 2], *measured, *others[len(others) // 2 :]]

    def _endpoints(self, placement: str) -> list[str]:
        return [place.address(4) for place in self.servers[placement]]


def load_rules(wanted: Sequence[tuple[Place, Sequence[Load]]]) -> None:
    """Rules into namespaces, into all of them side by side."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-") as folder, _Loaders() as loaders:
        for number, (place, loads) in enumerate(wanted):
            loaders.start(place, loads, Path(folder) / str(number))
        loaders.wait(_LOAD_LIMIT)


@dataclass(frozen=True, slots=True)
class _Process:
    place: Place
    process: subprocess.Popen[str]


class _Loaders:
    """Processes that load rules, one per node. Those that still run when this ends early are ended."""

    def __init__(self) -> None:
        self._loads: list[_Process] = []

    def __enter__(self) -> _Loaders:
        return self

    def __exit__(self, *_: object) -> None:
        for load in self._loads:
            if load.process.poll() is None:
                os.killpg(load.process.pid, signal.SIGKILL)
            load.process.communicate()

    def start(self, place: Place, loads: Sequence[Load], folder: Path) -> None:
        """All of `loads` after one another, the inputs from files: 100 MB are not piped through here."""
        folder.mkdir()
        steps = []
        for number, load in enumerate(loads):
            (folder / str(number)).write_text(load.text)
            steps.append(f"{' '.join(load.command)} <{folder}/{number}")
        process = subprocess.Popen(
            place.command(["sh", "-e", "-c", "\n".join(steps)]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=load_environment(folder),
            start_new_session=True,
        )
        self._loads.append(_Process(place, process))

    def wait(self, seconds: float) -> None:
        for load in self._loads:
            try:
                _, errors = load.process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired as error:
                raise BenchError(f"rules for {load.place.name} were not loaded within {seconds:g} s") from error
            if load.process.returncode:
                raise BenchError(f"rules for {load.place.name} were refused: {errors.strip()[:500]}")


class ThroughRules(Way):
    """Through the ClusterIP of the same kind of Service, translated by the rules of kube-proxy."""

    def __init__(self, network: RuleNetwork) -> None:
        self.name = network.rules.name
        self.title = f"ClusterIP, {network.rules.title}"
        self._network = network

    @property
    def client(self) -> Place:
        return self._network.client

    def processes(self) -> list[int]:
        return self._network.server_pids()

    def targets(self, placement: str, test: Test) -> list[str]:
        return [target(CLUSTER_IPS[placement][0], test.port)]

    def first_targets(self, numbers: Sequence[int]) -> list[str]:
        return filler_addresses(numbers)

    def program(self, services: int) -> None:
        self._network.program(services)

    def prepare(self) -> None:
        self._network.forget_connections()
