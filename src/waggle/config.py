"""The agent's settings: parsed once, from a YAML file and from flags, into one frozen dataclass.

A setting has the same name as a flag (`--pod-cidr`) and as a key of the file (`pod-cidr:`); a flag wins over the
file, the file over the default. Unknown keys are refused, with the nearest known name.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import socket
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from waggle.errors import ConfigError

DEFAULT_SOCKET = Path("/run/waggle/agent.sock")


def _setting(default: Any, help_text: str) -> Any:
    if isinstance(default, (list, dict)):
        raise TypeError("use tuples for defaults")
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Everything an agent can be told. Paths are absolute; addresses are canonical strings."""

    node_name: str = _setting("", "Name of this node in Kubernetes or in the manifests. Default: the host name.")
    manifests: Path | None = _setting(None, "Directory of Kubernetes YAML to watch.")
    kubeconfig: Path | None = _setting(
        None, "Kubernetes API to watch; 'in-cluster' uses the pod's service account. Default: no Kubernetes."
    )
    kubernetes_netns: Path | None = _setting(
        None, "Network namespace from which the Kubernetes API is reached (the lab uses it). Default: the agent's own."
    )
    pod_cidr: tuple[str, ...] = _setting(
        (), "Pod address range of this node, at most one per family. Default: the Node object's podCIDRs."
    )
    node_ip: tuple[str, ...] = _setting(
        (), "Address of this node, at most one per family. Default: those of the interface of the default route."
    )
    devices: tuple[str, ...] = _setting(
        (), "Uplink interfaces: NodePorts are served there. Default: those that carry a default route or the node IP."
    )
    cgroup_root: Path | None = _setting(None, "cgroup2 directory whose sockets are load-balanced. Default: the mount.")
    bpf_root: Path = _setting(Path("/sys/fs/bpf/waggle"), "Directory on bpffs for pinned maps and links.")
    state_dir: Path = _setting(Path("/var/lib/waggle"), "Directory for address reservations, kept over reboots.")
    api_socket: Path = _setting(DEFAULT_SOCKET, "Unix socket of the agent's API; the CNI plugin and CLI use it.")
    metrics_address: str = _setting("127.0.0.1:9970", "HOST:PORT for /metrics and /healthz; empty turns it off.")
    events: bool = _setting(True, "Emit flow events (Service translations) from the data path.")
    max_services: int = _setting(131072, "Size of the frontend table (one entry per address, port and protocol).")
    max_backends: int = _setting(524288, "Size of the backend table (one entry per endpoint and Service port).")
    max_nat: int = _setting(131072, "Size of the NAT table (two entries per translated flow).")
    log_level: str = _setting("info", "debug, info, warning or error.")

    def validated(self) -> AgentConfig:
        """This configuration with names filled in and values checked. Raises ConfigError naming the setting."""
        node_name = self.node_name or socket.gethostname()
        if len(node_name) > 253 or not all(c.isalnum() or c in "-." for c in node_name):
            raise ConfigError(f"node-name: {node_name!r} is not a valid node name")
        for cidr in self.pod_cidr:
            try:
                ipaddress.ip_network(cidr)
            except ValueError as error:
                raise ConfigError(f"pod-cidr: {error}") from error
        for address in self.node_ip:
            try:
                ipaddress.ip_address(address)
            except ValueError as error:
                raise ConfigError(f"node-ip: {error}") from error
        _one_per_family("pod-cidr", self.pod_cidr)
        _one_per_family("node-ip", self.node_ip)
        if self.metrics_address:
            split_host_port(self.metrics_address)
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"log-level: {self.log_level!r} is not one of debug, info, warning, error")
        for name in ("max_services", "max_backends", "max_nat"):
            if not 16 <= getattr(self, name) <= 1 << 24:
                raise ConfigError(f"{name.replace('_', '-')}: must lie between 16 and {1 << 24}")
        return dataclasses.replace(self, node_name=node_name)


def split_host_port(text: str) -> tuple[str, int]:
    """("127.0.0.1", 9970) from "127.0.0.1:9970" or "[::1]:9970"; the host may be empty for all addresses."""
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"metrics-address: {text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def _one_per_family(name: str, values: tuple[str, ...]) -> None:
    families = [ipaddress.ip_interface(value).version for value in values]
    if len(set(families)) != len(families):
        raise ConfigError(f"{name}: more than one value of the same address family: {', '.join(values)}")


def load_config(file: Path | None, flags: Mapping[str, Any]) -> AgentConfig:
    """Settings from `file` (YAML) overlaid with `flags` (None = not given). Raises ConfigError."""
    values: dict[str, Any] = {}
    if file is not None:
        values.update(_read_file(file))
    values.update({name: value for name, value in flags.items() if value is not None and value != ()})
    return AgentConfig(**{name: _coerce(name, value) for name, value in values.items()}).validated()


def _read_file(file: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"config: cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {file} is not valid YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"config: {file} must hold a mapping of settings")
    known = {f.name.replace("_", "-"): f.name for f in dataclasses.fields(AgentConfig)}
    for key in document:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"config: {file}: unknown setting {key!r}{hint}")
    return {known[key]: value for key, value in document.items()}


def _coerce(name: str, value: Any) -> Any:
    kind = typing.get_type_hints(AgentConfig)[name]
    label = name.replace("_", "-")
    if kind in (Path, Path | None):
        if value is None and kind != Path:
            return None
        if not isinstance(value, (str, Path)) or not str(value):
            raise ConfigError(f"{label}: must be a path, not {value!r}")
        return Path(value) if str(value) == "in-cluster" else Path(value).absolute()
    if kind == tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{label}: must be a list of strings, not {value!r}")
        return tuple(item.strip() for item in items if item.strip())
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{label}: must be true or false, not {value!r}")
    if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(f"{label}: must be a number, not {value!r}")
    if kind is str:
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise ConfigError(f"{label}: must be a string, not {value!r}")
        return str(value)  # a node may be called 17
    return value
