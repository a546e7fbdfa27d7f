"""The commands of a pod's containers: started, watched and ended as a runtime would, on the host's own file system.

A container is a command in the pod's namespaces and in a cgroup of its own. Its only companion is a small shell that
waits for it and, when it ends, records the exit status and replaces the pod's live object by one that is not ready:
the endpoint disappears although no process of waggle watches. (A kubelet does the same, by watching.)
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from waggle.errors import LabError
from waggle.lab import processes
from waggle.lab.layout import PodLayout
from waggle.model.objects import Container, ObjectKey

_SUPERVISE = """
status_file=$1 succeeded=$2 failed=$3 live=$4; shift 4
"$@"
status=$?
echo "$status" > "$status_file.new" && mv "$status_file.new" "$status_file"
if [ "$status" = 0 ]; then after=$succeeded; else after=$failed; fi
[ ! -e "$after" ] || mv "$after" "$live"
"""


@dataclass(frozen=True, slots=True)
class ContainerState:
    """`status` is the exit status once it has ended; None while it runs and when it was killed without a trace."""

    running: bool
    status: int | None

    @property
    def reason(self) -> str:
        """For people: empty while the container runs."""
        if self.running:
            return ""
        if self.status is None:
            return "killed"
        if self.status == 127:
            return "exited with status 127 (command not found?)"
        if self.status > 128:
            return f"exited by signal {self.status - 128}"
        return f"exited with status {self.status}"


def search_path() -> str:
    """PATH for commands in the lab: waggle's own commands are found first."""
    # abspath, not resolve: the interpreter of a virtual environment is a link to the system's.
    return f"{Path(os.path.abspath(sys.executable)).parent}:{os.environ.get('PATH', os.defpath)}"  # noqa: PTH100


def environment(key: ObjectKey, node: str, addresses: Iterable[str], container: Container) -> dict[str, str]:
    """What a container's command finds in its environment; the container's own settings win."""
    listed = list(addresses)
    env = {
        "PATH": search_path(),
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "HOSTNAME": key.name,
        "POD_NAME": key.name,
        "POD_NAMESPACE": key.namespace,
        "POD_IP": listed[0] if listed else "",
        "POD_IPS": ",".join(listed),
        "NODE_NAME": node,
    }
    for name in ("PYTHONPATH", "TERM"):  # waggle run from a source tree; programs that draw
        if name in os.environ:
            env[name] = os.environ[name]
    for variable in container.env:
        env[variable.name] = expand(variable.value, env)
    return env


_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)")


def expand(text: str, env: dict[str, str]) -> str:
    """Kubernetes' $(NAME) in commands, arguments and values; $$ is a dollar, an unknown name stays as it is."""

    def replacement(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return _REFERENCE.sub(replacement, text)


def command_of(container: Container, env: dict[str, str]) -> list[str]:
    """The command line. Raises LabError where there is none: a lab has no images that would know one."""
    command = [expand(word, env) for word in (*container.command, *container.args)]
    if not container.command:
        raise LabError(f"container {container.name!r} has no command: a lab runs commands of this machine, not images")
    if shutil.which(command[0], path=env["PATH"]) is None:
        raise LabError(f"container {container.name!r}: this machine has no command {command[0]!r}")
    return command


def start(pod: PodLayout, container: Container, addresses: Iterable[str], after: tuple[Path, Path, Path]) -> None:
    """Starts the container; returns at once. `after`: live objects to show once it has succeeded or failed, and the
    path at which to show them. Raises LabError when it cannot be started.
    """
    env = environment(pod.key, pod.node.name, addresses, container)
    command = command_of(container, env)
    pod.exit_file(container.name).unlink(missing_ok=True)
    supervised = ["sh", "-c", _SUPERVISE, "waggle-container", str(pod.exit_file(container.name))]
    processes.start_detached(
        pod.place,
        pod.container_cgroup(container.name),
        [*supervised, *(str(path) for path in after), *command],
        env=env,
        log=pod.log(container.name),
        directory=container.working_dir,
    )


def state(pod: PodLayout, container: str) -> ContainerState:
    exit_file = pod.exit_file(container)
    # The order matters: the shell is there until after it has written the status.
    running = processes.is_populated(pod.container_cgroup(container))
    try:
        return ContainerState(running=False, status=int(exit_file.read_text()))
    except FileNotFoundError:
        return ContainerState(running=running, status=None)
    except (OSError, ValueError) as error:
        raise LabError(f"cannot read {exit_file}: {error}") from error


def stop(pod: PodLayout, names: Iterable[str], *, grace: float) -> None:
    """Ends the containers and whatever they left running."""
    processes.terminate([pod.container_cgroup(name) for name in names], grace=grace)
