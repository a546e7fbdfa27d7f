"""The agent of one node.

Start: take the node (lock), load programs around the pinned maps, read the tables back, put programs on their hooks,
answer CNI requests, start the sources. The Services of a source are programmed once it has given its first full view,
whatever the other sources do; nothing is removed from a table before all of them have. So a start in the middle of
traffic changes nothing that is right. Every change is one pass: changed keys → plan → writes.

The data path does not need this process. Ending it, however, leaves everything in place.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from waggle.abi._generated import Scope, ServiceKey
from waggle.abi.address import ANY4, ANY6, is_ipv4
from waggle.abi.learned_names import Learned, learned
from waggle.agent.dns_server import PORT as DNS_PORT
from waggle.agent.dns_server import DnsServer
from waggle.agent.doctor import Doctor
from waggle.agent.flows import Flows
from waggle.agent.health import HealthSupervisor
from waggle.agent.network import NodeNetwork
from waggle.agent.node_essentials import NodeEssentials
from waggle.agent.node_policies import NodePolicies
from waggle.agent.pods import PodPrograms
from waggle.agent.policies import Policies
from waggle.agent.ports import PortGuard
from waggle.agent.proxy_flows import ProxyFlows
from waggle.agent.timing import ChangeTimes
from waggle.config import AgentConfig
from waggle.errors import AlreadyRunning, WaggleError
from waggle.kernel import probe
from waggle.kernel.netlink import Link, Monitor
from waggle.kernel.netns import netns_cookie_of_self
from waggle.metrics import Metrics
from waggle.model.choice import NodeFacts
from waggle.model.health import is_leaving
from waggle.model.host_port import HostPortOwner, PodPorts, changed, faults, node_host_ports
from waggle.model.objects import Node, ObjectKey
from waggle.model.packets import Cluster, LocalNode
from waggle.model.policy import PolicyWorld
from waggle.model.service import Balancing, Forwarding, ignored_annotations, open_families
from waggle.model.vip import NO_RANGES, pod_cidrs, service_ranges, taken_networks
from waggle.model.why import Situation
from waggle.model.workload import DEFAULT_NAMESPACE
from waggle.observe.names import Names
from waggle.observe.policy_names import told
from waggle.observe.rules import PlannedRules
from waggle.plan.health import local_policies_unmet, plan_health
from waggle.plan.host_ports import plan_host_ports
from waggle.plan.names import ServiceNames
from waggle.plan.services import PlanContext, ServiceRow, plan_nodes, plan_service, view_service
from waggle.plan.vips import plan_ranges, plan_vips
from waggle.reconcile import takeover
from waggle.reconcile.datapath import (
    Datapath,
    nodeport_addresses,
)
from waggle.reconcile.health import HealthTable, Overdue
from waggle.reconcile.health_process import HealthProcess
from waggle.reconcile.held_sockets import HeldSockets
from waggle.reconcile.maglev import MaglevTables
from waggle.reconcile.own_addresses import OwnAddresses
from waggle.reconcile.ranges import ALL_NODES, SourceRanges
from waggle.reconcile.services import Flush, Owner, ServiceTables, named
from waggle.reconcile.sysctls import Sysctls
from waggle.reconcile.uplinks import is_pod_interface
from waggle.reconcile.vips import Vips
from waggle.sources import cni_install
from waggle.sources.attached_pods import AttachedPods
from waggle.sources.cluster_addresses import ClusterAddresses
from waggle.sources.cni import CniService
from waggle.sources.cni_records import Attachment
from waggle.sources.informer import ORIGIN as KUBERNETES
from waggle.sources.kubernetes import KubernetesSource
from waggle.sources.manifests import ManifestSource
from waggle.sources.podman import AUTO as PODMAN_AUTO
from waggle.sources.podman import PodmanSource, podman_command
from waggle.sources.problem import Problem
from waggle.store import Store

log = logging.getLogger(__name__)

SLICE = 1000  # Services planned and written before other work gets its turn
SETTLE_SECONDS = 0.25  # no packet is on its way through a program that long
SWEEP_SECONDS = 0.1  # between a UDP Service's change and the walk over sockets: changes come in bursts
HOUSEKEEPING_SECONDS = 5.0
SETTLE_POD_SECONDS = 0.5
RETRY_SECONDS = 1.0


class Source(Protocol):
    """Where objects come from."""

    synced: asyncio.Event
    #: Set while the store holds all policies of the source and all that they are about.
    policies_synced: asyncio.Event

    async def run(self) -> None:
        """Keeps the store current until cancelled."""

    def problems(self) -> Sequence[Problem]:
        """What is wrong now."""


class Agent:
    """Everything of one node, wired together."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.started = time.time()
        self.metrics = Metrics()
        self.store = Store()
        self.datapath = Datapath(config)
        self.sources: dict[str, Source] = {}
        self.manifests: ManifestSource | None = None
        self.network_offered = False  # container runtimes have been told
        self.synced = False  # everything that the sources know is in the tables, and nothing else
        self.context = PlanContext(NodeFacts(config.node_name))
        self._zones: dict[str, str] = {}
        self.unplanned: dict[Owner, str] = {}
        self.remarks: dict[ObjectKey, list[str]] = {}  # on Services that say what is not meant, or not known
        self.host_ports: dict[HostPortOwner, PodPorts] = {}
        self.written = Flush()  # since the start
        self.last_error = ""
        self.last_updated = self.started  # when everything known was in the tables
        self.unmet: dict[ObjectKey, set[str]] = {}  # Services with a policy Local whose endpoints are elsewhere
        self._times = ChangeTimes(self.started)
        self._unwritten: Counter[str] = Counter()  # changes taken from the store, by kind, that are not in the tables
        self._dirty = asyncio.Event()
        self._addressed = asyncio.Event()  # there are addresses to give to pods
        self._pending: set[Owner] = set()
        self._pods_due = True
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sockets_due = asyncio.Event()
        self.ports = PortGuard(self.datapath, config.state_dir)
        self._routes_due = True
        self._ranges_due = True
        self.unenforced: Mapping[str, str] = {}
        self.tables: ServiceTables
        self.ranges: SourceRanges
        self.health: HealthTable
        self.overdue: Overdue
        self.health_ports: HealthSupervisor
        self.vips: Vips
        self.maglev: MaglevTables
        self.kernel_sweeps = True
        self.doctor = Doctor(self)
        self.flows: Flows
        self.cni: CniService
        self.attached_pods = AttachedPods(self.store, config.node_name, lambda: self.cni.attachments())
        self.podman: PodmanSource | None = None
        ranges = [ipaddress.ip_network(cidr) for cidr in config.service_cidr if cidr != NO_RANGES]
        self.service_names = ServiceNames(self.store, config.cluster_domain, ranges)
        self.dns: DnsServer | None = None
        self._dns_clients: frozenset[str] | None = None  # None: to be found anew
        self.names = Names(self.store, lambda: self.cni.pods(), self.service_of, self._endpoint_addresses)
        sysctls = Sysctls(config.state_dir)
        self.proxy = ProxyFlows(
            self.datapath, sysctls, lambda: self.network.node.every, lambda: self.tables.frontends()
        )
        self.pods = PodPrograms(self.datapath, self.names, lambda: self.cni.pods(), self.pods_changed)
        self.network = NodeNetwork(config, self.datapath, sysctls, self.pods, self.proxy)
        essentials = NodeEssentials(config, self.store, lambda: self.network.node.every, lambda: self.health.numbers)
        self.node_policies = NodePolicies(
            self.store, config.node_name, config.state_dir, essentials.find, self._dirty.set
        )
        self.policies = Policies(
            self.store,
            self.datapath,
            lambda: self.policies_synced,
            lambda: self.cni.pods(),
            lambda: self.network.node.every | set(config.dns_addresses),
            self.node_policies,
            retry=self._dirty.set,
            node=config.node_name,
            keep=config.policy_established == "keep",
        )

    # -- start and end ------------------------------------------------------------------------------------------

    def take_node(self) -> None:
        """Checks the machine and locks the node. Raises WaggleError with what is missing or who has it."""
        probe.mount_bpffs()
        probe.require()
        probe.make_sysctls_writable()
        self._refuse_kube_proxy()
        self.datapath.lock()
        # not before: it makes the state directory, and only the owner of the node may
        self.cni = CniService(
            state_dir=self.config.state_dir,
            ranges=self.pod_ranges,
            mtu=self.network.mtu,
            datapath=self.pods,
            learned=self.pods_changed,
            dns=self.dns_of,
        )
        if command := podman_command(self.config.podman):
            self.podman = PodmanSource(
                command, self.cni.attachments, self.cni.learn, expected=self.config.podman != PODMAN_AUTO
            )

    def _refuse_kube_proxy(self) -> None:
        found = takeover.running_kube_proxies()
        if found and not self.config.beside_kube_proxy:
            raise AlreadyRunning(
                f"kube-proxy runs on this node (process {', '.join(map(str, found))}): both would serve the same "
                "Services. Stop it, or set beside-kube-proxy to take its place"
            )

    def start_datapath(self) -> None:
        """Puts the programs on the node, around what is pinned. Blocking; `take_node` must have been called, and the
        records of pods loaded."""
        begin = time.monotonic()
        self.network.look()
        self.proxy.look()
        self.datapath.load(self.network.node)
        self.policies.start()
        self.kernel_sweeps = self.datapath.start_sweeping()
        self.tables = ServiceTables(self.datapath.maps["wag_services"], self.datapath.maps["wag_backends"])
        found = self.tables.adopt()
        self.ranges = SourceRanges(self.datapath.maps["wag_source_ranges"])
        self.ranges.adopt()
        self._start_health()
        self.vips = Vips(self.datapath.maps["wag_vips"], self.datapath.maps["wag_svc_ranges"])
        self.vips.adopt()
        self.maglev = self.datapath.maglev_tables()
        self.maglev.adopt()
        self.datapath.set_node_addresses(self.network.node)
        own = OwnAddresses(self.config.state_dir)
        if not self.config.dns_addresses and own.added:
            own.release()
            HeldSockets(self.datapath.cgroup_root).end()
        present = self.network.interfaces()
        self.datapath.forget_missing_pods(pod for pod in self.cni.pods() if pod.host_ifindex in present)
        if self.datapath.beside_proxy:
            log.info("another proxy's flows are under way: they are taken over once the tables are full")
        elif self.datapath.serves_from_tables():
            self.network.attach()
        else:
            log.info("the tables have a new layout: what is at work stays until they are full")
        self.flows = Flows(
            self.config,
            self.datapath.maps,
            self.names,
            PlannedRules(lambda: self.policies.planner.tables, self.place_of),
        )
        self.names.by_netns[netns_cookie_of_self()] = f"node {self.config.node_name}"
        log.info(
            "data path ready in %.0f ms: node %s, addresses %s, uplinks %s, %d frontends and %d pods taken over",
            (time.monotonic() - begin) * 1000,
            self.config.node_name,
            ", ".join(a for a in (self.network.node.ip4, self.network.node.ip6) if a) or "none",
            ", ".join(name for name, _ in self.network.devices) or "none",
            found,
            len(self.cni.pods()),
        )

    def _start_health(self) -> None:
        maps = self.datapath.load_health()
        self.overdue = Overdue(maps["wag_overdue"])
        self.overdue.adopt()
        self.health = HealthTable(maps["wag_health"], lambda: self.health_ports.notice())
        self.health.adopt()
        self.health_ports = HealthSupervisor(
            HealthProcess(
                self.datapath.map_dir,
                maps["wag_health"].info.id,
                self.config.api_socket,
                self.datapath.cgroup_root,
            ),
            self.health,
            lambda: nodeport_addresses(self.config.nodeport_addresses, self.network.node),
            self.metrics,
        )

    async def run(self, ready: Callable[[], Awaitable[None]]) -> None:
        """Runs until cancelled; `take_node` must have been called. `ready` is awaited when the data path stands.

        The sources begin to list while the programs load: most of the one is waiting for the network, most of the
        other is the kernel's work.
        """
        self.store.on_change = self._noticed
        self._loop = asyncio.get_running_loop()
        if self.config.manifests is not None:
            self.manifests = ManifestSource(self.store, self.config.manifests, addresses=self._cluster_addresses())
            self.sources["manifests"] = self.manifests
        if self.config.kubeconfig is not None:
            self.sources["kubernetes"] = KubernetesSource(
                self.store, self.config.kubeconfig, self.config.kubernetes_netns
            )
        if self.config.dns_addresses:
            self.dns = self._dns_server()
        async with asyncio.TaskGroup() as tasks:
            if self.dns is not None:  # first: what is asked while the programs load waits, and is answered then
                tasks.create_task(self.dns.run(), name="DNS")
            for name, source in self.sources.items():
                tasks.create_task(source.run(), name=f"source {name}")
            await asyncio.to_thread(self.cni.load)
            self.attached_pods.publish()  # names are complete from here on, if the sources are
            await asyncio.to_thread(self.start_datapath)
            await ready()
            for name, source in self.sources.items():
                tasks.create_task(self._plan_when_synced(name, source), name=f"sync {name}")
            tasks.create_task(self._reconcile(), name="reconcile")
            tasks.create_task(self._abort_stale_sockets(), name="sockets")
            tasks.create_task(self.health_ports.run(), name="health ports")
            tasks.create_task(self.ports.run(self.tables), name="ports")
            tasks.create_task(self._offer_network(), name="CNI")
            if self.podman is not None:
                tasks.create_task(self.podman.run(), name="podman")
            tasks.create_task(self._settle_pods(), name="pods")
            tasks.create_task(self.flows.run(), name="events")
            tasks.create_task(self._watch_interfaces(), name="interfaces")
            tasks.create_task(self._housekeeping(), name="housekeeping")
            if self.config.drift_check:
                tasks.create_task(self.doctor.run(self.config.drift_check), name="drift check")

    def _cluster_addresses(self) -> ClusterAddresses | None:
        """Where there is an apiserver, choosing addresses is its business."""
        if self.config.kubeconfig is not None:
            return None
        return ClusterAddresses(self.config.service_cidr, self.config.state_dir / "cluster-addresses.json")

    def _dns_server(self) -> DnsServer:
        addresses = self.config.dns_addresses
        own = OwnAddresses(self.config.state_dir)

        def bind() -> list[socket.socket]:
            own.apply(addresses)
            return HeldSockets(self.datapath.cgroup_root).take(addresses, DNS_PORT)

        return DnsServer(
            addresses,
            self.service_names,
            bind=bind,
            ready=lambda: self.all_synced and self.attached_pods.published,
            clients=self._clients,
            requests=self.metrics.dns_requests,
        )

    def _clients(self) -> frozenset[str] | None:
        """Who may ask for names: the pods of this node and the node itself; None while pods are not known."""
        if self._dns_clients is None and self.cni.is_loaded:
            pods = {str(address) for pod in self.cni.pods() for address in pod.addresses}
            self._dns_clients = frozenset(
                pods | self.network.node.every | {*self.config.dns_addresses, "127.0.0.1", "::1"}
            )
        return self._dns_clients

    def dns_of(self, record: Attachment) -> dict[str, Any]:
        """How a pod resolves names, in the words of CNI; empty where waggle does not answer any."""
        versions = {address.version for address in record.ips}
        servers = [text for text in self.config.dns_addresses if ipaddress.ip_address(text).version in versions]
        if not servers:
            return {}
        search = self.service_names.search(record.namespace or DEFAULT_NAMESPACE)
        return {"nameservers": servers, "search": search}

    def _noticed(self) -> None:
        self._times.noticed()
        self.metrics.last_queued.set_to_current_time()
        self._dirty.set()

    async def _plan_when_synced(self, name: str, source: Source) -> None:
        await source.synced.wait()
        self._pending.update(key for key in self.store.services if self._source_of(key) == name)
        self._dirty.set()

    def _source_of(self, key: ObjectKey) -> str:
        """Which source a known Service comes from: the API is one origin of the store, every manifest file is one."""
        return "kubernetes" if self.store.owner("Service", key) == KUBERNETES else "manifests"

    def _in_full_view(self, key: ObjectKey) -> bool:
        """Whether everything there is to know of a Service is known; of one that is not there, whether it is gone."""
        if key not in self.store.services:
            return self.all_synced or bool(self.tables.rows(key))
        return self.sources[self._source_of(key)].synced.is_set()

    @property
    def all_synced(self) -> bool:
        """Every source has given its first full view."""
        return all(source.synced.is_set() for source in self.sources.values())

    @property
    def policies_synced(self) -> bool:
        """Whether all policies are known, and all pods, namespaces and nodes that they are about. Where it is not so,
        what is in force stays, and nothing is opened: a policy would not find those it allows, or not be there itself.
        It may be so no longer, from the moment the first policy comes until the cluster's pods are known."""
        known = all(source.policies_synced.is_set() for source in self.sources.values())
        return known and self.all_synced and self.attached_pods.published

    def learned_names(self) -> list[Learned]:
        """What DNS answers told pods whose policies accept names. Blocking."""
        return list(learned(self.datapath.maps["wag_names"].dump(), time.monotonic()))

    def situation(self) -> Situation:
        """The objects as they are now, for the model to be asked; a copy, that stays as it is in another thread."""
        store, facts, node = self.store, self.context.node, self.network.node
        slices = {key: piece for pieces in store.slices_of.values() for key, piece in pieces.items()}
        serving = {key: pod for key, pod in store.pods.items() if store.owner("Pod", key) != KUBERNETES}
        cluster = Cluster(dict(store.services), slices, serving, dict(store.nodes), dict(store.service_cidrs))
        local_pods = frozenset(str(address) for pod in self.cni.pods() for address in pod.addresses)
        world = PolicyWorld(
            pods=dict(store.pods),
            namespaces=dict(store.namespaces),
            nodes=cluster.nodes,
            policies=dict(store.policies),
            cluster_policies=dict(store.cluster_policies),
            node=facts.name,
            node_addresses=frozenset(node.every),
            told=told(self.learned_names(), self.cni.pods(), self.policies.planner.tables.patterns),
        )
        local = LocalNode(
            facts,
            frozenset(node.every),
            tuple(address for address in (node.ip4, node.ip6) if address),
            self.config.nodeport_addresses,
            local_pods,
            forwarding=self.context.forwarding,
            service_cidr=self.config.service_cidr,
            most_ranges=self.vips.most_ranges,
        )
        return Situation(cluster, world, local, tuple(store.node_policies.values()), self.node_policies.in_force())

    def place_of(self, kind: str, key: ObjectKey) -> tuple[str, int | None]:
        """Where an object comes from: "file:" and a path, or what else the store calls it, and the line in a file."""
        origin = self.store.owner(kind, key) or ""
        line = self.manifests.line_of(kind, key) if self.manifests is not None else None
        return origin, line

    # -- the loop -----------------------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        self._dirty.set()
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            begin = time.monotonic()
            try:
                self.overdue.begin()
                full = await self._pass()
                if not self._addressed.is_set() and self.pod_ranges():
                    self._addressed.set()
                self.overdue.done(in_sync=self.synced)
            except (WaggleError, OSError) as error:
                self.metrics.sync_failures.inc()
                self.last_error = str(error)
                log.error("programming the kernel failed, trying again: %s", error)
                asyncio.get_running_loop().call_later(RETRY_SECONDS, self._dirty.set)
                continue
            self.last_error = ""
            self.last_updated = time.time()
            self.metrics.sync_duration.labels("full" if full else "partial").observe(time.monotonic() - begin)
            self.metrics.last_sync.set(self.last_updated)

    async def _pass(self) -> bool:
        """Brings the tables to what is known. Returns whether every Service was planned for it."""
        begin = time.monotonic()
        if self._pods_due:
            self.attached_pods.publish()
            if self.podman is not None:
                self.podman.notice()
        changes = self.store.take_changes()
        for kind, number in changes.counts.items():
            self.metrics.changes.labels(kind).inc(number)
        self._unwritten += changes.counts
        self.policies.take(changes)
        await self.policies.follow()
        self._times.take(changes.triggers, initial=not self.synced)
        # the others are planned when their source has given its view
        self._pending.update(key for key in changes.services if self._in_full_view(key))
        self._routes_due |= bool(changes.nodes)
        self._ranges_due |= bool(changes.nodes or changes.service_cidrs)
        self._pods_due |= self.config.node_name in changes.pod_nodes
        if changes.nodes:
            self.ranges.claim(ALL_NODES, plan_nodes(self.store.nodes.values()))
        self.service_names.stale |= bool(changes.services)
        full = self._follow_context(bool(changes.nodes))
        self._follow_host_ports()
        self.names.follow(changes)
        complete = self.all_synced
        if self.tables.pending or self.health.pending or self.vips.pending or changes.nodes:
            self.flush()  # nodes, and what the pass before this one could not write
        while self._pending:
            part = [self._pending.pop() for _ in range(min(SLICE, len(self._pending)))]
            for key in part:
                # who waited for a frontend gets it in the same flush: it is never without a Service
                part += self._apply(key)
            self.flush()
            for key in part:
                for seconds in self._times.written(key) if isinstance(key, ObjectKey) else ():
                    self.metrics.programming_duration.observe(seconds)
            if self._pending:
                await asyncio.sleep(0)
        if complete and not self.synced:
            full = True
            self.tables.complete()
            self.ranges.complete()
            self.health.complete()
            self.vips.complete()
            self.maglev.complete()
            self.flush()
            if not self.network.attached:
                await asyncio.to_thread(self.network.attach)
            self.synced = True
            self._sockets_due.set()  # for what happened while no agent was there
            log.info(
                "in sync: %d Services, %d frontends, %d backend records; wrote %d, removed %d; last pass %.0f ms",
                len(self.store.services),
                self.tables.frontend_count,
                self.tables.backend_count,
                self.written.frontends + self.written.backends,
                self.written.deletes,
                (time.monotonic() - begin) * 1000,
            )
        if self._ranges_due and complete:
            self._set_service_ranges()
        if self._routes_due and complete:
            self._routes_due = False
            try:
                await asyncio.to_thread(self.network.follow_routes, list(self.store.nodes.values()), self.pod_ranges())
            except (WaggleError, OSError):
                self._routes_due = True
                raise
        self._unwritten.clear()
        return full

    def _follow_context(self, nodes_changed: bool) -> bool:
        """Plans every Service again when what they all depend on has changed: this node's facts, any node's zone.
        Whether it has."""
        name = self.config.node_name
        context = PlanContext(
            NodeFacts(name, self.store.zones.get(name, "")),
            self.network.node.every,
            Balancing(self.config.balancing),
            Forwarding(self.config.forwarding),
        )
        zones = dict(self.store.zones) if nodes_changed else self._zones
        if (context, zones) != (self.context, self._zones):
            self.context, self._zones = context, zones
            self._ranges_due = True
            self._pending.update(key for key in self.store.services if self._in_full_view(key))
            self._pending |= self.host_ports.keys()
            return True
        return False

    def service_of(self, address: bytes, port: int, protocol: int) -> str:
        """ "namespace/name" of the Service with this frontend, "" for none. NodePorts have no address of their own."""
        for one in (address, ANY4 if is_ipv4(address) else ANY6):
            owner = self.tables.owner(ServiceKey(one, port, protocol, Scope.INTERNAL).pack())
            if isinstance(owner, ObjectKey):
                return str(owner)
        return ""

    def _endpoint_addresses(self, key: ObjectKey) -> set[str]:
        return {endpoint.address for view in view_service(self.store, key, self.context) for endpoint in view.endpoints}

    @property
    def is_behind(self) -> bool:
        """Whether something has changed that the tables do not hold yet."""
        return self._dirty.is_set() or bool(self._pending) or self.tables.pending

    def plan_again(self, keys: Iterable[Owner]) -> None:
        """Has the next pass plan these Services, whether or not they changed."""
        self._pending.update(keys)
        self._dirty.set()

    def _follow_host_ports(self) -> None:
        if not self._pods_due:
            return
        self._pods_due = False
        name = self.config.node_name
        now = node_host_ports(name, self.store.pods_on(name), self.cni.pods())
        self._pending |= changed(self.host_ports, now)
        self.host_ports = now

    def pods_changed(self) -> None:
        """A runtime made or removed a pod. From any thread."""

        def look() -> None:
            self._pods_due = True
            self.policies.pods_changed()
            self._dns_clients = None
            self._dirty.set()

        if self._loop is not None:  # else the first pass looks anyhow
            self._loop.call_soon_threadsafe(look)

    def plan(self, key: Owner) -> list[ServiceRow]:
        """The rows of a Service, or of the host ports of a pod."""
        if isinstance(key, HostPortOwner):
            return plan_host_ports(self.host_ports.get(key), self.context.addresses, held=key.held)
        return plan_service(self.store, key, self.context)

    def _apply(self, key: Owner) -> set[Owner]:
        """Plans a Service, or the host ports of a pod, into the tables. Returns what to plan after it."""
        try:
            rows = self.plan(key)
            health = plan_health(self.store, key, self.context) if isinstance(key, ObjectKey) else {}
        except Exception as error:  # a fault in the rules must cost one Service its change, not the node its agent
            if key not in self.unplanned:
                log.exception("%s cannot be planned", named(key))
            self.unplanned[key] = f"cannot be planned: {type(error).__name__}: {error}"
            return set()
        self.unplanned.pop(key, None)
        if isinstance(key, ObjectKey):
            self._note_remarks(key)
            self.ranges.claim(key, (one for row in rows for one in row.ranges))
            self.maglev.claim(key, (one for row in rows for one in row.tables))
            self.vips.claim(key, plan_vips(self.store.services.get(key)))
            self.health.apply(key, health)
            self.unmet.pop(key, None)
            if unmet := local_policies_unmet(rows):
                self.unmet[key] = unmet
        return self.tables.apply(key, rows)

    def _note_remarks(self, key: ObjectKey) -> None:
        service = self.store.services.get(key)
        self.remarks.pop(key, None)
        if service is None:
            return
        found = ignored_annotations(service)
        if families := open_families(service):
            shown = " and ".join(families)
            found.append(f"loadBalancerSourceRanges hold no {shown} range: those addresses are open to everybody")
        if found:
            self.remarks[key] = found

    def flush(self) -> None:
        """Writes what was planned."""
        self.health.withdraw()
        self.ranges.write()
        self.maglev.write()
        done = self.tables.flush()
        self.ranges.clean()
        self.health.announce()
        self.vips.write()
        self.maglev.clean()
        for table in ("backends", "frontends", "deletes"):
            count = getattr(done, table)
            setattr(self.written, table, getattr(self.written, table) + count)
            if count:
                self.metrics.writes.labels(table).inc(count)
        if done.udp_changed:
            self._sockets_due.set()
        if self.tables.local_changed:
            self.ports.notice()
        if done.deletes and self.tables.starved:
            self._pending |= self.tables.starved  # there may be room now
            self._dirty.set()
        if done.ticket:
            asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._settle, done.ticket)

    def _set_service_ranges(self) -> None:
        """Once every Service is known: before, an address would look free that is not."""
        taken = taken_networks(self.network.node.every, self.store.nodes.values())
        taken |= {cidr: f"this node's pod range {cidr}" for cidr in self.pod_ranges()}
        found = service_ranges(
            self.store.service_cidrs.values(), self.config.service_cidr, taken, self.vips.most_ranges
        )
        self.unenforced = found.problems
        self.vips.set_ranges(plan_ranges(found.networks))
        self.vips.write()
        self._ranges_due = False

    def _settle(self, ticket: int) -> None:
        self.tables.settle(ticket)
        if self.tables.starved:
            self._pending |= self.tables.starved
            self._dirty.set()

    async def _abort_stale_sockets(self) -> None:
        """Follows UDP Services that lose backends: connected sockets must not stay with one that serves no more."""
        missing = await asyncio.to_thread(self.datapath.load_stale_sockets)
        if missing:
            log.warning("connected UDP sockets will stay with backends that serve no more: %s", missing)
            return
        while True:
            await self._sockets_due.wait()
            await asyncio.sleep(SWEEP_SECONDS)
            self._sockets_due.clear()
            places = [str(pod.netns) for pod in self.cni.pods()]
            try:
                with self.metrics.socket_sweeps.time():
                    aborted = await asyncio.to_thread(self.datapath.abort_stale_sockets, places)
                self.metrics.sockets_aborted.inc(aborted)
            except (WaggleError, OSError) as error:
                log.error("aborting stale UDP sockets failed, trying again with the next change: %s", error)

    async def _offer_network(self) -> None:
        """Lets container runtimes find the network, once there are addresses to give."""
        config = self.config
        if config.cni_bin_dir is not None:
            await asyncio.to_thread(cni_install.install_plugin, config.cni_bin_dir)
        if config.cni_conf_dir is None:
            return
        await self._addressed.wait()
        await asyncio.to_thread(cni_install.install_configuration, config.cni_conf_dir, config.api_socket)
        self.network_offered = True
        log.info("container runtimes find the network %s in %s", cni_install.NETWORK, config.cni_conf_dir)

    async def _settle_pods(self) -> None:
        while True:
            await asyncio.sleep(SETTLE_POD_SECONDS)
            await asyncio.to_thread(self.pods.settle)

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            try:
                self.datapath.refresh_lab_cgroup()
            except (WaggleError, OSError) as error:  # no descriptors left, for instance: next time
                log.warning("cannot look for labs: %s", error)
            if self.network.routes_due:
                self._routes_due = True
                self._dirty.set()
            try:
                await asyncio.to_thread(self.network.keep_filters)
            except (WaggleError, OSError) as error:
                log.warning("cannot keep reverse path filters off pods' interfaces: %s", error)
            try:
                if not self.kernel_sweeps:
                    self.kernel_sweeps = await asyncio.to_thread(self.datapath.sweep)
            except (WaggleError, OSError) as error:
                log.warning("cannot sweep the NAT table: %s", error)

    async def _watch_interfaces(self) -> None:
        monitor = Monitor("link", "address", "route")
        changed = asyncio.Event()
        pods: set[int] = set()  # interfaces of pods come and go: no news here

        def readable() -> None:
            for change in monitor.read():
                subject = change.subject
                if isinstance(subject, Link) and is_pod_interface(subject.name):
                    (pods.discard if change.removed else pods.add)(subject.index)
                elif subject is None or (subject.index if isinstance(subject, Link) else subject.ifindex) not in pods:
                    changed.set()

        loop = asyncio.get_running_loop()
        loop.add_reader(monitor.fileno(), readable)
        try:
            while True:
                await changed.wait()
                await asyncio.sleep(0.05)  # news come in bursts
                changed.clear()
                try:
                    await asyncio.to_thread(self.network.follow)
                except (WaggleError, OSError) as error:
                    log.error("interfaces changed, but: %s", error)
                self._dns_clients = None
                self.health_ports.notice()
                # the kernel dropped our routes together with the interface or address they went through
                self._routes_due = True
                self._dirty.set()
        finally:
            loop.remove_reader(monitor.fileno())
            monitor.close()

    # -- facts --------------------------------------------------------------------------------------------------

    @property
    def is_leaving(self) -> bool:
        """Whether this node is being deleted, as far as its Node object says."""
        return is_leaving(self._own_node)

    @property
    def _own_node(self) -> Node | None:
        return self.store.nodes.get(ObjectKey("", self.config.node_name))

    @property
    def changes_pending(self) -> Counter[str]:
        """Changes that are not in the tables, by kind of object."""
        return self._unwritten + self.store.pending

    def pod_ranges(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """This node's pod address ranges: configured, or those of its Node object; empty when unknown."""
        if self.config.pod_cidr:
            return [ipaddress.ip_network(cidr) for cidr in self.config.pod_cidr]
        return pod_cidrs(self._own_node) if self._own_node is not None else []

    def problems(self) -> list[Problem]:
        """Everything that is wrong now, from every part."""
        found = [problem for source in self.sources.values() for problem in source.problems()]
        found += self.cni.problems()
        found += self.attached_pods.problems()
        if self.podman is not None:
            found += self.podman.problems()
        if self.dns is not None:
            found += self.dns.problems()
        if self.config.cni_conf_dir:
            found += self._network_problems(self.config.cni_conf_dir)
        found += self.health_ports.problems()
        found += [Problem(named(key), reason) for key, reason in self.tables.problems.items()]
        found += [Problem(named(key), reason) for key, reason in self.tables.overlaps().items()]
        found += [Problem(named(key), reason) for key, reason in self.unplanned.items()]
        found += [Problem(named(key), text) for key, texts in self.remarks.items() for text in texts]
        for owner, ports in self.host_ports.items():
            found += [Problem(named(owner), reason) for reason in faults(ports, self.context.addresses)]
        found += self.policies.problems()
        found += self.ports.problems()
        found += self.flows.problems()
        if self.ranges.problem:
            found.append(Problem("source ranges", self.ranges.problem))
        if self.vips.problem and not self.tables.starved:  # those have the same cause, and a name
            found.append(Problem("Service addresses", self.vips.problem))
        found += [Problem(f"Service range {cidr}", reason) for cidr, reason in self.unenforced.items()]
        found += [Problem(f"uplink {name}", reason) for name, reason in self.datapath.xdp_problems.items()]
        if self.maglev.problem:
            found.append(Problem("Maglev tables", self.maglev.problem))
        found += self.network.problems(self._own_node, self.pod_ranges())
        for name, source in self.sources.items():
            if not source.synced.is_set():
                found.append(Problem(f"source {name}", "has not given its first full view yet"))
            elif not source.policies_synced.is_set():
                found.append(Problem(f"source {name}", "does not know all policies, or all pods they are about, yet"))
        if self.last_error:
            found.append(Problem("kernel", self.last_error))
        if self.doctor.failed:
            found.append(Problem("drift", self.doctor.failed))
        return found

    def _network_problems(self, conf_dir: Path) -> list[Problem]:
        if not self.network_offered:
            return [Problem("CNI", "no pod range (podCIDR) is known for this node yet: runtimes have no network")]
        return cni_install.problems(conf_dir)

    @property
    def problem_count(self) -> int:
        return len(self.problems())

    def status(self) -> dict[str, Any]:
        """The node at a glance; what `waggle status -o json` prints."""
        return {
            "node": self.config.node_name,
            "started": self.started,
            "synced": self.synced,
            "addresses": {"ipv4": self.network.node.ip4, "ipv6": self.network.node.ip6},
            "devices": [name for name, _ in self.network.devices],
            "tunnels": self.network.tunnels(),
            "dns": list(self.dns.addresses) if self.dns is not None and self.dns.listening else [],
            "podRanges": [str(cidr) for cidr in self.pod_ranges()],
            "cgroupRoot": str(self.datapath.cgroup_root),
            "bpfRoot": str(self.config.bpf_root),
            "sources": {
                name: {"synced": source.synced.is_set(), "policiesSynced": source.policies_synced.is_set()}
                for name, source in self.sources.items()
            },
            "counts": {
                "services": len(self.store.services),
                "endpointSlices": len(self.store.slices),
                "policies": len(self.store.policies) + len(self.store.cluster_policies) + len(self.store.node_policies),
                "pods": len(self.cni.pods()),
                "nodes": len(self.store.nodes),
                "frontends": self.tables.frontend_count,
                "backends": self.tables.backend_count,
            },
            "mapMemoryBytes": sum(self.datapath.map_memory().values()),
            "problems": [
                {"subject": p.subject, "reason": p.reason, "file": p.file, "line": p.line, "since": p.since}
                for p in self.problems()
            ],
        }
