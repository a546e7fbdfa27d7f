"""What happens to a packet, and why: frontend, backends, policies, rule, verdict; for a drop, what has to change.

The answers are those of the other modules here: `packets` and `choice` say where it goes, `policy` whether it may. What
is asked about may be a pod, a Service, a node, an address or a domain name, as people call them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from waggle.errors import ConfigError
from waggle.model.choice import Choice, NodeFacts, Otherwise, Scope, choose
from waggle.model.endpoints import Endpoint
from waggle.model.meta import ObjectKey
from waggle.model.node_fix import node_fix
from waggle.model.node_policy import of_node
from waggle.model.node_trace import NodeLook, OwnPolicies, look_node
from waggle.model.objects import ZONE_LABEL, Node, NodePolicy, Pod, Service, ServicePort
from waggle.model.packets import (
    Cluster,
    End,
    LocalNode,
    Packet,
    Reason,
    admits,
    canonical,
    endpoints,
    find_frontend,
    refuse,
)
from waggle.model.policy import Decision, PolicyWorld, Traffic, container_ports, decide, node_addresses, pod_addresses
from waggle.model.policy_fix import Fix, fixes
from waggle.model.policy_rules import Direction
from waggle.model.policy_trace import SideLook, look
from waggle.model.service import Family, Frontend, FrontendKind, cluster_ips, families, family_of, is_proxied

#: Stands for an address that nobody has looked up: reserved for ever (RFC 1112), so nobody's.
UNRESOLVED = "241.0.0.1"
_WITH_PORTS = ("TCP", "UDP", "SCTP")


class Situation(NamedTuple):
    """The objects, and the node that is asked: its own addresses are in `local`. `own`: its NodePolicies; of other
    nodes, those of `node_policies` that select them."""

    cluster: Cluster
    world: PolicyWorld
    local: LocalNode
    node_policies: tuple[NodePolicy, ...] = ()
    own: OwnPolicies | None = None


class Party(NamedTuple):
    """One end, as it was asked for. `addresses`: by family. `name`: a domain name without an address that is known."""

    text: str
    kind: str  # pod, service, node, address, name
    addresses: Mapping[Family, str]
    pod: Pod | None = None
    service: Service | None = None
    node: str = ""
    name: str = ""


class EndpointLook(NamedTuple):
    """An endpoint of a Service: whether traffic may go to it now, and why not, or why."""

    address: str
    port: int
    node: str
    pod: str
    chosen: bool
    why: str


class ServiceLook(NamedTuple):
    """What a Service makes of it. `refused`: why nothing is served, "" where something is."""

    key: ObjectKey
    port: ServicePort
    kind: str
    scope: str
    endpoints: tuple[EndpointLook, ...]
    refused: str = ""


class PathLook(NamedTuple):
    """A packet to one destination, after Services. `nodes`: what NodePolicies say, where it is a node's own. `alike`:
    other backends to which the same applies."""

    traffic: Traffic
    name: str
    decision: Decision
    egress: SideLook
    ingress: SideLook
    fixes: tuple[Fix, ...]
    alike: tuple[str, ...] = ()
    nodes: tuple[NodeLook, ...] = ()

    @property
    def allowed(self) -> bool:
        """Whether everybody who is asked lets it pass."""
        return self.decision.allowed and all(look.allowed for look in self.nodes)

    @property
    def audited(self) -> bool:
        """Whether it passes, and audited policies would drop it."""
        return self.allowed and (self.decision.audited or any(look.audited for look in self.nodes))


@dataclass(frozen=True, slots=True)
class Why:
    """The whole answer. `verdict`: passes, audit, dropped, rejected, or "depends" where backends differ."""

    source: Party
    destination: Party
    protocol: str
    port: int | None
    verdict: str
    service: ServiceLook | None = None
    paths: tuple[PathLook, ...] = ()
    notes: tuple[str, ...] = field(default=())


def why(situation: Situation, source: str, destination: str, protocol: str = "", family: Family | None = None) -> Why:
    """What happens to the first packet from `source` to `destination`, "NAME:PORT".

    ConfigError says what of it cannot be understood.
    """
    target, port_text = split_port(destination)
    asked = protocol.upper()
    client = party(situation, source, is_source=True)
    server = party(situation, target, is_source=False)
    service_port = _service_port(server.service, port_text, asked) if server.service is not None else None
    asked = asked or (service_port.protocol if service_port else "TCP")
    port = _port(server, service_port, port_text, asked)
    situation = _with_name(situation, server)
    family = family or _family(client, server)
    from_, to = client.addresses[family], server.addresses.get(family, "")
    if service_port is not None:
        assert server.service is not None
        kind = FrontendKind.CLUSTER_IP
        return _served(situation, client, server, asked, from_, family, server.service, service_port, kind)
    if asked in _WITH_PORTS:
        assert port is not None
        packet = Packet(asked, End(from_, 0), End(to, port))
        local = _node_of(situation, client)
        found = None if to in local.pods else find_frontend(situation.cluster, local, packet)
        if found:
            service, one, frontend = found
            return _served(situation, client, server, asked, from_, family, service, one, frontend.kind, frontend)
        refusal = refuse(situation.cluster, local, packet)
        if refusal is not None:
            return Why(client, server, asked, port, refusal.action.value + "ed", notes=(_refused(refusal.reason),))
    traffic = Traffic(from_, to, asked, port)
    nodes = tuple(_node_looks(situation, traffic))
    path = _path(situation, traffic, server.text if server.kind == "pod" else "")._replace(nodes=nodes)
    if dropping := [look for look in nodes if not look.allowed]:
        present = (*situation.node_policies, *(policy for look in nodes for policy in look.own.policies))
        taken = {policy.key for policy in present}
        path = path._replace(fixes=(*path.fixes, *(node_fix(look, traffic, taken) for look in dropping)))
    return Why(client, server, asked, port, _verdict([path]), None, (path,), tuple(_notes(client, server)))


# -- what is asked about --------------------------------------------------------------------------------------------


def split_port(text: str) -> tuple[str, str]:
    """ "web:80" and "[fd00::1]:80"; an IPv6 address without brackets has no port."""
    if text.startswith("["):
        address, _, rest = text[1:].partition("]")
        return address, rest.removeprefix(":")
    if text.count(":") > 1:
        return text, ""
    name, _, port = text.partition(":")
    return name, port


def party(situation: Situation, text: str, *, is_source: bool) -> Party:
    """Who is meant. A name without a kind before it is looked for among pods and Services; of a destination that is
    both, the Service is meant."""
    kind, _, rest = text.partition("/")
    if kind in ("pod", "pods") and rest:
        return _named_pod(situation, rest) or _nobody(text, "pod")
    if kind in ("service", "services", "svc") and rest and not is_source:
        return _named_service(situation, rest) or _nobody(text, "Service")
    if kind in ("node", "nodes") and rest:
        return _named_node(situation, rest) or _nobody(text, "node")
    try:
        return _address(situation, str(ipaddress.ip_address(text)))
    except ValueError:
        pass
    found = (None if is_source else _named_service(situation, text)) or _named_pod(situation, text)
    found = found or _named_node(situation, text)
    if found:
        return found
    if "." in text and not is_source and "/" not in text:
        world = situation.world
        called = [*world.names.items(), *(one for told in world.told.values() for one in told.items())]
        known = {family_of(a): a for a, names in called if text.rstrip(".") in _plain(names)}
        return Party(text, "name", known or {Family.IPV4: UNRESOLVED}, name=text)
    return _nobody(text, "pod, Service, node or address" if not is_source else "pod, node or address")


def _nobody(text: str, what: str) -> Party:
    raise ConfigError(f"{text}: there is no such {what}: write NAMESPACE/NAME, or an address")


def _plain(names: Iterable[str]) -> set[str]:
    return {name.lower().rstrip(".") for name in names}


def _key(text: str) -> ObjectKey:
    namespace, slash, name = text.partition("/")
    return ObjectKey(namespace, name) if slash else ObjectKey("default", namespace)


def _named_pod(situation: Situation, text: str) -> Party | None:
    pod = situation.world.pods.get(_key(text))
    if pod is None:
        return None
    addresses = pod_addresses(pod)
    if pod.spec.host_network:
        listed = [entry.ip for entry in pod.status.pod_ips] or [pod.status.pod_ip]
        addresses = [canonical(address) for address in listed if address]
    if not addresses:
        state = f"it is {pod.status.phase}" if pod.status.phase in ("Succeeded", "Failed") else "it was given none yet"
        raise ConfigError(f"pod {pod.key} has no address: {state}")
    return Party(str(pod.key), "pod", _by_family(addresses), pod=pod, node=pod.spec.node_name)


def _named_service(situation: Situation, text: str) -> Party | None:
    """By namespace/name, or as DNS calls it: name.namespace.svc, with or without a cluster's domain."""
    parts = text.split(".")
    key = ObjectKey(parts[1], parts[0]) if len(parts) > 2 and parts[2] == "svc" else _key(text)
    service = situation.cluster.services.get(key)
    if service is None:
        return None
    addresses = _by_family(map(canonical, cluster_ips(service)))
    return Party(f"Service {key}", "service", addresses, service=service)


def _named_node(situation: Situation, text: str) -> Party | None:
    node = situation.cluster.nodes.get(ObjectKey("", text))
    if node is None:
        return None
    addresses = _by_family(node_addresses(node))
    if not addresses:
        raise ConfigError(f"node {text} has no address in its status")
    return Party(f"node {text}", "node", addresses, node=text)


def _by_family(addresses: Iterable[str]) -> dict[Family, str]:
    """The first address of each family, the first family first."""
    found: dict[Family, str] = {}
    for address in addresses:
        found.setdefault(family_of(address), address)
    return found


def _address(situation: Situation, address: str) -> Party:
    by_family = {family_of(address): address}
    pod = situation.world.pod_by_address.get(address)
    if pod is not None:
        return Party(str(pod.key), "pod", by_family, pod=pod, node=pod.spec.node_name)
    if node := _node_at(situation, address):
        return Party(f"node {node}", "node", by_family, node=node)
    return Party(address, "address", by_family)


def _service_port(service: Service, text: str, protocol: str) -> ServicePort:
    ports = [p for p in service.spec.ports if not protocol or p.protocol == protocol]
    if not text and len(ports) == 1:
        return ports[0]
    found = [p for p in ports if text in (str(p.port), p.name) and text]
    if not found:
        shown = ", ".join(f"{p.port}/{p.protocol}" + (f" ({p.name})" if p.name else "") for p in service.spec.ports)
        what = f"no port {text}" if text else "several ports: say which"
        raise ConfigError(f"Service {service.key} has {what}: there is {shown or 'none'}")
    return next((p for p in found if p.protocol == "TCP"), found[0])


def _port(server: Party, service_port: ServicePort | None, text: str, protocol: str) -> int | None:
    if service_port is not None:
        return service_port.port
    if protocol not in _WITH_PORTS:
        return None
    if text.isdecimal() and 0 < int(text) < 65536:
        return int(text)
    if text and server.pod is not None:
        for name, of, number in container_ports(server.pod):
            if (name, of) == (text, protocol):
                return number
        raise ConfigError(f"pod {server.text} has no {protocol} port named {text}")
    if text:
        raise ConfigError(f"{text}: a port is a number from 1 to 65535, or the name of a port of a pod or Service")
    raise ConfigError(f"{server.text}: say which port, as {server.text}:80, or another protocol, as --proto icmp")


def _family(client: Party, server: Party) -> Family:
    offered = server.addresses
    if server.service is not None and not offered:
        offered = dict.fromkeys((*families(server.service), *Family), "")
    for family in client.addresses:
        if family in offered:
            return family
    raise ConfigError(f"{client.text} and {server.text} have no address of the same family")


def _with_name(situation: Situation, server: Party) -> Situation:
    """A name that no answer is known for, as if one had just been given."""
    if server.kind != "name" or UNRESOLVED not in server.addresses.values():
        return situation
    names = {**situation.world.names, UNRESOLVED: [server.name]}
    return situation._replace(world=replace(situation.world, names=names))


def _notes(client: Party, server: Party) -> Iterable[str]:
    if server.kind == "name" and UNRESOLVED in server.addresses.values():
        yield (
            f"no answer for {server.name} was seen: its address is taken to be in no block but 0.0.0.0/0, "
            "and its name to be known"
        )
    if client.pod is not None and client.pod.spec.host_network:
        yield f"{client.text} has the node's address: policies about pods do not mean it"


# -- Services -------------------------------------------------------------------------------------------------------


def _node_of(situation: Situation, client: Party) -> LocalNode:
    """The node whose programs meet the packet first: that of the client, else the one that is asked."""
    local = situation.local
    if not client.node or client.node == local.facts.name:
        return local
    node = situation.cluster.nodes.get(ObjectKey("", client.node))
    zone = _zone(node) if node else ""
    pods = [pod for pod in situation.world.pods.values() if pod.spec.node_name == client.node]
    here = frozenset(address for pod in pods for address in pod_addresses(pod))
    addresses = frozenset(node_addresses(node)) if node else frozenset[str]()
    return LocalNode(NodeFacts(client.node, zone), addresses, tuple(addresses), pods=here)


def _zone(node: Node) -> str:
    return (node.metadata.labels or {}).get(ZONE_LABEL, "")


def _served(
    situation: Situation,
    client: Party,
    server: Party,
    protocol: str,
    from_: str,
    family: Family,
    service: Service,
    port: ServicePort,
    kind: FrontendKind,
    frontend: Frontend | None = None,
) -> Why:
    local = _node_of(situation, client)
    inside = kind is FrontendKind.CLUSTER_IP or client.kind in ("pod", "node")
    scope = Scope.INTERNAL if inside else Scope.EXTERNAL
    every = endpoints(situation.cluster, service, port, family)
    choice = choose(service, kind, scope, every, local.facts)
    looks = tuple(_endpoint_look(situation, service, kind, scope, one, choice, every, local) for one in every)
    refused = ""
    if not is_proxied(service) and service.spec.cluster_ip != "None":
        refused = "its frontends are not waggle's to serve"
    elif kind is FrontendKind.LOAD_BALANCER and not admits(service, local, from_):
        refused = f"loadBalancerSourceRanges do not have {from_}"
    elif not choice.endpoints:
        refused = "no endpoint may be chosen"
    view = ServiceLook(service.key, port, kind.value, scope.value, looks, refused)
    if refused:
        rejects = choice.otherwise is Otherwise.REJECT and refused == "no endpoint may be chosen"
        return Why(client, server, protocol, port.port, "rejected" if rejects else "dropped", view)
    targets = {
        Traffic(from_, canonical(look.address), protocol, look.port): look.pod or look.address
        for look in looks
        if look.chosen
    }
    paths = _paths(situation, targets)
    return Why(client, server, protocol, port.port, _verdict(paths), view, tuple(paths), tuple(_notes(client, server)))


def _endpoint_look(
    situation: Situation,
    service: Service,
    kind: FrontendKind,
    scope: Scope,
    one: Endpoint,
    choice: Choice,
    every: list[Endpoint],
    local: LocalNode,
) -> EndpointLook:
    pod = situation.world.pod_by_address.get(canonical(one.address))
    name = str(pod.key) if pod else ""
    chosen = one in choice.endpoints
    words = _endpoint_words(service, kind, scope, one, chosen, choice, every, local)
    return EndpointLook(one.address, one.port, one.node or "", name, chosen, words)


def _endpoint_words(
    service: Service,
    kind: FrontendKind,
    scope: Scope,
    one: Endpoint,
    chosen: bool,
    choice: Choice,
    every: list[Endpoint],
    local: LocalNode,
) -> str:
    external = kind is not FrontendKind.CLUSTER_IP and scope is Scope.EXTERNAL
    name = "externalTrafficPolicy" if external else "internalTrafficPolicy"
    policy = service.spec.external_traffic_policy if external else service.spec.internal_traffic_policy
    is_local = policy == "Local" and (external or kind is FrontendKind.CLUSTER_IP)
    if chosen:
        return "terminating, but nothing else serves" if one.terminating and not one.ready else ""
    if is_local and one.node != local.facts.name:
        return f"not on {local.facts.name or 'this node'}, and {name} is Local"
    if not one.ready and not (one.serving and one.terminating):
        return "not ready"
    if not one.ready:
        return "terminating, and others are ready"
    if not one.weight and any(other.weight for other in choice.endpoints):
        return "its weight is 0"
    if not is_local:
        return f"hints keep {local.facts.name or 'this node'} with closer endpoints"
    return "not chosen"


def _refused(reason: Reason | None) -> str:
    return {
        Reason.NO_PORT: "it is a Service's address, and no Service has this port there",
        Reason.FREE_ADDRESS: "it is in a range of Services' addresses, and no Service has it",
    }.get(reason or Reason.NO_BACKEND, "nothing is served there")


# -- policies -------------------------------------------------------------------------------------------------------


def _path(situation: Situation, traffic: Traffic, name: str) -> PathLook:
    world = situation.world
    decision = decide(world, traffic.source, traffic.destination, traffic.protocol, traffic.port)
    return PathLook(
        traffic,
        name,
        decision,
        look(world, Direction.EGRESS, traffic),
        look(world, Direction.INGRESS, traffic),
        tuple(fixes(world, traffic)),
    )


def _node_looks(situation: Situation, traffic: Traffic) -> Iterator[NodeLook]:
    """What is a node's own, and comes or goes by an uplink: not what it says to itself, or to pods that run there."""
    source, destination = _node_at(situation, traffic.source), _node_at(situation, traffic.destination)
    ends = (
        (Direction.EGRESS, source, destination, traffic.destination),
        (Direction.INGRESS, destination, source, traffic.source),
    )
    for direction, own, other, peer in ends:
        pod = situation.world.pod_by_address.get(peer)
        if not own or own == other or (pod is not None and pod.spec.node_name == own):
            continue
        look = look_node(situation.world, own, _policies_of(situation, own), direction, traffic)
        if look is not None:
            yield look


def _node_at(situation: Situation, address: str) -> str:
    """The node that has an address; "" for none."""
    if address in situation.local.addresses:
        return situation.local.facts.name
    return next((key.name for key, node in situation.cluster.nodes.items() if address in node_addresses(node)), "")


def _policies_of(situation: Situation, name: str) -> OwnPolicies:
    if situation.own is not None and name == situation.local.facts.name:
        return situation.own
    node = situation.cluster.nodes.get(ObjectKey("", name))
    labels = (node.metadata.labels or {}) if node is not None else {}
    return OwnPolicies(tuple(of_node(situation.node_policies, labels).values()))


def _paths(situation: Situation, targets: Mapping[Traffic, str]) -> list[PathLook]:
    """Of backends to which the same applies, the first is looked at: a Service may have thousands."""
    groups: dict[object, list[Traffic]] = {}
    for traffic in targets:
        decision = decide(situation.world, *traffic)
        groups.setdefault(tuple(side._replace(pod=None) for side in decision), []).append(traffic)
    return [
        _path(situation, first, targets[first])._replace(alike=tuple(targets[other] for other in others))
        for first, *others in groups.values()
    ]


def _verdict(paths: Iterable[PathLook]) -> str:
    found = {"dropped" if not p.allowed else "audit" if p.audited else "passes" for p in paths}
    return found.pop() if len(found) == 1 else "depends"
