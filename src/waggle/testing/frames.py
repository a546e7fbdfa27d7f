"""Ethernet frames as data, fast: built and taken apart in microseconds, with every checksum proven.

What `waggle.testing.differential` sends by the hundred thousand. For everything odd (options of all kinds, broken
headers) scapy is the better tool.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from waggle.abi.address import PROTOCOL_NAMES, PROTOCOLS
from waggle.model.flows import Tuple
from waggle.model.packets import End

FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
ETH_IP, ETH_IPV6 = 0x0800, 0x86DD
ICMP, ICMPV6 = 1, 58
_CHECKSUM_AT = {6: 16, 17: 6}


@dataclass(frozen=True, slots=True)
class Frame:
    """One IP packet with TCP, UDP or SCTP. `options`: of IPv4, or whole extension headers of IPv6 with `next_header`
    as the first one's number; `checksum` False: UDP over IPv4 without one."""

    flow: Tuple
    flags: int = SYN
    payload: bytes = b""
    ttl: int = 64
    sequence: int = 1000
    acknowledged: int = 0
    options: bytes = b""
    checksum: bool = True

    def build(self, source_mac: bytes, destination_mac: bytes) -> bytes:
        """The bytes, from the Ethernet header on."""
        number = PROTOCOLS[self.flow.protocol]
        source, destination = (ip_address(end.address) for end in self.flow[1:])
        ports = struct.pack("!HH", self.flow.source.port, self.flow.destination.port)
        match self.flow.protocol:
            case "TCP":
                head = struct.pack("!IIBBHHH", self.sequence, self.acknowledged, 5 << 4, self.flags, 8192, 0, 0)
            case "UDP":
                head = struct.pack("!HH", 8 + len(self.payload), 0)
            case _ if self.flags & SYN and not self.flags & ACK:  # INIT
                head = struct.pack("!IIBBHIIHHI", 0, 0, 1, 0, 20, self.sequence, 8192, 1, 1, 0)
            case _:  # DATA
                head = struct.pack("!IIBBH", self.acknowledged, 0, 0, 0, 4)
        segment = ports + head + self.payload
        if self.flow.protocol == "SCTP":
            segment = segment[:8] + crc32c(segment).to_bytes(4, "little") + segment[12:]
        at = _CHECKSUM_AT.get(number)
        if at is not None and (self.checksum or source.version == 6):
            total = checksum(_pseudo(source, destination, number, len(segment)) + segment)
            if self.flow.protocol == "UDP":
                total = total or 0xFFFF  # 0 says that there is none (RFC 768)
            segment = segment[:at] + struct.pack("!H", total) + segment[at + 2 :]
        if source.version == 4:
            size = 20 + len(self.options)
            head = struct.pack(
                "!BBHHHBBH", 0x40 | size // 4, 0, size + len(segment), 1, 0x4000, self.ttl, number, 0
            ) + (source.packed + destination.packed + self.options)
            head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
            kind = ETH_IP
        else:
            first = 60 if self.options else number  # destination options
            options = bytes([number]) + self.options[1:] if self.options else b""
            head = struct.pack("!IHBB", 6 << 28, len(options) + len(segment), first, self.ttl)
            head += source.packed + destination.packed + options
            kind = ETH_IPV6
        return destination_mac + source_mac + struct.pack("!H", kind) + head + segment


#: of `Frame.options`: IPv4's router alert; a destination options header of IPv6 that only pads
OPTIONS = {4: bytes([148, 4, 0, 0]), 6: bytes([0, 0, 1, 4, 0, 0, 0, 0])}


def ip_frame(
    macs: bytes, source: str, destination: str, number: int, segment: bytes, *, fragment: tuple[int, int] | None = None
) -> bytes:
    """A frame with any protocol. `fragment`: identification, and the offset in bytes, of a last fragment."""
    one, other = ip_address(source), ip_address(destination)
    identification, offset = fragment or (1, 0)
    if one.version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), identification, offset // 8, 64, number, 0)
        head += one.packed + other.packed
        return macs + struct.pack("!H", ETH_IP) + head[:10] + struct.pack("!H", checksum(head)) + head[12:] + segment
    if fragment:
        segment = struct.pack("!BBHI", number, 0, offset, identification) + segment
        number = 44
    head = struct.pack("!IHBB", 6 << 28, len(segment), number, 64) + one.packed + other.packed
    return macs + struct.pack("!H", ETH_IPV6) + head + segment


class BadFrame(ValueError):
    """A frame that no receiver would take; the text says why."""


@dataclass(frozen=True, slots=True)
class Parsed:
    """A frame taken apart. `segment` is the transport header and what follows, without what it is to change: ports and
    checksum."""

    flow: Tuple
    ttl: int
    macs: bytes
    segment: bytes
    options: bytes
    flags: int


def parse(frame: bytes) -> Parsed:
    """Takes a frame with TCP, UDP or SCTP apart. BadFrame where a length or checksum is wrong."""
    source, destination, number, ttl, options, segment = _parse_ip(frame)
    if number not in _CHECKSUM_AT and number != PROTOCOLS["SCTP"]:
        raise BadFrame(f"protocol {number}")
    sport, dport = struct.unpack_from("!HH", segment)
    at = _CHECKSUM_AT.get(number)
    rest = bytearray(segment)
    rest[:4] = bytes(4)
    if at is not None:
        check_sum(source, destination, number, segment)
        is_none = number == PROTOCOLS["UDP"] and segment[at : at + 2] == b"\0\0"
        rest[at : at + 2] = b"\0\0" if is_none else b"\1\1"  # whether there is one must not change
    else:
        rest[8:12] = bytes(4)
        if crc32c(segment[:8] + bytes(4) + segment[12:]).to_bytes(4, "little") != segment[8:12]:
            raise BadFrame("the checksum of SCTP is wrong")
    flow = Tuple(PROTOCOL_NAMES[number], End(str(source), sport), End(str(destination), dport))
    return Parsed(flow, ttl, frame[:12], bytes(rest), options, segment[13] if number == 6 else 0)


def unwrap(frame: bytes) -> tuple[str, str, bytes] | None:
    """(source, destination, the frame inside) of an IP packet inside another (RFC 2003, RFC 2473); None: it is none."""
    source, destination, number, _, _, inside = _parse_ip(frame)
    if number != (4 if source.version == 4 else 41):
        return None
    return str(source), str(destination), frame[:14] + inside


def check_sum(source: IPv4Address | IPv6Address, destination: IPv4Address | IPv6Address, n: int, part: bytes) -> None:
    """BadFrame where the checksum of a TCP or UDP segment is wrong. None at all is right for UDP over IPv4."""
    if n == PROTOCOLS["UDP"] and part[6:8] == b"\0\0":
        if source.version == 6:
            raise BadFrame("UDP over IPv6 without a checksum")
        return
    if checksum(_pseudo(source, destination, n, len(part)) + part):
        raise BadFrame("the transport checksum is wrong")


def _parse_ip(frame: bytes) -> tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address, int, int, bytes, bytes]:
    (kind,) = struct.unpack_from("!H", frame, 12)
    if kind == ETH_IP:
        head = (frame[14] & 15) * 4
        (total,) = struct.unpack_from("!H", frame, 16)
        if total != len(frame) - 14:
            raise BadFrame(f"IP says {total} bytes, there are {len(frame) - 14}")
        if checksum(frame[14 : 14 + head]):
            raise BadFrame("the IP header's checksum is wrong")
        addresses = IPv4Address(frame[26:30]), IPv4Address(frame[30:34])
        return *addresses, frame[23], frame[22], frame[34 : 14 + head], frame[14 + head :]
    if kind != ETH_IPV6:
        raise BadFrame(f"Ethernet type {kind:#x}")
    (size,) = struct.unpack_from("!H", frame, 18)
    if size != len(frame) - 54:
        raise BadFrame(f"IPv6 says {size} bytes, there are {len(frame) - 54}")
    number, at = frame[20], 54
    if number == 60:
        number, at = frame[54], 54 + (frame[55] + 1) * 8
    return IPv6Address(frame[22:38]), IPv6Address(frame[38:54]), number, frame[21], frame[54:at], frame[at:]


def wrong_answer(asked: bytes, answer: bytes, *, expired_at: str = "") -> str:
    """What is wrong with the answer to a packet that was rejected, or whose time is over; "" where nothing is.

    TCP is reset (RFC 9293 section 3.10.7.1), SCTP aborted (RFC 9260 section 8.4), anything else gets "port unreachable"
    (RFC 792, RFC 4443) from the address that was asked. Where the time is over, all get "time exceeded" from the node:
    `expired_at`.
    """
    source, destination, number, _, options, segment = _parse_ip(asked)
    try:
        from_, to, kind, ttl, _, body = _parse_ip(answer)
    except BadFrame as error:
        return f"answered with a bad frame: {error}"
    if (str(from_), to) != (expired_at or str(destination), source):
        return f"answered from {from_} to {to}"
    if answer[:12] != asked[6:12] + asked[:6] or ttl < 32:
        return "answered to another machine"
    if number == PROTOCOLS["TCP"] and not expired_at:
        return "not answered with a reset" if kind != number else _wrong_reset(source, destination, segment, body)
    if number == PROTOCOLS["SCTP"] and not expired_at:
        return "not answered with an abort" if kind != number else _wrong_abort(segment, body)
    v4 = source.version == 4
    wanted = ((11, 0) if v4 else (3, 0)) if expired_at else ((3, 3) if v4 else (1, 4))
    if kind != (ICMP if v4 else ICMPV6) or tuple(body[:2]) != wanted:
        return f"answered with protocol {kind}, {body[:2].hex()}"
    if checksum((b"" if v4 else _pseudo(from_, to, kind, len(body))) + body):
        return "the checksum of the ICMP error is wrong"
    if body[8:] != asked[14 : 14 + len(body) - 8] or len(body) - 8 < (20 if v4 else 40) + len(options) + 8:
        return "does not quote the packet"
    return ""


def _wrong_reset(
    source: IPv4Address | IPv6Address, destination: IPv4Address | IPv6Address, asked: bytes, answer: bytes
) -> str:
    sport, dport, sequence, acknowledged, offset, flags = struct.unpack_from("!HHIIBB", asked)
    got = struct.unpack_from("!HHIIBB", answer)
    if flags & ACK:
        wanted = (dport, sport, acknowledged, 0, 5 << 4, RST)
    else:
        size = len(asked) - (offset >> 4) * 4 + bool(flags & SYN) + bool(flags & FIN)
        wanted = (dport, sport, 0, (sequence + size) & 0xFFFFFFFF, 5 << 4, RST | ACK)
    if got != wanted or len(answer) != 20:
        return f"reset with {got} instead of {wanted}"
    if checksum(_pseudo(destination, source, 6, 20) + answer):
        return "the checksum of the reset is wrong"
    return ""


def _wrong_abort(asked: bytes, answer: bytes) -> str:
    sport, dport, tag, _, chunk = struct.unpack_from("!HHIIB", asked)
    if chunk == 1:
        (tag,) = struct.unpack_from("!I", asked, 16)
    wanted = (dport, sport, tag, 6, int(chunk != 1), 4)
    got = struct.unpack_from("!HHI4xBBH", answer)
    if got != wanted or len(answer) != 16:
        return f"abort with {got} instead of {wanted}"
    if crc32c(answer[:8] + bytes(4) + answer[12:]).to_bytes(4, "little") != answer[8:12]:
        return "the checksum of the abort is wrong"
    return ""


def _pseudo(source: IPv4Address | IPv6Address, destination: IPv4Address | IPv6Address, number: int, size: int) -> bytes:
    return source.packed + destination.packed + struct.pack("!II", size, number)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of some bytes; 0 over bytes that hold their own."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC32C = _crc_table()


def crc32c(data: bytes) -> int:
    """CRC-32c (RFC 9260 appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
