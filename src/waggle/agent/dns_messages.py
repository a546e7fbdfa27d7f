"""DNS messages: what a question is about, and answers about Services as messages. No sockets.

dnspython reads and writes them; here is what an answer looks like. RFC 1035, 2308 (negative answers), 6891 (EDNS).
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from waggle.plan.names import Answer, Name, Outcome, Record

TTL = 5  # seconds: Services change, and asking again is cheap
#: What fits into one packet on every path that IPv6 allows (DNS flag day 2020).
MAX_UDP = 1232
_LEAST_UDP = 512
_HEADER = 12


class Unanswerable(Exception):
    """The query gets this message and nothing else; None where it gets nothing at all."""

    def __init__(self, reply: dns.message.Message | None) -> None:
        self.reply = reply
        super().__init__("refused" if reply is not None else "no query")


def read_query(wire: bytes) -> dns.message.Message:
    """A query with one question of the Internet. Raises Unanswerable."""
    if len(wire) < _HEADER or wire[2] & 0x80:
        raise Unanswerable(None)  # an answer is never answered: two servers would talk for ever
    if wire[2] >> 3 & 0xF != dns.opcode.QUERY:
        raise Unanswerable(_bare(wire, dns.rcode.NOTIMP))
    try:
        query = dns.message.from_wire(wire, ignore_trailing=True)
    except (dns.exception.DNSException, ValueError, NotImplementedError) as error:
        raise Unanswerable(_bare(wire, dns.rcode.FORMERR)) from error
    if len(query.question) != 1:
        raise Unanswerable(refusal(query, dns.rcode.FORMERR))
    if query.edns > 0:
        raise Unanswerable(refusal(query, dns.rcode.BADVERS))
    question = query.question[0]
    if question.rdclass != dns.rdataclass.IN or question.rdtype in (dns.rdatatype.AXFR, dns.rdatatype.IXFR):
        raise Unanswerable(refusal(query, dns.rcode.REFUSED))
    return query


def _bare(wire: bytes, code: dns.rcode.Rcode) -> dns.message.Message:
    """An answer to what cannot be read: its header alone."""
    reply = dns.message.Message(int.from_bytes(wire[:2], "big"))
    reply.flags = dns.flags.Flag(dns.flags.QR | int.from_bytes(wire[2:4], "big") & 0x7900)  # opcode, RD
    reply.set_rcode(code)
    return reply


def question_of(query: dns.message.Message) -> tuple[Name, str]:
    """(labels in lower case, type of record): what `plan.names` takes. Bytes that are no text match nothing there."""
    question = query.question[0]
    labels = tuple(label.decode("ascii", "backslashreplace").lower() for label in question.name.labels if label)
    return labels, dns.rdatatype.to_text(question.rdtype)


def refusal(query: dns.message.Message, code: dns.rcode.Rcode) -> dns.message.Message:
    """An answer that only says why there is none."""
    reply = dns.message.make_response(query, recursion_available=True, our_payload=MAX_UDP)
    reply.set_rcode(code)
    return reply


def reply_of(query: dns.message.Message, answer: Answer) -> dns.message.Message:
    """The message for an answer that is ours to give. Equal records come in a new order each time."""
    reply = dns.message.make_response(query, recursion_available=True, our_payload=MAX_UDP)
    reply.flags |= dns.flags.AA
    if answer.outcome is Outcome.MISSING:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    asked = query.question[0].name
    # the name as it was asked for, capitals and all: some clients compare
    own = {question_of(query)[0]: asked}
    _add(reply.answer, random.sample(answer.records, len(answer.records)), own)
    _add(reply.additional, answer.additional, own)
    if not answer.records:
        zone = _name(answer.zone)
        numbers = f"ns.dns.{zone} hostmaster.{zone} 1 7200 1800 86400 {TTL}"
        reply.authority.append(dns.rrset.from_text(zone, TTL, "IN", "SOA", numbers))
    return reply


def _add(section: list[dns.rrset.RRset], records: Iterable[Record], own: dict[Name, dns.name.Name]) -> None:
    found: dict[tuple[Name, str], list[str]] = {}
    for record in records:
        found.setdefault((record.owner, record.type), []).append(_data(record))
    for (owner, kind), texts in found.items():
        section.append(dns.rrset.from_text_list(own.get(owner) or _name(owner), TTL, "IN", kind, texts))


def _data(record: Record) -> str:
    if record.type == "SRV":
        assert not isinstance(record.data, str)
        return f"0 {record.weight} {record.port} {_name(record.data)}"
    if record.type == "TXT":
        return f'"{record.data}"'
    return record.data if isinstance(record.data, str) else str(_name(record.data))


def _name(labels: Name) -> dns.name.Name:
    return dns.name.Name([*(label.encode("ascii", "replace") for label in labels), b""])


def to_udp(query: dns.message.Message | None, reply: dns.message.Message) -> bytes:
    """In the size that the client takes; what does not fit is cut, and marked, so that it asks again by TCP."""
    payload = query.payload if query is not None and query.edns >= 0 else _LEAST_UDP
    return reply.to_wire(max_size=min(max(payload, _LEAST_UDP), MAX_UDP), prefer_truncation=True)
