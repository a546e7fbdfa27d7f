"""The programs on their hooks, the endpoint table, and the pins that keep both alive without the agent.

Pins below the bpf root: maps/ (every map by name), links/ (cgroup-<program>, dev-<interface>-<direction>,
pod-<interface>-<direction>). Starting is the same whether something is there or not: maps are taken over, programs are
replaced by atomic link updates, links of interfaces that are gone are removed.
"""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from waggle.abi._generated import CONFIG_LAYOUT, EndpointFlag
from waggle.abi._generated import Endpoint as EndpointValue
from waggle.abi.address import is_ipv4, pack_address
from waggle.config import AgentConfig
from waggle.errors import AlreadyRunning, KernelError, MissingFeature, NotFound
from waggle.kernel import links, syscall
from waggle.kernel.cgroup import cgroup2_mount, cgroup_id
from waggle.kernel.links import AttachType
from waggle.kernel.maps import Map
from waggle.kernel.netlink import Netlink
from waggle.kernel.netns import netns_cookie_of_self
from waggle.kernel.objects import BpfObject, load_pinned
from waggle.kernel.syscall import Fd
from waggle.model.interface import PodInterface

log = logging.getLogger(__name__)

OBJECTS = ("socket", "pod", "node")
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
}
POD_HOOKS = {
    "egress": ("wag_pod_egress", AttachType.TCX_INGRESS),
    "ingress": ("wag_pod_ingress", AttachType.TCX_EGRESS),
}
DEVICE_HOOKS = {
    "ingress": ("wag_node_ingress", AttachType.TCX_INGRESS),
    "egress": ("wag_node_egress", AttachType.TCX_EGRESS),
}


@dataclass(frozen=True, slots=True)
class NodeAddresses:
    """What SNAT uses as source (one per family, "" for none) and every address that is this node's own."""

    ip4: str
    ip6: str
    every: frozenset[str]


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
        self._node_addresses: frozenset[str] = frozenset()
        self._lab_id = -1

    # -- ownership ----------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Takes this node. AlreadyRunning when another agent has it, here or under another bpf root."""
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
        self._refuse_foreign_programs()

    def _refuse_foreign_programs(self) -> None:
        """Socket programs of waggle on our cgroup that are not behind our pins belong to another agent."""
        mine = set()
        for program in CGROUP_HOOKS:
            try:
                with syscall.obj_get(self.link_dir / f"cgroup-{program}") as link:
                    mine.add(syscall.link_prog_id(link.number))
            except NotFound:
                continue
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
            return Fd(os.open(self.cgroup_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise MissingFeature(f"cgroup-root: cannot open {self.cgroup_root}: {error.strerror}") from error

    # -- programs -----------------------------------------------------------------------------------------------

    def load(self, node: NodeAddresses) -> None:
        """Loads the programs for a node with these addresses, taking over pinned maps. Attaches nothing yet."""
        constants = {
            "wag_node_ip4": pack_address(node.ip4) if node.ip4 else bytes(16),
            "wag_node_ip6": pack_address(node.ip6) if node.ip6 else bytes(16),
            "wag_host_cookie": netns_cookie_of_self().to_bytes(8, "little"),
            "wag_events": bytes([self.config.events]),
            "wag_snat_min": SNAT_PORTS[0].to_bytes(2, "little"),
            "wag_snat_max": SNAT_PORTS[1].to_bytes(2, "little"),
            "wag_event_ns": EVENT_INTERVAL_NS.to_bytes(8, "little"),
        }
        sizes = {
            "wag_services": self.config.max_services,
            "wag_backends": self.config.max_backends,
            "wag_nat": self.config.max_nat,
        }
        for name in OBJECTS:
            with BpfObject.open(name) as bpf:
                bpf.configure(CONFIG_LAYOUT[name], constants)
                self.maps.update(load_pinned(bpf, self.map_dir, sizes))
                self._programs.update(bpf.programs)

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

    def attach_devices(self, devices: Iterable[tuple[str, int]]) -> None:
        """Puts the node programs on uplinks (name, ifindex) and takes them off all others."""
        wanted = dict(devices)
        for name, ifindex in wanted.items():
            for direction, (program, hook) in DEVICE_HOOKS.items():
                pin = self.link_dir / f"dev-{pin_name(name)}-{direction}"
                links.attach(self._programs[program].number, ifindex, hook, pin)
        keep = {f"dev-{pin_name(name)}-{direction}" for name in wanted for direction in DEVICE_HOOKS}
        for pin in self.link_dir.glob("dev-*"):
            if pin.name not in keep:
                links.detach(pin)

    # -- pods ---------------------------------------------------------------------------------------------------

    def attach(self, pod: PodInterface) -> None:
        """Programs on the pod's host-side interface, then its addresses in the endpoint table. Idempotent."""
        for direction, (program, hook) in POD_HOOKS.items():
            pin = self.link_dir / f"pod-{pod.host_ifname}-{direction}"
            links.attach(self._programs[program].number, pod.host_ifindex, hook, pin)
        with self._endpoint_lock:
            for address in pod.addresses:
                self._write_endpoint(
                    pack_address(str(address)),
                    EndpointValue(
                        pod.host_ifindex,
                        int(EndpointFlag.POD),
                        bytes.fromhex(pod.pod_mac.replace(":", "")),
                        bytes.fromhex(pod.host_mac.replace(":", "")),
                        0,
                    ),
                )

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
        for direction in POD_HOOKS:
            links.detach(self.link_dir / f"pod-{pod.host_ifname}-{direction}")

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

    def set_node_addresses(self, addresses: frozenset[str]) -> bool:
        """Makes these the node's addresses in the endpoint table. True when something changed."""
        if addresses == self._node_addresses:
            return False
        wanted = {pack_address(address) for address in addresses}
        with self._endpoint_lock:
            for key, raw in self.maps["wag_endpoints"].dump():
                if EndpointValue.unpack(raw).flags & EndpointFlag.NODE and key not in wanted:
                    self.maps["wag_endpoints"].delete(key)
            for key in wanted:
                self._write_endpoint(key, EndpointValue(0, int(EndpointFlag.NODE), bytes(6), bytes(6), 0))
        self._node_addresses = addresses
        return True

    def _write_endpoint(self, key: bytes, value: EndpointValue) -> None:
        """Writes an endpoint unless it is there; keeps nat_used, which only programs write."""
        endpoints = self.maps["wag_endpoints"]
        raw = endpoints.lookup(key)
        if raw is not None:
            current = EndpointValue.unpack(raw)
            if current._replace(nat_used=0) == value:
                return
            value = value._replace(nat_used=current.nat_used)
        endpoints.update(key, value.pack())

    def map_memory(self) -> dict[str, int]:
        """Bytes of kernel memory by map."""
        return {name: item.memory_bytes() for name, item in self.maps.items()}


def pin_name(device: str) -> str:
    """A file name on bpffs for an interface name: bpffs refuses dots, which VLAN interfaces have."""
    return device.replace(".", ":")


def node_addresses(config_ips: Iterable[str], netlink: Netlink) -> NodeAddresses:
    """The node's addresses now: those configured for SNAT, or the first of the default route's interface."""
    interfaces = {link.index: link.name for link in netlink.links()}
    defaults = netlink.default_route_devices()
    every: dict[str, str] = {}
    for address in netlink.addresses():
        if not (address.ip.is_loopback or address.ip.is_link_local or address.ip.is_multicast):
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


def uplinks(configured: Iterable[str], node: NodeAddresses, netlink: Netlink) -> list[tuple[str, int]]:
    """(name, ifindex) of the interfaces that serve NodePorts: those configured, or those with a default route or one
    of the node's SNAT addresses. KernelError names a configured interface that does not exist."""
    by_name = {link.name: link for link in netlink.links()}
    names = list(configured)
    for name in names:
        if name not in by_name:
            raise KernelError(f"devices: interface {name} does not exist")
    if not names:
        names = [name for name in netlink.default_route_devices() if name in by_name]
        indices = {link.index: link.name for link in by_name.values()}
        names += [indices[a.ifindex] for a in netlink.addresses() if str(a.ip) in (node.ip4, node.ip6)]
    return sorted({(name, by_name[name].index) for name in names if by_name[name].kind != "loopback" and name != "lo"})
