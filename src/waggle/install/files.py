"""The files of an installation, as text. Nothing here touches the machine."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from waggle.config import AgentConfig
from waggle.kernel.capabilities import NEEDED
from waggle.reconcile.uplinks import POD_INTERFACE_PREFIX

ETC = Path("/etc/waggle")
SETTINGS = ETC / "agent.yaml"
MANIFESTS = ETC / "manifests"
UNIT = Path("/etc/systemd/system/waggle.service")
WANTED = Path("/etc/systemd/system/multi-user.target.wants/waggle.service")
NETWORK_MANAGER = Path("/etc/NetworkManager/conf.d/waggle.conf")
NETWORKD = Path("/etc/systemd/network/05-waggle.network")
#: What an agent is told that nobody told anything else: a machine without Kubernetes, container runtimes that use CNI.
DEFAULTS: Mapping[str, Any] = {
    "manifests": str(MANIFESTS),
    "cni-bin-dir": "/opt/cni/bin",
    "cni-conf-dir": "/etc/cni/net.d",
}


@dataclass(frozen=True, slots=True)
class File:
    """`keep`: somebody's own as soon as it was changed. `beside`: written only where that directory is."""

    path: Path
    text: str
    mode: int = 0o644
    keep: bool = False
    beside: Path = Path("/")


def settings_file(settings: Mapping[str, Any]) -> str:
    """agent.yaml: every setting with its meaning; those that are not given stand there as comments."""
    parts = ["# Settings of waggle's agent. After a change: systemctl restart waggle"]
    for field in dataclasses.fields(AgentConfig):
        name = field.name.replace("_", "-")
        meaning = textwrap.fill(field.metadata["help"], 118, initial_indent="# ", subsequent_indent="# ")
        if name in settings:
            parts.append(meaning + "\n" + _line(name, settings[name]))
        else:
            parts.append(meaning + "\n#" + _line(name, _plain(field.default)))
    return "\n\n".join(parts) + "\n"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _line(name: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 16, allow_unicode=True)
    return f"{name}: {text.removesuffix('...' + chr(10)).strip()}"


def unit(executable: Path, config: AgentConfig) -> str:
    """The systemd unit of an agent with these settings.

    Left out on purpose: ProtectKernelTunables and ProtectControlGroups, for forwarding, pinned maps and the cgroup of
    waggle-health are written; PrivateNetwork and PrivateUsers, for it is the node's network.
    """
    capabilities = " ".join(f"CAP_{name}" for name in NEEDED)
    lines = [
        "# Written by `waggle install`. Changes belong into a drop-in: systemctl edit waggle",
        "[Unit]",
        "Description=waggle: container networking on BPF",
        "Wants=network.target",
        "After=network-pre.target systemd-sysctl.service sys-fs-bpf.mount",
        "Before=containerd.service crio.service podman.service podman-restart.service kubelet.service",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={_quoted(executable)} agent --config {SETTINGS}",
        "Restart=always",
        "RestartSec=1",
        "# The data path stays at work; so does waggle-health, which has a cgroup of its own.",
        "TimeoutStopSec=20",
        "OOMScoreAdjust=-900",
        "LimitNOFILE=1048576",
        "",
        "UMask=0077",
        f"CapabilityBoundingSet={capabilities}",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        *_writable(config),
        "ProtectHome=read-only",
        "PrivateDevices=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_PACKET",
        "RestrictNamespaces=net",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "MemoryDenyWriteExecute=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service @mount bpf setns chroot pidfd_getfd pidfd_open pidfd_send_signal",
        "SystemCallErrorNumber=EPERM",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _writable(config: AgentConfig) -> list[str]:
    """What is left writable: directories that systemd makes where they are the usual ones, others by their path."""
    lines, paths = [], []
    for directory, place, settings in (
        (config.api_socket.parent, Path("/run/waggle"), ["RuntimeDirectory=waggle", "RuntimeDirectoryPreserve=yes"]),
        (config.state_dir, Path("/var/lib/waggle"), ["StateDirectory=waggle", "StateDirectoryMode=0700"]),
    ):
        if directory == place:
            lines += settings
        else:
            paths.append(directory)
    if config.api_socket.parent == Path("/run/waggle"):
        lines.append("RuntimeDirectoryMode=0750")
    log_dir = config.flow_log.parent if config.flow_log is not None else None
    paths += [path for path in (config.cni_bin_dir, config.cni_conf_dir, log_dir) if path is not None]
    return lines + ([f"ReadWritePaths={' '.join('-' + _quoted(path) for path in paths)}"] if paths else [])


def _quoted(path: Path) -> str:
    text = str(path).replace("%", "%%").replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{text}"' if any(c in text for c in " \t\"'\\;") else text


def network_manager() -> str:
    """NetworkManager leaves pods' interfaces alone."""
    return f"[keyfile]\nunmanaged-devices+=interface-name:{POD_INTERFACE_PREFIX}*\n"


def networkd() -> str:
    """So does systemd-networkd, whatever other .network files match."""
    return f"[Match]\nName={POD_INTERFACE_PREFIX}*\nDriver=veth vxlan\n\n[Link]\nUnmanaged=yes\n"


def files(executable: Path, settings: Mapping[str, Any], config: AgentConfig) -> list[File]:
    """Everything that is written, settings first."""
    return [
        File(SETTINGS, settings_file(settings), 0o600, keep=True),
        File(UNIT, unit(executable, config)),
        File(NETWORK_MANAGER, network_manager(), beside=NETWORK_MANAGER.parents[1]),
        File(NETWORKD, networkd(), beside=NETWORKD.parent),
    ]


def directories(config: AgentConfig) -> list[Path]:
    """Those that the agent looks into or writes to."""
    log_dir = config.flow_log.parent if config.flow_log is not None else None
    wanted = [MANIFESTS, config.manifests, config.cni_bin_dir, config.cni_conf_dir, log_dir]
    return [path for path in dict.fromkeys(wanted) if path is not None]
