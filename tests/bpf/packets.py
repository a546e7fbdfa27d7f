"""Packets as data: built and taken apart with scapy, checksums checked."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet, Raw

from waggle.testing.machine import NODE4, NODE6

#: Addresses by IP version. A and B are pods of the node, see `node` in conftest.
A = {4: "10.244.1.10", 6: "fd00:10:244:1::10"}
B = {4: "10.244.1.11", 6: "fd00:10:244:1::11"}
REMOTE = {4: "10.244.2.10", 6: "fd00:10:244:2::10"}
CLIENT = {4: "192.0.2.77", 6: "2001:db8::77"}
NOWHERE = {4: "198.18.0.1", 6: "2001:db8:dead::1"}  # has an unreachable route
VIP = {4: "10.96.0.10", 6: "fd00:10:96::10"}
NODE = {4: NODE4, 6: NODE6}
ANY = {4: "0.0.0.0", 6: "::"}
both = pytest.mark.parametrize("v", [4, 6])

MACS = {"src": "02:00:00:00:00:02", "dst": "02:aa:aa:aa:aa:02"}


def build(source: str, target: str, layer: Packet, *, ttl: int = 64, payload: bytes = b"hello", **ip) -> bytes:
    head = IPv6(src=source, dst=target, hlim=ttl, **ip) if ":" in source else IP(src=source, dst=target, ttl=ttl, **ip)
    return bytes(Ether(**MACS) / head / layer / Raw(payload))


def tcp(source: str, sport: int, target: str, dport: int, flags: str = "S", **kwargs) -> bytes:
    return build(source, target, TCP(sport=sport, dport=dport, flags=flags, seq=1000), **kwargs)


def udp(source: str, sport: int, target: str, dport: int, **kwargs) -> bytes:
    return build(source, target, UDP(sport=sport, dport=dport), **kwargs)


def ends(packet: bytes) -> str:
    """ "TCP a:1 > b:2 ttl 63" of a packet; fails when a checksum is wrong."""
    parsed = Ether(packet)
    ip = parsed[IPv6] if IPv6 in parsed else parsed[IP]
    ttl = ip.hlim if IPv6 in parsed else ip.ttl
    check_sums(parsed)
    for kind in (TCP, UDP):
        if kind in parsed:
            layer = parsed[kind]
            return f"{kind.__name__} {at(ip.src, layer.sport)} > {at(ip.dst, layer.dport)} ttl {ttl}"
    return f"{ip.src} > {ip.dst} ttl {ttl}"


def source_port(packet: bytes) -> int:
    """Of TCP or UDP."""
    parsed = Ether(packet)
    return parsed[TCP].sport if TCP in parsed else parsed[UDP].sport


def at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def check_sums(parsed: Packet) -> None:
    again = parsed.copy()
    for kind in (IP, TCP, UDP, SCTP, ICMP):
        if kind in again:
            del again[kind].chksum
    fresh = Ether(bytes(again))
    for kind in (IP, TCP, UDP, SCTP, ICMP):
        if kind in parsed:
            assert parsed[kind].chksum == fresh[kind].chksum, f"{kind.__name__} checksum is wrong"


def macs(packet: bytes) -> tuple[str, str]:
    parsed = Ether(packet)
    return parsed.src, parsed.dst
