"""Names, places and words of the lab that need no machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from waggle.errors import LabError
from waggle.lab.containers import ContainerState, expand
from waggle.lab.layout import LabLayout
from waggle.lab.pods import phase
from waggle.model.objects import ObjectKey

MOUNT = Path("/sys/fs/cgroup")
RUNNING = ContainerState(running=True, status=None)


def ended(status: int | None) -> ContainerState:
    return ContainerState(running=False, status=status)


@pytest.mark.parametrize("name", ["", "A", "1a", "a-b", "a_b", "../a", "a" * 21, "a.b", "ä"])
def test_names_that_could_be_taken_for_another_labs(name: str) -> None:
    with pytest.raises(LabError):
        LabLayout(name, MOUNT)


def test_a_lab_owns_its_namespaces_and_no_others() -> None:
    lab = LabLayout("test", MOUNT)
    pod = lab.pod(ObjectKey("default", "web-1"), lab.node(1)).place.netns.name
    for mine in ("waggle-test-net", "waggle-test-client", "waggle-test-node1", "waggle-test-node200", pod):
        assert lab.owns_netns(mine), mine
    for foreign in (
        "waggle-test2-node1",
        "waggle-test-bpf-17",
        "waggle-test-node1x",
        "waggle-test",
        "xwaggle-test-net",
    ):
        assert not lab.owns_netns(foreign), foreign


def test_long_pod_names_fit_into_a_file_name_and_stay_apart() -> None:
    lab = LabLayout("l" * 20, MOUNT)
    keys = [ObjectKey("n" * 63, "p" * 252 + letter) for letter in "ab"]
    names = [lab.pod(key, lab.node(1)).place.netns.name for key in keys]
    assert len(set(names)) == 2
    assert all(len(name) <= 255 and lab.owns_netns(name) for name in names)


def test_addresses_are_different_on_every_node() -> None:
    nodes = LabLayout("a", MOUNT).nodes(200)
    for values in ([node.addresses for node in nodes], [node.pod_cidrs for node in nodes]):
        flat = [value for pair in values for value in pair]
        assert len(set(flat)) == 400


def test_node_by_name() -> None:
    lab = LabLayout("a", MOUNT)
    assert lab.node_named("node2", 2) == lab.node(2)
    for unknown in ("node0", "node3", "node01", "node", "client", "node2x"):
        assert lab.node_named(unknown, 2) is None, unknown


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("$(NAME)", "web"),
        ("a$(NAME)b$(NAME)", "awebbweb"),
        ("$(OTHER)", "$(OTHER)"),
        ("$$(NAME)", "$(NAME)"),
        ("$NAME ${NAME} $", "$NAME ${NAME} $"),
    ],
)
def test_references_in_commands(text: str, expanded: str) -> None:
    assert expand(text, {"NAME": "web"}) == expanded


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([RUNNING], "Running"),
        ([RUNNING, ended(1)], "Running"),
        ([ended(0), ended(0)], "Succeeded"),
        ([ended(0), ended(1)], "Failed"),
        ([ended(None)], "Failed"),
    ],
)
def test_phase_of_a_pod(states: list[ContainerState], expected: str) -> None:
    assert phase(states) == expected


def test_reasons_are_in_words() -> None:
    assert ended(3).reason == "exited with status 3"
    assert ended(137).reason == "exited by signal 9"
    assert ended(None).reason == "killed"
    assert RUNNING.reason == ""
