"""A Service becomes rows of the frontend and backend tables.

A row is one Service port in one family: the frontends that lead to it and one set of backends that they share, both
already in the bytes of the maps. Backends are sorted, so that an equal set is equal bytes whatever order slices came
in, and an agent that restarts recognises what it wrote. Likewise ids are made of what they stand for: nothing has to
be remembered to find them again.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from hashlib import blake2b
from typing import NamedTuple

from waggle.abi._generated import BACKEND_SIZE, RangeKey, ServiceFlag, ServiceKey
from waggle.abi._generated import Scope as KeyScope
from waggle.abi.address import ANY4, ANY6, PROTOCOLS, pack_address
from waggle.abi.backends import pack_backends
from waggle.model.choice import Choice, NodeFacts, Otherwise, Scope, choose
from waggle.model.endpoints import Endpoint, pod_endpoints, slice_endpoints
from waggle.model.objects import Node, ObjectKey, Service, ServicePort
from waggle.model.service import (
    Balancing,
    Family,
    Forwarding,
    Frontend,
    FrontendKind,
    IPNetwork,
    affinity_seconds,
    balancing,
    families,
    forwarding,
    frontends,
    is_proxied,
    source_ranges,
)
from waggle.plan.maglev import SLOTS, MaglevTable, maglev_table
from waggle.store import Store

MOST_DRAINING = 0xFFFF  # what struct wag_service can count
NODES_RANGES = (1 << 64) - 1  # WAG_RANGES_NODES
_RANGES_BITS = 64  # of struct wag_range_key before the address
_V4_BITS = 96  # of a mapped IPv4 address before its own


class PlanContext(NamedTuple):
    """What a plan depends on besides the store: the node it is made for, and that node's own addresses."""

    node: NodeFacts
    addresses: frozenset[str] = frozenset()
    balancing: Balancing = Balancing.RANDOM  # of Services that do not say
    forwarding: Forwarding = Forwarding.SNAT  # likewise


class FrontendSettings(NamedTuple):
    """The part of struct wag_service that does not lead to backends."""

    flags: int
    draining: int = 0
    affinity_s: int = 0
    id: int = 0
    ranges: int = 0
    maglev: int = 0


class ServiceRow(NamedTuple):
    """What the maps hold for frontends of one Service port and family that lead to the same backends.

    `keys` are packed wag_service_key; `settings` go with each of them; `backends` is wag_backend records back to back,
    the draining ones last; `ranges` are packed wag_range_key, `tables` Maglev tables that the settings refer to.
    """

    keys: tuple[bytes, ...]
    settings: tuple[FrontendSettings, ...]
    backends: bytes
    ranges: tuple[bytes, ...] = ()
    tables: tuple[MaglevTable, ...] = ()


class PortView(NamedTuple):
    """One Service port in one family, for people: what `service list` shows and what `plan_service` encodes."""

    service: Service
    port: ServicePort
    family: Family
    frontends: list[Frontend]
    endpoints: list[Endpoint]
    node: NodeFacts

    def choice(self, kind: FrontendKind, scope: Scope) -> Choice:
        """What clients of a scope get from the frontends of a kind."""
        return choose(self.service, kind, scope, self.endpoints, self.node)

    @property
    def backends(self) -> list[Endpoint]:
        """What pods and processes of this node are led to by the first frontend."""
        return list(self.choice(self.frontends[0].kind, Scope.INTERNAL).endpoints)


def view_service(store: Store, key: ObjectKey, context: PlanContext) -> list[PortView]:
    """The ports of a Service as they are served here; empty for a Service that is unknown or not proxied."""
    service = store.services.get(key)
    if service is None or not is_proxied(service):
        return []
    views = []
    for family in families(service):
        for port in service.spec.ports:
            made = frontends(service, port, family)
            if made:
                endpoints = service_endpoints(store, service, port, family)
                views.append(PortView(service, port, family, made, endpoints, context.node))
    return views


def plan_service(store: Store, key: ObjectKey, context: PlanContext) -> list[ServiceRow]:
    """The rows of a Service. Costs what the Service has endpoints, nothing else.

    What is no IP address is left out: API servers let such objects pass for years (010.0.0.1), and one of them must
    not keep all other Services from being written.
    """
    rows: list[ServiceRow] = []
    for view in view_service(store, key, context):
        if view.port.protocol in PROTOCOLS:
            rows += _rows(view, context)
    return rows


def _rows(view: PortView, context: PlanContext) -> list[ServiceRow]:
    service = view.service
    protocol = PROTOCOLS[view.port.protocol]
    affinity = affinity_seconds(service)
    number = _port_id(service, view.port) if affinity else 0
    by_hash = balancing(service, context.balancing) is Balancing.MAGLEV
    common = int(ServiceFlag.BY_HASH) if by_hash else 0
    direct_return = forwarding(service, context.forwarding) is Forwarding.DSR
    if direct_return:
        common |= int(ServiceFlag.DSR)
    networks = source_ranges(service, view.family, context.addresses)
    wildcard = ANY6 if view.family is Family.IPV6 else ANY4
    entries: dict[bytes, tuple[list[bytes], list[FrontendSettings]]] = {}  # backends → what leads there
    choices: dict[tuple[FrontendKind, Scope], tuple[Choice, bytes, int]] = {}
    tables: dict[bytes, MaglevTable] = {}  # backends → what spreads flows over them
    ranges: tuple[bytes, ...] = ()
    for frontend in view.frontends:
        kind = frontend.kind
        if frontend.address and not _is_address(frontend.address):
            continue
        address = pack_address(frontend.address) if frontend.address else wildcard
        guarded = 0
        if kind is FrontendKind.LOAD_BALANCER and networks is not None:
            guarded = _ranges_id(networks)
            ranges = tuple(_range_key(guarded, network) for network in networks)
        for scope in _scopes(service, kind):
            if (kind, scope) not in choices:
                choice = view.choice(kind, scope)
                chosen, draining = _packed(choice.endpoints), _packed(_draining(view, choice, direct_return))
                choices[kind, scope] = choice, chosen + draining, len(draining) // BACKEND_SIZE
                table = _table(choice, chosen, by_hash)
                if table is not None:
                    tables[chosen + draining] = table
            choice, backends, rest = choices[kind, scope]
            flags = _flags(service, kind, scope, choice) | common
            maglev = tables[backends].id if backends in tables else 0
            keys, settings = entries.setdefault(backends, ([], []))
            keys.append(ServiceKey(address, frontend.port, protocol, _KEY_SCOPES[scope]).pack())
            settings.append(FrontendSettings(flags, rest, affinity, number, guarded, maglev))
    return [
        ServiceRow(tuple(keys), tuple(settings), backends, ranges, (tables[backends],) if backends in tables else ())
        for backends, (keys, settings) in entries.items()
    ]


def _table(choice: Choice, packed: bytes, by_hash: bool) -> MaglevTable | None:
    """What spreads flows over the endpoints of a choice; None: each has the same chance."""
    if not packed or not (by_hash or any(e.weight != 1 for e in choice.endpoints)):
        return None
    weights = {_packed([endpoint]): max(endpoint.weight, 1) for endpoint in choice.endpoints}
    records = [packed[i : i + BACKEND_SIZE] for i in range(0, len(packed), BACKEND_SIZE)]
    if len(records) > SLOTS:
        return None
    return maglev_table(packed, [weights[record] for record in records])


def _draining(view: PortView, choice: Choice, direct_return: bool) -> list[Endpoint]:
    """The endpoints that get no new flows and keep those they have: of UDP, all that serve (semantics.md section 4).

    TCP and SCTP need no such list, as their established flows are never taken from their backend, except for direct
    server return: topology hints may lead another node to an endpoint of this node that they do not lead this one to.
    """
    if view.port.protocol == "UDP":
        rest = [e for e in view.endpoints if e.serving]
    elif direct_return:
        rest = [e for e in view.endpoints if (e.ready or e.serving) and e.node == view.node.name]
    else:
        return []
    chosen = set(choice.endpoints)
    return [e for e in rest if e not in chosen][:MOST_DRAINING]


_KEY_SCOPES = {Scope.INTERNAL: int(KeyScope.INTERNAL), Scope.EXTERNAL: int(KeyScope.EXTERNAL)}


def _scopes(service: Service, kind: FrontendKind) -> tuple[Scope, ...]:
    """The scopes that need an entry: external clients only where they are answered differently."""
    if kind is FrontendKind.CLUSTER_IP or service.spec.external_traffic_policy != "Local":
        return (Scope.INTERNAL,)
    return (Scope.INTERNAL, Scope.EXTERNAL)


def _flags(service: Service, kind: FrontendKind, scope: Scope, choice: Choice) -> int:
    flags = 0
    if kind is FrontendKind.NODE_PORT:
        flags |= ServiceFlag.NODEPORT
    if scope is Scope.INTERNAL and len(_scopes(service, kind)) > 1:
        flags |= ServiceFlag.HAS_EXTERNAL
    if choice.keeps_client:
        flags |= ServiceFlag.KEEP_CLIENT
    if choice.otherwise is Otherwise.DROP and not choice.endpoints:
        flags |= ServiceFlag.EMPTY_DROP
    return int(flags)


def _port_id(service: Service, port: ServicePort) -> int:
    """32 bits of the Service port's name. Two ports with one id share their clients' affinities, which costs nothing:
    a backend that is not in the set is never used."""
    text = f"{service.metadata.namespace}/{service.metadata.name}:{port.name}:{port.protocol}:{port.port}"
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "little")


def _ranges_id(networks: list[IPNetwork]) -> int:
    """64 bits of a list of networks, never 0. Equal lists share their entries; a changed list has its own."""
    text = ",".join(str(network) for network in networks)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def _range_key(number: int, network: IPNetwork) -> bytes:
    bits = network.prefixlen + (_V4_BITS if network.version == 4 else 0)
    return RangeKey(
        _RANGES_BITS + bits, number.to_bytes(8, "little"), pack_address(str(network.network_address))
    ).pack()


def plan_nodes(nodes: Iterable[Node]) -> list[bytes]:
    """Packed wag_range_key of every address of every node: who may send packets inside others (WAG_RANGES_NODES)."""
    found = {entry.address for node in nodes for entry in node.status.addresses or () if _is_address(entry.address)}
    return [_range_key(NODES_RANGES, ipaddress.ip_network(address)) for address in sorted(found)]


def _packed(backends: Iterable[Endpoint]) -> bytes:
    ends = [(e.address, e.port) for e in backends]
    try:
        return pack_backends(ends)
    except ValueError:
        return pack_backends(end for end in ends if _is_address(end[0]))


def _is_address(text: str) -> bool:
    try:
        pack_address(text)
    except ValueError:
        return False
    return True


def service_endpoints(store: Store, service: Service, port: ServicePort, family: Family) -> list[Endpoint]:
    """The endpoints of a port of a Service: those of its slices, else those of the pods that it selects."""
    slices = store.slices_of.get(service.key)
    if slices:
        return slice_endpoints(slices.values(), port, family)
    return pod_endpoints(service, store.serving_pods_in(service.metadata.namespace), port, family, store.zones)
