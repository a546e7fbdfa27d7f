"""Policies as the oracle reads them, and the data path, side by side: objects change, packets go, both must agree.

`PolicyComparison` is one node. Objects go through the planner and PolicyWriter into the real tables; every packet goes
through the real programs and is asked of `model.policy_flows`. While an update is written, probes go out after every
single write: each of them must meet the old verdict or the new one.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec

from waggle.abi._generated import Direction as AbiDirection
from waggle.abi._generated import Event, EventKind, Outcome, PolicyState, Reason
from waggle.abi.address import pack_address, unpack_address
from waggle.kernel.maps import Map
from waggle.kernel.ringbuf import RingBuffer
from waggle.model.flows import Tuple, text
from waggle.model.meta import ObjectKey
from waggle.model.objects import Node, Pod
from waggle.model.packets import End
from waggle.model.policy import Decision, PolicyWorld, Side
from waggle.model.policy_flows import PolicyFlows, PolicyPacket, verdict
from waggle.model.policy_objects import ClusterNetworkPolicy, Namespace, NetworkPolicy
from waggle.model.policy_rules import NO_RULE, Direction, RuleRef
from waggle.plan.policy import PolicyPlanner
from waggle.plan.policy_tables import PENDING
from waggle.reconcile.policy import PolicyWriter
from waggle.testing.differential import Difference
from waggle.testing.frames import ACK, ETH_IP, SYN, Frame, ip_frame, parse
from waggle.testing.machine import DROP, POD_MAC, UPLINK_MAC, Machine
from waggle.testing.policed import assigner
from waggle.testing.programmed import FIRST_IFINDEX, empty

PolicyObject = Pod | Namespace | Node | NetworkPolicy | ClusterNetworkPolicy
_FIELDS: dict[type[Any], str] = {
    Pod: "pods",
    Namespace: "namespaces",
    Node: "nodes",
    NetworkPolicy: "policies",
    ClusterNetworkPolicy: "cluster_policies",
}
_MACS = bytes.fromhex((UPLINK_MAC + POD_MAC).replace(":", ""))
_EMPTIED = ("wag_classes", "wag_class_ranges", "wag_policy", "wag_conns", "wag_denials")
_REASONS = {Direction.EGRESS: Reason.POLICY_EGRESS, Direction.INGRESS: Reason.POLICY_INGRESS}
_ABI_DIRECTIONS = {Direction.EGRESS: AbiDirection.EGRESS, Direction.INGRESS: AbiDirection.INGRESS}
_NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58, "GRE": 47}
PROBE_PORTS = range(20000, 60000)


class Probe(NamedTuple):
    """A flow that would begin now."""

    protocol: str
    source: str
    destination: str
    port: int


class _Told(NamedTuple):
    """What an event says."""

    outcome: Outcome
    reason: int
    direction: int
    policy: int
    rule: int


class _Written(Protocol):
    def __call__(self) -> None: ...


class _Watched:
    """A map whose every write is told, entry by entry."""

    def __init__(self, real: Map, after: _Written) -> None:
        self._real = real
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def update(self, key: bytes, value: bytes) -> None:
        self._real.update(key, value)
        self._after()

    def delete(self, key: bytes) -> bool:
        found = self._real.delete(key)
        self._after()
        return found

    def update_many(self, entries: Iterable[tuple[bytes, bytes]]) -> int:
        pairs = list(entries)
        for key, value in pairs:
            self.update(key, value)
        return len(pairs)

    def delete_many(self, keys: Iterable[bytes]) -> int:
        return sum(self.delete(key) for key in list(keys))


@dataclass
class PolicyComparison:
    """One node. `here` are the addresses of its interfaces and whose they are; `own` its own addresses. `agreed` counts
    packets by what happened to them; `history` is what happened so far, for people."""

    machine: Machine
    here: dict[str, ObjectKey]
    node: str
    own: frozenset[str]
    keep: bool = False
    agreed: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._empty()
        self._objects: dict[str, dict[ObjectKey, PolicyObject]] = {name: {} for name in _FIELDS.values()}
        self._services: dict[tuple[str, End], End] = {}
        self._probes: list[Probe] = []
        self._going_on: list[PolicyPacket] = []
        self._next_port = 0
        self._fragments = 0
        self._writes = 0
        self.flows = PolicyFlows(keep=self.keep)
        self.opened: dict[PolicyPacket, Tuple] = {}  # by the packet that opened a flow, what it became
        self.world = self._world()
        self.pending = self._unknown()
        self._before: tuple[PolicyWorld, frozenset[str]] | None = None
        self.planner = PolicyPlanner()
        self._ring = RingBuffer(self.machine.maps["wag_events_rb"])
        self._ring.skip()
        self.writer = self._writer()
        self._tell_all()
        self.history.append(f"node {self.node}, interfaces {self.here}, {'keep' if self.keep else 'cut'}")
        self.machine.summed = False

    def close(self) -> None:
        self._ring.close()

    def _empty(self) -> None:
        empty(self.machine)
        maps = self.machine.maps
        for name in _EMPTIED:
            maps[name].delete_many(list(maps[name].keys()))
        self.machine.forget_open_flows()
        maps["wag_policy_state"].update(bytes(4), PolicyState(0, int(self.keep)).pack())
        for address in self.own:
            self.machine.add_node(address)
        for index, address in enumerate(sorted(self.here)):
            self.machine.add_pod(address, FIRST_IFINDEX + index // 2, ingress=PENDING, egress=PENDING)

    def _writer(self) -> PolicyWriter:
        maps: Any = {name: _Watched(real, self._written) for name, real in self.machine.maps.items()}
        really = assigner(self.machine, self._sets_of)

        def assign(addresses: Iterable[str]) -> None:
            for address in addresses:
                really([address])
                self._written()

        writer = PolicyWriter(maps, assign, keep=self.keep)
        writer.adopt()
        return writer

    def _sets_of(self, address: str) -> tuple[int, int]:
        return self.planner.tables.pods.get(address, (PENDING, PENDING))

    def _world(self) -> PolicyWorld:
        objects: dict[str, Any] = {name: dict(found) for name, found in self._objects.items()}
        return PolicyWorld(**objects, here=frozenset(self.here), node=self.node, node_addresses=self.own)

    def _unknown(self) -> frozenset[str]:
        """Interfaces of which nobody knows whose they are."""
        return frozenset(address for address, key in self.here.items() if key not in self._objects["pods"])

    # -- objects ------------------------------------------------------------------------------------------------

    def serve(self, protocol: str, frontend: End, backend: End) -> None:
        """A Service with one backend."""
        self._services[protocol, frontend] = backend
        self.machine.add_service(frontend.address, frontend.port, protocol, [backend])

    def put(self, *objects: PolicyObject, probes: Sequence[Probe] = ()) -> None:
        """Objects come or change, all in one update. `probes` go out while it is written."""
        for obj in objects:
            self._set(type(obj), obj.key, obj)
            self.history.append(f"put {type(obj).__name__} {msgspec.json.encode(obj).decode()}")
        self._update(probes)

    def remove(self, kind: type[Any], key: ObjectKey, *, probes: Sequence[Probe] = ()) -> None:
        """An object goes; unknown ones too."""
        self._set(kind, key, None)
        self.history.append(f"remove {kind.__name__} {key}")
        self._update(probes)

    def restart(self, *objects: PolicyObject, probes: Sequence[Probe] = ()) -> None:
        """A new agent reads back what there is, plans anew, and makes it right. `objects` came or changed before it."""
        self.history.append("restart")
        for obj in objects:
            self._objects[_FIELDS[type(obj)]][obj.key] = obj
            self.history.append(f"meanwhile {type(obj).__name__} {msgspec.json.encode(obj).decode()}")
        self._before = self.world, self.pending
        self.world, self.pending = self._world(), self._unknown()
        self.planner = PolicyPlanner()
        self._tell_all()
        self.planner.plan()
        self._probes = list(probes)
        self.writer = self._writer()
        self.writer.settle(self.writer.sync(self.planner.tables))
        self._probes = []
        self._ring.skip()

    def keys(self) -> list[tuple[type[Any], ObjectKey]]:
        """Every object there is."""
        return [(kind, key) for kind, name in _FIELDS.items() for key in sorted(self._objects[name])]

    def _set(self, kind: type[Any], key: ObjectKey, obj: Any) -> None:
        objects = self._objects[_FIELDS[kind]]
        if obj is None:
            objects.pop(key, None)
        else:
            objects[key] = obj
        self._tell(kind, key, obj)

    def _tell(self, kind: type[Any], key: ObjectKey, obj: Any) -> None:
        planner = self.planner
        tells: dict[type[Any], Callable[[], None]] = {
            Pod: lambda: planner.set_pod(key, obj),
            Namespace: lambda: planner.set_namespace(key.name, obj),
            Node: lambda: planner.set_node(key.name, obj),
            NetworkPolicy: lambda: planner.set_policy(key, obj),
            ClusterNetworkPolicy: lambda: planner.set_cluster_policy(key, obj),
        }
        tells[kind]()

    def _tell_all(self) -> None:
        self.planner.set_own_addresses(self.own)
        for address, key in self.here.items():
            self.planner.attach(address, key)
        for kind, name in _FIELDS.items():
            for key, obj in self._objects[name].items():
                self._tell(kind, key, obj)

    def _update(self, probes: Sequence[Probe]) -> None:
        self._before = self.world, self.pending
        self.world, self.pending = self._world(), self._unknown()
        deltas = self.planner.plan()
        self._probes = list(probes)
        if probes:  # what passes before and after goes on meanwhile
            old = self._before[0]
            self._going_on = [
                packet._replace(begins=False)
                for packet in list(self.opened)[-8:]
                if self._is_plain(packet)
                and self.flows.is_open(old, packet)
                and self.flows.is_open(self.world, packet)
                and not self._waits(packet, self._before[1] | self.pending)
            ]
        for delta in deltas:
            self.writer.settle(self.writer.write(delta))
        self._probes, self._going_on = [], []
        self._ring.skip()

    def _is_plain(self, packet: PolicyPacket) -> bool:
        return packet.protocol in ("TCP", "UDP", "SCTP") and self.opened[packet] == Tuple(*packet[:3])

    # -- while an update is written -----------------------------------------------------------------------------

    def _written(self) -> None:
        self._writes += 1
        for probe in self._probes:
            self._next_port += 1
            source = End(probe.source, PROBE_PORTS[self._next_port % len(PROBE_PORTS)])
            packet = PolicyPacket(probe.protocol, source, End(probe.destination, probe.port))
            passes, program = self._pass(packet, self._frame(packet, SYN))
            may = self._may(packet, program)
            if passes not in may:
                raise self._difference(packet, f"{_said(passes)} after write {self._writes} of the update", str(may))
            self.agreed[f"policy: {_said(passes)}, old or new"] += 1
        for packet in self._going_on:
            passes, _ = self._pass(packet, self._frame(packet, ACK))
            if not passes:
                raise self._difference(packet, f"cut after write {self._writes} of the update", "passes")
            self.agreed["policy: goes on, old and new"] += 1

    def _may(self, packet: PolicyPacket, program: str) -> set[bool]:
        """The verdicts that are right with each side as it was or as it will be."""
        assert self._before is not None
        old, waited = self._before
        egress, ingress = set(), set()
        for world, waiting in ((old, waited), (self.world, self.pending)):
            said = verdict(world, packet)
            ready = {end: end not in waiting or self._is_own_node(packet, program) for end in self._ends(packet)}
            egress.add(ready[packet.source.address] and said.egress.allowed)
            ingress.add(ready[packet.destination.address] and said.ingress.allowed)
        if packet.source.address == packet.destination.address:
            return {True}
        return {one and other for one in egress for other in ingress}

    # -- packets ------------------------------------------------------------------------------------------------

    def send(
        self, packet: PolicyPacket, *, flags: int = 0, later_fragment: bool = False, by_stack: bool = False
    ) -> None:
        """A packet as its sender sends it; to a Service too. Flags of TCP, else by whether it begins."""
        flags = flags or (SYN if packet.begins else ACK)
        meant = self._meant(packet)
        if later_fragment:
            if meant != packet:
                return
            self._fragments += 1
            meant = packet = self._portless(packet)
            number = _NUMBERS[packet.protocol]
            ends = packet.source.address, packet.destination.address
            frame = ip_frame(_MACS, *ends, number, bytes(64), fragment=(self._fragments, 1480))
        else:
            frame = self._frame(packet, flags)
        self._judge(packet, meant, frame, by_stack=by_stack)

    def reply(self, opener: PolicyPacket) -> None:
        """The other end of a flow that was opened answers: from where it was asked, to who asked it there."""
        became = self.opened[opener]
        if opener.protocol.startswith("ICMP"):
            packet = PolicyPacket(opener.protocol, End(became.destination.address, 0), became.source, False)
        else:
            packet = PolicyPacket(opener.protocol, became.destination, became.source, False)
        self._judge(packet, opener.reversed(), self._frame(packet, SYN | ACK))

    def complain(self, source: str, inner: PolicyPacket, destination: str = "") -> None:
        """Somebody sends an ICMP error about a packet. `destination`: of the error, where it is not who sent that."""
        to = destination or inner.source.address
        if self.machine.maps["wag_nat"].lookup(_tuple_key(inner.reversed())) is not None:
            return  # of a translated flow: it goes to whoever that belongs to (tests/bpf/test_policy_packets.py)
        if self._waits(inner):
            return  # who is pending neither says nor gets anything that could be complained of
        inside = {*self.own, inner.source.address} if source not in (*self.here, *self.own) else set()
        if inner.destination.address in inside or inner.source.address in self.own & inside:
            return  # between a pod and itself or its node, which nobody on a wire has seen
        protocol = "ICMPv6" if ":" in source else "ICMP"
        about = self._frame(inner, SYN)[14 : 14 + 128]
        head = struct.pack("!BBHI", 3 if protocol == "ICMP" else 1, 1, 0, 0)
        frame = ip_frame(_MACS, source, to, _NUMBERS[protocol], head + about)
        packet = PolicyPacket(protocol, End(source, 0), End(to, 0))
        self.history.append(f"about {_named(inner)}:")
        if source != to and not self._waits(packet) and self._is_asked(packet):
            is_about = self.flows.is_about_open(self.world, source, to, inner)
            if is_about:
                self._compare(packet, frame, wanted=True, what="error about a flow")
                return
        self._judge(packet, packet, frame, what="error")

    def forget(self, opener: PolicyPacket) -> None:
        """A flow is evicted."""
        conns = self.machine.maps["wag_conns"]
        for pair in (opener, opener.reversed()):
            conns.delete(_tuple_key(pair))
        self.machine.forget_open_flows()
        self.flows.forget(opener)
        self.history.append(f"evicted {text(Tuple(*opener[:3]))}")

    def _meant(self, packet: PolicyPacket) -> PolicyPacket:
        """As it is once Services are translated."""
        ends = (packet.destination, End("", packet.destination.port))
        for end in ends if packet.destination.address in self.own else ends[:1]:
            address = end.address or ("::" if ":" in packet.destination.address else "0.0.0.0")
            backend = self._services.get((packet.protocol, End(address, end.port)))
            if backend is not None:
                return packet._replace(destination=backend)
        return packet

    @staticmethod
    def _portless(packet: PolicyPacket) -> PolicyPacket:
        source, destination = packet.source.address, packet.destination.address
        return PolicyPacket(packet.protocol, End(source, 0), End(destination, 0), packet.protocol == "UDP")

    def _judge(
        self, packet: PolicyPacket, meant: PolicyPacket, frame: bytes, *, by_stack: bool = False, what: str = ""
    ) -> None:
        """`meant`: as policies see the packet."""
        program = self._program(packet, by_stack=by_stack)
        if packet.source.address == meant.destination.address:
            self._compare(packet, frame, wanted=True, what=what or "itself", program=program)
            return
        if not self._is_asked(meant):
            wanted = verdict(self.world, meant).allowed
            self._compare(packet, frame, wanted=wanted, what=what or "not asked", program=program)
            return
        if self._waits(meant):
            wanted = self._is_own_node(meant, program)
            self._compare(packet, frame, wanted=wanted, what="pending", program=program, told=None)
            return
        known = self.flows.is_known(meant)
        said = verdict(self.world, self.flows.judged(self.world, meant))
        wanted = self.flows.saw(self.world, meant)
        told: set[_Told] | None = self._told(said, dropped=not wanted)
        if wanted and (known or not said.allowed):
            told = None  # what is known may be judged again, which is told again
        became = self._compare(packet, frame, wanted=wanted, what=what, program=program, told=told)
        if wanted and said.allowed and not known and became is not None:
            self.opened[meant] = became

    def _compare(
        self,
        packet: PolicyPacket,
        frame: bytes,
        *,
        wanted: bool,
        what: str,
        program: str = "",
        told: set[_Told] | None = None,
    ) -> Tuple | None:
        """Runs a packet. What it became; None where it was dropped, or has no ports."""
        program = program or self._program(packet)
        out = self.machine.run_here(program, frame)
        passes = out.verdict != DROP
        self.history.append(f"{program} {_named(packet)} {what}: {_said(passes)}")
        if passes != wanted:
            raise self._difference(packet, _said(passes), _said(wanted))
        found = [told_of(event) for event in map(Event.unpack, self._ring.read()) if event.kind == EventKind.POLICY]
        if told is not None and set(found) != told:
            raise self._difference(packet, f"told {found}", f"{told}")
        self.agreed[f"policy: {_said(passes)}{', ' + what if what else ''}"] += 1
        if not passes:
            return None
        if packet.protocol.startswith("ICMP"):
            return self._echo_became(packet, out.packet) if packet.source.port else None
        return parse(out.packet).flow if packet.protocol in ("TCP", "UDP", "SCTP") and packet.source.port else None

    @staticmethod
    def _echo_became(packet: PolicyPacket, frame: bytes) -> Tuple:
        v4 = frame[12:14] == struct.pack("!H", ETH_IP)
        source = unpack_address(bytes(10) + b"\xff\xff" + frame[26:30] if v4 else frame[22:38])
        number = int.from_bytes(frame[38:40] if v4 else frame[58:60], "big")
        return Tuple(packet.protocol, End(source, number), packet.destination)

    def _told(self, said: Decision, *, dropped: bool) -> set[_Told]:
        """The events that are due."""
        if dropped:
            side = said.deciding
            return {self._event(side, Outcome.DROPPED, side.rule)}
        sides = [side for side in (said.egress, said.ingress) if side.audit]
        return {self._event(side, Outcome.AUDIT, side.audit.rule) for side in sides if side.audit}

    def _event(self, side: Side, outcome: Outcome, rule: RuleRef | None) -> _Told:
        direction = side.direction
        addresses = [address for address, key in self.here.items() if key == side.pod]
        sets = self.planner.tables.pods[addresses[0]]
        set_id = sets[direction is Direction.EGRESS]
        return _Told(outcome, _REASONS[direction], _ABI_DIRECTIONS[direction], set_id, rule.id if rule else NO_RULE)

    # -- who is who ---------------------------------------------------------------------------------------------

    @staticmethod
    def _ends(packet: PolicyPacket) -> tuple[str, str]:
        return packet.source.address, packet.destination.address

    def _is_asked(self, packet: PolicyPacket) -> bool:
        """Whether the tables say anything of one of the ends."""
        return any(self._sets_of(end) != (0, 0) for end in self._ends(packet) if end in self.here)

    def _waits(self, packet: PolicyPacket, waiting: frozenset[str] | None = None) -> bool:
        return (
            not self.pending.isdisjoint(self._ends(packet))
            if waiting is None
            else not waiting.isdisjoint(self._ends(packet))
        )

    def _is_own_node(self, packet: PolicyPacket, program: str) -> bool:
        return program != "wag_node_ingress" and not self.own.isdisjoint(self._ends(packet))

    def _program(self, packet: PolicyPacket, *, by_stack: bool = False) -> str:
        source, destination = self._ends(packet)
        if source in self.here:
            return "wag_pod_egress"
        if destination in self.here and (by_stack or source in self.own):
            return "wag_pod_ingress"
        return "wag_node_ingress"

    def _pass(self, packet: PolicyPacket, frame: bytes) -> tuple[bool, str]:
        program = self._program(packet)
        return self.machine.run_here(program, frame).verdict != DROP, program

    def _frame(self, packet: PolicyPacket, flags: int) -> bytes:
        protocol, source, destination, _ = packet
        if protocol in ("TCP", "UDP", "SCTP"):
            return Frame(Tuple(protocol, source, destination), flags, b"hello").build(_MACS[6:], _MACS[:6])
        ends = self._ends(packet)
        if protocol == "GRE":
            return ip_frame(_MACS, *ends, _NUMBERS[protocol], bytes(16))
        request, reply = (8, 0) if protocol == "ICMP" else (128, 129)
        kind = request if source.port else reply
        segment = struct.pack("!BBHHH", kind, 0, 0, source.port or destination.port, 1) + b"hello"
        return ip_frame(_MACS, *ends, _NUMBERS[protocol], segment)

    def _difference(self, packet: PolicyPacket, found: str, wanted: str) -> Difference:
        services = [
            f"{p} {one.address}:{one.port} is {two.address}:{two.port}" for (p, one), two in self._services.items()
        ]
        lines = ["; ".join(services), *self.history, "", f"about {_named(packet)}"]
        lines += [f"the oracle says: {wanted}; {verdict(self.world, self._meant(packet))}"]
        return Difference("\n".join([*lines, f"the data path differs: {found}"]))


def told_of(event: Event) -> _Told:
    """What an event of policy says."""
    return _Told(Outcome(event.verdict), event.reason, event.direction, event.policy, event.rule)


def _tuple_key(packet: PolicyPacket) -> bytes:
    from waggle.abi._generated import Tuple as AbiTuple

    ends = pack_address(packet.source.address), pack_address(packet.destination.address)
    return AbiTuple(*ends, packet.source.port, packet.destination.port, _NUMBERS[packet.protocol]).pack()


def _said(passes: bool) -> str:
    return "pass" if passes else "drop"


def _named(packet: PolicyPacket) -> str:
    return text(Tuple(*packet[:3])) + ("" if packet.begins else " (goes on)")
