"""What is said of a machine that lacks something, one thing at a time. The kernel is played by the test."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from waggle.errors import KernelError, MissingFeature
from waggle.kernel import probe


@pytest.fixture(autouse=True)
def good_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root on a machine that has everything."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(probe, "cgroup2_mount", lambda: Path("/sys/fs/cgroup"))
    monkeypatch.setattr(probe, "query_programs", lambda target, hook: [])
    monkeypatch.setattr(probe, "_is_bpffs", lambda where: True)
    monkeypatch.setattr(Path, "exists", lambda path: True)


def missing() -> str:
    with pytest.raises(MissingFeature) as caught:
        probe.require()
    return str(caught.value)


def test_good_machine() -> None:
    probe.require()


def test_kernel_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: int, hook: object) -> list[tuple[int, str]]:
        raise KernelError("query tcx_ingress: Invalid argument", errno.EINVAL)

    monkeypatch.setattr(probe, "query_programs", refuse)
    assert missing().splitlines() == ["this machine cannot run waggle yet:", "  tcx: use Linux 6.6 or newer"]


def test_kernel_without_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: path != Path("/sys/kernel/btf/vmlinux"))
    assert missing().splitlines()[1:] == ["  kernel BTF: use a kernel built with CONFIG_DEBUG_INFO_BTF"]


def test_no_bpffs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_is_bpffs", lambda where: False)
    assert missing().splitlines()[1:] == ["  bpffs: mount -t bpf bpf /sys/fs/bpf"]


def test_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise MissingFeature("no cgroup2 file system is mounted: mount it")

    monkeypatch.setattr(probe, "cgroup2_mount", none)
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert [line.split(":")[0].strip() for line in missing().splitlines()[1:]] == ["kernel BTF", "cgroup2"]


def test_nobody_is_not_told_that_the_kernel_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(target: int, hook: object) -> list[tuple[int, str]]:
        raise KernelError("query tcx_ingress: Operation not permitted", errno.EPERM)

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(probe, "query_programs", forbidden)
    assert missing().splitlines()[1:] == ["  root: run as root (sudo)"]
