"""Source ranges in the kernel's table: there before the frontends that refer to them, gone after the last one."""

from __future__ import annotations

import pytest

from waggle.errors import TableFull
from waggle.model.objects import ObjectKey
from waggle.reconcile.ranges import SourceRanges

WEB, API = ObjectKey("default", "web"), ObjectKey("default", "api")


class Table:
    """A map with room for `size` entries."""

    def __init__(self, size: int = 100) -> None:
        self.size = size
        self.entries: set[bytes] = set()

    def keys(self) -> list[bytes]:
        return sorted(self.entries)

    def update(self, key: bytes, _value: bytes) -> None:
        if key not in self.entries and len(self.entries) >= self.size:
            raise TableFull("map wag_source_ranges is full")
        self.entries.add(key)

    def delete(self, key: bytes) -> None:
        self.entries.discard(key)


@pytest.fixture
def table() -> Table:
    return Table()


def on(table: Table) -> SourceRanges:
    ranges = SourceRanges(table)  # type: ignore[arg-type]
    ranges.adopt()
    return ranges


def test_written_first_and_removed_last(table: Table) -> None:
    ranges = on(table)
    ranges.claim(WEB, [b"a", b"b"])
    ranges.write()
    assert table.entries == {b"a", b"b"}
    ranges.claim(WEB, [b"b", b"c"])
    ranges.write()
    assert table.entries == {b"a", b"b", b"c"}
    ranges.clean()
    assert table.entries == {b"b", b"c"}


def test_a_list_that_two_services_share_stays_until_both_are_gone(table: Table) -> None:
    ranges = on(table)
    for key in (WEB, API):
        ranges.claim(key, [b"a"])
    ranges.write()
    ranges.claim(WEB, [])
    ranges.clean()
    assert table.entries == {b"a"}
    ranges.claim(API, [])
    ranges.clean()
    assert table.entries == set()


def test_given_up_and_claimed_again_before_it_was_cleaned(table: Table) -> None:
    ranges = on(table)
    ranges.claim(WEB, [b"a"])
    ranges.write()
    ranges.claim(WEB, [])
    ranges.claim(API, [b"a"])
    ranges.write()
    ranges.clean()
    assert table.entries == {b"a"}


def test_after_a_restart_what_nobody_claims_goes_when_all_is_known(table: Table) -> None:
    table.entries = {b"a", b"old"}
    ranges = on(table)
    ranges.claim(WEB, [b"a"])
    ranges.write()
    ranges.clean()
    assert table.entries == {b"a", b"old"}
    ranges.complete()
    ranges.clean()
    assert table.entries == {b"a"}


def test_no_room_is_a_problem_of_its_own_and_heals() -> None:
    table = Table(2)
    ranges = on(table)
    ranges.claim(WEB, [b"a", b"b", b"c"])
    ranges.write()
    assert "clients are refused" in ranges.problem and len(table.entries) == 2
    ranges.claim(WEB, [b"c"])
    ranges.clean()
    ranges.write()
    assert (ranges.problem, table.entries) == ("", {b"c"})
