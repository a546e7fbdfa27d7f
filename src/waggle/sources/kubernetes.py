"""The Kubernetes API as a source: Nodes, Services, EndpointSlices and ServiceCIDRs, listed and watched into the store.

While the API cannot be reached the store keeps what it has, `synced` stays unset if it never was, and `problems()`
says in words what is wrong. Nothing here ends the agent.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Final

from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    EndpointSlice,
    Node,
    Service,
    ServiceCIDR,
)
from waggle.sources.apiserver import ApiServer, Limits
from waggle.sources.informer import Informer, Resource, Timing
from waggle.sources.problem import Problem, ProblemSet
from waggle.store.store import Store

log = logging.getLogger(__name__)

# Pods are not watched: Kubernetes makes an EndpointSlice for every Service with a selector, so the endpoints never
# have to be computed here, and the Services of other proxies and the headless ones do not even reach this machine.
NODES: Final = Resource(Node, "", "nodes", "/api/v1/nodes")
SERVICES: Final = Resource(
    Service,
    "",
    "services",
    "/api/v1/services",
    {"fieldSelector": "spec.clusterIP!=None", "labelSelector": f"!{SERVICE_PROXY_NAME_LABEL}"},
)
ENDPOINT_SLICES: Final = Resource(
    EndpointSlice,
    "discovery.k8s.io",
    "endpointslices",
    "/apis/discovery.k8s.io/v1/endpointslices",
    {"labelSelector": f"!{HEADLESS_LABEL},!{SERVICE_PROXY_NAME_LABEL}"},
)


SERVICE_CIDRS: Final = Resource(
    ServiceCIDR, "networking.k8s.io", "servicecidrs", "/apis/networking.k8s.io/v1/servicecidrs", optional=True
)
#: All that is watched; deploy/ gives the right to these and to nothing else.
RESOURCES: Final[tuple[Resource[Any], ...]] = (NODES, SERVICES, ENDPOINT_SLICES, SERVICE_CIDRS)


class KubernetesSource:
    """List and watch through one kubeconfig (or `in-cluster`), from the network namespace `netns` if given.

    `synced` is set when the first complete lists of all but the optional resources are in the store, and stays set.
    """

    def __init__(
        self,
        store: Store,
        kubeconfig: Path,
        netns: Path | None = None,
        *,
        timing: Timing | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.synced = asyncio.Event()
        self._problems = ProblemSet(log)
        self._api = ApiServer(kubeconfig, netns, limits)
        informers: list[Informer[Any]] = [
            Informer(self._api, store, resource, self._problems, timing) for resource in RESOURCES
        ]
        self.informers = tuple(informers)

    async def run(self) -> None:
        """Runs until cancelled."""
        async with self._api, asyncio.TaskGroup() as tasks:
            for informer in self.informers:
                tasks.create_task(informer.run())
            tasks.create_task(self._announce_first_sync())

    def problems(self) -> list[Problem]:
        """What is wrong now. What all resources suffer alike (no connection, say) is one problem."""
        found = self._problems.all()
        reasons = {problem.reason for problem in found}
        shared = all(problem.subject.startswith("Kubernetes ") for problem in found)
        if shared and len(found) == len(self.informers) and len(reasons) == 1:
            return [Problem("Kubernetes API", reasons.pop(), since=min(problem.since for problem in found))]
        return found

    async def _announce_first_sync(self) -> None:
        if self.synced.is_set():
            return
        for informer in self.informers:
            if not informer.optional:
                await informer.synced.wait()
        self.synced.set()
