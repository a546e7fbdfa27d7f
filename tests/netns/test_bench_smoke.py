"""The benchmark's own machinery, on its base line: figures that can be true, and nothing left on the machine.

No figure is compared with a number: this machine may be slow or busy. What is checked is that the harness measures
what it says, in the way it says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "bench", "--plain-only", "--quick"]


def of_run(folder: str, pid: int) -> set[str]:
    return {path.name for path in Path(folder).glob(f"wagbench{pid}-*")}


def test_base_line_is_measured_and_taken_down(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [*COMMAND, "--out", str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert of_run("/run/netns", run.pid) == set()

    samples = json.loads((tmp_path / "figures.json").read_text())["samples"]
    cells = {(sample["placement"], sample["test"]) for sample in samples}
    tests = {"connect", "request", "request16", "udp16", "udpsendto16", "bulk"}
    assert cells == {(placement, test) for placement in ("one node", "across nodes") for test in tests}
    assert len(samples) == 3 * len(cells)  # rounds of --quick
    for sample in samples:
        assert sample["way"] == "plain"
        assert sample["rate"] > 0
        assert sample["lost"] == 0
        if sample["test"] == "connect":
            # every counted exchange had a connection of its own (those of the warm-up are not counted)
            assert sample["connections"] >= sample["rate"] * 0.2
        else:
            # … and here all went over the connections that were opened at the start
            assert sample["connections"] == {"request": 1, "bulk": 1}.get(sample["test"], 16)
        if sample["test"] != "bulk":
            assert 0 < sample["p50_us"] <= sample["p99_us"]
            # closed loop: rate x mean latency is what is under way (Little), and no median exceeds twice the mean;
            # the third is for exchanges that began before the measured time
            under_way = 1 if sample["test"] == "request" else 16
            assert sample["rate"] * sample["p50_us"] / 1e6 < under_way * 3
    report = (tmp_path / "report.md").read_text()
    assert report.strip() in output
    assert "One node" in report and "Across nodes" in report


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_takes_everything_down(tmp_path: Path, number: signal.Signals) -> None:
    run = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + 60
        while len(of_run("/run/netns", run.pid)) < 8:
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.05)
        run.send_signal(number)
        assert run.wait(60) == 130
    finally:
        run.kill()
        run.wait()
        assert run.stderr is not None
        run.stderr.close()
    assert of_run("/run/netns", run.pid) == set()


def test_killed_run_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    run = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(of_run("/run/netns", run.pid)) < 8:
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.05)
    run.kill()
    run.wait()
    assert of_run("/run/netns", run.pid) != set()
    again = subprocess.run(
        [*COMMAND, "--only", "connect", "--placements", "one", "--out", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert of_run("/run/netns", run.pid) == set()
