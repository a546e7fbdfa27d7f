"""The agent of one node.

Start: take the node (lock), load programs around the pinned maps, read the tables back, put programs on their hooks,
answer CNI requests, start the sources. Nothing is removed from a table before every source has given its first full
view, so a start in the middle of traffic changes nothing that is right. Afterwards every change is one pass: changed
keys → plan → writes.

The data path does not need this process. Ending it, however, leaves everything in place.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from waggle.config import AgentConfig
from waggle.errors import KernelError, WaggleError
from waggle.kernel import probe
from waggle.kernel.netlink import Monitor, Netlink
from waggle.kernel.netns import call_in_netns, netns_cookie_of_self
from waggle.metrics import Metrics
from waggle.model.interface import PodInterface
from waggle.model.objects import ObjectKey
from waggle.observe.events import EventReader
from waggle.observe.names import Names
from waggle.plan.services import plan_service
from waggle.reconcile.datapath import Datapath, NodeAddresses, node_addresses, uplinks
from waggle.reconcile.routes import PodRoute, pod_cidrs, sync_routes, wanted_routes
from waggle.reconcile.services import Flush, ServiceTables
from waggle.sources.cni import CniService
from waggle.sources.kubernetes import KubernetesSource
from waggle.sources.manifests import ManifestSource
from waggle.sources.problem import Problem
from waggle.store import Store

log = logging.getLogger(__name__)

SLICE = 1000  # Services planned and written before other work gets its turn
SETTLE_SECONDS = 0.25  # no packet is on its way through a program that long
EVENT_POLL_SECONDS = 0.1
HOUSEKEEPING_SECONDS = 5.0
RETRY_SECONDS = 1.0


class Source(Protocol):
    """Where objects come from."""

    synced: asyncio.Event

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
        self.node = NodeAddresses("", "", frozenset())
        self.devices: list[tuple[str, int]] = []
        self.sources: dict[str, Source] = {}
        self.synced = False
        self.last_error = ""
        self.unrouted: dict[PodRoute, str] = {}
        self._dirty = asyncio.Event()
        self._pending: set[ObjectKey] = set()
        self._routes_due = True
        self._netlink = Netlink()
        self.tables: ServiceTables
        self.events: EventReader
        self.cni = CniService(
            state_dir=config.state_dir, ranges=self.pod_ranges, mtu=self.mtu, datapath=_NamedPods(self)
        )
        self.names = Names(self.store, self.cni.pods)

    # -- start and end ------------------------------------------------------------------------------------------

    def take_node(self) -> None:
        """Checks the machine and locks the node. Raises WaggleError with what is missing or who has it."""
        probe.mount_bpffs()
        probe.require()
        self.datapath.lock()

    def start_datapath(self) -> None:
        """Puts the programs on the node, around what is pinned. Blocking; `take_node` must have been called."""
        begin = time.monotonic()
        self.node = node_addresses(self.config.node_ip, self._netlink)
        self.devices = uplinks(self.config.devices, self.node, self._netlink)
        enable_forwarding()
        self.datapath.load(self.node)
        self.tables = ServiceTables(self.datapath.maps["wag_services"], self.datapath.maps["wag_backends"])
        found = self.tables.adopt()
        self.datapath.set_node_addresses(self.node.every)
        self.datapath.attach_sockets()
        self.datapath.attach_devices(self.devices)
        self.cni.load()
        self._restore_pods()
        self.events = EventReader(self.datapath.maps["wag_events_rb"], self.names)
        self.names.by_netns[netns_cookie_of_self()] = f"node {self.config.node_name}"
        log.info(
            "data path ready in %.0f ms: node %s, addresses %s, uplinks %s, %d frontends and %d pods taken over",
            (time.monotonic() - begin) * 1000,
            self.config.node_name,
            ", ".join(a for a in (self.node.ip4, self.node.ip6) if a) or "none",
            ", ".join(name for name, _ in self.devices) or "none",
            found,
            len(self.cni.pods()),
        )

    def _restore_pods(self) -> None:
        present = {link.index for link in self._netlink.links()}
        pods = [pod for pod in self.cni.pods() if pod.host_ifindex in present]
        self.datapath.forget_missing_pods(pods)
        for pod in pods:
            try:
                self.datapath.attach(pod)
                self.name_pod(pod)
            except KernelError as error:
                log.warning("pod %s/%s (%s): %s", pod.namespace, pod.name, pod.host_ifname, error)

    def name_pod(self, pod: PodInterface) -> None:
        """Learns which pod a network namespace is, for events of its sockets."""
        self.names.stale = True
        try:
            cookie = call_in_netns(pod.netns, netns_cookie_of_self)
        except WaggleError:
            return  # the namespace is going away: its events stay without a name
        self.names.by_netns[cookie] = f"pod {pod.namespace or 'default'}/{pod.name or pod.container_id[:12]}"

    async def run(self, ready: Callable[[], Awaitable[None]]) -> None:
        """Runs until cancelled; `take_node` must have been called. `ready` is awaited when the data path stands.

        The sources begin to list while the programs load: most of the one is waiting for the network, most of the
        other is the kernel's work.
        """
        self.store.on_change = self._dirty.set
        if self.config.manifests is not None:
            self.sources["manifests"] = ManifestSource(self.store, self.config.manifests)
        if self.config.kubeconfig is not None:
            self.sources["kubernetes"] = KubernetesSource(
                self.store, self.config.kubeconfig, self.config.kubernetes_netns
            )
        async with asyncio.TaskGroup() as tasks:
            for name, source in self.sources.items():
                tasks.create_task(source.run(), name=f"source {name}")
            await asyncio.to_thread(self.start_datapath)
            await ready()
            tasks.create_task(self._wait_for_sources(), name="sync")
            tasks.create_task(self._reconcile(), name="reconcile")
            tasks.create_task(self._poll_events(), name="events")
            tasks.create_task(self._watch_interfaces(), name="interfaces")
            tasks.create_task(self._housekeeping(), name="housekeeping")

    async def _wait_for_sources(self) -> None:
        for source in self.sources.values():
            await source.synced.wait()
        self._pending.update(self.store.services)
        self.synced = True
        self._dirty.set()

    # -- the loop -----------------------------------------------------------------------------------------------

    async def _reconcile(self) -> None:
        first = True
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if not self.synced:
                self.store.take_changes()  # the first pass plans everything anyhow
                continue
            begin = time.monotonic()
            try:
                wrote = await self._pass(first)
            except (WaggleError, OSError) as error:
                self.metrics.sync_failures.inc()
                self.last_error = str(error)
                log.error("programming the kernel failed, trying again: %s", error)
                asyncio.get_running_loop().call_later(RETRY_SECONDS, self._dirty.set)
                continue
            self.last_error = ""
            self.metrics.sync_duration.observe(time.monotonic() - begin)
            self.metrics.last_sync.set_to_current_time()
            if first:
                log.info(
                    "in sync: %d Services, %d frontends, %d backend records; wrote %d, removed %d in %.0f ms",
                    len(self.store.services),
                    self.tables.frontend_count,
                    self.tables.backend_count,
                    wrote.frontends + wrote.backends,
                    wrote.deletes,
                    (time.monotonic() - begin) * 1000,
                )
                first = False

    async def _pass(self, first: bool) -> Flush:
        changes = self.store.take_changes()
        self._pending |= changes.services
        self._routes_due |= bool(changes.nodes)
        self.names.stale = True
        total = Flush()
        if self.tables.pending:
            self._flush(total)  # what the pass before this one could not write
        while self._pending:
            part = [self._pending.pop() for _ in range(min(SLICE, len(self._pending)))]
            for key in part:
                # who waited for a frontend gets it in the same flush: it is never without a Service
                part += self.tables.apply(key, plan_service(self.store, key))
            self._flush(total)
            if self._pending:
                await asyncio.sleep(0)
        if first:
            self.tables.complete()
            self._flush(total)
        if self._routes_due:
            self._routes_due = False
            try:
                await self._sync_routes()
            except (WaggleError, OSError):
                self._routes_due = True
                raise
        return total

    def _flush(self, total: Flush) -> None:
        done = self.tables.flush()
        for table in ("backends", "frontends", "deletes"):
            count = getattr(done, table)
            setattr(total, table, getattr(total, table) + count)
            if count:
                self.metrics.writes.labels(table).inc(count)
        if done.deletes and self.tables.starved:
            self._pending |= self.tables.starved  # there may be room now
            self._dirty.set()
        if done.ticket:
            asyncio.get_running_loop().call_later(SETTLE_SECONDS, self._settle, done.ticket)

    def _settle(self, ticket: int) -> None:
        self.tables.settle(ticket)
        if self.tables.starved:
            self._pending |= self.tables.starved
            self._dirty.set()

    async def _sync_routes(self) -> None:
        wanted = wanted_routes(self.store.nodes.values(), self.config.node_name)
        failed = await asyncio.to_thread(sync_routes, wanted, self._netlink)
        for route, reason in failed.items():
            if route not in self.unrouted:
                log.warning("no route to pods %s: %s", route.dst, reason)
        self.unrouted = failed

    async def _poll_events(self) -> None:
        while True:
            await asyncio.sleep(EVENT_POLL_SECONDS)
            self.events.poll()

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            self.datapath.refresh_lab_cgroup()

    async def _watch_interfaces(self) -> None:
        monitor = Monitor("link", "address", "route")
        changed = asyncio.Event()

        def readable() -> None:
            for change in monitor.read():
                name = getattr(change.subject, "name", "")
                if not name.startswith("wag"):  # pods come and go; their interfaces are no news here
                    changed.set()

        loop = asyncio.get_running_loop()
        loop.add_reader(monitor.fileno(), readable)
        try:
            while True:
                await changed.wait()
                await asyncio.sleep(0.05)  # news come in bursts
                changed.clear()
                try:
                    await asyncio.to_thread(self._refresh_node)
                except WaggleError as error:
                    log.error("interfaces changed, but: %s", error)
        finally:
            loop.remove_reader(monitor.fileno())
            monitor.close()

    def _refresh_node(self) -> None:
        node = node_addresses(self.config.node_ip, self._netlink)
        devices = uplinks(self.config.devices, node, self._netlink)
        if (node.ip4, node.ip6) != (self.node.ip4, self.node.ip6):
            log.info("node addresses are now %s: loading the programs again", (node.ip4, node.ip6))
            self.datapath.load(node)
            self.datapath.attach_sockets()
            self.devices = []
            self._restore_pods()
        if self.datapath.set_node_addresses(node.every):
            self._routes_due = True
        if devices != self.devices:
            log.info("uplinks are now %s", ", ".join(name for name, _ in devices) or "none")
            self.datapath.attach_devices(devices)
        self.node, self.devices = node, devices

    # -- facts --------------------------------------------------------------------------------------------------

    def pod_ranges(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """This node's pod address ranges: configured, or those of its Node object; empty when unknown."""
        if self.config.pod_cidr:
            return [ipaddress.ip_network(cidr) for cidr in self.config.pod_cidr]
        node = self.store.nodes.get(ObjectKey("", self.config.node_name))
        return pod_cidrs(node) if node is not None else []

    def mtu(self) -> int:
        """MTU for pods: the smallest of the uplinks, 1500 without any."""
        names = {name for name, _ in self.devices}
        return min((link.mtu for link in self._netlink.links() if link.name in names), default=1500)

    def problems(self) -> list[Problem]:
        """Everything that is wrong now, from every part."""
        found = [problem for source in self.sources.values() for problem in source.problems()]
        found += self.cni.problems()
        found += [Problem(f"Service {key}", reason) for key, reason in self.tables.problems.items()]
        found += [Problem(f"pod range {route.dst}", reason) for route, reason in self.unrouted.items()]
        for name, source in self.sources.items():
            if not source.synced.is_set():
                found.append(Problem(f"source {name}", "has not given its first full view yet"))
        if self.last_error:
            found.append(Problem("kernel", self.last_error))
        return found

    @property
    def problem_count(self) -> int:
        return len(self.problems())

    def status(self) -> dict[str, Any]:
        """The node at a glance; what `waggle status -o json` prints."""
        return {
            "node": self.config.node_name,
            "started": self.started,
            "synced": self.synced,
            "addresses": {"ipv4": self.node.ip4, "ipv6": self.node.ip6},
            "devices": [name for name, _ in self.devices],
            "podRanges": [str(cidr) for cidr in self.pod_ranges()],
            "cgroupRoot": str(self.datapath.cgroup_root),
            "bpfRoot": str(self.config.bpf_root),
            "sources": {name: {"synced": source.synced.is_set()} for name, source in self.sources.items()},
            "counts": {
                "services": len(self.store.services),
                "endpointSlices": len(self.store.slices),
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


class _NamedPods:
    """The data path for the CNI service: pods that are attached also get their name for events."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def attach(self, pod: PodInterface) -> None:
        self._agent.datapath.attach(pod)
        self._agent.name_pod(pod)

    def detach(self, pod: PodInterface) -> None:
        self._agent.datapath.detach(pod)
        self._agent.names.stale = True


def enable_forwarding() -> None:
    """Turns on IP forwarding where it is off: without it the kernel's routes are not asked for pods' packets."""
    for setting in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        path = Path("/proc/sys") / setting
        try:
            if path.read_text().strip() != "1":
                path.write_text("1")
                log.info("set %s = 1", setting.replace("/", "."))
        except FileNotFoundError:
            log.warning("%s does not exist: this family is off in the kernel", setting)
        except OSError as error:
            raise KernelError(f"cannot set {setting.replace('/', '.')}: {error.strerror}", error.errno or 0) from error
