from __future__ import annotations

import pytest

from waggle.testing.machine import Machine


@pytest.fixture
def machine():
    made = Machine("bpf")
    yield made
    made.close()
