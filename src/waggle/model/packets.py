"""What must happen to a packet: the rules of Kubernetes' Services, from the objects themselves.

`decide` answers for the first packet of a flow; what flows add to that (a backend is kept, replies are turned back) is
in `flows`. Nothing here knows of tables, programs or bytes: planning, encoding and the programs are compared with it.
The rules are those of Kubernetes 1.36 (pkg/proxy), referred to as semantics.md section N.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from waggle.model.choice import Choice, NodeFacts, Otherwise, Scope, choose
from waggle.model.endpoints import Endpoint, pod_endpoints, slice_endpoints
from waggle.model.objects import ZONE_LABEL, EndpointSlice, Node, ObjectKey, Pod, Service, ServiceCIDR, ServicePort
from waggle.model.service import (
    Family,
    Forwarding,
    Frontend,
    FrontendKind,
    affinity_seconds,
    families,
    family_of,
    forwarding,
    frontends,
    is_proxied,
    source_ranges,
)
from waggle.model.vip import Beyond, beyond_frontends, service_ranges, taken_networks, vips


class Cluster(NamedTuple):
    """The objects, by key. Where two Services claim one frontend, the one that is earlier in `services` has it."""

    services: Mapping[ObjectKey, Service]
    slices: Mapping[ObjectKey, EndpointSlice] = {}
    pods: Mapping[ObjectKey, Pod] = {}
    nodes: Mapping[ObjectKey, Node] = {}
    service_cidrs: Mapping[ObjectKey, ServiceCIDR] = {}


class LocalNode(NamedTuple):
    """The node that the packet is on. Addresses are canonical text.

    `addresses` are all its own; `primary` those that stand for it where a packet needs its address, at most one per
    family; `node_port_addresses` as kube-proxy's setting: networks, or "primary", or nothing for all; `pods` the
    addresses of the pods that live here; `know_pods` the networks that know a way to pods, None where nothing is
    masqueraded; `forwarding` holds for Services that do not say; `service_cidr` are the Service ranges where they are
    configured, and not those of the ServiceCIDR objects, and `most_ranges` how many there may be.
    """

    facts: NodeFacts
    addresses: frozenset[str]
    primary: tuple[str, ...]
    node_port_addresses: tuple[str, ...] = ()
    pods: frozenset[str] = frozenset()
    know_pods: tuple[str, ...] | None = None
    forwarding: Forwarding = Forwarding.SNAT
    service_cidr: tuple[str, ...] = ()
    most_ranges: int = 8


class Arrival(StrEnum):
    """Where a packet is met: as a pod of this node sends it, or as it comes in by the wire."""

    POD = "pod"
    WIRE = "wire"


class Place(StrEnum):
    """Whose an address is, as seen from the node."""

    POD = "pod"
    NODE = "node"
    AWAY = "away"


class End(NamedTuple):
    """One end of a flow."""

    address: str
    port: int


class Packet(NamedTuple):
    """What the rules ask of a packet. `begins`: false in the middle of a connection (TCP: any but the client's SYN;
    SCTP: any but an INIT); one of UDP always may be the first."""

    protocol: str
    source: End
    destination: End
    begins: bool = True


class Action(StrEnum):
    """What happens. FORWARD: no Service is meant, the packet goes on as it is, wherever its address leads. MASQUERADE:
    the same, with the node's address as its source."""

    TRANSLATE = "translate"
    FORWARD = "forward"
    MASQUERADE = "masquerade"
    DROP = "drop"
    REJECT = "reject"


class Reason(StrEnum):
    """Why a packet is not served."""

    NO_BACKEND = "no_backend"
    NO_LOCAL_BACKEND = "no_local_backend"
    SOURCE_RANGE = "source_range"
    NO_PORT = "no_port"
    FREE_ADDRESS = "free_address"


#: those of packets that no Service takes
BESIDE_FRONTENDS = frozenset((Reason.NO_PORT, Reason.FREE_ADDRESS))


class Affinity(NamedTuple):
    """Clients stay with their backend for so many seconds after their last new flow, per Service port."""

    service: ObjectKey
    port: ServicePort
    seconds: int


class Decision(NamedTuple):
    """What must happen to a new flow.

    `backends`: those of which any may be chosen, each with the source address that the packet must then have. `inside`:
    those of them whose node answers the client itself (direct server return); the packet goes there as it is, inside
    another one that has this source.
    `keeps`: those that a flow may stay with which has one already (semantics.md section 4); None: with any.
    """

    action: Action
    reason: Reason | None = None
    backends: Mapping[End, str] = {}
    inside: frozenset[End] = frozenset()
    keeps: frozenset[End] | None = frozenset()
    affinity: Affinity | None = None


AS_IT_IS = Decision(Action.FORWARD)


def decide(cluster: Cluster, node: LocalNode, packet: Packet, arrival: Arrival) -> Decision:
    """What must happen to the first packet of a flow, on this node."""
    if place(node, packet.destination.address) is Place.POD:
        return AS_IT_IS
    found = find_frontend(cluster, node, packet)
    if found:
        return serve(cluster, node, packet, arrival, *found)
    refusal = refuse(cluster, node, packet)
    if refusal:
        return refusal
    if arrival is Arrival.POD and packet.begins and leaves_cluster(node, packet):
        source = node_address(node, packet.source.address)
        return Decision(Action.MASQUERADE, backends={packet.destination: source})
    return AS_IT_IS


def refuse(cluster: Cluster, node: LocalNode, packet: Packet) -> Decision | None:
    """What happens to a packet that no frontend takes: to a cluster address that is in use it is rejected, to a free
    address of a Service range it is dropped (semantics.md section 3, nftables mode). None: it goes on.

    Unlike kube-proxy this leaves the middle of a connection alone, known here or not: whoever begins is told.
    """
    address = packet.destination.address
    if place(node, address) is not Place.AWAY:
        return None
    used: dict[str, bool] = {}
    for service in cluster.services.values():
        for one, is_cluster in vips(service).items():
            used[canonical(one)] = is_cluster or used.get(canonical(one), False)
    taken = taken_networks(node.addresses, cluster.nodes.values())
    ranges = service_ranges(cluster.service_cidrs.values(), node.service_cidr, taken, node.most_ranges)
    match beyond_frontends(address, echo=False, used=used, ranges=ranges.networks, established=not packet.begins):
        case Beyond.REJECT:
            return Decision(Action.REJECT, Reason.NO_PORT)
        case Beyond.DROP:
            return Decision(Action.DROP, Reason.FREE_ADDRESS)
    return None


def leaves_cluster(node: LocalNode, packet: Packet) -> bool:
    """Whether a pod's packet goes where nobody knows a way back to the pod. A pod with an address that is none of the
    cluster's networks' can be reached from everywhere."""
    ends = (packet.destination.address, packet.source.address)
    if node.know_pods is None or place(node, packet.destination.address) is not Place.AWAY:
        return False
    to, source = (knows_pods(node, address) for address in ends)
    return not to and source


def knows_pods(node: LocalNode, address: str) -> bool:
    """Whether packets from this address find their way to pods."""
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(one) for one in node.know_pods or ())


def find_frontend(cluster: Cluster, node: LocalNode, packet: Packet) -> tuple[Service, ServicePort, Frontend] | None:
    """The frontend that a packet asks for. One with the very address comes before node ports (semantics.md section 3:
    the NodePort rule is last)."""
    asked = packet.destination
    with_address: dict[ObjectKey, tuple[Service, ServicePort, Frontend]] = {}
    node_ports: list[tuple[Service, ServicePort, Frontend]] = []
    for service in cluster.services.values():
        for port, frontend in all_frontends(service, family_of(asked.address)):
            if (port.protocol, frontend.port) != (packet.protocol, asked.port):
                continue
            if frontend.kind is FrontendKind.NODE_PORT:
                node_ports.append((service, port, frontend))
            elif canonical(frontend.address) == asked.address:
                # of one that is an external IP and the load balancer's too, the latter counts: it is guarded
                with_address[service.key] = service, port, frontend
    found = [*with_address.values(), *(node_ports if serves_node_ports(node, asked.address) else ())]
    return found[0] if found else None


def all_frontends(service: Service, family: Family) -> Iterator[tuple[ServicePort, Frontend]]:
    """Every frontend of a Service in a family; none of one that is not proxied."""
    if is_proxied(service) and family in families(service):
        for port in service.spec.ports:
            for frontend in frontends(service, port, family):
                yield port, frontend


def serve(
    cluster: Cluster,
    node: LocalNode,
    packet: Packet,
    arrival: Arrival,
    service: Service,
    port: ServicePort,
    frontend: Frontend,
) -> Decision:
    """What a frontend does with a client (the traffic matrix, semantics.md section 3)."""
    every = endpoints(cluster, service, port, family_of(packet.destination.address))
    scope = Scope.EXTERNAL if arrival is Arrival.WIRE else Scope.INTERNAL
    choice = choose(service, frontend.kind, scope, every, node.facts)
    direct_return = forwarding(service, node.forwarding) is Forwarding.DSR
    keeps = may_keep(choice, port, every, here=node.facts.name if direct_return else "")
    if frontend.kind is FrontendKind.LOAD_BALANCER and not admits(service, node, packet.source.address):
        return Decision(Action.DROP, Reason.SOURCE_RANGE, keeps=keeps)
    if not choice.endpoints:
        if choice.otherwise is Otherwise.REJECT:
            return Decision(Action.REJECT, Reason.NO_BACKEND, keeps=keeps)
        return Decision(Action.DROP, Reason.NO_LOCAL_BACKEND, keeps=keeps)
    backends = {end_of(e): source_for(node, packet, arrival, choice, end_of(e)) for e in choice.endpoints}
    inside: frozenset[End] = frozenset()
    if arrival is Arrival.WIRE and direct_return:
        inside = frozenset(end for end in backends if place(node, end.address) is Place.AWAY)
        backends.update(dict.fromkeys(inside, node_address(node, packet.source.address)))
    seconds = affinity_seconds(service)
    affinity = Affinity(service.key, port, seconds) if seconds else None
    return Decision(Action.TRANSLATE, backends=backends, inside=inside, keeps=keeps, affinity=affinity)


def admits(service: Service, node: LocalNode, client: str) -> bool:
    """Whether loadBalancerSourceRanges let a client in, wherever it stands."""
    networks = source_ranges(service, family_of(client), node.addresses)
    return networks is None or any(ipaddress.ip_address(client) in network for network in networks)


def source_for(node: LocalNode, packet: Packet, arrival: Arrival, choice: Choice, backend: End) -> str:
    """The source address of a packet to a backend: the client's, unless the reply would not come back through here.

    A pod that is sent to itself would answer itself. A backend on another node would answer an outside client
    directly. A backend on this node answers through the node anyhow, so that the client's address is kept with it
    whatever the policy: kube-proxy's "always" under the traffic policy Cluster is a means, not an end.
    """
    client = packet.source.address
    if backend.address == client:
        return node_address(node, client)
    outside = arrival is Arrival.WIRE and place(node, backend.address) is Place.AWAY
    return node_address(node, client) if outside and not choice.keeps_client else client


def may_keep(choice: Choice, port: ServicePort, every: list[Endpoint], *, here: str = "") -> frozenset[End] | None:
    """The backends that flows which have them may stay with: the chosen ones, and of UDP all that serve.

    A UDP port that nothing serves leaves its flows alone: None (semantics.md section 4). `here`: the node, where
    clients are answered by direct server return; then its own endpoints keep what other nodes sent to them.
    """
    keeps = frozenset(map(end_of, choice.endpoints))
    if port.protocol == "UDP":
        keeps |= {end_of(e) for e in every if e.serving}
        return keeps or None
    return keeps | {end_of(e) for e in every if here and e.node == here and (e.ready or e.serving)}


def endpoints(cluster: Cluster, service: Service, port: ServicePort, family: Family) -> list[Endpoint]:
    """The endpoints of a Service port: of its EndpointSlices, or, where it has none, of the pods it selects."""
    slices = [piece for piece in cluster.slices.values() if piece.service_key == service.key]
    if slices:
        return slice_endpoints(slices, port, family)
    zones = {n.metadata.name: (n.metadata.labels or {}).get(ZONE_LABEL, "") for n in cluster.nodes.values()}
    pods = [pod for pod in cluster.pods.values() if pod.metadata.namespace == service.metadata.namespace]
    return pod_endpoints(service, pods, port, family, zones)


def serves_node_ports(node: LocalNode, address: str) -> bool:
    """Whether an address is one of the node's that serve node ports (semantics.md section 3)."""
    allowed = node.node_port_addresses
    if address not in node.addresses:
        return False
    if "primary" in allowed:
        return address in node.primary
    return not allowed or any(ipaddress.ip_address(address) in ipaddress.ip_network(one) for one in allowed)


def place(node: LocalNode, address: str) -> Place:
    """Whose an address is."""
    if address in node.pods:
        return Place.POD
    return Place.NODE if address in node.addresses else Place.AWAY


def node_address(node: LocalNode, like: str) -> str:
    """The address that stands for the node, in the family of `like`."""
    return next(address for address in node.primary if family_of(address) is family_of(like))


def end_of(endpoint: Endpoint) -> End:
    """Where an endpoint listens."""
    return End(canonical(endpoint.address), endpoint.port)


@lru_cache(maxsize=65536)
def canonical(address: str) -> str:
    """The one text of an address: FD00::0A is fd00::a."""
    return str(ipaddress.ip_address(address))
