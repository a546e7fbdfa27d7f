"""Sections 1, 2 and 7 of semantics.md, line by line, through the whole of model and plan.

A case is a line, objects as Kubernetes has them, and what the tables must hold for them on node1 in zone-a: frontend to
backends, or "reject" or "drop" where there is none. A frontend at which the wire is answered differently has a second
entry, "… from outside". Steps after the first change what is there. Lines whose proof needs more than objects are in
ELSEWHERE, with the test that proves them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from waggle.abi._generated import BACKEND_SIZE, Backend, Scope, ServiceFlag, ServiceKey
from waggle.abi.address import host_port, protocol_name, unpack_address
from waggle.model.choice import NodeFacts
from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_NAME_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    EndpointSlice,
    Node,
    Object,
    ObjectKey,
    Pod,
    Service,
    kind_of,
)
from waggle.model.service import open_families
from waggle.plan.services import PlanContext, plan_service
from waggle.store import Store

HERE = PlanContext(NodeFacts("node1", "zone-a"), frozenset({"192.0.2.1", "2001:db8::1"}))
VIP4, VIP6 = "10.96.0.1", "fd00:96::1"


def service(*ports: dict[str, Any], name: str = "web", labels: dict[str, str] | None = None, **spec: Any) -> Service:
    """With a port 80 and both cluster addresses, where nothing else is said. `ingress` is the load balancer's."""
    ingress = spec.pop("ingress", None)
    spec = {"clusterIPs": [VIP4, VIP6]} | spec
    document = {
        "metadata": {"name": name, "namespace": "default", "labels": labels},
        "spec": {"ports": list(ports) or [{"name": "http", "port": 80, "protocol": "TCP"}], **spec},
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    return msgspec.convert(document, Service)


def end(address: str, node: str | None = "node1", **more: Any) -> dict[str, Any]:
    """An endpoint. `ready`, `serving`, `terminating`; `zones` and `nodes` are hints."""
    hints = {
        "forZones": [{"name": name} for name in more.pop("zones", ())],
        "forNodes": [{"name": name} for name in more.pop("nodes", ())],
    }
    return {"addresses": [address, "10.9.9.9"], "nodeName": node, "hints": hints, "conditions": more}


def piece(
    *ends: dict[str, Any],
    name: str = "web-1",
    family: str = "IPv4",
    of: str | None = "web",
    ports: Iterable[dict[str, Any]] = ({"name": "http", "port": 8080},),
    **labels: str,
) -> EndpointSlice:
    every = labels | ({SERVICE_NAME_LABEL: of} if of else {})
    document = {
        "metadata": {"name": name, "namespace": "default", "labels": every},
        "addressType": family,
        "endpoints": list(ends),
        "ports": list(ports),
    }
    return msgspec.convert(document, EndpointSlice)


def pod(
    name: str, address: str, *, ready: bool = True, deleted: bool = False, ports: list[dict[str, Any]] | None = None
) -> Pod:
    document = {
        "metadata": {"name": name, "namespace": "default", "labels": {"app": "web"}}
        | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleted else {}),
        "spec": {"nodeName": "node1", "containers": [{"name": "main", "ports": ports or []}]},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }
    return msgspec.convert(document, Pod)


def node(name: str, zone: str) -> Node:
    return msgspec.convert({"metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}}, Node)


class Gone(NamedTuple):
    """A step that takes an object away."""

    kind: str
    name: str


Step = tuple[list[Object | Gone], dict[str, str]]


def served(store: Store) -> dict[str, str]:
    """What the tables hold for everything in the store."""
    found: dict[str, str] = {}
    for key in store.services:
        for row in plan_service(store, key, HERE):
            records = [row.backends[at : at + BACKEND_SIZE] for at in range(0, len(row.backends), BACKEND_SIZE)]
            for raw, settings in zip(row.keys, row.settings, strict=True):
                entry = ServiceKey.unpack(raw)
                text = f"{protocol_name(entry.proto)} {host_port(unpack_address(entry.addr), entry.port)}"
                if entry.scope == Scope.EXTERNAL:
                    text += " from outside"
                new = [Backend.unpack(record) for record in records[: len(records) - settings.draining]]
                nothing = "drop" if settings.flags & ServiceFlag.EMPTY_DROP else "reject"
                ends = " ".join(host_port(unpack_address(b.addr), b.port) for b in new) or nothing
                assert text not in found
                found[text] = ends
    return found


def both(ends4: str, ends6: str = "reject") -> dict[str, str]:
    """The cluster addresses of `service()`."""
    return {f"TCP {VIP4}:80": ends4, f"TCP [{VIP6}]:80": ends6}


V4 = {"clusterIPs": [VIP4]}
ONE = piece(end("10.0.0.1"))
HTTP = {"name": "http", "port": 80, "protocol": "TCP"}
BALANCED = {"type": "LoadBalancer", **V4}

SECTION_1: list[tuple[str, list[Step]]] = [
    (
        "the service-proxy-name label takes a Service away, and gives it back, at run time",
        [
            ([service(), ONE], both("10.0.0.1:8080")),
            ([service(labels={SERVICE_PROXY_NAME_LABEL: "other"})], {}),
            ([service()], both("10.0.0.1:8080")),
        ],
    ),
    (
        "the headless label on a slice takes its endpoints away, and gives them back, at run time",
        [
            ([service(**V4), ONE], {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
            ([piece(end("10.0.0.1"), **{HEADLESS_LABEL: ""})], {"TCP 10.96.0.1:80": "reject"}),
            ([ONE], {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
        ],
    ),
    ("clusterIP None is skipped", [([service(clusterIPs=["None"], clusterIP="None"), ONE], {})]),
    (
        "type ExternalName is skipped, even with a ClusterIP; the type may change to and fro",
        [
            ([service(type="ExternalName", **V4), ONE], {}),
            ([service(**V4)], {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
            (
                [service({**HTTP, "nodePort": 30080}, type="NodePort", **V4)],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080", "TCP 0.0.0.0:30080": "10.0.0.1:8080"},
            ),
            ([service(type="ExternalName", **V4)], {}),
        ],
    ),
    (
        "an empty ClusterIP has no frontend; a node port without one is served, for nodes without an apiserver",
        [
            ([service(clusterIPs=[], clusterIP=""), ONE], {}),
            (
                [service({**HTTP, "nodePort": 30080}, type="NodePort", clusterIPs=[], clusterIP="")],
                {"TCP 0.0.0.0:30080": "10.0.0.1:8080", "TCP [::]:30080": "reject"},
            ),
        ],
    ),
    (
        "a slice belongs to the Service that its label names; without the label it is ignored",
        [
            ([service(**V4), piece(end("10.0.0.1"), of=None)], {"TCP 10.96.0.1:80": "reject"}),
            ([piece(end("10.0.0.1"), of="other")], {"TCP 10.96.0.1:80": "reject"}),
            ([ONE], {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
            ([Gone("EndpointSlice", "web-1")], {"TCP 10.96.0.1:80": "reject"}),
        ],
    ),
    (
        "one family at a time: the ClusterIP of the family, slices of its addressType",
        [
            ([service(), ONE], both("10.0.0.1:8080")),
            ([piece(end("fd00::1"), name="web-6", family="IPv6")], both("10.0.0.1:8080", "[fd00::1]:8080")),
            ([piece(end("web.example"), name="web-7", family="FQDN")], both("10.0.0.1:8080", "[fd00::1]:8080")),
        ],
    ),
    (
        "external and load balancer addresses by family",
        [
            (
                [
                    service(
                        **BALANCED,
                        externalIPs=["203.0.113.5", "2001:db8:113::5"],
                        ingress=[{"ip": "198.51.100.1"}, {"ip": "2001:db8:100::1"}],
                    ),
                    ONE,
                ],
                {f"TCP {a}:80": "10.0.0.1:8080" for a in (VIP4, "203.0.113.5", "198.51.100.1")},
            ),
        ],
    ),
    (
        "load balancer ingress only with an ip, and ipMode nil or VIP",
        [
            (
                [
                    service(
                        **BALANCED,
                        ingress=[
                            {"ip": "198.51.100.1"},
                            {"ip": "198.51.100.2", "ipMode": "VIP"},
                            {"ip": "198.51.100.3", "ipMode": "Proxy"},
                            {"hostname": "lb.example"},
                        ],
                    ),
                    ONE,
                ],
                {f"TCP {a}:80": "10.0.0.1:8080" for a in (VIP4, "198.51.100.1", "198.51.100.2")},
            ),
            # a Service that is no longer a LoadBalancer has no such addresses, whatever its status says
            (
                [service(**V4, ingress=[{"ip": "198.51.100.1"}])],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080"},
            ),
        ],
    ),
    (
        "whatever loadBalancerClass is, what the load balancer answered counts",
        [
            (
                [service(**BALANCED, loadBalancerClass="example.com/lb", ingress=[{"ip": "198.51.100.1"}]), ONE],
                {f"TCP {a}:80": "10.0.0.1:8080" for a in (VIP4, "198.51.100.1")},
            )
        ],
    ),
    (
        "allocateLoadBalancerNodePorts: with and without node ports, live",
        [
            (
                [service(**BALANCED, allocateLoadBalancerNodePorts=False, ingress=[{"ip": "198.51.100.1"}]), ONE],
                {f"TCP {a}:80": "10.0.0.1:8080" for a in (VIP4, "198.51.100.1")},
            ),
            (
                [service({**HTTP, "nodePort": 30080}, **BALANCED, ingress=[{"ip": "198.51.100.1"}])],
                {f"TCP {a}": "10.0.0.1:8080" for a in ("10.96.0.1:80", "198.51.100.1:80", "0.0.0.0:30080")},
            ),
            (
                [service(**BALANCED, ingress=[{"ip": "198.51.100.1"}])],
                {f"TCP {a}:80": "10.0.0.1:8080" for a in (VIP4, "198.51.100.1")},
            ),
        ],
    ),
    (
        "only the first address of an endpoint counts",
        [([service(**V4), ONE], {"TCP 10.96.0.1:80": "10.0.0.1:8080"})],
    ),
    (
        "a nil port name, and a nil or zero port, are ignored",
        [
            ([service(**V4), piece(end("10.0.0.1"), ports=[{"port": 8080}])], {"TCP 10.96.0.1:80": "reject"}),
            ([piece(end("10.0.0.1"), ports=[{"name": "http"}])], {"TCP 10.96.0.1:80": "reject"}),
            ([piece(end("10.0.0.1"), ports=[{"name": "http", "port": 0}])], {"TCP 10.96.0.1:80": "reject"}),
            ([ONE], {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
        ],
    ),
    (
        "ready nil is true, serving nil is true, terminating nil is false",
        [
            (
                [
                    service(**V4),
                    piece(
                        end("10.0.0.1"),
                        end("10.0.0.2", ready=False),
                        end("10.0.0.3", ready=True, serving=None),
                        end("10.0.0.4", ready=False, terminating=True),
                    ),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.3:8080"},
            ),
            # serving nil counts for one that terminates
            ([piece(end("10.0.0.4", ready=False, terminating=True))], {"TCP 10.96.0.1:80": "10.0.0.4:8080"}),
            ([piece(end("10.0.0.4", ready=False))], {"TCP 10.96.0.1:80": "reject"}),
        ],
    ),
    (
        "local if and only if nodeName is this node; nil is remote",
        [
            (
                [
                    service(internalTrafficPolicy="Local", **V4),
                    piece(end("10.0.0.1"), end("10.0.0.2", "node2"), end("10.0.0.3", None)),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080"},
            ),
            ([piece(end("10.0.0.3", None))], {"TCP 10.96.0.1:80": "drop"}),
        ],
    ),
    (
        "the key of a Service port has its protocol: TCP and UDP on one port are two",
        [
            (
                [
                    service(HTTP, {"name": "dns", "port": 80, "protocol": "UDP"}, **V4),
                    piece(
                        end("10.0.0.1"),
                        ports=[{"name": "http", "port": 8080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
                    ),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080", "UDP 10.96.0.1:80": "10.0.0.1:53"},
            ),
            # the same name with another protocol is another port
            ([piece(end("10.0.0.1"), ports=[{"name": "http", "port": 8080, "protocol": "UDP"}])],
             {"TCP 10.96.0.1:80": "reject", "UDP 10.96.0.1:80": "reject"}),
        ],
    ),
    (
        "SCTP ports are served like the others, node port included",
        [
            (
                [
                    service({"name": "s", "port": 36412, "protocol": "SCTP", "nodePort": 30412}, type="NodePort", **V4),
                    piece(end("10.0.0.1"), ports=[{"name": "s", "port": 36412, "protocol": "SCTP"}]),
                ],
                {"SCTP 10.96.0.1:36412": "10.0.0.1:36412", "SCTP 0.0.0.0:30412": "10.0.0.1:36412"},
            )
        ],
    ),
    (
        "of one IP:port in two slices the entry that does not terminate wins",
        [
            (
                [
                    service(**V4),
                    piece(end("10.0.0.1", ready=False, serving=True, terminating=True)),
                    piece(end("10.0.0.1"), name="web-2"),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080"},
            ),
            ([Gone("EndpointSlice", "web-2")], {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
            # as the only one it serves still; beside another that is ready it does not
            ([piece(end("10.0.0.2"), name="web-3")], {"TCP 10.96.0.1:80": "10.0.0.2:8080"}),
        ],
    ),
    (
        "the endpoint's identity is IP:port: one address with two ports is two endpoints",
        [
            (
                [
                    service(**V4),
                    piece(end("10.0.0.1")),
                    piece(end("10.0.0.1"), name="web-2", ports=[{"name": "http", "port": 9090}]),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.1:9090"},
            )
        ],
    ),
    (
        "a named target port may have another number in each slice: all are used",
        [
            (
                [
                    service({**HTTP, "targetPort": "web"}, {"name": "admin", "port": 81}, **V4),
                    piece(end("10.0.0.1"), ports=[{"name": "http", "port": 8080}, {"name": "admin", "port": 1}]),
                    piece(
                        end("10.0.0.2"),
                        name="web-2",
                        ports=[{"name": "http", "port": 8081}, {"name": "admin", "port": 2}],
                    ),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.2:8081", "TCP 10.96.0.1:81": "10.0.0.1:1 10.0.0.2:2"},
            )
        ],
    ),
    (
        "a named target port is resolved on each pod where there are no slices",
        [
            (
                [
                    service({**HTTP, "targetPort": "web"}, selector={"app": "web"}, **V4),
                    pod("a", "10.0.0.1", ports=[{"name": "web", "containerPort": 8080}]),
                    pod("b", "10.0.0.2", ports=[{"name": "web", "containerPort": 8081}]),
                    pod("c", "10.0.0.3", ports=[{"name": "other", "containerPort": 8082}]),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.2:8081"},
            )
        ],
    ),
    (
        "publishNotReadyAddresses: pods that are not ready, and those that terminate, serve",
        [
            (
                [
                    service(selector={"app": "web"}, publishNotReadyAddresses=True, **V4),
                    pod("a", "10.0.0.1", ready=False),
                    pod("b", "10.0.0.2", ready=False, deleted=True),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:80 10.0.0.2:80"},
            ),
            ([service(selector={"app": "web"}, **V4)], {"TCP 10.96.0.1:80": "reject"}),
            ([pod("b", "10.0.0.2", ready=True, deleted=True)], {"TCP 10.96.0.1:80": "10.0.0.2:80"}),
        ],
    ),
    (
        "the node's zone comes from its topology label, and may change",
        [
            (
                [service(selector={"app": "web"}, trafficDistribution="PreferClose", **V4), pod("a", "10.0.0.1"),
                 node("node1", "zone-a")],
                {"TCP 10.96.0.1:80": "10.0.0.1:80"},
            )
        ],
    ),
]  # fmt: skip

NODEPORT = {**HTTP, "nodePort": 30080}
LOCAL = {"type": "NodePort", "externalTrafficPolicy": "Local", **V4}
OUTSIDE = "TCP 0.0.0.0:30080 from outside"

SECTION_2: list[tuple[str, list[Step]]] = [
    (
        "the Cluster set: ready endpoints",
        [([service(**V4), piece(end("10.0.0.1"), end("10.0.0.2", "node2"), end("10.0.0.3", ready=False))],
          {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.2:8080"})],
    ),
    (
        "if that is empty: all that serve and terminate, and topology is ignored then",
        [
            (
                [
                    service(**V4),
                    piece(
                        end("10.0.0.1", ready=False, serving=True, terminating=True, zones=["zone-a"]),
                        end("10.0.0.2", ready=False, serving=True, terminating=True, zones=["zone-b"]),
                        end("10.0.0.3", ready=False, serving=False, terminating=True),
                    ),
                ],
                {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.2:8080"},
            )
        ],
    ),
    (
        "PreferSameNode: every ready endpoint has node hints, one names this node",
        [([service(**V4), piece(end("10.0.0.1", nodes=["node1"]), end("10.0.0.2", nodes=["node2"]))],
          {"TCP 10.96.0.1:80": "10.0.0.1:8080"})],
    ),
    (
        "a miss at the node falls to the zone",
        [([service(**V4), piece(end("10.0.0.1", nodes=["node3"], zones=["zone-a"]),
                                end("10.0.0.2", nodes=["node2"], zones=["zone-b"]))],
          {"TCP 10.96.0.1:80": "10.0.0.1:8080"})],
    ),
    (
        "PreferSameZone: every ready endpoint has zone hints, one names this zone; else none",
        [
            ([service(**V4), piece(end("10.0.0.1", zones=["zone-a"]), end("10.0.0.2", zones=["zone-b"]))],
             {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
            ([piece(end("10.0.0.1", zones=["zone-c"]), end("10.0.0.2", zones=["zone-b"]))],
             {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.2:8080"}),
        ],
    ),
    (
        "one endpoint without hints turns its level off; only ready ones have a say",
        [
            ([service(**V4), piece(end("10.0.0.1", zones=["zone-a"]), end("10.0.0.2"))],
             {"TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.2:8080"}),
            ([piece(end("10.0.0.1", zones=["zone-a"]), end("10.0.0.2", ready=False))],
             {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
        ],
    ),
    (
        "the Local set: local ready, else local that serve and terminate, whatever is elsewhere",
        [
            ([service(internalTrafficPolicy="Local", **V4), piece(end("10.0.0.1"), end("10.0.0.2", "node2"))],
             {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
            ([piece(end("10.0.0.1", ready=False, serving=True, terminating=True), end("10.0.0.2", "node2"))],
             {"TCP 10.96.0.1:80": "10.0.0.1:8080"}),
        ],
    ),
    (
        "topology never applies to Local",
        [([service(internalTrafficPolicy="Local", **V4),
           piece(end("10.0.0.1", zones=["zone-b"]), end("10.0.0.2", "node2", zones=["zone-a"]))],
          {"TCP 10.96.0.1:80": "10.0.0.1:8080"})],
    ),
    (
        "externally accessible: eTP Local for what comes from outside, the Cluster set for the node's own",
        [
            (
                [service(NODEPORT, **LOCAL), piece(end("10.0.0.1"), end("10.0.0.2", "node2"))],
                {
                    "TCP 10.96.0.1:80": "10.0.0.1:8080 10.0.0.2:8080",
                    "TCP 0.0.0.0:30080": "10.0.0.1:8080 10.0.0.2:8080",
                    OUTSIDE: "10.0.0.1:8080",
                },
            )
        ],
    ),
    (
        "hasAny: none local is dropped, none anywhere rejected",
        [
            (
                [service(NODEPORT, **LOCAL), piece(end("10.0.0.2", "node2"))],
                {"TCP 10.96.0.1:80": "10.0.0.2:8080", "TCP 0.0.0.0:30080": "10.0.0.2:8080", OUTSIDE: "drop"},
            ),
            (
                [piece(end("10.0.0.2", "node2", ready=False, serving=True, terminating=True))],
                {"TCP 10.96.0.1:80": "10.0.0.2:8080", "TCP 0.0.0.0:30080": "10.0.0.2:8080", OUTSIDE: "drop"},
            ),
            (
                [piece(end("10.0.0.2", "node2", ready=False))],
                {"TCP 10.96.0.1:80": "reject", "TCP 0.0.0.0:30080": "reject", OUTSIDE: "reject"},
            ),
        ],
    ),
    (
        "pods that are neither ready nor terminating are never used",
        [([service(**V4), piece(end("10.0.0.1", ready=False, serving=True))], {"TCP 10.96.0.1:80": "reject"})],
    ),
    (
        "iTP Local counts for the cluster address alone, eTP Local for the others alone",
        [
            (
                [service(NODEPORT, type="NodePort", internalTrafficPolicy="Local", **V4),
                 piece(end("10.0.0.2", "node2"))],
                {"TCP 10.96.0.1:80": "drop", "TCP 0.0.0.0:30080": "10.0.0.2:8080"},
            )
        ],
    ),
]  # fmt: skip

CASES = [(f"1 {line}", steps) for line, steps in SECTION_1] + [(f"2 {line}", steps) for line, steps in SECTION_2]


@pytest.mark.parametrize("steps", [steps for _, steps in CASES], ids=[line for line, _ in CASES])
def test_line(steps: list[Step]) -> None:
    store = Store()
    for objects, expected in steps:
        for obj in objects:
            if isinstance(obj, Gone):
                store.delete(obj.kind, ObjectKey("default", obj.name), "api")
            else:
                store.upsert(obj, "api")
        before = store.take_changes()
        assert served(store) == expected
        # what changed a Service must also have it planned again
        assert not any(kind_of(o) in ("Service", "EndpointSlice") for o in objects if not isinstance(o, Gone)) or (
            before.services
        )


@pytest.mark.parametrize(
    ("ranges", "guarded"),
    [
        ([" 10.0.0.0/8 "], ["IPv4"]),  # white space is trimmed
        (["10.0.0.0/8", "0.0.0.0/0"], []),  # any /0 opens the family
        (["10.0.0.0/8", "::/0"], ["IPv4"]),
        (["10.0.0.0/8"], ["IPv4"]),  # a list of the other family alone leaves this one open
        (["fd00::/8"], ["IPv6"]),
        ([], []),
    ],
)
def test_line_source_ranges(ranges: list[str], guarded: list[str]) -> None:
    store = Store()
    vips = [{"ip": "198.51.100.1"}, {"ip": "2001:db8:100::1"}]
    balanced = service(type="LoadBalancer", loadBalancerSourceRanges=ranges, ingress=vips)
    store.upsert(balanced, "api")
    found = set()
    for row in plan_service(store, balanced.key, HERE):
        for raw, settings in zip(row.keys, row.settings, strict=True):
            address = unpack_address(ServiceKey.unpack(raw).addr)
            if settings.ranges:
                found.add("IPv6" if ":" in address else "IPv4")
                assert address in ("198.51.100.1", "2001:db8:100::1")
    assert sorted(found) == guarded
    # matched, and said: who writes ranges of one family does not expect the other to be open
    mixed = bool(ranges) and {"IPv4", "IPv6"} - {"IPv6" if ":" in text else "IPv4" for text in ranges}
    assert {family.value for family in open_families(balanced)} == (mixed or set())


#: Lines that objects alone cannot prove, and the test that does.
ELSEWHERE = [
    ("1 which Services and slices are watched", "unit/test_informer.py", "asks_only_for_what_kube_proxy_would_serve"),
    ("1 sync waits until both are listed once", "unit/test_kubernetes_failures.py", "away_at_start_then_there"),
    ("1 a failed sync is done again, whole", "unit/test_service_tables.py", "a_failed_flush_is_done_again"),
    ("1 node IPs", "netns/test_agent_attacked.py", "address_moved"),
    ("2 traffic policies and the short circuit", "netns/test_services.py", "external_traffic_policy_local"),
    ("7 source ranges hold for clients in the cluster", "netns/test_services.py", "source_ranges"),
    ("7 affinity by client address, on every frontend", "netns/test_services.py", "session_affinity"),
    ("7 hostPort on loopback", "netns/test_host_port_sockets.py", "one_port_on_different_addresses_and_protocols"),
    ("7 PreferSameNode", "netns/test_services.py", "traffic_distribution_and_fall_back"),
    ("7 CNI GC", "netns/test_cni_plugin.py", "garbage_collection"),
    ("7 VIPs to one backend do not collide", "netns/test_services.py", "one_port_directly_and_through_a_service"),
    ("7 UDP leaves a backend that is gone", "netns/test_services.py", "udp_sockets_leave_a_backend_that_is_gone"),
    ("7 no iptables", "netns/test_lab.py", "no_netfilter_rule_inside"),
]


@pytest.mark.parametrize(("file", "test"), [row[1:] for row in ELSEWHERE], ids=[row[0] for row in ELSEWHERE])
def test_line_is_proven_elsewhere(file: str, test: str) -> None:
    assert f"def test_{test}(" in (Path(__file__).parents[1] / file).read_text()
