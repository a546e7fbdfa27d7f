"""Policies as rows for people and programs: what they are about here, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from waggle.model.objects import Pod
from waggle.model.policy import (
    Policy,
    PolicyWorld,
    cluster_rules_of,
    is_audited,
    pod_addresses,
    policy_types,
    selects_pod,
    subject_has,
)
from waggle.model.policy_objects import NetworkPolicy
from waggle.model.policy_rules import Direction
from waggle.store import Store

#: An object's origin as the store has it, and the line in it where that is known.
Place = Callable[[str, Policy], tuple[str, int | None]]


def policy_rows(store: Store, node: str, place: Place) -> Iterator[dict[str, Any]]:
    """Every policy, in the order in which they are asked. `selects` counts the pods of `node` that it is about."""
    world = PolicyWorld(namespaces=store.namespaces)
    here = [pod for pod in store.pods_on(node) if pod_addresses(pod)]
    cluster = sorted(store.cluster_policies.values(), key=lambda policy: (policy.spec.priority, policy.metadata.name))
    ordered: list[Policy] = [
        *(policy for policy in cluster if policy.spec.tier == "Admin"),
        *(policy for _, policy in sorted(store.policies.items())),
        *(policy for policy in cluster if policy.spec.tier != "Admin"),
    ]
    for policy in ordered:
        yield _row(world, policy, here, place)


def _row(world: PolicyWorld, policy: Policy, here: list[Pod], place: Place) -> dict[str, Any]:
    kind = type(policy).__name__
    origin, line = place(kind, policy)
    file = origin.removeprefix("file:") if origin.startswith("file:") else None
    if isinstance(policy, NetworkPolicy):
        selected = [pod for pod in here if selects_pod(policy, pod)]
        directions = [str(direction) for direction in policy_types(policy)]
    else:
        selected = [pod for pod in here if subject_has(world, policy.spec.subject, pod)]
        directions = [str(direction) for direction in Direction if cluster_rules_of(policy, direction)]
    return {
        "kind": kind,
        "namespace": policy.metadata.namespace,
        "name": policy.metadata.name,
        "tier": None if isinstance(policy, NetworkPolicy) else policy.spec.tier,
        "priority": None if isinstance(policy, NetworkPolicy) else policy.spec.priority,
        "directions": directions,
        "audit": is_audited(policy),
        "selects": len(selected),
        "origin": "file" if file is not None else origin,
        "file": file,
        "line": line,
    }
