"""Addresses for pods: which are taken, and which comes next.

An address belongs to one owner from `reserve` or `occupy` until `release`, whatever happens to the ranges meanwhile.
Who owns what is kept by the callers' records (cni_records.py), which survive the agent; this module only decides.

The address that was free for the longest time is handed out first: never-used ones in order, then freed ones, oldest
first. A client that still holds a connection to a pod that ended should meet nobody, not another pod. The order
survives a restart in a small file; losing that file costs the order, never the exclusiveness.

Thread-safe: requests are served by worker threads.
"""

from __future__ import annotations

import ipaddress
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from waggle.errors import WaggleError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# .0 is the network, .1 is left for whatever convention puts a gateway there.
_FIRST_OFFSET = 2
# No node runs more pods than this, and it bounds what has to be remembered about a /64.
_LARGEST_POOL = 65536
# Of the freed addresses so many are written down in order; older ones come back in address order.
_FREED_KEPT = 1024


class RangeFull(WaggleError):
    """No address is free in the ranges of one family; the message names them."""


class _Rotation(msgspec.Struct, frozen=True):
    """What the file keeps of one range: the first offset never used, and freed offsets, oldest first."""

    next: int
    freed: list[int]


class _Pool:
    """One range. Invariant: every offset below `next` is either owned or in `freed`."""

    def __init__(self, network: IPNetwork, owned: Iterable[IPAddress], kept: _Rotation | None) -> None:
        self.network = network
        self._base = int(network.network_address)
        last = network.num_addresses - (1 if network.version == 4 else 0)  # without the broadcast address
        self.end = min(last, _FIRST_OFFSET + _LARGEST_POOL)
        self.capacity = max(0, self.end - _FIRST_OFFSET)
        used = {int(address) - self._base for address in owned if address in network}
        self.next = max([kept.next if kept else 0, _FIRST_OFFSET, *(o + 1 for o in used if o < self.end)])
        self.next = min(self.next, max(self.end, _FIRST_OFFSET))
        ordered = [o for o in (kept.freed if kept else []) if _FIRST_OFFSET <= o < self.next]
        unordered = set(range(_FIRST_OFFSET, self.next)) - set(ordered)
        self.freed = OrderedDict.fromkeys(o for o in itertools.chain(sorted(unordered), ordered) if o not in used)

    def take(self, owners: dict[IPAddress, str]) -> IPAddress | None:
        """The next free address; None when there is none. `owners` may know of addresses that came by another range."""
        while self.next < self.end:
            address = self._address(self.next)
            self.next += 1
            if address not in owners:
                return address
        while self.freed:
            offset, _ = self.freed.popitem(last=False)
            address = self._address(offset)
            if address not in owners:
                return address
        return None

    def give_back(self, address: IPAddress, *, unused: bool) -> None:
        """`unused`: it was never on an interface, so it need not wait its turn."""
        offset = int(address) - self._base
        if address not in self.network or not _FIRST_OFFSET <= offset < self.next:
            return
        self.freed[offset] = None
        self.freed.move_to_end(offset, last=not unused)

    def has_free(self, owners: dict[IPAddress, str]) -> bool:
        fresh = (self._address(offset) for offset in range(self.next, self.end))
        freed = (self._address(offset) for offset in self.freed)
        return any(address not in owners for address in itertools.chain(fresh, freed))

    def rotation(self) -> _Rotation:
        return _Rotation(self.next, list(self.freed)[-_FREED_KEPT:])

    def _address(self, offset: int) -> IPAddress:
        return self.network.network_address + offset


class Ipam:
    """All ranges of this node. `file` keeps the order of reuse over a restart."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._owners: dict[IPAddress, str] = {}
        self._addresses: dict[str, tuple[IPAddress, ...]] = {}
        self._pools: dict[IPNetwork, _Pool] = {}
        self._kept: dict[str, _Rotation] = {}

    def load(self) -> None:
        """Read the order of reuse that an earlier agent left. Raises OSError."""
        with self._lock:
            self._kept = self._read()

    def occupy(self, owner: str, addresses: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
        """Note, at start, that `owner` has these. Returns those that somebody else has already (nothing is stolen)."""
        with self._lock:
            wanted = tuple(addresses)
            taken = tuple(a for a in wanted if self._owners.get(a, owner) != owner)
            mine = dict.fromkeys((*self._addresses.get(owner, ()), *(a for a in wanted if a not in taken)))
            self._addresses[owner] = tuple(mine)
            self._owners.update(dict.fromkeys(mine, owner))
            self._pools.clear()  # their order depends on who owns what; they are made again when needed
            return taken

    def owned_by(self, owner: str) -> tuple[IPAddress, ...]:
        with self._lock:
            return self._addresses.get(owner, ())

    def reserve(self, owner: str, ranges: Sequence[IPNetwork]) -> tuple[IPAddress, ...]:
        """One address per family of `ranges` for `owner`, IPv4 first; the same ones again if it has some already.

        Raises RangeFull, and then reserves nothing.
        """
        with self._lock:
            if owner in self._addresses:
                return self._addresses[owner]
            taken: list[IPAddress] = []
            for pools in self._families(ranges):
                address = self._take(pools)
                if address is None:
                    for other in taken:
                        self._forget(other, unused=True)
                    raise RangeFull(_full(pools))
                self._owners[address] = owner
                taken.append(address)
            self._addresses[owner] = tuple(taken)
            return tuple(taken)

    def release(self, owner: str, *, unused: bool = False) -> None:
        """Give up what `owner` has; unknown owners are no error. `unused` puts the addresses first in the order."""
        with self._lock:
            for address in self._addresses.pop(owner, ()):
                self._forget(address, unused=unused)

    def save_order(self, leaving: str, ranges: Sequence[IPNetwork]) -> None:
        """Write the order of reuse down, as it will be once `leaving` is released. Raises OSError.

        Called before the record of `leaving` is removed: a crash in between then finds the address last in order.
        """
        with self._lock:
            self._families(ranges)
            # Ranges that are not known again since the start keep what the file said of them.
            self._kept |= {str(network): pool.rotation() for network, pool in self._pools.items()}
            for text, kept in self._kept.items():
                network = ipaddress.ip_network(text)
                left = [int(a) - int(network.network_address) for a in self._addresses.get(leaving, ()) if a in network]
                self._kept[text] = _Rotation(max([kept.next, *(o + 1 for o in left)]), kept.freed + left)
            scratch = self._file.with_suffix(".tmp")
            scratch.write_bytes(msgspec.json.encode(self._kept))
            scratch.replace(self._file)

    def full(self, ranges: Sequence[IPNetwork]) -> str:
        """Why `reserve` would fail now, or ""."""
        with self._lock:
            for pools in self._families(ranges):
                if not any(pool.has_free(self._owners) for pool in pools):
                    return _full(pools)
        return ""

    def _take(self, pools: Sequence[_Pool]) -> IPAddress | None:
        for pool in pools:
            address = pool.take(self._owners)
            if address is not None:
                return address
        return None

    def _forget(self, address: IPAddress, *, unused: bool) -> None:
        del self._owners[address]
        for pool in self._pools.values():
            pool.give_back(address, unused=unused)

    def _families(self, ranges: Sequence[IPNetwork]) -> list[list[_Pool]]:
        families: dict[int, list[_Pool]] = {}
        for network in sorted(ranges, key=lambda network: network.version):
            pool = self._pools.get(network)
            if pool is None:
                pool = self._pools[network] = _Pool(network, self._owners, self._kept.get(str(network)))
            families.setdefault(network.version, []).append(pool)
        return list(families.values())

    def _read(self) -> dict[str, _Rotation]:
        try:
            document = msgspec.json.decode(self._file.read_bytes(), type=dict[str, _Rotation])
            return {str(ipaddress.ip_network(text)): kept for text, kept in document.items()}
        except (FileNotFoundError, msgspec.DecodeError, ValueError):
            return {}  # a new node, or a file cut short by a power failure: begin at the start of the range


def _full(pools: Sequence[_Pool]) -> str:
    capacity = sum(pool.capacity for pool in pools)
    names = ", ".join(str(pool.network) for pool in pools)
    if not capacity:
        return f"pod range {names} is too small to hold any pod"
    return f"no free address in {names}: all {capacity} are in use"
