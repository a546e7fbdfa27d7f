"""Asks servers that answer as `waggle-echo` does, over TCP and UDP, and counts who answered and how fast.

Runs inside a lab's machines and pods as `python -m waggle.lab.traffic`: a JSON list of `Probe` on standard input, a
JSON list of `Outcome` on standard output, in the same order. Standard library only, so it starts fast.

What counts as success is strict: an answer from exactly the address that was asked. A UDP answer from another address
and a TCP peer name other than the one connected to are failures, because applications notice both.
"""

from __future__ import annotations

import ipaddress
import json
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

#: A way that is broken is not waited for hundreds of times. The requests not sent count as failed.
GIVE_UP_AFTER = 8
GIVEN_UP = f"not asked after {GIVE_UP_AFTER} failures in a row"
_REQUEST = b"GET / HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Probe:
    """`count` requests, each from a new socket. `timeout` is in seconds per request."""

    host: str
    port: int
    protocol: str = "tcp"
    count: int = 1
    timeout: float = 3.0


@dataclass(slots=True)
class Outcome:
    """What came of a probe. `failed` counts by reason, `answers` by the name of who answered, `clients` by the address
    that those saw."""

    answers: Counter[str] = field(default_factory=Counter)
    clients: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    latencies_us: list[float] = field(default_factory=list)

    @property
    def ok(self) -> int:
        return self.answers.total()

    def merged(self, other: Outcome) -> Outcome:
        return Outcome(
            self.answers + other.answers,
            self.clients + other.clients,
            self.failed + other.failed,
            self.latencies_us + other.latencies_us,
        )


def document_of(outcome: Outcome) -> dict[str, Any]:
    """The outcome in its JSON form."""
    return {
        "answers": dict(outcome.answers),
        "clients": dict(outcome.clients),
        "failed": dict(outcome.failed),
        "latencies_us": [round(latency, 1) for latency in outcome.latencies_us],
    }


def outcome_from(document: dict[str, Any]) -> Outcome:
    """The outcome from its JSON form."""
    return Outcome(
        Counter(document["answers"]),
        Counter(document["clients"]),
        Counter(document["failed"]),
        list(document["latencies_us"]),
    )


def run(probes: list[Probe]) -> list[Outcome]:
    """Runs all probes interleaved, one request of each in turn: what disturbs the machine disturbs all alike."""
    outcomes = [Outcome() for _ in probes]
    failures_in_a_row = [0] * len(probes)
    for turn in range(max((probe.count for probe in probes), default=0)):
        for index, (probe, outcome) in enumerate(zip(probes, outcomes, strict=True)):
            if turn >= probe.count:
                continue
            if failures_in_a_row[index] >= GIVE_UP_AFTER:
                outcome.failed[GIVEN_UP] += 1
                continue
            begin = time.perf_counter_ns()
            try:
                answer = _tcp(probe) if probe.protocol == "tcp" else _udp(probe, connected=turn % 2 == 0)
                taken = time.perf_counter_ns() - begin
                said = json.loads(answer)
                name, client = str(said["name"]), str(said["client"])
            except (OSError, ValueError, KeyError) as error:
                outcome.failed[_reason(error)] += 1
                failures_in_a_row[index] += 1
                continue
            failures_in_a_row[index] = 0
            outcome.answers[name] += 1
            outcome.clients[client] += 1
            outcome.latencies_us.append(taken / 1000)
    return outcomes


class _WrongPeer(ValueError):
    """The answer came, or seems to come, from another address than the one asked."""


def _tcp(probe: Probe) -> bytes:
    with socket.create_connection((probe.host, probe.port), probe.timeout) as sock:
        _check_peer(probe, sock.getpeername())
        sock.sendall(_REQUEST)
        received = b""
        while not (body := _body(received)):
            data = sock.recv(65536)
            if not data:
                raise ConnectionResetError("connection closed before the whole answer")
            received += data
        return body


def _body(received: bytes) -> bytes:
    """The body once all of it is there, else nothing."""
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return b""
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ValueError(f"HTTP answer {head[:40]!r}")
    length = next(
        (int(line.partition(b":")[2]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0
    )
    return body if len(body) >= length else b""


def _udp(probe: Probe, *, connected: bool) -> bytes:
    """Connected and unconnected sockets take different ways through the kernel, so both are used."""
    address = ipaddress.ip_address(probe.host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(probe.timeout)
        if connected:
            sock.connect((probe.host, probe.port))
            _check_peer(probe, sock.getpeername())
            sock.send(b"?")
            return sock.recv(65536)
        sock.sendto(b"?", (probe.host, probe.port))
        answer, peer = sock.recvfrom(65536)
        _check_peer(probe, peer)
        return answer


def _check_peer(probe: Probe, peer: tuple[Any, ...]) -> None:
    if ipaddress.ip_address(peer[0]) != ipaddress.ip_address(probe.host) or peer[1] != probe.port:
        raise _WrongPeer(f"answer from {peer[0]} port {peer[1]}")


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def main() -> None:
    """Entry point of `python -m waggle.lab.traffic`."""
    probes = [Probe(**document) for document in json.load(sys.stdin)]
    json.dump([document_of(outcome) for outcome in run(probes)], sys.stdout)


if __name__ == "__main__":
    main()
