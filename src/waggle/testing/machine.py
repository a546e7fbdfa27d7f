"""The real programs on real maps in a network namespace of their own, for BPF_PROG_TEST_RUN.

The namespace has one uplink `up0` with 192.0.2.1/24 and 2001:db8::1/64, forwarding on, and default routes through
192.0.2.254 and 2001:db8::fe, so that the programs' route lookups have something to find.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from waggle.abi._generated import (
    CONFIG_LAYOUT,
    Backend,
    Endpoint,
    EndpointFlag,
    Nat,
    NatFlag,
    Service,
    ServiceKey,
    Tuple,
)
from waggle.abi.address import PROTOCOLS, pack_address
from waggle.kernel.maps import Map
from waggle.kernel.netns import call_in_netns
from waggle.kernel.objects import BpfObject
from waggle.kernel.syscall import Fd
from waggle.kernel.testrun import TestRun, run_packet

NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
POD_MAC, HOST_MAC = "02:00:00:00:00:02", "02:00:00:00:00:01"
PASS, DROP, REDIRECT = 0, 2, 7  # TC_ACT_OK, TC_ACT_SHOT, TC_ACT_REDIRECT


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


class Machine:
    """Programs and maps of one node; nothing is pinned or attached."""

    def __init__(self, name: str, *, events: bool = True) -> None:
        self.netns = f"waggle-test-{name}-{os.getpid()}"
        self.programs: dict[str, Fd] = {}
        self.maps: dict[str, Map] = {}
        self._revision = 0
        self._next_backend = 0
        try:
            self._make_netns()
            self._load(events)
        except BaseException:
            self.close()
            raise

    def _make_netns(self) -> None:
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        lines = [
            "link set lo up",
            "link add up0 type veth peer name wire",
            "link set up0 up",
            "link set wire up",
            f"addr add {NODE4}/24 dev up0",
            f"addr add {NODE6}/64 dev up0 nodad",
            "route add default via 192.0.2.254",
            "-6 route add default via 2001:db8::fe",
            "neigh add 192.0.2.254 lladdr 02:00:00:00:00:fe dev up0",
            "neigh add 2001:db8::fe lladdr 02:00:00:00:00:fe dev up0",
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

    def _load(self, events: bool) -> None:
        constants = {
            "wag_node_ip4": pack_address(NODE4),
            "wag_node_ip6": pack_address(NODE6),
            "wag_host_cookie": bytes(8),
            "wag_events": bytes([events]),
            "wag_snat_min": (40000).to_bytes(2, "little"),
            "wag_snat_max": (50000).to_bytes(2, "little"),
            "wag_event_ns": (10**9).to_bytes(8, "little"),
        }
        for name in ("socket", "pod", "node"):
            with BpfObject.open(name) as bpf:
                bpf.configure(CONFIG_LAYOUT[name], constants)
                for table, size in {"wag_services": 4096, "wag_backends": 4096, "wag_nat": 1024}.items():
                    bpf.resize(table, size)
                bpf.load(self.maps)
                self.programs.update(bpf.programs)
                self.maps.update({k: v for k, v in bpf.maps.items() if k not in self.maps})
        self.add_node(NODE4)
        self.add_node(NODE6)

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.netns], check=False, capture_output=True)
        for program in self.programs.values():
            program.close()
        for item in self.maps.values():
            item.close()

    # -- state --------------------------------------------------------------------------------------------------

    def add_node(self, address: str) -> None:
        """An address of the node itself."""
        self.maps["wag_endpoints"].update(
            pack_address(address), Endpoint(0, int(EndpointFlag.NODE), bytes(6), bytes(6), 0).pack()
        )

    def add_pod(self, address: str, ifindex: int) -> None:
        """A local pod."""
        macs = [bytes.fromhex(mac.replace(":", "")) for mac in (POD_MAC, HOST_MAC)]
        self.maps["wag_endpoints"].update(
            pack_address(address), Endpoint(ifindex, int(EndpointFlag.POD), macs[0], macs[1], 0).pack()
        )

    def add_service(self, address: str, port: int, protocol: str, backends: Sequence[tuple[str, int]]) -> None:
        """A frontend with backends; address "0.0.0.0" or "::" for a NodePort. Writing it again replaces the set."""
        self._revision += 1
        offset = self._next_backend
        self._next_backend += len(backends)
        for index, (backend, backend_port) in enumerate(backends):
            self.maps["wag_backends"].update(
                (offset + index).to_bytes(4, "little"), Backend(pack_address(backend), backend_port, 0).pack()
            )
        key = ServiceKey(pack_address(address), port, PROTOCOLS[protocol])
        self.maps["wag_services"].update(key.pack(), Service(offset, len(backends), self._revision, 0).pack())

    def remove_service(self, address: str, port: int, protocol: str) -> None:
        """The frontend is gone; flows stay."""
        self.maps["wag_services"].delete(ServiceKey(pack_address(address), port, PROTOCOLS[protocol]).pack())

    def nat(self) -> set[Flow]:
        """What the NAT table holds."""
        found = set()
        for key, raw in self.maps["wag_nat"].dump():
            nat = Nat.unpack(raw)
            found.add(Flow(flow_text(Tuple.unpack(key)), flow_text(nat.to), bool(nat.flags & NatFlag.FORWARD)))
        return found

    def nat_used(self, address: str) -> bool:
        """Whether packets of an address are looked up in the NAT table."""
        raw = self.maps["wag_endpoints"].lookup(pack_address(address))
        return raw is not None and bool(Endpoint.unpack(raw).nat_used)

    def drops(self) -> Mapping[tuple[str, str], int]:
        """(reason, hook) → count."""
        from waggle.observe.counters import drops

        return drops(self.maps["wag_drops"])

    # -- packets ------------------------------------------------------------------------------------------------

    def run(self, program: str, packet: bytes, *, repeat: int = 1) -> TestRun:
        """Runs a packet (Ethernet header first) through a program, as if it came in by the uplink."""
        return call_in_netns(
            f"/run/netns/{self.netns}",
            lambda: run_packet(self.programs[program], packet, repeat=repeat, ifindex=self.uplink),
        )
