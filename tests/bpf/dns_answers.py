"""DNS messages for tests, by dnspython, and what it reads in one: the addresses that an answer gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_")


def answer(name: str, *records: tuple[str, str, int, str], kind: str = "A", **more) -> bytes:
    """An answer; `records`: (owner, type, TTL, data); owners and names in it are compressed where they can be."""
    asked = dns.message.make_query(name, kind, **({"use_edns": 0, "payload": 4096} | more))
    made = dns.message.make_response(asked)
    for owner, of, ttl, data in records:
        made.answer.append(dns.rrset.from_text(dns.name.from_text(owner), ttl, "IN", of, data))
    return made.to_wire(max_size=65535)


def name_of(question: dns.name.Name) -> str | None:
    """In small letters without the dot at its end; None where a letter is in no pattern."""
    labels = [label.lower() for label in question.labels if label]
    if not labels or any(byte not in LETTERS for label in labels for byte in label):
        return None
    return b".".join(labels).decode()


def matches(pattern: str, name: str) -> bool:
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def told(message: bytes, patterns: Iterable[str]) -> Mapping[str, tuple[int, frozenset[str]]]:
    """Address → (TTL, patterns that the question is of), of a well-formed answer."""
    try:
        parsed = dns.message.from_wire(message, one_rr_per_rrset=True)
    except (dns.exception.DNSException, ValueError):
        return {}
    good = parsed.flags & dns.flags.QR and not parsed.flags & dns.flags.TC and parsed.opcode() == dns.opcode.QUERY
    if not good or message[3] & 15 or len(parsed.question) != 1:
        return {}
    name = name_of(parsed.question[0].name)
    of = frozenset(pattern for pattern in patterns if name and matches(pattern, name))
    found: dict[str, tuple[int, frozenset[str]]] = {}
    for one in parsed.answer if of else ():
        if one.rdclass == dns.rdataclass.IN and one.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
            for data in one:
                ttl = min(max(one.ttl, 30), 86400)
                found[data.address] = max(found.get(data.address, (0, of)), (ttl, of))
    return found
