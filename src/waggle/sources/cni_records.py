"""Attachments of pods as they are kept on disk: one JSON file each, written before the interface exists.

So whatever the agent was doing when it was killed, the addresses of every interface that can exist are on disk. A
file appears whole or not at all. Its name is that of the host-side interface, which follows from container ID and
interface name: no text from outside becomes a path, and a repeated request finds what the first one left.

Nothing here waits for the disk (fsync costs 1 to 20 ms per pod). It need not: what a record must outlive is the agent.
A power failure or kernel crash that loses a record, or cuts it short, has ended every interface too; the boot ID in
each record tells those that survived the machine but whose interface cannot have.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import msgspec

from waggle.errors import CniError
from waggle.model.interface import NO_LIMITS, Bandwidth, HostPort
from waggle.model.workload import Workload
from waggle.sources.cni_request import IO_FAILURE
from waggle.sources.ipam import IPAddress

_HOST_IFNAME = re.compile(r"wag[0-9a-f]{11}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Attachment(msgspec.Struct, frozen=True):
    """One interface of one pod. `boot` is the kernel's boot ID at the time of ADD: interfaces do not outlive it. `uid`
    is that of a pod of Kubernetes, `labels` came with ADD, `workload` is what the runtime said afterwards. `chained_to`
    is the host side of one that another plugin made, "" for those of waggle's own."""

    container_id: str
    ifname: str
    network: str
    netns: str
    host_mac: str
    pod_mac: str
    addresses: tuple[str, ...]
    namespace: str = ""
    name: str = ""
    boot: str = ""
    created: float = 0.0
    host_ports: tuple[HostPort, ...] = ()
    uid: str = ""
    labels: dict[str, str] = {}
    workload: Workload | None = None
    chained_to: str = ""
    bandwidth: Bandwidth = NO_LIMITS

    @property
    def host_ifname(self) -> str:
        """What it is known by; also the interface's name, where waggle made it."""
        return host_ifname(self.container_id, self.ifname)

    @property
    def ips(self) -> tuple[IPAddress, ...]:
        return tuple(ipaddress.ip_address(text) for text in self.addresses)

    def __str__(self) -> str:
        pod = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.ifname} of container {self.container_id}" + (f" (pod {pod})" if pod else "")


def host_ifname(container_id: str, ifname: str) -> str:
    """Name of the host side: 14 of the 15 characters that fit; the same on every retry."""
    return "wag" + hashlib.sha256(f"{container_id}/{ifname}".encode()).hexdigest()[:11]


def is_host_ifname(name: str) -> bool:
    return _HOST_IFNAME.fullmatch(name) is not None


def random_mac() -> str:
    """Locally administered, unicast."""
    raw = bytearray(os.urandom(6))
    raw[0] = raw[0] & 0xFC | 0x02
    return raw.hex(":")


def boot_id() -> str:
    return _BOOT_ID.read_text().strip()


class AttachmentRecords:
    """The directory of records. Every method that writes raises CniError (5) where the disk refuses."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            directory.chmod(0o700)
        except OSError as error:
            raise CniError(IO_FAILURE, f"state-dir: cannot make {directory}: {error.strerror}") from error

    def load(self) -> tuple[dict[str, Attachment], dict[str, str]]:
        """(readable records, reason for each unreadable one), both by host interface name."""
        found: dict[str, Attachment] = {}
        unreadable: dict[str, str] = {}
        for file in self._files():
            try:
                record = msgspec.json.decode(file.read_bytes(), type=Attachment)
                addresses = record.ips
            except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
                unreadable[file.stem] = f"{file}: {error}"
                continue
            if record.host_ifname != file.stem or not addresses:
                unreadable[file.stem] = f"{file}: does not fit its name"
                continue
            found[file.stem] = record
        return found, unreadable

    def write(self, record: Attachment) -> None:
        file = self._file(record.host_ifname)
        scratch = file.with_suffix(".tmp")
        try:
            scratch.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
            scratch.replace(file)
        except OSError as error:
            raise CniError(IO_FAILURE, f"cannot write {file}: {error.strerror}") from error

    def remove(self, name: str) -> None:
        """Remove the record of host interface `name`; a missing one is no error."""
        file = self._file(name)
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise CniError(IO_FAILURE, f"cannot remove {file}: {error.strerror}") from error

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _files(self) -> Iterator[Path]:
        for file in sorted(self._directory.iterdir()):
            if file.suffix == ".tmp" and is_host_ifname(file.stem):
                file.unlink(missing_ok=True)  # an agent was killed while writing: the interface was not made yet
            elif file.suffix == ".json" and is_host_ifname(file.stem):
                yield file


def new_attachment(
    container_id: str,
    ifname: str,
    network: str,
    netns: str,
    addresses: tuple[IPAddress, ...],
    host_ports: tuple[HostPort, ...] = (),
    labels: Mapping[str, str] = MappingProxyType({}),
    bandwidth: Bandwidth = NO_LIMITS,
    **more: str,
) -> Attachment:
    """A record with fresh MAC addresses; `more`: `boot` and, where known, the pod's `namespace`, `name` and `uid`."""
    return Attachment(
        container_id=container_id,
        ifname=ifname,
        network=network,
        netns=netns,
        host_mac=random_mac(),
        pod_mac=random_mac(),
        addresses=tuple(str(address) for address in addresses),
        created=time.time(),
        host_ports=host_ports,
        labels=dict(labels),
        bandwidth=bandwidth,
        **more,  # type: ignore[arg-type]  # strings all, as their names say
    )
