"""NodePolicies: what they say, straight from the objects; and what becomes of a change of them.

A change is on trial first. Unless somebody confirms it in time, over a connection that goes on under it, what was
confirmed before is in force again. What is confirmed does not depend on what sources say now: it is kept, whole.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from waggle.model.meta import ObjectMeta
from waggle.model.objects import Node, Pod
from waggle.model.policy_objects import (
    AUDIT_ANNOTATION,
    LabelSelector,
    Namespace,
    NodePolicy,
    NodePolicyPeer,
    NodePolicyPort,
)
from waggle.model.policy_rules import Direction
from waggle.model.selectors import namespace_labels, selects

# -- what a policy says ---------------------------------------------------------------------------------------------


def is_audited(policy: NodePolicy) -> bool:
    """Whether it only tells what it would do."""
    return (policy.metadata.annotations or {}).get(AUDIT_ANNOTATION) == "true"


def policy_types(policy: NodePolicy) -> frozenset[str]:
    """The directions in which it isolates the node."""
    if policy.spec.policy_types:
        return frozenset(policy.spec.policy_types)
    return frozenset((Direction.INGRESS, Direction.EGRESS) if policy.spec.egress else (Direction.INGRESS,))


def rules_of(
    policy: NodePolicy, direction: Direction
) -> list[tuple[Sequence[NodePolicyPeer], Sequence[NodePolicyPort]]]:
    """(peers, ports) of each rule; empty ones mean all."""
    if direction is Direction.INGRESS:
        return [(rule.from_ or (), rule.ports or ()) for rule in policy.spec.ingress or ()]
    return [(rule.to or (), rule.ports or ()) for rule in policy.spec.egress or ()]


@dataclass(frozen=True, slots=True)
class Essentials:
    """What always passes. `apiservers`: (address, port); `own`: addresses of this node; `open_ports`: TCP ports that
    health checks ask."""

    vxlan_port: int
    apiservers: frozenset[tuple[str, int]] = frozenset()
    own: frozenset[str] = frozenset()
    resolvers: frozenset[str] = frozenset()
    open_ports: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Guests:
    """Who is let in while a trial goes on, because of the connections that there were when it began."""

    addresses: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()


_DNS = 53


class Peers(NamedTuple):
    """What is known of addresses."""

    pods: Iterable[Pod] = ()
    namespaces: Mapping[str, Namespace] = {}
    nodes: Iterable[Node] = ()


def allows(
    policies: Iterable[NodePolicy],
    direction: Direction,
    address: str,
    protocol: str,
    port: int,
    peers: Peers | None = None,
) -> bool:
    """Whether policies let a connection begin with a peer: in, to `port` of the node; or out, to `port` of the peer."""
    asked = [policy for policy in policies if not is_audited(policy) and direction in policy_types(policy)]
    if not asked:
        return True
    return any(
        (not among or any(means(peer, address, peers or Peers()) for peer in among))
        and (not ports or any(port_matches(one, protocol, port) for one in ports))
        for policy in asked
        for among, ports in rules_of(policy, direction)
    )


def port_matches(listed: NodePolicyPort, protocol: str, port: int | None) -> bool:
    """Whether a port of a rule is that of a packet, which has none (None) where its protocol has none."""
    if (listed.protocol or "TCP") != protocol:
        return False
    if listed.port is None:
        return True
    return port is not None and listed.port <= port <= (listed.end_port or listed.port)


def means(peer: NodePolicyPeer, address: str, known: Peers) -> bool:
    """Whether an address is of a peer."""
    if peer.ip_block is not None:
        value = ipaddress.ip_address(address)
        inside = [value in ipaddress.ip_network(text, strict=False) for text in peer.ip_block.except_]
        return value in ipaddress.ip_network(peer.ip_block.cidr, strict=False) and not any(inside)
    if peer.node_selector is not None:
        return any(
            selects(peer.node_selector, node.metadata.labels or {})
            and any(_same(entry.address, address) for entry in node.status.addresses)
            for node in known.nodes
        )
    if peer.pod_selector is None and peer.namespace_selector is None:
        return False
    return any(_means_pod(peer, pod, known) and _has(pod, address) for pod in known.pods)


def _means_pod(peer: NodePolicyPeer, pod: Pod, known: Peers) -> bool:
    name = pod.metadata.namespace
    where = namespace_labels(name, known.namespaces.get(name))
    return selects(peer.namespace_selector or LabelSelector(), where) and selects(
        peer.pod_selector or LabelSelector(), pod.metadata.labels or {}
    )


def _has(pod: Pod, address: str) -> bool:
    if pod.spec.host_network or pod.status.phase in ("Succeeded", "Failed"):
        return False
    listed = [entry.ip for entry in pod.status.pod_ips] or [pod.status.pod_ip]
    return any(_same(one, address) for one in listed)


def _same(one: str, other: str) -> bool:
    try:
        return ipaddress.ip_address(one) == ipaddress.ip_address(other)
    except ValueError:
        return False  # nodes list host names among their addresses


def essential(
    essentials: Essentials,
    guests: Guests,
    direction: Direction,
    address: str,
    protocol: str,
    port: int | None,
    nodes: Iterable[Node],
) -> str:
    """What always passes, whatever policies say, of which a connection with a peer would be; "" where it is not."""
    if (protocol, port) == ("UDP", essentials.vxlan_port):
        is_node = any(_same(entry.address, address) for node in nodes for entry in node.status.addresses)
        return "tunnels between nodes" if is_node else ""
    if direction is Direction.EGRESS:
        if protocol == "TCP" and (address, port) in essentials.apiservers:
            return "connections to the API server"
        return "resolvers" if port == _DNS and protocol in ("TCP", "UDP") and address in essentials.resolvers else ""
    if protocol != "TCP":
        return ""
    if port in essentials.open_ports:
        return "health checks"
    if any(port == number and server in essentials.own for server, number in essentials.apiservers):
        return "connections to the API server"
    return (
        "those who were logged in when the trial began" if port in guests.ports and address in guests.addresses else ""
    )


# -- what becomes of a change ---------------------------------------------------------------------------------------

Policies = dict[str, NodePolicy]


class Trial(msgspec.Struct, frozen=True):
    """`until_ns` is of CLOCK_BOOTTIME, and of the boot `boot` alone. Those who were logged in when it began are let in
    while it goes on: `guests`, by the TCP ports `ports`."""

    policies: Policies
    changed: tuple[str, ...]
    began: float  # Unix seconds
    began_ns: int
    until_ns: int
    boot: str
    guests: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()


class State(msgspec.Struct, frozen=True):
    """`refused`: digest of policies that were tried, and that nobody confirmed; `refused_names`: what was changed."""

    confirmed: Policies = {}
    trial: Trial | None = None
    refused: str = ""
    refused_names: tuple[str, ...] = ()


class Clock(NamedTuple):
    """Now. `boot` tells apart what CLOCK_BOOTTIME counts from."""

    unix: float
    boottime_ns: int
    boot: str


def of_node(policies: Iterable[NodePolicy], labels: Mapping[str, str]) -> Policies:
    """The policies that are about a node with these labels, with no more than what they say."""
    return {
        policy.metadata.name: plain(policy)
        for policy in sorted(policies, key=lambda policy: policy.metadata.name)
        if selects(policy.spec.node_selector, labels)
    }


def plain(policy: NodePolicy) -> NodePolicy:
    """The policy with no more than what it says."""
    annotations = {AUDIT_ANNOTATION: "true"} if is_audited(policy) else None
    return NodePolicy(ObjectMeta(name=policy.metadata.name, annotations=annotations), policy.spec)


def digest(policies: Policies) -> str:
    """Stands for what the policies say."""
    text = msgspec.json.encode([policies[name] for name in sorted(policies)])
    return blake2b(text, digest_size=16).hexdigest()


def changed_names(before: Policies, after: Policies) -> tuple[str, ...]:
    """Those that come, go, or say something else."""
    return tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def cuts_nothing(before: Policies, after: Policies) -> bool:
    """Whether a change leaves nothing isolated that it could cut: nobody has to try it."""
    enforced = {name: policy for name, policy in after.items() if not is_audited(policy)}
    was = {name: policy for name, policy in before.items() if not is_audited(policy)}
    return not any(policy_types(policy) for policy in enforced.values()) or enforced == was


def seconds_for(before: Policies, after: Policies) -> int:
    """How long a change is on trial: as long as one of the changed policies wants; one that goes, as it wanted."""
    return max((after.get(name) or before[name]).spec.confirm_seconds for name in changed_names(before, after))


def follow(state: State, wanted: Policies, clock: Clock) -> State:
    """What is in force, and what on trial, when sources want `wanted` now."""
    state = expired(state, clock)
    if wanted == state.confirmed:
        return State(wanted)
    if state.trial is not None and state.trial.policies == wanted:
        return state
    if state.refused and state.refused == digest(wanted):
        return State(state.confirmed, None, state.refused, state.refused_names)
    seconds = seconds_for(state.confirmed, wanted)
    if not seconds or cuts_nothing(state.confirmed, wanted):
        return State(wanted)
    now, changed = clock.boottime_ns, changed_names(state.confirmed, wanted)
    return State(state.confirmed, Trial(wanted, changed, clock.unix, now, now + seconds * 10**9, clock.boot))


def is_live(trial: Trial, clock: Clock) -> bool:
    """Whether it goes on."""
    return trial.boot == clock.boot and clock.boottime_ns < trial.until_ns


def expired(state: State, clock: Clock) -> State:
    """The state without a trial whose time is over."""
    if state.trial is None or is_live(state.trial, clock):
        return state
    return refused(state)


def refused(state: State) -> State:
    """What is on trial is taken back, and not tried again until it changes."""
    if state.trial is None:
        return state
    return State(state.confirmed, None, digest(state.trial.policies), state.trial.changed)


def confirmed(state: State) -> State:
    """What is on trial stays."""
    return state if state.trial is None else State(state.trial.policies)
