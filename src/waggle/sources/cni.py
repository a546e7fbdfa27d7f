"""Pods as container runtimes make them: the agent's half of the CNI plugin.

`CniService.handle` gets what the plugin got and gives back what the plugin prints. Promises:

- An address is on disk before the interface that carries it exists, and stays there until the interface is gone. So
  it is never handed out twice, whenever the agent is killed.
- ADD may be repeated: it finds what is left of the earlier attempt, keeps its addresses and completes it. DEL may be
  repeated, and comes for containers that are unknown or whose namespace is gone: it succeeds.
- Requests for one interface follow each other, also when the runtime gave up waiting for the first; others run in
  parallel. A request that was begun is finished even if its plugin has gone.

Everything that blocks runs in worker threads; `handle`, `pods` and `problems` belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from waggle.errors import CniError, KernelError, NotFound, WaggleError
from waggle.kernel.netlink import IPNetwork, Netlink
from waggle.kernel.netns import open_netns
from waggle.model.workload import Workload
from waggle.sources import cni_bandwidth, cni_chain, cni_interface
from waggle.sources import cni_request as codes
from waggle.sources.cni_pods import PodDatapath, PodInterface, pod_interface
from waggle.sources.cni_records import Attachment, AttachmentRecords, boot_id, host_ifname, new_attachment
from waggle.sources.cni_request import CniRequest, encode_error, parse_request, split_body, version_asked
from waggle.sources.cni_result import add_result, faults_of_result, passed_on
from waggle.sources.ipam import IPAddress, Ipam, RangeFull
from waggle.sources.problem import Problem

__all__ = ["CniService", "PodDatapath", "PodInterface"]

logger = logging.getLogger(__name__)

_WORKERS = 4  # the kernel's rtnl lock lets one of them change interfaces at a time


class CniService:
    """One per agent. `load` comes before everything else, and after the node's lock is held: only one agent may
    change the records."""

    def __init__(
        self,
        *,
        state_dir: Path,
        ranges: Callable[[], Sequence[IPNetwork]],
        datapath: PodDatapath,
        mtu: Callable[[], int] = lambda: 0,
        learned: Callable[[], None] = lambda: None,
        dns: Callable[[Attachment], Mapping[str, Any]] = lambda _: {},
        host_netns: Path | None = None,
    ) -> None:
        """`ranges` gives the node's pod ranges as known now, `mtu` the size for a new interface (0: the kernel's
        default), `dns` the result's field of that name; both are called in worker threads. `learned` is called after
        a `learn` that told something new. `host_netns` is where host sides are made; None is the agent's own namespace.
        """
        self._ranges = ranges
        self._datapath = datapath
        self._mtu = mtu
        self._learned = learned
        self._dns = dns
        self._host = Netlink(host_netns)
        self._host_netns = host_netns or Path("/proc/thread-self/ns/net")
        self._store = AttachmentRecords(state_dir / "cni")
        self._ipam = Ipam(state_dir / "cni" / "rotation.json")
        self._boot = boot_id()
        self._loaded = False
        self._records: dict[str, Attachment] = {}  # by name of the host side
        self._interfaces: dict[str, PodInterface] = {}  # those whose host side exists
        self._state_lock = threading.Lock()  # of the two dicts above
        self._problems: dict[str, Problem] = {}
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._running: set[asyncio.Task[tuple[int, bytes]]] = set()
        self._workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="cni")

    # -- what is recorded

    @property
    def is_loaded(self) -> bool:
        """Whether `load` is done: before, no pod is known."""
        return self._loaded

    def pods(self) -> list[PodInterface]:
        """Pods whose interface exists, as recorded. At start, attaching each of them again is right and harmless."""
        with self._state_lock:
            return list(self._interfaces.values())

    def attachments(self) -> list[Attachment]:
        """The records of interfaces that exist, the oldest first."""
        with self._state_lock:
            return sorted((self._records[name] for name in self._interfaces), key=lambda one: one.created)

    async def learn(self, name: str, workload: Workload) -> None:
        """Record what the runtime says of the container behind host interface `name`; a pod that has gone is no error.

        Raises CniError where the disk refuses.
        """
        if await self._in_turn(name, self._learn, name, workload):
            self._learned()

    def problems(self) -> list[Problem]:
        """Records without an interface, interfaces without a record, and records that cannot be read."""
        return list(self._problems.values())

    def load(self) -> None:
        """Read what earlier agents recorded (blocking). Raises CniError where the disk refuses, KernelError."""
        self._ipam.load()
        records, unreadable = self._store.load()
        links = cni_interface.host_interfaces(self._host)
        links |= cni_chain.host_sides(self._host, (record for record in records.values() if record.chained_to))
        for name, record in records.items():
            if name not in links and record.boot != self._boot:
                logger.info("%s ended with the machine's last run: its addresses are free", record)
                self._store.remove(name)
                continue
            for address in self._ipam.occupy(name, record.ips):
                self._report(name, f"address {address} of {record} is recorded for another interface too")
            self._records[name] = record
            if name in links:
                self._interfaces[name] = pod_interface(record, links[name].index)
            else:
                self._report(name, f"interface of {record} is gone; its addresses stay reserved until DEL or GC")
        for name, reason in unreadable.items():
            if name in links:
                self._report(name, f"unreadable record, its interface stays until DEL or GC: {reason}")
            else:
                logger.warning("removing an unreadable record without an interface: %s", reason)
                self._store.remove(name)
        # Where a record was lost, the kernel still knows which addresses are in use.
        for name, addresses in cni_interface.routed_addresses(self._host).items():
            if name not in self._records:
                self._ipam.occupy(name, addresses)
                if name not in self._problems:
                    self._report(name, "interface without a record; it stays until DEL or GC")
        self._loaded = True

    def _report(self, name: str, reason: str) -> None:
        logger.warning("%s: %s", name, reason)
        self._problems[name] = Problem(name, reason)

    # -- requests

    async def handle(self, body: bytes) -> tuple[int, bytes]:
        """(HTTP status, JSON for the plugin's standard output) for what the plugin sent. Never raises CniError."""
        task = asyncio.create_task(self._handle(body))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Let the requests under way finish; no `handle` after this."""
        while self._running:
            await asyncio.wait(self._running)
        self._workers.shutdown()
        self._host.close()

    async def _handle(self, body: bytes) -> tuple[int, bytes]:
        began = time.perf_counter()
        environment: dict[str, str] = {}
        configuration = b""
        try:
            if len(body) > codes.MAX_REQUEST_BYTES:
                raise CniError(codes.INVALID_CONFIG, f"a request of {len(body)} bytes is too large")
            environment, configuration = split_body(body)
            request = parse_request(environment, configuration)
            if not self._loaded:
                raise CniError(codes.TRY_AGAIN_LATER, "the agent is starting")
            answer = await self._dispatch(request)
        except Exception as error:
            failure = _as_cni_error(error)
            command = environment.get("CNI_COMMAND", "?")
            known = command if command in ("ADD", "DEL", "CHECK", "GC", "STATUS") else "?"
            logger.warning("CNI %s failed with code %d: %s", known, failure.code, failure)
            version = version_asked(configuration)
            return _status_of(failure.code), encode_error(version, failure.code, str(failure), failure.details)
        milliseconds = (time.perf_counter() - began) * 1000
        logger.info("CNI %s %s %s: %.1f ms", request.command, request.container_id, request.ifname, milliseconds)
        return 200, answer

    async def _dispatch(self, request: CniRequest) -> bytes:
        match request.command:
            case "VERSION":
                versions = {"cniVersion": request.version, "supportedVersions": codes.SUPPORTED_VERSIONS}
                return msgspec.json.encode(versions)
            case "STATUS":
                self._status(tuple(self._ranges()))
                return b""
            case "GC":
                await self._collect_garbage(request)
                return b""
        name = host_ifname(request.container_id, request.ifname)
        match request.command:
            case "ADD":
                return msgspec.json.encode(await self._in_turn(name, self._add, request, tuple(self._ranges())))
            case "DEL":
                await self._in_turn(name, self._remove, name, tuple(self._ranges()))
            case "CHECK":
                await self._in_turn(name, self._check, request)
        return b""

    async def _in_turn(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        turn = self._turns.setdefault(name, asyncio.Lock())
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._workers, function, *arguments)

    # -- ADD

    def _add(self, request: CniRequest, ranges: Sequence[IPNetwork]) -> dict[str, Any]:
        name = host_ifname(request.container_id, request.ifname)
        with self._state_lock:
            earlier = self._records.get(name)
        with ExitStack() as stack:
            try:
                netns_fd = stack.enter_context(open_netns(request.netns))
            except NotFound as error:
                self._remove(name, ranges)  # code 3 tells the runtime that nothing needs to be cleaned up
                raise CniError(codes.UNKNOWN_CONTAINER, f"CNI_NETNS: {error}") from error
            except KernelError as error:
                raise CniError(codes.INVALID_ENVIRONMENT, f"CNI_NETNS: {error}") from error
            self._refuse_own_netns(request, netns_fd)
            addresses = cni_chain.addresses_made_before(request)
            if earlier is not None and bool(earlier.chained_to) != (addresses is not None):
                logger.info("ADD again for %s: another chain than before", earlier)
                self._remove(name, ranges)
                earlier = None
            if addresses is not None:
                self._take_over(request, earlier, addresses, netns_fd, ranges)
                self._problems.pop(name, None)
                return passed_on(request)
            if earlier is not None and self._is_complete(earlier, request, netns_fd):
                record = earlier
                self._attach(record)
            else:
                record = self._make(request, earlier, ranges, netns_fd)
            link = self._host.link_by_name(name)
        self._problems.pop(name, None)
        return add_result(request, record, link.mtu, self._dns(record))

    def _refuse_own_netns(self, request: CniRequest, netns_fd: int) -> None:
        # A default route for a "pod" in the node's namespace would take the node off its network.
        if os.path.samestat(os.fstat(netns_fd), self._host_netns.stat()):
            raise CniError(codes.INVALID_ENVIRONMENT, f"CNI_NETNS: {request.netns} is the node's own namespace")

    def _is_complete(self, record: Attachment, request: CniRequest, netns_fd: int) -> bool:
        with self._state_lock:
            known = record.host_ifname in self._interfaces
        if not known or record.netns != request.netns or record.network != request.network:
            return False
        was = (record.host_ports, record.labels, record.uid, record.bandwidth)
        if was != (request.host_ports, request.labels, request.uid, request.bandwidth):
            return False
        faults = cni_interface.faults_of_interface(self._host, record, netns_fd, default_routes=())
        if faults:
            logger.info("ADD again for %s: made anew, because %s", record, "; ".join(faults))
        return not faults

    def _make(
        self, request: CniRequest, earlier: Attachment | None, ranges: Sequence[IPNetwork], netns_fd: int
    ) -> Attachment:
        name = host_ifname(request.container_id, request.ifname)
        if earlier is None and not ranges and not self._ipam.owned_by(name):
            raise CniError(codes.TRY_AGAIN_LATER, "no pod range (podCIDR) is known for this node yet")
        try:
            addresses = earlier.ips if earlier else self._ipam.reserve(name, ranges)
        except RangeFull as error:
            raise CniError(codes.NO_FREE_ADDRESS, str(error)) from error
        record = self._new_attachment(request, addresses)
        try:
            self._store.write(record)
        except CniError:
            if earlier is None:
                self._ipam.release(name, unused=True)
            raise
        with self._state_lock:
            self._records[name] = record
            replaced = self._interfaces.pop(name, None)
        try:
            if earlier is not None:
                self._datapath.detach(replaced or pod_interface(earlier, 0))
            index = cni_interface.create_interface(self._host, record, netns_fd, self._mtu())
            cni_bandwidth.limit_interface(self._host, record, index, netns_fd)
            with self._state_lock:
                self._interfaces[name] = pod_interface(record, index)
            self._attach(record)
        except Exception:
            self._remove_after_failure(name, ranges)
            raise
        return record

    def _attach(self, record: Attachment) -> None:
        with self._state_lock:
            interface = self._interfaces[record.host_ifname]
        self._datapath.attach(interface)

    def _take_over(
        self,
        request: CniRequest,
        earlier: Attachment | None,
        addresses: tuple[IPAddress, ...],
        netns_fd: int,
        ranges: Sequence[IPNetwork],
    ) -> None:
        """An interface that an earlier plugin of the chain made. Its addresses are that plugin's to choose, and are
        only kept from being given to others."""
        name = host_ifname(request.container_id, request.ifname)
        host_side, pod_side = cni_chain.find_pair(self._host, request, netns_fd)
        taken = self._ipam.occupy(name, addresses)
        if taken:
            if earlier is None:
                self._ipam.release(name)
            raise CniError(codes.INVALID_CONFIG, f"prevResult.ips: another pod of this node has {taken[0]}")
        record = msgspec.structs.replace(
            self._new_attachment(request, addresses),
            host_mac=host_side.mac,
            pod_mac=pod_side.mac,
            chained_to=host_side.name,
        )
        self._store.write(record)
        with self._state_lock:
            replaced = self._interfaces.get(name)
        if replaced is not None and replaced.host_ifindex != host_side.index:
            self._datapath.detach(replaced)
        with self._state_lock:
            self._records[name] = record
            self._interfaces[name] = pod_interface(record, host_side.index)
        try:
            cni_bandwidth.limit_interface(self._host, record, host_side.index, netns_fd)
            self._attach(record)
        except Exception:
            self._remove_after_failure(name, ranges)
            raise

    def _new_attachment(self, request: CniRequest, addresses: tuple[IPAddress, ...]) -> Attachment:
        return new_attachment(
            request.container_id,
            request.ifname,
            request.network,
            request.netns,
            addresses,
            request.host_ports,
            request.labels,
            request.bandwidth,
            boot=self._boot,
            namespace=request.namespace,
            name=request.pod_name,
            uid=request.uid,
        )

    def _remove_after_failure(self, name: str, ranges: Sequence[IPNetwork]) -> None:
        try:
            self._remove(name, ranges)
        except (WaggleError, OSError) as error:
            # The failure that led here is the one to report. The record stays, and DEL comes after a failed ADD.
            logger.warning("%s: cannot clean up after a failed ADD: %s", name, error)

    def _learn(self, name: str, workload: Workload) -> bool:
        with self._state_lock:
            record = self._records.get(name)
        if record is None or record.workload == workload:
            return False
        record = msgspec.structs.replace(record, workload=workload)
        self._store.write(record)
        with self._state_lock:
            self._records[name] = record
        return True

    # -- DEL

    def _remove(self, name: str, ranges: Sequence[IPNetwork]) -> None:
        """Everything of this host side that exists: in the data path, in the kernel, on disk. In this order, so that
        an address is free only when nothing carries it."""
        with self._state_lock:
            record = self._records.get(name)
            # first: what is no longer in `pods` nobody attaches again meanwhile
            interface = self._interfaces.pop(name, None)
        try:
            if record is not None:
                self._datapath.detach(interface or pod_interface(record, 0))
            if record is None or not record.chained_to:  # else it is removed by who made it
                cni_interface.remove_interface(self._host, name)
        except Exception:
            with self._state_lock:
                if interface is not None:
                    self._interfaces[name] = interface
            raise
        if self._ipam.owned_by(name):
            try:
                self._ipam.save_order(name, ranges)
            except OSError as error:  # a full disk must not keep pods from being deleted
                logger.warning("cannot write the order of address reuse: %s", error)
        self._store.remove(name)
        with self._state_lock:
            self._records.pop(name, None)
        self._ipam.release(name)
        self._problems.pop(name, None)

    # -- CHECK

    def _check(self, request: CniRequest) -> None:
        name = host_ifname(request.container_id, request.ifname)
        with self._state_lock:
            record = self._records.get(name)
        if record is None:
            if name in cni_interface.host_interfaces(self._host):
                raise CniError(codes.CHECK_FAILED, f"interface {name} exists, but its record is lost")
            raise CniError(codes.UNKNOWN_CONTAINER, f"container {request.container_id} has no {request.ifname} here")
        faults, default_routes = faults_of_result(request.prev_result or {}, record)
        try:
            with open_netns(request.netns) as netns_fd:
                if record.chained_to:
                    faults += cni_chain.faults_of_chained(self._host, record, netns_fd)
                else:
                    faults += cni_interface.faults_of_interface(
                        self._host, record, netns_fd, default_routes=default_routes
                    )
        except NotFound as error:
            faults.append(str(error))
        if faults:
            raise CniError(codes.CHECK_FAILED, f"{record}: {faults[0]}", "; ".join(faults))

    # -- STATUS, GC

    def _status(self, ranges: Sequence[IPNetwork]) -> None:
        if not ranges:
            raise CniError(codes.NOT_AVAILABLE, "no pod range (podCIDR) is known for this node yet")
        reason = self._ipam.full(ranges)
        if reason:
            raise CniError(codes.NOT_AVAILABLE, reason)

    async def _collect_garbage(self, request: CniRequest) -> None:
        """Remove what belongs to no valid attachment: recorded ones of this network, and interfaces nobody recorded.
        Goes on after a failure and reports the failures together."""
        valid = {host_ifname(container_id, ifname) for container_id, ifname in request.valid_attachments}
        loop = asyncio.get_running_loop()
        links = await loop.run_in_executor(self._workers, cni_interface.host_interfaces, self._host)
        with self._state_lock:  # after the links: whatever has an interface had a record before it
            records = dict(self._records)
        garbage = [name for name, record in records.items() if record.network == request.network]
        garbage += [name for name in links if name not in records]
        ranges = tuple(self._ranges())
        failures: list[str] = []
        for name in garbage:
            if name in valid:
                continue
            logger.info("GC removes %s", records.get(name, name))
            try:
                await self._in_turn(name, self._remove, name, ranges)
            except WaggleError as error:
                failures.append(f"{name}: {error}")
        if failures:
            message = f"{len(failures)} attachments could not be removed: {failures[0]}"
            raise CniError(codes.KERNEL_REFUSED, message, "; ".join(failures))


def _as_cni_error(error: Exception) -> CniError:
    if isinstance(error, CniError):
        return error
    if isinstance(error, WaggleError):
        return CniError(codes.KERNEL_REFUSED, str(error), "; ".join(getattr(error, "__notes__", ())))
    # The plugin must get an answer in the specification's form whatever goes wrong here.
    logger.error("CNI request failed unexpectedly", exc_info=error)
    return CniError(codes.INTERNAL_ERROR, f"{type(error).__name__}: {error}")


def _status_of(code: int) -> int:
    if code in (codes.TRY_AGAIN_LATER, codes.NOT_AVAILABLE):
        return 503
    return 400 if code < 100 else 500
