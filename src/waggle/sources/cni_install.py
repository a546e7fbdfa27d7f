"""What a container runtime needs to find waggle: the plugin among its programs, the network among its configurations.

A runtime takes the first configuration of its directory, by name, and has no network as long as there is none. So the
agent writes its own when it can answer, and leaves it there when it ends: the plugin tells runtimes to try again.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from waggle.errors import MissingFeature
from waggle.kernel.objects import OBJECT_DIR
from waggle.sources.problem import Problem

PLUGIN = "waggle-cni"
#: containerd 1 and, unless told otherwise, 2 execute a plugin of this name for every pod, whatever the network is.
LOOPBACK = "loopback"
NETWORK = "waggle"
CONFIGURATION = "05-waggle.conflist"
#: What runtimes with libcni 1.1 (containerd 1.6, Podman 4) know. Newer ones take the latest of `cniVersions`.
BASE_VERSION = "1.0.0"
VERSIONS = (BASE_VERSION, "1.1.0")
#: What runtimes take for configurations (libcni's ConfFiles).
_SUFFIXES = (".conf", ".conflist", ".json")


def configuration(api_socket: Path) -> dict[str, Any]:
    """The network configuration list of a node whose agent listens there."""
    plugin = {"type": PLUGIN, "apiSocket": str(api_socket), "capabilities": {"portMappings": True, "bandwidth": True}}
    return {"cniVersion": BASE_VERSION, "cniVersions": list(VERSIONS), "name": NETWORK, "plugins": [plugin]}


def install_plugin(directory: Path) -> None:
    """Puts the plugin there, in place of an older one, whether or not a runtime runs that at the moment; where there is
    no `loopback`, by that name too. MissingFeature names what refuses."""
    source = OBJECT_DIR / PLUGIN
    if not source.is_file():
        raise MissingFeature(f"the CNI plugin {PLUGIN} is not built: make -C cni")
    scratch = directory / f".{PLUGIN}.tmp"
    try:
        _make_directory(directory)
        shutil.copyfile(source, scratch)
        scratch.chmod(0o755)
        scratch.replace(directory / PLUGIN)
        if not os.path.lexists(directory / LOOPBACK):
            (directory / LOOPBACK).symlink_to(PLUGIN)
    except OSError as error:
        raise MissingFeature(f"cni-bin-dir: cannot write {directory / PLUGIN}: {error.strerror}") from error


def install_configuration(directory: Path, api_socket: Path) -> None:
    """Writes the network's configuration, complete or not at all. MissingFeature names what refuses."""
    text = json.dumps(configuration(api_socket), indent=2) + "\n"
    # runtimes watch the directory: no name of theirs while it is not complete
    scratch = directory / f".{CONFIGURATION}.tmp"
    try:
        _make_directory(directory)
        with scratch.open("w") as stream:
            stream.write(text)
            os.fsync(stream.fileno())
        scratch.chmod(0o644)
        scratch.replace(directory / CONFIGURATION)
    except OSError as error:
        raise MissingFeature(f"cni-conf-dir: cannot write {directory / CONFIGURATION}: {error.strerror}") from error


def _make_directory(directory: Path) -> None:
    """For everybody to read: other plugins and their runtimes come here as well."""
    for missing in reversed([one for one in (directory, *directory.parents) if not one.exists()]):
        missing.mkdir(exist_ok=True)
        missing.chmod(0o755)


def problems(directory: Path) -> list[Problem]:
    """What keeps runtimes from taking this network."""
    try:
        names = sorted(file.name for file in directory.iterdir() if file.suffix in _SUFFIXES)
    except OSError as error:
        return [Problem("CNI", f"cni-conf-dir: cannot read {directory}: {error.strerror}")]
    if CONFIGURATION not in names:
        return [Problem("CNI", f"{directory / CONFIGURATION} is gone: pods get no network, or another one")]
    if names[0] != CONFIGURATION:
        return [Problem("CNI", f"container runtimes take {directory / names[0]}, the first by name: move it away")]
    return []


def installed(bin_dir: Path, conf_dir: Path, api_socket: Path) -> list[Path]:
    """What an agent with this socket has put there, in the order in which it should go."""
    try:
        known = json.loads((conf_dir / CONFIGURATION).read_text())
    except (OSError, ValueError):
        return []
    if known != configuration(api_socket):
        return []  # somebody's own, or another agent's, which uses the plugin too
    loopback = [bin_dir / LOOPBACK] if _is_ours(bin_dir / LOOPBACK) else []
    return [file for file in (conf_dir / CONFIGURATION, *loopback, bin_dir / PLUGIN) if file.is_file()]


def _is_ours(loopback: Path) -> bool:
    return loopback.is_symlink() and loopback.readlink() == Path(PLUGIN)
