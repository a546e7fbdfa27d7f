"""Flows that kube-proxy's rules translate, and flows that waggle translates: each side can go on with the other's.

Rules only choose; what was chosen stands in conntrack, and for waggle in the NAT table. So an established flow changes
hands by an entry in the other table, whatever becomes of the rules. What a process of the node itself has begun stays
with conntrack: only one direction of it passes waggle's programs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from waggle.abi import _generated as abi
from waggle.abi.address import pack_address, unpack_address
from waggle.errors import AlreadyRunning, KernelError
from waggle.kernel import conntrack, links, syscall
from waggle.kernel.conntrack import Flow, Tuple
from waggle.kernel.maps import Map, open_pinned
from waggle.kernel.netlink import Batch, Netlink
from waggle.reconcile.cleanup import exclusive, refuse_living_agent
from waggle.reconcile.sysctls import Sysctls
from waggle.reconcile.uplinks import is_pod_interface

NAME = "kube-proxy"
LIBERAL_CONNTRACK = "net/netfilter/nf_conntrack_tcp_be_liberal"
LOOSE_CONNTRACK = "net/netfilter/nf_conntrack_tcp_loose"


def running_kube_proxies() -> list[int]:
    """Processes called kube-proxy in the network namespace of this one."""
    here = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if (folder / "comm").read_text().strip() == NAME and (folder / "ns/net").stat().st_ino == here:
                found.append(int(folder.name))
        except OSError:  # it has ended, or is none of ours to look at
            continue
    return sorted(found)


def refuse_running_kube_proxy() -> None:
    """AlreadyRunning while there is one: it would write its rules again."""
    found = running_kube_proxies()
    if found:
        raise AlreadyRunning(
            f"kube-proxy still runs (process {', '.join(map(str, found))}) and would write its rules again: stop it "
            "first, in a cluster with a nodeSelector of its DaemonSet that leaves this node out"
        )


def give_back(bpf_root: Path, api_socket: Path, state_dir: Path) -> int:
    """Has conntrack go on with waggle's flows and takes waggle's programs off their hooks. How many flows that were.

    Pods keep their interfaces and addresses, and the kernel's routes to them. AlreadyRunning while an agent runs.
    """
    with exclusive(bpf_root):
        refuse_living_agent(api_socket)
        nat = open_pinned(bpf_root / "maps" / "wag_nat")
        if nat is None:
            return 0
        given: set[Flow] = set()

        def give() -> None:
            for flow in set(flows_of(nat.dump())) - given:
                conntrack.put(flow)
                given.add(flow)

        # Until conntrack knows a connection, its packets are to be lost and sent again, not to begin anew elsewhere.
        sysctls = Sysctls(state_dir)
        strict = [(LOOSE_CONNTRACK, "0"), (LIBERAL_CONNTRACK, "1")]
        try:
            for name, value in strict:
                sysctls.set(name, value)
            for pin in sorted((bpf_root / "links").iterdir()):
                give()
                links.detach(pin)
            give()
            _stop_programs_of_new_pods()
            give()
        finally:
            for name, _ in strict:
                sysctls.restore(name)
        return len(given)


def _stop_programs_of_new_pods() -> None:
    """Those that had no links yet (docs/decisions/0011)."""
    with Netlink() as netlink:
        batch = Batch()
        for link in netlink.links():
            if link.kind == "veth" and is_pod_interface(link.name):
                batch.stop_programs(link.index)
        netlink.run(batch)


def takes(flow: Flow, is_frontend: Callable[[Tuple], bool], node: Collection[str]) -> bool:
    """Whether waggle's programs see both directions of a flow of conntrack, and serve what it asks for."""
    return not flow.over and flow.original.src not in node and is_frontend(flow.original)


def entries(flow: Flow, now_ns: int) -> list[tuple[bytes, bytes]]:
    """Key and value of the two entries of the NAT table. The replies' comes first: nobody may be translated who would
    not be turned back."""
    back = _reversed(flow.original)
    to = _reversed(flow.reply)
    confirmed = int(abi.NatFlag.FORWARD | abi.NatFlag.CONFIRMED)
    return [
        (_packed(flow.reply).pack(), abi.Nat(_packed(back), 0, int(abi.NatFlag.ANSWERED), now_ns, 0).pack()),
        (_packed(flow.original).pack(), abi.Nat(_packed(to), 0, confirmed, now_ns, 0).pack()),
    ]


def take_over(flows: Iterable[Flow], nat: Map) -> int:
    """Writes entries for those that have none. How many flows were new."""
    now = time.monotonic_ns()
    written = 0
    for flow in flows:
        new = False
        for key, value in entries(flow, now):
            try:
                nat.update(key, value, syscall.BPF_NOEXIST)
                new = True
            except KernelError as error:
                if error.errno != 17:  # EEXIST: it has come by already
                    raise
        written += new
    return written


def mark(flows: Iterable[Flow], endpoints: Map) -> None:
    """Has the programs look at the NAT table for these flows' addresses."""
    for address in {address for flow in flows for one in (flow.original, flow.reply) for address in (one.src, one.dst)}:
        key = pack_address(address)
        raw = endpoints.lookup(key)
        if raw is not None and not abi.Endpoint.unpack(raw).nat_used:
            endpoints.update(key, abi.Endpoint.unpack(raw)._replace(nat_used=1).pack(), syscall.BPF_EXIST)


def flows_of(nat: Iterable[tuple[bytes, bytes]]) -> list[Flow]:
    """The flows to Services of a NAT table, as conntrack would see them."""
    found = []
    skipped = int(abi.NatFlag.TUNNEL | abi.NatFlag.ALONE | abi.NatFlag.RESET)
    for key, value in nat:
        entry = abi.Nat.unpack(value)
        original, to = _unpacked(abi.Tuple.unpack(key)), _unpacked(entry.to)
        if entry.flags & int(abi.NatFlag.FORWARD) and not entry.flags & skipped and original.dst != to.dst:
            found.append(Flow(original, _reversed(to), over=bool(entry.flags & int(abi.NatFlag.CLOSING))))
    return found


def _reversed(one: Tuple) -> Tuple:
    return Tuple(one.dst, one.src, one.dport, one.sport, one.protocol)


def _packed(one: Tuple) -> abi.Tuple:
    return abi.Tuple(pack_address(one.src), pack_address(one.dst), one.sport, one.dport, one.protocol)


def _unpacked(one: abi.Tuple) -> Tuple:
    return Tuple(unpack_address(one.src), unpack_address(one.dst), one.sport, one.dport, one.proto)
