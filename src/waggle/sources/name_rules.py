"""The syntax of names, labels and addresses in Kubernetes objects.

Each rule takes the text and gives the reason for a refusal, "" where it is fine. Every rule matches the whole text, so
that a newline at the end of a name never passes.

Source: staging/src/k8s.io/apimachinery/pkg/util/validation of Kubernetes 1.36; RFC 1123, RFC 6335.
"""

from __future__ import annotations

import ipaddress
import re
import socket

_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?(?:\.[a-z0-9](?:[-a-z0-9]*[a-z0-9])?)*")
_WORD = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")
_LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
_PORT_NAME = re.compile(r"(?!.*--)(?=.*[a-z])[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")


def shown(text: str) -> str:
    """`text` in quotes, shortened where it is absurdly long."""
    return repr(text if len(text) <= 80 else text[:79] + "…")


def label(text: str) -> str:
    """A DNS-1123 label: the name of a Service, a namespace, a container, a Service port."""
    if len(text) <= 63 and _LABEL.fullmatch(text):
        return ""
    return f"{shown(text)} is not a name of at most 63 of a-z, 0-9 and '-' that begins and ends with a letter or digit"


def subdomain(text: str) -> str:
    """A DNS-1123 subdomain: the name of most other objects."""
    if len(text) <= 253 and _SUBDOMAIN.fullmatch(text):
        return ""
    return (
        f"{shown(text)} is not a name of at most 253 of a-z, 0-9, '-' and '.' whose parts begin and end with a letter "
        "or digit"
    )


def port_name(text: str) -> str:
    """An IANA service name: the name of a container port, a target port."""
    if len(text) <= 15 and _PORT_NAME.fullmatch(text):
        return ""
    return f"{shown(text)} is not a port name of at most 15 of a-z, 0-9 and single '-' with a letter in it"


def qualified(text: str) -> str:
    """The key of a label or annotation: a word, or subdomain/word."""
    prefix, slash, word = text.rpartition("/")
    prefix_fits = len(prefix) <= 253 and _SUBDOMAIN.fullmatch(prefix.lower()) if slash else True
    if prefix_fits and len(word) <= 63 and _WORD.fullmatch(word):
        return ""
    return f"{shown(text)} is not a label key: a word of at most 63 characters, or a DNS name, '/' and a word"


def label_value(text: str) -> str:
    """The value of a label or selector."""
    if not text or (len(text) <= 63 and _WORD.fullmatch(text)):
        return ""
    return (
        f"{shown(text)} is not a label value of at most 63 letters, digits, '-', '_' and '.' that begins and ends with "
        "a letter or digit"
    )


def family_of(text: str) -> str:
    """ "IPv4" or "IPv6"; "" where `text` is no address. No leading zeros, zones or prefix lengths."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        socket.inet_pton(family, text)
    except (OSError, ValueError):
        return ""
    return "IPv6" if family == socket.AF_INET6 else "IPv4"


def special_address(text: str) -> str:
    """What keeps a valid address from being served or being an endpoint; "" for an ordinary one."""
    if ":" not in text:
        packed = socket.inet_pton(socket.AF_INET, text)
        if packed == b"\0\0\0\0":
            return "the unspecified address"
        if packed[0] == 127:
            return "a loopback address"
        if packed[:2] == b"\xa9\xfe":
            return "a link-local address"
        if packed[0] >= 224:
            return "a multicast or reserved address"
        return ""
    packed = socket.inet_pton(socket.AF_INET6, text)
    if packed[:15] == bytes(15) and packed[15] < 2:
        return "a loopback address" if packed[15] else "the unspecified address"
    if packed[:12] == bytes(10) + b"\xff\xff":
        return "an IPv4 address in IPv6 notation; write it as IPv4"
    if packed[0] == 0xFE and packed[1] & 0xC0 == 0x80:
        return "a link-local address"
    if packed[0] == 0xFF:
        return "a multicast address"
    return ""


def range_fault(text: str) -> str:
    """Why `text` is no address range; "" where it is one."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        return f"{shown(text)} is not an address range such as 10.244.1.0/24"
    if "/" not in text:
        return f"{shown(text)} has no prefix length: for this address alone, write {interface.network}"
    if interface.ip != interface.network.network_address:
        return f"{text} has bits set beyond its prefix; the range is {interface.network}"
    if isinstance(interface, ipaddress.IPv6Interface) and interface.ip.ipv4_mapped is not None:
        return f"{text} is an IPv4 range in IPv6 notation; write it as IPv4"
    return ""


def plain_range(text: str) -> str:
    """An address range as everybody reads it: before Kubernetes 1.36, apiservers took bits beyond the prefix and
    zeros before decimal numbers, and what they took they keep. What is no range stays as it is."""
    try:
        return str(ipaddress.ip_network(text if ":" in text else _LEADING_ZEROS.sub("", text), strict=False))
    except ValueError:
        return text
