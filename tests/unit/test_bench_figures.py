"""The benchmark's figures: what a stopped run keeps, which Services a round asks, what becomes of it in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.control_plane_report import control_plane
from bench.figures import FILE, Figures
from bench.first_packet import CONNECTIONS, numbers_of
from bench.first_packet_report import FirstPacketFigures
from bench.north_south_report import NorthSouthFigures
from bench.options import parse, recorded
from bench.places import BenchError
from bench.tables import quantile


def test_first_packets_are_spread_over_all_services_and_never_ask_twice() -> None:
    rounds, services = 5, 50_000
    asked = [number for each in range(rounds) for number in numbers_of(services, each, rounds)]
    assert len(set(asked)) == len(asked) == CONNECTIONS * rounds
    assert min(asked) == 0
    assert services - 2 - services // 500 < max(asked) < services - 2
    assert all(numbers_of(services, 0, rounds)[i] <= services * (i + 1) // CONNECTIONS for i in range(CONNECTIONS))


def test_first_packets_with_few_services_stay_within_them() -> None:
    assert set(numbers_of(1, 0, 3)) == {-1}
    assert set(numbers_of(2, 0, 3)) == {-1}
    assert {number for each in range(3) for number in numbers_of(12, each, 3)} == set(range(10))


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    options = recorded(parse(["--parts", "first-packet", "--rounds", "2"]))
    figures = Figures(tmp_path, {"options": options})
    rows = figures.rows("first_packets")
    rows += [{"services": 1, "round": 0}, {"services": 1, "round": 1}, {"services": 1000, "round": 0}]
    figures.document["incomplete"] = "interrupted"
    figures.save()
    resumed = Figures.resumed(tmp_path, options)
    assert "incomplete" not in resumed.document
    assert resumed.complete("first_packets", 2, services=1)
    # half a cell is measured again, all of it
    assert not resumed.complete("first_packets", 2, services=1000)
    assert resumed.rows("first_packets") == rows[:2]


def test_a_run_is_not_resumed_with_other_options(tmp_path: Path) -> None:
    Figures(tmp_path, {"options": recorded(parse(["--rounds", "2"]))}).save()
    with pytest.raises(BenchError, match="other options"):
        Figures.resumed(tmp_path, recorded(parse(["--rounds", "3"])))
    (tmp_path / FILE).write_text("{")
    with pytest.raises(BenchError, match="cannot be read"):
        Figures.resumed(tmp_path, recorded(parse([])))


@pytest.mark.parametrize("arguments", [["--parts", "traffic"], ["--ways", "ipvs"], ["--tests", "x"], ["--modes", ""]])
def test_unknown_names_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "unknown" in capsys.readouterr().err


def test_quantiles_are_values_that_were_measured() -> None:
    assert quantile(range(1, 101), 0.5) == 50
    assert quantile(range(1, 101), 0.99) == 99
    assert quantile([7.0], 0.99) == 7.0


def test_first_packet_ratios_are_against_waggle() -> None:
    runs = [
        {"services": 1, "way": way, "round": 0, "ns": [ns] * 100, "foreign": 0, "stolen": 0, "attempts": 1}
        for way, ns in (("service", 20_000), ("nftables", 30_000))
    ]
    text = FirstPacketFigures(runs).markdown()
    assert "20.0 / 20.0" in text
    assert "1.50 / 1.50" in text


def test_north_south_takes_the_generator_off() -> None:
    rates = {"floor": 1e6, "iptables-legacy": 250e3, "tc-snat": 500e3}
    runs = [
        {"mode": mode, "round": number, "sent": int(rate), "received": int(rate), "seconds": 1.0}
        for mode, rate in rates.items()
        for number in range(3)
    ]
    figures = NorthSouthFigures({"runs": runs, "flows": 1, "services": 1, "program_ns": {}})
    assert figures.node_ns("tc-snat") == pytest.approx(1000)
    assert figures.node_ns("iptables-legacy") == pytest.approx(3000)
    assert figures.node_ns("floor") is None
    assert "tc-snat : iptables = 4.2 : 2.1" in figures.markdown()


def test_a_sync_that_was_given_up_is_more_than_its_limit() -> None:
    one = {"foreign": 0.0, "stolen": 0.0, "attempts": 1}
    scale = {
        "services": 50_000,
        "endpoints": 5,
        "burst": 1000,
        "cold_start_s": [{"all": 2.0, "cpu": 1.0, **one}],
        "restart_s": [{"applied": 1.0, **one}],
        "change_ms": [1.0],
        "change_disturbance": one,
        "burst_s": [{"applied": 0.5, **one}],
        "agent_memory": {"after start": {"rss": 1, "pss": 1}},
        "agent_idle_cpu": 0.0,
        "maps": [],
        "peers": {
            "nftables": {"full_s": [None], "partial_s": {"1": [], "1000": []}, "limit_s": 60.0, "full_bytes": 1},
            "iptables-legacy": {
                "full_s": [10.0, 12.0, 11.0],
                "partial_s": {"1": [3.0], "1000": [4.0]},
                "limit_s": 60.0,
                "full_bytes": 1,
            },
        },
    }
    rows = {
        line.split("|")[1].strip(): line
        for line in control_plane(json.loads(json.dumps(scale))).splitlines()
        if "|" in line
    }
    assert [cell.strip() for cell in rows["Everything, from nothing"].split("|")[2:7]] == [
        "2.00 s", "> 60.00 s", "11.00 s", "> 30.0", "5.5",
    ]  # fmt: skip
    assert [cell.strip() for cell in rows["1,000 changed"].split("|")[2:7]] == ["0.50 s", "", "4.00 s", "", "8.0"]
