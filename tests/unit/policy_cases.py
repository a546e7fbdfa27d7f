"""Specs of policies that an apiserver takes, and some that it refuses, with a part of what waggle says of them.

Each was sent to a kube-apiserver 1.36 with the CRD of deploy/, which agrees about every one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Spec = dict[str, Any]


class Refused(NamedTuple):
    """`path` is the value at fault, as it stands in the message."""

    spec: Spec
    path: str
    reason: str


def ingress(*peers: Spec, ports: list[Spec] | None = None, **spec: Any) -> Spec:
    """The spec of a NetworkPolicy with one rule."""
    rule: Spec = {"from": list(peers)} if peers else {}
    return {"podSelector": {}, "ingress": [rule | ({"ports": ports} if ports else {})], **spec}


def port(**fields: Any) -> Spec:
    return ingress(ports=[fields])


def block(cidr: str, *parts: str) -> Spec:
    return ingress({"ipBlock": {"cidr": cidr} | ({"except": list(parts)} if parts else {})})


def needs(**fields: Any) -> Spec:
    return {"podSelector": {"matchExpressions": [{"key": "app", **fields}]}}


NETWORK_POLICIES: dict[str, Spec] = {
    "empty": {"podSelector": {}},
    "types": {"podSelector": {}, "policyTypes": ["Egress", "Ingress"]},
    "labels": {"podSelector": {"matchLabels": {"app": "web", "example.com/tier": ""}}},
    "in": needs(operator="In", values=["a", "b"]),
    "not in": needs(operator="NotIn", values=[""]),
    "exists": needs(operator="Exists"),
    "does not exist": needs(operator="DoesNotExist", values=[]),
    "nobody": ingress(),
    "peers": ingress(
        {"podSelector": {}},
        {"namespaceSelector": {}},
        {"podSelector": {}, "namespaceSelector": {"matchLabels": {"a": "b"}}},
        {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.2.3.4/32"]}},
        {"ipBlock": {"cidr": "fd00::/8", "except": ["fd00::1/128"]}},
        {"ipBlock": {"cidr": "0.0.0.0/0"}},
        {"ipBlock": {"cidr": "192.0.2.1/32"}},
    ),
    "any port": ingress(ports=[{}]),
    "ports": ingress(
        ports=[
            {"port": 80},
            {"port": 80, "protocol": "UDP"},
            {"protocol": "SCTP"},
            {"port": "http"},
            {"port": 1, "endPort": 65535},
            {"port": 5, "endPort": 5},
        ]
    ),
    "egress": {"podSelector": {}, "egress": [{"to": [{"podSelector": {}}], "ports": [{"port": 53}]}, {}]},
}

BAD_NETWORK_POLICIES: dict[str, Refused] = {
    "type": Refused({"podSelector": {}, "policyTypes": ["ingress"]}, "spec.policyTypes[0]", "one of Ingress, Egress"),
    "types": Refused(
        {"podSelector": {}, "policyTypes": ["Ingress", "Egress", "Ingress"]}, "spec.policyTypes", "only Ingress and"
    ),
    "label": Refused(
        {"podSelector": {"matchLabels": {"app": "not a value"}}}, "spec.podSelector.matchLabels.app", "label value"
    ),
    "label key": Refused(
        {"podSelector": {"matchLabels": {"/a": "b"}}}, "spec.podSelector.matchLabels['/a']", "label key"
    ),
    "operator": Refused(needs(operator="in", values=["a"]), "matchExpressions[0].operator", "one of In, NotIn"),
    "no values": Refused(needs(operator="In"), "matchExpressions[0].values", "must not be empty with operator In"),
    "values": Refused(needs(operator="Exists", values=["a"]), "matchExpressions[0].values", "left out with operator"),
    "value": Refused(needs(operator="NotIn", values=["a", "-b"]), "matchExpressions[0].values[1]", "label value"),
    "no key": Refused(
        {"podSelector": {"matchExpressions": [{"key": "", "operator": "Exists"}]}},
        "spec.podSelector.matchExpressions[0].key",
        "label key",
    ),
    "empty peer": Refused(ingress({}), "spec.ingress[0].from[0]", "an empty entry is nobody"),
    "block and pods": Refused(
        ingress({"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}), "spec.ingress[0].from[0].ipBlock", "alone"
    ),
    "selector of a peer": Refused(
        ingress({"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Near"}]}}),
        "spec.ingress[0].from[0].namespaceSelector.matchExpressions[0].operator",
        "one of In, NotIn",
    ),
    "no range": Refused(block("10.0.0.0"), "spec.ingress[0].from[0].ipBlock.cidr", "10.0.0.0/32"),
    "a name": Refused(block("example.com/8"), "ipBlock.cidr", "is not an address range"),
    "long prefix": Refused(block("10.0.0.0/33"), "ipBlock.cidr", "is not an address range"),
    "leading zeros": Refused(block("010.0.0.0/8"), "ipBlock.cidr", "is not an address range"),
    "bits": Refused(block("10.1.0.0/8"), "ipBlock.cidr", "the range is 10.0.0.0/8"),
    "mapped": Refused(block("::ffff:10.0.0.0/104"), "ipBlock.cidr", "write it as IPv4"),
    "no cidr": Refused(block(""), "ipBlock.cidr", "is not an address range"),
    "except elsewhere": Refused(block("10.0.0.0/8", "11.0.0.0/16"), "ipBlock.except[0]", "is not a part of 10.0.0.0/8"),
    "except all": Refused(block("10.0.0.0/8", "10.1.0.0/16", "10.0.0.0/8"), "ipBlock.except[1]", "not a part of"),
    "except more": Refused(block("10.0.0.0/16", "10.0.0.0/8"), "ipBlock.except[0]", "not a part of"),
    "except other family": Refused(block("10.0.0.0/8", "fd00::/16"), "ipBlock.except[0]", "not a part of"),
    "except nonsense": Refused(block("10.0.0.0/8", "most"), "ipBlock.except[0]", "is not an address range"),
    "port 0": Refused(port(port=0), "spec.ingress[0].ports[0].port", "between 1 and 65535"),
    "port": Refused(port(port=65536), "ports[0].port", "between 1 and 65535"),
    "port name": Refused(port(port="http--alt"), "ports[0].port", "port name"),
    "port in quotes": Refused(port(port="80"), "ports[0].port", "write the number without quotes"),
    "protocol": Refused(port(port=80, protocol="tcp"), "ports[0].protocol", "in capital letters"),
    "icmp": Refused(port(protocol="ICMP"), "ports[0].protocol", "TCP, UDP or SCTP, not 'ICMP'"),
    "end without port": Refused(port(endPort=80), "ports[0].endPort", "there is no port"),
    "end of a name": Refused(port(port="http", endPort=80), "ports[0].endPort", "a port that has a name"),
    "end below": Refused(port(port=80, endPort=79), "ports[0].endPort", "lower than port, which is 80"),
    "end": Refused(port(port=80, endPort=65536), "ports[0].endPort", "between 1 and 65535"),
    "egress": Refused(
        {"podSelector": {}, "egress": [{"to": [{}]}]}, "spec.egress[0].to[0]", "an empty entry is nobody"
    ),
}


def cluster(**spec: Any) -> Spec:
    """The spec of a ClusterNetworkPolicy."""
    return {"tier": "Admin", "priority": 10, "subject": {"namespaces": {}}, **spec}


ALL: Spec = {"namespaces": {}}


def egress(*peers: Spec, action: str = "Accept", **rule: Any) -> Spec:
    return cluster(egress=[{"action": action, "to": list(peers), **rule}])


def protocols(*given: Spec) -> Spec:
    return cluster(ingress=[{"action": "Deny", "from": [ALL], "protocols": list(given)}])


def tcp(**destination: Any) -> Spec:
    return {"tcp": {"destinationPort": destination}}


CLUSTER_NETWORK_POLICIES: dict[str, Spec] = {
    "no rules": cluster(),
    "baseline": cluster(tier="Baseline", priority=0, ingress=[], egress=[]),
    "pods": cluster(priority=1000, subject={"pods": {"podSelector": {"matchLabels": {"app": "web"}}}}),
    "pods of namespaces": cluster(
        subject={"pods": {"podSelector": {}, "namespaceSelector": {"matchLabels": {"tier": "front"}}}}
    ),
    "ingress": cluster(
        ingress=[
            {"name": "x" * 100, "action": "Pass", "from": [ALL]},
            {"action": "Deny", "from": [{"pods": {"podSelector": {}}}] * 25},
        ]
    ),
    "peers": egress(
        ALL, {"pods": {"podSelector": {}}}, {"nodes": {"matchLabels": {"a": "b"}}}, {"networks": ["10.0.0.0/8", "::/0"]}
    ),
    "names": egress({"domainNames": ["example.com", "*.Example.com", "a-b.c_d.example.com."]}),
    "protocols": protocols(
        tcp(number=80),
        {"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}},
        {"sctp": tcp(number=1)["tcp"]},
    ),
    "named port": egress(ALL, {"pods": {"podSelector": {}}}, protocols=[{"destinationNamedPort": "http"}]),
    "25 rules": cluster(ingress=[{"action": "Pass", "from": [ALL]}] * 25),
}

BAD_CLUSTER_NETWORK_POLICIES: dict[str, Refused] = {
    "tier": Refused(cluster(tier="NetworkPolicy"), "spec.tier", "one of Admin, Baseline"),
    "priority": Refused(cluster(priority=1001), "spec.priority", "between 0 and 1000"),
    "negative": Refused(cluster(priority=-1), "spec.priority", "between 0 and 1000"),
    "no subject": Refused(cluster(subject={}), "spec.subject", "exactly one of namespaces, pods; there is none"),
    "two subjects": Refused(
        cluster(subject={"namespaces": {}, "pods": {"podSelector": {}}}), "spec.subject", "namespaces and pods"
    ),
    "26 rules": Refused(cluster(egress=[{"action": "Deny", "to": [ALL]}] * 26), "spec.egress", "26 entries; 25 are"),
    "26 peers": Refused(egress(*[ALL] * 26), "spec.egress[0].to", "26 entries; 25 are"),
    "no peers": Refused(egress(), "spec.egress[0].to", "must not be empty"),
    "no from": Refused(cluster(ingress=[{"action": "Deny"}]), "spec.ingress[0].from", "must not be empty"),
    "action": Refused(egress(ALL, action="Allow"), "spec.egress[0].action", "one of Accept, Deny, Pass"),
    "name": Refused(egress(ALL, name="x" * 101), "spec.egress[0].name", "100 characters at most"),
    "empty peer": Refused(egress({}), "spec.egress[0].to[0]", "exactly one of namespaces, pods, nodes, networks"),
    "two peers": Refused(egress({"namespaces": {}, "nodes": {}}), "spec.egress[0].to[0]", "namespaces and nodes"),
    "empty ingress peer": Refused(
        cluster(ingress=[{"action": "Deny", "from": [{}]}]), "spec.ingress[0].from[0]", "one of namespaces, pods; there"
    ),
    "ingress from nodes": Refused(
        cluster(ingress=[{"action": "Deny", "from": [{"nodes": {}}]}]), "spec.ingress[0].from[0].nodes", "egress rules"
    ),
    "ingress from networks": Refused(
        cluster(ingress=[{"action": "Deny", "from": [{"networks": ["10.0.0.0/8"]}]}]),
        "spec.ingress[0].from[0].networks",
        "egress rules alone",
    ),
    "network": Refused(egress({"networks": ["10.0.0.0"]}), "spec.egress[0].to[0].networks[0]", "10.0.0.0/32"),
    "network twice": Refused(egress({"networks": ["::/0", "::/0"]}), "to[0].networks[1]", "given twice"),
    "no networks": Refused(egress({"networks": []}), "to[0].networks", "must not be empty"),
    "names denied": Refused(egress({"domainNames": ["example.com"]}, action="Deny"), "domainNames", "action Accept"),
    "names passed": Refused(egress({"domainNames": ["example.com"]}, action="Pass"), "domainNames", "action Accept"),
    "one label": Refused(egress({"domainNames": ["localhost"]}), "domainNames[0]", "is not a domain name"),
    "star": Refused(egress({"domainNames": ["*"]}), "domainNames[0]", "is not a domain name"),
    "star inside": Refused(egress({"domainNames": ["www.*.com"]}), "domainNames[0]", "is not a domain name"),
    "part star": Refused(egress({"domainNames": ["*a.example.com"]}), "domainNames[0]", "is not a domain name"),
    "newline": Refused(egress({"domainNames": ["example.com\n"]}), "domainNames[0]", "is not a domain name"),
    "no protocols": Refused(protocols(), "spec.ingress[0].protocols", "must not be empty"),
    "empty protocol": Refused(protocols({}), "protocols[0]", "exactly one of tcp, udp, sctp, destinationNamedPort"),
    "two protocols": Refused(
        protocols({"tcp": tcp(number=1)["tcp"], "udp": tcp(number=1)["tcp"]}), "protocols[0]", "tcp and udp"
    ),
    "empty tcp": Refused(protocols({"tcp": {}}), "protocols[0].tcp", "all ports are the range"),
    "empty port": Refused(protocols(tcp()), "protocols[0].tcp.destinationPort", "exactly one of number, range"),
    "number and range": Refused(
        protocols(tcp(number=1, range={"start": 1, "end": 2})), "tcp.destinationPort", "number and range"
    ),
    "port": Refused(protocols(tcp(number=0)), "destinationPort.number", "between 1 and 65535"),
    "range end": Refused(
        protocols(tcp(range={"start": 1, "end": 65536})), "destinationPort.range.end", "between 1 and 65535"
    ),
    "empty range": Refused(protocols(tcp(range={"start": 5, "end": 5})), "destinationPort.range", "lower than end (5)"),
    "named port of networks": Refused(
        egress({"networks": ["::/0"]}, protocols=[{"destinationNamedPort": "http"}]),
        "spec.egress[0].to[0].networks",
        "ports have names on pods alone",
    ),
    "named port of nodes": Refused(
        egress(ALL, {"nodes": {}}, protocols=[{"destinationNamedPort": "http"}]),
        "spec.egress[0].to[1].nodes",
        "ports have names on pods alone",
    ),
    "named port of names": Refused(
        egress({"domainNames": ["example.com"]}, protocols=[{"destinationNamedPort": "http"}]),
        "spec.egress[0].to[0].domainNames",
        "ports have names on pods alone",
    ),
}
