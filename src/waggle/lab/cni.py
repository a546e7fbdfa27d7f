"""The container runtime's half of CNI: runs the real plugin as containerd or Podman would.

Environment and standard input as in the CNI specification 1.1.0; the configuration is the per-node conflist that is
written for the node, so what the lab exercises is what a runtime exercises.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from waggle.errors import CniError, LabError
from waggle.lab import requirements
from waggle.lab.layout import NodeLayout
from waggle.lab.record import write_atomically
from waggle.model.interface import HostPort
from waggle.model.objects import ObjectKey
from waggle.sources.cni_install import configuration

CNI_VERSION = "1.1.0"  # of those in the configuration the latest that this runtime knows
INTERFACE = "eth0"
_TIMEOUT = 60.0


def write_conf(node: NodeLayout) -> None:
    """The network configuration list of the node."""
    node.cni_conf.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(node.cni_conf, json.dumps(configuration(node.socket), indent=2).encode() + b"\n")


def add(
    node: NodeLayout, container_id: str, netns: Path, pod: ObjectKey, uid: str, host_ports: Iterable[HostPort] = ()
) -> dict[str, Any]:
    """Connects the pod; the CNI result. Raises CniError."""
    output = _invoke(node, "ADD", container_id, netns, pod, uid, _port_mappings(host_ports))
    try:
        result = json.loads(output)
    except ValueError as error:
        raise LabError(f"waggle-cni ADD for pod {pod}: its result is not JSON: {output[:200]!r}") from error
    if not isinstance(result, dict) or not result.get("ips"):
        raise LabError(f"waggle-cni ADD for pod {pod}: its result has no addresses: {output[:200]!r}")
    return result


def addresses_of(result: dict[str, Any]) -> list[str]:
    """The pod's addresses in a CNI result, without prefix length."""
    return [str(entry["address"]).partition("/")[0] for entry in result["ips"]]


def check(node: NodeLayout, container_id: str, netns: Path, pod: ObjectKey, uid: str, result: dict[str, Any]) -> None:
    """Raises CniError when the pod is not connected as `result` says."""
    _invoke(node, "CHECK", container_id, netns, pod, uid, {"prevResult": result})


def delete(
    node: NodeLayout, container_id: str, netns: Path, pod: ObjectKey, uid: str, result: dict[str, Any] | None
) -> None:
    """Disconnects the pod and frees its addresses. Raises CniError, code 11 when the agent is away."""
    _invoke(node, "DEL", container_id, netns, pod, uid, {"prevResult": result} if result else {})


def collect_garbage(node: NodeLayout, container_ids: Iterable[str]) -> None:
    """Lets the agent free what belongs to none of the given containers. Raises CniError."""
    valid = [{"containerID": container_id, "ifname": INTERFACE} for container_id in container_ids]
    _invoke(node, "GC", "", None, None, "", {"cni.dev/valid-attachments": valid})


def _port_mappings(host_ports: Iterable[HostPort]) -> dict[str, Any]:
    """The capability portMappings, as containerd fills it in."""
    mappings = [
        {
            "hostPort": port.port,
            "containerPort": port.container_port,
            "protocol": port.protocol.lower(),
            "hostIP": port.host_ip,
        }
        for port in host_ports
    ]
    return {"runtimeConfig": {"portMappings": mappings}} if mappings else {}


def _invoke(
    node: NodeLayout,
    command: str,
    container_id: str,
    netns: Path | None,
    pod: ObjectKey | None,
    uid: str,
    extra: dict[str, Any],
) -> str:
    conflist = json.loads(node.cni_conf.read_bytes())
    conf = {"cniVersion": CNI_VERSION, "name": conflist["name"], **conflist["plugins"][0], **extra}
    if not conf.pop("capabilities", {}).get("portMappings"):  # a plugin gets what it says it can do
        conf.pop("runtimeConfig", None)
    binary = requirements.plugin()
    env = {"PATH": os.environ.get("PATH", os.defpath), "CNI_COMMAND": command, "CNI_PATH": str(binary.parent)}
    if container_id:
        env |= {"CNI_CONTAINERID": container_id, "CNI_IFNAME": INTERFACE, "CNI_NETNS": str(netns)}
    if pod is not None:
        env["CNI_ARGS"] = (
            f"IgnoreUnknown=1;K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name};"
            f"K8S_POD_INFRA_CONTAINER_ID={container_id};K8S_POD_UID={uid}"
        )
    try:
        done = subprocess.run(
            [str(binary)], input=json.dumps(conf).encode(), env=env, capture_output=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"waggle-cni {command} on {node.name} did not end within {_TIMEOUT:g} s") from error
    if done.returncode != 0:
        raise _error(command, node, pod, done.stdout, done.stderr)
    return done.stdout.decode(errors="replace")


def _error(command: str, node: NodeLayout, pod: ObjectKey | None, output: bytes, errors: bytes) -> CniError:
    subject = f"waggle-cni {command} on {node.name}" + (f" for pod {pod}" if pod else "")
    try:
        document = json.loads(output)
        code, message = int(document["code"]), str(document["msg"])
    except (ValueError, KeyError, TypeError):
        return CniError(999, f"{subject}: {(output or errors).decode(errors='replace').strip() or 'no error given'}")
    details = str(document.get("details", ""))
    return CniError(code, f"{subject}: {message}" + (f" ({details})" if details else ""), details)
