"""The model and the data path, side by side: objects change, packets go, and both must say the same.

`Comparison` is one node with its objects and its flows. Every packet goes through the real programs and through
`waggle.model`; `Difference` is raised where the two disagree, with everything that led there as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from waggle.abi._generated import Hook, Nat
from waggle.abi._generated import Tuple as AbiTuple
from waggle.abi.address import PROTOCOLS, pack_address
from waggle.kernel.testrun import TestRun
from waggle.model.flows import Expected, Flows, Tuple, text
from waggle.model.objects import Object, ObjectKey, Service, kind_of
from waggle.model.packets import (
    Action,
    Arrival,
    Cluster,
    Decision,
    End,
    LocalNode,
    Packet,
    Place,
    all_frontends,
    canonical,
    knows_pods,
    node_address,
    place,
)
from waggle.model.service import Family
from waggle.testing.frames import ACK, FIN, RST, SYN, BadFrame, Frame, Parsed, parse, unwrap, wrong_answer
from waggle.testing.machine import (
    DROP,
    GATEWAY_MAC,
    HOST_MAC,
    PASS,
    POD_MAC,
    REDIRECT,
    SNAT_PORTS,
    UPLINK_MAC,
    XDP_DROP,
    XDP_PASS,
    XDP_TX,
    Machine,
    WrongSum,
)
from waggle.testing.programmed import ProgrammedNode

ORIGIN = "differential"
#: what a packet became that was answered because its time was over
EXPIRED = Tuple("", End("", 0), End("", 0))
_VERDICTS = {PASS: "pass", DROP: "drop", REDIRECT: "redirect"}
_PROGRAMS = {Arrival.POD: "wag_pod_egress", Arrival.WIRE: "wag_node_ingress"}
_HOOKS = (Hook.POD_EGRESS, Hook.NODE_INGRESS, Hook.XDP)
_Claim = tuple[Family, str, int, str]  # "" as the address: node ports


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


SENDER = _mac(POD_MAC)
RECEIVER = _mac(UPLINK_MAC)
XDP_TO_GATEWAY = _mac(GATEWAY_MAC) + _mac(UPLINK_MAC)
TO_POD = _mac(POD_MAC) + _mac(HOST_MAC)


class Difference(AssertionError):
    """Model and data path disagree. The text is the history of the node, and what differs."""


@dataclass
class Comparison:
    """One node. `agreed` counts packets by what happened to them; `history` is what happened so far, for people. With
    `xdp`, what comes in by the wire meets the XDP program first."""

    machine: Machine
    local: LocalNode
    xdp: bool = False
    agreed: Counter[str] = field(default_factory=Counter)
    now: float = 0.0
    history: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.node = ProgrammedNode(self.machine, self.local)
        self.flows = Flows(SNAT_PORTS)
        self._claims: dict[_Claim, list[ObjectKey]] = {}
        self.ever: dict[tuple[str, End], None] = {}  # protocol and address of every frontend there ever was
        self.history.append(f"node {self.local}")

    # -- what happens -------------------------------------------------------------------------------------------

    def put(self, *objects: Object) -> None:
        """Objects come or change."""
        for obj in objects:
            self.node.store.upsert(obj, ORIGIN)
            self.history.append(f"put {kind_of(obj)} {msgspec.json.encode(obj).decode()}")
        self._settle()

    def remove(self, kind: str, key: ObjectKey) -> None:
        """An object goes; unknown ones too."""
        self.node.store.delete(kind, key, ORIGIN)
        self.history.append(f"remove {kind} {key}")
        self._settle()

    def _settle(self) -> None:
        self.node.sync()
        now: dict[_Claim, list[ObjectKey]] = {}
        for key, service in sorted(self.node.store.services.items()):
            for claim in dict.fromkeys(_claims(service)):
                now.setdefault(claim, []).append(key)
        # who has a frontend keeps it until it gives it up; then whoever waited longest has it
        before = self._claims
        self._claims = {
            claim: sorted(keys, key=lambda k: _rank(before.get(claim, []), k)) for claim, keys in now.items()
        }
        for family, address, port, protocol in self._claims:
            for one in [address] if address else sorted(self.local.addresses):
                if (":" in one) == (family is Family.IPV6):
                    self.ever[protocol, End(one, port)] = None

    def frontends(self) -> list[tuple[str, End]]:
        """Protocol and address of every frontend there is now, a node port on each address of the node."""
        return [frontend for frontend in self.ever if self._is_claimed(*frontend)]

    def _is_claimed(self, protocol: str, end: End) -> bool:
        family = Family.IPV6 if ":" in end.address else Family.IPV4
        return any((family, address, end.port, protocol) in self._claims for address in (end.address, ""))

    def advance(self, seconds: int) -> None:
        """Time passes."""
        self.now += seconds
        self.node.age(seconds)
        self.history.append(f"{seconds} s pass")

    def cluster(self, packet: Packet) -> Cluster:
        """The objects, with whoever holds the frontend of a packet first."""
        store = self.node.store
        family = Family.IPV6 if ":" in packet.destination.address else Family.IPV4
        services: dict[ObjectKey, Service] = {}
        for address in (packet.destination.address, ""):
            for key in self._claims.get((family, address, packet.destination.port, packet.protocol), ()):
                services.setdefault(key, store.services[key])
        return Cluster({**services, **store.services}, store.slices, store.pods, store.nodes, store.service_cidrs)

    # -- packets ------------------------------------------------------------------------------------------------

    def send(self, frame: Frame) -> None:
        """A client sends a packet: a pod of this node, or, with any other source, somebody beyond the wire."""
        flow = frame.flow
        arrival = Arrival.POD if place(self.local, flow.source.address) is Place.POD else Arrival.WIRE
        packet = Packet(flow.protocol, flow.source, flow.destination, _begins(frame))
        if not packet.begins and self.flows.was_left(flow):
            return  # no client goes on with a connection that it has begun anew
        expected = self.flows.expect(self.cluster(packet), self.local, packet, arrival, self.now)
        fin, reset = (flow.protocol == "TCP" and bool(frame.flags & flag) for flag in (FIN, RST))
        if (fin or reset) and expected.is_new and (frame.ttl <= 1 or self.xdp):
            return  # what is remembered of it cannot be seen; XDP and tc may both have seen it
        became = self._run(_PROGRAMS[arrival], frame, expected, packet, arrival)
        if became is EXPIRED and expected.is_new:
            # the flow has begun; what it became shows when its packets come through
            frame = replace(frame, ttl=64)
            became = self._run(_PROGRAMS[arrival], frame, expected, packet, arrival)
        self.flows.saw(packet, expected, None if became is EXPIRED else became, fin=fin, reset=reset, now=self.now)
        to_pod = place(self.local, flow.destination.address) is Place.POD
        if arrival is Arrival.WIRE and to_pod and became == flow and self._is_outside(flow.source):
            self.flows.spare(packet)

    def _is_outside(self, end: End) -> bool:
        return self.local.know_pods is not None and not knows_pods(self.local, end.address)

    def reply(self, flow: Tuple, frame: Frame) -> None:
        """The backend of a flow answers with `frame`, whose addresses are filled in. `flow`: as the client sends it."""
        becomes = frame.flow
        if {place(self.local, end.address) for end in becomes[1:]} == {Place.AWAY}:
            return  # a pod of this node that is not attached here: its replies go another way
        program = {
            Place.POD: "wag_pod_egress",
            Place.AWAY: "wag_node_ingress",
            Place.NODE: "wag_pod_ingress" if self._is_pod(becomes.destination) else "wag_node_egress",
        }[place(self.local, becomes.source.address)]
        expected = Expected(Decision(Action.FORWARD), flow.reversed())
        packet = Packet(becomes.protocol, becomes.source, becomes.destination)
        self._run(program, frame, expected, packet, None)

    def _is_pod(self, end: End) -> bool:
        return place(self.local, end.address) is Place.POD

    def _run(
        self, program: str, frame: Frame, expected: Expected, packet: Packet, arrival: Arrival | None
    ) -> Tuple | None:
        """Runs a packet and compares. What it became; None where it went no further, EXPIRED where its time is over."""
        raw = frame.build(SENDER, RECEIVER)
        dropped = self._dropped(expected)
        out, verdict = self._run_xdp(raw, expected) if self.xdp and program == "wag_node_ingress" else (None, "")
        way = XDP_TO_GATEWAY if out is not None else b""
        if out is None:
            stays = expected.becomes is not None or expected.decision.action not in (Action.DROP, Action.REJECT)
            # of UDP without a checksum nobody asks for the sum
            self.machine.summed = stays and frame.ttl > 1 and frame.checksum
            try:
                out = self.machine.run_here(program, raw)
            except WrongSum as error:
                raise self._difference(expected, str(error)) from error
            verdict = _VERDICTS.get(out.verdict, str(out.verdict))
        by = " by XDP" if way else ""
        size = len(frame.payload)
        self.history.append(f"{program} {text(frame.flow)}{_flags(frame)} ttl {frame.ttl} {size} bytes: {verdict}{by}")
        if expected.may_resume is not None and _flow_of(out.packet) == expected.may_resume:
            expected = expected._replace(becomes=expected.may_resume)
        action = expected.decision.action
        if expected.becomes is None and action in (Action.DROP, Action.REJECT):
            is_reset = frame.flow.protocol == "TCP" and frame.flags & RST  # never answered
            if action is Action.DROP or is_reset:
                self._same(verdict, "drop", expected)
            else:
                self._same(verdict, "redirect", expected)
                self._same(wrong_answer(raw, out.packet), "", expected)
            if self._dropped(expected) != dropped + 1:
                raise self._difference(expected, f"{verdict}, not counted as {expected.decision.reason}")
            self.agreed[f"{action} ({expected.decision.reason}){by}"] += 1
            return None
        if verdict == "drop":
            raise self._difference(expected, "dropped")
        if verdict == "redirect" and frame.ttl <= 1:
            self._same(self._may_expire(expected, packet), "", expected)
            node = node_address(self.local, packet.source.address)
            self._same(wrong_answer(raw, out.packet, expired_at=node), "", expected)
            self.agreed["expired"] += 1
            return EXPIRED
        try:
            inside = unwrap(out.packet)
            if inside is not None:
                self.agreed[f"inside another packet{by}"] += 1
                return self._goes_inside(raw, inside, verdict, expected, packet)
            was, now = parse(raw), parse(out.packet)
        except BadFrame as error:
            raise self._difference(expected, f"sent on as a bad frame: {error}") from error
        self.history[-1] += f", {text(now.flow)} ttl {now.ttl}"
        self._same_flow(expected, packet, now.flow)
        self._same_way(expected, program, was, now, verdict, way)
        self.agreed[_kind(expected, now.flow != was.flow, arrival) + by] += 1
        return now.flow

    def _dropped(self, expected: Expected) -> int:
        """How many packets were dropped so far for the reason that is expected."""
        reason = expected.decision.reason
        return sum(self.machine.drop_count(reason, hook) for hook in _HOOKS) if reason else 0

    def _run_xdp(self, raw: bytes, expected: Expected) -> tuple[TestRun | None, str]:
        """What XDP makes of a packet, and its verdict in words; (None, "") where it leaves the packet to tc."""
        out = self.machine.run_here("wag_xdp_uplink", raw)
        if out.verdict == XDP_PASS:
            if out.packet != raw:
                raise self._difference(expected, f"XDP passed {out.packet.hex()} on instead of {raw.hex()}")
            return None, ""
        return out, {XDP_DROP: "drop", XDP_TX: "redirect"}.get(out.verdict, f"XDP {out.verdict}")

    def _goes_inside(
        self, raw: bytes, inside: tuple[str, str, bytes], verdict: str, expected: Expected, packet: Packet
    ) -> Tuple:
        """Direct server return: the packet as it was, inside one from this node to the backend."""
        source, destination, frame = inside
        was, now = parse(raw), parse(frame)
        self.history[-1] += f", {text(now.flow)} ttl {now.ttl} inside {source} > {destination}"
        self._same(verdict, "redirect", expected)
        self._same(text(now.flow), text(was.flow), expected)
        self._same(f"{now.ttl} {now.segment.hex()}", f"{was.ttl - 1} {was.segment.hex()}", expected)
        if expected.becomes is not None:
            backends = {expected.becomes.destination} if expected.inside else set()
        else:
            backends = set(expected.decision.inside)
        found = {end for end in backends if end.address == destination}
        if not found:
            raise self._difference(expected, f"inside a packet to {destination}")
        self._same(source, node_address(self.local, destination), expected)
        # the port does not show where a backend has several
        end = found.pop() if len(found) == 1 else End(destination, self._nat_port(packet))
        return Tuple(packet.protocol, packet.source, end)

    def _nat_port(self, packet: Packet) -> int:
        ends = [(pack_address(end.address), end.port) for end in packet[1:3]]
        (source, sport), (target, dport) = ends
        key = AbiTuple(source, target, sport, dport, PROTOCOLS[packet.protocol])
        return int(Nat.unpack(self.machine.maps["wag_nat"].lookup(key.pack()) or b"").to.dport)

    def _may_expire(self, expected: Expected, packet: Packet) -> str:
        """Whether a packet at its last hop may be answered: one that is translated and would go on from here. Others
        the stack answers, which knows them as they are. "" or what is wrong."""
        if expected.decision.action is Action.FORWARD and expected.is_new:
            ends = [packet.destination]  # it may have got a port of its own
        else:
            ends = [expected.becomes.destination] if expected.becomes else list(expected.decision.backends)
        if all(place(self.local, end.address) is Place.NODE for end in ends):
            return "time exceeded, at its destination"
        return ""

    def _same_flow(self, expected: Expected, packet: Packet, now: Tuple) -> None:
        if expected.becomes is not None:
            self._same(text(now), text(expected.becomes), expected)
            if expected.inside:
                raise self._difference(expected, "not inside another packet")
            return
        decision = expected.decision
        backends = {end: source for end, source in decision.backends.items() if end not in decision.inside}
        if expected.decision.action is Action.FORWARD:
            backends = {packet.destination: packet.source.address}
            if {place(self.local, end.address) for end in now[1:]} == {Place.AWAY}:
                # its replies do not come by: they cannot be taken for others
                self._same(text(now), text(Tuple(packet.protocol, packet.source, packet.destination)), expected)
                return
        if now.protocol != packet.protocol or now.destination not in backends:
            raise self._difference(expected, f"{text(now)}: to none of {_ends(backends)}")
        self._same(now.source.address, backends[now.destination], expected)
        wrong = self.flows.wrong_port(packet, now)
        if wrong:
            raise self._difference(expected, f"{text(now)}: {wrong}")

    def _same_way(self, expected: Expected, program: str, was: Parsed, now: Parsed, verdict: str, way: bytes) -> None:
        """Where it goes, and that nothing else of it has changed. `way`: MAC addresses that XDP gives it."""
        self._same(now.segment.hex(), was.segment.hex(), expected)
        self._same(now.options.hex(), was.options.hex(), expected)
        to = place(self.local, now.flow.destination.address)
        if program in ("wag_pod_ingress", "wag_node_egress"):
            goes = False  # the host stack has it in hand
        elif was.ttl <= 1:
            goes = False  # the stack answers that it has come too far, where that is so
            if now.flow != was.flow and to is not Place.NODE:
                raise self._difference(expected, f"{text(now.flow)}: sent on at its last hop")
        elif to is Place.AWAY:
            is_untouched = expected.decision.action is Action.FORWARD and now.flow == was.flow
            goes = program == "wag_pod_egress" or not is_untouched
        else:
            goes = to is Place.POD
        self._same(verdict, "redirect" if goes else "pass", expected)
        self._same(str(now.ttl), str(was.ttl - goes), expected)
        self._same(now.macs.hex(), (TO_POD if goes and to is Place.POD else way or was.macs).hex(), expected)

    def _same(self, found: str, wanted: str, expected: Expected) -> None:
        if found != wanted:
            raise self._difference(expected, f"{found or 'nothing'} instead of {wanted or 'nothing'}")

    def _difference(self, expected: Expected, what: str) -> Difference:
        decision = expected.decision
        wanted = text(expected.becomes) if expected.becomes else _ends(decision.backends)
        reason = f" ({decision.reason})" if decision.reason else ""
        model = f"the model says: {decision.action}{reason} {wanted}".rstrip()
        return Difference("\n".join([*self.history, model, f"the data path differs: {what}"]))


def _begins(frame: Frame) -> bool:
    if frame.flow.protocol == "UDP":
        return True
    return frame.flags & (SYN | ACK | RST) == SYN


def _flow_of(raw: bytes) -> Tuple | None:
    try:
        return parse(raw).flow
    except BadFrame:
        return None  # an answer, for instance


def _kind(expected: Expected, is_changed: bool, arrival: Arrival | None) -> str:
    if arrival is None:
        return "reply turned back"
    if expected.becomes is not None:
        return "known flow" if is_changed else "no flow"
    if expected.decision.action is Action.MASQUERADE:
        return "masqueraded"
    if expected.decision.action is Action.TRANSLATE:
        return f"translated from the {arrival}"
    return "direct, other port" if is_changed else f"forwarded from the {arrival}"


def _claims(service: Service) -> Iterable[_Claim]:
    for family in Family:
        for port, frontend in all_frontends(service, family):
            yield family, canonical(frontend.address) if frontend.address else "", frontend.port, port.protocol


def _rank(before: list[ObjectKey], key: ObjectKey) -> int:
    return before.index(key) if key in before else len(before)


def _flags(frame: Frame) -> str:
    if frame.flow.protocol != "TCP":
        return ""
    return " " + "".join(name for name, bit in (("S", SYN), ("A", ACK), ("F", FIN), ("R", RST)) if frame.flags & bit)


def _ends(backends: Mapping[End, str]) -> str:
    return ", ".join(f"{e.address} {e.port} from {source}" for e, source in sorted(backends.items())) or "nobody"
