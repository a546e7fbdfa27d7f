"""Maglev tables: what the program that fills them is told (bpf/maglev.bpf.c).

A table depends on its backends and their weights alone, so that every node with the same endpoints has the same one.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import NamedTuple

from waggle.abi._generated import BACKEND_SIZE, MaglevBackend

SLOTS = 4093  # WAG_MAGLEV_SLOTS


class MaglevTable(NamedTuple):
    """One table. `id` is made of the rest, so that equal tables are one; `work` is wag_maglev_backend records."""

    id: int
    work: bytes
    backends: int
    greatest: int


def maglev_table(backends: bytes, weights: list[int]) -> MaglevTable:
    """The table for backends (wag_backend records, in the order of their extent) with these weights, none of them 0.

    Raises ValueError where there are more backends than slots.
    """
    count = len(weights)
    if not 0 < count <= SLOTS:
        raise ValueError(f"Maglev has room for {SLOTS} endpoints, not {count}")
    work = b"".join(
        _backend(backends[i * BACKEND_SIZE : (i + 1) * BACKEND_SIZE], weight) for i, weight in enumerate(weights)
    )
    number = int.from_bytes(blake2b(work, digest_size=4).digest(), "little") or 1
    return MaglevTable(number, work, count, max(weights))


def _backend(record: bytes, weight: int) -> bytes:
    digest = blake2b(record, digest_size=16).digest()
    start = int.from_bytes(digest[:8], "little") % SLOTS
    step = int.from_bytes(digest[8:], "little") % (SLOTS - 1) + 1
    return MaglevBackend(start, step, weight, 0, 0).pack()
