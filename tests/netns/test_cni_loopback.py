"""The plugin by its other name, loopback, as containerd executes it: in a real namespace, without any agent."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cni_fixtures import built_plugin  # noqa: F401  (a fixture)
from cni_node import run

from waggle.kernel.netlink import Netlink

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]


@pytest.fixture
def loopback(plugin: Path, tmp_path: Path) -> Path:
    link = tmp_path / "loopback"
    link.symlink_to(plugin)
    return link


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"wagloop-{os.getpid()}"
    run("ip", "netns", "add", name)
    try:
        yield Path("/run/netns") / name
    finally:
        run("ip", "netns", "del", name)


def call(loopback: Path, command: str, netns: Path, version: str = "1.0.0", **more: Any) -> tuple[int, dict[str, Any]]:
    configuration = json.dumps({"cniVersion": version, "name": "cni-loopback", "type": "loopback", **more})
    environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": "c", "CNI_IFNAME": "lo", "CNI_NETNS": str(netns)}
    done = subprocess.run(
        [loopback], input=configuration.encode(), env=environment, capture_output=True, timeout=10, check=False
    )
    return done.returncode, json.loads(done.stdout or b"{}")


def is_up(netns: Path) -> bool:
    with Netlink(netns) as inside:
        return inside.link_by_name("lo").up


def test_the_interface_comes_up_and_is_described(loopback: Path, netns: Path) -> None:
    status, fault = call(loopback, "CHECK", netns, prevResult={})
    assert (status, fault["msg"]) == (1, "lo is down")
    for _ in range(2):  # a runtime may ask again
        status, result = call(loopback, "ADD", netns)
        assert status == 0
        assert is_up(netns)
        assert result["interfaces"] == [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": str(netns)}]
        assert result["ips"] == [{"interface": 0, "address": "127.0.0.1/8"}, {"interface": 0, "address": "::1/128"}]
    assert call(loopback, "CHECK", netns, prevResult=result) == (0, {})
    assert call(loopback, "DEL", netns) == (0, {})


def test_containerd_1_asks_for_an_old_version(loopback: Path, netns: Path) -> None:
    status, result = call(loopback, "ADD", netns, version="0.3.1")
    assert (status, result["cniVersion"]) == (0, "0.3.1")
    assert [(ip["version"], ip["address"]) for ip in result["ips"]] == [("4", "127.0.0.1/8"), ("6", "::1/128")]


def test_what_it_cannot_do_is_said(loopback: Path, netns: Path) -> None:
    gone = Path("/run/netns/wagloop-nobody")
    assert call(loopback, "ADD", gone)[1]["code"] == 3
    assert call(loopback, "DEL", gone) == (0, {})
    assert call(loopback, "ADD", loopback)[1]["code"] == 4  # a file that is no namespace
    assert call(loopback, "ADD", Path("relative"))[1]["code"] == 4
    assert call(loopback, "ADD", netns, version="9.0.0")[1]["code"] == 1
    assert call(loopback, "ADD", netns, prevResult={"ips": []})[1]["code"] == 2
    assert call(loopback, "MEND", netns)[1]["code"] == 4
    assert not is_up(netns)
