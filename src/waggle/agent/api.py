"""The agent's HTTP API: everything on the unix socket; /metrics and what tells health also on the metrics address."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import math
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from waggle.agent.agent import Agent
from waggle.agent.node_policies import Confirmation
from waggle.agent.ssh_sessions import session_of
from waggle.agent.telemetry import DatapathCollector
from waggle.config import DEFAULT_SOCKET, split_host_port
from waggle.errors import ApiError, ConfigError, NotReady, WaggleError
from waggle.model.node_trace import NodeLook
from waggle.model.objects import ObjectKey
from waggle.model.policy import Side, Traffic
from waggle.model.service import Family
from waggle.model.why import why
from waggle.observe.flow_filter import parse_filter
from waggle.observe.names import frontend_text
from waggle.observe.policies import policy_rows
from waggle.observe.policy_names import name_rows
from waggle.observe.why import why_json
from waggle.plan.services import view_service

GONE_SECONDS = 1.0  # between two looks whether a client is still there


class Api:
    """Serves one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._runners: list[web.AppRunner] = []
        self._streams: set[asyncio.Task[object]] = set()  # answers that have no end of their own
        self._sockets: list[tuple[socket.socket, bool]] = []  # bound, and whether it is the private one
        agent.metrics.registry.register(DatapathCollector(agent))

    def bind(self) -> None:
        """Takes the addresses, before anything else of the node is touched. ConfigError when one cannot be taken."""
        config = self._agent.config
        try:
            self._sockets.append((_bind_unix(config.api_socket, config.api_group), True))
        except OSError as error:
            raise ConfigError(f"api-socket: cannot listen on {config.api_socket}: {error.strerror or error}") from error
        if config.metrics_address:
            try:
                for bound in _bind_tcp(*split_host_port(config.metrics_address)):
                    self._sockets.append((bound, False))
            except OSError as error:
                raise ConfigError(
                    f"metrics-address: cannot listen on {config.metrics_address}: {error.strerror or error}"
                ) from error

    async def start(self) -> None:
        """Listens; `bind` must have been called."""
        private = web.Application(client_max_size=16 << 20, middlewares=[_only_root_changes])
        private.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
                web.get("/services", self._services),
                web.get("/endpoints", self._endpoints),
                web.get("/policies", self._policies),
                web.get("/node-policies", self._node_policies),
                web.post("/node-policies/{what}", self._change_node_policies),
                web.get("/policy-names", self._policy_names),
                web.get("/why", self._why),
                web.get("/events", self._events),
                web.get("/events/{id}", self._event),
                web.post("/cni", self._cni),
                web.post("/doctor", self._doctor),
                web.post("/takeover", self._takeover),
            ]
        )
        public = web.Application()
        public.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/livez", self._livez),
                web.get("/readyz", self._readyz),
                web.get("/metrics", self._metrics),
            ]
        )
        runners = {True: await self._runner(private), False: await self._runner(public)}
        for bound, is_private in self._sockets:
            try:
                await web.SockSite(runners[is_private], bound).start()
            except OSError as error:  # somebody else was bound too, and listened first
                raise ConfigError(f"cannot listen on {bound.getsockname()}: {error.strerror or error}") from error

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def stop(self) -> None:
        """Ends what never ends by itself, lets other requests finish, and listens no more."""
        for stream in self._streams:
            stream.cancel()
        for runner in self._runners:
            await runner.cleanup()
        for bound, _ in self._sockets:
            bound.close()

    # -- handlers -----------------------------------------------------------------------------------------------

    async def _healthz(self, _request: web.Request) -> web.Response:
        """200 while new connections should come by this node: no change waits too long to be in the tables, and the
        node stays. An agent that waits for its sources is healthy, and so is one that has nothing to do."""
        answer = health_answer(self._agent, time.time())
        eligible = not self._agent.is_leaving
        return self._health("/healthz", {**answer, "nodeEligible": eligible}, answer["healthy"] and eligible)

    async def _livez(self, _request: web.Request) -> web.Response:
        """As /healthz, whatever becomes of the node: 503 is a reason to start the agent again."""
        answer = health_answer(self._agent, time.time())
        return self._health("/livez", answer, answer["healthy"])

    def _health(self, path: str, answer: dict[str, Any], healthy: bool) -> web.Response:
        status = 200 if healthy else 503
        self._agent.metrics.health_requests.labels(path, status).inc()
        return _json(answer, status)

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
                for view in view_service(store, key, self._agent.context)
            ]
            rows.append(
                {
                    "namespace": key.namespace,
                    "name": key.name,
                    "type": service.spec.type,
                    "ports": ports,
                    "healthCheck": self._health_check(key),
                    "problem": self._agent.tables.problems.get(key),
                }
            )
        return _json(rows)

    def _health_check(self, key: ObjectKey) -> dict[str, Any] | None:
        """The health port of a Service and what it answers in each family, or None."""
        counts = self._agent.health.counts(key)
        if not counts:
            return None
        port = self._agent.store.services[key].spec.health_check_node_port
        return {"port": port, "localEndpoints": {f"IPv{family}": count for family, count in counts.items()}}

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
                    "netns": str(pod.netns),
                    "hostPorts": [
                        {
                            "protocol": p.protocol,
                            "hostPort": p.port,
                            "hostIP": p.host_ip,
                            "containerPort": p.container_port,
                        }
                        for p in pod.host_ports
                    ],
                }
                for pod in sorted(self._agent.cni.pods(), key=lambda p: (p.namespace, p.name, p.container_id))
            ]
        )

    async def _policies(self, _request: web.Request) -> web.Response:
        agent = self._agent
        rows = []
        found = policy_rows(agent.store, agent.config.node_name, lambda kind, one: agent.place_of(kind, one.key))
        for number, row in enumerate(found):
            if number % 100 == 99:
                await asyncio.sleep(0)
            rows.append(row)
        return _json(rows)

    async def _policy_names(self, _request: web.Request) -> web.Response:
        agent = self._agent
        found = await asyncio.to_thread(agent.learned_names)
        return _json(list(name_rows(found, agent.cni.pods(), agent.policies.planner.tables.patterns)))

    async def _why(self, request: web.Request) -> web.Response:
        """What happens to a packet and why, from the objects that are known now."""
        agent, query = self._agent, request.query
        family = {"4": Family.IPV4, "6": Family.IPV6}.get(query.get("family", ""))
        asked = (query.get("source", ""), query.get("destination", ""), query.get("protocol", ""), family)
        try:
            answer = await asyncio.to_thread(why, agent.situation(), *asked)
        except ConfigError as error:
            return web.Response(status=400, text=str(error))

        def place(kind: str, key: ObjectKey, _: object) -> tuple[str | None, int | None]:
            origin, line = agent.place_of(kind, key)
            return (origin.removeprefix("file:"), line) if origin.startswith("file:") else (None, None)

        def in_force(side: Side | NodeLook, traffic: Traffic) -> dict[str, Any] | None:
            found = agent.policies.in_force(side, traffic)
            return None if found is None else found._asdict()

        return _json(await asyncio.to_thread(why_json, answer, place, in_force))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Events as JSON lines. The query holds the questions of waggle.observe.flow_filter, each as often as it has
        answers; since=SECONDS and last=N for those that are remembered, and follow=1 for those that come, until the
        client goes away. 400 says which question or number is wrong."""
        asked = {name: request.query.getall(name) for name in request.query}
        numbers: dict[str, str] = {name: asked.pop(name)[-1] for name in ("since", "last", "follow") if name in asked}
        try:
            wanted = parse_filter(asked)
            since = _number("since", numbers)
            last = _number("last", numbers)
        except ValueError as error:
            return web.Response(status=400, text=str(error))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        watcher = asyncio.create_task(_cancel_when_gone(task, request))
        events = self._agent.flows.show(
            wanted, since=since, last=None if last is None else int(last), follow=numbers.get("follow") == "1"
        )
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    await response.write(msgspec.json.encode(event) + b"\n")
        except (ConnectionResetError, asyncio.CancelledError):
            return response
        finally:
            watcher.cancel()
            self._streams.discard(task)
        return response

    async def _event(self, request: web.Request) -> web.Response:
        """One event by its id. 404 where it is not remembered."""
        identity = request.match_info["id"]
        found = self._agent.flows.find(identity)
        if found is None:
            text = f"no event {identity}: the setting flow-history says how much is remembered, until the agent ends"
            return web.Response(status=404, text=text)
        return _json(found)

    async def _node_policies(self, _request: web.Request) -> web.Response:
        """NodePolicies that are about this node, and what is on trial."""
        agent = self._agent
        rows = agent.node_policies.rows(lambda key: agent.place_of("NodePolicy", key))
        return _json({"policies": rows, **agent.node_policies.status()})

    async def _change_node_policies(self, request: web.Request) -> web.Response:
        """Confirms, reverts or retries what is on trial; `name` may be there several times."""
        node, names = self._agent.node_policies, request.query.getall("name", [])
        try:
            match request.match_info["what"]:
                case "confirm":
                    session = await asyncio.to_thread(session_of, _peer_pid(request))
                    by = Confirmation(session, request.query.get("local") == "1", request.query.get("force") == "1")
                    return _json(await node.confirm(names, by))
                case "revert":
                    return _json(await node.revert(names))
                case "retry":
                    return _json(await node.retry())
        except NotReady as error:
            return web.Response(status=503, text=str(error))
        except ApiError as error:
            return web.Response(status=error.status or 500, text=str(error))
        except WaggleError as error:
            return web.Response(status=500, text=str(error))
        return web.Response(status=404, text="confirm, revert or retry")

    async def _takeover(self, _request: web.Request) -> web.Response:
        """Takes over established flows of another proxy. 503 before the first sync."""
        if not self._agent.synced:
            return web.Response(status=503, text=f"not in sync yet: {'; '.join(map(str, self._agent.problems()))}")
        return _json({"flows": await asyncio.to_thread(self._agent.proxy.take_over)})

    async def _doctor(self, request: web.Request) -> web.Response:
        """Checks the maps now, and repairs them unless the query says dry-run=1. 503 before the first sync."""
        doctor = self._agent.doctor
        before = [
            {"time": when, "table": d.table, "subject": d.subject, "entry": d.entry, "problem": d.problem}
            for when, d in doctor.earlier
        ]
        try:
            report = await doctor.check(repair=request.query.get("dry-run", "") != "1")
        except NotReady as error:
            return web.Response(status=503, text=str(error))
        return _json(report.as_json() | {"earlier": before})

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


def health_answer(agent: Agent, now: float) -> dict[str, Any]:
    """What /healthz and /livez say of the programming, in kube-proxy's names and more: while all is well,
    `lastUpdated` is now."""
    healthy = not agent.overdue
    updated = now if healthy else agent.last_updated
    family = {"lastUpdated": rfc3339(updated), "healthy": healthy}
    return {
        "lastUpdated": rfc3339(updated),
        "currentTime": rfc3339(now),
        "healthy": healthy,
        "synced": agent.synced,
        "error": agent.last_error,
        "status": {"IPv4": family, "IPv6": family},  # one pass writes both
    }


async def _cancel_when_gone(task: asyncio.Task[object], request: web.Request) -> None:
    """Ends an answer whose client has hung up: where nothing is written, nobody else would notice."""
    while True:
        await asyncio.sleep(GONE_SECONDS)
        transport = request.transport
        if transport is None or transport.is_closing():
            task.cancel()
            return


def _number(name: str, given: Mapping[str, str]) -> float | None:
    """ValueError names what is no number."""
    if name not in given:
        return None
    try:
        number = float(given[name])
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: {given[name]!r} is not a number from 0 on")
    return number


def rfc3339(seconds: float) -> str:
    """ "2026-03-01T12:00:00.123456Z" """
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


@web.middleware
async def _only_root_changes(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """The group that may use the socket may look: what changes the node is for root."""
    if request.method != "GET":
        peer = request.transport.get_extra_info("socket") if request.transport else None
        if peer is None or struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] != 0:
            return web.Response(status=403, text="only root may do this")
    return await handler(request)


def _peer_pid(request: web.Request) -> int:
    """The process at the other end of the unix socket; 0 where it cannot be seen from here."""
    peer = request.transport.get_extra_info("socket") if request.transport else None
    if peer is None:
        return 0
    pid: int = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def _bind_unix(path: Path, group: str) -> socket.socket:
    """A socket for root and, where there is one, a group; so is its directory, if that is waggle's own."""
    try:
        owner = grp.getgrnam(group).gr_gid if group else 0
    except KeyError as error:
        raise ConfigError(f"api-group: there is no group {group!r}: groupadd --system {group}") from error
    ours = path.parent == DEFAULT_SOCKET.parent or not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    if ours:
        os.chown(path.parent, 0, owner)
        path.parent.chmod(0o750 if group else 0o700)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()  # left behind by an agent that was killed; the lock says that none is alive
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)
    try:
        bound.bind(str(path))
        if group:  # the owner first: for no moment may another group use it
            os.chown(path, 0, owner)
            path.chmod(0o660)
    except OSError:
        bound.close()
        raise
    finally:
        os.umask(old)
    return bound


def _bind_tcp(host: str, port: int) -> list[socket.socket]:
    """One socket per address that the host has; without a host, one per family."""
    found = []
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        bound = socket.socket(family, kind, protocol)
        found.append(bound)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            bound.bind(address)
        except OSError:
            for one in found:
                one.close()
            raise
    return found
