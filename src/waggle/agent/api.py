"""The agent's HTTP API: everything on the unix socket; /metrics, /healthz and /readyz also on the metrics address."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from waggle.agent.agent import Agent
from waggle.agent.telemetry import DatapathCollector
from waggle.config import split_host_port
from waggle.errors import ConfigError
from waggle.observe.names import frontend_text
from waggle.plan.services import view_service

MAX_LISTENER_BACKLOG = 10_000


class Api:
    """Serves one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._runners: list[web.AppRunner] = []
        agent.metrics.registry.register(DatapathCollector(agent))

    async def start(self) -> None:
        """Listens. ConfigError when an address cannot be taken."""
        config = self._agent.config
        private = web.Application(client_max_size=16 << 20)
        private.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
                web.get("/services", self._services),
                web.get("/endpoints", self._endpoints),
                web.get("/events", self._events),
                web.post("/cni", self._cni),
            ]
        )
        path = config.api_socket
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # left behind by an agent that was killed; the lock says that none is alive
        runner = await self._runner(private)
        old = os.umask(0o177)
        try:
            await web.UnixSite(runner, str(path)).start()
        except OSError as error:
            raise ConfigError(f"api-socket: cannot listen on {path}: {error.strerror or error}") from error
        finally:
            os.umask(old)
        if config.metrics_address:
            host, port = split_host_port(config.metrics_address)
            public = web.Application()
            public.add_routes(
                [
                    web.get("/healthz", self._healthz),
                    web.get("/readyz", self._readyz),
                    web.get("/metrics", self._metrics),
                ]
            )
            runner = await self._runner(public)
            try:
                await web.TCPSite(runner, host or None, port).start()
            except OSError as error:
                raise ConfigError(f"metrics-address: cannot listen on {config.metrics_address}: {error}") from error

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def stop(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    # -- handlers -----------------------------------------------------------------------------------------------

    async def _healthz(self, _request: web.Request) -> web.Response:
        """200 while the kernel can be programmed; an agent that waits for its sources is healthy."""
        error = self._agent.last_error
        return _json({"healthy": not error, "synced": self._agent.synced, "error": error}, 503 if error else 200)

    async def _readyz(self, _request: web.Request) -> web.Response:
        """200 once every source has given its first full view and the tables hold it."""
        return _json({"ready": self._agent.synced}, 200 if self._agent.synced else 503)

    async def _metrics(self, _request: web.Request) -> web.Response:
        body = generate_latest(self._agent.metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _status(self, _request: web.Request) -> web.Response:
        return _json(self._agent.status())

    async def _services(self, _request: web.Request) -> web.Response:
        store, names = self._agent.store, self._agent.names
        rows = []
        for number, (key, service) in enumerate(sorted(store.services.items())):
            if number % 500 == 499:
                await asyncio.sleep(0)
            ports = [
                {
                    "name": view.port.name,
                    "protocol": view.port.protocol,
                    "family": view.family.value,
                    "frontends": [
                        {
                            "type": f.kind.value,
                            "address": f.address,
                            "port": f.port,
                            "text": frontend_text(f.kind, f.address, f.port),
                        }
                        for f in view.frontends
                    ],
                    "backends": [
                        {"address": e.address, "port": e.port, "node": e.node, "name": names.address(e.address)}
                        for e in view.backends
                    ],
                    "endpoints": len(view.endpoints),
                }
                for view in view_service(store, key)
            ]
            rows.append(
                {
                    "namespace": key.namespace,
                    "name": key.name,
                    "type": service.spec.type,
                    "ports": ports,
                    "problem": self._agent.tables.problems.get(key),
                }
            )
        return _json(rows)

    async def _endpoints(self, _request: web.Request) -> web.Response:
        return _json(
            [
                {
                    "namespace": pod.namespace,
                    "name": pod.name,
                    "containerID": pod.container_id,
                    "addresses": [str(a) for a in pod.addresses],
                    "interface": pod.host_ifname,
                    "ifindex": pod.host_ifindex,
                    "mac": pod.pod_mac,
                    "netns": pod.netns,
                }
                for pod in sorted(self._agent.cni.pods(), key=lambda p: (p.namespace, p.name, p.container_id))
            ]
        )

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Events as JSON lines until the client goes away; a client that is too slow loses events and is told."""
        kind = request.query.get("kind", "")
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_LISTENER_BACKLOG)
        lost = 0

        def listener(event: dict[str, Any]) -> None:
            nonlocal lost
            if kind and event["kind"] != kind:
                return
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                lost += 1

        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        stop = self._agent.events.listen(listener)
        try:
            while True:
                event = await queue.get()
                if lost:
                    event["lost"], lost = lost, 0
                await response.write(msgspec.json.encode(event) + b"\n")
        except (ConnectionResetError, asyncio.CancelledError):
            return response
        finally:
            stop()

    async def _cni(self, request: web.Request) -> web.Response:
        begin = time.monotonic()
        body = await request.read()
        status, answer = await self._agent.cni.handle(body)
        command = body[:64].split(b"\0", 1)[0].removeprefix(b"CNI_COMMAND=").decode("ascii", "replace")
        if command not in ("ADD", "DEL", "CHECK", "GC", "STATUS"):
            command = "other"
        outcome = "ok" if status == 200 else "error"
        self._agent.metrics.cni_duration.labels(command, outcome).observe(time.monotonic() - begin)
        return web.Response(status=status, body=answer, content_type="application/json")


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
