"""Ways to reach the same servers. What is compared is a list of these; everything else of a run is the same for all.

To compare with another Service proxy, write one more class: bring up its rules in `program`, return the Service
addresses in `targets`, take everything away in `close`. The client, the server, the tests and the report do not change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from bench.places import Place
from bench.plain import PlainNetwork
from bench.traffic import Test, target


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
    def processes(self) -> list[int]:
        """Ids of the processes that belong to this way: servers, agents."""

    def program(self, services: int) -> None:  # noqa: B027 - most ways have nothing to do here
        """Make `services` Services exist before the next rounds."""


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
