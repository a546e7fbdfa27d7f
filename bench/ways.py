"""Ways to reach the same servers. What is compared is a list of these; everything else of a run is the same for all.

To compare with another Service proxy, write one more class: bring up its rules in `program`, return the Service
addresses in `targets`, take everything away in `close`. The client, the server, the tests and the report do not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from bench import objects
from bench.places import Place
from bench.plain import ACROSS_NODES, ONE_NODE, PORT, PlainNetwork
from bench.traffic import Test, target

#: The two Services that are measured, one per placement, wherever there are Services.
SERVICE_NAMES = {ONE_NODE: "one-node", ACROSS_NODES: "across-nodes"}
CLUSTER_IPS = {ONE_NODE: ("10.96.0.10", "fd00:10:96::10"), ACROSS_NODES: ("10.96.0.11", "fd00:10:96::11")}
#: Name, protocol, port and target port of each.
SERVICE_PORTS = (("echo", "TCP", PORT), ("sink", "TCP", PORT + 1), ("echo-udp", "UDP", PORT))


class Way(ABC):
    """One column of the comparison."""

    #: Short and unique: the key in the figures.
    name: str
    #: For people.
    title: str

    @property
    @abstractmethod
    def client(self) -> Place:
        """Where the client runs."""

    @abstractmethod
    def targets(self, placement: str, test: Test) -> list[str]:
        """ADDRESS:PORT that the client takes in turn: the servers' own, or one of a Service."""

    @abstractmethod
    def first_targets(self, numbers: Sequence[int]) -> list[str]:
        """ADDRESS:PORT on one node for every number: those of the Services `objects.service(number)`, or as many of
        the servers' own."""

    @abstractmethod
    def processes(self) -> list[int]:
        """Ids of the processes that belong to this way: servers, agents."""

    def program(self, services: int) -> None:  # noqa: B027 - most ways have nothing to do here
        """Make `services` Services exist before the next rounds."""

    def prepare(self) -> None:  # noqa: B027 - as above
        """Right before each run, not timed: nothing of the run before may be left."""


class PlainRouting(Way):
    """Pods routed by the kernel alone; no Service, no BPF program on any of these interfaces."""

    name = "plain"
    title = "plain routed namespaces, without waggle"

    def __init__(self, network: PlainNetwork, family: int) -> None:
        self._network = network
        self._family = family

    @property
    def client(self) -> Place:
        return self._network.client

    def processes(self) -> list[int]:
        return self._network.server_pids()

    def targets(self, placement: str, test: Test) -> list[str]:
        return [target(place.address(self._family), test.port) for place in self._network.servers[placement]]

    def first_targets(self, numbers: Sequence[int]) -> list[str]:
        return in_turn(self._network.servers[ONE_NODE], numbers)


def in_turn(servers: Sequence[Place], numbers: Sequence[int]) -> list[str]:
    """The servers' own addresses, one for every number."""
    addresses = [target(place.address(4), PORT) for place in servers]
    return [addresses[number % len(addresses)] for number in numbers]


def filler_addresses(numbers: Sequence[int]) -> list[str]:
    """Those of Services that are there to be many; number -1 is the measured Service itself, of a cluster of one."""
    measured = target(CLUSTER_IPS[ONE_NODE][0], PORT)
    return [measured if n < 0 else target(objects.cluster_ip(n), objects.FILLER_PORT) for n in numbers]
