"""Where waggle cannot run: what is missing and what to do is said in so many words, and nothing is changed."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_node import WAGGLE, AgentNode

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="gives root up: needs root")]

ROOT = Path(__file__).resolve().parents[2]
# whoever may read this checkout and its interpreter, and nothing else
NOBODY = [
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
    "--bounding-set=-all,+dac_read_search",
]
NO_ADMIN = ["setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin"]


@pytest.fixture(scope="module")
def node() -> Iterator[AgentNode]:
    """A node whose agent has run, so that there is something to look at and to remove; anybody may look."""
    with tempfile.TemporaryDirectory(prefix="wagnp-") as directory:
        Path(directory).chmod(0o755)
        made = AgentNode(Path(directory))
        try:
            made.open()
            made.stop(made.start())
            yield made
        finally:
            made.close()


def without(mount: str, *command: str) -> list[str]:
    """The command in a mount namespace that lacks a mount."""
    return ["unshare", "--mount", "sh", "-c", 'umount -l "$0" && exec "$@"', mount, *command]


def says(node: AgentNode, command: list[str]) -> str:
    """What a command says that cannot do its work. It must not have done any."""
    before = node.facts()
    done = subprocess.run(
        ["nsenter", f"--net={node.netns}", *command], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr and done.stderr.startswith("waggle: "), done.stderr
    assert node.facts() == before
    return done.stderr


def test_agent_without_root(node: AgentNode) -> None:
    for command in ([*NOBODY, *WAGGLE, "agent"], without("/sys/fs/bpf", *NOBODY, *WAGGLE, "agent")):
        said = says(node, [*command, *node.settings()])
        assert "root: run as root (sudo)" in said
        assert "Linux 6.6" not in said, "nobody looked at the kernel"


@pytest.mark.parametrize("command", ["up", "down", "status", "demo"])
def test_lab_without_root(node: AgentNode, command: str) -> None:
    said = says(node, [*NOBODY, *WAGGLE, "lab", command])
    assert "run it as root (try sudo)" in said and len(said.splitlines()) == 1


def test_looking_and_cleaning_without_root(node: AgentNode) -> None:
    at = ["--bpf-root", str(node.bpf_root)]
    for command in (["map", "list", *at], ["map", "dump", "services", *at]):
        said = says(node, [*NOBODY, *WAGGLE, *command])
        assert "root" in said.removeprefix("waggle: ") and len(said.splitlines()) == 1, said
    said = says(node, [*NOBODY, *WAGGLE, "status", "--api-socket", str(node.socket)])
    assert "not allowed to open" in said and "run as root" in said and len(said.splitlines()) == 1, said
    said = says(
        node,
        [*NOBODY, *WAGGLE, "cleanup", *at, "--state-dir", str(node.state), "--api-socket", str(node.socket)],
    )
    assert "root" in said.removeprefix("waggle: ") and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("command", [["agent"], ["lab", "up", "--name", f"np{os.getpid()}"]])
def test_no_bpffs_and_no_permission_to_mount_it(node: AgentNode, command: list[str]) -> None:
    said = says(node, without("/sys/fs/bpf", *NO_ADMIN, *WAGGLE, *command))
    assert "bpffs is not mounted" in said and "mount -t bpf bpf /sys/fs/bpf" in said
    assert len(said.splitlines()) == 1, said


@pytest.mark.parametrize("command", [["agent"], ["lab", "up", "--name", f"np{os.getpid()}"]])
def test_no_cgroup2(node: AgentNode, command: list[str]) -> None:
    from waggle.kernel.cgroup import cgroup2_mount

    said = says(node, without(str(cgroup2_mount()), *WAGGLE, *command))
    assert "no cgroup2 file system is mounted" in said and "mount -t cgroup2" in said


def test_tests_without_root_say_what_they_leave_out() -> None:
    # pytest shows its version instead of running the tests in tests/unit
    done = subprocess.run([*NOBODY, ROOT / "tools" / "run_tests.sh", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done
    assert "need root: tests/bpf" in done.stdout and "tests/netns" in done.stdout and "sudo make test" in done.stdout
