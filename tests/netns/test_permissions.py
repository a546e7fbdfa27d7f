"""Who may come near an agent: root, one group where that is wanted, nobody else, whatever umask it was started with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import AgentNode

from waggle.kernel.capabilities import NEEDED, NUMBERS

NOBODY, GROUP, GROUP_ID = 65534, "games", 60  # a group that Debian always has
ASK = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
    "s.send(b'GET /status HTTP/1.0\\r\\n\\r\\n'); print(s.recv(12))"
)


@pytest.fixture(scope="module")
def node() -> Iterator[AgentNode]:
    directory = Path(tempfile.mkdtemp(prefix="waggle-permissions-"))
    directory.chmod(0o755)  # unlike pytest's own: others must get as far as what the agent made
    node = AgentNode(directory)
    try:
        node.open()
        yield node
    finally:
        node.close()
        shutil.rmtree(directory)


def ask(node: AgentNode, *groups: int) -> str:
    """What somebody who is not root gets from the API."""

    def become() -> None:
        os.setgroups(groups)
        os.setgid(NOBODY)
        os.setuid(NOBODY)

    done = subprocess.run(
        ["/usr/bin/python3", "-c", ASK, str(node.socket)], preexec_fn=become, capture_output=True, text=True, timeout=20
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def open_to_others(*places: Path, group: bool = False) -> list[str]:
    """What somebody who is not root, and in no group of ours, can read or write."""
    bits = stat.S_IRWXO | (stat.S_IRWXG if group else 0)
    found = []
    for place in places:
        for path in (place, *place.rglob("*")):
            status = path.lstat()
            if not stat.S_ISLNK(status.st_mode) and status.st_mode & bits:
                found.append(f"{path} {stat.filemode(status.st_mode)}")
    return found


@pytest.mark.parametrize("umask", ["0000", "0777"])
def test_root_alone_whatever_the_umask(node: AgentNode, umask: str) -> None:
    agent = node.start(
        before=["sh", "-c", f'umask {umask}; exec "$@"', "sh"],
        cni_bin_dir=node.directory / f"opt{umask}/cni/bin",
        cni_conf_dir=node.directory / f"etc{umask}/cni/net.d",
    )
    node.add_pod(f"p{umask}")
    configuration = node.directory / f"etc{umask}/cni/net.d/05-waggle.conflist"
    node.until(configuration.exists)
    assert not open_to_others(node.state, node.bpf_root, node.socket.parent, group=True)
    for path in (configuration.parent, node.directory / f"opt{umask}/cni/bin", node.directory / f"opt{umask}"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert stat.S_IMODE(configuration.stat().st_mode) == 0o644
    assert "PermissionError" in ask(node) and "PermissionError" in ask(node, GROUP_ID)
    node.stop(agent)
    shutil.rmtree(node.socket.parent)


def test_one_group_besides_root(node: AgentNode) -> None:
    agent = node.start(api_group=GROUP)
    assert ask(node, GROUP_ID) == "b'HTTP/1.0 200'"
    assert "PermissionError" in ask(node)
    assert not open_to_others(node.state, node.bpf_root, node.socket.parent)
    assert not open_to_others(node.state, node.bpf_root, group=True)
    node.stop(agent)
    assert "there is no group 'nosuch'" in node.refused(api_group="nosuch")


def test_the_agent_keeps_what_it_needs_and_nothing_else(node: AgentNode) -> None:
    agent = node.start()
    needed = sum(1 << NUMBERS[name] for name in NEEDED)
    status = []
    for task in Path(f"/proc/{agent.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            status.append(task.joinpath("status").read_text())
    assert len(status) > 1  # worker threads too
    for text in status:
        fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        assert [int(fields[name], 16) for name in ("CapEff", "CapPrm", "CapBnd")] == [needed] * 3
        assert (fields["CapInh"], fields["CapAmb"], fields["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert json.loads(node.request("/readyz")[1])["ready"] is True
    node.stop(agent)
