"""The benchmark's own machinery, in miniature: figures that can be true, and nothing left on the machine.

No figure is compared with a number: this machine may be slow or busy. What is checked is that the harness measures
what it says, in the way it says.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench.rule_sets import RULE_SETS
from bench.service_ports import Endpoint, ServicePort

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "bench", "--parts", "east-west", "--ways", "plain", "--services", "1", "--quick"]


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


def test_every_part_in_miniature(tmp_path: Path) -> None:
    sizes = (
        "--services 1,20 --rounds 2 --seconds 0.5 --warmup 0.05 --attempts 1 --tests connect --placements one "
        "--cases policies-100,quiet --scale 30x2 --starts 1 --changes 5 --burst 10 --pods 3 --settle 0.5"
    )
    command = [sys.executable, "-m", "bench", *sizes.split(), "--out", str(tmp_path)]
    run = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert (
        of_run("/run/netns", run.pid)
        == of_run("/sys/fs/bpf", run.pid)
        == of_run(tempfile.gettempdir(), run.pid)
        == set()
    )

    document = json.loads((tmp_path / "figures.json").read_text())
    assert set(document["missing_peers"]) <= {"IPVS"}, "this machine has the peers, and measures them"
    peers = {"iptables-legacy", "nftables"}
    rates = {(row["services"], row["way"]): row["rate"] for row in document["samples"]}
    assert set(rates) == {(size, way) for size in (1, 20) for way in ("plain", "direct", "service", *peers)}
    assert all(rate > 0 for rate in rates.values())
    first = {(row["services"], row["way"]): row["ns"] for row in document["first_packets"]}
    assert set(first) == {(s, way) for s in (1, 20) for way in ("direct", "service", "service-packet", *peers)}
    assert all(len(ns) == 200 and min(ns) > 1_000 for ns in first.values())

    policies = [(row["case"], row["way"], row["round"]) for row in document["policy"]]
    cases = ("policies-100", "quiet")
    assert sorted(policies) == sorted(
        (case, way, n) for case in cases for way in (case, f"{case}/no-policy") for n in range(4)
    )
    assert all(row["rate"] > 0 for row in document["policy"])
    tables = document["policy_tables"]
    assert tables["no-policy"]["entries"] == 0 < tables["policies-100"]["entries"]

    assert {row["way"] for row in document["pods"]} == {"plain", "bridge", "direct"}
    assert all(row["rate"] > 0 for row in document["pods"])

    forwarded = {row["mode"]: row for row in document["north_south"]["runs"]}
    assert set(forwarded) == {"floor", "route", "tc-snat", "tc-dsr", "xdp-snat", "xdp-dsr", *peers}
    for row in forwarded.values():
        assert row["received"] >= 0.9 * row["sent"] > 1000
    assert 50 < document["north_south"]["program_ns"]["tc-snat"]["least"] < 50_000

    networks = {row["network"]: row for row in document["cni"]}
    assert set(networks) == {"waggle", "bridge + portmap"}, "containernetworking-plugins is there"
    for row in networks.values():
        for times in ("add_ms", "del_ms", "add_at_once_ms", "del_at_once_ms"):
            assert len(row[times]) == 3 and min(row[times]) > 0.1

    (scale,) = document["control_plane"]
    assert set(scale["peers"]) == peers
    for peer in scale["peers"].values():
        assert peer["full_s"][0] > 0 and set(peer["partial_s"]) == {"1", "10"}
    assert len(scale["change_ms"]) == 5 and scale["burst_s"][0]["applied"] > 0
    report = (tmp_path / "report.md").read_text()
    assert report.strip() in output
    for part in (
        "First packet",
        "North-south",
        "Pod to pod",
        "100 policies / no policy",
        "Pods by CNI",
        "Control plane with 30 Services of 2 endpoints",
        "Not measured: IPVS",
    ):
        assert part in report
    for name in ("ratios.svg", "peers.svg"):
        assert ElementTree.parse(tmp_path / name).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("name", RULE_SETS)
def test_rules_are_accepted_and_change_nothing_when_only_checked(name: str) -> None:
    """As kube-proxy would give them, with ClusterIPs, NodePorts and Services without endpoints."""
    rules = RULE_SETS[name]
    endpoints = ([], [Endpoint("10.244.1.9", 53, True)], [Endpoint(f"10.244.2.{number}", 53) for number in range(9)])
    kinds = list(itertools.product(("TCP", "UDP"), endpoints, (False, True)))
    ports = [
        ServicePort(
            "ns", f"s{number}", "p", protocol, f"10.96.0.{number}", 53, some, 30000 + number if node_port else 0
        )
        for number, (protocol, some, node_port) in enumerate(kinds, start=1)
    ]
    check = {"nft": ["-c"]}.get(rules.command[0], ["--test"])
    namespace = f"waggle-test-rules-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:

        def load(text: str, *options: str) -> None:
            command = ["ip", "netns", "exec", namespace, rules.command[0], *options, *rules.command[1:]]
            run = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
            assert run.returncode == 0, run.stderr

        if rules.base():
            load(rules.base())
        load(rules.full(ports), *check)
        load(rules.full(ports))
        load(rules.full(ports))  # a full sync on top of another, as every half hour
        load(rules.partial(ports, {index: port for index, port in enumerate(ports) if port.endpoints}))
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


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


def test_interrupted_while_rules_are_loaded_ends_what_loads_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--parts", "east-west", "--ways", "nftables", "--services", "30000"]
    run = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    try:
        until = time.monotonic() + 60
        while not (loaders := loaders_of(run.pid)):
            assert time.monotonic() < until and run.poll() is None
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130
    finally:
        run.kill()
        run.wait()
        run.stderr.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in loaders)
    assert of_run("/run/netns", run.pid) == of_run(tempfile.gettempdir(), run.pid) == set()


def loaders_of(pid: int) -> list[int]:
    """The shells that load rules for a run."""
    shown = subprocess.run(["pgrep", "-P", str(pid), "-x", "sh"], capture_output=True, text=True, check=False)
    return [int(line) for line in shown.stdout.split()]


def test_a_stopped_run_is_resumed(tmp_path: Path) -> None:
    command = [*COMMAND, "--tests", "connect,request", "--placements", "one"]
    run = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / "figures.json").exists():  # it is written when the first test is done
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.02)
    run.kill()
    run.wait()
    before = json.loads((tmp_path / "figures.json").read_text())["samples"]
    assert {sample["test"] for sample in before} == {"connect"}
    again = subprocess.run(
        [*command, "--resume", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert again.returncode == 0, again.stderr
    samples = json.loads((tmp_path / "figures.json").read_text())["samples"]
    assert samples[: len(before)] == before
    assert [sample["test"] for sample in samples] == ["connect"] * 3 + ["request"] * 3


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
        [*COMMAND, "--tests", "connect", "--placements", "one", "--out", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert of_run("/run/netns", run.pid) == set()
