"""An agent without a kernel: the real API on a unix socket, over a store and answers that the test makes."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from waggle.abi._generated import HEALTH_KEY_SIZE, HEALTH_SIZE
from waggle.agent.api import Api
from waggle.agent.doctor import Report
from waggle.config import AgentConfig
from waggle.errors import NotReady
from waggle.kernel.maps import HASH
from waggle.metrics import Metrics
from waggle.model.choice import NodeFacts
from waggle.model.interface import PodInterface
from waggle.model.objects import ObjectKey
from waggle.observe.flow_filter import FlowFilter
from waggle.observe.names import Names
from waggle.plan.services import PlanContext
from waggle.reconcile.drift import Drift
from waggle.reconcile.health import HealthTable
from waggle.store import Store
from waggle.testing.memory_map import MemoryMap


class StandInAgent:
    """What waggle.agent.api asks of an agent. Everything may be changed between two requests."""

    def __init__(self, api_socket: Path) -> None:
        self.config = AgentConfig(api_socket=api_socket, metrics_address="", node_name="node1")
        self.metrics = Metrics()
        self.store = Store()
        self.context = PlanContext(NodeFacts("node1"))
        self.pods: list[PodInterface] = []
        self.names = Names(self.store, lambda: self.pods)
        self.tables = SimpleNamespace(problems={})
        self.health = HealthTable(MemoryMap(HASH, HEALTH_KEY_SIZE, HEALTH_SIZE, 16))
        self.overdue = False
        self.is_leaving = False
        self.last_updated = 0.0
        self.cni = SimpleNamespace(pods=lambda: self.pods)
        self.datapath = SimpleNamespace(maps={})
        self.lines: dict[ObjectKey, int] = {}
        self.flows = self
        self.told: list[dict[str, Any]] = []  # what everybody is told who asks for events
        self.asked: tuple[FlowFilter, dict[str, Any]] = FlowFilter(), {}  # what was asked last
        self.listening = threading.Event()
        self.left = threading.Event()  # nobody asks for events any more
        self.doctor = StandInDoctor()
        self.last_error = ""
        self.synced = True
        self.facts: dict[str, Any] = {
            "node": "node1",
            "started": 0.0,
            "synced": True,
            "addresses": {"ipv4": "192.168.1.10", "ipv6": ""},
            "devices": ["eth0"],
            "tunnels": {"waggle-vxlan4": ["node2", "node3"]},
            "podRanges": ["10.244.1.0/24"],
            "dns": ["169.254.53.53"],
            "cgroupRoot": "/sys/fs/cgroup",
            "bpfRoot": "/sys/fs/bpf/waggle",
            "sources": {"manifests": {"synced": True, "policiesSynced": True}},
            "counts": {
                "services": 1,
                "endpointSlices": 2,
                "pods": 3,
                "nodes": 4,
                "frontends": 5,
                "backends": 6,
                "policies": 7,
            },
            "mapMemoryBytes": 3 << 20,
            "problems": [],
        }

    def status(self) -> dict[str, Any]:
        return self.facts

    def place_of(self, kind: str, key: ObjectKey) -> tuple[str, int | None]:
        return self.store.owner(kind, key) or "", self.lines.get(key)

    async def show(self, wanted: FlowFilter, **how: Any) -> AsyncGenerator[dict[str, Any], None]:
        self.asked = wanted, how
        for event in self.told:
            yield dict(event)
        self.listening.set()
        try:
            if how["follow"]:
                await asyncio.Event().wait()
        finally:
            self.left.set()

    def find(self, identity: str) -> dict[str, Any] | None:
        return next((event for event in self.told if event["id"] == identity), None)


class StandInDoctor:
    """Finds what the test says."""

    def __init__(self) -> None:
        self.earlier: list[tuple[float, Drift]] = []
        self.report: Report | None = Report({"services": 2, "wag_services": 3}, repaired=True)

    async def check(self, *, repair: bool = True) -> Report:
        if self.report is None:
            raise NotReady("the sources have not given their first full view yet")
        self.report.repaired = repair
        return self.report


class Running:
    """A stand-in agent that answers, and the way to end it."""

    def __init__(self, path: Path) -> None:
        self.agent = StandInAgent(path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._api = Api(self.agent)  # type: ignore[arg-type]  # what it asks of an agent is all there
        self._api.bind()
        self._run(self._api.start())

    def _run(self, what: Any) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """As an agent ends: idempotent."""
        if self._thread.is_alive():
            self._run(self._api.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()


@contextmanager
def answering(path: Path, raw: bytes) -> Iterator[None]:
    """A server that answers one request with `raw`, whatever it was, and hangs up."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)

        def serve() -> None:
            with server.accept()[0] as client:
                client.recv(65536)
                client.sendall(raw)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(10)
