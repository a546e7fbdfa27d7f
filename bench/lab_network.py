"""The same pods in a waggle lab: real agents, real CNI, real Services, on the topology of `plain`.

A lab per event setting, alternated in the same rounds, because events are fixed when the programs are loaded. Lab names
hold this process's id: what a killed run left is found and removed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import objects
from bench.leftovers import cgroup2
from bench.observer import FillWatch
from bench.places import BIN, BenchError, Place, checked
from bench.plain import ACROSS_NODES, ONE_NODE, PORT
from bench.service_ports import Endpoint, filler, manifests
from bench.traffic import Test, target
from bench.ways import CLUSTER_IPS, SERVICE_NAMES, SERVICE_PORTS, Way, filler_addresses, in_turn
from waggle.lab import lifecycle, processes
from waggle.lab.layout import LabLayout
from waggle.lab.record import load_lab, load_pods

_FILES_OF = 200  # Services per manifest
_PROGRAM_LIMIT = 300.0
_NODE_OF = {ONE_NODE: 1, ACROSS_NODES: 2}


class LabNetwork:
    """Two nodes; a client pod on the first, `servers` serving pods on each, a Service per node. A context manager."""

    def __init__(self, servers: int, server_cpu: int | None, tag: str, **settings: str) -> None:
        """`settings` are those of the agents; `tag` (lower-case letters) keeps labs of one run apart."""
        self._servers = servers
        self._server_cpu = server_cpu
        self._settings = settings
        self._fillers = 0
        self.name = f"bench{os.getpid()}{tag}"
        self.lab = LabLayout(self.name, cgroup2())
        self._places: dict[str, Place] = {}

    def __enter__(self) -> LabNetwork:
        try:
            self.change(**self._settings)
            self._apply()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; safe to call more than once."""
        waggle("lab", "down", "--name", self.name, timeout=120)

    def change(self, **settings: str) -> None:
        """Bring the lab up with these settings of the agents; where it is, agents with other ones are restarted."""
        given = [part for name, value in settings.items() for part in ("--set", f"{name.replace('_', '-')}={value}")]
        waggle("lab", "up", "--name", self.name, "--nodes", "2", *given, timeout=120)

    def client(self) -> Place:
        return self._places["client"]

    def servers(self, placement: str) -> list[Place]:
        return [self._places[_server_name(placement, index)] for index in range(self._servers)]

    def pids(self) -> list[int]:
        """Every process of the lab: servers and agents."""
        return processes.pids_below(self.lab.cgroup)

    def agents(self) -> list[int]:
        """Their processes alone."""
        return [pid for node in self.lab.nodes(2) for pid in processes.pids_below(node.agent_cgroup)]

    def program(self, services: int) -> None:
        """Have that many Services, the two that are measured included; returns when every node has them in its maps."""
        wanted = max(0, services - len(SERVICE_NAMES))
        if wanted < self._fillers:
            raise BenchError("the number of Services can only grow within a run")
        for start in range(self._fillers, wanted, _FILES_OF):
            numbers = range(start, min(start + _FILES_OF, wanted))
            content = _manifest(document for number in numbers for document in self._filler(number))
            temporary = self.lab.manifests / f".bench-{start:05d}.tmp"
            temporary.write_text(content)
            temporary.rename(self.lab.manifests / f"bench-{start:05d}.yaml")
        self._fillers = wanted
        frontends = wanted + len(SERVICE_NAMES) * len(SERVICE_PORTS) * len(CLUSTER_IPS[ONE_NODE])
        watches = [
            FillWatch(node.bpf / "maps" / "wag_services", frontends, None, _PROGRAM_LIMIT) for node in self.lab.nodes(2)
        ]
        try:
            for watch in watches:
                watch.result()
        finally:
            for watch in watches:
                watch.close()

    def _filler(self, number: int) -> Iterable[dict[str, Any]]:
        """A Service that is there to be one of many. The pods of the first node are its endpoints: it answers."""
        return manifests(filler(number, [Endpoint(place.address(4), PORT) for place in self.servers(ONE_NODE)]))

    # -- building -----------------------------------------------------------------------------------------------

    def _apply(self) -> None:
        documents = [_pod("client", 1, ["sleep", "infinity"], [])]
        for placement, node in _NODE_OF.items():
            command = [str(BIN / "server"), "--port", str(PORT)]
            if self._server_cpu is not None:
                command += ["--cpu", str(self._server_cpu)]
            for index in range(self._servers):
                documents.append(
                    _pod(_server_name(placement, index), node, command, SERVICE_PORTS, SERVICE_NAMES[placement])
                )
            documents.append(_service(placement))
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(_manifest(documents))
            file.flush()
            waggle("lab", "apply", "--name", self.name, "-f", file.name, timeout=120)
        record = load_lab(self.lab)
        if record is None:
            raise BenchError(f"lab {self.name} is gone")
        for key, (pod, pod_record) in load_pods(self.lab, record.nodes).items():
            pod.place.exec_cgroup.mkdir(exist_ok=True)
            addresses = tuple(pod_record.addresses)
            self._places[key.name] = Place(str(key), pod.place.netns, addresses, pod.place.exec_cgroup)


class Direct(Way):
    """From pod to pod by the pods' own addresses."""

    def __init__(self, network: LabNetwork, family: int, name: str, title: str) -> None:
        self.name = name
        self.title = title
        self._network = network
        self._family = family

    @property
    def client(self) -> Place:
        return self._network.client()

    def processes(self) -> list[int]:
        return self._network.pids()

    def targets(self, placement: str, test: Test) -> list[str]:
        return [target(place.address(self._family), test.port) for place in self._network.servers(placement)]

    def first_targets(self, numbers: Sequence[int]) -> list[str]:
        return in_turn(self._network.servers(ONE_NODE), numbers)


class ClusterIP(Direct):
    """The same pods through the ClusterIP of their Service."""

    def targets(self, placement: str, test: Test) -> list[str]:
        return [target(CLUSTER_IPS[placement][self._family == 6], test.port)]

    def first_targets(self, numbers: Sequence[int]) -> list[str]:
        return filler_addresses(numbers)

    def program(self, services: int) -> None:
        self._network.program(services)


class ClusterIPPerPacket(ClusterIP):
    """Through the ClusterIP from the same pod, by a process outside of the cgroup whose sockets waggle translates: as
    a virtual machine or a container of a foreign runtime, its packets are translated on the pod's interface."""

    @property
    def client(self) -> Place:
        return dataclasses.replace(super().client, cgroup=None)


def waggle(*arguments: str, timeout: float) -> str:
    """Run waggle's command line from this interpreter's environment."""
    command = [sys.executable, "-m", "waggle.cli.main", *arguments]
    return checked(command, timeout=timeout, subject=f"waggle {' '.join(arguments[:2])}")


def remove_leftover_labs() -> None:
    """Labs of runs that were killed."""
    for name in lifecycle.lab_names():
        match = re.fullmatch(r"bench(\d+)[a-z]+", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            waggle("lab", "down", "--name", name, timeout=120)


def _server_name(placement: str, index: int) -> str:
    return f"server-{SERVICE_NAMES[placement]}-{index}"


def _pod(
    name: str, node: int, command: list[str], ports: Sequence[tuple[str, str, int]], app: str = "client"
) -> dict[str, Any]:
    listed = [{"name": key, "protocol": protocol, "containerPort": port} for key, protocol, port in ports]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": objects.NAMESPACE, "labels": {"app": app}},
        "spec": {
            "nodeName": f"node{node}",
            "containers": [{"name": "main", "image": "none", "command": command, "ports": listed}],
        },
    }


def _service(placement: str) -> dict[str, Any]:
    listed = [
        {"name": key, "protocol": protocol, "port": port, "targetPort": port} for key, protocol, port in SERVICE_PORTS
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": SERVICE_NAMES[placement], "namespace": objects.NAMESPACE},
        "spec": {
            "clusterIP": CLUSTER_IPS[placement][0],
            "clusterIPs": list(CLUSTER_IPS[placement]),
            "ipFamilyPolicy": "RequireDualStack",
            "ipFamilies": ["IPv4", "IPv6"],
            "selector": {"app": SERVICE_NAMES[placement]},
            "ports": listed,
        },
    }


def _manifest(documents: Iterable[dict[str, Any]]) -> str:
    """YAML documents written as JSON, which YAML includes: made and parsed faster."""
    return "".join(f"---\n{json.dumps(document)}\n" for document in documents)
