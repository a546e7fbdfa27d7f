"""The real programs on real maps in a network namespace of their own, for BPF_PROG_TEST_RUN.

The namespace has one uplink `up0` with 192.0.2.1/24 and 2001:db8::1/64, forwarding on, and default routes through
192.0.2.254 and 2001:db8::fe, so that the programs' route lookups have something to find. The way to 10.244.3.0/24 and
fd00:10:244:3::/64 takes packets of 1400 bytes.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import struct
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from waggle.abi._generated import (
    CONFIG_LAYOUT,
    OPEN_FLOW_SIZE,
    Affinity,
    Backend,
    Endpoint,
    EndpointFlag,
    Event,
    EventsOf,
    Hook,
    Nat,
    NatFlag,
    NetnsId,
    OpenFlow,
    RangeKey,
    Reason,
    Scope,
    Service,
    ServiceFlag,
    ServiceKey,
    ServiceRange,
    ServiceRangeFlag,
    Sweep,
    Tuple,
    Uplink,
    VipFlag,
)
from waggle.abi.address import PROTOCOLS, pack_address
from waggle.errors import KernelError
from waggle.kernel import maps
from waggle.kernel.maps import Map
from waggle.kernel.netns import call_in_netns
from waggle.kernel.objects import BpfObject
from waggle.kernel.ringbuf import RingBuffer
from waggle.kernel.syscall import Fd
from waggle.kernel.testrun import TestRun, run_packet, run_syscall, run_xdp
from waggle.model.objects import ObjectKey
from waggle.plan.maglev import SLOTS, maglev_table
from waggle.plan.vips import plan_ranges
from waggle.reconcile.datapath import pack_networks
from waggle.reconcile.maglev import MaglevTables

T = TypeVar("T")

NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
UPLINK_MAC, GATEWAY_MAC = "02:aa:aa:aa:aa:02", "02:00:00:00:00:fe"
POD_MAC, HOST_MAC = "02:00:00:00:00:02", "02:00:00:00:00:01"
SNAT_PORTS = range(40000, 50001)
#: All but 203.0.113.0/24 and 2001:db8:cb::/48, which are the outside.
NON_MASQUERADE = ("10.0.0.0/8", "192.0.2.0/24", "198.51.100.0/24", "fd00::/8", "2001:db8::/64")
NAMES_SHARE = 1000  # addresses that a pod may be told in a minute
YOUNG = 128  # flows that may have begun and not be confirmed
SIZES = {"wag_services": 4096, "wag_backends": 4096, "wag_nat": 1024, "wag_nat_young": YOUNG}
PASS, DROP, REDIRECT = 0, 2, 7  # TC_ACT_OK, TC_ACT_SHOT, TC_ACT_REDIRECT
XDP_DROP, XDP_PASS, XDP_TX = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Flow:
    """A NAT entry, readable: "TCP 10.0.0.1:1000 > 10.0.0.2:80" before and after."""

    packet: str
    becomes: str
    forward: bool


def flow_text(value: Tuple) -> str:
    """ "TCP a:1 > b:2" of a tuple."""
    from waggle.abi.address import host_port, protocol_name, unpack_address

    source = host_port(unpack_address(value.src), value.sport)
    target = host_port(unpack_address(value.dst), value.dport)
    return f"{protocol_name(value.proto)} {source} > {target}"


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _earlier(time_ns: int, seconds: int) -> int:
    """CLOCK_MONOTONIC so many seconds before; before the machine was started, modulo 2^64 as the programs reckon."""
    return (time_ns - seconds * 10**9) % (1 << 64)


class WrongSum(AssertionError):
    """A program has changed a packet and not the sum that came with it."""


class Machine:
    """Programs and maps of one node; nothing is pinned or attached."""

    def __init__(
        self,
        name: str,
        *,
        events: EventsOf = EventsOf.ALL,
        events_per_second: int = 1000,
        node4: str = NODE4,
        node6: str = NODE6,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        """`sizes`: entries of maps, instead of those below. `events_per_second`: of one kind, by one CPU."""
        self.netns = f"waggle-test-{name}-{os.getpid()}"
        self._sizes = SIZES | dict(sizes or {})
        self.programs: dict[str, Fd] = {}
        self.maps: dict[str, Map] = {}
        self._node_ips = {"wag_node_ip4": node4, "wag_node_ip6": node6}
        self._revision = 0
        #: whether packets come with the sum of a card (CHECKSUM_COMPLETE), which has to be right afterwards; an answer
        #: has none, since the kernel forgets it where a packet is cut
        self.summed = True
        self._can_sum = True
        self._next_backend = 0
        try:
            self._make_netns()
            self._load(events, events_per_second)
            self.reset()
        except BaseException:
            self.close()
            raise

    def _make_netns(self) -> None:
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        lines = [
            "link set lo up",
            f"link add up0 address {UPLINK_MAC} type veth peer name wire",
            "link set up0 up",
            "link set wire up",
            f"addr add {NODE4}/24 dev up0",
            f"addr add {NODE6}/64 dev up0 nodad",
            "route add default via 192.0.2.254",
            "-6 route add default via 2001:db8::fe",
            "route add 10.244.3.0/24 via 192.0.2.254 mtu lock 1400",
            "-6 route add fd00:10:244:3::/64 via 2001:db8::fe mtu lock 1400",
            "route add unreachable 198.18.0.1/32",
            "-6 route add unreachable 2001:db8:dead::1/128",
            f"neigh add 192.0.2.254 lladdr {GATEWAY_MAC} dev up0",
            f"neigh add 2001:db8::fe lladdr {GATEWAY_MAC} dev up0",
        ]
        for line in lines:
            subprocess.run(["ip", "-n", self.netns, *line.split()], check=True)
        for setting in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
            subprocess.run(
                ["ip", "netns", "exec", self.netns, "sh", "-c", f"echo 1 > /proc/sys/{setting.replace('.', '/')}"],
                check=True,
            )
        shown = subprocess.run(
            ["ip", "-n", self.netns, "-o", "link", "show", "up0"], check=True, capture_output=True, text=True
        )
        self.uplink = int(shown.stdout.split(":")[0])
        self._interfaces = {self.uplink}

    def _load(self, events: EventsOf, events_per_second: int) -> None:
        constants = {
            **{name: pack_address(text) if text else bytes(16) for name, text in self._node_ips.items()},
            "wag_host_cookie": bytes(8),
            "wag_events": bytes([events]),
            "wag_loopback_nodeport": b"\1",
            "wag_young_flows": self._sizes["wag_nat_young"].to_bytes(4, "little"),
            "wag_tcp_seconds": (600).to_bytes(4, "little"),
            "wag_udp_seconds": (180).to_bytes(4, "little"),
            "wag_sweep_seconds": (10).to_bytes(4, "little"),
            "wag_snat_min": SNAT_PORTS[0].to_bytes(2, "little"),
            "wag_snat_max": SNAT_PORTS[-1].to_bytes(2, "little"),
            "wag_masquerade": b"\1",
            "wag_non_masquerade": pack_networks(NON_MASQUERADE),
            "wag_beside_proxy": bytes(1),
            "wag_names_share": NAMES_SHARE.to_bytes(4, "little"),
            "wag_event_ns": (60 * 10**9).to_bytes(8, "little"),  # longer than a test takes on a busy machine
            "wag_event_gap_ns": (10**9 // events_per_second).to_bytes(8, "little"),
        }
        for name in ("socket", "pod", "node", "xdp", "sweep", "maglev", "policy"):
            with BpfObject.open(name) as bpf:
                bpf.configure(CONFIG_LAYOUT.get(name, {}), constants)
                for table, size in self._sizes.items():
                    bpf.resize(table, size)
                bpf.load(self.maps)
                self.programs.update(bpf.programs)
                self.maps.update({k: v for k, v in bpf.maps.items() if k not in self.maps})

    def reset(self) -> None:
        """Empties every map: as new, without the time that loading takes."""
        self.summed = True
        for item in self.maps.values():
            match item.info.type:
                case maps.HASH | maps.LRU_HASH | maps.LPM_TRIE:
                    item.delete_many(list(item.keys()))
                case maps.ARRAY | maps.PERCPU_ARRAY:
                    for key, value in item.dump():
                        if any(value):
                            item.update(key, bytes(len(value)))
                case maps.RINGBUF:
                    with contextlib.closing(RingBuffer(item)) as ring:
                        ring.skip()
        self.forget_services()
        self.add_node(NODE4)
        self.add_node(NODE6)
        self.maps["wag_uplinks"].update(self.uplink.to_bytes(4, "little"), Uplink(_mac(UPLINK_MAC)).pack())

    def forget_services(self) -> None:
        """Records of backends are given out from the first one on again."""
        self._next_backend = 0

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.netns], check=False, capture_output=True)
        for program in self.programs.values():
            program.close()
        for item in self.maps.values():
            item.close()

    # -- state --------------------------------------------------------------------------------------------------

    def add_node(self, address: str, *, nodeports: bool = True) -> None:
        """An address of the node itself."""
        flags = int(EndpointFlag.NODE) | (int(EndpointFlag.NODEPORT) if nodeports else 0)
        value = Endpoint(0, flags, bytes(6), bytes(6), 0, NetnsId.NODE, 0, 0)
        self.maps["wag_endpoints"].update(pack_address(address), value.pack())

    def add_pod(
        self, address: str, ifindex: int, *, netns: int = NetnsId.UNKNOWN, ingress: int = 0, egress: int = 0
    ) -> None:
        """A local pod; `netns`: id of the namespace that its sockets are in; `ingress`, `egress`: its sets of
        policies."""
        self.make_interface(ifindex)
        value = Endpoint(ifindex, int(EndpointFlag.POD), _mac(POD_MAC), _mac(HOST_MAC), 0, netns, ingress, egress)
        self.maps["wag_endpoints"].update(pack_address(address), value.pack())

    def make_interface(self, ifindex: int) -> None:
        """What packets of a pod come in by."""
        if ifindex in self._interfaces:
            return
        for line in (
            f"link add pod{ifindex} index {ifindex} type veth peer name in{ifindex}",
            f"link set pod{ifindex} up",
        ):
            subprocess.run(["ip", "-n", self.netns, *line.split()], check=True)
        self._interfaces.add(ifindex)

    def add_service(
        self,
        address: str,
        port: int,
        protocol: str,
        backends: Sequence[tuple[str, int]],
        *,
        scope: Scope = Scope.INTERNAL,
        flags: int = 0,
        affinity_s: int = 0,
        ranges: int = 0,
        maglev: int = 0,
        draining: Sequence[tuple[str, int]] = (),
    ) -> None:
        """A frontend with backends; address "0.0.0.0" or "::" for a NodePort. Writing it again replaces the set."""
        self._revision += 1
        offset = self._next_backend
        records = [*backends, *draining]
        self._next_backend += len(records)
        for index, (backend, backend_port) in enumerate(records):
            self.maps["wag_backends"].update(
                (offset + index).to_bytes(4, "little"), Backend(pack_address(backend), backend_port, 0).pack()
            )
        if address in ("0.0.0.0", "::"):
            flags |= ServiceFlag.NODEPORT
        key = ServiceKey(pack_address(address), port, PROTOCOLS[protocol], scope)
        value = Service(offset, len(backends), self._revision, flags, len(draining), affinity_s, 1, ranges, maglev)
        self.maps["wag_services"].update(key.pack(), value.pack())

    def add_maglev(self, backends: Sequence[tuple[str, int]], weights: Sequence[int] = ()) -> int:
        """Fills the table for backends; the number for `maglev` of `add_service`."""
        packed = b"".join(Backend(pack_address(address), port, 0).pack() for address, port in backends)
        table = maglev_table(packed, list(weights) or [1] * len(backends))
        tables = MaglevTables(self.maps["wag_maglev"], self.maps["wag_maglev_work"], self.programs["wag_maglev_fill"])
        tables.claim(ObjectKey("test", "test"), [table])
        tables.write()
        return table.id

    def slots(self, maglev: int) -> list[int]:
        """The indices of backends that a filled table has."""
        raw = self.maps["wag_maglev"].lookup(maglev.to_bytes(4, "little"))
        assert raw is not None
        return list(struct.unpack(f"={SLOTS}H", raw[: 2 * SLOTS]))

    def add_ranges(self, ranges: int, *networks: str) -> None:
        """Source ranges, for `ranges` of `add_service`."""
        for text in networks:
            network = ipaddress.ip_network(text)
            bits = 64 + network.prefixlen + (96 if network.version == 4 else 0)
            key = RangeKey(bits, ranges.to_bytes(8, "little"), pack_address(str(network.network_address)))
            self.maps["wag_source_ranges"].update(key.pack(), (1).to_bytes(4, "little"))

    def add_vip(self, address: str, *, cluster: bool = True) -> None:
        """An address of a Service; `cluster`: it is nobody else's."""
        flags = int(VipFlag.CLUSTER_IP) if cluster else 0
        self.maps["wag_vips"].update(pack_address(address), flags.to_bytes(4, "little"))

    def set_service_ranges(self, *networks: str, strays: bool = False) -> None:
        """The ranges of cluster addresses; `strays`: some lie outside."""
        records = plan_ranges(map(ipaddress.ip_network, networks)) or [ServiceRange(bytes(16), bytes(16), 0)]
        if strays:
            records[0] = records[0]._replace(flags=records[0].flags | ServiceRangeFlag.STRAYS)
        for index, record in enumerate(records):
            self.maps["wag_svc_ranges"].update(index.to_bytes(4, "little"), record.pack())

    def remove_service(self, address: str, port: int, protocol: str) -> None:
        """The frontend is gone; flows stay."""
        self.maps["wag_services"].delete(
            ServiceKey(pack_address(address), port, PROTOCOLS[protocol], Scope.INTERNAL).pack()
        )

    def forget_open_flows(self, older: int = 0) -> None:
        """Has CPUs look flows of policies up again; as if so many seconds had passed, or anyhow."""
        table = self.maps["wag_open_flows"]
        raw = table.lookup(bytes(4)) or b""
        flows = [OpenFlow.unpack(raw[at : at + OPEN_FLOW_SIZE]) for at in range(0, len(raw), OPEN_FLOW_SIZE)]
        aged = (flow._replace(seen_ns=max(0, flow.seen_ns - older * 10**9) if older else 0) for flow in flows)
        table.update(bytes(4), b"".join(flow.pack() for flow in aged))

    def age_affinity(self, seconds: int) -> None:
        """Makes every affinity older."""
        table = self.maps["wag_affinity"]
        for key, raw in table.dump():
            value = Affinity.unpack(raw)
            table.update(key, value._replace(used_ns=_earlier(value.used_ns, seconds)).pack())

    def nat(self) -> set[Flow]:
        """What the NAT table holds."""
        found = set()
        for key, raw in self.maps["wag_nat"].dump():
            nat = Nat.unpack(raw)
            found.add(Flow(flow_text(Tuple.unpack(key)), flow_text(nat.to), bool(nat.flags & NatFlag.FORWARD)))
        return found

    def age_nat(self, seconds: int) -> None:
        """Makes every NAT entry older."""
        table = self.maps["wag_nat"]
        for key, raw in table.dump():
            value = Nat.unpack(raw)
            table.update(key, value._replace(seen_ns=_earlier(value.seen_ns, seconds)).pack())

    def sweep(self) -> Sweep:
        """One sweep over the NAT table."""
        run_syscall(self.programs["wag_sweep_now"], bytes(8))
        raw = self.maps["wag_sweeps"].lookup(bytes(4))
        assert raw is not None
        return Sweep.unpack(raw)

    def nat_used(self, address: str) -> bool:
        """Whether packets of an address are looked up in the NAT table."""
        raw = self.maps["wag_endpoints"].lookup(pack_address(address))
        return raw is not None and bool(Endpoint.unpack(raw).nat_used)

    def drops(self) -> Mapping[tuple[str, str], int]:
        """(reason, hook) → count."""
        from waggle.observe.counters import drops

        return drops(self.maps["wag_drops"])

    def drop_count(self, reason: str, hook: Hook) -> int:
        """One of `drops`, which takes longer."""
        index = Reason[reason.upper()] * Hook.MAX + hook
        raw = self.maps["wag_drops"].lookup(index.to_bytes(4, "little")) or b""
        return sum(struct.unpack(f"={len(raw) // 8}Q", raw))

    def events(self) -> list[Event]:
        """What the programs have emitted since they were asked last."""
        with contextlib.closing(RingBuffer(self.maps["wag_events_rb"])) as ring:
            return [Event.unpack(raw) for raw in ring.read()]

    # -- packets ------------------------------------------------------------------------------------------------

    def run(self, program: str, packet: bytes, *, repeat: int = 1, mark: int = 0) -> TestRun:
        """Runs a packet (Ethernet header first) through a program, as if it came in by the uplink; `wag_pod_egress`: as
        the pod sends it that has the source address, where there is one."""
        return self.inside(lambda: self.run_here(program, packet, repeat=repeat, mark=mark))

    def run_by(self, ifindex: int, program: str, packet: bytes) -> TestRun:
        """The packet as it is, by the interface `ifindex`."""
        self.make_interface(ifindex)
        return self.inside(lambda: run_packet(self.programs[program], packet, ifindex=ifindex))

    def _pod_interface(self, packet: bytes) -> int:
        """The interface that a pod sends a packet by which has its address; the uplink where no pod has."""
        source = bytes(10) + b"\xff\xff" + packet[26:30] if packet[12:14] == b"\x08\0" else packet[22:38]
        raw = self.maps["wag_endpoints"].lookup(source) if len(source) == 16 else None
        if raw is None or not (pod := Endpoint.unpack(raw)).flags & EndpointFlag.POD:
            return self.uplink
        return pod.ifindex

    def run_here(self, program: str, packet: bytes, *, repeat: int = 1, mark: int = 0) -> TestRun:
        """As `run`, for a caller that is inside already."""
        code = self.programs[program]
        if program.startswith("wag_xdp"):
            return run_xdp(code, packet, repeat=repeat, ifindex=self.uplink)
        ifindex = self._pod_interface(packet) if program == "wag_pod_egress" else self.uplink
        if self.summed and self._can_sum and repeat == 1:
            try:
                return run_packet(code, packet, ifindex=ifindex, mark=mark, summed=True)
            except KernelError as error:
                if error.errno == errno.EBADMSG:
                    raise WrongSum(f"{program} left the sum over the packet wrong: {packet.hex()}") from error
                if error.errno != errno.EINVAL:
                    raise
                self._can_sum = False  # a kernel before v6.17
        return run_packet(code, packet, repeat=repeat, ifindex=ifindex, mark=mark)

    def inside(self, function: Callable[[], T]) -> T:
        """`function()` as run by a thread in the machine's network namespace."""
        return call_in_netns(f"/run/netns/{self.netns}", function)
