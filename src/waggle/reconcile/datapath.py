"""The programs on their hooks, the endpoint table, and the pins that keep both alive without the agent.

Pins below the bpf root: maps/ (every map by name), links/ (cgroup-<program>, dev-<interface>-<direction>,
pod-<interface>-<direction>). Starting is the same whether something is there or not: maps are taken over, programs are
replaced by atomic link updates, links of interfaces that are gone are removed.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import logging
import os
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from waggle.abi._generated import CONFIG_LAYOUT, EndpointFlag, EventsOf, Netns, NetnsId, PolicyRequest, Uplink
from waggle.abi._generated import Endpoint as EndpointValue
from waggle.abi.address import is_ipv4, pack_address, pack_network, unpack_address
from waggle.config import MAX_NON_MASQUERADE, AgentConfig
from waggle.errors import AlreadyRunning, KernelError, MissingFeature, NotFound
from waggle.kernel import links, maps, syscall
from waggle.kernel.cgroup import cgroup2_mount, cgroup_id
from waggle.kernel.iterators import Iterator
from waggle.kernel.links import AttachType
from waggle.kernel.maps import Map, map_of_program, open_pinned, program_at_work
from waggle.kernel.netlink import Batch, Netlink
from waggle.kernel.netns import netns_cookie_of_self
from waggle.kernel.objects import BpfObject, load_pinned
from waggle.kernel.probe import on_bpffs
from waggle.kernel.syscall import Fd
from waggle.kernel.testrun import run_syscall
from waggle.model.interface import PodInterface
from waggle.reconcile.drift import Drift
from waggle.reconcile.forwarding import drop_filter
from waggle.reconcile.maglev import MaglevTables
from waggle.reconcile.nat_table import copy_missing, nat_entries, start_sweeping, tables_at_work, young_flows
from waggle.reconcile.uplinks import TUNNELS, xdp_uplinks

log = logging.getLogger(__name__)

T = TypeVar("T")

OBJECTS = ("socket", "pod", "node")
SWEEP_SECONDS = 10
LAB_CGROUP = "waggle-lab"
SNAT_PORTS = (32768, 60999)
EVENT_INTERVAL_NS = 1_000_000_000

CGROUP_HOOKS = {
    "wag_connect4": AttachType.CGROUP_INET4_CONNECT,
    "wag_connect6": AttachType.CGROUP_INET6_CONNECT,
    "wag_sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "wag_sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "wag_recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "wag_recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "wag_getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "wag_getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
    "wag_bind4": AttachType.CGROUP_INET4_BIND,
    "wag_bind6": AttachType.CGROUP_INET6_BIND,
}
POD_HOOKS = {
    "egress": ("wag_pod_egress", AttachType.TCX_INGRESS),
    "ingress": ("wag_pod_ingress", AttachType.TCX_EGRESS),
}
DEVICE_HOOKS = {
    "ingress": ("wag_node_ingress", AttachType.TCX_INGRESS),
    "egress": ("wag_node_egress", AttachType.TCX_EGRESS),
}
XDP_FLAGS = {"native": links.XDP_DRV_MODE, "generic": links.XDP_SKB_MODE}


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """What SNAT uses as source (one per family, "" for none) and every address that is this node's own."""

    ip4: str
    ip6: str
    every: frozenset[str]

    @property
    def snat(self) -> tuple[str, ...]:
        """Those that SNAT uses."""
        return tuple(address for address in (self.ip4, self.ip6) if address)


class Datapath:
    """Loads and attaches; afterwards the only writer of wag_endpoints."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.cgroup_root = config.cgroup_root or cgroup2_mount()
        self.map_dir = config.bpf_root / "maps"
        self.link_dir = config.bpf_root / "links"
        self.maps: dict[str, Map] = {}
        self._programs: dict[str, Fd] = {}
        self._lock_fd: Fd | None = None
        self._endpoint_lock = threading.Lock()
        self._node: NodeAddresses | None = None
        self._lab_id = -1
        self.beside_proxy = False  # flows of another proxy are under way; counts from the next `load` on
        self.nat_size = 0  # entries of the NAT table
        self.knew_no_policies = False  # whoever had the node before `load`
        self._nat_tables: list[Map] = []  # those of the programs that were at work before
        self._xdp_refused: dict[str, str] = {}  # why XDP is not on an uplink
        self._xdp_rests: dict[str, str] = {}  # why it is there and leaves everything to tc
        self._stale_sockets: Iterator | None = None
        self._cookies: dict[str, int] = {}  # of pods' network namespaces, by host interface
        # what wag_endpoints and wag_netns should hold, nat_used apart: (whose it is, value) by key
        self._endpoints: dict[bytes, tuple[str, EndpointValue]] = {}
        #: sets of policies (ingress, egress) of a pod's packed address; whoever changes them uses `assign_policies`
        self.policies_of: Callable[[bytes], tuple[int, int]] = lambda _: (0, 0)
        self._netns: dict[bytes, tuple[str, Netns]] = {}

    # -- ownership ----------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Takes this node. AlreadyRunning when another agent has it, here or under another bpf root."""
        if not on_bpffs(self.config.bpf_root):
            raise MissingFeature(
                f"bpf-root: {self.config.bpf_root} is not on bpffs: choose a directory below /sys/fs/bpf"
            )
        self._refuse_foreign_programs()
        try:
            for directory in (self.config.bpf_root, self.map_dir, self.link_dir):
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MissingFeature(
                f"bpf-root: cannot create {self.config.bpf_root} ({error.strerror}): is bpffs mounted there?"
            ) from error
        fd = Fd(os.open(self.config.bpf_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            fcntl.flock(fd.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(f"another waggle agent runs with bpf-root {self.config.bpf_root}") from error
        self._lock_fd = fd

    def _refuse_foreign_programs(self) -> None:
        """Socket programs of waggle on our cgroup that are not behind our pins belong to another agent."""
        mine = set()
        for program in CGROUP_HOOKS:
            try:
                with syscall.obj_get(self.link_dir / f"cgroup-{program}") as link:
                    mine.add(syscall.link_prog_id(link.number))
            except NotFound:
                continue
            except KernelError as error:
                if error.errno != errno.EISDIR:  # no pin: `attach` puts one there
                    raise
        with self._open_cgroup() as cgroup:
            for hook in CGROUP_HOOKS.values():
                for number, name in links.query_programs(cgroup.number, hook):
                    if name.startswith("wag_") and number not in mine:
                        raise AlreadyRunning(
                            f"{self.cgroup_root} already runs waggle's program {name} (id {number}), which is not "
                            f"pinned under {self.config.bpf_root}: stop the other agent and run `waggle cleanup` "
                            "with its bpf-root"
                        )

    def _open_cgroup(self) -> Fd:
        try:
            cgroup = Fd(os.open(self.cgroup_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise MissingFeature(f"cgroup-root: cannot open {self.cgroup_root}: {error.strerror}") from error
        if not (self.cgroup_root / "cgroup.controllers").exists():
            raise MissingFeature(f"cgroup-root: {self.cgroup_root} is not a directory of cgroup2")
        return cgroup

    # -- programs -----------------------------------------------------------------------------------------------

    def load(self, node: NodeAddresses) -> None:
        """Loads the programs for a node with these addresses, taking over pinned maps. Attaches nothing yet."""
        self._nat_tables = tables_at_work(self.link_dir)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.nat_size = self.config.max_nat or nat_entries(memory, open_pinned(self.map_dir / "wag_nat"))
        self._constants = self._constants_for(node)
        self.knew_no_policies = not (self.map_dir / "wag_policy_state").exists()
        for name in (*OBJECTS, "xdp") if self.config.xdp != "none" else OBJECTS:
            with BpfObject.open(name) as bpf:
                bpf.configure(CONFIG_LAYOUT[name], self._constants)
                self.maps.update(load_pinned(bpf, self.map_dir, self._sizes()))
                self._programs.update(bpf.programs)

    def _constants_for(self, node: NodeAddresses) -> dict[str, bytes]:
        return {
            "wag_node_ip4": pack_address(node.ip4) if node.ip4 else bytes(16),
            "wag_node_ip6": pack_address(node.ip6) if node.ip6 else bytes(16),
            "wag_host_cookie": netns_cookie_of_self().to_bytes(8, "little"),
            "wag_events": bytes([EventsOf[self.config.flow_events.upper()]]),
            "wag_loopback_nodeport": bytes([serves_nodeports("127.0.0.1", self.config.nodeport_addresses, ())]),
            "wag_snat_min": SNAT_PORTS[0].to_bytes(2, "little"),
            "wag_snat_max": SNAT_PORTS[1].to_bytes(2, "little"),
            "wag_young_flows": young_flows(self.nat_size).to_bytes(4, "little"),
            "wag_tcp_seconds": self.config.nat_tcp_timeout.to_bytes(4, "little"),
            "wag_udp_seconds": self.config.nat_udp_timeout.to_bytes(4, "little"),
            "wag_sweep_seconds": SWEEP_SECONDS.to_bytes(4, "little"),
            "wag_masquerade": bytes([self.config.masquerade]),
            "wag_non_masquerade": pack_networks(self.config.non_masquerade),
            "wag_beside_proxy": bytes([self.beside_proxy]),
            "wag_names_share": max(16, self.config.max_policy_names // 4).to_bytes(4, "little"),
            "wag_event_ns": EVENT_INTERVAL_NS.to_bytes(8, "little"),
            "wag_event_gap_ns": (10**9 // self.config.event_rate).to_bytes(8, "little"),
        }

    def start_sweeping(self) -> bool:
        """Starts the kernel's own sweep over the NAT table, or gives it the code of this version.

        False where it does not, as on a kernel without work queues for BPF (before v6.10): `sweep` has to be called
        every SWEEP_SECONDS.
        """
        for wanted in ({"wag_sweep_start", "wag_sweep_now"}, {"wag_sweep_now"}):
            with BpfObject.open("sweep") as bpf:
                bpf.configure(CONFIG_LAYOUT["sweep"], self._constants)
                bpf.autoload(wanted)
                try:
                    self.maps.update(load_pinned(bpf, self.map_dir, self._sizes()))
                except KernelError as error:
                    if len(wanted) == 1:
                        raise
                    log.info("no sweep of the kernel's own over the NAT table: %s", error)
                    continue
                self._programs.update(bpf.programs)
            if "wag_sweep_start" in wanted:
                failed = start_sweeping(self._programs["wag_sweep_start"])
                if not failed:
                    return True
                log.warning("the kernel's own sweep over the NAT table does not start yet: %s", os.strerror(-failed))
                return False
        return False

    def sweep(self) -> bool:
        """Takes flows out of the NAT table whose time is over. True where the kernel goes on by itself from now on.
        Blocking."""
        run_syscall(self._programs["wag_sweep_now"], bytes(8))
        return "wag_sweep_start" in self._programs and not start_sweeping(self._programs["wag_sweep_start"])

    def _sizes(self) -> dict[str, int]:
        return {
            "wag_services": self.config.max_services,
            "wag_vips": self.config.max_services,
            "wag_backends": self.config.max_backends,
            "wag_nat": self.nat_size,
            "wag_nat_young": young_flows(self.nat_size),
            "wag_conns": self.config.max_policy_flows,
            "wag_names": self.config.max_policy_names,
        }

    def load_health(self) -> dict[str, Map]:
        """The tables that waggle-health answers from, by name."""
        with BpfObject.open("health") as bpf:
            maps = load_pinned(bpf, self.map_dir, {})
        self.maps.update(maps)
        return maps

    def maglev_tables(self) -> MaglevTables:
        """Loads the program that fills Maglev tables."""
        with BpfObject.open("maglev") as bpf:
            found = load_pinned(bpf, self.map_dir, self._sizes())
            return MaglevTables(self.maps["wag_maglev"], found["wag_maglev_work"], bpf.programs["wag_maglev_fill"])

    def load_stale_sockets(self) -> str:
        """Loads the iterator that aborts connected UDP sockets whose backend is gone. What is in the way, or "".

        Blocking. A kernel without it (bpf_sock_destroy, in v6.5) serves everything else.
        """
        try:
            with BpfObject.open("stale") as bpf:
                load_pinned(bpf, self.map_dir, self._sizes())
                self._stale_sockets = Iterator(bpf.programs["wag_stale_udp"])
        except KernelError as error:
            return str(error)
        return ""

    def abort_stale_sockets(self, netns: Iterable[str]) -> int:
        """Runs it over this namespace and those at `netns`; one that is gone has no sockets. How many it aborted.
        Blocking."""
        if self._stale_sockets is None:
            return 0
        aborted = self._stale_sockets.run()
        for path in netns:
            try:
                aborted += self._stale_sockets.run(path)
            except KernelError as error:
                log.debug("sockets of %s: %s", path, error)  # it is going away; the others must not wait for it
        return aborted

    def is_at_work(self) -> bool:
        """Whether programs of an agent are on their hooks."""
        return any(self.link_dir.glob("*")) if self.link_dir.is_dir() else False

    def serves_from_tables(self) -> bool:
        """Whether the programs at work use the frontend table that is pinned; also where none are at work.

        Not so where that table had another layout and was replaced: the programs go on with the one they know, and
        must not be replaced before the new one is full. An agent killed in between finds out the same way.
        """
        at_work = map_of_program(program_at_work(self.link_dir / "cgroup-wag_connect4"), "wag_services")
        return at_work is None or at_work.info.id == self.maps["wag_services"].info.id

    def attach_sockets(self) -> None:
        """Socket-level load balancing for every process below the cgroup root."""
        with self._open_cgroup() as cgroup:
            number = cgroup_id(self.cgroup_root)
            for program, hook in CGROUP_HOOKS.items():
                pin = self.link_dir / f"cgroup-{program}"
                links.attach(self._programs[program].number, cgroup.number, hook, pin, expect=number)
        self.refresh_lab_cgroup()

    def refresh_lab_cgroup(self) -> None:
        """Tells the socket programs which cgroup holds labs (they are other clusters); cheap enough to poll."""
        try:
            number = cgroup_id(self.cgroup_root / LAB_CGROUP) if self.cgroup_root == cgroup2_mount() else 0
        except FileNotFoundError:
            number = 0
        if number != self._lab_id:
            self.maps["wag_lab_cgroup"].update(bytes(4), number.to_bytes(8, "little"))
            self._lab_id = number

    def take_over_flows(self) -> None:
        """Where the NAT table was replaced: what the programs wrote into the last one until the new ones were at work.
        To be called when all are attached. Blocking."""
        for table in self._nat_tables:
            if table.info.id != self.maps["wag_nat"].info.id:
                copied = copy_missing(table, self.maps["wag_nat"])
                log.info("took over %d entries of the NAT table that was at work before", copied)
        self._nat_tables = []

    def attach_devices(self, devices: Iterable[tuple[str, int]]) -> None:
        """Puts the node programs on uplinks and tunnels (name, ifindex) and takes them off all others."""
        wanted = dict(devices)
        self._follow_renames(wanted)
        for name in wanted.keys() & TUNNELS.values():
            drop_filter(name)
        for name, ifindex in wanted.items():
            for direction, (program, hook) in DEVICE_HOOKS.items():
                pin = self.link_dir / f"dev-{pin_name(name)}-{direction}"
                links.attach(self._programs[program].number, ifindex, hook, pin)
        keep = {f"dev-{pin_name(name)}-{direction}" for name in wanted for direction in DEVICE_HOOKS}
        keep |= {self._xdp_pin(name).name for name in wanted if self._takes_xdp(name)}
        for pin in self.link_dir.glob("dev-*"):
            if pin.name not in keep:
                links.detach(pin)
        self._xdp_refused = {}
        for name, ifindex in wanted.items():
            if self._takes_xdp(name):
                self._attach_xdp(name, ifindex)
        self.follow_uplinks(wanted.items())

    def _takes_xdp(self, name: str) -> bool:
        """XDP belongs on network cards; what comes out of a tunnel is a packet of the kernel already."""
        return self.config.xdp != "none" and name not in TUNNELS.values()

    def _xdp_pin(self, name: str) -> Path:
        """The mode is part of the name: one that changes is another link."""
        return self.link_dir / f"dev-{pin_name(name)}-xdp{self.config.xdp}"

    def _attach_xdp(self, name: str, ifindex: int) -> None:
        """Without XDP an uplink works too, only slower: what is in the way is a problem and no failure."""
        program = self._programs["wag_xdp_uplink"].number
        try:
            links.attach(program, ifindex, AttachType.XDP, self._xdp_pin(name), flags=XDP_FLAGS[self.config.xdp])
        except KernelError as error:
            hint = {
                errno.EOPNOTSUPP: f"its driver has no {self.config.xdp} XDP: set xdp to generic or none",
                errno.EBUSY: "another XDP program is there: `ip link show` names it",
                errno.EINVAL: "the driver refuses, often for an MTU above a page or for queues: see `dmesg`",
            }.get(error.errno, str(error))
            self._xdp_refused[name] = f"no XDP, tc does all the work: {hint}"

    @property
    def xdp_problems(self) -> dict[str, str]:
        """Why XDP does nothing on an uplink, by its name."""
        return self._xdp_rests | self._xdp_refused

    def follow_uplinks(self, devices: Iterable[tuple[str, int]]) -> None:
        """Tells the XDP program where it works, and under which addresses. Elsewhere it leaves all to tc."""
        table = self.maps["wag_uplinks"]
        macs: dict[int, bytes] = {}
        self._xdp_rests = {}
        if self.config.xdp != "none":
            with Netlink() as host:
                cards = [(name, index) for name, index in devices if self._takes_xdp(name)]
                macs, self._xdp_rests = xdp_uplinks(cards, host.links())
        wanted = {index.to_bytes(4, "little"): Uplink(mac).pack() for index, mac in macs.items()}
        for key, _ in table.dump():
            if key not in wanted:
                table.delete(key)
        table.update_many(wanted.items())

    def runs_on(self, devices: Iterable[tuple[str, int]]) -> bool:
        """Whether the node programs are on these uplinks. One that went and came back has none, whatever its index."""
        for name, ifindex in devices:
            pins = [self.link_dir / f"dev-{pin_name(name)}-{direction}" for direction in DEVICE_HOOKS]
            if self._takes_xdp(name) and name not in self._xdp_refused:
                pins.append(self._xdp_pin(name))
            for pin in pins:
                try:
                    with syscall.obj_get(pin) as link:
                        if links.link_target(link.number) != ifindex:
                            return False
                except KernelError:
                    return False
        return True

    def _follow_renames(self, wanted: dict[str, int]) -> None:
        """Links of an interface that got a new name get it too: the kernel takes no program twice on one hook."""
        names = {ifindex: name for name, ifindex in wanted.items()}
        for pin in sorted(self.link_dir.glob("dev-*")):
            try:
                with syscall.obj_get(pin) as link:
                    name = names.get(links.link_target(link.number))
            except KernelError:
                continue  # no link: `attach` or the end of `attach_devices` deals with it
            if name is None:
                continue
            renamed = self.link_dir / f"dev-{pin_name(name)}-{pin.name.rpartition('-')[2]}"
            if renamed != pin:
                maps.unpin(renamed)
                pin.rename(renamed)

    # -- pods ---------------------------------------------------------------------------------------------------

    def attach(self, pod: PodInterface, *, quickly: bool = False) -> None:
        """Programs on the pod's host-side interface, then its addresses in the endpoint table. Idempotent.

        Attaching to tcx waits for a grace period of RCU each time, 10 to 30 ms, and nobody changes an interface of the
        machine meanwhile. `quickly`: by a clsact queue, until this is called again without. Not where the interface
        is another plugin's, whose queues are its own.
        """
        drop_filter(pod.host_ifname)
        ours = not pod.chained
        with Netlink() as host:
            batch = Batch()
            if quickly and ours:
                egress, ingress = ((name, self._programs[name].number) for name, _ in POD_HOOKS.values())
                batch.run_programs(pod.host_ifindex, ingress=egress, egress=ingress)
            else:
                for direction, (program, hook) in POD_HOOKS.items():
                    pin = self.link_dir / f"pod-{pod.host_ifname}-{direction}"
                    links.attach(self._programs[program].number, pod.host_ifindex, hook, pin)
                if ours:
                    batch.stop_programs(pod.host_ifindex)
            host.run(batch)
            self.set_pod(pod, host.link_by_index(pod.host_ifindex).peer_netnsid)

    def set_pod(self, pod: PodInterface, netns: int | None) -> None:
        """Makes a pod's addresses known. `netns`: id of its network namespace, as the node's sees it."""
        value = EndpointValue(
            pod.host_ifindex,
            int(EndpointFlag.POD | EndpointFlag.QUEUED if pod.bandwidth.to_pod else EndpointFlag.POD),
            bytes.fromhex(pod.pod_mac.replace(":", "")),
            bytes.fromhex(pod.host_mac.replace(":", "")),
            0,
            int(NetnsId.UNKNOWN) if netns is None else netns,
            0,
            0,
        )
        with self._endpoint_lock:
            for address in pod.addresses:
                self._write_endpoint(pack_address(str(address)), pod_title(pod), value)

    def detach(self, pod: PodInterface) -> None:
        """Takes everything of a pod away. Idempotent."""
        with self._endpoint_lock:
            endpoints = self.maps["wag_endpoints"]
            for address in pod.addresses:
                key = pack_address(str(address))
                raw = endpoints.lookup(key)
                # the address may belong to a newer pod already
                if raw is not None and EndpointValue.unpack(raw).ifindex == pod.host_ifindex:
                    endpoints.delete(key)
                if key in self._endpoints and self._endpoints[key][1].ifindex == pod.host_ifindex:
                    del self._endpoints[key]
            cookie = self._cookies.pop(pod.host_ifname, None)
            if cookie is not None:
                netns = cookie.to_bytes(8, "little")
                self.maps["wag_netns"].delete(netns)
                self._netns.pop(netns, None)
        for direction in POD_HOOKS:
            links.detach(self.link_dir / f"pod-{pod.host_ifname}-{direction}")

    def set_netns(self, cookie: int, addresses: Iterable[str], host_ifname: str = "") -> None:
        """What a network namespace's sockets will have as their address: a pod's, or, without an interface, the node's.

        Of several addresses of one family the first counts.
        """
        chosen = {False: bytes(16), True: bytes(16)}
        for address in reversed(list(addresses)):
            packed = pack_address(address)
            chosen[is_ipv4(packed)] = packed
        key, value = cookie.to_bytes(8, "little"), Netns(chosen[True], chosen[False])
        with self._endpoint_lock:
            self.maps["wag_netns"].update(key, value.pack())
            self._cookies[host_ifname] = cookie
            self._netns[key] = (f"interface {host_ifname}" if host_ifname else "node", value)

    def forget_missing_netns(self) -> None:
        """Removes namespaces that were not set since the start."""
        known = {cookie.to_bytes(8, "little") for cookie in self._cookies.values()}
        self.maps["wag_netns"].delete_many([key for key, _ in self.maps["wag_netns"].dump() if key not in known])

    def forget_missing_pods(self, pods: Iterable[PodInterface]) -> None:
        """Removes endpoints and pins of pods that are not among `pods` (they went while the agent was away)."""
        pods = list(pods)
        known = {pack_address(str(address)) for pod in pods for address in pod.addresses}
        with self._endpoint_lock:
            for key, raw in self.maps["wag_endpoints"].dump():
                if EndpointValue.unpack(raw).flags & EndpointFlag.POD and key not in known:
                    self.maps["wag_endpoints"].delete(key)
        keep = {f"pod-{pod.host_ifname}-{direction}" for pod in pods for direction in POD_HOOKS}
        for pin in self.link_dir.glob("pod-*"):
            if pin.name not in keep:
                links.detach(pin)

    # -- the node's own addresses -------------------------------------------------------------------------------

    def set_node_addresses(self, node: NodeAddresses) -> None:
        """Makes these the node's addresses in the endpoint table, and those that its sockets will have."""
        if node == self._node:
            return
        wanted = {pack_address(address) for address in node.every}
        with self._endpoint_lock:
            for key, raw in self.maps["wag_endpoints"].dump():
                if EndpointValue.unpack(raw).flags & EndpointFlag.NODE and key not in wanted:
                    self.maps["wag_endpoints"].delete(key)
                    self._endpoints.pop(key, None)
            for address in node.every:
                flags = int(EndpointFlag.NODE)
                if serves_nodeports(address, self.config.nodeport_addresses, (node.ip4, node.ip6)):
                    flags |= EndpointFlag.NODEPORT
                value = EndpointValue(0, flags, bytes(6), bytes(6), 0, NetnsId.NODE, 0, 0)
                self._write_endpoint(pack_address(address), "node", value)
        self.set_netns(netns_cookie_of_self(), [address for address in (node.ip4, node.ip6) if address])
        self._node = node

    def serves_nodeports_at(self, address: str) -> bool:
        """Whether an address of the node serves NodePorts; loopback addresses do for processes of the node."""
        if ipaddress.ip_address(address).is_loopback:
            return serves_nodeports("127.0.0.1", self.config.nodeport_addresses, ())
        node = self._node
        return (
            node is not None
            and address in node.every
            and serves_nodeports(address, self.config.nodeport_addresses, (node.ip4, node.ip6))
        )

    def _write_endpoint(self, key: bytes, owner: str, value: EndpointValue) -> None:
        """Writes an endpoint unless it is there; keeps nat_used, which only programs write. A pod has the policies that
        `policies_of` says from its first packet on."""
        self._endpoints[key] = owner, value
        if value.flags & EndpointFlag.POD:
            ingress, egress = self.policies_of(key)
            value = value._replace(ingress_policy=ingress, egress_policy=egress)
        endpoints = self.maps["wag_endpoints"]
        raw = endpoints.lookup(key)
        if raw is not None:
            current = EndpointValue.unpack(raw)
            if current._replace(nat_used=0) == value:
                return
            value = value._replace(nat_used=current.nat_used)
        elif next(self.maps["wag_nat"].keys(), None) is not None:
            value = value._replace(nat_used=1)  # it may have been here before, and have flows
        endpoints.update(key, value.pack())

    def load_policy_assignment(self) -> None:
        """Loads the program that gives a pod's address its policies."""
        with BpfObject.open("policy") as bpf:
            load_pinned(bpf, self.map_dir, self._sizes())
            self._programs.update(bpf.programs)

    def assign_policies(self, addresses: Iterable[str] | None = None) -> None:
        """Gives addresses of pods, or all of them, the policies that `policies_of` says. In place: programs write to
        these entries too."""
        with self._endpoint_lock:
            pods = {key for key, (_, value) in self._endpoints.items() if value.flags & EndpointFlag.POD}
            for key in pods if addresses is None else pods & set(map(pack_address, addresses)):
                request = PolicyRequest(key, *self.policies_of(key))
                run_syscall(self._programs["wag_policy_assign"], request.pack())

    def policies_in_force(self) -> dict[bytes, tuple[int, int]]:
        """Sets of policies (ingress, egress) by packed address, of all pods."""
        found = ((key, EndpointValue.unpack(raw)) for key, raw in self.maps["wag_endpoints"].dump())
        return {key: (v.ingress_policy, v.egress_policy) for key, v in found if v.flags & EndpointFlag.POD}

    def check_endpoints(self, pods: Iterable[PodInterface], *, repair: bool) -> tuple[int, list[Drift]]:
        """How many entries of wag_endpoints and wag_netns were looked at, and those that were not as they should be.

        `pods` are all that are known: what belongs to one of them is never taken for nobody's, though its programs
        could not be attached. Blocking; call it when everything was attached that can be.
        """
        known = {pack_address(str(address)) for pod in pods for address in pod.addresses}
        with self._endpoint_lock:
            endpoints, netns = self.maps["wag_endpoints"], self.maps["wag_netns"]
            found = {key: _place(EndpointValue.unpack(raw)) for key, raw in endpoints.dump()}
            drifts = [
                Drift("wag_endpoints", *wrong) for wrong in _compare(found, self._endpoints, known, unpack_address)
            ]
            spaces = {key: Netns.unpack(raw) for key, raw in netns.dump()}
            drifts += [
                Drift("wag_netns", *wrong)
                for wrong in _compare(spaces, self._netns, set(), lambda k: f"cookie {int.from_bytes(k, 'little')}")
            ]
            for drift in drifts if repair else ():
                if drift.table == "wag_netns":
                    if drift.key in self._netns:
                        netns.update(drift.key, self._netns[drift.key][1].pack())
                    else:
                        netns.delete(drift.key)
                elif drift.key in self._endpoints:
                    self._write_endpoint(drift.key, *self._endpoints[drift.key])
                else:
                    endpoints.delete(drift.key)
            return len(found.keys() | self._endpoints) + len(spaces.keys() | self._netns), drifts

    def map_memory(self) -> dict[str, int]:
        """Bytes of kernel memory by map."""
        return {name: item.memory_bytes() for name, item in self.maps.items()}


def _place(value: EndpointValue) -> EndpointValue:
    """What of an endpoint is this class's to say."""
    return value._replace(nat_used=0, ingress_policy=0, egress_policy=0)


def _compare(
    found: Mapping[bytes, T],
    wanted: Mapping[bytes, tuple[str, T]],
    known: Container[bytes],
    name: Callable[[bytes], str],
) -> list[tuple[str, str, str, bytes]]:
    """(whose, entry, what is wrong, key) of every entry that is not as wanted."""
    wrong = []
    for key, (owner, value) in wanted.items():
        if key not in found:
            wrong.append((owner, name(key), "is missing", key))
        elif found[key] != value:
            wrong.append((owner, name(key), f"is {found[key]} instead of {value}", key))
    nobodys = [key for key in found.keys() - wanted.keys() if key not in known]
    return wrong + [("", name(key), "nobody has it", key) for key in sorted(nobodys)]


def pod_title(pod: PodInterface) -> str:
    """ "pod default/web-1"; by its container where the runtime did not say."""
    return f"pod {pod.namespace or 'default'}/{pod.name or pod.container_id[:12]}"


def pack_networks(networks: tuple[str, ...]) -> bytes:
    """struct wag_networks."""
    return len(networks).to_bytes(8, "little") + b"".join(pack_network(network) for network in networks).ljust(
        32 * MAX_NON_MASQUERADE, b"\0"
    )


def serves_nodeports(address: str, allowed: Iterable[str], primary: Iterable[str]) -> bool:
    """Whether an address of the node serves NodePorts (semantics.md section 3): all do where nothing is said."""
    allowed = tuple(allowed)
    if "primary" in allowed:
        return address in primary
    return not allowed or any(ipaddress.ip_address(address) in ipaddress.ip_network(network) for network in allowed)


def nodeport_addresses(allowed: Iterable[str], node: NodeAddresses) -> list[str]:
    """Where this node listens on behalf of Services: "*" for everywhere, or those of its addresses that serve
    NodePorts."""
    allowed = tuple(allowed)
    if not allowed:
        return ["*"]
    every = sorted({*node.every, "127.0.0.1", "::1"})
    return [address for address in every if serves_nodeports(address, allowed, (node.ip4, node.ip6))]


def pin_name(device: str) -> str:
    """A file name on bpffs for an interface name: bpffs refuses dots, which VLAN interfaces have."""
    return device.replace(".", ":")


def node_addresses(config_ips: Iterable[str], netlink: Netlink, without: Container[str] = ()) -> NodeAddresses:
    """The node's addresses now: those configured for SNAT, or the first of the default route's interface. `without`:
    addresses that are waggle's own."""
    interfaces = {link.index: link.name for link in netlink.links()}
    defaults = netlink.default_route_devices()
    every: dict[str, str] = {}
    for address in netlink.addresses():
        special = address.ip.is_loopback or address.ip.is_link_local or address.ip.is_multicast
        if not special and str(address.ip) not in without:
            every[str(address.ip)] = interfaces.get(address.ifindex, "")
    chosen = {4: "", 6: ""}
    for text in config_ips:
        chosen[ipaddress.ip_address(text).version] = text
    for prefer_default in (True, False):
        for text, device in every.items():
            version = 4 if is_ipv4(pack_address(text)) else 6
            if not chosen[version] and (device in defaults or (not prefer_default and not config_ips)):
                chosen[version] = text
    return NodeAddresses(chosen[4], chosen[6], frozenset(every))
