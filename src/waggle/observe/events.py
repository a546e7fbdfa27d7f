"""Events of the data path: polled from the ring buffer, named, and handed to whoever listens.

The programs never wake us. While nobody listens the ring is only drained (so that a listener never sees old events),
which costs a few system-call-free reads per second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from waggle.abi._generated import Event, EventKind, Hook, Reason
from waggle.abi.address import protocol_name
from waggle.kernel.maps import Map
from waggle.kernel.ringbuf import RingBuffer
from waggle.observe.names import Names

Listener = Callable[[dict[str, Any]], None]

#: what a reason means, for people; the names are those of enum wag_reason
REASONS = {
    Reason.MALFORMED: "IP or transport header cut short or impossible",
    Reason.NO_BACKEND: "the Service has no usable endpoint",
    Reason.FRAGMENT: "a later fragment to a Service whose first one was not translated here",
    Reason.NAT_PORTS: "no free source port for SNAT",
    Reason.NAT_FULL: "the NAT table took no entry: raise max-nat",
    Reason.REWRITE: "the packet could not be rewritten",
    Reason.NO_NODE_IP: "SNAT needed, but this node has no address of the family: set node-ip",
    Reason.STALE_BACKEND: "the backend record is missing: the tables are inconsistent",
    Reason.NO_LOCAL_BACKEND: "traffic policy Local: the usable endpoints are on other nodes",
    Reason.SOURCE_RANGE: "the client is in none of the Service's loadBalancerSourceRanges",
    Reason.NO_PORT: "the address is a Service's, but no Service defines this port there",
    Reason.FREE_ADDRESS: "an address of a Service range that no Service has",
    Reason.TOO_BIG: "translated, it does not fit the way to the backend; the sender was told",
    Reason.NO_ROUTE: "no route to the backend's node",
    Reason.EXPIRED: "translated, and its time to live is over; the sender was told",
}


def reason_name(number: int) -> str:
    """ "no_backend" for 2: the label used in metrics and JSON."""
    try:
        return Reason(number).name.lower()
    except ValueError:
        return f"unknown_{number}"


def hook_name(number: int) -> str:
    """ "pod_egress" for 1."""
    try:
        return Hook(number).name.lower()
    except ValueError:
        return f"unknown_{number}"


def describe(raw: bytes, names: Names) -> dict[str, Any]:
    """An event record as JSON-able facts, with names."""
    event = Event.unpack(raw)
    wall = time.time() - (time.clock_gettime_ns(time.CLOCK_MONOTONIC) - event.time_ns) / 1e9
    facts: dict[str, Any] = {
        "time": wall,
        "kind": "drop" if event.kind == EventKind.DROP else "flow",
        "hook": hook_name(event.hook),
        "protocol": protocol_name(event.proto),
        "source": names.endpoint(event.src, event.sport),
        "destination": names.endpoint(event.dst, event.dport),
    }
    if event.netns and not any(event.src):
        facts["source"]["name"] = names.by_netns.get(event.netns, "")
    service = names.service(str(facts["destination"]["address"]), event.dport)
    if service:
        facts["service"] = service
    if event.kind == EventKind.DROP:
        facts["reason"] = reason_name(event.reason)
        facts["explanation"] = REASONS.get(Reason(event.reason), "") if event.reason in list(Reason) else ""
        facts["ifindex"] = event.ifindex
    else:
        facts["backend"] = names.endpoint(event.backend, event.bport)
        facts["count"] = event.count
    return facts


class EventReader:
    """Polls the ring buffer; `poll` is called several times a second by the agent."""

    def __init__(self, ring: Map, names: Names) -> None:
        self._ring = RingBuffer(ring)
        self._names = names
        self._listeners: list[Listener] = []
        self.seen = {"drop": 0, "flow": 0}

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` with every event from now on; returns what ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def poll(self) -> None:
        """Takes what is waiting."""
        if not self._listeners:
            self._ring.skip()
            return
        for raw in self._ring.read():
            facts = describe(raw, self._names)
            self.seen[facts["kind"]] += 1
            for listener in list(self._listeners):
                listener(facts)

    def close(self) -> None:
        self._ring.close()
