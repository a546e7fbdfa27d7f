"""Who is answered by which endpoints: traffic policies, topology, terminating endpoints (semantics.md 2 and 3).

Two kinds of client matter. INTERNAL: pods and processes of this node, whatever address they ask for, and everything
that asks for a cluster address. EXTERNAL: what reaches a node port, external IP or load balancer address by the wire,
pods of other nodes included.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple

from waggle.model.endpoints import Endpoint
from waggle.model.objects import Service
from waggle.model.service import FrontendKind


class Scope(StrEnum):
    """Where a client stands."""

    INTERNAL = "internal"
    EXTERNAL = "external"


class Otherwise(StrEnum):
    """What a client gets where no endpoint may be chosen: told at once, or left to wait."""

    REJECT = "reject"
    DROP = "drop"


class NodeFacts(NamedTuple):
    """What the rules ask of the node they run for. `zone` is "" where the node has none."""

    name: str
    zone: str = ""


class Choice(NamedTuple):
    """The endpoints of which one is chosen, as their weights say; what happens where there is none.

    `keeps_client`: the client's address must not be replaced by the node's.
    """

    endpoints: tuple[Endpoint, ...]
    otherwise: Otherwise
    keeps_client: bool


def choose(
    service: Service, kind: FrontendKind, scope: Scope, endpoints: Iterable[Endpoint], node: NodeFacts
) -> Choice:
    """What a client of a scope gets from a frontend of a kind, on this node.

    eTP Local counts for external clients alone: for pods and processes of the node it is short-circuited, so that
    they reach the Service also where the node has no endpoint.
    """
    every = list(endpoints)
    external = kind is not FrontendKind.CLUSTER_IP and scope is Scope.EXTERNAL
    if kind is FrontendKind.CLUSTER_IP:
        policy = service.spec.internal_traffic_policy
    else:
        policy = service.spec.external_traffic_policy if external else "Cluster"
    if policy != "Local":
        return Choice(_weighty(cluster_set(every, node)), Otherwise.REJECT, keeps_client=False)
    # somewhere there is an endpoint, only not here: whoever balances over nodes must not be told that nothing listens
    otherwise = Otherwise.DROP if has_any(every) else Otherwise.REJECT
    return Choice(_weighty(local_set(every, node)), otherwise, keeps_client=external)


def _weighty(endpoints: list[Endpoint]) -> tuple[Endpoint, ...]:
    """Those with a weight; where none has any, all."""
    return tuple(e for e in endpoints if e.weight) or tuple(endpoints)


def cluster_set(endpoints: Iterable[Endpoint], node: NodeFacts) -> list[Endpoint]:
    """The endpoints that cluster-wide traffic may go to: the ready ones that topology leaves; if there is none, all
    that still serve while they terminate, topology or not.
    """
    every = list(endpoints)
    ready = close_ones([e for e in every if e.ready], node)
    return ready or [e for e in every if e.serving and e.terminating]


def close_ones(ready: list[Endpoint], node: NodeFacts) -> list[Endpoint]:
    """Those that hints mean for this node, else for its zone, else all. One without hints turns off its level."""
    if all(e.node_hints for e in ready) and any(node.name in e.node_hints for e in ready):
        return [e for e in ready if node.name in e.node_hints]
    if node.zone and all(e.zone_hints for e in ready) and any(node.zone in e.zone_hints for e in ready):
        return [e for e in ready if node.zone in e.zone_hints]
    return ready


def local_set(endpoints: Iterable[Endpoint], node: NodeFacts) -> list[Endpoint]:
    """The ready endpoints of this node; if there is none, those of it that still serve while they terminate."""
    here = [e for e in endpoints if e.node == node.name]
    return [e for e in here if e.ready] or [e for e in here if e.serving and e.terminating]


def has_any(endpoints: Iterable[Endpoint]) -> bool:
    """Whether some endpoint, anywhere, could serve."""
    return any(e.ready or (e.serving and e.terminating) for e in endpoints)
