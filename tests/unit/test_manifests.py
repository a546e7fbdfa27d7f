"""The manifest source: what files say, and what becomes of it when they say it badly or twice."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import pytest
from manifest_directory import HOUR, put, running, service

from waggle.model.objects import ObjectKey
from waggle.sources import directory_watch, manifest_file
from waggle.sources.directory_watch import Hints
from waggle.sources.manifest_rows import ManifestRows
from waggle.sources.manifests import ManifestSource
from waggle.sources.yaml_objects import parse_manifest
from waggle.store import Store

# -- plain life --------------------------------------------------------------------------------------------------------


async def test_create_change_delete(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a") + "---\n" + service("b", "10.96.0.11"))
    async with running(tmp_path) as watched:
        assert watched.names() == {"a", "b"}
        put(
            tmp_path / "c.json",
            '{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "c"}, "spec": {"clusterIP": "None"}}',
        )
        await watched.until(lambda: watched.names() == {"a", "b", "c"})
        (tmp_path / "d.yml").write_text(service("d"))
        await watched.until(lambda: "d" in watched.names())
        (tmp_path / "a.yaml").write_text(service("a", "10.96.0.99"))
        await watched.until(lambda: watched.names() == {"a", "c", "d"} and watched.address("a") == "10.96.0.99")
        (tmp_path / "a.yaml").unlink()
        await watched.until(lambda: watched.names() == {"c", "d"})
        (tmp_path / "d.yml").rename(tmp_path / "d.txt")
        await watched.until(lambda: watched.names() == {"c"})
        (tmp_path / "d.txt").rename(tmp_path / "e.yaml")
        await watched.until(lambda: watched.names() == {"c", "d"})
        assert watched.reasons() == []


async def test_rows_carry_the_file_they_came_from(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    async with running(tmp_path) as watched:
        assert watched.store.owner("Service", ObjectKey("default", "a")) == f"file:{tmp_path}/a.yaml"


async def test_hidden_files_editor_temporaries_and_other_suffixes_are_not_read(tmp_path):
    async with running(tmp_path) as watched:
        for name in (
            ".a.yaml",
            "a.yaml~",
            "#a.yaml#",
            ".#a.yaml",
            ".a.yaml.swp",
            "a.yaml.bak",
            "a.txt",
            "4913",
            "a.yaml.tmp",
        ):
            (tmp_path / name).write_text(service("no"))
        await watched.settled()
        assert watched.names() == set()
        assert watched.reasons() == []


async def test_subdirectories_are_not_read_and_that_is_noted(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.yaml").write_text(service("a"))
    (tmp_path / "odd.yaml").mkdir()
    async with running(tmp_path) as watched:
        assert watched.names() == set()
        assert [note.file for note in watched.source.notes()] == [f"{tmp_path}/more", f"{tmp_path}/odd.yaml"]
        assert watched.reasons() == []


async def test_notes_are_no_problems(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: d}\n---\n" + service("a", '""')
    )
    async with running(tmp_path) as watched:
        assert watched.reasons() == []
        assert [(note.subject, note.line) for note in watched.source.notes()] == [
            ("Deployment d", 1),
            ("Service default/a", 9),
        ]
        put(tmp_path / "a.yaml", service("a"))
        await watched.until(lambda: watched.source.notes() == [])


async def test_an_unchanged_object_is_no_change(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    async with running(tmp_path) as watched:
        watched.store.take_changes()
        before = watched.store.services[ObjectKey("default", "a")]
        put(tmp_path / "a.yaml", "# a comment\n" + service("a"))
        await watched.settled()
        assert ObjectKey("default", "a") not in watched.store.take_changes().services
        assert watched.store.services[ObjectKey("default", "a")] is before


# -- bad content -------------------------------------------------------------------------------------------------------


async def test_a_bad_document_is_refused_and_everything_else_goes_on(tmp_path):
    (tmp_path / "a.yaml").write_text("---\n".join([service("a"), service("b"), service("c")]))
    async with running(tmp_path) as watched:
        text = "---\n".join([service("a", "10.96.0.99"), service("b", port=99999), service("d")])
        put(tmp_path / "a.yaml", text)
        await watched.until(lambda: watched.names() == {"a", "b", "d"})
        assert watched.address("a") == "10.96.0.99"
        assert watched.store.services[ObjectKey("default", "b")].spec.ports[0].port == 80  # the last good one
        (problem,) = watched.source.problems()
        assert (problem.file, problem.line, problem.subject) == (f"{tmp_path}/a.yaml", 17, "Service default/b")
        assert "between 1 and 65535, not 99999" in problem.reason
        assert "the last good version stays in force" in problem.reason
        put(tmp_path / "a.yaml", service("b", "10.96.0.77"))
        await watched.until(lambda: watched.names() == {"b"} and watched.address("b") == "10.96.0.77")
        assert watched.reasons() == []


@pytest.mark.parametrize(
    "broken",
    [
        service("b")[:-30] + "  ports: [",  # truncated inside a value
        "kind: [\n",
        "\tkind: Service\n",
        "\x00\x00\x00",
        service("b").encode("utf-16"),
        b"\xff\xfe\xfd",
        "just text",
        "- a\n- list\n",
        "{" * 100_000,
        "kind: Service\n",
        service("b") + "kind: Pod\n",
    ],
)
async def test_while_a_document_cannot_be_told_apart_nothing_of_its_file_goes(tmp_path, broken):
    (tmp_path / "a.yaml").write_text(service("a") + "---\n" + service("b"))
    (tmp_path / "z.yaml").write_text(service("z"))
    async with running(tmp_path) as watched:
        data = broken if isinstance(broken, bytes) else broken.encode()
        (tmp_path / "a.yaml").write_bytes(service("a", "10.96.0.99").encode() + b"---\n" + data)
        await watched.until(watched.reasons)
        await watched.stays(lambda: watched.names() == {"a", "b", "z"})
        if not data.startswith((b"\xff\xfe", b"\xfe\xff")):
            assert watched.address("a") == "10.96.0.99"  # the good document of the same file is taken
        (tmp_path / "a.yaml").write_text(service("a"))
        await watched.until(lambda: watched.names() == {"a", "z"})
        assert watched.reasons() == []


async def test_an_empty_file_means_that_the_objects_are_gone(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    (tmp_path / "b.yaml").write_text(service("b"))
    async with running(tmp_path) as watched:
        (tmp_path / "a.yaml").write_text("")
        await watched.until(lambda: watched.names() == {"b"})
        put(tmp_path / "b.yaml", "# nothing but a comment\n---\n")
        await watched.until(lambda: watched.names() == set())
        assert watched.reasons() == []


async def test_a_file_that_is_too_large_keeps_what_was_known(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    async with running(tmp_path) as watched:
        put(tmp_path / "a.yaml", "# " + "x" * (8 << 20) + "\n" + service("other"))
        await watched.until(watched.reasons)
        assert "is the limit" in watched.reasons()[0]
        assert watched.names() == {"a"}
        (tmp_path / "a.yaml").unlink()
        await watched.until(lambda: watched.names() == set() and not watched.reasons())


async def test_problems_are_logged_once_and_keep_their_time(tmp_path, caplog):
    caplog.set_level(logging.INFO, "waggle")
    (tmp_path / "a.yaml").write_text(service("a", port=0))
    async with running(tmp_path) as watched:
        (first,) = watched.source.problems()
        put(tmp_path / "a.yaml", "# moved down a line\n" + service("a", port=0))
        await watched.until(lambda: watched.source.problems()[0].line == 9)
        assert watched.source.problems()[0].since == first.since
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert warnings[0].startswith(f"{tmp_path}/a.yaml:8: Service default/a: spec.ports[0].port")
        put(tmp_path / "a.yaml", service("a"))
        await watched.until(lambda: not watched.reasons())
        assert any("no problem any more" in record.getMessage() for record in caplog.records)


# -- the same object in two files --------------------------------------------------------------------------------------


async def test_the_second_of_two_files_waits_for_the_first_to_go(tmp_path):
    (tmp_path / "a.yaml").write_text("# comment\n" + service("web", "10.96.0.1"))
    (tmp_path / "b.yaml").write_text(service("web", "10.96.0.2"))
    async with running(tmp_path) as watched:
        assert watched.address() == "10.96.0.1"
        (problem,) = watched.source.problems()
        assert (problem.file, problem.line) == (f"{tmp_path}/b.yaml", 1)
        assert problem.reason == f"is given by {tmp_path}/a.yaml:2 already; this one is not used"
        put(tmp_path / "0.yaml", service("web", "10.96.0.3"))  # later, although first by name
        await watched.until(lambda: len(watched.reasons()) == 2)
        assert watched.address() == "10.96.0.1"
        present: list[bool] = []
        watched.store.on_change = lambda: present.append("web" in watched.names())
        (tmp_path / "a.yaml").unlink()
        await watched.until(lambda: watched.address() == "10.96.0.2")
        assert all(present)
        (problem,) = watched.source.problems()
        assert (problem.file, problem.reason) == (
            f"{tmp_path}/0.yaml",
            f"is given by {tmp_path}/b.yaml:1 already; this one is not used",
        )
        put(tmp_path / "b.yaml", service("other"))
        await watched.until(lambda: watched.address() == "10.96.0.3")
        assert watched.reasons() == []


async def test_an_object_that_another_source_gave_first(tmp_path):
    store = Store()
    (tmp_path / "a.yaml").write_text(service("web", "10.96.0.2"))
    (placed,) = parse_manifest(service("web", "10.96.0.1").encode(), "-").objects.values()
    store.upsert(placed.obj, "kubernetes")
    source = ManifestSource(store, tmp_path, resync=HOUR)
    task = asyncio.create_task(source.run())
    await asyncio.wait_for(source.synced.wait(), 10)
    assert [problem.reason for problem in source.problems()] == ["is given by kubernetes already; this one is not used"]
    store.delete("Service", ObjectKey("default", "web"), "kubernetes")
    assert source.problems() == []  # without any change of a file
    assert store.services[ObjectKey("default", "web")].spec.cluster_ip == "10.96.0.2"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_an_object_that_moves_to_another_file_is_never_away():
    store = Store()
    rows = ManifestRows(store)
    rows.update("/a.yaml", parse_manifest((service("web") + "---\n" + service("stays")).encode(), "/a.yaml"))
    rows.commit()
    present: list[bool] = []
    store.on_change = lambda: present.append(ObjectKey("default", "web") in store.services)
    rows.update("/a.yaml", parse_manifest(service("stays").encode(), "/a.yaml"))
    rows.update("/b.yaml", parse_manifest(service("web", "10.96.0.2").encode(), "/b.yaml"))
    rows.commit()
    assert present == [True]
    assert store.owner("Service", ObjectKey("default", "web")) == "file:/b.yaml"
    rows.remove("/b.yaml")
    rows.update("/c.yaml", parse_manifest(service("web", "10.96.0.3").encode(), "/c.yaml"))
    rows.commit()
    assert present == [True, True]
    assert store.owner("Service", ObjectKey("default", "web")) == "file:/c.yaml"
    assert len(rows) == 2
    assert rows.duplicates(ignoring=()) == {}


def test_a_file_that_is_about_to_go_is_no_duplicate():
    store = Store()
    rows = ManifestRows(store)
    for file in ("/a.yaml", "/b.yaml"):
        rows.update(file, parse_manifest(service("web").encode(), file))
    rows.commit()
    assert list(rows.duplicates(ignoring=())) == ["/b.yaml"]
    assert rows.duplicates(ignoring={"/a.yaml"}) == {}


# -- many files --------------------------------------------------------------------------------------------------------


async def test_many_changes_make_few_passes(tmp_path, monkeypatch):
    passes: list[Hints] = []
    look = ManifestSource._look

    async def counted(self: ManifestSource, watch: directory_watch.DirectoryWatch, hints: Hints) -> None:
        passes.append(hints)
        await look(self, watch, hints)

    monkeypatch.setattr(ManifestSource, "_look", counted)
    async with running(tmp_path) as watched:
        passes.clear()
        for number in range(500):
            (tmp_path / f"s{number}.yaml").write_text(service(f"s{number}", "None"))
        await watched.until(lambda: len(watched.names()) == 500, 60)
        assert len(passes) < 20


async def test_loading_many_files_leaves_the_loop_responsive(tmp_path):
    for number in range(3000):
        (tmp_path / f"s{number}.yaml").write_text(service(f"s{number}", "None"))
    store = Store()
    source = ManifestSource(store, tmp_path, resync=HOUR)
    task = asyncio.create_task(source.run())
    ticks = 0
    begin = time.monotonic()
    while not source.synced.is_set():
        await asyncio.sleep(0.01)
        ticks += 1
    taken = time.monotonic() - begin
    assert len(store.services) == 3000
    assert ticks > taken / 0.2  # several turns a second, however slow the machine
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_stopping_in_the_middle_of_loading_stops_reading(tmp_path, monkeypatch):
    for number in range(3000):
        (tmp_path / f"s{number}.yaml").write_text(service(f"s{number}", "None"))
    read: list[Path] = []
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    def counted(path: Path, *arguments: object) -> manifest_file.Reading:
        read.append(path)
        loop.call_soon_threadsafe(begun.set)
        return manifest_file.read_manifest(path, *arguments)

    monkeypatch.setattr("waggle.sources.manifests.read_manifest", counted)
    source = ManifestSource(Store(), tmp_path, resync=HOUR)
    task = asyncio.create_task(source.run())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)  # for the file it was at
    seen = len(read)
    assert seen < 3000
    await asyncio.sleep(0.1)
    assert len(read) == seen
    assert not source.synced.is_set()
