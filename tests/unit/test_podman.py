"""Podman as a source: what it prints, and what happens when it is slow, gone or prints something else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from waggle.errors import ApiError, ConfigError
from waggle.model.workload import Workload
from waggle.sources import podman as podman_module
from waggle.sources.cni_records import Attachment
from waggle.sources.podman import PodmanSource, podman_command
from waggle.sources.podman_output import read_containers, read_pods, workloads

WEB, INFRA, MEMBER = "a" * 64, "b" * 64, "c" * 64


def container(number: str, name: str, state: str = "running", status: str = "Up 3 seconds", **more) -> dict:
    return {"Id": number, "Names": [name], "Labels": None, "State": state, "Status": status, "Ports": None, **more}


def said(containers: list, pods: list | None = None) -> dict[str, Workload]:
    return workloads(read_containers(json.dumps(containers).encode()), read_pods(json.dumps(pods).encode()))


@pytest.mark.parametrize(
    ("state", "status", "ready"),
    [
        ("running", "Up 3 seconds ago", True),
        ("running", "Up 3 seconds ago (healthy)", True),
        ("running", "Up 3 seconds ago (starting)", False),
        ("running", "Up 3 seconds ago (unhealthy)", False),
        ("paused", "Up 3 seconds ago", False),
        ("created", "Created", False),
        ("exited", "Exited (0) 1 second ago", False),
    ],
)
def test_readiness(state: str, status: str, ready: bool) -> None:
    assert said([container(WEB, "web", state, status, Labels={"app": "web"})]) == {
        WEB: Workload("podman", "web", {"app": "web"}, ready)
    }


def test_a_pod_is_its_containers() -> None:
    containers = [
        container(INFRA, "p-infra", IsInfra=True, Pod="p", PodName="shop"),
        container(MEMBER, "one", Pod="p", PodName="shop", Labels={"app": "web"}),
        container("d" * 64, "two", "exited", Pod="p", PodName="shop", Labels={"job": "init"}),
    ]
    pods = [{"Id": "p", "Name": "shop", "Labels": {"tier": "front"}}]
    assert said(containers, pods)[INFRA] == Workload(
        "podman", "shop", {"tier": "front", "app": "web", "job": "init"}, True
    )
    containers[1]["Status"] = "Up 1 second ago (unhealthy)"
    assert not said(containers, pods)[INFRA].ready
    assert not said(containers[:1], pods)[INFRA].ready, "a pod with nothing in it serves nothing"


@pytest.mark.parametrize("printed", [b"", b"{", b"nonsense", b'{"Id": 1}', b'[{"Names": []}]', b"\xff", b"[" * 5000])
def test_nonsense_is_an_error(printed: bytes) -> None:
    with pytest.raises(ApiError, match="podman ps prints something else"):
        read_containers(printed)


def test_no_containers() -> None:
    assert said([]) == {} and read_containers(b"null") == []


def test_setting() -> None:
    assert podman_command("off") == () and podman_command("auto") == ("podman",)
    assert podman_command("podman --root '/a b'") == ("podman", "--root", "/a b")
    for bad in ("", "podman 'x"):
        with pytest.raises(ConfigError, match="podman: "):
            podman_command(bad)


class Bench:
    """A command that prints what a file says, in Podman's place, and one attachment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records = [self.record(WEB)]
        self.learned: dict[str, Workload] = {}
        self.script('case "$1" in ps) cat "$0.ps" ;; events) exec tail -n +1 -f "$0.events" ;; esac')
        (directory / "podman.events").touch()
        self.says(container(WEB, "web", Labels={"app": "web"}))
        self.source = PodmanSource([str(directory / "podman")], lambda: self.records, self._learn)

    def record(self, container_id: str, **more) -> Attachment:
        return Attachment(container_id, "eth0", "n", "/run/netns/x", "", "", ("10.0.0.2",), **more)

    def script(self, text: str) -> None:
        scratch = self.directory / "podman.tmp"
        scratch.write_text(f"#!/bin/sh\necho $1 >> {self.directory}/calls\n{text}\n")
        scratch.chmod(0o755)
        scratch.rename(self.directory / "podman")

    def says(self, *containers: dict) -> None:
        (self.directory / "podman.ps").write_text(json.dumps(containers))

    def event(self) -> None:
        with (self.directory / "podman.events").open("a") as file:
            file.write("start\n")

    @property
    def calls(self) -> list[str]:
        file = self.directory / "calls"
        return file.read_text().split() if file.exists() else []

    async def _learn(self, name: str, workload: Workload) -> None:
        self.learned[name] = workload
        self.records = [
            self.record(one.container_id, workload=workload) if one.host_ifname == name else one for one in self.records
        ]

    @property
    def web(self) -> Workload | None:
        return self.learned.get(self.record(WEB).host_ifname)


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (processes make it true)
            await asyncio.sleep(0.01)


@pytest.fixture
async def bench(tmp_path: Path):
    made = Bench(tmp_path)
    task = asyncio.create_task(made.source.run())
    yield made
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_event_is_followed(bench: Bench) -> None:
    bench.source.notice()
    await until(lambda: bench.web and bench.source._hears)
    bench.says(container(WEB, "renamed"))
    bench.event()
    await until(lambda: bench.web == Workload("podman", "renamed", {}, True))
    assert bench.source.problems() == []


async def test_nothing_runs_without_interfaces(bench: Bench) -> None:
    bench.source.notice()
    await until(lambda: bench.source._hears)
    bench.records = []
    bench.source.notice()
    await until(lambda: not bench.source._hears)
    before = bench.calls
    bench.source.notice()
    await asyncio.sleep(0.2)
    assert bench.calls == before


async def test_containers_of_others_are_not_asked_for(bench: Bench) -> None:
    bench.records = [bench.record("web-1"), bench.record(WEB, uid="kubelet's")]
    bench.source.notice()
    await asyncio.sleep(0.2)
    assert bench.calls == [] and bench.learned == {}


async def test_what_was_learned_stays_when_podman_fails(bench: Bench) -> None:
    bench.source.notice()
    await until(lambda: bench.web and bench.source._hears)
    known = bench.web
    (bench.directory / "podman.ps").write_text("garbage")
    bench.event()
    await until(lambda: bench.source.problems())
    assert "something else" in bench.source.problems()[0].reason
    bench.script('echo "no storage" >&2; exit 125')
    bench.source.notice()
    await until(lambda: "failed: no storage" in bench.source.problems()[0].reason)
    (bench.directory / "podman").unlink()
    bench.source.notice()
    await until(lambda: "there is no" in bench.source.problems()[0].reason)
    assert bench.web == known
    bench.script('cat "$0.ps"')
    bench.says(container(WEB, "again"))
    bench.source.notice()
    await until(lambda: bench.web and bench.web.name == "again" and not bench.source.problems())


async def test_slow_podman_is_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.source.notice()
    await until(lambda: bench.web)
    monkeypatch.setattr(podman_module, "TIMEOUT_SECONDS", 0.1)
    bench.script('echo $$ > "$0.pid"; exec sleep 60')
    bench.source.notice()
    await until(lambda: any("did not end within" in p.reason for p in bench.source.problems()))
    pid = int((bench.directory / "podman.pid").read_text())
    await until(lambda: not Path(f"/proc/{pid}").exists())


async def test_looks_come_by_the_clock_without_events(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(podman_module, "UNHEARD_SECONDS", 0.05)
    bench.script('case "$1" in ps) cat "$0.ps" ;; *) echo "no journal" >&2; exit 1 ;; esac')
    bench.source.notice()
    await until(lambda: any("no journal" in p.reason for p in bench.source.problems()))
    bench.says(container(WEB, "late"))
    await until(lambda: bench.web and bench.web.name == "late")


async def test_a_container_that_podman_forgot_serves_no_more(bench: Bench) -> None:
    bench.source.notice()
    await until(lambda: bench.web and bench.source._hears)
    bench.says()
    bench.event()
    await until(lambda: bench.web == Workload("podman", "web", {"app": "web"}, False))


async def test_a_missing_podman_is_told_where_one_is_expected(tmp_path: Path) -> None:
    record = Attachment(WEB, "eth0", "n", "", "", "", ("10.0.0.2",))

    async def learn(_name: str, _workload: Workload) -> None:
        raise AssertionError

    for expected in (False, True):
        source = PodmanSource([str(tmp_path / "none")], lambda: [record], learn, expected=expected)
        task = asyncio.create_task(source.run())
        source.notice()
        await asyncio.sleep(0.2)
        assert [p.subject for p in source.problems()] == (["Podman"] if expected else [])
        task.cancel()
