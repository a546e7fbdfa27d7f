"""Events of the data path: polled from the ring buffer, named, remembered, and handed to whoever listens.

The programs never wake us. An event gets its names when it is read: pods come and go, and addresses are used again.
What it says is put into words only when somebody asks for it, so that events cost little while nobody does.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from waggle.abi._generated import EVENT_SIZE, Event, EventKind
from waggle.abi.address import protocol_name
from waggle.kernel.maps import Map
from waggle.kernel.ringbuf import RingBuffer
from waggle.observe.names import Names, end_facts
from waggle.observe.reasons import direction_name, explain, hook_name, reason_name, verdict_name
from waggle.observe.rules import PlacedRule, Rules

MOST_AT_ONCE = 2000  # events read in one poll, so that a flood holds up nothing else; what comes after waits or is lost
ASKED_SECONDS = 5.0  # a socket's flow to a Service is told once a second while it goes on
MOST_ASKED = 4096
MOST_NAMES = 4096  # of which events share one text
_KINDS = {EventKind.DROP: "drop", EventKind.FLOW: "flow", EventKind.POLICY: "policy"}


class Seen(NamedTuple):
    """An event, and the names that its ends had when it was read: "pod t/web-1", "node n1", or ""."""

    number: int  # of this agent's events, from 1
    time: float  # Unix seconds
    raw: bytes  # struct wag_event
    source: str
    destination: str
    backend: str
    service: str  # "t/web": the one that was asked, or ""
    rule: PlacedRule | None
    policies: tuple[str, ...]  # of a set none of whose rules decided


class EventReader:
    """Polls the ring buffer; `poll` is called several times a second by the agent."""

    def __init__(self, ring: Map, names: Names, rules: Rules) -> None:
        self._ring = RingBuffer(ring)
        self._naming = Naming(names, rules)
        self._listeners: list[Callable[[Seen], None]] = []

    def listen(self, listener: Callable[[Seen], None]) -> Callable[[], None]:
        """Calls `listener` with every event from now on; returns what ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def poll(self) -> None:
        """Takes what is waiting."""
        if not self._listeners:
            self._ring.skip()
            return
        started = time.time() - time.clock_gettime_ns(time.CLOCK_MONOTONIC) / 1e9
        for raw in self._ring.read(MOST_AT_ONCE):
            if len(raw) != EVENT_SIZE:
                continue  # of programs of another version, which were at work until a moment ago
            seen = self._naming.name(raw, started)
            for listener in list(self._listeners):
                listener(seen)

    def close(self) -> None:
        self._ring.close()


class Naming:
    """Gives events their names, and flows from socket to backend the Service that the socket asked for."""

    def __init__(self, names: Names, rules: Rules) -> None:
        self._names = names
        self._rules = rules
        self._number = 0
        self._texts: dict[str, str] = {}
        #: (client, backend, port, protocol) → (when, Service), oldest first
        self._asked: OrderedDict[tuple[str, bytes, int, int], tuple[float, str]] = OrderedDict()

    def name(self, raw: bytes, started: float) -> Seen:
        """`started`: Unix seconds at which CLOCK_MONOTONIC was 0."""
        event = Event.unpack(raw)
        when = started + event.time_ns / 1e9
        names = self._names
        source = names.of(event.src) or names.by_netns.get(event.netns, "")
        service = self._service(event, source, when)
        rule = self._rules.rule(event.rule) if event.rule else None
        policies = self._rules.policies(event.policy) if event.policy and rule is None else ()
        self._number += 1
        destination, backend = names.of(event.dst), names.of(event.backend)
        intern = self._intern
        return Seen(
            self._number,
            when,
            raw,
            intern(source),
            intern(destination),
            intern(backend),
            intern(service),
            rule,
            policies,
        )

    def _intern(self, text: str) -> str:
        """Thousands of events have few names."""
        if len(self._texts) >= MOST_NAMES:
            self._texts.clear()
        return self._texts.setdefault(text, text)

    def _service(self, event: Event, source: str, when: float) -> str:
        translated = any(event.backend)
        if translated or event.kind == EventKind.DROP:
            service = self._names.service_of(event.dst, event.dport, event.proto)
            if translated and source and service:
                key = (source, event.backend, event.bport, event.proto)
                self._asked[key] = when, service
                self._asked.move_to_end(key)
                if len(self._asked) > MOST_ASKED:
                    self._asked.popitem(last=False)
            return service
        asked = self._asked.get((source, event.dst, event.dport, event.proto))
        return asked[1] if asked is not None and when - asked[0] < ASKED_SECONDS else ""


def describe(seen: Seen, identity: str = "") -> dict[str, Any]:
    """An event as JSON-able facts. `identity`: what it can be asked for by, while it is remembered."""
    event = Event.unpack(seen.raw)
    facts: dict[str, Any] = {
        "time": seen.time,
        "id": identity,
        "kind": _KINDS.get(EventKind(event.kind), "") if event.kind in list(EventKind) else "",
        "verdict": verdict_name(event.verdict),
        "hook": hook_name(event.hook),
        "protocol": protocol_name(event.proto),
        "source": end_facts(event.src, event.sport, seen.source),
        "destination": end_facts(event.dst, event.dport, seen.destination),
    }
    if seen.service:
        facts["service"] = seen.service
    if event.kind == EventKind.FLOW:
        if any(event.backend):
            facts["backend"] = end_facts(event.backend, event.bport, seen.backend)
        facts["count"] = event.count
    else:
        facts |= {"reason": reason_name(event.reason), "explanation": explain(event.reason), "ifindex": event.ifindex}
    if event.kind == EventKind.POLICY:
        if any(event.backend):
            facts["backend"] = end_facts(event.backend, event.bport, seen.backend)
        facts["direction"] = direction_name(event.direction)
        facts["rule"] = seen.rule.as_json() if seen.rule is not None else None
        facts["policies"] = list(seen.policies)
        facts["numbers"] = {"policy": f"{event.policy:016x}", "rule": f"{event.rule:08x}"}  # as the maps have them
    if event.suppressed:
        facts["suppressed"] = event.suppressed
    return facts
