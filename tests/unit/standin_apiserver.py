"""A stand-in for kube-apiserver: list and watch of plain JSON objects, and every way in which they can go wrong.

`objects` are dicts by (path, namespace/name); writing through `put` and `delete` numbers them and feeds the watches.
Faults are put in line with `fault(path, handler)`: each request of that path takes the next one instead of an answer.
"""

from __future__ import annotations

import asyncio
import copy
import json
import socket
import ssl
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable

from aiohttp import web

SERVICES = "/api/v1/services"
NODES = "/api/v1/nodes"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
SERVICE_CIDRS = "/apis/networking.k8s.io/v1/servicecidrs"
NETWORK_POLICIES = "/apis/networking.k8s.io/v1/networkpolicies"
CLUSTER_NETWORK_POLICIES = "/apis/policy.networking.k8s.io/v1beta1/clusternetworkpolicies"
NODE_POLICIES = "/apis/waggle.io/v1alpha1/nodepolicies"
NAMESPACES = "/api/v1/namespaces"
PODS = "/api/v1/pods"
#: What is followed while there is no policy.
ALWAYS = (NODES, SERVICES, SLICES, SERVICE_CIDRS, NETWORK_POLICIES, CLUSTER_NETWORK_POLICIES, NODE_POLICIES)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class StandInApi:
    """Use as an async context manager; listens on a free port of the loopback, or on the socket `listening`."""

    def __init__(self, tls: ssl.SSLContext | None = None, listening: socket.socket | None = None) -> None:
        self.version = 100
        self.compacted = 0  # watches and lists from before this are gone
        self.token: str | None = None  # when set, requests need it
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self._tls = tls
        self._listening = listening
        self._objects: dict[str, dict[str, dict]] = {path: {} for path in (*ALWAYS, NAMESPACES, PODS)}
        self._history: list[tuple[int, str, dict]] = []  # version, path, event
        self._snapshots: dict[str, tuple[str, list[dict], int]] = {}  # continue token → path, rest, version
        self._faults: dict[str, deque[Handler]] = defaultdict(deque)
        self._watches: dict[str, list[web.StreamResponse]] = defaultdict(list)
        self._ended: dict[web.StreamResponse, asyncio.Event] = {}
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> StandInApi:
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the port it had before if it ran before."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        site: web.BaseSite
        if self._listening is not None:
            site = web.SockSite(self._runner, self._listening)
        else:
            site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._tls, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Close everything, as a server that is killed does."""
        if self._runner is None:
            return
        self.break_watches()
        runner, self._runner = self._runner, None
        await runner.cleanup()

    # -- the cluster's objects ----------------------------------------------------------------------------------

    def put(self, path: str, obj: dict) -> None:
        """Create or change an object; its resourceVersion is the new version of everything."""
        kind, obj = self._put(path, obj)
        self._emit(path, kind, obj)

    def delete(self, path: str, namespace: str, name: str) -> None:
        """Delete an object."""
        self._emit(path, "DELETED", self._delete(path, f"{namespace}/{name}"))

    def put_silently(self, path: str, obj: dict) -> None:
        """Change an object while no watch hears it, in a version that watches cannot resume across."""
        self._put(path, obj)
        self.compact()

    def delete_silently(self, path: str, namespace: str, name: str) -> None:
        """As `put_silently`, for a deletion."""
        self._delete(path, f"{namespace}/{name}")
        self.compact()

    def _put(self, path: str, obj: dict) -> tuple[str, dict]:
        self.version += 1
        obj = copy.deepcopy(obj)
        meta = obj["metadata"]
        meta["resourceVersion"] = str(self.version)
        key = f"{meta.get('namespace', '')}/{meta['name']}"
        kind = "MODIFIED" if key in self._objects[path] else "ADDED"
        self._objects[path][key] = obj
        return kind, obj

    def _delete(self, path: str, key: str) -> dict:
        self.version += 1
        obj = self._objects[path].pop(key)
        obj["metadata"]["resourceVersion"] = str(self.version)
        return obj

    def compact(self) -> None:
        """Forget history: continue tokens and watches from before now are gone."""
        self.compacted = self.version
        self._history.clear()
        self._snapshots = {token: (path, [], -1) for token, (path, _, _) in self._snapshots.items()}

    def restore(self, version: int) -> None:
        """As if etcd were restored from a backup: what happened since is forgotten, numbers go back."""
        self.version, self.compacted = version, 0
        self._history.clear()

    # -- what a test does to watches ----------------------------------------------------------------------------

    def without(self, path: str) -> None:
        """An API that does not know `path`."""
        del self._objects[path]

    def with_again(self, path: str) -> None:
        self._objects[path] = {}

    def watching(self, path: str) -> int:
        """How many watches of `path` are open."""
        return len(self._watches[path])

    def send(self, path: str, data: bytes) -> None:
        """Bytes as they are, to every open watch of `path`."""
        for response in self._watches[path]:
            response._payload_writer.transport.write(b"%x\r\n%s\r\n" % (len(data), data))

    def bookmark(self, path: str) -> None:
        """A bookmark of the current version."""
        self.send(path, event_line("BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}}))

    def end_watches(self, path: str) -> None:
        """End watches in an orderly way, as at timeoutSeconds."""
        for response in self._watches[path]:
            self._ended[response].set()

    def break_watches(self, path: str | None = None) -> None:
        """Cut the connections of watches."""
        for watched, responses in self._watches.items():
            for response in responses if path in (None, watched) else ():
                response._payload_writer.transport.abort()
                self._ended[response].set()

    def fault(self, path: str, *handlers: Handler) -> None:
        """Let the next requests of `path` be answered by these, one each."""
        self._faults[path].extend(handlers)

    def queries(self, path: str, *, watch: bool | None = None) -> list[dict[str, str]]:
        """The parameters of the requests so far."""
        return [q for p, q in self.requests if p == path and watch in (None, "watch" in q)]

    # -- serving ------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        path, query = request.path, dict(request.query)
        self.requests.append((path, query))
        self.headers.append(dict(request.headers))
        if self.token is not None and request.headers.get("Authorization") != f"Bearer {self.token}":
            return status(401, "Unauthorized")
        if self._faults[path]:
            return await self._faults[path].popleft()(request)
        if path not in self._objects:
            return status(404, "the server could not find the requested resource")
        if query.get("watch"):
            return await self._watch(request, path, query)
        return self._list(path, query)

    def _list(self, path: str, query: dict[str, str]) -> web.Response:
        limit = int(query.get("limit", 0)) or 1 << 30
        if token := query.get("continue"):
            _, items, version = self._snapshots.pop(token, (path, [], -1))
            if version < 0:
                return status(410, "The provided continue parameter is too old", reason="Expired")
        else:
            items, version = [self._objects[path][key] for key in sorted(self._objects[path])], self.version
        meta = {"resourceVersion": str(version)}
        if len(items) > limit:
            meta["continue"] = f"token-{len(self.requests)}"
            meta["remainingItemCount"] = len(items) - limit
            self._snapshots[meta["continue"]] = (path, copy.deepcopy(items[limit:]), version)
        return web.json_response({"kind": "List", "apiVersion": "v1", "metadata": meta, "items": items[:limit]})

    async def _watch(self, request: web.Request, path: str, query: dict[str, str]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        since = int(query["resourceVersion"])
        if since < self.compacted:
            gone = {"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"}
            await response.write(event_line("ERROR", gone))
            return response
        for version, changed, event in list(self._history):
            if changed == path and version > since:
                await response.write(event_line(event["type"], event["object"]))
        ended = self._ended[response] = asyncio.Event()
        self._watches[path].append(response)
        try:
            async with asyncio.timeout(float(query.get("timeoutSeconds", 60))):
                await ended.wait()
        except TimeoutError:
            return response  # the orderly end
        finally:
            self._watches[path].remove(response)
            del self._ended[response]
        return response

    def _emit(self, path: str, kind: str, obj: dict) -> None:
        event = {"type": kind, "object": copy.deepcopy(obj)}
        self._history.append((self.version, path, event))
        self.send(path, event_line(kind, event["object"]))


def event_line(kind: str, obj: dict) -> bytes:
    """A watch event as it goes over the wire."""
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def status(code: int, message: str, reason: str = "", headers: dict[str, str] | None = None) -> web.Response:
    """A metav1.Status answer."""
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": message}
    return web.json_response({**body, "reason": reason}, status=code, headers=headers)


# -- faults -------------------------------------------------------------------------------------------------------


def answers(code: int, message: str, headers: dict[str, str] | None = None) -> Handler:
    """An error answer."""

    async def handle(_request: web.Request) -> web.StreamResponse:
        return status(code, message, headers=headers)

    return handle


def answers_text(text: str, code: int = 200) -> Handler:
    """An answer that is not JSON."""

    async def handle(_request: web.Request) -> web.StreamResponse:
        return web.Response(text=text, status=code)

    return handle


async def hangs_up(request: web.Request) -> web.StreamResponse:
    """Close the connection without an answer."""
    request.transport.abort()
    return web.Response()


async def says_nothing(_request: web.Request) -> web.StreamResponse:
    """Accept the request and never answer: what a half-open connection looks like."""
    await asyncio.Event().wait()
    raise AssertionError


async def stalls_after_head(request: web.Request) -> web.StreamResponse:
    """Answer with a head and then nothing more."""
    response = web.StreamResponse()
    response.enable_chunked_encoding()
    await response.prepare(request)
    await asyncio.Event().wait()
    raise AssertionError


async def breaks_in_the_body(request: web.Request) -> web.StreamResponse:
    """Announce more than is sent."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"metadata": {"resourceVersion": "5"}, "items": [')
    request.transport.abort()
    return response


async def sends_garbage(request: web.Request) -> web.StreamResponse:
    """Bytes that are no HTTP."""
    request.transport.write(b"\x16\x03\x01\x00\xa5SSH-2.0-OpenSSH\r\n\x00\xff\r\n\r\n")
    await asyncio.sleep(0)
    request.transport.close()
    return web.Response()


# -- objects ------------------------------------------------------------------------------------------------------


def service(name: str, cluster_ip: str = "10.96.0.1", namespace: str = "default", port: int = 80) -> dict:
    """A Service as the API sends it, managedFields and all."""
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{name}",
            "labels": {"app": name},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{" + "x" * 200 + "}"},
            "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {"f:ports": {}}}}],
        },
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ip,
            "clusterIPs": [cluster_ip],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": port, "protocol": "TCP", "targetPort": 8080}],
            "selector": {"app": name},
        },
        "status": {"loadBalancer": {}},
    }


def endpoint_slice(name: str, addresses: list[str], namespace: str = "default", of: str | None = None) -> dict:
    """An EndpointSlice with one ready endpoint for each address."""
    conditions = {"ready": True, "serving": True, "terminating": False}
    return {
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": of or name}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": [address], "conditions": conditions, "nodeName": "node-number-one", "zone": "zone-a"}
            for address in addresses
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def service_cidr(name: str, *cidrs: str) -> dict:
    return {"metadata": {"name": name, "uid": f"uid-{name}"}, "spec": {"cidrs": list(cidrs)}}


def namespace(name: str, **labels: str) -> dict:
    return {"metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name, **labels}}}


def network_policy(name: str, namespace: str = "default", cidr: str = "10.0.0.0/8", audit: str = "") -> dict:
    """A NetworkPolicy for the pods of app web, who may be reached from `cidr`."""
    annotations = {"kubectl.kubernetes.io/last-applied-configuration": "{}"}
    if audit:
        annotations["waggle.io/audit"] = audit
    return {
        "metadata": {"name": name, "namespace": namespace, "uid": f"uid-{name}", "annotations": annotations},
        "spec": {
            "podSelector": {"matchLabels": {"app": "web"}},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"ipBlock": {"cidr": cidr, "except": ["10.1.0.0/16"]}}], "ports": [{"port": 80}]}],
        },
    }


def cluster_network_policy(name: str, priority: int = 10, network: str = "10.0.0.0/8") -> dict:
    return {
        "metadata": {"name": name, "uid": f"uid-{name}"},
        "spec": {
            "tier": "Admin",
            "priority": priority,
            "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [{"networks": [network]}]}],
        },
    }


def node_policy(name: str, network: str = "10.0.0.0/8") -> dict:
    return {
        "metadata": {"name": name, "uid": f"uid-{name}"},
        "spec": {"policyTypes": ["Ingress"], "ingress": [{"from": [{"ipBlock": {"cidr": network}}]}]},
    }


def pod(name: str, address: str, namespace: str = "default", node: str = "node1", **labels: str) -> dict:
    """A running Pod as the API sends it, with much that nobody here reads."""
    return {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": f"uid-{name}",
            "labels": {"app": "web", **labels},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{" + "x" * 200 + "}"},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {"f:podIPs": {}}}}],
        },
        "spec": {
            "nodeName": node,
            "containers": [
                {
                    "name": "web",
                    "image": "registry.example/web:1",
                    "command": ["/web", "--verbose"],
                    "env": [{"name": "SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                    "ports": [
                        {"name": "http", "containerPort": 8080, "protocol": "TCP", "hostPort": 80},
                        {"containerPort": 9090, "protocol": "TCP"},
                    ],
                },
            ],
            "initContainers": [
                {"name": "once", "ports": [{"name": "once", "containerPort": 1, "protocol": "TCP"}]},
                {
                    "name": "proxy",
                    "restartPolicy": "Always",
                    "ports": [{"name": "proxy", "containerPort": 15001, "protocol": "TCP"}],
                },
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def node(name: str, address: str = "10.0.0.1") -> dict:
    """A Node."""
    return {
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": "zone-a"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    }


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait for something to become true; fails the test when it does not."""
    for _ in range(round(seconds / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    assert condition()
