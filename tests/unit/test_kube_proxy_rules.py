"""The rule sets that the benchmark compares with: the chains, maps and order of kube-proxy, and its names of them."""

from __future__ import annotations

import re

import pytest
from bench import iptables_rules, nftables_rules
from bench.service_ports import Endpoint, ServicePort, filler, made_up_endpoints

POD_CIDR, SERVICE_CIDR = "10.244.0.0/16", "10.96.0.0/12"


def port(**changes) -> ServicePort:
    """ns1/svc1:p80 with two endpoints, the first of them on this node."""
    fields = {
        "namespace": "ns1",
        "name": "svc1",
        "port_name": "p80",
        "protocol": "TCP",
        "cluster_ip": "10.96.0.41",
        "port": 80,
        "endpoints": [Endpoint("10.180.0.1", 80, local=True), Endpoint("10.180.0.2", 80)],
    }
    return ServicePort(**(fields | changes))


def chains(text: str, table: str = "nat") -> dict[str, list[str]]:
    """Rules of iptables-restore input by chain, in order, without comments."""
    found: dict[str, list[str]] = {}
    part = re.search(rf"^\*{table}\n(.*?)^COMMIT$", text, re.MULTILINE | re.DOTALL)
    assert part is not None
    for line in part[1].splitlines():
        if line.startswith(":"):
            found.setdefault(line[1:].split()[0], [])
        else:
            _, chain, rule = line.split(" ", 2)
            found[chain].append(re.sub(r'-m comment --comment ("[^"]*"|\S+) ', "", rule))  # KeyError: no such chain
    return found


def nft_rules(text: str) -> dict[str, list[str]]:
    """Rules by chain, in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"add (chain|rule) ip kube-proxy (\S+) ?(.*)", line):
            kind, chain, rest = match.groups()
            if kind == "chain":
                found.setdefault(chain, [])
            else:
                found[chain].append(rest)  # KeyError: no such chain
    return found


# names: those that kube-proxy's own tests expect for the same Service
SVC, SEP = "KUBE-SVC-XPGD46QRK7WJZT7O", "KUBE-SEP-SXIVWICOYRO3J4NJ"
NFT_SERVICE = "service-ULMVA6XW-ns1/svc1/tcp/p80"


def test_iptables_cluster_ip() -> None:
    found = chains(iptables_rules.sync([port()], POD_CIDR))
    other = next(name for name in found if name.startswith("KUBE-SEP-") and name != SEP)
    assert found["KUBE-SERVICES"] == [
        f"-m tcp -p tcp -d 10.96.0.41 --dport 80 -j {SVC}",
        "-m addrtype --dst-type LOCAL ! -d 127.0.0.0/8 -j KUBE-NODEPORTS",
    ]
    assert found[SVC] == [
        f"-m tcp -p tcp -d 10.96.0.41 --dport 80 ! -s {POD_CIDR} -j KUBE-MARK-MASQ",
        f"-m statistic --mode random --probability 0.5000000000 -j {SEP}",
        f"-j {other}",
    ]
    assert found[SEP] == [
        "-s 10.180.0.1 -j KUBE-MARK-MASQ",
        "-m tcp -p tcp -j DNAT --to-destination 10.180.0.1:80",
    ]
    assert found["KUBE-NODEPORTS"] == []
    assert found["KUBE-POSTROUTING"][-1] == "-j MASQUERADE --random-fully"


def test_iptables_node_port_is_masqueraded() -> None:
    found = chains(iptables_rules.sync([port(node_port=30080)], POD_CIDR))
    external = SVC.replace("SVC", "EXT")
    assert found["KUBE-NODEPORTS"] == [f"-m tcp -p tcp --dport 30080 -j {external}"]
    assert found[external] == ["-j KUBE-MARK-MASQ", f"-j {SVC}"]


def test_iptables_without_endpoints_rejects() -> None:
    text = iptables_rules.sync([port(endpoints=[], node_port=30080)], POD_CIDR)
    assert chains(text, "filter")["KUBE-SERVICES"] == ["-m tcp -p tcp -d 10.96.0.41 --dport 80 -j REJECT"]
    assert chains(text, "filter")["KUBE-EXTERNAL-SERVICES"] == [
        "-m addrtype --dst-type LOCAL -m tcp -p tcp --dport 30080 -j REJECT"
    ]
    assert not [name for name in chains(text) if re.match("KUBE-(SVC|SEP|EXT)-", name)]


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_iptables_every_endpoint_is_equally_likely(count: int) -> None:
    found = chains(iptables_rules.sync([filler(0, made_up_endpoints(0, count))], POD_CIDR))
    service = next(rules for name, rules in found.items() if name.startswith("KUBE-SVC-"))
    left, shares = 1.0, []
    for rule in service[1:]:
        match = re.search(r"--probability (\S+)", rule)
        chance = float(match[1]) if match else 1.0
        shares.append(left * chance)
        left *= 1 - chance
    assert shares == pytest.approx([1 / count] * count)


def test_iptables_partial_sync_dispatches_to_all_and_writes_the_chains_of_the_changed() -> None:
    ports = [filler(number, made_up_endpoints(number, 2)) for number in range(5)]
    full, partial = (chains(iptables_rules.sync(ports, POD_CIDR, changed)) for changed in (None, {str(ports[3])}))
    assert partial["KUBE-SERVICES"] == full["KUBE-SERVICES"]
    own = {name: rules for name, rules in partial.items() if re.match("KUBE-(SVC|SEP)-", name)}
    assert len(own) == 3
    assert own == {name: full[name] for name in own}
    assert any("10.128.0.192:8080" in rule for rules in own.values() for rule in rules)


def test_iptables_drops_comments_on_endpoints_in_a_large_cluster() -> None:
    small, large = (
        iptables_rules.sync([filler(number, made_up_endpoints(number, 10)) for number in range(count)], POD_CIDR)
        for count in (100, 101)
    )
    assert " -> 10." in small
    assert " -> 10." not in large
    assert "cluster IP" in large


def test_iptables_jumps_are_in_the_order_of_kube_proxy() -> None:
    found = chains(
        iptables_rules.jumps().replace(":KUBE-SERVICES", ":INPUT\n:FORWARD\n:OUTPUT\n:KUBE-SERVICES"), "filter"
    )
    # each is put first in its chain, so the last one is at the head
    assert [rule.rpartition(" ")[2] for rule in reversed(found["FORWARD"])] == [
        "KUBE-PROXY-FIREWALL",
        "KUBE-FORWARD",
        "KUBE-SERVICES",
        "KUBE-EXTERNAL-SERVICES",
    ]


def test_nftables_cluster_ip() -> None:
    text = nftables_rules.full_sync([port()], POD_CIDR, SERVICE_CIDR)
    assert f"add element ip kube-proxy service-ips {{ 10.96.0.41 . tcp . 80 : goto {NFT_SERVICE} }}" in text
    assert "add element ip kube-proxy cluster-ips { 10.96.0.41 }" in text
    # only what is on this node can talk to itself through the Service
    pairs = re.findall(r"add element ip kube-proxy hairpin-connections \{ (.*) \}", text)
    assert pairs == ["10.180.0.1 . 10.180.0.1 . tcp . 80"]
    assert nft_rules(text)[NFT_SERVICE] == [
        "meta l4proto tcp dnat ip addr . port to numgen random mod 2 map { 0 : 10.180.0.1 . 80 , 1 : 10.180.0.2 . 80 }"
    ]
    assert nft_rules(text)["services"] == [
        f"ip daddr @cluster-ips ip saddr != {POD_CIDR} mark set mark or 0x004000",
        "ip daddr . meta l4proto . th dport vmap @service-ips",
        "fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports",
    ]


def test_nftables_node_port_is_masqueraded() -> None:
    text = nftables_rules.full_sync([port(node_port=30080)], POD_CIDR, SERVICE_CIDR)
    external = NFT_SERVICE.replace("service-", "external-", 1)
    assert f"add element ip kube-proxy service-nodeports {{ tcp . 30080 : goto {external} }}" in text
    assert nft_rules(text)[external] == ['mark set mark or 0x004000 comment "masquerade"', f"goto {NFT_SERVICE}"]


def test_nftables_without_endpoints_rejects() -> None:
    text = nftables_rules.full_sync([port(endpoints=[], node_port=30080)], POD_CIDR, SERVICE_CIDR)
    assert re.search(r"no-endpoint-services \{ 10\.96\.0\.41 \. tcp \. 80 .*: goto reject-chain \}", text)
    assert re.search(r"no-endpoint-nodeports \{ tcp \. 30080 .*: goto reject-chain \}", text)
    assert NFT_SERVICE not in nft_rules(text)


def test_nftables_table_in_pieces_is_the_whole_table() -> None:
    ports = [filler(number, made_up_endpoints(number, 2)) for number in range(5)]
    whole = nftables_rules.full_sync(ports, POD_CIDR, SERVICE_CIDR)
    pieces = (
        nftables_rules.setup(POD_CIDR, SERVICE_CIDR) + nftables_rules.added(ports[:2]) + nftables_rules.added(ports[2:])
    )
    assert sorted(pieces.splitlines()) == sorted(whole.splitlines())


def test_nftables_partial_sync_writes_the_chains_of_the_changed_only() -> None:
    changed = port(node_port=30080)
    lines = nftables_rules.partial_sync([changed]).splitlines()
    external = NFT_SERVICE.replace("service-", "external-", 1)
    assert [line for line in lines if "flush" in line] == [
        f"flush chain ip kube-proxy {NFT_SERVICE}",
        f"flush chain ip kube-proxy {external}",
    ]
    full = nft_rules(nftables_rules.full_sync([changed], POD_CIDR, SERVICE_CIDR))
    assert nft_rules("\n".join(lines)) == {name: full[name] for name in (NFT_SERVICE, external)}
