"""A pod's network interface, as the CNI service makes it and the data path attaches to it."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import NamedTuple, Protocol


class HostPort(NamedTuple):
    """A port of the node that leads to a port of a pod. `host_ip` is "" for every address of the node."""

    protocol: str
    port: int
    container_port: int
    host_ip: str = ""


class Limit(NamedTuple):
    """Bytes per second, and how many bytes may be sent at once after a pause."""

    rate: int
    burst: int


class Bandwidth(NamedTuple):
    """The limits of one interface; None: as fast as it goes."""

    to_pod: Limit | None = None
    from_pod: Limit | None = None


NO_LIMITS = Bandwidth()


@dataclass(frozen=True, slots=True)
class PodInterface:
    """One attachment of one container, both ends.

    MACs are text ("02:…"); `netns` is the path the runtime gave; `host_ifindex` is 0 where the host side is gone;
    `namespace` and `name` are those of the Kubernetes pod, "" where the runtime did not tell. `host_ports` are those
    that the runtime asked for; `chained`: another plugin made the interface.
    """

    container_id: str
    ifname: str
    host_ifname: str
    host_ifindex: int
    host_mac: str
    pod_mac: str
    addresses: tuple[IPv4Address | IPv6Address, ...]
    netns: Path
    namespace: str = ""
    name: str = ""
    host_ports: tuple[HostPort, ...] = ()
    bandwidth: Bandwidth = NO_LIMITS
    chained: bool = False


class PodDatapath(Protocol):
    """The BPF side of a pod's interface, as the CNI service needs it.

    Both methods are idempotent and are called from worker threads, for several pods at once; an exception fails the
    request.
    """

    def attach(self, pod: PodInterface) -> None:
        """Attach programs to the host side and write the endpoint table. The interface exists and is up."""

    def detach(self, pod: PodInterface) -> None:
        """Undo `attach`. The interface may be gone."""
