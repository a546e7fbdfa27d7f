"""Extents of the backend array: never two owners of one index, and nothing handed out again too early."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from waggle.errors import TableFull
from waggle.plan.extents import ExtentAllocator

CAPACITY = 24


class Extents(RuleBasedStateMachine):
    """Every index is used, freed, retired or available; the model keeps sets of indices, nothing clever."""

    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.extents = ExtentAllocator(CAPACITY)
        self.used: set[int] = set()
        self.freed: set[int] = set()
        self.retired: dict[int, set[int]] = {}  # ticket → indices

    @property
    def unavailable(self) -> set[int]:
        return self.used | self.freed | set().union(*self.retired.values())

    @rule(target=runs, size=st.integers(0, 9))
    def allocate(self, size: int):
        taken = self.unavailable
        longest = max(len(run) for run in "".join(".#"[i in taken] for i in range(CAPACITY)).split("#"))
        if size > longest:
            with pytest.raises(TableFull):
                self.extents.allocate(size)
            return (0, 0)
        offset = self.extents.allocate(size)
        indices = set(range(offset, offset + size))
        assert offset >= 0 and offset + size <= CAPACITY
        assert not indices & taken, f"{offset}+{size} overlaps {sorted(taken)}"
        self.used |= indices
        return (offset, size)

    @rule(run=consumes(runs))
    def free(self, run: tuple[int, int]) -> None:
        offset, size = run
        self.extents.free(offset, size)
        self.used -= set(range(offset, offset + size))
        self.freed |= set(range(offset, offset + size))

    @rule(run=consumes(runs))
    def give_back(self, run: tuple[int, int]) -> None:
        offset, size = run
        self.extents.give_back(offset, size)
        self.used -= set(range(offset, offset + size))

    @rule()
    def retire(self) -> None:
        ticket = self.extents.retire()
        assert bool(ticket) == bool(self.freed)
        if ticket:
            self.retired[ticket] = self.freed
            self.freed = set()

    @rule(back=st.integers(0, 3))
    def release_up_to(self, back: int) -> None:
        if self.retired:
            ticket = max(self.retired) - back
            self.extents.release(ticket)
            self.retired = {t: indices for t, indices in self.retired.items() if t > ticket}

    @rule()
    def release_all(self) -> None:
        self.extents.release()
        self.retired.clear()

    @precondition(lambda self: not self.freed and not self.retired)
    @rule(split=st.randoms(use_true_random=False))
    def restart(self, split) -> None:
        """A new agent sees the used indices only, in runs that need not be those that were allocated."""
        runs: set[tuple[int, int]] = set()
        for index in sorted(self.used):
            last = next((r for r in runs if r[0] + r[1] == index), None)
            if last is not None and split.random() < 0.5:
                runs.remove(last)
                runs.add((last[0], last[1] + 1))
            else:
                runs.add((index, 1))
        fresh = ExtentAllocator(CAPACITY)
        fresh.adopt(runs)
        assert fresh.used == len(self.used)
        self.extents = fresh

    @invariant()
    def counts_what_is_not_available(self) -> None:
        assert self.extents.used == len(self.unavailable)
        assert self.extents.waiting == bool(self.retired)


Extents.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestExtents = Extents.TestCase


def test_size_zero_takes_nothing():
    extents = ExtentAllocator(1)
    assert [extents.allocate(0) for _ in range(3)] == [0, 0, 0]
    extents.free(0, 0)
    assert (extents.used, extents.retire(), extents.allocate(1)) == (0, 0, 0)


def test_freed_is_not_available_before_retire_and_release():
    extents = ExtentAllocator(4)
    offset = extents.allocate(4)
    extents.free(offset, 4)
    extents.release()  # not retired: a frontend still leads there
    with pytest.raises(TableFull):
        extents.allocate(1)
    ticket = extents.retire()
    with pytest.raises(TableFull):
        extents.allocate(1)
    extents.release(ticket)
    assert extents.allocate(4) == offset


def test_a_ticket_does_not_release_what_was_retired_after_it():
    extents = ExtentAllocator(2)
    first, second = extents.allocate(1), extents.allocate(1)
    extents.free(first, 1)
    early = extents.retire()
    extents.free(second, 1)
    late = extents.retire()
    assert late > early
    extents.release(early)
    assert extents.allocate(1) == first
    with pytest.raises(TableFull):
        extents.allocate(1)
    assert extents.waiting
    extents.release(late)
    assert extents.allocate(1) == second


def test_neighbours_are_merged_when_nothing_else_fits():
    extents = ExtentAllocator(6)
    runs = [extents.allocate(2) for _ in range(3)]
    for offset in runs[:2]:
        extents.free(offset, 2)
    extents.retire()
    extents.release()
    assert extents.allocate(4) == 0


def test_the_untouched_rest_is_merged_with_a_free_neighbour():
    extents = ExtentAllocator(5)
    extents.allocate(2)
    extents.give_back(extents.allocate(2), 2)
    assert extents.allocate(3) == 2


def test_full_is_an_error_that_says_what_to_do_and_changes_nothing():
    extents = ExtentAllocator(4)
    extents.allocate(1)
    with pytest.raises(TableFull, match=r"no run of 4 free records .size 4, 1 in use.: raise max-backends"):
        extents.allocate(4)
    assert extents.used == 1
    assert extents.allocate(3) == 1


@pytest.mark.parametrize(
    "runs",
    [{(0, 2), (1, 2)}, {(3, 2)}, {(0, 5)}, {(2, 1), (0, 3)}],
    ids=["overlap", "behind the end", "too long", "inside"],
)
def test_adopt_refuses_runs_that_cannot_be(runs):
    with pytest.raises(ValueError, match="overlap or lie outside"):
        ExtentAllocator(4).adopt(runs)


def test_adopt_makes_the_gaps_available():
    extents = ExtentAllocator(10)
    extents.adopt({(1, 2), (0, 0), (5, 1)})
    assert extents.used == 3
    assert {extents.allocate(1), extents.allocate(2), extents.allocate(4)} == {0, 3, 6}
    with pytest.raises(TableFull):
        extents.allocate(1)
