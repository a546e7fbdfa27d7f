"""What `podman ps` and `podman pod ps` print, as workloads.

Both print JSON. Of Podman, as of everything that is not waggle, nothing is believed: what has another form than it
should is an error that says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from waggle.errors import ApiError
from waggle.model.workload import Workload

RUNTIME = "podman"


class PodmanContainer(msgspec.Struct, rename="pascal"):
    """One entry of `podman ps`. `state` is a word, `status` a phrase for people that ends with the health, if any."""

    id: str
    names: list[str] | None = None
    labels: dict[str, str] | None = None
    pod: str = ""
    is_infra: bool = False
    state: str = ""
    status: str = ""

    @property
    def is_running(self) -> bool:
        return self.state.lower() == "running"

    @property
    def is_ready(self) -> bool:
        """It runs, and its health check, if it has one, has passed: "Up 3 seconds (healthy)"."""
        return self.is_running and not self.status.endswith(("(starting)", "(unhealthy)"))


class PodmanPod(msgspec.Struct, rename="pascal"):
    """One entry of `podman pod ps`."""

    id: str
    name: str = ""
    labels: dict[str, str] | None = None


def read_containers(printed: bytes) -> list[PodmanContainer]:
    """What `podman ps --all --no-trunc --format json` printed. Raises ApiError."""
    return _read(printed, list[PodmanContainer] | None, "podman ps") or []


def read_pods(printed: bytes) -> list[PodmanPod]:
    """What `podman pod ps --no-trunc --format json` printed. Raises ApiError."""
    return _read(printed, list[PodmanPod] | None, "podman pod ps") or []


def _read(printed: bytes, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(printed, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"{what} prints something else than it should: {error}") from error


def workloads(containers: Iterable[PodmanContainer], pods: Iterable[PodmanPod]) -> dict[str, Workload]:
    """Container ID → what Podman says.

    The container that holds a pod's network stands for the pod: it has the labels of the pod and of its containers, and
    is ready when all that run are, and one does.
    """
    found = list(containers)
    groups = {pod.id: pod for pod in pods}
    members: dict[str, list[PodmanContainer]] = {}
    for container in found:
        if container.pod and not container.is_infra:
            members.setdefault(container.pod, []).append(container)
    return {
        one.id: _of_group(groups.get(one.pod), one, members.get(one.pod, [])) if one.is_infra else _of_one(one)
        for one in found
    }


def _of_one(container: PodmanContainer) -> Workload:
    name = container.names[0] if container.names else ""
    return Workload(RUNTIME, name, container.labels or {}, container.is_ready)


def _of_group(pod: PodmanPod | None, infra: PodmanContainer, members: list[PodmanContainer]) -> Workload:
    labels = dict(infra.labels or {}) | ((pod.labels if pod else None) or {})
    for member in sorted(members, key=lambda one: one.id):
        labels |= member.labels or {}
    running = [member for member in members if member.is_running]
    ready = bool(running) and all(member.is_ready for member in running)
    return Workload(RUNTIME, pod.name if pod else "", labels, ready)
