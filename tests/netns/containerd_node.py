"""containerd on a node under test: its daemon, `ctr`, and its CRI socket as kubelet speaks to it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_tools import protoc
from runtime_node import IMAGE, RuntimeNode, image_archive

_CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{directory}/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin_dir}"
conf_dir = "{conf_dir}"
"""


class Containerd:
    """One daemon; `start` again after it was killed."""

    def __init__(self, node: RuntimeNode) -> None:
        self.node = node
        self.directory = node.directory / "containerd"
        self.directory.mkdir(exist_ok=True)
        self.messages, self._services = _compiled(node.directory)
        self._channel: grpc.Channel | None = None
        text = _CONFIG.format(directory=self.directory, image=IMAGE, bin_dir=node.bin_dir, conf_dir=node.conf_dir)
        (self.directory / "config.toml").write_text(text)

    @property
    def socket(self) -> Path:
        return self.directory / "containerd.sock"

    def start(self) -> None:
        self.process = self.node.spawn("containerd", "--config", self.directory / "config.toml", log="containerd.log")
        self._channel = grpc.insecure_channel(f"unix://{self.socket}")
        self.cri = self._services.RuntimeServiceStub(self._channel)
        self.node.until(self.is_ready, 30)

    def is_ready(self) -> bool:
        """Whether it serves pods: it says whether it has a network."""
        try:
            status = self.cri.Status(self.messages.StatusRequest(), timeout=2).status
        except grpc.RpcError:
            return False
        return {c.type for c in status.conditions if c.status} == {"RuntimeReady", "NetworkReady"}

    def kill(self) -> None:
        self.node.stop(self.process)
        assert self._channel is not None
        self._channel.close()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    def ctr(self, *arguments: str | Path, **options: Any) -> str:
        return self.node.run("ctr", "--address", self.socket, *arguments, **options).stdout

    def import_image(self) -> None:
        archive = image_archive(self.node.directory / "image.tar")
        for namespace in ("k8s.io", "default"):
            self.ctr("--namespace", namespace, "images", "import", "--snapshotter", "native", archive)

    # -- pods ---------------------------------------------------------------------------------------------------

    def config(
        self, name: str, *, ports: Sequence[dict[str, Any]] = (), annotations: dict[str, str] | None = None
    ) -> Any:
        m = self.messages
        return m.PodSandboxConfig(
            metadata=m.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="t"),
            hostname=name,
            log_directory=str(self.directory / "logs"),
            port_mappings=[m.PortMapping(**port) for port in ports],
            annotations=annotations or {},
            linux=m.LinuxPodSandboxConfig(cgroup_parent=f"/{self.node.name}/pods"),
        )

    def run_pod(self, name: str, **more: Any) -> str:
        """A pod as kubelet begins one; its id."""
        request = self.messages.RunPodSandboxRequest(config=self.config(name, **more))
        return str(self.cri.RunPodSandbox(request, timeout=60).pod_sandbox_id)

    def run_container(self, pod: str, name: str, *command: str) -> str:
        m = self.messages
        config = m.ContainerConfig(
            metadata=m.ContainerMetadata(name=command[0]), image=m.ImageSpec(image=IMAGE), command=command
        )
        request = m.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=self.config(name))
        container = self.cri.CreateContainer(request, timeout=60)
        self.cri.StartContainer(container, timeout=60)
        return str(container.container_id)

    def execute(self, container: str, *command: str) -> tuple[int, str]:
        """Exit status and what it printed."""
        request = self.messages.ExecSyncRequest(container_id=container, cmd=command, timeout=10)
        done = self.cri.ExecSync(request, timeout=20)
        return done.exit_code, (done.stdout + done.stderr).decode()

    def addresses(self, pod: str) -> list[str]:
        """As the runtime tells kubelet."""
        network = self.cri.PodSandboxStatus(self.messages.SandboxId(pod_sandbox_id=pod), timeout=10).status.network
        return [network.ip, *(more.ip for more in network.additional_ips)]

    def pods(self) -> list[str]:
        return [pod.id for pod in self.cri.ListPodSandbox(self.messages.Empty(), timeout=10).items]

    def remove_pod(self, pod: str) -> None:
        name = self.messages.SandboxId(pod_sandbox_id=pod)
        self.cri.StopPodSandbox(name, timeout=60)
        self.cri.RemovePodSandbox(name, timeout=60)


def _compiled(directory: Path) -> tuple[Any, Any]:
    """The modules that protoc makes of cri.proto."""
    source = Path(__file__).with_name("cri.proto")
    for name in ("cri_pb2", "cri_pb2_grpc"):
        if name not in sys.modules:
            arguments = [f"-I{source.parent}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
            assert protoc.main(["protoc", *arguments, str(source)]) == 0
            break
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module("cri_pb2"), importlib.import_module("cri_pb2_grpc")
    finally:
        sys.path.remove(str(directory))
