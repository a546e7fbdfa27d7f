from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from packets import A, B

from waggle.testing.machine import Machine


@pytest.fixture(scope="session")
def loaded() -> Iterator[Machine]:
    made = Machine("bpf")
    yield made
    made.close()


@pytest.fixture
def machine(loaded: Machine) -> Machine:
    """The programs, loaded once, with empty maps."""
    loaded.reset()
    return loaded


@pytest.fixture
def node(machine: Machine) -> Machine:
    """With two pods."""
    for v in (4, 6):
        machine.add_pod(A[v], 101)
        machine.add_pod(B[v], 102)
    return machine


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """All packets pass the same one: what it keeps for itself is seen by the next of them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)
