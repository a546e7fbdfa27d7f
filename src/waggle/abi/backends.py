"""Backends in bulk: 100,000 of them are planned at start, and packing them one object at a time is most of that."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from waggle.abi._generated import BACKEND_SIZE, Backend
from waggle.abi.address import ADDRESS_SIZE, V4_PREFIX


def pack_backends(ends: Iterable[tuple[str, int]]) -> bytes:
    """wag_backend records of (address, port), sorted, back to back. Raises ValueError for what is no address."""
    tails: dict[int, bytes] = {}
    records = []
    for address, port in ends:
        tail = tails.get(port)
        if tail is None:
            tail = tails[port] = Backend(bytes(ADDRESS_SIZE), port, 0).pack()[ADDRESS_SIZE:BACKEND_SIZE]
        try:
            if ":" in address:
                records.append(socket.inet_pton(socket.AF_INET6, address) + tail)
            else:
                records.append(V4_PREFIX + socket.inet_pton(socket.AF_INET, address) + tail)
        except OSError as error:
            raise ValueError(f"{address!r} is not an IP address") from error
    records.sort()
    return b"".join(records)
