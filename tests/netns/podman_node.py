"""Podman on a node under test, with its CNI backend."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from runtime_node import IMAGE, PAUSE, RuntimeNode, image_archive

_CONFIG = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=16384:16384"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
infra_image = "{image}"
infra_command = "{pause}"
[engine.runtimes]
runsc = ["{wrapper}"]
[network]
network_backend = "cni"
cni_plugin_dirs = ["{bin_dir}"]
network_config_dir = "{conf_dir}"
default_network = "waggle"
"""

# gVisor takes a network namespace that has this file for the machine's own, and refuses. Newer kernels have it in all.
_RUNSC = """#!/bin/sh
exec unshare --mount --propagation slave sh -c '
mount -t tmpfs tmpfs /proc/sys/net && exec runsc --platform=ptrace --ignore-cgroups "$@"' sh "$@"
"""


class Podman:
    """There is no daemon: every command is a program of its own, and `conmon` stays with each container."""

    def __init__(self, node: RuntimeNode) -> None:
        self.node = node
        self.directory = node.directory / "podman"
        self.directory.mkdir(exist_ok=True)
        self._file("policy.json", json.dumps({"default": [{"type": "insecureAcceptAnything"}]}))
        self._file(
            "storage.conf",
            f'[storage]\ndriver = "vfs"\nrunroot = "{self.directory}/run"\ngraphroot = "{self.directory}/storage"\n',
        )
        wrapper = self._file("runsc", _RUNSC)
        wrapper.chmod(0o755)
        places = {"bin_dir": node.bin_dir, "conf_dir": node.conf_dir, "wrapper": wrapper}
        self._file("containers.conf", _CONFIG.format(image=IMAGE, pause=" ".join(PAUSE), **places))

    def _file(self, name: str, text: str) -> Any:
        path = self.directory / name
        path.write_text(text)
        return path

    def __call__(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.node.run(*self.command(*arguments), **options)

    def command(self, *arguments: str) -> list[str]:
        places = {"tmpdir": "tmp"}
        settings = [f"--{name}={self.directory / place}" for name, place in places.items()]
        environment = [f"{name}={self.directory / file}" for name, file in _ENVIRONMENT.items()]
        return ["env", *environment, "podman", *settings, *arguments]

    def import_image(self) -> None:
        archive = image_archive(self.node.directory / "podman-image.tar")
        self("load", f"--signature-policy={self.directory / 'policy.json'}", "-i", str(archive))

    def run(self, name: str, *command: str, options: tuple[str, ...] = ()) -> None:
        """A container in the background."""
        cgroup = () if any(o.startswith("--pod=") for o in options) else (f"--cgroup-parent=/{self.node.name}/podman",)
        self("run", "-d", "--name", name, *cgroup, *options, "--entrypoint", json.dumps(command), IMAGE)

    def addresses(self, name: str) -> list[str]:
        """As Podman knows them."""
        (found,) = json.loads(self("inspect", "--type", "container", name).stdout)
        (network,) = found["NetworkSettings"]["Networks"].values()
        return [network["IPAddress"], network["GlobalIPv6Address"]]


_ENVIRONMENT = {"CONTAINERS_CONF": "containers.conf", "CONTAINERS_STORAGE_CONF": "storage.conf"}
