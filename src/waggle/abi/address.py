"""Addresses as the maps hold them: 16 bytes, IPv4 as ::ffff:a.b.c.d (struct wag_addr)."""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache

ADDRESS_SIZE = 16
V4_PREFIX = bytes(10) + b"\xff\xff"
ANY4 = V4_PREFIX + bytes(4)
ANY6 = bytes(16)

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()} | {1: "ICMP", 58: "ICMPv6"}


@lru_cache(maxsize=65536)
def pack_address(text: str) -> bytes:
    """16 bytes of an IPv4 or IPv6 address in text. Raises ValueError for anything else."""
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return V4_PREFIX + socket.inet_pton(socket.AF_INET, text)
    except OSError as error:
        raise ValueError(f"{text!r} is not an IP address") from error


def pack_network(text: str) -> bytes:
    """32 bytes of a network in text: address and mask (struct wag_network). Raises ValueError for anything else."""
    network = ipaddress.ip_network(text)
    mask = network.netmask.packed
    return pack_address(str(network.network_address)) + (b"\xff" * 12 if len(mask) == 4 else b"") + mask


def unpack_address(raw: bytes) -> str:
    """Canonical text of 16 bytes; IPv4 without the ::ffff: prefix."""
    if raw[:12] == V4_PREFIX:
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


def is_ipv4(raw: bytes) -> bool:
    """Whether 16 bytes hold an IPv4 address."""
    return raw[:12] == V4_PREFIX


def protocol_name(number: int) -> str:
    """ "TCP" for 6; the number itself for protocols without a name here."""
    return PROTOCOL_NAMES.get(number, str(number))


def host_port(address: str, port: int) -> str:
    """ "10.0.0.1:80" or "[fd00::1]:80"."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
