"""Files while they are written and replaced, the directory itself, and the limits of inotify."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from asyncinotify import Inotify
from manifest_directory import HOUR, put, running, service

from waggle.model.objects import ObjectKey
from waggle.sources import directory_watch, manifest_file
from waggle.sources.manifests import ManifestSource
from waggle.store import Store

# -- files being written -----------------------------------------------------------------------------------------------


async def test_a_file_being_written_is_read_when_it_is_closed(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a") + "---\n" + service("b"))
    async with running(tmp_path) as watched:
        with (tmp_path / "a.yaml").open("w") as half:
            half.write(service("a", "10.96.0.99") + "---\n")
            half.flush()
            os.utime(tmp_path / "a.yaml")  # an event that is no close
            await watched.stays(lambda: watched.names() == {"a", "b"} and watched.address("a") == "10.96.0.10")
            half.write(service("b", "10.96.0.98"))
        await watched.until(lambda: watched.address("a") == "10.96.0.99" and watched.address("b") == "10.96.0.98")
        assert watched.reasons() == []


async def test_a_new_file_being_written_is_not_read_half(tmp_path):
    async with running(tmp_path) as watched:
        with (tmp_path / "a.yaml").open("w") as half:
            half.write(service("a"))
            half.flush()
            await watched.stays(lambda: watched.names() == set())
            half.write("---\n" + service("b"))
        await watched.until(lambda: watched.names() == {"a", "b"})


async def test_a_file_with_a_second_writer_is_read_when_that_closes_it(tmp_path):
    async with running(tmp_path) as watched:
        with (tmp_path / "a.yaml").open("a") as slow:
            (tmp_path / "a.yaml").write_text(service("a"))  # closed, but not by everybody
            await watched.stays(lambda: watched.names() == set())
            slow.write("---\n" + service("b"))
        await watched.until(lambda: watched.names() == {"a", "b"})


async def test_a_file_being_written_at_start_holds_up_the_first_view(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    with (tmp_path / "b.yaml").open("w") as half:
        half.write(service("b"))
        half.flush()
        async with running(tmp_path, synced=False) as watched:
            await watched.until(lambda: watched.names() == {"a"})
            assert not watched.source.synced.is_set()
            half.close()
            await watched.until(watched.source.synced.is_set)
            assert watched.names() == {"a", "b"}


async def test_a_writer_that_never_ends_does_not_hold_up_the_first_view_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("waggle.sources.manifests._WAIT_FOR_WRITERS", 0.3)
    monkeypatch.setattr("waggle.sources.manifests._RETRY_BUSY", 0.05)
    monkeypatch.setattr("waggle.sources.manifests._LONG_WRITE", 0.5)
    with (tmp_path / "b.yaml").open("w") as half:
        async with running(tmp_path) as watched:
            await watched.until(lambda: any("open for writing" in note.reason for note in watched.source.notes()))
            half.close()
            await watched.until(lambda: watched.source.notes() == [])


async def test_without_leases_a_fresh_file_is_left_alone_for_a_moment(tmp_path, monkeypatch):
    def no_leases(*_args: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(manifest_file.fcntl, "fcntl", no_leases)
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    assert manifest_file.read_manifest(path, "a") is manifest_file.Absent.BUSY
    assert isinstance(manifest_file.read_manifest(path, "a", closed=True), manifest_file.Parsed)
    os.utime(path, (time.time() - 5, time.time() - 5))
    assert isinstance(manifest_file.read_manifest(path, "a"), manifest_file.Parsed)


def test_a_file_that_changes_while_it_is_read_is_read_again_later(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    read_all = manifest_file._read_all

    def meanwhile(descriptor: int) -> bytes:
        data = read_all(descriptor)
        path.write_text(service("changed"))
        return data

    monkeypatch.setattr(manifest_file, "_read_all", meanwhile)
    assert manifest_file.read_manifest(path, "a", closed=True) is manifest_file.Absent.BUSY


async def test_reading_does_not_disturb_writers(tmp_path):
    """A lease that is held makes open() for writing wait, and its holder gets a signal that kills by default."""
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    writer = subprocess.Popen(  # noqa: ASYNC220
        [
            sys.executable,
            "-c",
            f"import time\nend = time.time() + 1\nwhile time.time() < end: open({str(path)!r}, 'r+').close()",
        ]
    )
    try:
        async with running(tmp_path) as watched:
            while writer.poll() is None:
                manifest_file.read_manifest(path, "a")
                await asyncio.sleep(0)
            assert writer.returncode == 0
            await watched.until(lambda: watched.names() == {"a"})
    finally:
        writer.kill()
        writer.wait()


# -- how editors and tools replace files -------------------------------------------------------------------------------


async def test_a_file_that_is_replaced_by_removing_it_first_never_takes_its_objects_away(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(service("a"))
    async with running(tmp_path, grace=1.0) as watched:
        gone: list[bool] = []
        watched.store.on_change = lambda: gone.append("a" not in watched.names())
        path.rename(tmp_path / "a.yaml~")  # as vim does
        await asyncio.sleep(0.1)
        path.write_text(service("a", "10.96.0.77"))
        await watched.until(lambda: watched.address("a") == "10.96.0.77")
        path.unlink()  # as git checkout does
        await asyncio.sleep(0.1)
        path.write_text(service("a", "10.96.0.78"))
        await watched.until(lambda: watched.address("a") == "10.96.0.78")
        await watched.stays(lambda: watched.address("a") == "10.96.0.78", 1.2)
        assert gone
        assert not any(gone)


async def test_renamed_within_the_directory(tmp_path):
    (tmp_path / "a.yaml").write_text(service("a"))
    async with running(tmp_path) as watched:
        present: list[bool] = []
        watched.store.on_change = lambda: present.append("a" in watched.names())
        (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
        key = ObjectKey("default", "a")
        await watched.until(lambda: watched.store.owner("Service", key) == f"file:{tmp_path}/b.yaml")
        assert all(present)
        assert watched.reasons() == []


async def test_hard_links_and_symlinks_appear_without_being_written(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    directory = tmp_path / "manifests"
    directory.mkdir()
    (outside / "a.yaml").write_text(service("a"))
    (outside / "b.yaml").write_text(service("b"))
    async with running(directory) as watched:
        os.link(outside / "a.yaml", directory / "a.yaml")
        await watched.until(lambda: watched.names() == {"a"})
        (directory / "b.yaml").symlink_to(outside / "b.yaml")
        await watched.until(lambda: watched.names() == {"a", "b"})
        (outside / "b.yaml").write_text(service("b", "10.96.0.77"))  # in a directory that only the link leads to
        await watched.until(lambda: watched.address("b") == "10.96.0.77")
        put(outside / "b.yaml", service("b", "10.96.0.78"))
        await watched.until(lambda: watched.address("b") == "10.96.0.78")
        (outside / "b.yaml").unlink()
        await watched.until(watched.reasons)
        assert "which does not exist" in watched.reasons()[0]
        assert watched.names() == {"a", "b"}  # a link that leads nowhere says nothing
        (outside / "b.yaml").write_text(service("b", "10.96.0.79"))
        await watched.until(lambda: watched.address("b") == "10.96.0.79" and not watched.reasons())
        (directory / "b.yaml").unlink()
        await watched.until(lambda: watched.names() == {"a"})


async def test_a_kubernetes_config_map_volume(tmp_path):
    """kubelet writes a new directory, swaps the `..data` link by a rename, then removes the old directory."""

    def version(number: int, files: dict[str, str]) -> None:
        data = tmp_path / f"..2026_{number}"
        data.mkdir()
        for name, text in files.items():
            (data / name).write_text(text)
        link = tmp_path / "..data_tmp"
        old = (tmp_path / "..data").resolve() if (tmp_path / "..data").exists() else None
        link.symlink_to(data.name)
        link.rename(tmp_path / "..data")
        for name in files:
            if not (tmp_path / name).is_symlink():
                (tmp_path / name).symlink_to(f"..data/{name}")
        for entry in tmp_path.iterdir():
            if entry.is_symlink() and not entry.exists():
                entry.unlink()
        if old is not None:
            shutil.rmtree(old)

    version(1, {"a.yaml": service("a"), "b.yaml": service("b")})
    async with running(tmp_path) as watched:
        assert watched.names() == {"a", "b"}
        version(2, {"a.yaml": service("a", "10.96.0.77"), "c.yaml": service("c")})
        await watched.until(lambda: watched.names() == {"a", "c"} and watched.address("a") == "10.96.0.77")
        version(3, {"a.yaml": service("a", "10.96.0.78"), "c.yaml": service("c")})
        await watched.until(lambda: watched.address("a") == "10.96.0.78")
        version(4, {"c.yaml": service("c", "10.96.0.79")})
        await watched.until(lambda: watched.names() == {"c"} and watched.address("c") == "10.96.0.79")
        assert watched.reasons() == []


async def test_a_config_map_volume_whose_old_version_stays(tmp_path):
    """The swap of `..data` alone changes what the files say."""
    for number, address in ((1, "10.96.0.1"), (2, "10.96.0.2")):
        (tmp_path / f"..2026_{number}").mkdir()
        (tmp_path / f"..2026_{number}" / "a.yaml").write_text(service("a", address))
    (tmp_path / "..data").symlink_to("..2026_1")
    (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
    async with running(tmp_path) as watched:
        assert watched.address("a") == "10.96.0.1"
        (tmp_path / "..data_tmp").symlink_to("..2026_2")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        await watched.until(lambda: watched.address("a") == "10.96.0.2")


async def test_a_link_that_is_whole_again_with_the_same_file_is_no_problem_any_more(tmp_path):
    """The file itself never changed, so its signature does not tell."""
    directory = tmp_path / "manifests"
    directory.mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.yaml").write_text(service("a"))
    (directory / "a.yaml").symlink_to(tmp_path / "outside" / "a.yaml")
    async with running(directory, resync=0.1) as watched:
        (tmp_path / "outside").rename(tmp_path / "away")
        await watched.until(watched.reasons)
        assert watched.names() == {"a"}
        (tmp_path / "away").rename(tmp_path / "outside")
        await watched.until(lambda: not watched.reasons())


async def test_what_is_no_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "null.yaml").symlink_to("/dev/null")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "a.yaml").write_text(service("a"))
    async with running(tmp_path) as watched:
        assert watched.names() == {"a"}
        problems = {Path(problem.file or "").name: problem.reason for problem in watched.source.problems()}
        assert problems["pipe.yaml"] == "not a regular file"
        assert problems["null.yaml"] == "not a regular file"
        assert "symbolic links" in problems["loop.yaml"]


async def test_file_names_that_are_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"b\xff\nd.yaml")).write_text(service("a", port=0))
    async with running(tmp_path) as watched:
        (reason,) = watched.reasons()
        assert reason.encode()  # can be encoded
        assert reason.isprintable()


# -- the directory itself ----------------------------------------------------------------------------------------------


async def test_a_directory_that_is_missing_at_start(tmp_path):
    directory = tmp_path / "etc" / "waggle" / "manifests"
    async with running(directory, synced=False) as watched:
        await watched.until(watched.reasons)
        assert watched.reasons() == [f"{directory}: manifests: the directory does not exist; waiting for it"]
        assert not watched.source.synced.is_set()  # an absent directory does not say "nothing"
        directory.mkdir(parents=True)
        await watched.until(watched.source.synced.is_set)
        assert watched.reasons() == []
        put(directory / "a.yaml", service("a"))
        await watched.until(lambda: watched.names() == {"a"})


async def test_a_directory_that_goes_and_comes_back(tmp_path):
    directory = tmp_path / "manifests"
    directory.mkdir()
    (directory / "a.yaml").write_text(service("a"))
    (directory / "b.yaml").write_text(service("b"))
    async with running(directory) as watched:
        directory.rename(tmp_path / "elsewhere")
        await watched.until(watched.reasons)
        assert "the 2 objects it held stay in force" in watched.reasons()[0]
        (tmp_path / "elsewhere" / "a.yaml").write_text(service("a", "10.96.0.66"))  # no longer ours
        await watched.stays(lambda: watched.names() == {"a", "b"} and watched.address("a") == "10.96.0.10")
        directory.mkdir()
        (directory / "b.yaml").write_text(service("b", "10.96.0.77"))
        await watched.until(
            lambda: watched.names() == {"b"} and watched.address("b") == "10.96.0.77" and not watched.reasons()
        )
        put(directory / "c.yaml", service("c"))
        await watched.until(lambda: watched.names() == {"b", "c"})
        shutil.rmtree(directory)
        await watched.until(watched.reasons)
        await watched.stays(lambda: watched.names() == {"b", "c"})


async def test_a_directory_that_comes_back_empty_has_the_grace_period_to_fill(tmp_path):
    directory = tmp_path / "manifests"
    directory.mkdir()
    (directory / "a.yaml").write_text(service("a"))
    async with running(directory, grace=0.8) as watched:
        (directory / "a.yaml").unlink()
        await asyncio.sleep(0.2)  # long enough for the file to be missed before its directory is
        directory.rmdir()
        await watched.until(watched.reasons)
        await watched.stays(lambda: watched.names() == {"a"}, 1.0)
        directory.mkdir()
        await watched.stays(lambda: watched.names() == {"a"}, 0.4)
        (directory / "a.yaml").write_text(service("a", "10.96.0.77"))
        await watched.until(lambda: watched.address("a") == "10.96.0.77")
        await watched.stays(lambda: watched.names() == {"a"}, 1.0)


async def test_a_directory_that_is_swapped(tmp_path):
    """`mv -T`, and a symlink that is pointed elsewhere."""
    one, two = tmp_path / "one", tmp_path / "two"
    for place, address in ((one, "10.96.0.1"), (two, "10.96.0.2")):
        place.mkdir()
        (place / "a.yaml").write_text(service("a", address))
    link = tmp_path / "manifests"
    link.symlink_to("one")
    async with running(link) as watched:
        assert watched.address("a") == "10.96.0.1"
        (tmp_path / "new").symlink_to("two")
        (tmp_path / "new").rename(link)
        await watched.until(lambda: watched.address("a") == "10.96.0.2")
        put(two / "b.yaml", service("b"))
        await watched.until(lambda: watched.names() == {"a", "b"})


async def test_a_file_in_place_of_the_directory(tmp_path):
    place = tmp_path / "manifests"
    place.write_text("x")
    async with running(place, synced=False) as watched:
        await watched.until(watched.reasons)
        assert "Not a directory" in watched.reasons()[0]
        place.unlink()
        place.mkdir()
        await watched.until(watched.source.synced.is_set)


# -- inotify's limits --------------------------------------------------------------------------------------------------


def _queue_limit() -> int:
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


async def test_a_queue_overflow_means_that_everything_is_looked_at(tmp_path):
    limit = _queue_limit()
    (tmp_path / "a.yaml").write_text(service("a"))
    async with running(tmp_path) as watched:
        # The loop does not run here, so the kernel's queue fills up; what comes after is lost.
        for number in range(limit // 2 + 64):
            (tmp_path / f"x{number % 7}.txt").touch()
            (tmp_path / f"x{number % 7}.txt").unlink()
        (tmp_path / "b.yaml").write_text(service("b"))
        (tmp_path / "a.yaml").write_text(service("a", "10.96.0.77"))
        await watched.until(lambda: watched.names() == {"a", "b"} and watched.address("a") == "10.96.0.77", 30)


async def test_without_inotify_the_directory_is_polled(tmp_path, monkeypatch):
    def no_instance(*_args: object, **_named: object) -> Inotify:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(directory_watch, "Inotify", no_instance)
    monkeypatch.setattr("waggle.sources.manifests._POLL", 0.05)
    (tmp_path / "a.yaml").write_text(service("a"))
    async with running(tmp_path) as watched:
        assert "max_user_instances" in watched.reasons()[0]
        put(tmp_path / "b.yaml", service("b"))
        await watched.until(lambda: watched.names() == {"a", "b"})
        (tmp_path / "a.yaml").unlink()
        await watched.until(lambda: watched.names() == {"b"})


async def test_what_gives_no_event_is_found_by_the_next_resync(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(service("a"))
    monkeypatch.setattr(directory_watch.DirectoryWatch, "_take", lambda _self, _event: None)
    async with running(tmp_path, resync=0.1) as watched:
        put(tmp_path / "a.yaml", service("a", "10.96.0.77"))
        await watched.until(lambda: watched.address("a") == "10.96.0.77")
        (tmp_path / "a.yaml").unlink()
        await watched.until(lambda: watched.names() == set())


@pytest.mark.parametrize("turns", range(6))
async def test_being_cancelled_while_a_hint_arrives(tmp_path, turns):
    async def follow() -> None:
        async with directory_watch.DirectoryWatch(tmp_path) as watch:
            started.set_result(watch)
            while True:
                await watch.next(HOUR)

    started: asyncio.Future[directory_watch.DirectoryWatch] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(follow())
    watch = await started
    await asyncio.sleep(0.01)
    watch._hint_everything()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=2)
    if not done:
        task.cancel()
    assert done, "the cancellation was lost"
    assert task.cancelled()


async def test_the_end_of_the_reader_ends_the_source(tmp_path, monkeypatch):
    def broken(_self: object, _event: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(directory_watch.DirectoryWatch, "_take", broken)
    source = ManifestSource(Store(), tmp_path, resync=HOUR)
    task = asyncio.create_task(source.run())
    await asyncio.wait_for(source.synced.wait(), 10)
    (tmp_path / "a.yaml").write_text(service("a"))
    with pytest.raises(RuntimeError, match="broken"):
        await asyncio.wait_for(task, 10)


async def test_a_file_that_could_not_be_read_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptors were left, for instance: nothing about the file changes when there are some again."""
    put(tmp_path / "web.yaml", service())
    async with running(tmp_path) as watched:
        real, refusing = os.open, True

        def scarce(path: object, *more: Any, **named: Any) -> int:
            if refusing and str(path).endswith("web.yaml"):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(path, *more, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "open", scarce)
        put(tmp_path / "web.yaml", service(address="10.96.0.11"))
        await watched.until(lambda: any("Too many open files" in reason for reason in watched.reasons()))
        assert watched.address() == "10.96.0.10"
        refusing = False
        await watched.until(lambda: watched.address() == "10.96.0.11", 5)
        assert watched.reasons() == []
