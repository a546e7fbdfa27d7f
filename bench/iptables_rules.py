"""The rules that kube-proxy 1.36 gives to iptables-restore, for Services without affinity.

Structure and order are those of pkg/proxy/iptables/proxier.go (syncProxyRules): which chains there are, what jumps
where, what a partial sync leaves out, and that comments on endpoints are dropped above 1,000 of them. IPv4; NodePorts
on every address but 127/8; local traffic is what comes from `pod_cidr` (--detect-local-mode=ClusterCIDR).

Pure functions from Service ports to text. kube-proxy makes the jumps from the built-in chains with single calls of
`iptables`; here they are the text of `jumps()`, applied once before the first sync.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterable, Sequence

from bench.service_ports import Endpoint, ServicePort

_LARGE_CLUSTER = 1000  # endpoints above which comments on their rules are dropped
_MARK = "0x004000/0x004000"

_FILTER_CHAINS = ("KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-FORWARD", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL")
_NAT_CHAINS = ("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ")
_NEW = "-m conntrack --ctstate NEW "
_FILTER_JUMPS = (
    ("INPUT", "KUBE-EXTERNAL-SERVICES", "kubernetes externally-visible service portals", _NEW),
    ("FORWARD", "KUBE-EXTERNAL-SERVICES", "kubernetes externally-visible service portals", _NEW),
    ("INPUT", "KUBE-NODEPORTS", "kubernetes health check service ports", ""),
    ("FORWARD", "KUBE-SERVICES", "kubernetes service portals", _NEW),
    ("OUTPUT", "KUBE-SERVICES", "kubernetes service portals", _NEW),
    ("FORWARD", "KUBE-FORWARD", "kubernetes forwarding rules", ""),
    ("INPUT", "KUBE-PROXY-FIREWALL", "kubernetes load balancer firewall", _NEW),
    ("OUTPUT", "KUBE-PROXY-FIREWALL", "kubernetes load balancer firewall", _NEW),
    ("FORWARD", "KUBE-PROXY-FIREWALL", "kubernetes load balancer firewall", _NEW),
    ("INPUT", "KUBE-FIREWALL", "", ""),
    ("OUTPUT", "KUBE-FIREWALL", "", ""),
)
_NAT_JUMPS = (
    ("OUTPUT", "KUBE-SERVICES", "kubernetes service portals", ""),
    ("PREROUTING", "KUBE-SERVICES", "kubernetes service portals", ""),
    ("POSTROUTING", "KUBE-POSTROUTING", "kubernetes postrouting rules", ""),
)


def jumps() -> str:
    """From the built-in chains to kube-proxy's, each put first in its chain, in kube-proxy's order."""
    text = []
    for table, chains, rules in (
        ("filter", (*_FILTER_CHAINS, "KUBE-FIREWALL"), _FILTER_JUMPS),
        ("nat", _NAT_CHAINS, _NAT_JUMPS),
    ):
        text.append(f"*{table}")
        text += [f":{chain} - [0:0]" for chain in chains]
        for source, target, comment, match in rules:
            said = f'-m comment --comment "{comment}" ' if comment else ""
            text.append(f"-I {source} {match}{said}-j {target}")
        text.append("COMMIT")
    return "\n".join(text) + "\n"


def sync(ports: Sequence[ServicePort], pod_cidr: str, changed: Collection[str] | None = None) -> str:
    """What one sync restores. `changed`: `str()` of the ports whose chains a partial sync writes; None: a full sync.

    A partial sync still writes KUBE-SERVICES and KUBE-NODEPORTS, with one rule for every Service.
    """
    comments = sum(len(port.endpoints) for port in ports) <= _LARGE_CLUSTER
    filter_rules: list[str] = []
    chains = [f":{chain} - [0:0]" for chain in _NAT_CHAINS]
    rules = [
        f"-A KUBE-POSTROUTING -m mark ! --mark {_MARK} -j RETURN",
        f"-A KUBE-POSTROUTING -j MARK --xor-mark {_MARK.partition('/')[0]}",
        '-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" '
        "-j MASQUERADE --random-fully",
        f"-A KUBE-MARK-MASQ -j MARK --or-mark {_MARK.partition('/')[0]}",
    ]
    for port in ports:
        _dispatch(port, filter_rules, rules)
        if port.endpoints and (changed is None or str(port) in changed):
            _service(port, pod_cidr, comments, chains, rules)
    rules.append(
        '-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this '
        'chain" -m addrtype --dst-type LOCAL ! -d 127.0.0.0/8 -j KUBE-NODEPORTS'
    )
    filter_rules += [
        "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP",
        f'-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark {_MARK} -j ACCEPT',
        '-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" '
        "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
    ]
    filter_chains = [f":{chain} - [0:0]" for chain in _FILTER_CHAINS]
    return "\n".join(["*filter", *filter_chains, *filter_rules, "COMMIT", "*nat", *chains, *rules, "COMMIT", ""])


def _dispatch(port: ServicePort, filter_rules: list[str], rules: list[str]) -> None:
    """The rules in chains that every sync writes whole: from an address or a NodePort to the Service's chains."""
    to = _to_cluster_ip(port)
    if not port.endpoints:
        said = f'-m comment --comment "{port} has no endpoints"'
        filter_rules.append(f"-A KUBE-SERVICES {said} {to} -j REJECT")
        if port.node_port:
            filter_rules.append(
                f"-A KUBE-EXTERNAL-SERVICES {said} -m addrtype --dst-type LOCAL {_to_node_port(port)} -j REJECT"
            )
        return
    rules.append(f'-A KUBE-SERVICES -m comment --comment "{port} cluster IP" {to} -j {_chain("SVC", port)}')
    if port.node_port:
        rules.append(f"-A KUBE-NODEPORTS -m comment --comment {port} {_to_node_port(port)} -j {_chain('EXT', port)}")


def _service(port: ServicePort, pod_cidr: str, comments: bool, chains: list[str], rules: list[str]) -> None:
    """The chains of one Service port: SVC, EXT when it has a NodePort, SEP for every endpoint."""
    service = _chain("SVC", port)
    rules.append(
        f'-A {service} -m comment --comment "{port} cluster IP" {_to_cluster_ip(port)} ! -s {pod_cidr} '
        "-j KUBE-MARK-MASQ"
    )
    if port.node_port:
        external = _chain("EXT", port)
        chains.append(f":{external} - [0:0]")
        rules.append(
            f'-A {external} -m comment --comment "masquerade traffic for {port} external destinations" '
            "-j KUBE-MARK-MASQ"
        )
        rules.append(f"-A {external} -j {service}")
    chains.append(f":{service} - [0:0]")
    rules += _choices(port, service, comments)
    protocol = port.protocol.lower()
    for endpoint in port.endpoints:
        chain = _endpoint_chain(port, endpoint)
        said = f" -m comment --comment {port}" if comments else ""
        chains.append(f":{chain} - [0:0]")
        rules.append(f"-A {chain}{said} -s {endpoint.address} -j KUBE-MARK-MASQ")
        to = f"{endpoint.address}:{endpoint.port}"
        rules.append(f"-A {chain}{said} -m {protocol} -p {protocol} -j DNAT --to-destination {to}")


def _choices(port: ServicePort, service: str, comments: bool) -> Iterable[str]:
    """One rule per endpoint; each is taken with a probability that makes all equally likely."""
    left = len(port.endpoints)
    for endpoint in port.endpoints:
        said = f' -m comment --comment "{port} -> {endpoint.address}:{endpoint.port}"' if comments else ""
        chance = f" -m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
        yield f"-A {service}{said}{chance} -j {_endpoint_chain(port, endpoint)}"
        left -= 1


def _to_cluster_ip(port: ServicePort) -> str:
    protocol = port.protocol.lower()
    return f"-m {protocol} -p {protocol} -d {port.cluster_ip} --dport {port.port}"


def _to_node_port(port: ServicePort) -> str:
    protocol = port.protocol.lower()
    return f"-m {protocol} -p {protocol} --dport {port.node_port}"


def _chain(kind: str, port: ServicePort) -> str:
    return f"KUBE-{kind}-{_hash(f'{port}{port.protocol.lower()}')}"


def _endpoint_chain(port: ServicePort, endpoint: Endpoint) -> str:
    return f"KUBE-SEP-{_hash(f'{port}{port.protocol.lower()}{endpoint.address}:{endpoint.port}')}"


def _hash(text: str) -> str:
    """16 characters: with a prefix, chain names stay below the limit of 28."""
    return base64.b32encode(hashlib.sha256(text.encode()).digest())[:16].decode()
