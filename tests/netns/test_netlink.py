"""netlink and namespaces against the kernel: what a batch asks for is what `ip` and the queries then show."""

from __future__ import annotations

import errno
import ipaddress
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from waggle.errors import KernelError, NotFound
from waggle.kernel.netlink import RTPROT_WAGGLE, Address, Batch, FdbEntry, Link, Monitor, Netlink, Route, Vxlan
from waggle.kernel.netns import call_in_netns, netns_cookie_of_self, netns_id, open_netns

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces: needs root")]

NAMES = [f"wagnl-{os.getpid()}-{which}" for which in "ab"]


@pytest.fixture
def namespaces() -> Iterator[tuple[Path, Path]]:
    """Two empty namespaces."""
    try:
        for name in NAMES:
            subprocess.run(["ip", "netns", "add", name], check=True)
        yield Path("/run/netns") / NAMES[0], Path("/run/netns") / NAMES[1]
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def netlink(namespaces: tuple[Path, Path]) -> Iterator[Netlink]:
    with Netlink(namespaces[0]) as netlink:
        yield netlink


def do(netlink: Netlink, fill) -> None:
    batch = Batch()
    fill(batch)
    netlink.run(batch)


def make_veth(netlink: Netlink, **more) -> Link:
    do(netlink, lambda b: b.create_veth("v0", peer_name="v1", up=True, **more))
    do(netlink, lambda b: b.set_link("v1", up=True))
    return netlink.link_by_name("v0")


# -- namespaces


def test_function_runs_elsewhere_and_the_caller_stays(namespaces: tuple[Path, Path]) -> None:
    here = netns_cookie_of_self()
    cookies = {here, *(call_in_netns(path, netns_cookie_of_self) for path in namespaces)}
    assert len(cookies) == 3
    assert netns_cookie_of_self() == here


def test_exception_comes_back_and_no_thread_stays(namespaces: tuple[Path, Path]) -> None:
    here, before = netns_cookie_of_self(), threading.active_count()
    with pytest.raises(ZeroDivisionError):
        call_in_netns(namespaces[0], lambda: 1 // 0)
    assert (netns_cookie_of_self(), threading.active_count()) == (here, before)


def test_identity_of_a_namespace(namespaces: tuple[Path, Path]) -> None:
    first, second = namespaces
    assert netns_id(first) != netns_id(second)
    assert call_in_netns(first, lambda: netns_id("/proc/thread-self/ns/net")) == netns_id(first)
    with pytest.raises(NotFound):
        netns_id("/run/netns/nothing-here")


def test_paths_that_are_no_network_namespace(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path("/etc/hostname"), Path("/proc/self/ns/uts"), "a\0b"):
        with pytest.raises(KernelError):
            call_in_netns(path, netns_cookie_of_self)
    for path in (tmp_path / "none", Path("/etc/hostname/x")):
        with pytest.raises(NotFound, match="does not exist"):
            call_in_netns(path, netns_cookie_of_self)


def test_descriptor_is_closed(namespaces: tuple[Path, Path]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        call_in_netns(namespaces[0], lambda: None)
        Netlink(namespaces[0]).close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# -- changing and asking


def test_veth_across_namespaces(namespaces: tuple[Path, Path], netlink: Netlink) -> None:
    with open_netns(namespaces[1]) as other:
        do(
            netlink,
            lambda b: b.create_veth(
                "v0",
                peer_name="eth0",
                peer_netns_fd=other,
                mac="02:00:00:00:00:0a",
                peer_mac="02:00:00:00:00:0b",
                mtu=1400,
            ),
        )
    mine = netlink.link_by_name("v0")
    with Netlink(namespaces[1]) as there:
        theirs = there.link_by_name("eth0")
    assert (mine.kind, mine.mac, mine.mtu, mine.up) == ("veth", "02:00:00:00:00:0a", 1400, False)
    assert (theirs.kind, theirs.mac, theirs.mtu, theirs.up) == ("veth", "02:00:00:00:00:0b", 1400, False)
    assert (mine.peer_index, theirs.peer_index) == (theirs.index, mine.index)
    assert mine.peer_netnsid is not None
    assert netlink.link_by_index(mine.index) == mine


def test_changing_a_link(netlink: Netlink) -> None:
    link = make_veth(netlink)
    assert link.up
    do(netlink, lambda b: b.create_link("br0", "bridge", mac="02:00:00:00:00:01", up=True))
    bridge = netlink.link_by_name("br0")
    assert (bridge.kind, bridge.up) == ("bridge", True)
    do(netlink, lambda b: b.set_link("v0", master=bridge.index, mtu=1300, mac="02:00:00:00:00:02"))
    changed = netlink.link_by_name("v0")
    assert (changed.master, changed.mtu, changed.mac) == (bridge.index, 1300, "02:00:00:00:00:02")
    do(netlink, lambda b: b.set_link(link.index, up=False, master=0))
    do(netlink, lambda b: b.set_link(link.index, name="w0"))
    renamed = netlink.link_by_name("w0")
    assert (renamed.index, renamed.up, renamed.master) == (link.index, False, 0)
    do(netlink, lambda b: b.delete_link("w0"))
    assert {link.name for link in netlink.links()} == {"lo", "br0"}


def test_addresses(netlink: Netlink) -> None:
    link = make_veth(netlink)
    wanted = [ipaddress.ip_interface("10.0.0.1/24"), ipaddress.ip_interface("fd00::1/64")]

    def fill(batch: Batch) -> None:
        for address in wanted:
            batch.add_address(link.index, address, nodad=True)
            batch.add_address(link.index, address, nodad=True, exist_ok=True)

    do(netlink, fill)
    found = [a for a in netlink.addresses(link.index) if not a.ip.is_link_local]
    assert [address.interface for address in found] == wanted
    assert not any(address.flags & 0x40 for address in found), "tentative"
    do(netlink, lambda b: [b.delete_address(link.index, address) for address in wanted])
    do(netlink, lambda b: b.delete_address(link.index, wanted[0], missing_ok=True))
    with pytest.raises(NotFound, match=r"10\.0\.0\.1/24"):
        do(netlink, lambda b: b.delete_address(link.index, wanted[0]))


@pytest.mark.parametrize(
    ("address", "dst", "via", "other"),
    [("10.0.0.1/24", "10.1.0.0/24", "10.0.0.2", "10.0.0.3"), ("fd00::1/64", "fd01::/64", "fd00::2", "fd00::3")],
)
def test_routes(netlink: Netlink, address: str, dst: str, via: str, other: str) -> None:
    link = make_veth(netlink)
    network, gateway, second = ipaddress.ip_network(dst), ipaddress.ip_address(via), ipaddress.ip_address(other)
    source = ipaddress.ip_interface(address)
    do(netlink, lambda b: b.add_address(link.index, source, nodad=True))
    do(netlink, lambda b: b.add_route(network, dev=link.index, via=gateway, src=source.ip, metric=50, mtu=1280))
    (route,) = netlink.routes(protocol=RTPROT_WAGGLE)
    assert (route.dst, route.ifindex, route.via) == (network, link.index, gateway)
    assert (route.src, route.metric, route.mtu) == (source.ip, 50, 1280)
    do(netlink, lambda b: b.add_route(network, dev=link.index, via=second, metric=50, replace=True))
    assert [route.via for route in netlink.routes(protocol=RTPROT_WAGGLE)] == [second]
    do(netlink, lambda b: b.add_route(network, dev=link.index, via=second, metric=50, exist_ok=True))
    with pytest.raises(KernelError) as caught:
        do(netlink, lambda b: b.add_route(network, dev=link.index, via=second, metric=50))
    assert caught.value.errno == errno.EEXIST
    do(netlink, lambda b: b.add_route(network, dev=link.index, table=1234))
    assert [r.dst for r in netlink.routes(table=1234)] == [network]
    do(netlink, lambda b: b.delete_route(network, table=1234))
    do(netlink, lambda b: b.delete_route(network, metric=50))
    do(netlink, lambda b: b.delete_route(network, metric=50, missing_ok=True))
    with pytest.raises(NotFound, match=dst.replace(".", r"\.")):
        do(netlink, lambda b: b.delete_route(network, metric=50))
    assert netlink.routes(table=None, protocol=RTPROT_WAGGLE) == []


def test_deleting_waggles_route_leaves_that_of_another_protocol(netlink: Netlink) -> None:
    link = make_veth(netlink)
    network = ipaddress.ip_network("10.1.0.0/24")
    do(netlink, lambda b: b.add_route(network, dev=link.index, protocol=4))
    do(netlink, lambda b: b.delete_route(network, missing_ok=True))
    assert [route.protocol for route in netlink.routes() if route.dst == network] == [4]


def test_onlink_default_routes_and_their_devices(netlink: Netlink) -> None:
    link = make_veth(netlink)
    do(netlink, lambda b: b.set_link("lo", up=True))  # before its first address a namespace knows no gateway
    assert netlink.default_route_devices() == []
    for dst, via in (("0.0.0.0/0", "169.254.1.1"), ("::/0", "fe80::1")):
        gateway = ipaddress.ip_address(via)
        do(
            netlink,
            lambda b, d=dst, g=gateway: b.add_route(ipaddress.ip_network(d), via=g, dev=link.index, onlink=True),
        )
    assert netlink.default_route_devices() == ["v0"]
    hops = ["nexthop", "via", "10.9.0.1", "dev", "v1", "onlink", "nexthop", "via", "10.9.0.2", "dev", "v0", "onlink"]
    subprocess.run(["ip", "-n", NAMES[0], "route", "add", "default", "metric", "9", *hops], check=True)
    assert netlink.default_route_devices() == ["v0", "v1"]


def test_neighbours(netlink: Netlink) -> None:
    link = make_veth(netlink)
    ips = [ipaddress.ip_address("10.0.0.9"), ipaddress.ip_address("fd00::9")]
    for mac in ("02:00:00:00:00:09", "02:00:00:00:00:0a"):
        do(netlink, lambda b, m=mac: [b.add_neighbour(link.index, ip, m) for ip in ips])
        found = [entry for entry in netlink.neighbours(link.index) if entry.permanent]
        assert [(entry.ip, entry.mac) for entry in found] == [(ip, mac) for ip in ips]
    do(netlink, lambda b: [b.delete_neighbour(link.index, ip) for ip in ips])
    do(netlink, lambda b: b.delete_neighbour(link.index, ips[0], missing_ok=True))
    assert not any(entry.permanent for entry in netlink.neighbours(link.index))


# -- errors


def test_error_names_the_object_and_carries_the_kernels_words(netlink: Netlink) -> None:
    make_veth(netlink)
    with pytest.raises(
        KernelError, match=r"^cannot change link v0: Invalid argument \(mtu less than device minimum\)$"
    ):
        do(netlink, lambda b: b.set_link("v0", mtu=10))
    with pytest.raises(NotFound, match="cannot find link nothing: No such device") as caught:
        netlink.link_by_name("nothing")
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(KernelError) as exists:
        make_veth(netlink)
    assert exists.value.errno == errno.EEXIST


def test_batch_goes_on_after_a_failure_and_counts_the_failures(netlink: Netlink) -> None:
    batch = Batch()
    batch.delete_link("nothing")
    batch.create_link("br0", "bridge")
    batch.delete_link("nothing else")
    batch.delete_link("nor this", missing_ok=True)
    with pytest.raises(NotFound, match="delete link nothing:") as caught:
        netlink.run(batch)
    assert caught.value.__notes__ == ["2 requests of this batch of 4 failed"]
    assert netlink.link_by_name("br0").kind == "bridge"


def test_large_batch_and_large_answers(netlink: Netlink) -> None:
    link = make_veth(netlink)
    networks = list(ipaddress.ip_network("10.64.0.0/12").subnets(new_prefix=24))[:3000]
    do(netlink, lambda b: [b.add_route(network, dev=link.index) for network in networks])
    assert {route.dst for route in netlink.routes(protocol=RTPROT_WAGGLE)} == set(networks)
    do(netlink, lambda b: [b.delete_route(network) for network in networks])
    assert netlink.routes(protocol=RTPROT_WAGGLE) == []


def test_one_socket_in_several_threads(netlink: Netlink) -> None:
    link = make_veth(netlink)
    failures: list[BaseException] = []

    def work(third: int) -> None:
        try:
            for last in range(30):
                network = ipaddress.ip_network(f"10.7.{third}.{last}/32")
                do(netlink, lambda b, n=network: b.add_route(n, dev=link.index))
                assert network in {route.dst for route in netlink.routes(protocol=RTPROT_WAGGLE)}
                assert netlink.link_by_name("v0").index == link.index
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(netlink.routes(protocol=RTPROT_WAGGLE)) == 120


# -- news


def wait_for(monitor: Monitor, seen: list, wanted) -> None:
    deadline = time.monotonic() + 10
    while not any(wanted(change) for change in seen):
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)
        seen += monitor.read()


def test_monitor_tells_of_links_addresses_and_routes(namespaces: tuple[Path, Path], netlink: Netlink) -> None:
    monitor = Monitor("link", "address", "route", netns=namespaces[0])
    try:
        assert monitor.read() == []
        seen: list = []
        link = make_veth(netlink)
        wait_for(monitor, seen, lambda c: isinstance(c.subject, Link) and c.subject.name == "v0" and not c.removed)
        address = ipaddress.ip_interface("10.0.0.1/24")
        do(netlink, lambda b: b.add_address(link.index, address))
        wait_for(monitor, seen, lambda c: isinstance(c.subject, Address) and c.subject.interface == address)
        network = ipaddress.ip_network("10.5.0.0/16")
        do(netlink, lambda b: b.add_route(network, dev=link.index))
        wait_for(monitor, seen, lambda c: isinstance(c.subject, Route) and c.subject.dst == network)
        do(netlink, lambda b: b.delete_link("v0"))
        wait_for(monitor, seen, lambda c: isinstance(c.subject, Link) and c.subject.name == "v0" and c.removed)
        assert any(isinstance(c.subject, Address) and c.removed for c in seen)
    finally:
        monitor.close()


def test_monitor_that_fell_behind_says_so(namespaces: tuple[Path, Path], netlink: Netlink) -> None:
    link = make_veth(netlink)
    monitor = Monitor("route", netns=namespaces[0])
    try:
        networks = list(ipaddress.ip_network("10.64.0.0/11").subnets(new_prefix=24))
        do(netlink, lambda b: [b.add_route(network, dev=link.index) for network in networks])
        changes = monitor.read()
        assert any(change.subject is None for change in changes)
        assert monitor.read() == []
        do(netlink, lambda b: b.delete_route(networks[0]))
        wait_for(monitor, [], lambda c: isinstance(c.subject, Route) and c.removed and c.subject.dst == networks[0])
    finally:
        monitor.close()


# -- tunnels and rules


@pytest.mark.parametrize("local", ["10.9.0.1", "fd09::1"])
def test_vxlan(netlink: Netlink, local: str) -> None:
    address, other = ipaddress.ip_address(local), ipaddress.ip_address(local.replace("1", "2", 1))
    do(netlink, lambda b: b.create_vxlan("x0", vni=7, local=address, port=8472, mac="02:00:00:00:00:07", mtu=1400))
    link = netlink.link_by_name("x0")
    assert (link.kind, link.mac, link.mtu, link.up) == ("vxlan", "02:00:00:00:00:07", 1400, False)
    assert link.vxlan == Vxlan(vni=7, local=address, port=8472, learning=False)
    do(netlink, lambda b: b.set_vxlan_local(link.index, other))
    changed = netlink.link_by_name("x0").vxlan
    assert changed is not None and (changed.vni, changed.local, changed.port) == (7, other, 8472)

    mac, there, elsewhere = "02:00:00:00:00:09", address + 8, address + 9
    do(netlink, lambda b: b.add_fdb(link.index, mac, there))
    assert netlink.fdb(link.index) == [FdbEntry(link.index, mac, there)]
    do(netlink, lambda b: b.add_fdb(link.index, mac, elsewhere))  # it moved
    assert netlink.fdb(link.index) == [FdbEntry(link.index, mac, elsewhere)]
    do(netlink, lambda b: b.delete_fdb(link.index, mac, elsewhere))
    assert netlink.fdb(link.index) == []
    do(netlink, lambda b: b.delete_fdb(link.index, mac, elsewhere, missing_ok=True))


def test_rules(netlink: Netlink) -> None:
    pods = [ipaddress.ip_network(text) for text in ("10.244.1.0/24", "fd00:244::/64")]
    for _ in range(2):  # the second time they are there
        for src in pods:
            do(netlink, lambda b, src=src: b.add_rule(src, table=11900, priority=119))
    found = netlink.rules(protocol=RTPROT_WAGGLE)
    assert [(rule.src, rule.table, rule.priority) for rule in found] == [(src, 11900, 119) for src in pods]
    assert len(netlink.rules()) > len(found)  # the kernel's own
    for src in pods:
        do(netlink, lambda b, src=src: b.delete_rule(src, table=11900, priority=119))
    assert netlink.rules(protocol=RTPROT_WAGGLE) == []
    with pytest.raises(NotFound, match=r"delete rule for packets from 10\.244\.1\.0/24"):
        do(netlink, lambda b: b.delete_rule(pods[0], table=11900, priority=119))
