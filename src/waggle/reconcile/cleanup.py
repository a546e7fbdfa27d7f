"""Removes everything waggle ever put on a node, whatever state an agent left it in."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from waggle.errors import AlreadyRunning, KernelError
from waggle.kernel import links, maps
from waggle.kernel.netlink import RTPROT_WAGGLE, Batch, Netlink

POD_INTERFACE_PREFIX = "wag"
Removed = list[tuple[str, str]]


def clean_node(bpf_root: Path, state_dir: Path, api_socket: Path, *, dry_run: bool = False) -> Removed:
    """(kind, name) of everything removed, or, with `dry_run`, of what would be. AlreadyRunning while an agent runs."""
    removed: Removed = []

    def remove(kind: str, name: object, action: Callable[[], object]) -> None:
        if not dry_run:
            action()
        removed.append((kind, str(name)))

    with _Exclusive(bpf_root):
        for pin in _files(bpf_root / "links"):
            remove("link", pin, lambda pin=pin: links.detach(pin))  # type: ignore[misc]
        for pin in _files(bpf_root / "maps"):
            remove("map", pin, lambda pin=pin: maps.unpin(pin))  # type: ignore[misc]
        with Netlink() as netlink:
            for link in netlink.links():
                if link.kind == "veth" and _is_pod_interface(link.name):
                    remove("interface", link.name, lambda name=link.name: _delete_link(netlink, name))  # type: ignore[misc]
            for route in netlink.routes(protocol=RTPROT_WAGGLE):
                if route.via is not None:
                    remove("route", f"{route.dst} via {route.via}", lambda r=route: _delete_route(netlink, r))  # type: ignore[misc]
        if state_dir.exists():
            remove("state", state_dir, lambda: shutil.rmtree(state_dir))
        if api_socket.exists():
            remove("socket", api_socket, api_socket.unlink)
    for directory in (bpf_root / "links", bpf_root / "maps", bpf_root):
        if directory.is_dir():
            remove("directory", directory, directory.rmdir)
    return removed


def _is_pod_interface(name: str) -> bool:
    digest = name.removeprefix(POD_INTERFACE_PREFIX)
    return name != digest and len(digest) == 11 and all(c in "0123456789abcdef" for c in digest)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _delete_link(netlink: Netlink, name: str) -> None:
    batch = Batch()
    batch.delete_link(name, missing_ok=True)
    netlink.run(batch)


def _delete_route(netlink: Netlink, route: object) -> None:
    from waggle.kernel.netlink import Route

    assert isinstance(route, Route)
    batch = Batch()
    batch.delete_route(route.dst, via=route.via, missing_ok=True)
    netlink.run(batch)


class _Exclusive:
    """The agent's own lock, held while cleaning. No directory means no agent."""

    def __init__(self, bpf_root: Path) -> None:
        self._root = bpf_root
        self._fd = -1

    def __enter__(self) -> None:
        try:
            self._fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise KernelError(f"bpf-root: cannot open {self._root}: {error.strerror}", error.errno or 0) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise AlreadyRunning(f"an agent runs with bpf-root {self._root}: stop it first") from error

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
