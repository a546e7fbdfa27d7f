"""Packets from outside: what one core forwards from a NodePort to a backend on another node.

    wire: generator ─ eth0 ─── eth0: node        a frame to the NodePort goes in, and comes out on the same interface
          backend                                with the backend as its target and, with SNAT, the node as its source

The generator makes frames as a card's driver has them, pages that have no socket buffer yet, and the node's interface
polls for them (NAPI, with GRO, as cards do). All of it is on one CPU: generator and node share that core, and the mode
`floor`, a frame that the node's XDP drops at once, says what the generator takes of it. What came out is counted, not
what was sent.

Before it counts, every flow is sent once and answered, so that connection tracking knows it in both directions. Then
the backend's link-layer address is changed to one that nobody has: frames go the whole way through the node, and what
comes out is dropped by the other side as early as it can be: by XDP what XDP sends, by the stack's first look at the
address what comes as a socket buffer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench import objects
from bench.disturbance import CpuMeter
from bench.figures import Figures
from bench.kube_proxy import load_rules
from bench.leftovers import NETNS, PREFIX, delete_netns
from bench.places import BIN, BenchError, Place, checked, stop
from bench.plain import PORT, start_server
from bench.rounds import repeated, rotated
from bench.rule_sets import RULE_SETS
from bench.service_ports import Endpoint, ServicePort, filler, made_up_endpoints, manifests
from bench.traffic import cpus, target

NODE_PORT = 30080
_SERVICES = 1000  # that the node knows, the measured one included
_ENDPOINTS = 2  # of each of the others
_FLOWS = 256
_NODE, _BACKEND_NODE, _GATEWAY = "10.77.0.11", "10.77.0.12", "10.77.0.1"
_BACKEND, _CLIENTS, _CLIENT = "10.244.2.10", "198.18.0.0/15", "198.18.0.1"
#: Nobody has these: what is sent to them is dropped where it arrives.
_NOBODY, _GATEWAY_MAC = "02:77:ff:ff:ff:fe", "02:77:ff:ff:ff:fd"
_READY_LIMIT = 60.0
#: BPF_PROG_TEST_RUN repeats a packet as it left the program, so a packet that is translated is run once at a time.
_TEST_RUNS = 3000


@dataclass(frozen=True, slots=True)
class Mode:
    """One way for packets through a node. Exactly one of `rules` and `agent`, or neither for plain routing.

    `agent`: settings of a waggle agent, beside those that every agent here has. `hook`: where its program sits, the
    name of an `AttachType`. `to`: what the generator sends to. The backend of direct server return would answer by
    itself if it were a waggle node; here it only gets the packets.
    """

    title: str
    rules: str = ""
    agent: Mapping[str, object] | None = None
    hook: str = "TCX_INGRESS"
    to: str = target(_NODE, NODE_PORT)
    dropped: bool = False  # by XDP on the node
    answered: bool = True  # through the node


#: By name. Another mode of waggle is one more line with the settings that make it.
MODES: dict[str, Mode] = {
    "floor": Mode("generator alone: XDP drops the packet", dropped=True),
    "route": Mode("plain routing, no Service", to=target(_BACKEND, PORT)),
    "iptables-legacy": Mode(RULE_SETS["iptables-legacy"].title, rules="iptables-legacy"),
    "iptables-nft": Mode(RULE_SETS["iptables-nft"].title, rules="iptables-nft"),
    "nftables": Mode(RULE_SETS["nftables"].title, rules="nftables"),
    "tc-snat": Mode("waggle, tc, SNAT", agent={}),
    "tc-dsr": Mode("waggle, tc, DSR", agent={"forwarding": "dsr"}, answered=False),
    "xdp-snat": Mode("waggle, XDP, SNAT", agent={"xdp": "native"}, hook="XDP"),
    "xdp-dsr": Mode("waggle, XDP, DSR", agent={"xdp": "native", "forwarding": "dsr"}, hook="XDP", answered=False),
}
DEFAULT_MODES = ("floor", "route", "iptables-legacy", "nftables", "tc-snat", "tc-dsr", "xdp-snat", "xdp-dsr")


@dataclass(frozen=True, slots=True)
class Forwarded:
    """One run of the generator. `received`: frames that came out; for `floor` those that the node was handed."""

    mode: str
    round: int
    sent: int
    received: int
    seconds: float
    foreign: float
    stolen: float
    attempts: int


def measure_north_south(options: argparse.Namespace, figures: Figures, progress: Callable[[str], None]) -> None:
    """Every mode once per round, the order rotating; then its program alone, where it has one."""
    document = figures.document
    if document.get("north_south", {}).get("complete"):
        return
    found: dict[str, Any] = {"services": _SERVICES, "flows": _FLOWS, "runs": [], "program_ns": {}}
    document["north_south"] = found
    cpu = cpus()[0]
    with ExitStack() as stack:
        nodes: dict[str, _Node] = {}
        for name in options.modes:
            mode = MODES[name]
            progress(f"north-south: {mode.title}")
            kind = _AgentNode if mode.agent is not None else _RoutingNode
            nodes[name] = stack.enter_context(kind(name, mode))
            nodes[name].learn_flows()
        meter = CpuMeter(lambda: [pid for node in nodes.values() for pid in node.pids()])
        progress("north-south: packets")
        for number in range(options.rounds):
            for name in rotated(list(nodes), number):
                run = partial(nodes[name].forward, options.seconds, cpu)
                (sent, received, seconds), disturbance, attempts = repeated(meter, options.attempts, run)
                foreign, stolen = disturbance.foreign, disturbance.stolen
                row = Forwarded(name, number, sent, received, seconds, foreign, stolen, attempts)
                found["runs"].append(dataclasses.asdict(row))
            figures.save()
        for name, node in nodes.items():
            if isinstance(node, _AgentNode):
                progress(f"north-south: the program of {name} alone")
                found["program_ns"][name] = node.program_ns()
    found["complete"] = True
    figures.save()


class _Node(ABC):
    """A node, and the wire on its uplink with generator and backend. A context manager."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self._server: subprocess.Popen[str] | None = None
        self._links = ExitStack()

    @property
    @abstractmethod
    def place(self) -> Place: ...

    @property
    @abstractmethod
    def wire(self) -> Place: ...

    @abstractmethod
    def pids(self) -> list[int]:
        """Ids of the processes that belong to the node."""

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._links.close()
        if self._server is not None:
            stop(self._server)
            self._server = None

    def learn_flows(self) -> None:
        """One frame of every flow there and its answer back; then nobody answers any more."""
        if not self._mode.dropped:
            before = self._received()
            self._generate("--once")
            received = self._received() - before
            if received < (2 if self._mode.answered else 1) * _FLOWS:
                raise BenchError(
                    f"{self._mode.title}: {received} packets came out of the node for {_FLOWS} flows"
                    f"{' and their answers' if self._mode.answered else ''}"
                )
        self._ip(self.place, [f"neigh replace {_BACKEND_NODE} lladdr {_NOBODY} dev eth0 nud permanent"])
        if self._mode.dropped:
            self._give_verdict("XDP_DROP", self.place)
        if self._mode.hook == "XDP":
            self._links.close()
            self._give_verdict("XDP_DROP", self.wire)

    def _give_verdict(self, verdict: str, place: Place) -> None:
        """To every frame that comes in by eth0."""
        from waggle.testing import xdp  # rules of kube-proxy can be measured without waggle installed

        for kept in xdp.give_verdict(getattr(xdp, verdict), place.netns, lambda name: name == "eth0"):
            self._links.callback(kept.close)

    def forward(self, seconds: float, cpu: int | None) -> tuple[int, int, float]:
        """Frames sent, frames that came out, seconds."""
        before = self._received()
        pin = ["--cpu", str(cpu)] if cpu is not None else []
        made = self._generate("--seconds", str(seconds), *pin)
        sent = int(made["sent"])
        received = sent if self._mode.dropped else self._received() - before
        if not received:
            raise BenchError(f"{self._mode.title}: nothing came out of the node")
        return sent, received, made["seconds"]

    def frame(self) -> bytes:
        """The first frame that the generator sends."""
        return bytes.fromhex(self.wire.run(self._generator("--show"), timeout=10))

    def _connect(self) -> None:
        """The wire: routes and neighbours on both sides, and the backend."""
        node_mac, wire_mac = self._mac(self.place), self._mac(self.wire)
        self._ip(
            self.place,
            [
                f"route replace default via {_GATEWAY}",
                f"route add 10.244.2.0/24 via {_BACKEND_NODE}",
                f"neigh add {_BACKEND_NODE} lladdr {wire_mac} dev eth0 nud permanent",
                f"neigh add {_GATEWAY} lladdr {_GATEWAY_MAC} dev eth0 nud permanent",
            ],
        )
        self._ip(
            self.wire,
            [
                f"addr add {_BACKEND_NODE}/24 dev eth0",
                f"addr add {_BACKEND}/32 dev lo",
                f"neigh add {_NODE} lladdr {node_mac} dev eth0 nud permanent",
                # the source of what the backend answers, which a socket that listens on every address leaves open
                f"route add {_NODE}/32 dev eth0 src {_BACKEND}",
                f"route add {_CLIENTS} via {_NODE} src {_BACKEND}",
            ],
        )
        self.place.set_sysctl("net.ipv4.ip_forward", 1)
        self.place.run(["ethtool", "-K", "eth0", "gro", "on"], timeout=10)
        self._server = start_server(dataclasses.replace(self.wire, addresses=(_BACKEND,)), None)

    def _generator(self, *options: str) -> list[str]:
        command = [str(BIN / "packets"), "--interface", "eth0", "--from", self._mac(self.wire)]
        command += ["--to", self._mac(self.place)]
        command += ["--source", _CLIENT, "--target", self._mode.to, "--flows", str(_FLOWS)]
        return [*command, *options]

    def _generate(self, *options: str) -> dict[str, float]:
        made: dict[str, float] = json.loads(self.wire.run(self._generator(*options), timeout=120))
        return made

    def _received(self) -> int:
        link = self._link(self.wire)
        return int(link["stats64"]["rx"]["packets"])

    def _mac(self, place: Place) -> str:
        return str(self._link(place)["address"])

    def _link(self, place: Place) -> dict[str, Any]:
        shown = checked(["ip", "-n", place.name, "-s", "-j", "link", "show", "eth0"])
        link: dict[str, Any] = json.loads(shown)[0]
        return link

    def _ip(self, place: Place, lines: list[str]) -> None:
        checked(["ip", "-n", place.name, "-batch", "-"], stdin="\n".join(lines) + "\n", subject=f"ip in {place.name}")


class _RoutingNode(_Node):
    """The kernel routes; with rules of kube-proxy, or without."""

    def __init__(self, name: str, mode: Mode) -> None:
        super().__init__(mode)
        self._place = Place(f"{PREFIX}-ns-{name}", NETNS / f"{PREFIX}-ns-{name}", (_NODE,))
        self._wire = Place(f"{self._place.name}-wire", NETNS / f"{self._place.name}-wire", ())

    @property
    def place(self) -> Place:
        return self._place

    @property
    def wire(self) -> Place:
        return self._wire

    def pids(self) -> list[int]:
        return []

    def __enter__(self) -> _RoutingNode:
        try:
            for place in (self._place, self._wire):
                checked(["ip", "netns", "add", place.name])
                checked(["ip", "-n", place.name, "link", "set", "lo", "up"])
            self._ip(
                self._place,
                [
                    f"link add eth0 type veth peer name eth0 netns {self._wire.name}",
                    f"addr add {_NODE}/24 dev eth0",
                    "link set eth0 up",
                ],
            )
            self._ip(self._wire, ["link set eth0 up"])
            if self._mode.rules:
                ports = _ports()
                load_rules([(self._place, RULE_SETS[self._mode.rules].loads(ports, ports))])
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        super().close()
        for place in (self._place, self._wire):
            delete_netns(place.name)


class _AgentNode(_Node):
    """A waggle agent with its own programs and maps, and the same Services from manifests."""

    def __init__(self, name: str, mode: Mode) -> None:
        super().__init__(mode)
        from bench.scale_node import ScaleNode  # the peers can be measured without waggle installed

        self._node = ScaleNode(mode.agent, f"ns-{name}")

    @property
    def place(self) -> Place:
        return self._node.place

    @property
    def wire(self) -> Place:
        return self._node.wire

    def pids(self) -> list[int]:
        return self._node.pids()

    def __enter__(self) -> _AgentNode:
        from bench.observer import FillWatch

        try:
            self._node.__enter__()
            self._connect()
            folder = self._node.folder / "manifests"
            folder.mkdir()
            (folder / "services.yaml").write_text("".join(f"---\n{json.dumps(each)}\n" for each in _manifests()))
            self._node.configure({"manifests": str(folder)})
            # the measured Service has two frontends: its cluster IP and its NodePort
            watch = FillWatch(self._node.pin("wag_services"), _SERVICES + 1, None, _READY_LIMIT)
            try:
                self._node.start_agent()
                self._node.wait("the Services are in the maps", watch.done, _READY_LIMIT + 5)
                watch.result()
            finally:
                watch.close()
            self._node.wait("its programs are attached", lambda: bool(self._program_id()), _READY_LIMIT)
            if self._mode.hook == "XDP":
                self._give_verdict("XDP_PASS", self.wire)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        super().close()
        self._node.close()

    def program_ns(self) -> dict[str, float]:
        """Nanoseconds of the program at work, by BPF_PROG_TEST_RUN with a frame of a known flow."""
        from waggle.kernel import syscall
        from waggle.kernel.netns import call_in_netns
        from waggle.kernel.testrun import run_packet, run_xdp

        frame, ifindex = self.frame(), self._ifindex()
        run_one = run_xdp if self._mode.hook == "XDP" else run_packet

        def run() -> list[int]:
            number = self._program_id()
            assert number is not None
            with syscall.prog_fd_by_id(number) as program:
                return [run_one(program, frame, ifindex=ifindex).duration_ns for _ in range(_TEST_RUNS)]

        durations = call_in_netns(self.place.netns, run)
        return {"least": min(durations), "median": statistics.median(durations)}

    def _ifindex(self) -> int:
        return int(self._link(self.place)["ifindex"])

    def _program_id(self) -> int | None:
        from waggle.kernel import links
        from waggle.kernel.netns import call_in_netns

        if self._mode.hook == "XDP":
            program = self._link(self.place).get("xdp", {}).get("prog", {})
            return int(program["id"]) if program.get("name", "").startswith("wag_") else None
        hook = links.AttachType[self._mode.hook]
        found = call_in_netns(self.place.netns, lambda: links.query_programs(self._ifindex(), hook))
        return next((number for number, name in found if name.startswith("wag_")), None)


def _ports() -> list[ServicePort]:
    """The Services as a node sees them on which none of the endpoints is."""
    measured = ServicePort(
        objects.NAMESPACE, "north-south", "echo", "UDP", "10.96.0.10", PORT, [Endpoint(_BACKEND, PORT)], NODE_PORT
    )
    others = [filler(number, made_up_endpoints(number, _ENDPOINTS)) for number in range(_SERVICES - 1)]
    return [*others, measured]


def _manifests() -> list[dict[str, Any]]:
    """The same Services as objects."""
    return [document for port in _ports() for document in manifests(port)]
