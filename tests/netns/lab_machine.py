"""A lab under test, driven by the command line as a user drives it, and what must not be left of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from waggle.kernel.cgroup import cgroup2_mount
from waggle.lab.layout import LabLayout
from waggle.lab.namespaces import netns_files
from waggle.lab.traffic import Outcome, Probe, outcome_from

COMMAND = [sys.executable, "-m", "waggle.cli.main", "lab"]

ECHO = [sys.executable, "-m", "waggle.lab.echo"]


class Lab:
    """One lab by name. `close` removes it whatever state it is in."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.layout = LabLayout(name, cgroup2_mount())

    def run(self, *arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """`waggle lab <arguments> --name <this lab>`."""
        command, *rest = arguments
        done = subprocess.run(
            [*COMMAND, command, "--name", self.name, *rest],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,  # emulated machines are slow
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def status(self) -> dict[str, Any]:
        return json.loads(self.run("status", "-o", "json", check=False).stdout)

    def pod(self, name: str) -> dict[str, Any]:
        return next(pod for pod in self.status()["pods"] if pod["name"] == name)

    def service(self, name: str) -> dict[str, Any]:
        return next(service for service in self.status()["services"] if service["name"] == name)

    def apply(self, tmp_path: Path, *documents: dict[str, Any], check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("apply", "-f", str(self.manifest(tmp_path, *documents)), "-o", "json", check=check)

    def manifest(self, tmp_path: Path, *documents: dict[str, Any]) -> Path:
        """The documents as a file; JSON is YAML."""
        path = tmp_path / "manifest.yaml"
        path.write_text("\n---\n".join(json.dumps(document) for document in documents))
        return path

    def ask(self, origin: str, *probes: Probe) -> list[Outcome]:
        """Sends real requests from a node, a pod or the client."""
        stdin = json.dumps([asdict(probe) for probe in probes])
        done = self.run("exec", origin, "--", sys.executable, "-m", "waggle.lab.traffic", stdin=stdin)
        return [outcome_from(document) for document in json.loads(done.stdout)]

    def agent_pid(self, node: str) -> int:
        return next(entry["agent"]["pid"] for entry in self.status()["nodes"] if entry["name"] == node)

    def kill_agent(self, node: str) -> None:
        """`run("up")` brings it back."""
        pid = self.agent_pid(node)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)

    def leftovers(self) -> list[str]:
        """Everything on this machine that is the lab's."""
        layout = self.layout
        found = [
            str(path) for path in (layout.run, layout.lock, layout.state, layout.bpf, layout.cgroup) if path.exists()
        ]
        found += [str(path) for path in netns_files(layout)]
        mounts = Path("/proc/self/mounts").read_text()
        found += [line for line in mounts.splitlines() if f"waggle-lab/{self.name}/" in line]
        return found

    def close(self) -> None:
        self.run("down")
        assert self.leftovers() == []


def pod(name: str, *command: str, ports: list[tuple[str, int]] | None = None, **spec: Any) -> dict[str, Any]:
    """A Pod that runs `command`."""
    container = {
        "name": "main",
        "command": list(command),
        "ports": [{"containerPort": port, "protocol": protocol} for protocol, port in ports or []],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name.partition("-")[0]}},
        "spec": {"containers": [container], **spec},
    }


def echo_pod(name: str, **spec: Any) -> dict[str, Any]:
    """A Pod that answers on TCP and UDP port 8080."""
    return pod(name, *ECHO, "--port", "8080", ports=[("TCP", 8080), ("UDP", 8080)], **spec)


def service(name: str, **spec: Any) -> dict[str, Any]:
    """A dual-stack Service for the pods called `name`-…, port 80 on TCP and UDP."""
    ports = [
        {"name": "tcp", "port": 80, "targetPort": 8080, "protocol": "TCP"},
        {"name": "udp", "port": 80, "targetPort": 8080, "protocol": "UDP"},
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ipFamilyPolicy": "PreferDualStack", "ports": ports, **spec},
    }


def unique_name(suffix: str) -> str:
    """A lab name that no other test run on this machine has."""
    return f"t{os.getpid()}{suffix}"
