"""How container runtimes find waggle: the plugin and the network's configuration, put there and taken away."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from waggle.errors import MissingFeature
from waggle.sources import cni_install

SOCKET = Path("/run/waggle/agent.sock")


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    return tmp_path / "net.d"


@pytest.fixture
def bins(tmp_path: Path) -> Path:
    return tmp_path / "bin"


def test_what_runtimes_of_debian_12_understand(conf: Path) -> None:
    cni_install.install_configuration(conf, SOCKET)
    found = json.loads((conf / cni_install.CONFIGURATION).read_text())
    assert found["cniVersion"] == "1.0.0"  # libcni 1.1 knows no later one
    assert found["cniVersions"][-1] == "1.1.0"
    assert found["plugins"][0]["apiSocket"] == str(SOCKET)
    assert [file.name for file in conf.iterdir()] == [cni_install.CONFIGURATION]


def test_the_plugin_is_replaced_while_it_runs(bins: Path) -> None:
    cni_install.install_plugin(bins)
    environment = {"CNI_COMMAND": "VERSION"}
    running = subprocess.Popen([bins / "waggle-cni"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    cni_install.install_plugin(bins)
    out, _ = running.communicate(b'{"cniVersion": "1.0.0"}')
    assert "1.1.0" in json.loads(out)["supportedVersions"]
    assert os.access(bins / "waggle-cni", os.X_OK)


def test_loopback_is_there_for_runtimes_that_want_it_and_another_is_left_alone(conf: Path, bins: Path) -> None:
    cni_install.install_plugin(bins)
    cni_install.install_plugin(bins)
    asked = subprocess.run(
        [bins / "loopback"], input=b"", env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True
    )
    assert "0.3.1" in json.loads(asked.stdout)["supportedVersions"]
    (bins / "loopback").unlink()
    (bins / "loopback").write_text("a distribution's own")
    cni_install.install_plugin(bins)
    cni_install.install_configuration(conf, SOCKET)
    assert (bins / "loopback").read_text() == "a distribution's own"
    assert bins / "loopback" not in cni_install.installed(bins, conf, SOCKET)


def test_a_configuration_before_ours_is_a_problem(conf: Path) -> None:
    assert "cannot read" in cni_install.problems(conf)[0].reason
    cni_install.install_configuration(conf, SOCKET)
    (conf / "10-other.conflist").write_text("{}")
    (conf / "00-notes.txt").write_text("no configuration")
    assert cni_install.problems(conf) == []
    (conf / "00-other.conf").write_text("{}")
    assert "00-other.conf" in cni_install.problems(conf)[0].reason
    (conf / cni_install.CONFIGURATION).unlink()
    assert "is gone" in cni_install.problems(conf)[0].reason


def test_only_what_an_agent_of_this_socket_wrote_is_its_to_remove(conf: Path, bins: Path) -> None:
    assert cni_install.installed(bins, conf, SOCKET) == []
    cni_install.install_plugin(bins)
    cni_install.install_configuration(conf, SOCKET)
    assert cni_install.installed(bins, conf, SOCKET) == [
        conf / cni_install.CONFIGURATION,
        bins / "loopback",
        bins / "waggle-cni",
    ]
    assert cni_install.installed(bins, conf, Path("/run/other.sock")) == []
    for text in ("", "{", "[]", "null", '{"plugins": 7}', '{"plugins": [{"type": "bridge"}]}'):
        (conf / cni_install.CONFIGURATION).write_text(text)
        assert cni_install.installed(bins, conf, SOCKET) == []


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(MissingFeature, match="cni-bin-dir: cannot write"):
        cni_install.install_plugin(file / "bin")
    with pytest.raises(MissingFeature, match="cni-conf-dir: cannot write"):
        cni_install.install_configuration(file / "net.d", SOCKET)
