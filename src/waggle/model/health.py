"""Health as load balancers ask for it: of a Service on this node, and of the node (semantics.md section 5)."""

from __future__ import annotations

from collections.abc import Iterable

from waggle.model.endpoints import Endpoint
from waggle.model.objects import TO_BE_DELETED_TAINT, Node, Service
from waggle.model.service import is_proxied


def health_check_port(service: Service) -> int:
    """The port of a node on which a load balancer asks for a Service's local endpoints; 0 where there is none.

    Only a Service that external clients reach through the nodes that have endpoints needs one. Of any other the
    number means nothing, even where a manifest or an old object carries it.
    """
    spec = service.spec
    if spec.type != "LoadBalancer" or spec.external_traffic_policy != "Local" or not is_proxied(service):
        return 0
    return spec.health_check_node_port


def local_ready_addresses(endpoints: Iterable[Endpoint], node: str) -> set[str]:
    """What the answer counts: addresses, however many ports they have. Endpoints that terminate serve what comes, but
    no load balancer shall send more."""
    return {e.address for e in endpoints if e.ready and e.node == node}


def is_leaving(node: Node | None) -> bool:
    """Whether load balancers should send nothing new by this node: it is being deleted, or about to be.

    A cordoned node is not: what runs there goes on. Nor does any of this count for the health port of a Service, whose
    endpoints tell themselves when they go.
    """
    if node is None:
        return False
    tainted = any(taint.key == TO_BE_DELETED_TAINT for taint in node.spec.taints or ())
    return tainted or node.metadata.deletion_timestamp is not None
