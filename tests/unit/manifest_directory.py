"""A manifest source on a directory of real files, for tests.

`resync` is an hour unless a test is about it, so everything that is noticed was noticed through the kernel.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from waggle.model.objects import ObjectKey
from waggle.sources.manifests import ManifestSource
from waggle.store import Store

HOUR = 3600.0
GRACE = 0.1


def service(name: str = "web", address: str = "10.96.0.10", port: object = 80) -> str:
    return (
        f"apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n"
        f"spec:\n  clusterIP: {address}\n  ports:\n  - port: {port}\n"
    )


def put(path: Path, text: str) -> None:
    """Replaces a file the way careful programs do."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.rename(path)


class Watched:
    """A source on a directory, and what the store says."""

    def __init__(self, directory: Path, store: Store, source: ManifestSource) -> None:
        self.directory = directory
        self.store = store
        self.source = source

    def address(self, name: str = "web") -> str | None:
        found = self.store.services.get(ObjectKey("default", name))
        return found.spec.cluster_ip if found else None

    def names(self) -> set[str]:
        return {key.name for key in self.store.services}

    def reasons(self) -> list[str]:
        return [str(problem) for problem in self.source.problems()]

    async def until(self, condition: Callable[[], object], timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout} s: store {self.names()}, problems {self.reasons()}")
            await asyncio.sleep(0.005)

    async def stays(self, condition: Callable[[], object], seconds: float = 3 * GRACE) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert condition(), f"store {self.names()}, problems {self.reasons()}"
            await asyncio.sleep(0.005)

    async def settled(self) -> None:
        """Everything that happened before this call has been taken in."""
        marker = f"marker-{time.monotonic_ns()}"
        put(self.directory / f"{marker}.yaml", service(marker, "None"))
        await self.until(lambda: marker in self.names())
        (self.directory / f"{marker}.yaml").unlink()
        await self.until(lambda: marker not in self.names())


@asynccontextmanager
async def running(
    directory: Path, *, synced: bool = True, resync: float = HOUR, grace: float = GRACE
) -> AsyncIterator[Watched]:
    store = Store()
    source = ManifestSource(store, directory, grace=grace, resync=resync)
    task = asyncio.create_task(source.run())
    try:
        if synced:
            await asyncio.wait_for(source.synced.wait(), 20)
        yield Watched(directory, store, source)
    finally:
        if not task.cancel():
            task.result()  # it must not end by itself
        with pytest.raises(asyncio.CancelledError):
            await task
