"""A stand-in for a Kubernetes API server with very many Services: enough of list and watch to time an agent with it.

It speaks HTTPS and gzips answers of 128 KiB and more at the fastest level, as kube-apiserver does, because both
cost the agent time. Answers to lists are made before the agent starts: what is timed is the agent, not this.

Run as a process of its own, `python -m bench.apiserver`. It prints "ready" when it listens, and then takes lines:

    NUMBER…  replace an endpoint of each of these Services, all at once; answers "NANOSECONDS ADDRESS,ADDRESS… …":
             CLOCK_MONOTONIC right before the events were handed to the sockets, and the endpoints that every one of
             the Services has now
    lists    make the lists again that changes have made stale; answers "done"
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from bench import objects

PAGE = 500  # what clients of Kubernetes ask for
_GZIP_FROM = 128 * 1024
_SERVICES = "/api/v1/services"
_SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
_NODES = "/api/v1/nodes"
_POLICIES = "/apis/networking.k8s.io/v1/networkpolicies"
_KINDS = {
    _SERVICES: ("Service", "v1"),
    _SLICES: ("EndpointSlice", "discovery.k8s.io/v1"),
    _NODES: ("Node", "v1"),
    _POLICIES: ("NetworkPolicy", "networking.k8s.io/v1"),
}
_NONE = (_NODES, _POLICIES)  # there are none of these


class Cluster:
    """The objects, and the lists of them as ready-made bytes."""

    def __init__(self, services: int, endpoints: int) -> None:
        self.version = 1000
        self._indices = {number: list(range(endpoints)) for number in range(services)}
        self._next = dict.fromkeys(range(services), endpoints)
        self._pages: dict[tuple[str, int, int], tuple[bytes, bytes | None]] = {}
        self.make_lists()

    def make_lists(self) -> None:
        """Have every page ready that a client will ask for."""
        for path in _KINDS:
            for start in range(0, max(1, self._count(path)), PAGE):
                self.page(path, start, PAGE)

    def page(self, path: str, start: int, limit: int) -> tuple[bytes, bytes | None]:
        """One chunk of a list: as it is, and gzipped where that is done."""
        found = self._pages.get((path, start, limit))
        if found is None:
            body = self._encode(path, start, limit)
            found = body, gzip.compress(body, 1) if len(body) >= _GZIP_FROM else None
            self._pages[path, start, limit] = found
        return found

    def change(self, number: int) -> tuple[bytes, list[str]]:
        """Replace the oldest endpoint of a Service: the watch event, and the addresses there are now."""
        indices = self._indices[number]
        indices.pop(0)
        indices.append(self._next[number])
        self._next[number] += 1
        self.version += 1
        self._pages = {key: page for key, page in self._pages.items() if key[0] != _SLICES}
        piece = objects.endpoint_slice(number, self.version, indices)
        kind, api_version = _KINDS[_SLICES]
        event = {"type": "MODIFIED", "object": {"kind": kind, "apiVersion": api_version, **piece}}
        return _json(event) + b"\n", [objects.endpoint_ip(number, index) for index in indices]

    def _count(self, path: str) -> int:
        return 0 if path in _NONE else len(self._indices)

    def _encode(self, path: str, start: int, limit: int) -> bytes:
        kind, api_version = _KINDS[path]
        make: Callable[[int], dict[str, Any]]
        if path == _SERVICES:
            make = lambda number: objects.service(number, self.version)  # noqa: E731
        else:
            make = lambda number: objects.endpoint_slice(number, self.version, self._indices[number])  # noqa: E731
        end = min(start + limit, self._count(path))
        metadata: dict[str, Any] = {"resourceVersion": str(self.version)}
        if end < self._count(path):
            metadata |= {"continue": str(end), "remainingItemCount": self._count(path) - end}
        items = [make(number) for number in range(start, end)]
        return _json({"kind": f"{kind}List", "apiVersion": api_version, "metadata": metadata, "items": items})


class Server:
    """Lists and watches of one Cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._watches: dict[str, set[web.StreamResponse]] = {path: set() for path in _KINDS}
        self._history: list[tuple[int, bytes]] = []  # (version, event) of every change of an EndpointSlice

    def application(self) -> web.Application:
        application = web.Application()
        for path in _KINDS:
            application.router.add_get(path, self._get)
        return application

    async def change(self, numbers: Sequence[int]) -> tuple[int, list[list[str]]]:
        """Send a change of each Service to every watch: (CLOCK_MONOTONIC before that, the endpoints of each now)."""
        events, endpoints = [], []
        for number in numbers:
            event, addresses = self.cluster.change(number)
            self._history.append((self.cluster.version, event))
            events.append(event)
            endpoints.append(addresses)
        watches = self._watches[_SLICES]
        together = b"".join(events)
        started = time.monotonic_ns()
        for watch in list(watches):
            try:
                await watch.write(together)
            except ConnectionError:  # the agent was killed
                watches.discard(watch)
        return started, endpoints

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if request.query.get("watch") in ("true", "1"):
            return await self._watch(request)
        start, limit = int(request.query.get("continue", 0)), int(request.query.get("limit", 0)) or 1 << 30
        plain, packed = self.cluster.page(request.path, start, limit)
        if packed is not None and "gzip" in request.headers.get("Accept-Encoding", ""):
            return web.Response(body=packed, content_type="application/json", headers={"Content-Encoding": "gzip"})
        return web.Response(body=plain, content_type="application/json")

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        watches = self._watches[request.path]
        seen = int(request.query.get("resourceVersion") or self.cluster.version)
        kind, api_version = _KINDS[request.path]
        try:
            if request.path == _SLICES:
                await response.write(b"".join(event for version, event in self._history if version > seen))
            watches.add(response)
            while True:
                await asyncio.sleep(60)
                bookmark = {"kind": kind, "apiVersion": api_version, "metadata": {}}
                bookmark["metadata"] = {"resourceVersion": str(self.cluster.version)}
                await response.write(_json({"type": "BOOKMARK", "object": bookmark}) + b"\n")
        except ConnectionError:  # the agent was killed
            return response
        finally:
            watches.discard(response)


async def serve(cluster: Cluster, port: int, certificate: Path) -> None:
    """Serve until standard input ends."""
    server = Server(cluster)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
    _say("ready")
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        if line.strip() == b"lists":
            cluster.make_lists()
            _say("done")
            continue
        started, endpoints = await server.change([int(number) for number in line.split()])
        _say(f"{started} {' '.join(','.join(addresses) for addresses in endpoints)}")
    await runner.cleanup()


def _say(text: str) -> None:
    print(text, flush=True)


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.apiserver")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--certificate", type=Path, required=True, help="PEM with certificate and key")
    parser.add_argument("--services", type=int, required=True)
    parser.add_argument("--endpoints", type=int, required=True)
    options = parser.parse_args()
    asyncio.run(serve(Cluster(options.services, options.endpoints), options.port, options.certificate))


if __name__ == "__main__":
    main()
