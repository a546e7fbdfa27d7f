"""The Kubernetes source reaching an API that listens in another network namespace, and a peer that vanishes there."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from waggle.kernel.netns import call_in_netns
from waggle.sources import apiserver
from waggle.sources.apiserver import Limits
from waggle.sources.informer import Timing
from waggle.sources.kubernetes import KubernetesSource
from waggle.store.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from standin_apiserver import SERVICES, StandInApi, service, until

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

ADDRESS = "192.0.2.1"
QUICK = Timing(backoff_least=0.01, backoff_most=0.1)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Namespaces:
    """Two namespaces joined by a veth pair: the API's at ADDRESS, the agent's beside it."""

    def __init__(self) -> None:
        self.api, self.agent = (f"wagtest-{os.getpid()}-{name}" for name in ("api", "agent"))

    def make(self) -> None:
        for name in (self.api, self.agent):
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "name",
            "eth0",
            "netns",
            self.api,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.agent,
        )
        for name, address in ((self.api, ADDRESS), (self.agent, "192.0.2.2")):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def remove(self) -> None:
        for name in (self.api, self.agent):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)

    @staticmethod
    def path(name: str) -> Path:
        return Path("/run/netns") / name


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    made = Namespaces()
    try:
        made.make()
        yield made
    finally:
        made.remove()


def listen(namespaces: Namespaces) -> socket.socket:
    return call_in_netns(namespaces.path(namespaces.api), lambda: socket.create_server((ADDRESS, 6443)))


@asynccontextmanager
async def source(
    directory: Path, netns: Path | None, limits: Limits | None = None
) -> AsyncIterator[tuple[KubernetesSource, Store]]:
    kubeconfig = directory / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": f"http://{ADDRESS}:6443"}}
    contexts = [{"name": "c", "context": {"cluster": "c"}}]
    kubeconfig.write_text(json.dumps({"current-context": "c", "clusters": [cluster], "contexts": contexts}))
    store = Store()
    made = KubernetesSource(store, kubeconfig, netns, timing=QUICK, limits=limits)
    task = asyncio.create_task(made.run())
    try:
        yield made, store
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gc.unfreeze()


async def test_the_api_is_reached_from_the_namespace(tmp_path: Path, namespaces: Namespaces) -> None:
    async with StandInApi(listening=listen(namespaces)) as api:
        api.put(SERVICES, service("web"))
        async with source(tmp_path, namespaces.path(namespaces.agent)) as (made, store):
            async with asyncio.timeout(5):
                await made.synced.wait()
            assert [key.name for key in store.services] == ["web"]
        async with source(tmp_path, None, Limits(connect=0.5)) as (made, _):
            await until(lambda: made.problems())
            assert not made.synced.is_set()


async def test_a_namespace_that_is_not_there(tmp_path: Path) -> None:
    async with source(tmp_path, Path("/run/netns/wagtest-nowhere")) as (made, _):
        await until(lambda: made.problems())
        assert "network namespace /run/netns/wagtest-nowhere does not exist" in str(made.problems()[0])


async def test_a_peer_that_vanished_is_found_by_tcp(
    tmp_path: Path, namespaces: Namespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No FIN, no RST, and a watch that may be silent for minutes: keep-alive finds out."""
    monkeypatch.setattr(apiserver, "_KEEPALIVE_IDLE", 1)
    monkeypatch.setattr(apiserver, "_KEEPALIVE_INTERVAL", 1)
    monkeypatch.setattr(apiserver, "_KEEPALIVE_PROBES", 2)
    async with (
        StandInApi(listening=listen(namespaces)) as api,
        source(tmp_path, namespaces.path(namespaces.agent), Limits(connect=0.5)) as (made, store),
    ):
        await until(lambda: api.watching(SERVICES) == 1)
        ip("-n", namespaces.api, "link", "set", "eth0", "down")
        await until(lambda: "cannot connect" in " ".join(map(str, made.problems())), 15)
        ip("-n", namespaces.api, "link", "set", "eth0", "up")
        api.put(SERVICES, service("web"))
        await until(lambda: [key.name for key in store.services] == ["web"], 15)
