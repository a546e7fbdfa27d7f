"""Removes everything waggle ever put on a node, whatever state an agent left it in."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from pathlib import Path

from waggle.errors import AlreadyRunning, KernelError, MissingFeature
from waggle.kernel import links, maps, pidfd, syscall
from waggle.kernel.cgroup import cgroup2_mount, cgroup_id
from waggle.kernel.netlink import RTPROT_WAGGLE, Batch, Netlink
from waggle.reconcile import health_process
from waggle.reconcile.reserved_ports import ReservedPorts
from waggle.reconcile.sysctls import Sysctls

POD_INTERFACE_PREFIX = "wag"
Removed = list[tuple[str, str]]


def clean_node(
    bpf_root: Path, state_dir: Path, api_socket: Path, cni: Iterable[Path] = (), *, dry_run: bool = False
) -> Removed:
    """(kind, name) of everything removed, or, with `dry_run`, of what would be. AlreadyRunning while an agent runs.

    `cni`: files by which container runtimes find waggle; they go first.
    """
    removed: Removed = []

    def remove(kind: str, name: object, action: Callable[[], object]) -> None:
        if not dry_run:
            try:
                action()
            except FileNotFoundError:
                return
            except OSError as error:
                raise KernelError(f"cannot remove {kind} {name}: {error.strerror}", error.errno or 0) from error
        removed.append((kind, str(name)))

    def remove_pins(kind: str, directory: Path, action: Callable[[Path], object]) -> None:
        for pin in _files(directory):
            if pin.is_dir() and not pin.is_symlink():  # none of ours, but it stands where ours do
                remove("directory", pin, lambda pin=pin: shutil.rmtree(pin))  # type: ignore[misc]
            else:
                remove(kind, pin, lambda pin=pin: action(pin))  # type: ignore[misc]

    with exclusive(bpf_root):
        refuse_living_agent(api_socket)
        for file in cni:
            remove("CNI file", file, file.unlink)
        _remove_health_process(bpf_root, api_socket, remove)
        remove_pins("link", bpf_root / "links", links.detach)
        remove_pins("map", bpf_root / "maps", maps.unpin)
        with Netlink() as netlink:
            for link in netlink.links():
                if link.kind == "veth" and is_pod_interface(link.name):
                    remove("interface", link.name, lambda name=link.name: _delete_link(netlink, name))  # type: ignore[misc]
            for route in netlink.routes(protocol=RTPROT_WAGGLE):
                if route.via is not None:
                    remove("route", f"{route.dst} via {route.via}", lambda r=route: _delete_route(netlink, r))  # type: ignore[misc]
        reserved = ReservedPorts(state_dir)
        if reserved.any:
            remove("setting", "net.ipv4.ip_local_reserved_ports", reserved.release)
        sysctls = Sysctls(state_dir)
        changed = ", ".join(name.replace("/", ".") for name in sysctls.recorded())
        if changed:
            remove("setting", changed, sysctls.restore)
        if state_dir.exists():
            remove("state", state_dir, lambda: shutil.rmtree(state_dir))
        if api_socket.exists():
            remove("socket", api_socket, api_socket.unlink)
        for directory in (bpf_root / "links", bpf_root / "maps"):
            if directory.is_dir():
                remove("directory", directory, directory.rmdir)
    if bpf_root.is_dir() and all(path.name in ("links", "maps") for path in bpf_root.iterdir()):
        remove("directory", bpf_root, bpf_root.rmdir)
    return removed


def _remove_health_process(
    bpf_root: Path, api_socket: Path, remove: Callable[[str, object, Callable[[], object]], None]
) -> None:
    """While the pins still tell which process and which cgroup it is."""
    root_cgroup = _cgroup_of_links(bpf_root / "links")
    cgroup = root_cgroup / health_process.NAME if root_cgroup else None
    table = maps.open_pinned(bpf_root / "maps" / "wag_health")
    for pid in health_process.find_processes(table.info.id if table else -1, cgroup):
        remove("process", f"{health_process.NAME} ({pid})", lambda pid=pid: pidfd.kill(pid))  # type: ignore[misc]
    if cgroup is not None and cgroup.is_dir():
        remove("cgroup", cgroup, lambda: health_process.remove_cgroup(cgroup))
    control, root = health_process.control_socket(api_socket), health_process.empty_root(api_socket)
    if control.exists():
        remove("socket", control, control.unlink)
    if root.is_dir():
        remove("directory", root, root.rmdir)


def _cgroup_of_links(directory: Path) -> Path | None:
    """The cgroup whose sockets were load-balanced: that of the links; where none is left, all of the machine's."""
    try:
        mount = cgroup2_mount()
    except MissingFeature:
        return None
    numbers = set()
    for pin in directory.glob("cgroup-*"):
        try:
            with syscall.obj_get(pin) as link:
                numbers.add(links.link_target(link.number))
        except KernelError:
            continue  # no link, whatever it is
    for folder, _, _ in os.walk(mount):
        if numbers and cgroup_id(Path(folder)) in numbers:
            return Path(folder)
    return mount


def refuse_living_agent(api_socket: Path) -> None:
    """The lock only tells of an agent with this bpf root; interfaces and routes may be those of another."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        try:
            client.connect(str(api_socket))
        except OSError:
            return  # nothing there, or nobody listens any more
    raise AlreadyRunning(f"an agent answers on {api_socket}: stop it first")


def is_pod_interface(name: str) -> bool:
    """Whether an interface is the host side of a pod, by the name that CNI gives it."""
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


class exclusive:
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
