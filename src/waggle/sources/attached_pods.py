"""Containers without Kubernetes as rows of the store: what CNI attached, with what is known of it.

Invariant: the rows of one `publish` are all there are. What Kubernetes made (the request carries a pod's UID) is none
of them: the API, or whoever else plays Kubernetes, says what that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from waggle.model.objects import Pod
from waggle.model.workload import Attached, pod_rows, unresolved_ports
from waggle.sources.cni_records import Attachment
from waggle.sources.problem import Problem
from waggle.store.store import Store

ORIGIN = "cni"


class AttachedPods:
    """`attachments` gives the records of interfaces that exist, the oldest first."""

    def __init__(self, store: Store, node: str, attachments: Callable[[], Iterable[Attachment]]) -> None:
        self._store = store
        self._node = node
        self._attachments = attachments
        self._rows: list[Pod] = []
        self.published = False

    def publish(self) -> None:
        """Make the store hold what is attached now."""
        self._rows = pod_rows(self._node, map(_attached, self._attachments()))
        self._store.replace("Pod", self._rows, ORIGIN)
        self.published = True

    def problems(self) -> list[Problem]:
        """Services that ask containers for what they do not have."""
        if not self._rows:
            return []
        return [
            Problem(
                f"Service {key}", f"targetPort {port!r} means nothing to containers without Kubernetes: give a number"
            )
            for key, port in unresolved_ports(self._store.services.values(), self._rows).items()
        ]


def _attached(record: Attachment) -> Attached:
    return Attached(
        record.container_id,
        record.addresses,
        record.namespace,
        record.name,
        record.labels,
        managed=bool(record.uid),
        workload=record.workload,
    )
