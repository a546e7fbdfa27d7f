"""How much memory tables of policy take in the kernel, and what the same policies would take with an identity for each
set of labels.

An entry of a hash map that is not preallocated is a struct htab_elem (48 bytes where pointers have eight) with key and
value, each rounded up to eight bytes; the allocator rounds that up to one of its sizes. An entry of an LPM trie is a
node of 40 bytes with the bytes of the address and the value, and where prefixes part there is one more without a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from waggle.model.objects import Pod
from waggle.plan.policy_tables import ALLOW, ANY, END, NOBODY, PORT_BITS, PolicyTables, Steps

_SIZES = (16, 32, 64, 96, 128, 192, 256)  # of the kernel's allocator for BPF
_HASH_HEAD = 48
_TRIE_HEAD = 40
_BUCKET = 16
_STEP = 16
#: Labels that identities are usually kept free of, as they differ from pod to pod, or from one rollout to the next.
_NO_IDENTITY = frozenset(("pod-template-hash", "controller-revision-hash", "statefulset.kubernetes.io/pod-name"))


class TableSizes(NamedTuple):
    """How many entries the maps are made for (max_entries)."""

    classes: int = 262_144
    policy: int = 524_288
    steps: int = 131_072


DEFAULT_SIZES = TableSizes()


def entry_bytes(tables: PolicyTables) -> int:
    """What the entries take."""
    lists = {steps for entries in tables.sets.values() for steps in entries.values()}
    return (
        _hash_entry(16, 8) * (len(tables.classes) + sum(map(len, tables.sets.values())))
        + 2 * _trie_node(16, 8) * len(tables.ranges)
        + _STEP * sum(map(len, lists))
    )


def fixed_bytes(sizes: TableSizes = DEFAULT_SIZES) -> int:
    """What the maps take without any entry: buckets, and the whole array of steps."""
    return _BUCKET * (sizes.classes + sizes.policy) + _STEP * sizes.steps


class IdentityTables(NamedTuple):
    """Tables of the usual way: an identity for each set of labels of the cluster, and each prefix that a policy
    names; every address leads to its identity, and each pod of the node has a table of which identities may use which
    ports."""

    identities: int
    addresses: int
    entries: int

    @property
    def bytes(self) -> int:
        return 2 * _trie_node(20, 12) * self.addresses + _hash_entry(12, 8) * self.entries


def identity_tables(tables: PolicyTables, pods: Iterable[Pod]) -> IdentityTables:
    """What the usual way needs at least for the same pods and policies: an entry where a pod's set says something else
    of an identity than of what it does not know, and one for each run of ports that is a power of two."""
    identity_of: dict[object, int] = {}  # → class
    addresses = 0
    for pod in pods:
        labels = {item for item in (pod.metadata.labels or {}).items() if item[0] not in _NO_IDENTITY}
        for address in pod.status.pod_ips:
            addresses += 1
            identity_of[pod.metadata.namespace, frozenset(labels)] = tables.classes.get(address.ip, 0)
    counts = Counter(identity_of.values())
    counts.update(tables.ranges.values())
    per_set = {set_id: _identity_entries(entries, counts) for set_id, entries in tables.sets.items()}
    entries = sum(per_set.get(set_id, 0) for sets in tables.pods.values() for set_id in sets)
    return IdentityTables(counts.total(), addresses + len(tables.ranges), entries)


def _identity_entries(entries: Mapping[int, Steps], identities: Mapping[int, int]) -> int:
    unknown = entries.get(NOBODY, entries[ANY])
    found = ((entries.get(class_id, entries[ANY]), count) for class_id, count in identities.items())
    others = sum(count * max(1, _port_runs(steps)) for steps, count in found if steps != unknown)
    return others + _port_runs(unknown)


def _port_runs(steps: Steps) -> int:
    """How many entries of protocol and port prefix allow the same; one for everything that has no ports."""
    found = 0
    ends = [step.start for step in steps[1:]] + [END]
    for step, end in zip(steps, ends, strict=True):
        if step.verdict & ALLOW:
            found += 1 if (step.start, end) == (0, END) else _prefixes(max(step.start, 1 << PORT_BITS), end)
    return found


def _prefixes(start: int, end: int) -> int:
    found = 0
    while start < end:
        size = min(start & -start, 1 << PORT_BITS, 1 << (end - start).bit_length() - 1)
        start += size
        found += 1
    return found


def _hash_entry(key: int, value: int) -> int:
    return _allocated(_HASH_HEAD + _round(key) + _round(value))


def _trie_node(address: int, value: int) -> int:
    return _allocated(_TRIE_HEAD + address + value)


def _allocated(size: int) -> int:
    return next(fitting for fitting in _SIZES if fitting >= size)


def _round(size: int) -> int:
    return (size + 7) // 8 * 8
