"""Which events somebody wants to see. Pure: what the command line is given, and what the agent sifts by.

An end is a pod (`web-1`, `t/web-1`), a namespace (`t/`), a Service (`t/web`, as who was asked, or by the addresses of
its endpoints), an address, a network, or a node (`node:n1`). `pod:` and `service:` before a name mean that alone. Names
may hold `*`. Without a namespace a name is of `default`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from waggle.abi._generated import Event, Outcome
from waggle.abi.address import PROTOCOL_NAMES, unpack_address
from waggle.observe.events import Seen
from waggle.observe.reasons import VERDICTS, all_reasons, reason_name

T = TypeVar("T")

#: addresses of the endpoints of a Service, "namespace/name"
EndpointsOf = Callable[[str], frozenset[str]]
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
#: The questions, as options without their dashes.
QUESTIONS = ("from", "to", "service", "verdict", "port", "proto", "reason")
_NAME = re.compile(r"[A-Za-z0-9*?]([A-Za-z0-9.*?_-]*[A-Za-z0-9*?])?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class End:
    """One source or destination."""

    pods: str = ""  # "pod t/web-*", "node n1", "pod t/*"
    service: str = ""  # "t/web"
    network: _Network | None = None

    def is_at(self, name: str, raw: bytes, endpoints_of: EndpointsOf) -> bool:
        """Whether an address, which has this name, is this end's."""
        if self.network is not None:
            return any(raw) and ipaddress.ip_address(unpack_address(raw)) in self.network
        if self.pods and name and fnmatchcase(name, self.pods):
            return True
        if not self.service or "*" in self.service or not any(raw):
            return False
        return unpack_address(raw) in endpoints_of(self.service)

    def is_service(self, service: str) -> bool:
        return bool(self.service and service) and fnmatchcase(service, self.service)


@dataclass(frozen=True, slots=True)
class FlowFilter:
    """Of every question that is asked, one of the answers must hold."""

    sources: tuple[End, ...] = ()
    targets: tuple[End, ...] = ()
    services: tuple[str, ...] = ()
    verdicts: frozenset[int] = frozenset()
    ports: tuple[range, ...] = ()
    protocols: frozenset[int] = frozenset()
    reasons: frozenset[str] = frozenset()

    def wants(self, seen: Seen, endpoints_of: EndpointsOf) -> bool:
        """Whether an event is one of those."""
        event = Event.unpack(seen.raw)
        if self.verdicts and event.verdict not in self.verdicts:
            return False
        if self.protocols and event.proto not in self.protocols:
            return False
        if self.ports and not any(event.dport in one or (event.bport in one and event.bport) for one in self.ports):
            return False
        if self.reasons and reason_name(event.reason) not in self.reasons:
            return False
        if self.services and not any(seen.service and fnmatchcase(seen.service, one) for one in self.services):
            return False
        if self.sources and not any(end.is_at(seen.source, event.src, endpoints_of) for end in self.sources):
            return False
        return not self.targets or any(
            end.is_at(seen.destination, event.dst, endpoints_of)
            or end.is_at(seen.backend, event.backend, endpoints_of)
            or end.is_service(seen.service)
            for end in self.targets
        )


def parse_filter(asked: Mapping[str, Sequence[str]]) -> FlowFilter:
    """The filter that answers to QUESTIONS make. ValueError begins with the question whose answer is none."""
    if unknown := asked.keys() - set(QUESTIONS):
        raise ValueError(f"{min(unknown)}: not one of {', '.join(QUESTIONS)}")

    def answers(question: str, parse: Callable[[str], T]) -> list[T]:
        found = []
        for answer in asked.get(question, ()):
            try:
                found.append(parse(answer.strip()))
            except ValueError as error:
                raise ValueError(f"{question}: {error}") from error
        return found

    return FlowFilter(
        sources=tuple(answers("from", parse_end)),
        targets=tuple(answers("to", parse_end)),
        services=tuple(answers("service", _full_name)),
        verdicts=frozenset().union(*answers("verdict", _verdict)),
        ports=tuple(answers("port", _ports)),
        protocols=frozenset().union(*answers("proto", _protocol)),
        reasons=frozenset().union(*answers("reason", _reason)),
    )


def parse_end(text: str) -> End:
    """ValueError says what it could be."""
    kind, colon, rest = text.partition(":")
    if colon and kind in ("pod", "service", "node"):
        if kind == "node":
            return End(pods=f"node {_checked(rest)}")
        name = _full_name(rest)
        return End(pods=f"pod {name}") if kind == "pod" else End(service=name)
    try:
        return End(network=ipaddress.ip_network(text))
    except ValueError:
        if "/" in text and _is_address(text.partition("/")[0]):
            raise  # of a network it says what is wrong
    if text.endswith("/"):
        return End(pods=f"pod {_checked(text[:-1])}/*")
    name = _full_name(text)
    return End(pods=f"pod {name}", service=name)


def parse_duration(text: str) -> float:
    """Seconds of "5m", "1h30m", "90" or "250ms". ValueError says so."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no time such as 30s, 5m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _full_name(text: str) -> str:
    namespace, slash, name = text.rpartition("/")
    return f"{_checked(namespace) if slash else 'default'}/{_checked(name)}"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no pod, namespace/, Service, address or network")
    return name


def _verdict(text: str) -> frozenset[int]:
    if text == "drop":
        return frozenset((Outcome.DROPPED, Outcome.REJECTED))
    if text not in VERDICTS:
        raise ValueError(f"{text!r} is not one of {', '.join(VERDICTS)}, drop (dropped or rejected)")
    return frozenset((Outcome[text.upper()],))


def _ports(text: str) -> range:
    low, dash, high = text.partition("-")
    if not all(part.isascii() and part.isdigit() for part in ((low, high) if dash else (low,))):
        raise ValueError(f"{text!r} is no port, nor a range such as 8000-8080")
    found = range(int(low), int(high if dash else low) + 1)
    if not found or found[-1] > 65535:
        raise ValueError(f"{text!r} holds no port, or more than there are")
    return found


def _protocol(text: str) -> frozenset[int]:
    known = {name.lower(): number for number, name in PROTOCOL_NAMES.items()}
    if text.lower() == "icmp":
        return frozenset((1, 58))
    if text.lower() in known:
        return frozenset((known[text.lower()],))
    if text.isascii() and text.isdigit() and int(text) < 256:
        return frozenset((int(text),))
    raise ValueError(f"{text!r} is no protocol: tcp, udp, sctp, icmp, or a number")


def _reason(text: str) -> frozenset[str]:
    found = frozenset(one for one in all_reasons() if text == one or (text == "policy" and one.startswith("policy_")))
    if not found:
        raise ValueError(f"{text!r} is not one of {', '.join(all_reasons())}, policy (any of policy_…)")
    return found
