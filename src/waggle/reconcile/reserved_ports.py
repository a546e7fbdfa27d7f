"""Ports that the kernel must not hand out: those of NodePorts and host ports that lie among the ephemeral ones.

A connection of the node's own that got one as its source port would have its answers taken for requests to the Service.
The sysctl net.ipv4.ip_local_reserved_ports counts for IPv6 too, and for chosen ports alone, so that binding is not its
business. It may be in use already: what was there stays, and only what this adds is taken away again. What that is
stands in a file, written first.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from waggle.errors import KernelError

log = logging.getLogger(__name__)

_DIRECTORY = Path("/proc/sys/net/ipv4")
_FILE = "reserved-ports.json"


class ReservedPorts:
    """Of the current network namespace. `sysctls` is where the two settings are."""

    def __init__(self, state_dir: Path, sysctls: Path = _DIRECTORY) -> None:
        self._file = state_dir / _FILE
        self._setting = sysctls / "ip_local_reserved_ports"
        self._range = sysctls / "ip_local_port_range"

    def apply(self, ports: Iterable[int]) -> None:
        """Makes these the ports that are reserved besides what others have reserved. Raises KernelError."""
        try:
            low, high = map(int, self._range.read_text().split())
            wanted = {port for port in ports if low <= port <= high}
            present = parse_ports(self._setting.read_text())
            before = self._ours()
            others = present - before
            ours = wanted - others
            if ours == before and ours <= present:
                return
            self._remember(before | ours)
            if present != others | ours:
                self._setting.write_text(format_ports(others | ours) + "\n")  # an empty write would change nothing
                log.info("set net.ipv4.ip_local_reserved_ports = %s", format_ports(others | ours) or "nothing")
            self._remember(ours)
        except OSError as error:
            raise KernelError(
                f"cannot reserve ports of the node ({error.filename}: {error.strerror}): the kernel may use them as "
                "source ports of the node's own connections",
                error.errno or 0,
            ) from error

    @property
    def any(self) -> bool:
        """Whether something was added."""
        return bool(self._ours())

    def release(self) -> None:
        """Takes everything away that was added."""
        self.apply(())

    def _ours(self) -> set[int]:
        try:
            return set(json.loads(self._file.read_text()))
        except FileNotFoundError:
            return set()
        except (ValueError, TypeError):
            log.warning("%s is unreadable: ports that were reserved before stay reserved", self._file)
            return set()

    def _remember(self, ports: set[int]) -> None:
        if not ports and not self._file.exists():
            return
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps(sorted(ports)))
        scratch.replace(self._file)


def parse_ports(text: str) -> set[int]:
    """The ports of a list such as "8080,9000-9010"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def format_ports(ports: Iterable[int]) -> str:
    """The shortest list of ports."""
    runs: list[list[int]] = []
    for port in sorted(ports):
        if runs and runs[-1][1] == port - 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
