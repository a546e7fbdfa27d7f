"""How much memory tables of policy take in the kernel.

Of a hash map without preallocation, each entry is one allocation of struct htab_elem (48 bytes on 64-bit kernels)
with key and value rounded up to eight bytes; the allocator rounds the whole up to one of its sizes. Of an LPM trie,
each entry is a node of 40 bytes with the key's bytes and the value, and there are up to as many nodes without an
entry where prefixes part.
"""

from __future__ import annotations

from collections.abc import Iterable

from waggle.model.objects import Pod
from waggle.plan.policy_tables import PolicyTables

_SIZES = (16, 32, 64, 96, 128, 192, 256)  # of the kernel's allocator for BPF
_HEAD = 48
_TRIE_HEAD = 40
STEP = 12


def hash_entry(key: int, value: int) -> int:
    """Bytes of one entry of a hash map that allocates as it grows."""
    wanted = _HEAD + _round(key) + _round(value)
    return next(size for size in _SIZES if size >= wanted)


def table_bytes(tables: PolicyTables) -> int:
    """Bytes of all entries; what the maps have at their whole size (steps, buckets) is counted as far as it is used."""
    lists = {steps for entries in tables.sets.values() for steps in entries.values()}
    return (
        hash_entry(16, 8) * len(tables.classes)
        + 2 * _trie_node(16, 8) * len(tables.ranges)
        + hash_entry(16, 8) * sum(map(len, tables.sets.values()))
        + STEP * sum(map(len, lists))
    )


def identity_bytes(pods: Iterable[Pod], tables: PolicyTables) -> int:
    """Bytes that the same policies take where every set of labels in the cluster has an identity, every address leads
    to one, and each pod here has a table of its own: an entry for each identity that may talk to it and each of its
    ports.

    Counted from what the sets here allow: a lower bound, without prefixes of ranges of ports.
    """
    raise NotImplementedError


def _trie_node(address: int, value: int) -> int:
    wanted = _TRIE_HEAD + address + value
    return next(size for size in _SIZES if size >= wanted)


def _round(size: int) -> int:
    return (size + 7) // 8 * 8
