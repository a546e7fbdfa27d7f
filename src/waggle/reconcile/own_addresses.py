"""Addresses that waggle puts on the node's loopback interface, for what the agent answers itself.

Which ones they are stands in a file, written first, so that they can be taken away again: by an agent that is told
other ones, or by `waggle cleanup`. An address that was there before is used and left alone.
"""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Iterable
from pathlib import Path

from waggle.errors import KernelError
from waggle.kernel.netlink import Batch, IPInterface, Netlink

log = logging.getLogger(__name__)

_FILE = "own-addresses.json"
_LOOPBACK = 1


class OwnAddresses:
    """Of the current network namespace."""

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir / _FILE

    def apply(self, addresses: Iterable[str]) -> None:
        """Makes these the node's, and takes away what was added before and is none of them. Raises KernelError."""
        wanted = {text: _interface(text) for text in addresses}
        before = set(self.added)
        with Netlink() as netlink:
            present = {str(address.ip): address.ifindex for address in netlink.addresses()}
            for text in wanted:
                if present.get(text, _LOOPBACK) != _LOOPBACK:
                    raise KernelError(f"{text} is an address of interface {present[text]} already: choose another one")
            missing = [text for text in wanted if text not in present]
            stale = [text for text in before if text not in wanted and present.get(text) == _LOOPBACK]
            if not missing and not stale:
                return
            self._remember(before | set(missing))
            batch = Batch()
            batch.set_link(_LOOPBACK, up=True)
            for text in missing:
                batch.add_address(_LOOPBACK, wanted[text], nodad=True, exist_ok=True)
            for text in stale:
                batch.delete_address(_LOOPBACK, _interface(text), missing_ok=True)
            netlink.run(batch)
        self._remember((before & wanted.keys()) | set(missing))
        log.info("addresses on the loopback interface: added %s, removed %s", missing or "none", stale or "none")

    @property
    def added(self) -> list[str]:
        """What was added, as far as it is known."""
        try:
            return [str(ipaddress.ip_address(text)) for text in json.loads(self._file.read_text())]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError):
            log.warning("%s is unreadable: addresses that were added before stay on the loopback interface", self._file)
            return []

    def release(self) -> None:
        """Takes everything away that was added."""
        self.apply(())

    def _remember(self, addresses: set[str]) -> None:
        scratch = self._file.with_suffix(".tmp")
        try:
            scratch.write_text(json.dumps(sorted(addresses)))
            scratch.replace(self._file)
        except OSError as error:
            raise KernelError(f"cannot write {self._file}: {error.strerror}", error.errno or 0) from error


def _interface(text: str) -> IPInterface:
    return ipaddress.ip_interface(text)
