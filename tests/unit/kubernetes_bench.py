"""A running Kubernetes source with its store, against the stand-in API: what the tests of lists and watches share."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from standin_apiserver import ALWAYS, StandInApi, until

from waggle.model.objects import ObjectKey
from waggle.sources.apiserver import Limits
from waggle.sources.informer import Timing
from waggle.sources.kubernetes import KubernetesSource
from waggle.store.store import Store

QUICK = Timing(
    chunk=3,
    watch_least=20,
    watch_most=30,
    idle=5,
    backoff_least=0.005,
    backoff_most=0.02,
    healthy=0.05,
    retry_after_most=0.3,
)
PATIENT = Limits(connect=2, head=2, read=2, whole=4)


class Bench:
    """A running source, its store and its API."""

    def __init__(self, api: StandInApi, store: Store, source: KubernetesSource) -> None:
        self.api, self.store, self.source = api, store, source
        self.nodes, self.services, self.slices = source.informers[:3]
        self.service_cidrs, self.policies, self.cluster_policies, self.node_policies = source.informers[3:]

    def key(self, name: str) -> ObjectKey:
        return ObjectKey("default", name)

    def reasons(self) -> str:
        return "\n".join(map(str, self.source.problems()))

    async def settled(self) -> None:
        """Synced, and all watches open."""
        async with asyncio.timeout(5):
            await self.source.synced.wait()
        await until(lambda: all(self.api.watching(path) for path in ALWAYS))


def write_kubeconfig(directory: Path, server: str, user: dict | None = None, cluster: dict | None = None) -> Path:
    path = directory / "kubeconfig"
    document = {
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": server, **(cluster or {})}}],
        "users": [{"name": "test", "user": user or {}}],
    }
    path.write_text(json.dumps(document))
    return path


@asynccontextmanager
async def running(
    kubeconfig: Path, api: StandInApi, timing: Timing = QUICK, limits: Limits = PATIENT
) -> AsyncIterator[Bench]:
    store = Store()
    source = KubernetesSource(store, kubeconfig, timing=timing, limits=limits)
    task = asyncio.create_task(source.run())
    try:
        yield Bench(api, store, source)
        if task.done():
            task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gc.unfreeze()


@pytest.fixture(name="api")
async def running_api() -> AsyncIterator[StandInApi]:
    async with StandInApi() as server:
        yield server


@pytest.fixture(name="kubeconfig")
def written_kubeconfig(tmp_path: Path, api: StandInApi) -> Path:
    return write_kubeconfig(tmp_path, api.url)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
