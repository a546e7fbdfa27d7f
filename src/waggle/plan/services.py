"""A Service becomes rows of the frontend and backend tables.

A row is one Service port in one family: the frontends that lead to it and one set of backends that they share, both
already in the bytes of the maps. Backends are sorted, so that an equal set is equal bytes whatever order slices came
in, and an agent that restarts recognises what it wrote.
"""

from __future__ import annotations

from typing import NamedTuple

from waggle.abi._generated import ServiceFlag, ServiceKey
from waggle.abi.address import ANY4, ANY6, PROTOCOLS, pack_address
from waggle.abi.backends import pack_backends
from waggle.model.objects import ObjectKey, Service, ServicePort
from waggle.model.service import (
    Endpoint,
    Family,
    Frontend,
    FrontendKind,
    cluster_set,
    families,
    frontends,
    is_proxied,
    pod_endpoints,
    slice_endpoints,
)
from waggle.store import Store


class ServiceRow(NamedTuple):
    """What the maps hold for one Service port and family.

    `keys` are packed wag_service_key; `flags` goes with each of them; `backends` is wag_backend records back to back.
    """

    keys: tuple[bytes, ...]
    flags: tuple[int, ...]
    backends: bytes


class PortView(NamedTuple):
    """One Service port in one family, for people: what `service list` shows and what `plan_service` encodes."""

    port: ServicePort
    family: Family
    frontends: list[Frontend]
    endpoints: list[Endpoint]
    backends: list[Endpoint]


def view_service(store: Store, key: ObjectKey) -> list[PortView]:
    """The ports of a Service as they are served here; empty for a Service that is unknown or not proxied."""
    service = store.services.get(key)
    if service is None or not is_proxied(service):
        return []
    views = []
    for family in families(service):
        for port in service.spec.ports:
            made = frontends(service, port, family)
            if not made:
                continue
            endpoints = _endpoints(store, service, port, family)
            views.append(PortView(port, family, made, endpoints, cluster_set(endpoints)))
    return views


def plan_service(store: Store, key: ObjectKey) -> list[ServiceRow]:
    """The rows of a Service. Costs what the Service has endpoints, nothing else."""
    rows = []
    for view in view_service(store, key):
        protocol = PROTOCOLS.get(view.port.protocol)
        if protocol is None:
            continue
        wildcard = ANY6 if view.family is Family.IPV6 else ANY4
        keys, flags = [], []
        for frontend in view.frontends:
            address = pack_address(frontend.address) if frontend.address else wildcard
            keys.append(ServiceKey(address, frontend.port, protocol).pack())
            flags.append(int(ServiceFlag.NODEPORT) if frontend.kind is FrontendKind.NODE_PORT else 0)
        rows.append(ServiceRow(tuple(keys), tuple(flags), pack_backends((e.address, e.port) for e in view.backends)))
    return rows


def _endpoints(store: Store, service: Service, port: ServicePort, family: Family) -> list[Endpoint]:
    slices = store.slices_of.get(service.key)
    if slices:
        return slice_endpoints(slices.values(), port, family)
    return pod_endpoints(service, store.pods_in(service.metadata.namespace), port, family)
