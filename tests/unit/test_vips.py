"""Addresses of Services and the ranges they come from: the rule, and the tables that are written."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waggle.abi._generated import ServiceRange, ServiceRangeFlag, VipFlag
from waggle.abi.address import pack_address, unpack_address
from waggle.kernel.maps import ARRAY, HASH
from waggle.model.objects import (
    SERVICE_PROXY_NAME_LABEL,
    LoadBalancerIngress,
    LoadBalancerStatus,
    ObjectKey,
    ObjectMeta,
    Service,
    ServiceCIDR,
    ServiceCIDRSpec,
    ServiceSpec,
    ServiceStatus,
)
from waggle.model.service import IPNetwork
from waggle.model.vip import Beyond, beyond_frontends, service_ranges, vips
from waggle.plan.vips import holds, plan_ranges, plan_vips
from waggle.reconcile.vips import Vips
from waggle.testing.memory_map import MemoryMap

WEB, API = ObjectKey("default", "web"), ObjectKey("default", "api")
RANGE = ipaddress.ip_network("10.96.0.0/16")
RANGE6 = ipaddress.ip_network("fd00:10:96::/112")
CLUSTER = int(VipFlag.CLUSTER_IP)


def service(labels: dict[str, str] | None = None, ingress: tuple[str, ...] = (), **spec: object) -> Service:
    status = ServiceStatus(LoadBalancerStatus([LoadBalancerIngress(ip) for ip in ingress]))
    return Service(ObjectMeta("web", "default", labels=labels), ServiceSpec(**spec), status)  # type: ignore[arg-type]


def cidr(name: str, *cidrs: str) -> ServiceCIDR:
    return ServiceCIDR(ObjectMeta(name), ServiceCIDRSpec(list(cidrs)))


# -- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (service(cluster_ip="10.96.0.1"), {"10.96.0.1": True}),
        (
            service(cluster_ip="10.96.0.1", cluster_ips=["10.96.0.1", "fd00::1"]),
            {"10.96.0.1": True, "fd00::1": True},
        ),
        (service(cluster_ip="10.96.0.1", external_ips=["192.0.2.5"]), {"10.96.0.1": True, "192.0.2.5": False}),
        (
            service(type="LoadBalancer", cluster_ip="10.96.0.1", ingress=("192.0.2.6",)),
            {"10.96.0.1": True, "192.0.2.6": False},
        ),
        (service(cluster_ip="10.96.0.1", external_ips=["10.96.0.1"]), {"10.96.0.1": True}),
        (service(cluster_ip="None"), {}),
        (service(type="ExternalName", cluster_ip="10.96.0.1"), {}),
        (service(labels={SERVICE_PROXY_NAME_LABEL: "other"}, cluster_ip="10.96.0.1"), {}),
        (service(), {}),
    ],
)
def test_addresses_of_a_service(subject: Service, expected: dict[str, bool]) -> None:
    assert vips(subject) == expected


@pytest.mark.parametrize(
    ("objects", "configured", "expected"),
    [
        ([cidr("kubernetes", "10.96.0.0/16", "fd00::/112")], (), ["10.96.0.0/16", "fd00::/112"]),
        ([cidr("kubernetes", "10.96.0.0/16"), cidr("more", "10.97.0.0/16")], (), ["10.96.0.0/16", "10.97.0.0/16"]),
        ([cidr("kubernetes", "10.96.0.0/16"), cidr("same", "10.96.0.0/16")], (), ["10.96.0.0/16"]),
        ([cidr("kubernetes", "10.96.0.0/16")], ("10.1.0.0/24",), ["10.1.0.0/24"]),
        ([cidr("kubernetes", "10.96.0.0/16")], ("none",), []),
        ([], (), []),
        ([], ("10.1.0.0/24",), ["10.1.0.0/24"]),
    ],
)
def test_which_ranges_are_in_force(
    objects: list[ServiceCIDR], configured: tuple[str, ...], expected: list[str]
) -> None:
    found = service_ranges(objects, configured, {}, 8)
    assert [str(network) for network in found.networks] == expected
    assert not found.problems


def test_a_range_that_has_another_use_is_not_enforced_and_said() -> None:
    taken = {
        ipaddress.ip_network("10.96.1.0/24"): "the pod range 10.96.1.0/24 of node node1",
        ipaddress.ip_network("fd00::/8"): "nothing of this family",
    }
    found = service_ranges([cidr("kubernetes", "10.96.0.0/16", "10.97.0.0/16", "what")], (), taken, 8)
    assert [str(network) for network in found.networks] == ["10.97.0.0/16"]
    assert "overlaps with the pod range 10.96.1.0/24 of node node1" in found.problems["10.96.0.0/16"]
    assert "is not an address range" in found.problems["what"]


def test_more_ranges_than_there_is_room_for_are_named() -> None:
    found = service_ranges([cidr("many", *(f"10.{n}.0.0/16" for n in range(4)))], (), {}, 3)
    assert len(found.networks) == 3
    assert list(found.problems) == ["10.3.0.0/16"]


@pytest.mark.parametrize(
    ("address", "echo", "errors", "expected"),
    [
        ("10.96.0.1", False, True, Beyond.REJECT),
        ("10.96.0.1", False, False, Beyond.DROP),
        ("10.96.0.1", True, False, Beyond.ECHO),
        ("10.96.0.2", False, True, Beyond.DROP),
        ("10.96.0.2", True, False, Beyond.DROP),
        ("192.0.2.5", False, True, Beyond.PASS),
        ("192.0.2.5", True, False, Beyond.ECHO),
        ("192.0.2.9", True, False, Beyond.PASS),
        ("172.16.0.1", False, True, Beyond.REJECT),  # a cluster address that no range holds
    ],
)
def test_beyond_frontends(address: str, echo: bool, errors: bool, expected: Beyond) -> None:
    used = {"10.96.0.1": True, "192.0.2.5": False, "172.16.0.1": True}
    assert beyond_frontends(address, echo=echo, used=used, ranges=[RANGE, RANGE6], errors=errors) is expected


# -- the plan --------------------------------------------------------------------------------------------------------


def test_what_is_no_address_is_left_out() -> None:
    subject = service(cluster_ip="10.96.0.1", external_ips=["010.0.0.1"])
    assert plan_vips(subject) == {pack_address("10.96.0.1"): CLUSTER}
    assert plan_vips(None) == {}


@given(
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)),
    st.integers(0, 128),
    st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)),
)
def test_a_packed_range_holds_what_the_range_holds(base, bits, address) -> None:
    network = ipaddress.ip_network(f"{base}/{min(bits, base.max_prefixlen)}", strict=False)
    (record,) = plan_ranges([network])
    packed = ipaddress.IPv6Address(pack_address(str(address)))
    if network.version == 6:  # ::ffff:0:0/96 and what holds it is every IPv4 address
        inside = packed in network
    else:
        inside = packed.ipv4_mapped is not None and packed.ipv4_mapped in network
    assert holds(record, pack_address(str(address))) is inside


# -- the tables ------------------------------------------------------------------------------------------------------


class Tables:
    def __init__(self, size: int = 100) -> None:
        self.vips = MemoryMap(HASH, 16, 4, size)
        self.ranges = MemoryMap(ARRAY, 4, len(ServiceRange(bytes(16), bytes(16), 0).pack()), 8)

    def on(self) -> Vips:
        made = Vips(self.vips, self.ranges)
        made.adopt()
        return made

    def addresses(self) -> dict[str, int]:
        return {unpack_address(key): int.from_bytes(value, "little") for key, value in self.vips.dump()}

    def networks(self) -> list[tuple[str, int]]:
        """(network address, flags) of the entries that a packet looks at, in their order."""
        found = []
        for _, raw in sorted(self.ranges.dump()):
            record = ServiceRange.unpack(raw)
            if not record.flags:
                break
            found.append((unpack_address(record.network) if record.flags & 1 else "", record.flags))
        return found


@pytest.fixture
def tables() -> Tables:
    return Tables()


def entries(*addresses: str, flags: int = CLUSTER) -> dict[bytes, int]:
    return {pack_address(address): flags for address in addresses}


def test_an_address_goes_with_the_last_service_that_has_it(tables: Tables) -> None:
    made = tables.on()
    made.claim(WEB, entries("10.96.0.1") | entries("192.0.2.5", flags=0))
    made.claim(API, entries("192.0.2.5", flags=0))
    made.write()
    assert tables.addresses() == {"10.96.0.1": CLUSTER, "192.0.2.5": 0}
    made.claim(WEB, {})
    made.write()
    assert tables.addresses() == {"192.0.2.5": 0}
    made.claim(API, {})
    made.write()
    assert tables.addresses() == {}


def test_a_cluster_address_is_one_whoever_else_names_it(tables: Tables) -> None:
    made = tables.on()
    made.claim(API, entries("10.96.0.1", flags=0))
    made.claim(WEB, entries("10.96.0.1"))
    made.write()
    assert tables.addresses() == {"10.96.0.1": CLUSTER}
    made.claim(WEB, {})
    made.write()
    assert tables.addresses() == {"10.96.0.1": 0}


def test_what_is_right_is_not_written_again(tables: Tables) -> None:
    made = tables.on()
    made.claim(WEB, entries("10.96.0.1"))
    made.set_ranges(plan_ranges([RANGE]))
    made.write()
    before = tables.vips.writes, tables.ranges.writes
    again = tables.on()
    again.claim(WEB, entries("10.96.0.1"))
    again.complete()
    again.set_ranges(plan_ranges([RANGE]))
    again.write()
    assert (tables.vips.writes, tables.ranges.writes) == before


def test_after_a_restart_what_nobody_claims_goes_once_everything_is_known(tables: Tables) -> None:
    made = tables.on()
    made.claim(WEB, entries("10.96.0.1", "10.96.0.2"))
    made.write()
    again = tables.on()
    again.claim(WEB, entries("10.96.0.1"))
    again.write()
    assert set(tables.addresses()) == {"10.96.0.1", "10.96.0.2"}
    again.complete()
    again.write()
    assert set(tables.addresses()) == {"10.96.0.1"}


def test_ranges_and_strays(tables: Tables) -> None:
    made = tables.on()
    used, strays = int(ServiceRangeFlag.USED), int(ServiceRangeFlag.STRAYS)
    made.claim(WEB, entries("10.96.0.1"))
    made.write()
    assert tables.networks() == [("", strays)]
    made.set_ranges(plan_ranges([RANGE, RANGE6]))
    made.write()
    assert tables.networks() == [("10.96.0.0", used), ("fd00:10:96::", used)]
    made.claim(API, entries("172.16.0.1") | entries("192.0.2.5", flags=0))
    made.write()
    assert tables.networks() == [("10.96.0.0", used | strays), ("fd00:10:96::", used)]
    made.claim(API, entries("192.0.2.5", flags=0))
    made.write()
    assert tables.networks() == [("10.96.0.0", used), ("fd00:10:96::", used)]
    made.set_ranges([])
    made.claim(WEB, {})
    made.write()
    assert tables.networks() == []


@pytest.mark.parametrize("ranges", [[], [RANGE6], [RANGE, RANGE6]])
def test_after_a_restart_ranges_and_strays_are_what_they_were(tables: Tables, ranges: list[IPNetwork]) -> None:
    """Also before the ranges are known: without any, strays alone must not become a range that holds everything."""
    made = tables.on()
    made.set_ranges(plan_ranges(ranges))
    made.claim(WEB, entries("10.96.0.1"))
    made.claim(API, entries("172.16.0.1"))
    made.write()
    before = tables.networks()
    again = tables.on()
    again.write()
    assert tables.networks() == before
    again.claim(WEB, entries("10.96.0.1", "10.96.0.3"))
    again.write()
    assert tables.networks() == before
    again.complete()
    again.set_ranges(plan_ranges(ranges))
    again.write()
    strays = [] if RANGE in ranges else ["10.96.0.1"]
    assert [flags & ServiceRangeFlag.STRAYS for _, flags in tables.networks()[:1]] == [
        ServiceRangeFlag.STRAYS if strays else 0
    ]


def test_a_packet_sees_the_old_list_the_new_one_or_none(tables: Tables) -> None:
    made = tables.on()
    made.set_ranges(plan_ranges([RANGE, RANGE6]))
    made.write()
    seen: list[tuple[str, ...]] = []
    tables.ranges.on_write = lambda: seen.append(tuple(network for network, _ in tables.networks()))
    made.set_ranges(plan_ranges([ipaddress.ip_network("10.1.0.0/16"), RANGE, RANGE6]))
    made.write()
    old, new = ("10.96.0.0", "fd00:10:96::"), ("10.1.0.0", "10.96.0.0", "fd00:10:96::")
    assert set(seen) == {(), new} or set(seen) == {(), old, new}
    assert seen[-1] == new


def test_a_full_table_is_said_and_heals() -> None:
    """What a batch wrote before there was no more room counts as written."""
    tables = Tables(size=3)
    made = tables.on()
    services = {f"10.96.0.{n}": ObjectKey("default", f"s{n}") for n in range(1, 6)}
    for address, key in services.items():
        made.claim(key, entries(address))
    made.write()
    assert "raise max-services" in made.problem and made.pending
    there = sorted(tables.addresses())
    assert len(there) == 3
    for address in there[:2]:
        made.claim(services.pop(address), {})
    made.write()
    assert tables.addresses() == dict.fromkeys(services, CLUSTER)
    assert not made.problem and not made.pending
