"""The data path against the model, for a bounded time; `make differential` goes on for as long as one likes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import differential
import pytest
from differential import PROTOCOLS, explore, machine
from worlds import HERE, LOCAL

from waggle.model.choice import NodeFacts
from waggle.model.flows import Tuple
from waggle.model.objects import ObjectMeta, Service, ServicePort, ServiceSpec
from waggle.model.packets import End, LocalNode
from waggle.testing.differential import Comparison, Difference
from waggle.testing.frames import SYN, Frame
from waggle.testing.machine import NODE4, NODE6, Machine
from waggle.testing.programmed import ProgrammedNode

SEEDS = range(2036, 2040)
EXAMPLES = 500
#: what must be among the packets, so that nothing is left out without a word
KINDS = {
    "translated from the pod",
    "translated from the wire",
    "forwarded from the pod",
    "forwarded from the wire",
    "reply turned back",
    "known flow",
    "no flow",
    "direct, other port",
    "reject (no_backend)",
    "drop (no_local_backend)",
    "drop (source_range)",
    "reject (no_port)",
    "drop (free_address)",
    "masqueraded",
    "expired",
    "inside another packet",
}
BY_XDP = " by XDP"
KINDS_BY_XDP = {
    "translated from the wire",
    "inside another packet",
    "known flow",
    "reply turned back",
    "drop (no_local_backend)",
    "drop (source_range)",
}


@pytest.fixture(scope="module")
def loaded() -> Iterator[Machine]:
    made = machine("compared")
    yield made
    made.close()


def test_the_data_path_does_what_the_model_says(loaded: Machine) -> None:
    agreed: Counter[str] = Counter()
    for seed in SEEDS:
        agreed += explore(loaded, seed, EXAMPLES, PROTOCOLS)
    assert agreed.total() > 50_000
    assert {kind.removesuffix(BY_XDP) for kind in agreed} == KINDS
    assert {kind.removesuffix(BY_XDP) for kind in agreed if kind.endswith(BY_XDP)} == KINDS_BY_XDP


def test_a_wrong_table_is_found(loaded: Machine) -> None:
    """The comparison can fail: here because a frontend was taken away behind the back of everybody."""

    def compare() -> None:
        node = LocalNode(NodeFacts(HERE), frozenset((NODE4, NODE6)), (NODE4, NODE6), pods=frozenset(LOCAL[0]))
        comparison = Comparison(loaded, node)
        port = ServicePort(80, "p0", "TCP")
        comparison.put(Service(ObjectMeta("s", "t"), ServiceSpec(cluster_ip="10.96.0.1", ports=[port])))
        frame = Frame(Tuple("TCP", End(LOCAL[0][0], 1000), End("10.96.0.1", 80)), SYN)
        comparison.send(frame)
        services = loaded.maps["wag_services"]
        services.delete_many(list(services.keys()))
        comparison.send(frame)

    with pytest.raises(Difference, match=r"the model says: reject \(no_backend\)"):
        loaded.inside(compare)


def test_by_hand(tmp_path: Path) -> None:
    """`make differential`: the last line says how many packets agreed."""
    environment = os.environ | {"SECONDS": "0.1", "SEED": "7", "EXAMPLES": "20"}
    command = [sys.executable, str(Path(__file__).parent / "differential.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("SEED=7: ")
    count, rest = lines[-1].split(" ", 1)
    assert int(count) > 100 and rest == "packets, 0 differ"


def test_by_hand_when_something_differs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The real search, on a data path that forgets every frontend: it ends with the smallest world, and status 1."""

    def forgetful(self: ProgrammedNode) -> None:
        sync(self)
        services = self.machine.maps["wag_services"]
        services.delete_many(list(services.keys()))

    sync = ProgrammedNode.sync
    monkeypatch.setattr(ProgrammedNode, "sync", forgetful)
    monkeypatch.setenv("SEED", "7")
    monkeypatch.setenv("EXAMPLES", "30")
    assert differential.main() == 1
    lines = capsys.readouterr().out.splitlines()
    count, rest = lines[-1].split(" ", 1)
    assert int(count) > 0 and rest == "packets, 1 differ"
    assert any(line.startswith("the data path differs: ") for line in lines)
    assert any("make differential SEED=7 " in line for line in lines)
    assert len([line for line in lines if line.startswith("wag_")]) <= 2  # one packet shows it
