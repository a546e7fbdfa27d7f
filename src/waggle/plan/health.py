"""A Service becomes rows of the health table: what its health port answers on this node, one row per family."""

from __future__ import annotations

from collections.abc import Iterable

from waggle.abi._generated import Health, HealthKey, ServiceFlag, ServiceKey
from waggle.abi._generated import Scope as KeyScope
from waggle.model.health import health_check_port, local_ready_addresses
from waggle.model.objects import ObjectKey
from waggle.model.service import Family
from waggle.plan.services import PlanContext, ServiceRow, view_service
from waggle.store import Store

FAMILIES = {Family.IPV4: 4, Family.IPV6: 6}
_LONGEST_NAME = 63  # that struct wag_health can hold; names of Services and namespaces are not longer


def plan_health(store: Store, key: ObjectKey, context: PlanContext) -> dict[bytes, bytes]:
    """Packed wag_health_key → wag_health of a Service; empty where it has no health port.

    A family in which the Service has no frontend has no row: its clients, load balancers too, come by the other one.
    """
    service = store.services.get(key)
    port = health_check_port(service) if service is not None else 0
    if not port:
        return {}
    found: dict[Family, set[str]] = {}
    for view in view_service(store, key, context):
        ready = local_ready_addresses(view.endpoints, context.node.name)
        found[view.family] = found.get(view.family, set()) | ready
    return {
        HealthKey(port, FAMILIES[family]).pack(): Health(len(ready), _name(key.namespace), _name(key.name)).pack()
        for family, ready in found.items()
    }


def service_of(value: bytes) -> ObjectKey:
    """Which Service a packed wag_health is of."""
    health = Health.unpack(value)
    return ObjectKey(*(text.rstrip(b"\0").decode() for text in (health.namespace, health.name)))


def local_policies_unmet(rows: Iterable[ServiceRow]) -> set[str]:
    """The traffic policies ("internal", "external") by which clients of a Service are dropped on this node: they are
    Local, and the endpoints are elsewhere."""
    unmet = set()
    for row in rows:
        for key, settings in zip(row.keys, row.settings, strict=True):
            if settings.flags & ServiceFlag.EMPTY_DROP:
                external = ServiceKey.unpack(key).scope == KeyScope.EXTERNAL
                unmet.add("external" if external else "internal")
    return unmet


def _name(text: str) -> bytes:
    return text.encode()[:_LONGEST_NAME]
