"""What flows add to policies: a node that remembers every flow it let through.

A packet passes if a packet that policies allowed opened its flow, in either direction. One of TCP or SCTP that begins
nothing, of a flow that the node does not know, is judged as its connection was opened, which the sockets of its ends
tell: the node may have forgotten the flow, or a policy may have come after it. Where they tell nothing it passes if
either direction is allowed. When objects change, flows are judged again as they were opened, or keep passing, as a
setting says. One that may not go on is cut for both ends: what the end that was asked has still to say does not open
it, only a packet that begins a connection does.

`PolicyFlows.allows` says what must happen to a packet, `saw` remembers what did.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from waggle.model.packets import End
from waggle.model.policy import WITH_PORTS, Decision, PolicyWorld, canonical, decide

#: Protocols whose packets say whether they begin something.
_CONNECTIONS = frozenset(("TCP", "SCTP"))


class PolicyPacket(NamedTuple):
    """A packet as policies see it: original source, final destination. Both ports of an echo are its id; packets
    without ports have 0. `begins`: false in the middle of a connection (TCP: any but the client's SYN; SCTP: any but an
    INIT)."""

    protocol: str
    source: End
    destination: End
    begins: bool = True

    def reversed(self) -> PolicyPacket:
        """As the packets of the other direction are; they begin nothing."""
        return PolicyPacket(self.protocol, self.destination, self.source, False)

    @property
    def flow(self) -> tuple[str, frozenset[End]]:
        """The same for both directions."""
        return self.protocol, frozenset((self.source, self.destination))


@dataclass(slots=True)
class PolicyFlows:
    """The flows that a node let through. `keep`: established flows outlive the policies that allowed them
    (policy-established: keep); otherwise the verdict of each is that of now (cut). `sockets`: what opened the
    connection of a packet, as far as its ends can tell."""

    keep: bool = False
    sockets: Callable[[PolicyPacket], PolicyPacket | None] = lambda packet: None
    _opened: dict[object, PolicyPacket] = field(default_factory=dict)  # flow → the packet that opened it

    def allows(self, world: PolicyWorld, packet: PolicyPacket) -> bool:
        """Whether a packet must pass, `world` being as it is now."""
        if self.is_open(world, packet):
            return True
        if self.is_known(packet) and not (packet.begins and packet.protocol in _CONNECTIONS):
            return False
        return any(_allowed(world, one) for one in self._meant(packet))

    def _meant(self, packet: PolicyPacket) -> list[PolicyPacket]:
        """What may have opened the flow of a packet, were it not known."""
        if packet.begins or packet.protocol not in _CONNECTIONS:
            return [packet]
        opener = self.sockets(packet)
        return [packet, packet.reversed()] if opener is None else [opener]

    def allows_error(
        self, world: PolicyWorld, protocol: str, source: str, destination: str, inner: PolicyPacket
    ) -> bool:
        """Whether an ICMP error must pass: one about a flow that passes does, whatever is said of ICMP."""
        return (
            self.is_about_open(world, source, destination, inner)
            or decide(world, source, destination, protocol).allowed
        )

    def is_about_open(self, world: PolicyWorld, source: str, destination: str, inner: PolicyPacket) -> bool:
        """Whether an error is about a packet that its receiver sent, and that passes.

        Routers complain about what was for others; pods, which are none, about what was for themselves: else an error
        would be a way out for who has no other.
        """
        about = inner.source.address == destination
        if canonical(source) in world.pod_by_address and (world.here is None or canonical(source) in world.here):
            about = about and inner.destination.address == source
        if not about or self.is_known(inner):
            return about and self.is_open(world, inner)
        return _allowed(world, inner) or _allowed(world, inner.reversed())

    def saw(self, world: PolicyWorld, packet: PolicyPacket) -> bool:
        """Says whether a packet must pass, and remembers its flow if so."""
        passes = self.allows(world, packet)
        if passes and not self.is_open(world, packet):
            self._opened[packet.flow] = next(one for one in self._meant(packet) if _allowed(world, one))
        return passes

    def is_known(self, packet: PolicyPacket) -> bool:
        """Whether the flow of a packet is remembered."""
        return packet.flow in self._opened

    def is_open(self, world: PolicyWorld, packet: PolicyPacket) -> bool:
        """Whether the flow of a packet is remembered, and may go on."""
        opener = self._opened.get(packet.flow)
        return opener is not None and (self.keep or _allowed(world, opener))

    def judged(self, world: PolicyWorld, packet: PolicyPacket) -> PolicyPacket:
        """The packet whose verdict counts: of a flow that is cut it is the one that opened it."""
        opener = self._opened.get(packet.flow)
        begins = packet.protocol in _CONNECTIONS and packet.begins
        return packet if opener is None or begins or self.is_open(world, packet) else opener

    def forget(self, packet: PolicyPacket) -> None:
        """The flow of a packet is evicted, or over."""
        self._opened.pop(packet.flow, None)


def verdict(world: PolicyWorld, packet: PolicyPacket) -> Decision:
    """What policies say of a packet, were it the first of its flow."""
    port = packet.destination.port if packet.protocol in WITH_PORTS else None
    return decide(world, packet.source.address, packet.destination.address, packet.protocol, port)


def _allowed(world: PolicyWorld, packet: PolicyPacket) -> bool:
    return verdict(world, packet).allowed
