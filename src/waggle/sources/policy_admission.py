"""What an apiserver does to a policy before it stores it: defaults and validation.

Rules follow pkg/apis/networking/{v1/defaults,validation/validation}.go and apimachinery's validation of label
selectors, all of Kubernetes 1.36, and apis/v1beta1 of network-policy-api 0.3, with its experimental fields. In a
cluster a ClusterNetworkPolicy or NodePolicy is validated by the schema of its CRD, which says the same:
`waggle.model.policy_schema`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from msgspec.structs import replace

from waggle.model.policy_objects import (
    ClusterEgressRule,
    ClusterIngressRule,
    ClusterNetworkPolicy,
    ClusterPeer,
    ClusterProtocol,
    ClusterSubject,
    IPBlock,
    LabelSelector,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NodePolicy,
    NodePolicyEgressRule,
    NodePolicyIngressRule,
    NodePolicyPeer,
    NodePolicyPort,
    PortMatch,
)
from waggle.model.policy_schema import (
    ACTIONS,
    DOMAIN_NAME,
    MAX_CONFIRM_SECONDS,
    MAX_ITEMS,
    MAX_NAME,
    MAX_PRIORITY,
    OPERATORS,
    TIERS,
)
from waggle.sources import name_rules
from waggle.sources.name_rules import shown
from waggle.sources.yaml_documents import Path

Policy = TypeVar("Policy", bound=NetworkPolicy | ClusterNetworkPolicy | NodePolicy)

_PROTOCOLS = ("TCP", "UDP", "SCTP")
_DIRECTIONS = ("Ingress", "Egress")
_DOMAIN_NAME = re.compile(DOMAIN_NAME)


class Violation(NamedTuple):
    """What is wrong with an object, and the path of the value at fault."""

    path: Path
    reason: str


# -- defaults -------------------------------------------------------------------------------------------------------


def completed_policy(policy: Policy) -> Policy:
    """`policy` with the apiserver's defaults. An egress that is there and empty does not make it one for egress."""
    if isinstance(policy, ClusterNetworkPolicy) or policy.spec.policy_types:
        return policy
    types = ["Ingress", "Egress"] if policy.spec.egress else ["Ingress"]
    return replace(policy, spec=replace(policy.spec, policy_types=types))


# -- validation -----------------------------------------------------------------------------------------------------


def policy_violations(policy: NetworkPolicy | ClusterNetworkPolicy | NodePolicy) -> Iterator[Violation]:
    """Everything the apiserver would refuse about the spec of a completed policy."""
    if isinstance(policy, NetworkPolicy):
        yield from _network_policy(policy)
    elif isinstance(policy, NodePolicy):
        yield from _node_policy(policy)
    else:
        yield from _cluster_policy(policy)


def _network_policy(policy: NetworkPolicy) -> Iterator[Violation]:
    spec = policy.spec
    yield from _selector(spec.pod_selector, ("spec", "podSelector"))
    yield from _types(spec.policy_types or ())
    for index, ingress in enumerate(spec.ingress or ()):
        yield from _rule(ingress, ingress.from_, "from", ("spec", "ingress", index))
    for index, egress in enumerate(spec.egress or ()):
        yield from _rule(egress, egress.to, "to", ("spec", "egress", index))


def _types(types: Sequence[str]) -> Iterator[Violation]:
    if len(types) > len(_DIRECTIONS):
        yield Violation(("spec", "policyTypes"), "there are only Ingress and Egress")
    for index, direction in enumerate(types):
        yield from _one_of(direction, _DIRECTIONS, ("spec", "policyTypes", index))


def _rule(
    rule: NetworkPolicyIngressRule | NetworkPolicyEgressRule,
    peers: list[NetworkPolicyPeer] | None,
    field: str,
    path: Path,
) -> Iterator[Violation]:
    for index, port in enumerate(rule.ports or ()):
        yield from _port(port, (*path, "ports", index))
    for index, peer in enumerate(peers or ()):
        yield from _peer(peer, (*path, field, index))


def _peer(peer: NetworkPolicyPeer, path: Path) -> Iterator[Violation]:
    selects = peer.pod_selector is not None or peer.namespace_selector is not None
    if peer.ip_block is not None and selects:
        yield Violation((*path, "ipBlock"), "stands alone: pods are selected by another entry of the list")
    elif peer.ip_block is None and not selects:
        yield Violation(path, "needs podSelector, namespaceSelector or ipBlock; an empty entry is nobody")
    if peer.pod_selector is not None:
        yield from _selector(peer.pod_selector, (*path, "podSelector"))
    if peer.namespace_selector is not None:
        yield from _selector(peer.namespace_selector, (*path, "namespaceSelector"))
    if peer.ip_block is not None:
        yield from _block(peer.ip_block, (*path, "ipBlock"))


def _block(block: IPBlock, path: Path) -> Iterator[Violation]:
    if reason := name_rules.range_fault(block.cidr):
        yield Violation((*path, "cidr"), reason)
    whole = None if reason else ipaddress.ip_network(block.cidr)
    for index, text in enumerate(block.except_):
        where: Path = (*path, "except", index)
        if reason := name_rules.range_fault(text):
            yield Violation(where, reason)
            continue
        part = ipaddress.ip_network(text)
        inside = whole is not None and part.version == whole.version and whole.supernet_of(part)  # type: ignore[arg-type]
        if whole is not None and (not inside or part == whole):
            yield Violation(where, f"{text} is not a part of {block.cidr}")


def _port(port: NetworkPolicyPort | NodePolicyPort, path: Path) -> Iterator[Violation]:
    if port.protocol not in _PROTOCOLS:
        hint = ", in capital letters" if port.protocol.upper() in _PROTOCOLS else ""
        yield Violation((*path, "protocol"), f"must be TCP, UDP or SCTP{hint}, not {shown(port.protocol)}")
    if isinstance(port.port, int):
        yield from _number(port.port, (*path, "port"))
    elif port.port is not None and (reason := name_rules.port_name(port.port)):
        quoted = "; write the number without quotes" if port.port.isdecimal() else ""
        yield Violation((*path, "port"), reason + quoted)
    if port.end_port is None:
        return
    if not isinstance(port.port, int):
        what = "a port that has a name" if port.port is not None else "no port"
        yield Violation((*path, "endPort"), f"needs a number in port to begin with; there is {what}")
    elif port.end_port < port.port:
        yield Violation((*path, "endPort"), f"must not be lower than port, which is {port.port}")
    else:
        yield from _number(port.end_port, (*path, "endPort"))


def _selector(selector: LabelSelector, path: Path) -> Iterator[Violation]:
    for key, value in selector.match_labels.items():
        if reason := name_rules.qualified(key) or name_rules.label_value(value):
            yield Violation((*path, "matchLabels", key), reason)
    for index, needed in enumerate(selector.match_expressions):
        where: Path = (*path, "matchExpressions", index)
        if reason := name_rules.qualified(needed.key):
            yield Violation((*where, "key"), reason)
        yield from _one_of(needed.operator, OPERATORS, (*where, "operator"))
        if needed.operator in ("In", "NotIn") and not needed.values:
            yield Violation((*where, "values"), f"must not be empty with operator {needed.operator}")
        elif needed.operator in ("Exists", "DoesNotExist") and needed.values:
            yield Violation((*where, "values"), f"must be left out with operator {needed.operator}")
        for number, value in enumerate(needed.values):
            if reason := name_rules.label_value(value):
                yield Violation((*where, "values", number), reason)


def _one_of(value: str, allowed: Sequence[str], path: Path) -> Iterator[Violation]:
    if value not in allowed:
        yield Violation(path, f"must be one of {', '.join(allowed)}, not {shown(value)}")


def _number(port: int, path: Path) -> Iterator[Violation]:
    if not 1 <= port <= 65535:
        yield Violation(path, f"must lie between 1 and 65535, not {port}")


# -- of the node itself ---------------------------------------------------------------------------------------------


def _node_policy(policy: NodePolicy) -> Iterator[Violation]:
    spec = policy.spec
    yield from _selector(spec.node_selector, ("spec", "nodeSelector"))
    yield from _types(spec.policy_types or ())
    if not 0 <= spec.confirm_seconds <= MAX_CONFIRM_SECONDS:
        reason = f"must lie between 0 and {MAX_CONFIRM_SECONDS}, not {spec.confirm_seconds}"
        yield Violation(("spec", "confirmSeconds"), reason)
    for index, ingress in enumerate(spec.ingress or ()):
        yield from _node_rule(ingress, ingress.from_, "from", ("spec", "ingress", index))
    for index, egress in enumerate(spec.egress or ()):
        yield from _node_rule(egress, egress.to, "to", ("spec", "egress", index))


def _node_rule(
    rule: NodePolicyIngressRule | NodePolicyEgressRule, peers: list[NodePolicyPeer] | None, field: str, path: Path
) -> Iterator[Violation]:
    for index, port in enumerate(rule.ports or ()):
        yield from _port(port, (*path, "ports", index))
    for index, peer in enumerate(peers or ()):
        where: Path = (*path, field, index)
        pods = peer.pod_selector is not None or peer.namespace_selector is not None
        if (peer.ip_block is not None) + (peer.node_selector is not None) + pods != 1:
            yield Violation(where, "needs one of ipBlock, nodeSelector, and podSelector or namespaceSelector or both")
        if peer.node_selector is not None:
            yield from _selector(peer.node_selector, (*where, "nodeSelector"))
        if peer.pod_selector is not None:
            yield from _selector(peer.pod_selector, (*where, "podSelector"))
        if peer.namespace_selector is not None:
            yield from _selector(peer.namespace_selector, (*where, "namespaceSelector"))
        if peer.ip_block is not None:
            yield from _block(peer.ip_block, (*where, "ipBlock"))


# -- of the whole cluster -------------------------------------------------------------------------------------------


def _cluster_policy(policy: ClusterNetworkPolicy) -> Iterator[Violation]:
    spec = policy.spec
    yield from _one_of(spec.tier, TIERS, ("spec", "tier"))
    if not 0 <= spec.priority <= MAX_PRIORITY:
        yield Violation(("spec", "priority"), f"must lie between 0 and {MAX_PRIORITY}, not {spec.priority}")
    subject: Path = ("spec", "subject")
    yield from _exactly_one({"namespaces": spec.subject.namespaces, "pods": spec.subject.pods}, subject)
    yield from _pods(spec.subject, subject)
    yield from _at_most(len(spec.ingress), ("spec", "ingress"))
    yield from _at_most(len(spec.egress), ("spec", "egress"))
    for index, ingress in enumerate(spec.ingress):
        path: Path = ("spec", "ingress", index)
        yield from _cluster_rule(ingress, len(ingress.from_), (*path, "from"), path)
        for number, peer in enumerate(ingress.from_):
            yield from _ingress_peer(peer, (*path, "from", number))
    for index, egress in enumerate(spec.egress):
        path = ("spec", "egress", index)
        yield from _cluster_rule(egress, len(egress.to), (*path, "to"), path)
        named = any(protocol.destination_named_port for protocol in egress.protocols or ())
        for number, peer in enumerate(egress.to):
            yield from _egress_peer(peer, egress.action, named, (*path, "to", number))


def _cluster_rule(
    rule: ClusterIngressRule | ClusterEgressRule, peers: int, peers_path: Path, path: Path
) -> Iterator[Violation]:
    if len(rule.name) > MAX_NAME:
        yield Violation((*path, "name"), f"must have {MAX_NAME} characters at most, not {len(rule.name)}")
    yield from _one_of(rule.action, ACTIONS, (*path, "action"))
    yield from _several(peers, peers_path)
    if rule.protocols is None:
        return
    yield from _several(len(rule.protocols), (*path, "protocols"))
    for index, protocol in enumerate(rule.protocols):
        yield from _protocol(protocol, (*path, "protocols", index))


def _ingress_peer(peer: ClusterPeer, path: Path) -> Iterator[Violation]:
    for field, given in _egress_fields(peer).items():
        if given is not None:
            yield Violation((*path, field), "is for egress rules alone")
    yield from _exactly_one({"namespaces": peer.namespaces, "pods": peer.pods}, path)
    yield from _pods(peer, path)


def _egress_peer(peer: ClusterPeer, action: str, named: bool, path: Path) -> Iterator[Violation]:
    others = _egress_fields(peer)
    yield from _exactly_one({"namespaces": peer.namespaces, "pods": peer.pods, **others}, path)
    yield from _pods(peer, path)
    for field, given in others.items():
        if given is not None and named:
            reason = "cannot stand in a rule with destinationNamedPort: ports have names on pods alone"
            yield Violation((*path, field), reason)
    if peer.nodes is not None:
        yield from _selector(peer.nodes, (*path, "nodes"))
    if peer.networks is not None:
        yield from _distinct(peer.networks, (*path, "networks"))
        for index, text in enumerate(peer.networks):
            if reason := name_rules.range_fault(text):
                yield Violation((*path, "networks", index), reason)
    if peer.domain_names is not None:
        yield from _domain_names(peer.domain_names, action, (*path, "domainNames"))


def _egress_fields(peer: ClusterPeer) -> dict[str, object]:
    return {"nodes": peer.nodes, "networks": peer.networks, "domainNames": peer.domain_names}


def _domain_names(names: list[str], action: str, path: Path) -> Iterator[Violation]:
    if action != "Accept":
        yield Violation(path, f"stand in rules with action Accept alone, not {shown(action)}: deny the rest by another")
    yield from _distinct(names, path)
    for index, name in enumerate(names):
        if not _DOMAIN_NAME.fullmatch(name):
            reason = f"{shown(name)} is not a domain name such as example.com or *.example.com"
            yield Violation((*path, index), reason)


def _pods(given: ClusterSubject | ClusterPeer, path: Path) -> Iterator[Violation]:
    if given.namespaces is not None:
        yield from _selector(given.namespaces, (*path, "namespaces"))
    if given.pods is not None:
        yield from _selector(given.pods.namespace_selector, (*path, "pods", "namespaceSelector"))
        yield from _selector(given.pods.pod_selector, (*path, "pods", "podSelector"))


def _protocol(protocol: ClusterProtocol, path: Path) -> Iterator[Violation]:
    named = protocol.destination_named_port or None
    ports = {"tcp": protocol.tcp, "udp": protocol.udp, "sctp": protocol.sctp}
    yield from _exactly_one({**ports, "destinationNamedPort": named}, path)
    for field, match in ports.items():
        if match is not None:
            yield from _destination(match, (*path, field))


def _destination(match: PortMatch, path: Path) -> Iterator[Violation]:
    port = match.destination_port
    if port is None:
        yield Violation(path, "needs a destinationPort; all ports are the range from 1 to 65535")
        return
    path = (*path, "destinationPort")
    yield from _exactly_one({"number": port.number, "range": port.range}, path)
    if port.number is not None:
        yield from _number(port.number, (*path, "number"))
    if port.range is not None:
        yield from _number(port.range.start, (*path, "range", "start"))
        yield from _number(port.range.end, (*path, "range", "end"))
        if port.range.start >= port.range.end:
            yield Violation((*path, "range"), f"start ({port.range.start}) must be lower than end ({port.range.end})")


def _exactly_one(fields: Mapping[str, object], path: Path) -> Iterator[Violation]:
    given = [field for field, value in fields.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        yield Violation(path, f"needs exactly one of {', '.join(fields)}; there is {found}")


def _several(count: int, path: Path) -> Iterator[Violation]:
    if not count:
        yield Violation(path, "must not be empty")
    yield from _at_most(count, path)


def _at_most(count: int, path: Path) -> Iterator[Violation]:
    if count > MAX_ITEMS:
        yield Violation(path, f"holds {count} entries; {MAX_ITEMS} are allowed")


def _distinct(texts: list[str], path: Path) -> Iterator[Violation]:
    yield from _several(len(texts), path)
    for index, text in enumerate(texts):
        if text in texts[:index]:
            yield Violation((*path, index), f"{shown(text)} is given twice")
