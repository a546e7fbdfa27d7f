"""The reverse path filter for all interfaces becomes each one's own, except for those of waggle; and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from waggle.reconcile.forwarding import keep_filters
from waggle.reconcile.sysctls import Sysctls

POD, TUNNEL = "wag0123456789a", "waggle-vxlan4"


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return tmp_path / "sys" / "net" / "ipv4" / "conf"


def write(conf: Path, **values: int) -> None:
    for interface, value in values.items():
        (conf / interface).mkdir(parents=True, exist_ok=True)
        (conf / interface / "rp_filter").write_text(f"{value}\n")


def read(conf: Path) -> dict[str, int]:
    return {folder.name: int((folder / "rp_filter").read_text()) for folder in conf.iterdir()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"all": 0, "default": 1, "eth0": 1, POD: 1}, {"all": 0, "default": 1, "eth0": 1, POD: 1}),
        (
            {"all": 1, "default": 0, "eth0": 0, "eth1": 2, POD: 0, TUNNEL: 0},
            {"all": 0, "default": 1, "eth0": 1, "eth1": 2, POD: 0, TUNNEL: 0},
        ),
        ({"all": 2, "default": 1, "eth0": 0}, {"all": 0, "default": 2, "eth0": 2}),
    ],
)
def test_every_other_interface_is_filtered_as_before(
    tmp_path: Path, conf: Path, before: dict[str, int], after: dict[str, int]
) -> None:
    write(conf, **before)
    state = tmp_path / "state"
    state.mkdir()
    for _ in range(2):
        keep_filters(Sysctls(state, tmp_path / "sys"))
        assert read(conf) == after
    Sysctls(state, tmp_path / "sys").restore()
    assert read(conf) == before


def test_a_host_without_ipv4(tmp_path: Path) -> None:
    keep_filters(Sysctls(tmp_path, tmp_path / "sys"))
    assert not (tmp_path / "sysctls.json").exists()
