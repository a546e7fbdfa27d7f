"""The Kubernetes API as a source: what Services and policies need of it, listed and watched into the store.

While the API cannot be reached the store keeps what it has, `synced` stays unset if it never was, and `problems()`
says in words what is wrong. Nothing here ends the agent.

Policies are followed always. Who they are about, the pods and namespaces of the whole cluster, is followed only while
there is any policy, from whichever source: a cluster without policies pays nothing for them.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Final

from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    ClusterNetworkPolicy,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    NodePolicy,
    Pod,
    Service,
    ServiceCIDR,
)
from waggle.model.policy_schema import EARLIER_VERSION, GROUP, NODE_GROUP, NODE_PLURAL, NODE_VERSION, PLURAL, VERSION
from waggle.sources.apiserver import ApiServer, Limits
from waggle.sources.informer import Informer, Resource, Timing
from waggle.sources.problem import Problem, ProblemSet
from waggle.store.store import Store

log = logging.getLogger(__name__)

# Kubernetes makes an EndpointSlice for every Service with a selector, so the endpoints never have to be computed here,
# and the Services of other proxies and the headless ones do not even reach this machine.
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

NETWORK_POLICIES: Final = Resource(
    NetworkPolicy, "networking.k8s.io", "networkpolicies", "/apis/networking.k8s.io/v1/networkpolicies"
)
CLUSTER_NETWORK_POLICIES: Final = Resource(
    ClusterNetworkPolicy,
    GROUP,
    PLURAL,
    f"/apis/{GROUP}/{VERSION}/{PLURAL}",
    optional=True,
    earlier=(f"/apis/{GROUP}/{EARLIER_VERSION}/{PLURAL}",),
)
NODE_POLICIES: Final = Resource(
    NodePolicy, NODE_GROUP, NODE_PLURAL, f"/apis/{NODE_GROUP}/{NODE_VERSION}/{NODE_PLURAL}", optional=True
)
NAMESPACES: Final = Resource(Namespace, "", "namespaces", "/api/v1/namespaces")
# Finished pods are nobody's peer, and pods on their node's network are the node: neither reaches this machine.
PODS: Final = Resource(
    Pod,
    "",
    "pods",
    "/api/v1/pods",
    {"fieldSelector": "spec.hostNetwork!=true,status.phase!=Succeeded,status.phase!=Failed"},
)

_FOR_SERVICES: Final[tuple[Resource[Any], ...]] = (NODES, SERVICES, ENDPOINT_SLICES, SERVICE_CIDRS)
_POLICIES: Final[tuple[Resource[Any], ...]] = (NETWORK_POLICIES, CLUSTER_NETWORK_POLICIES, NODE_POLICIES)
_FOR_POLICIES: Final[tuple[Resource[Any], ...]] = (NAMESPACES, PODS)
#: All that is watched; deploy/ gives the right to these and to nothing else.
RESOURCES: Final[tuple[Resource[Any], ...]] = (*_FOR_SERVICES, *_POLICIES, *_FOR_POLICIES)


class KubernetesSource:
    """List and watch through one kubeconfig (or `in-cluster`), from the network namespace `netns` if given.

    `synced` is set when the first complete lists of all that Services need, but for the optional resources, are in the
    store, and stays set. `policies_synced` is set while the store holds all policies and all that they are about. It
    is unset from the moment the first policy comes until pods and namespaces are known: before, a policy would find
    none of those it allows. The store's `on_change` is called when it is set.
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
        self.policies_synced = asyncio.Event()
        self._store = store
        self._timing = timing or Timing()
        self._problems = ProblemSet(log)
        self._api = ApiServer(kubeconfig, netns, limits)
        self._for_services = self._informers(_FOR_SERVICES)
        self._policies = self._informers(_POLICIES)
        self._for_policies: tuple[Informer[Any], ...] = ()  # while there are policies, and some time after
        self._demand = asyncio.Event()  # whether there are any may have changed

    def _informers(self, resources: tuple[Resource[Any], ...]) -> tuple[Informer[Any], ...]:
        return tuple(Informer(self._api, self._store, one, self._problems, self._timing) for one in resources)

    @property
    def informers(self) -> tuple[Informer[Any], ...]:
        """Those at work, in the order of RESOURCES."""
        return (*self._for_services, *self._policies, *self._for_policies)

    async def run(self) -> None:
        """Runs until cancelled."""
        self._store.on_demand = self._demand_changed
        async with self._api, asyncio.TaskGroup() as tasks:
            for informer in self.informers:
                tasks.create_task(informer.run())
            tasks.create_task(self._announce_first_sync())
            tasks.create_task(self._announce(self._policies))
            tasks.create_task(self._follow_demand())

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
        for informer in self._for_services:
            if not informer.optional:
                await informer.synced.wait()
        self.synced.set()

    # -- policies -----------------------------------------------------------------------------------------------

    def _demand_changed(self) -> None:
        self._review_policies()
        self._demand.set()

    def _review_policies(self) -> None:
        needed = (*self._policies, *self._for_policies) if self._store.has_policies else self._policies
        known = all(informer.answered.is_set() for informer in needed)
        known = known and bool(self._for_policies or not self._store.has_policies)
        if not known:
            self.policies_synced.clear()
        elif not self.policies_synced.is_set():
            self.policies_synced.set()
            self._store.on_change()

    async def _announce(self, informers: tuple[Informer[Any], ...]) -> None:
        for informer in informers:
            await informer.answered.wait()
        self._review_policies()

    async def _follow_demand(self) -> None:
        """Follows pods and namespaces while there are policies."""
        while True:
            while not self._store.has_policies:
                await self._demand.wait()
                self._demand.clear()
            informers = self._for_policies = self._informers(_FOR_POLICIES)
            async with asyncio.TaskGroup() as tasks:
                following = [tasks.create_task(informer.run()) for informer in informers]
                following.append(tasks.create_task(self._announce(informers)))
                await self._until_unwanted()
                self._for_policies = ()  # a policy that comes now has to wait for new lists
                for task in following:
                    task.cancel()
            for informer in informers:
                informer.forget()

    async def _until_unwanted(self) -> None:
        """Until there has been no policy for a while: the next one may come soon, and a list is expensive."""
        while True:
            if self._store.has_policies:
                await self._demand.wait()
                self._demand.clear()
                continue
            try:
                async with asyncio.timeout(self._timing.unwanted):
                    await self._demand.wait()
                    self._demand.clear()
            except TimeoutError:
                return
