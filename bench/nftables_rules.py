"""The table that kube-proxy 1.36 gives to `nft -f`, for Services without affinity.

Structure and order are those of pkg/proxy/nftables/proxier.go (setupNFTables, syncProxyRules): base chains and their
priorities, sets and verdict maps, a chain per Service port whose one rule draws an endpoint from a map. IPv4; NodePorts
on every address but 127/8; local traffic is what comes from `pod_cidr` (--detect-local-mode=ClusterCIDR).

Pure functions from Service ports to text.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence

from bench.service_ports import ServicePort

TABLE = "ip kube-proxy"
_MARK = "0x004000"
_MASQUERADE = f"mark set mark or {_MARK}"

#: name, type, hook, priority
_BASE_CHAINS = (
    ("filter-prerouting-pre-dnat", "filter", "prerouting", "-110"),
    ("filter-output-pre-dnat", "filter", "output", "-110"),
    ("filter-input", "filter", "input", "0"),
    ("filter-forward", "filter", "forward", "0"),
    ("filter-output", "filter", "output", "0"),
    ("nat-prerouting", "nat", "prerouting", "-100"),
    ("nat-output", "nat", "output", "-100"),
    ("nat-postrouting", "nat", "postrouting", "100"),
)
#: target, source, match
_JUMPS = (
    ("nodeport-endpoints-check", "filter-input", "ct state new "),
    ("service-endpoints-check", "filter-input", "ct state new "),
    ("service-endpoints-check", "filter-forward", "ct state new "),
    ("service-endpoints-check", "filter-output", "ct state new "),
    ("firewall-check", "filter-prerouting-pre-dnat", "ct state new "),
    ("firewall-check", "filter-output-pre-dnat", "ct state new "),
    ("services", "nat-output", ""),
    ("services", "nat-prerouting", ""),
    ("masquerading", "nat-postrouting", ""),
    ("cluster-ips-check", "filter-forward", "ct state new "),
    ("cluster-ips-check", "filter-output", "ct state new "),
)
_ADDRESS_PORT = "ipv4_addr . inet_proto . inet_service"
#: kind, name, type
_TABLES = (
    ("set", "hairpin-connections", f"ipv4_addr . {_ADDRESS_PORT}"),
    ("set", "cluster-ips", "ipv4_addr"),
    ("map", "no-endpoint-services", f"{_ADDRESS_PORT} : verdict"),
    ("map", "no-endpoint-nodeports", "inet_proto . inet_service : verdict"),
    ("map", "firewall-ips", f"{_ADDRESS_PORT} : verdict"),
    ("map", "service-ips", f"{_ADDRESS_PORT} : verdict"),
    ("map", "service-nodeports", "inet_proto . inet_service : verdict"),
)


def full_sync(ports: Sequence[ServicePort], pod_cidr: str, service_cidr: str) -> str:
    """Everything, from an empty table on."""
    return setup(pod_cidr, service_cidr) + added(ports)


def setup(pod_cidr: str, service_cidr: str) -> str:
    """The table without any Service."""
    return "\n".join(_setup(pod_cidr, service_cidr)) + "\n"


def added(ports: Sequence[ServicePort]) -> str:
    """Service ports that the table does not have yet."""
    lines = [f"add chain {TABLE} {name}" for port in ports for name in _chains(port)]
    for port in ports:
        lines += _elements(port)
        lines += _rules(port)
    return "\n".join(lines) + "\n"


def partial_sync(changed: Iterable[ServicePort]) -> str:
    """The Service ports whose endpoints changed: their chains are written again; maps hold the same elements."""
    lines = []
    for port in changed:
        for name in _chains(port):
            lines += [f"add chain {TABLE} {name}", f"flush chain {TABLE} {name}"]
        lines += _rules(port)
    return "\n".join(lines) + "\n"


def _setup(pod_cidr: str, service_cidr: str) -> Iterable[str]:
    yield f'add table {TABLE} {{ comment "rules for kube-proxy" ; }}'
    for name, kind, hook, priority in _BASE_CHAINS:
        yield f"add chain {TABLE} {name} {{ type {kind} hook {hook} priority {priority} ; }}"
        yield f"flush chain {TABLE} {name}"
    for target in dict.fromkeys([*(jump[0] for jump in _JUMPS), "reject-chain"]):
        yield f"add chain {TABLE} {target}"
        yield f"flush chain {TABLE} {target}"
    for target, source, match in _JUMPS:
        yield f"add rule {TABLE} {source} {match}jump {target}"
    for kind, name, types in _TABLES:
        yield f"add {kind} {TABLE} {name} {{ type {types} ; }}"
    rules = (
        ("masquerading", f"mark and {_MARK} != 0 mark set mark xor {_MARK} masquerade fully-random"),
        (
            "masquerading",
            "ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random",
        ),
        ("cluster-ips-check", "ip daddr @cluster-ips reject"),
        ("cluster-ips-check", f"ip daddr {{ {service_cidr} }} drop"),
        ("reject-chain", "reject"),
        ("service-endpoints-check", "ip daddr . meta l4proto . th dport vmap @no-endpoint-services"),
        (
            "nodeport-endpoints-check",
            "ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @no-endpoint-nodeports",
        ),
        ("firewall-check", "ip daddr . meta l4proto . th dport vmap @firewall-ips"),
        ("services", f"ip daddr @cluster-ips ip saddr != {pod_cidr} {_MASQUERADE}"),
        ("services", "ip daddr . meta l4proto . th dport vmap @service-ips"),
        (
            "services",
            "fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports",
        ),
    )
    for chain, rule in rules:
        yield f"add rule {TABLE} {chain} {rule}"


def _elements(port: ServicePort) -> Iterable[str]:
    protocol = port.protocol.lower()
    yield f"add element {TABLE} cluster-ips {{ {port.cluster_ip} }}"
    to = f"{port.cluster_ip} . {protocol} . {port.port}"
    if not port.endpoints:
        yield f'add element {TABLE} no-endpoint-services {{ {to} comment "{port}" : goto reject-chain }}'
        if port.node_port:
            yield (
                f"add element {TABLE} no-endpoint-nodeports "
                f'{{ {protocol} . {port.node_port} comment "{port}" : goto reject-chain }}'
            )
        return
    yield f"add element {TABLE} service-ips {{ {to} : goto {_chain('service', port)} }}"
    if port.node_port:
        yield (
            f"add element {TABLE} service-nodeports "
            f"{{ {protocol} . {port.node_port} : goto {_chain('external', port)} }}"
        )
    for endpoint in port.endpoints:
        if endpoint.local:
            pair = f"{endpoint.address} . {endpoint.address} . {protocol} . {endpoint.port}"
            yield f"add element {TABLE} hairpin-connections {{ {pair} }}"


def _rules(port: ServicePort) -> Iterable[str]:
    if not port.endpoints:
        return
    service = _chain("service", port)
    if port.node_port:
        external = _chain("external", port)
        yield f'add rule {TABLE} {external} {_MASQUERADE} comment "masquerade"'
        yield f"add rule {TABLE} {external} goto {service}"
    choices = " , ".join(f"{i} : {e.address} . {e.port}" for i, e in enumerate(port.endpoints))
    yield (
        f"add rule {TABLE} {service} meta l4proto {port.protocol.lower()} dnat ip addr . port to "
        f"numgen random mod {len(port.endpoints)} map {{ {choices} }}"
    )


def _chains(port: ServicePort) -> list[str]:
    kinds = ("service", "external") if port.node_port else ("service",)
    return [_chain(kind, port) for kind in kinds] if port.endpoints else []


def _chain(kind: str, port: ServicePort) -> str:
    """As service-HASH-namespace/name/protocol/port; the hash keeps a name unique that has to be cut."""
    name = f"{port.namespace}/{port.name}/{port.protocol.lower()}/{port.port_name}"
    return f"{kind}-{base64.b32encode(hashlib.sha256(name.encode()).digest())[:8].decode()}-{name}"
