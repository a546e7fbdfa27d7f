"""The agents of a lab: one real `waggle agent` per node, started, watched and ended.

An agent runs in its node's namespaces and in the cgroup `agent` of its node, and reads one configuration file that
a user may read too. Its state of the data path is pinned below the node's own directory, so ending and starting an
agent is what it is in production.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from waggle.errors import LabError
from waggle.kernel.netns import netns_id
from waggle.lab import processes
from waggle.lab.layout import LabLayout, NodeLayout
from waggle.lab.record import LabRecord, write_atomically

READY_TIMEOUT = 60.0


def write_config(lab: LabLayout, node: NodeLayout, record: LabRecord) -> bool:
    """Writes the agent's configuration. True when it differs from what was there."""
    settings: dict[str, object] = {
        **record.settings,
        "node-name": node.name,
        "manifests": str(lab.manifests),
        "cgroup-root": str(node.place.cgroup),
        "bpf-root": str(node.bpf),
        "state-dir": str(node.state),
        "api-socket": str(node.socket),
    }
    if record.kubeconfig is not None:
        settings |= {
            "kubeconfig": record.kubeconfig,
            # The API is reached from where `lab up` was called: the lab's network leads nowhere.
            "kubernetes-netns": str(lab.api_netns),
            "pod-cidr": list(node.pod_cidrs),
            "node-ip": list(node.addresses),
        }
    content = yaml.safe_dump(settings, sort_keys=False).encode()
    before = node.config.read_bytes() if node.config.exists() else b""
    if content == before:
        return False
    node.run.mkdir(parents=True, exist_ok=True)
    write_atomically(node.config, content)
    return True


def is_running(node: NodeLayout) -> bool:
    return processes.is_populated(node.agent_cgroup)


def is_misplaced(node: NodeLayout) -> bool:
    """Whether the agent lives in a namespace that has been removed from under it."""
    wanted = netns_id(node.place.netns)
    for pid in processes.pids_below(node.agent_cgroup):
        try:
            status = Path(f"/proc/{pid}/ns/net").stat()
        except OSError:  # it has ended meanwhile
            continue
        if (status.st_dev, status.st_ino) != wanted:
            return True
    return False


def start(node: NodeLayout) -> None:
    """Starts the agent. Does not wait until it is ready."""
    node.state.mkdir(parents=True, exist_ok=True)
    processes.start_detached(
        node.place,
        node.agent_cgroup,
        [sys.executable, "-m", "waggle.cli.main", "agent", "--config", str(node.config)],
        env=dict(os.environ),
        log=node.log,
    )


def stop(node: NodeLayout, *, grace: float = 5.0) -> None:
    processes.terminate([node.agent_cgroup], grace=grace)


def is_ready(node: NodeLayout, path: str = "/readyz") -> bool:
    """Whether the agent answers 200: to /readyz once its tables hold what its sources say, to /healthz before."""
    connection = _UnixConnection(node.socket, timeout=2.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):  # not listening yet, or just ending
        return False
    finally:
        connection.close()


def get_json(node: NodeLayout, path: str) -> Any:
    """The agent's answer to GET `path`. Raises LabError where there is none."""
    connection = _UnixConnection(node.socket, timeout=10.0)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status != 200:
            raise LabError(f"the agent of {node.name} answers {path} with {response.status}")
        return json.load(response)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise LabError(f"the agent of {node.name} does not answer {path}: {error}") from error
    finally:
        connection.close()


def wait_ready(node: NodeLayout, path: str, timeout: float = READY_TIMEOUT) -> None:
    """Returns once the agent is ready (`is_ready`). Raises LabError with the end of its log when it dies or takes too
    long.
    """
    deadline = time.monotonic() + timeout
    while not is_ready(node, path):
        if not is_running(node):
            raise LabError(f"the agent of {node.name} has ended:\n{log_tail(node.log)}\n(whole log: {node.log})")
        if time.monotonic() > deadline:
            raise LabError(
                f"the agent of {node.name} is not ready after {timeout:g} s:\n{log_tail(node.log)}\n"
                f"(whole log: {node.log})"
            )
        time.sleep(0.02)


def log_tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented; says so where there is none."""
    try:
        content = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"  (no log: {error.strerror})"
    return "\n".join(f"  {line}" for line in content[-lines:]) or "  (its log is empty)"


class _UnixConnection(http.client.HTTPConnection):
    """HTTP/1.1 over a unix socket."""

    def __init__(self, path: Path, *, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        try:
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            raise
        self.sock = sock
