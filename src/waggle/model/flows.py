"""What flows add to the rules for packets (semantics.md section 4): the memory of a node that is never wrong.

A flow stays with its backend: TCP and SCTP for as long as the connection lives, UDP while the backend serves. Its
replies are turned back exactly, so no two flows may have replies that look alike; one of them gets a source port of its
own, also where one of the two is not translated at all. What leaves as the node's gets a port at random. With affinity,
a client's new flows follow its last one.

`Flows.expect` says what must happen to a packet, `Flows.saw` remembers what did: where the rules leave a choice, that
decides what comes after. Time is what the caller says it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from waggle.model.objects import ObjectKey, ServicePort
from waggle.model.packets import (
    AS_IT_IS,
    BESIDE_FRONTENDS,
    Action,
    Arrival,
    Cluster,
    Decision,
    End,
    LocalNode,
    Packet,
    Place,
    decide,
    place,
)


class Tuple(NamedTuple):
    """What identifies the packets of a flow in one direction."""

    protocol: str
    source: End
    destination: End

    def reversed(self) -> Tuple:
        """As the packets of the other direction have it."""
        return Tuple(self.protocol, self.destination, self.source)


class Expected(NamedTuple):
    """What must happen to one packet.

    `becomes`: exactly this; without it, `decision` says to what a new flow may be sent, and `Flows.wrong_port` which
    source port it may have. `is_new`: the flow was not known, or has to be settled anew. `may_resume`: its Service was
    gone meanwhile; it may also become this again, as if it had not. `inside`: the packet stays as it is and goes inside
    another one to the destination of `becomes`.
    """

    decision: Decision
    becomes: Tuple | None = None
    is_new: bool = False
    may_resume: Tuple | None = None
    inside: bool = False


@dataclass(slots=True)
class _Flow:
    becomes: Tuple
    of_service: bool
    closing: bool = False  # the client has sent a FIN
    reset: bool = False  # the client's last packet was a reset; whoever goes on after one has seen that it was none
    inside: bool = False


@dataclass(slots=True)
class Flows:
    """Every flow that was translated, both its directions, and who is bound to which backend.

    `snat_ports` is the range of the ports that are given to flows whose own is taken.
    """

    snat_ports: range
    _flows: dict[Tuple, _Flow] = field(default_factory=dict)
    _replies: dict[Tuple, Tuple] = field(default_factory=dict)  # reply → the flow's packets, as the client sends them
    _left: dict[Tuple, _Flow] = field(default_factory=dict)  # their Service is gone, and a packet has seen that
    _bound: dict[tuple[ObjectKey, ServicePort, str], tuple[End, float]] = field(default_factory=dict)

    def expect(self, cluster: Cluster, node: LocalNode, packet: Packet, arrival: Arrival, now: float) -> Expected:
        """What must happen to `packet`, `now` being in seconds."""
        tuple_ = Tuple(packet.protocol, packet.source, packet.destination)
        if tuple_ in self._replies:
            return Expected(AS_IT_IS, self._replies[tuple_].reversed())
        decision = decide(cluster, node, packet, arrival)
        flow = self._flows.get(tuple_)
        if decision.action in (Action.FORWARD, Action.MASQUERADE) or decision.reason in BESIDE_FRONTENDS:
            # a Service that is gone keeps its connections and takes no others; nobody would take them out of another
            # packet any more, so that they go as the backend knows them
            if flow and not (flow.of_service and packet.begins):
                return Expected(decision, flow.becomes)
            return Expected(decision, tuple_ if not packet.begins else None, is_new=packet.begins)
        if flow and _stays(flow, packet, decision):
            return Expected(decision, flow.becomes, inside=flow.inside)
        left = self._left.get(tuple_)
        resumed = left.becomes if left and _stays(left, packet, decision) else None
        return Expected(self._bind(decision, packet, now), is_new=True, may_resume=resumed)

    def _bind(self, decision: Decision, packet: Packet, now: float) -> Decision:
        """The decision for a client that is bound to a backend, where that still serves."""
        affinity = decision.affinity
        if decision.action is not Action.TRANSLATE or affinity is None:
            return decision
        bound = self._bound.get((affinity.service, affinity.port, packet.source.address))
        if bound is None or now - bound[1] >= affinity.seconds or bound[0] not in decision.backends:
            return decision
        return decision._replace(backends={bound[0]: decision.backends[bound[0]]})

    def wrong_port(self, packet: Packet, becomes: Tuple) -> str:
        """What is wrong with the source port that a new flow was given; "" where nothing is.

        The client's own is kept unless a reply to it would look like one of another flow; where the source is the node
        now, there is none to keep. A flow that has moved on may or may not hold its port still.
        """
        tuple_ = Tuple(packet.protocol, packet.source, packet.destination)
        if becomes.source.address != packet.source.address:
            return self._wrong_snat_port(tuple_, becomes)
        own = becomes._replace(source=End(becomes.source.address, packet.source.port)).reversed()
        holder = self._holder(tuple_, own)
        if becomes.source.port == packet.source.port:
            if holder is not None and self._is_live(holder, own):
                return f"the port is taken by the flow {text(holder)}"
            return ""
        if holder is None:
            return "a port of its own, though the client's is free"
        return self._wrong_snat_port(tuple_, becomes)

    def _wrong_snat_port(self, tuple_: Tuple, becomes: Tuple) -> str:
        if becomes.source.port not in self.snat_ports:
            return f"port {becomes.source.port} is none of those for SNAT"
        holder = self._holder(tuple_, becomes.reversed())
        if holder is not None and self._is_live(holder, becomes.reversed()):
            return f"the port is taken by the flow {text(holder)}"
        return ""

    def _holder(self, tuple_: Tuple, reply: Tuple) -> Tuple | None:
        """The other flow whose replies look so: a translated one, or one that was spared."""
        holder = reply if reply in self._flows else self._replies.get(reply)
        return None if holder in (tuple_, tuple_.reversed()) else holder

    def _is_live(self, packets: Tuple, reply: Tuple) -> bool:
        flow = self._flows.get(packets)
        return flow is not None and (packets == reply or flow.becomes.reversed() == reply)

    def saw(
        self, packet: Packet, expected: Expected, becomes: Tuple | None, *, fin: bool, reset: bool, now: float
    ) -> None:
        """Remembers what happened to a packet. `becomes` None: it was dropped or rejected. `fin`, `reset`: of TCP."""
        tuple_ = Tuple(packet.protocol, packet.source, packet.destination)
        if not expected.is_new:
            flow = self._flows.get(tuple_)
            if flow is not None:
                flow.closing |= fin
                flow.reset = reset
            return
        if becomes is None:
            if expected.decision.reason in BESIDE_FRONTENDS and tuple_ in self._flows:
                self._left[tuple_] = self._flows.pop(tuple_)
            return
        if becomes == expected.may_resume:
            self._flows[tuple_] = self._left.pop(tuple_)
            return
        of_service = expected.decision.action is Action.TRANSLATE
        left = self._flows.pop(tuple_, None)
        if of_service and left is not None and packet.protocol == "TCP" and left.becomes != becomes:
            # a connection that begins again another way leaves nothing of the last
            self._replies.pop(left.becomes.reversed(), None)
        if not of_service and left is not None:
            self._left[tuple_] = left
        if of_service:
            self._left.pop(tuple_, None)
        affinity = expected.decision.affinity
        if affinity is not None:
            self._bound[affinity.service, affinity.port, packet.source.address] = becomes.destination, now
        inside = becomes.destination in expected.decision.inside
        if becomes != tuple_:
            self._flows[tuple_] = _Flow(becomes, of_service, inside=inside)
        if becomes != tuple_ and not inside:  # else another node turns the replies back
            self._replies[becomes.reversed()] = tuple_

    def spare(self, packet: Packet) -> None:
        """Somebody out of the cluster has reached a pod: what it answers must not be masqueraded. Of TCP and SCTP the
        first packet shows who began."""
        answer = Tuple(packet.protocol, packet.destination, packet.source)
        if packet.protocol == "UDP" and answer not in self._flows and answer not in self._replies:
            self._flows[answer] = _Flow(answer, of_service=False)

    def known(self) -> Mapping[Tuple, Tuple]:
        """Flows that live, and what their packets become."""
        return {packets: flow.becomes for packets, flow in self._flows.items()}

    def answered(self) -> Mapping[Tuple, Tuple]:
        """Every reply that is turned back, to flows that live and to those that moved on, and the flow it is of."""
        return self._replies

    def was_left(self, tuple_: Tuple) -> bool:
        """Whether a flow's Service has gone and the flow has begun anew since: nothing is promised to the old one."""
        return tuple_ in self._left


def _stays(flow: _Flow, packet: Packet, decision: Decision) -> bool:
    """Whether a flow goes on to the backend it has. Connections do, whatever became of it."""
    if not packet.begins:
        return True
    if flow.closing or flow.reset:
        return False  # the port is used again
    return decision.keeps is None or flow.becomes.destination in decision.keeps


def reply_arrival(node: LocalNode, flow: Tuple) -> Place:
    """Where the replies of a flow come from; `flow` is what its packets became."""
    return place(node, flow.destination.address)


def text(flow: Tuple) -> str:
    """ "TCP 10.0.0.1:1000 > 10.96.0.1:80"."""
    ends = [f"[{e.address}]:{e.port}" if ":" in e.address else f"{e.address}:{e.port}" for e in flow[1:]]
    return f"{flow.protocol} {ends[0]} > {ends[1]}"
