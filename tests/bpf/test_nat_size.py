"""The NAT table changes its size: how large it becomes, and that no flow stays behind."""

from __future__ import annotations

import os

import pytest

from waggle.kernel.maps import HASH, Map
from waggle.reconcile.nat_table import copy_missing, nat_entries, young_flows

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes maps: needs root")]

GIB = 1 << 30


def table(entries: dict[int, int], size: int = 64, value_size: int = 4) -> Map:
    made = Map.create(HASH, 4, value_size, size, "nat")
    made.update_many((key.to_bytes(4, "big"), value.to_bytes(value_size, "big")) for key, value in entries.items())
    return made


def held(by: Map) -> dict[int, int]:
    return {int.from_bytes(key, "big"): int.from_bytes(value, "big") for key, value in by.dump()}


@pytest.mark.parametrize(
    ("memory", "entries"), [(GIB, 1 << 16), (16 * GIB, 1 << 18), (24 * GIB, 3 << 17), (1 << 50, 1 << 22)]
)
def test_size_follows_memory(memory: int, entries: int) -> None:
    assert nat_entries(memory) == entries
    assert young_flows(entries) == entries // 8


@pytest.mark.parametrize(
    ("there", "becomes"), [(1 << 17, 1 << 17), (1 << 19, 1 << 19), ((1 << 17) - 1, 1 << 18), ((1 << 19) + 1, 1 << 18)]
)
def test_a_table_that_is_there_stays_unless_it_is_far_from_right(there: int, becomes: int) -> None:
    assert nat_entries(16 * GIB, table({}, there)) == becomes


def test_what_began_meanwhile_is_copied() -> None:
    before, now = table({1: 10, 2: 20, 3: 30}), table({1: 11, 4: 40})
    assert copy_missing(before, now) == 2
    assert held(now) == {1: 11, 2: 20, 3: 30, 4: 40}
    assert copy_missing(before, now) == 0


def test_as_much_as_there_is_room_for() -> None:
    now = table({1: 11}, size=2)
    assert copy_missing(table({1: 10, 2: 20, 3: 30}), now) == 1
    assert held(now) in ({1: 11, 2: 20}, {1: 11, 3: 30})


def test_another_layout_has_nothing_in_common() -> None:
    now = table({}, value_size=8)
    assert copy_missing(table({1: 10}), now) == 0
    assert held(now) == {}
