"""What happens to a packet and why, as JSON: what the agent answers and `waggle why -o json` prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from waggle.abi.address import host_port
from waggle.model.meta import ObjectKey
from waggle.model.node_trace import NodeLook
from waggle.model.policy import Cause, Side, Traffic
from waggle.model.policy_rules import RuleRef
from waggle.model.policy_trace import PolicyLook, RuleLook, SideLook
from waggle.model.why import Party, PathLook, ServiceLook, Why

#: Where a value of an object is written: (kind, key, path) → file and line, as far as they are known.
Place = Callable[[str, ObjectKey, tuple[str | int, ...]], tuple[str | None, int | None]]

#: What the kernel's tables say of a side, or of a node's own packet: allowed, audited, rule, behind; None where they
#: were not asked.
Kernel = Callable[[Side | NodeLook, Traffic], dict[str, Any] | None]

_CAUSES = {
    Cause.NO_POD: "no pod is at this end, or one that policies do not mean",
    Cause.ITSELF: "a pod may always talk to itself",
    Cause.OWN_NODE: "a pod and the node it runs on may always talk to each other",
    Cause.ISOLATED: "policies isolate the pod, and no rule allows it",
    Cause.NOTHING: "no policy is about it",
}


def _not_asked(_side: Side | NodeLook, _traffic: Traffic) -> None:
    """There is no kernel behind files."""


def why_json(why: Why, place: Place, kernel: Kernel = _not_asked) -> dict[str, Any]:
    """The whole answer."""
    return {
        "source": _party(why.source),
        "destination": _party(why.destination),
        "protocol": why.protocol,
        "port": why.port,
        "verdict": why.verdict,
        "service": _service(why.service, place) if why.service else None,
        "paths": [_path(path, place, kernel) for path in why.paths],
        "notes": list(why.notes),
    }


def _party(party: Party) -> dict[str, Any]:
    return {
        "text": party.text,
        "kind": party.kind,
        "addresses": list(party.addresses.values()),
        "node": party.node,
    }


def _service(look: ServiceLook, place: Place) -> dict[str, Any]:
    file, line = place("Service", look.key, ())
    return {
        "namespace": look.key.namespace,
        "name": look.key.name,
        "port": look.port.port,
        "portName": look.port.name,
        "protocol": look.port.protocol,
        "frontend": look.kind,
        "client": look.scope,
        "refused": look.refused,
        "file": file,
        "line": line,
        "endpoints": [
            {
                "text": host_port(one.address, one.port),
                "address": one.address,
                "port": one.port,
                "node": one.node,
                "pod": one.pod,
                "chosen": one.chosen,
                "why": one.why,
            }
            for one in look.endpoints
        ],
    }


def _path(path: PathLook, place: Place, kernel: Kernel) -> dict[str, Any]:
    traffic = path.traffic
    return {
        "source": traffic.source,
        "destination": traffic.destination,
        "text": host_port(traffic.destination, traffic.port) if traffic.port else traffic.destination,
        "port": traffic.port,
        "protocol": traffic.protocol,
        "name": path.name,
        "alike": list(path.alike),
        "allowed": path.allowed,
        "audited": path.audited,
        "egress": _side(path.egress, place, kernel(path.egress.side, traffic)),
        "ingress": _side(path.ingress, place, kernel(path.ingress.side, traffic)),
        "nodes": [_node(look, place, kernel(look, traffic)) for look in path.nodes],
        "fixes": [{"words": f.words, "manifest": f.manifest, "instead": list(f.instead)} for f in path.fixes],
    }


def _side(look: SideLook, place: Place, kernel: dict[str, Any] | None) -> dict[str, Any]:
    side = look.side
    audit = side.audit
    return {
        "direction": side.direction.value,
        "pod": str(side.pod) if side.pod else None,
        "isolated": side.isolated,
        "allowed": side.allowed,
        "because": because(side),
        "rule": rule_json(side.rule, place) if side.rule else None,
        "audit": None if audit is None else {"rule": rule_json(audit.rule, place) if audit.rule else None},
        "policies": [_policy(policy, place) for policy in look.policies],
        "beside": look.beside,
        "kernel": _compared(kernel, side.allowed, side.audit is not None),
    }


def _compared(kernel: dict[str, Any] | None, allowed: bool, audited: bool) -> dict[str, Any] | None:
    if kernel is None:
        return None
    return {**kernel, "agrees": (kernel["allowed"], kernel["audited"]) == (allowed, audited)}


def _node(look: NodeLook, place: Place, kernel: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "node": look.node,
        "direction": look.direction.value,
        "allowed": look.allowed,
        "audited": look.audited,
        "because": look.because,
        "rule": rule_json(look.rule, place) if look.rule else None,
        "onTrial": look.own.on_trial,
        "known": look.own.known,
        "policies": [_policy(policy, place) for policy in look.policies],
        "kernel": _compared(kernel, look.allowed, look.audited),
    }


def because(side: Side) -> str:
    """What made a verdict, in words."""
    if side.rule is None:
        return _CAUSES[side.cause]
    return f"{side.rule} {'allows' if side.allowed else 'denies'} it"


def rule_json(rule: RuleRef, place: Place) -> dict[str, Any]:
    """A rule by its object, direction and index, and where it is written."""
    file, line = place(rule.kind, rule.key, ("spec", rule.direction.lower(), rule.index))
    return {
        "id": rule.id,
        "kind": rule.kind,
        "namespace": rule.key.namespace,
        "name": rule.key.name,
        "direction": rule.direction.value,
        "index": rule.index,
        "ruleName": rule.name,
        "text": str(rule),
        "file": file,
        "line": line,
    }


def _policy(look: PolicyLook, place: Place) -> dict[str, Any]:
    file, line = place(look.kind, look.key, ())
    return {
        "kind": look.kind,
        "namespace": look.key.namespace,
        "name": look.key.name,
        "tier": look.tier,
        "priority": look.priority,
        "audit": look.audited,
        "file": file,
        "line": line,
        "rules": [_rule(rule, place) for rule in look.rules],
    }


def _rule(look: RuleLook, place: Place) -> dict[str, Any]:
    return {**rule_json(look.rule, place), "action": look.action, "matches": look.matches, "why": look.why}
