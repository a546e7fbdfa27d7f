"""Services become rows: what packets will find, decoded back from the bytes that the maps get."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from waggle.abi._generated import BACKEND_SIZE, Backend, RangeKey, Scope, ServiceFlag, ServiceKey
from waggle.abi.address import protocol_name, unpack_address
from waggle.model.choice import NodeFacts
from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_NAME_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    ClientIPConfig,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    NamedHint,
    ObjectKey,
    ObjectMeta,
    Pod,
    PodCondition,
    PodIP,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
    SessionAffinityConfig,
)
from waggle.model.objects import Endpoint as SliceEndpoint
from waggle.model.service import Family
from waggle.plan.services import FrontendSettings, PlanContext, ServiceRow, plan_service, view_service
from waggle.store import Store

HERE = PlanContext(NodeFacts("node1", "zone-a"), frozenset({"192.0.2.1"}))
WEB = ObjectKey("default", "web")
HTTP = ServicePort(80, "http")


def service(labels: dict[str, str] | None = None, ports: tuple[ServicePort, ...] = (HTTP,), **spec) -> Service:
    spec.setdefault("cluster_ip", "10.96.0.1")
    return Service(ObjectMeta("web", "default", labels=labels), ServiceSpec(ports=list(ports), **spec))


def piece(
    name: str,
    *addresses: str,
    port: int = 8080,
    port_name: str = "http",
    protocol: str = "TCP",
    address_type: str = "IPv4",
    labels: dict[str, str] | None = None,
    of: str = "web",
    **conditions: bool,
) -> EndpointSlice:
    return EndpointSlice(
        ObjectMeta(name, "default", labels={SERVICE_NAME_LABEL: of} | (labels or {})),
        address_type,
        [SliceEndpoint([address], EndpointConditions(**conditions)) for address in addresses],
        [EndpointPort(port_name, protocol, port)],
    )


def pod(name: str, *addresses: str, ready: bool = True, namespace: str = "default") -> Pod:
    return Pod(
        ObjectMeta(name, namespace, labels={"app": "web"}),
        status=PodStatus(
            "Running",
            pod_ips=[PodIP(address) for address in addresses],
            conditions=[PodCondition("Ready", "True" if ready else "False")],
        ),
    )


def store_of(*objects) -> Store:
    store = Store()
    for obj in objects:
        store.upsert(obj, "test")
    return store


def shown(rows: list[ServiceRow]) -> dict[str, tuple[str, ...]]:
    """Frontend ("TCP 10.96.0.1 80", with "*" behind a NodePort, then " external" and other flags) → backends
    ("10.0.0.1 8080") in their order."""
    found: dict[str, tuple[str, ...]] = {}
    for row in rows:
        backends = [
            Backend.unpack(row.backends[at : at + BACKEND_SIZE]) for at in range(0, len(row.backends), BACKEND_SIZE)
        ]
        for raw, settings in zip(row.keys, row.settings, strict=True):
            chosen = backends[: len(backends) - settings.draining]
            draining = backends[len(chosen) :]
            assert all([b.pack() for b in part] == sorted(b.pack() for b in part) for part in (chosen, draining))
            key = ServiceKey.unpack(raw)
            marks = "*" if settings.flags & ServiceFlag.NODEPORT else ""
            marks += " external" if key.scope == Scope.EXTERNAL else ""
            for flag in (ServiceFlag.HAS_EXTERNAL, ServiceFlag.KEEP_CLIENT, ServiceFlag.EMPTY_DROP):
                marks += f" {flag.name.lower()}" if settings.flags & flag else ""
            name = f"{protocol_name(key.proto)} {unpack_address(key.addr)} {key.port}{marks}"
            assert name not in found
            found[name] = tuple(f"{unpack_address(b.addr)} {b.port}" for b in chosen)
            found[name] += tuple(f"{unpack_address(b.addr)} {b.port} draining" for b in draining)
    return found


def planned(*objects) -> dict[str, tuple[str, ...]]:
    return shown(plan_service(store_of(*objects), WEB, HERE))


# -- frontends --------------------------------------------------------------------------------------------------------


def test_a_cluster_address_leads_to_the_endpoints_of_its_slice():
    assert planned(service(), piece("a", "10.0.0.2", "10.0.0.1")) == {
        "TCP 10.96.0.1 80": ("10.0.0.1 8080", "10.0.0.2 8080")
    }


def test_a_service_without_endpoints_has_its_frontend_and_an_empty_set():
    assert planned(service()) == {"TCP 10.96.0.1 80": ()}


@pytest.mark.parametrize(("protocol", "number"), [("TCP", 6), ("UDP", 17), ("SCTP", 132)])
def test_the_protocol_is_that_of_the_port(protocol: str, number: int):
    store = store_of(
        service(ports=(ServicePort(53, "dns", protocol),)),
        piece("a", "10.0.0.1", port_name="dns", protocol=protocol, port=53),
    )
    (row,) = plan_service(store, WEB, HERE)
    assert ServiceKey.unpack(row.keys[0]).proto == number
    assert shown([row]) == {f"{protocol} 10.96.0.1 53": ("10.0.0.1 53",)}


def test_a_port_of_an_unknown_protocol_is_left_out_and_the_others_are_not():
    subject = service(ports=(ServicePort(1, "odd", "ICMP"), HTTP))
    assert planned(subject, piece("a", "10.0.0.1")) == {"TCP 10.96.0.1 80": ("10.0.0.1 8080",)}


def test_tcp_and_udp_on_one_port_are_two_rows():
    subject = service(ports=(ServicePort(53, "dns-tcp", "TCP"), ServicePort(53, "dns", "UDP")))
    found = planned(
        subject,
        piece("a", "10.0.0.1", port_name="dns-tcp", port=1053),
        piece("b", "10.0.0.1", port_name="dns", protocol="UDP", port=2053),
    )
    assert found == {"TCP 10.96.0.1 53": ("10.0.0.1 1053",), "UDP 10.96.0.1 53": ("10.0.0.1 2053",)}


@pytest.mark.parametrize(
    ("cluster_ips", "expected"),
    [
        (["10.96.0.1"], {"TCP 10.96.0.1 80", "TCP 0.0.0.0 30080*"}),
        (["fd00::1"], {"TCP fd00::1 80", "TCP :: 30080*"}),
        (["10.96.0.1", "fd00::1"], {"TCP 10.96.0.1 80", "TCP 0.0.0.0 30080*", "TCP fd00::1 80", "TCP :: 30080*"}),
        ([], {"TCP 0.0.0.0 30080*", "TCP :: 30080*"}),
    ],
)
def test_a_node_port_is_a_wildcard_of_each_family(cluster_ips: list[str], expected: set[str]):
    subject = service(
        type="NodePort", cluster_ip="", cluster_ips=cluster_ips, ports=(ServicePort(80, "http", node_port=30080),)
    )
    assert set(planned(subject)) == expected


def test_cluster_address_and_node_port_share_one_row():
    store = store_of(service(type="NodePort", ports=(ServicePort(80, "http", node_port=30080),)))
    (row,) = plan_service(store, WEB, HERE)
    assert len(row.keys) == len(row.settings) == 2


def test_each_family_has_its_own_endpoints():
    subject = service(cluster_ips=["10.96.0.1", "fd00::1"])
    found = planned(subject, piece("a", "10.0.0.1"), piece("b", "fd00::10", address_type="IPv6"))
    assert found == {"TCP 10.96.0.1 80": ("10.0.0.1 8080",), "TCP fd00::1 80": ("fd00::10 8080",)}


# -- nothing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subject",
    [
        service(type="ExternalName"),
        service(cluster_ip="None"),
        service({SERVICE_PROXY_NAME_LABEL: "other"}),
        service(cluster_ip=""),
        service(ports=()),
    ],
    ids=["ExternalName", "headless", "another proxy's", "no address", "no ports"],
)
def test_a_service_that_is_not_served_gives_nothing(subject: Service):
    store = store_of(subject, piece("a", "10.0.0.1"))
    assert plan_service(store, WEB, HERE) == []
    assert view_service(store, WEB, HERE) == []


def test_an_unknown_service_gives_nothing_though_its_slices_are_there():
    store = store_of(piece("a", "10.0.0.1"))
    assert plan_service(store, WEB, HERE) == view_service(store, WEB, HERE) == []


def test_a_slice_of_another_service_or_namespace_is_not_looked_at():
    foreign = EndpointSlice(
        ObjectMeta("a", "other", labels={SERVICE_NAME_LABEL: "web"}),
        "IPv4",
        [SliceEndpoint(["10.0.0.9"])],
        [EndpointPort("http", "TCP", 8080)],
    )
    assert planned(service(), foreign, piece("b", "10.0.0.8", of="api")) == {"TCP 10.96.0.1 80": ()}


# -- endpoints --------------------------------------------------------------------------------------------------------


def test_without_slices_the_selector_decides():
    subject = service(selector={"app": "web"}, ports=(ServicePort(80, target_port=8080),))
    found = planned(subject, pod("a", "10.0.0.1"), pod("b", "10.0.0.2", ready=False), pod("c", "10.0.0.3"))
    assert found == {"TCP 10.96.0.1 80": ("10.0.0.1 8080", "10.0.0.3 8080")}


def test_pods_of_another_namespace_are_not_selected():
    subject = service(selector={"app": "web"})
    assert planned(subject, pod("a", "10.0.0.1", namespace="other")) == {"TCP 10.96.0.1 80": ()}


@pytest.mark.parametrize(
    "slice_",
    [
        piece("a", "10.0.0.9"),
        piece("a"),
        piece("a", "10.0.0.9", ready=False),
        piece("a", "10.0.0.9", labels={HEADLESS_LABEL: ""}),
        piece("a", "fd00::9", address_type="IPv6"),
    ],
    ids=["an endpoint", "empty", "none ready", "headless label", "other family"],
)
def test_slices_win_over_the_selector_whatever_they_say(slice_: EndpointSlice):
    (backends,) = planned(service(selector={"app": "web"}), pod("b", "10.0.0.1"), slice_).values()
    assert "10.0.0.1 80" not in backends


def test_when_the_last_slice_goes_the_selector_decides_again():
    store = store_of(service(selector={"app": "web"}), pod("b", "10.0.0.1"), piece("a", "10.0.0.9"))
    assert shown(plan_service(store, WEB, HERE)) == {"TCP 10.96.0.1 80": ("10.0.0.9 8080",)}
    store.delete("EndpointSlice", ObjectKey("default", "a"), "test")
    assert shown(plan_service(store, WEB, HERE)) == {"TCP 10.96.0.1 80": ("10.0.0.1 80",)}


def test_endpoints_that_terminate_serve_when_none_is_ready():
    dying = piece("a", "10.0.0.1", ready=False, serving=True, terminating=True)
    assert planned(service(), dying) == {"TCP 10.96.0.1 80": ("10.0.0.1 8080",)}
    assert planned(service(), dying, piece("b", "10.0.0.2")) == {"TCP 10.96.0.1 80": ("10.0.0.2 8080",)}


def test_an_address_that_cannot_be_one_is_left_out_and_the_others_are_not():
    """The API server let addresses like 010.0.0.1 pass for years. One of them must not stop all Services."""
    found = planned(service(), piece("a", "10.0.0.1", "010.0.0.2", "", "web.example.org", "10.0.0.3"))
    assert found == {"TCP 10.96.0.1 80": ("10.0.0.1 8080", "10.0.0.3 8080")}


def test_a_cluster_address_that_cannot_be_one_is_no_frontend():
    subject = service(cluster_ips=["010.96.0.1", "10.96.0.2", "fd00::zz"])
    assert planned(subject, piece("a", "10.0.0.1")) == {"TCP 10.96.0.2 80": ("10.0.0.1 8080",)}


def test_the_view_has_every_endpoint_and_what_is_chosen_of_them():
    subject = service(cluster_ips=["10.96.0.1", "fd00::1"])
    (four, six) = view_service(
        store_of(subject, piece("a", "10.0.0.1"), piece("b", "10.0.0.2", ready=False)), WEB, HERE
    )
    assert (four.family, six.family) == (Family.IPV4, Family.IPV6)
    assert [e.address for e in four.endpoints] == ["10.0.0.1", "10.0.0.2"]
    assert [e.address for e in four.backends] == ["10.0.0.1"]
    assert (six.endpoints, six.backends) == ([], [])
    assert [f.address for f in six.frontends] == ["fd00::1"]


# -- equal sets are equal bytes ---------------------------------------------------------------------------------------


@given(
    ends=st.lists(st.tuples(st.integers(1, 40), st.integers(8080, 8082)), min_size=1, max_size=12),
    random=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_equal_sets_give_equal_bytes_whatever_the_order_of_slices_and_endpoints(ends, random, data):
    """The same endpoints, cut into slices in two ways, with copies: an agent that restarts recognises what it wrote."""

    def cut() -> bytes:
        copies = data.draw(st.lists(st.sampled_from(ends), max_size=4))
        rest = [*ends, *copies]
        random.shuffle(rest)
        slices = []
        while rest:
            size = random.randint(1, len(rest))
            part, rest = rest[:size], rest[size:]
            slices += [
                piece(f"s{len(slices)}-{port}", *(f"10.0.0.{n}" for n, p in part if p == port), port=port)
                for port in {p for _, p in part}
            ]
        random.shuffle(slices)
        (row,) = plan_service(store_of(service(), *slices), WEB, HERE)
        return row.backends

    first = cut()
    assert first == cut()
    assert len(first) == len(set(ends)) * BACKEND_SIZE


@given(st.permutations(["a", "b", "c", "d"]))
def test_pods_in_any_order_give_equal_bytes(names):
    subject = service(selector={"app": "web"})
    store = store_of(subject, *(pod(name, f"10.0.0.{ord(name)}") for name in names))
    assert shown(plan_service(store, WEB, HERE)) == {
        "TCP 10.96.0.1 80": tuple(f"10.0.0.{n} 80" for n in range(97, 101))
    }


def test_the_order_of_backends_is_that_of_their_bytes():
    """10.0.0.10 after 10.0.0.9: addresses are sorted as numbers, not as text."""
    (backends,) = planned(service(), piece("a", "10.0.0.10", "10.0.0.9", "9.0.0.1")).values()
    assert backends == ("9.0.0.1 8080", "10.0.0.9 8080", "10.0.0.10 8080")


# -- everything but cluster addresses ---------------------------------------------------------------------------------


def balanced(*addresses: str, mode: str | None = None) -> ServiceStatus:
    return ServiceStatus(LoadBalancerStatus([LoadBalancerIngress(address, mode) for address in addresses]))


def on(node: str, *pieces: EndpointSlice) -> list[EndpointSlice]:
    return [replace(p, endpoints=[replace(e, node_name=node) for e in p.endpoints or ()]) for p in pieces]


def test_external_and_load_balancer_addresses():
    subject = replace(
        service(type="LoadBalancer", external_ips=["203.0.113.1", "2001:db8::1"], ports=(ServicePort(80, "http"),)),
        status=balanced("198.51.100.1", "2001:db8::2"),
    )
    frontends = ("TCP 10.96.0.1 80", "TCP 203.0.113.1 80", "TCP 198.51.100.1 80")
    assert planned(subject, piece("a", "10.0.0.1")) == dict.fromkeys(frontends, ("10.0.0.1 8080",))


@pytest.mark.parametrize(("mode", "served"), [(None, True), ("VIP", True), ("Proxy", False)])
def test_only_load_balancers_that_pass_their_address_on_are_frontends(mode, served):
    subject = replace(service(type="LoadBalancer"), status=balanced("198.51.100.1", mode=mode))
    assert ("TCP 198.51.100.1 80" in planned(subject, piece("a", "10.0.0.1"))) is served
    former = replace(service(type="NodePort"), status=balanced("198.51.100.1"))
    assert "TCP 198.51.100.1 80" not in planned(former, piece("a", "10.0.0.1"))


def test_external_traffic_policy_local_gives_the_wire_an_entry_of_its_own():
    port = ServicePort(80, "http", node_port=30080)
    subject = service(type="NodePort", ports=(port,), external_traffic_policy="Local")
    slices = [*on("node1", piece("a", "10.0.0.1")), *on("node2", piece("b", "10.0.0.2"))]
    everywhere = ("10.0.0.1 8080", "10.0.0.2 8080")
    assert planned(subject, *slices) == {
        "TCP 10.96.0.1 80": everywhere,
        "TCP 0.0.0.0 30080* has_external": everywhere,
        "TCP 0.0.0.0 30080* external keep_client": ("10.0.0.1 8080",),
    }
    assert (
        planned(subject, *on("node2", piece("b", "10.0.0.2")))["TCP 0.0.0.0 30080* external keep_client empty_drop"]
        == ()
    )
    assert planned(subject)["TCP 0.0.0.0 30080* external keep_client"] == ()


def test_internal_traffic_policy_local_is_for_the_cluster_address_alone():
    port = ServicePort(80, "http", node_port=30080)
    subject = service(type="NodePort", ports=(port,), internal_traffic_policy="Local")
    assert planned(subject, *on("node2", piece("b", "10.0.0.2"))) == {
        "TCP 10.96.0.1 80 empty_drop": (),
        "TCP 0.0.0.0 30080*": ("10.0.0.2 8080",),
    }


def settings_of(subject: Service, name: str) -> tuple[FrontendSettings, tuple[bytes, ...]]:
    for row in plan_service(store_of(subject, piece("a", "10.0.0.1")), WEB, HERE):
        for key, settings in zip(row.keys, row.settings, strict=True):
            if unpack_address(ServiceKey.unpack(key).addr) == name:
                return settings, row.ranges
    raise AssertionError(name)


def test_affinity_has_one_id_for_all_frontends_of_a_port():
    both = service(cluster_ips=["10.96.0.1"], external_ips=["203.0.113.1"], session_affinity="ClientIP")
    (first, _), (second, _) = settings_of(both, "10.96.0.1"), settings_of(both, "203.0.113.1")
    assert first.affinity_s == second.affinity_s == 10_800
    assert first.id == second.id != 0
    short = SessionAffinityConfig(ClientIPConfig(5))
    assert (
        settings_of(service(session_affinity="ClientIP", session_affinity_config=short), "10.96.0.1")[0].affinity_s == 5
    )
    assert settings_of(service(session_affinity_config=short), "10.96.0.1")[0] == FrontendSettings(0)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], None),
        ([" 10.1.0.0/16 ", "10.2.3.4/32"], {"10.1.0.0/16", "10.2.3.4/32"}),
        (["10.1.0.0/16", "0.0.0.0/0"], None),
        (["2001:db8::/32"], None),
        (["2001:db8::/32", "10.1.0.0/16"], {"10.1.0.0/16"}),
        (["10.1.2.3/16"], {"10.1.0.0/16"}),
        (["rubbish"], None),
        # an address of this node is allowed: so is the load balancer's own
        (["192.0.2.0/24"], {"192.0.2.0/24", "198.51.100.1/32"}),
    ],
)
def test_source_ranges_guard_load_balancer_addresses_alone(ranges, expected):
    subject = replace(
        service(type="LoadBalancer", external_ips=["203.0.113.1"], load_balancer_source_ranges=ranges),
        status=balanced("198.51.100.1"),
    )
    guarded, keys = settings_of(subject, "198.51.100.1")
    assert bool(guarded.ranges) is (expected is not None)
    for open_one in ("10.96.0.1", "203.0.113.1"):
        assert settings_of(subject, open_one)[0].ranges == 0
    decoded = [RangeKey.unpack(key) for key in keys]
    assert {one.ranges for one in decoded} <= {guarded.ranges.to_bytes(8, "little")}
    assert {f"{unpack_address(one.addr)}/{one.prefix - 64 - 96}" for one in decoded} == (expected or set())


def test_equal_lists_of_ranges_have_one_id_whatever_their_order():
    def number(*ranges: str) -> int:
        subject = replace(
            service(type="LoadBalancer", load_balancer_source_ranges=list(ranges)), status=balanced("198.51.100.1")
        )
        return settings_of(subject, "198.51.100.1")[0].ranges

    assert number("10.1.0.0/16", "10.2.0.0/16") == number("10.2.0.0/16", "10.1.0.0/16") != number("10.1.0.0/16")


def test_udp_flows_stay_with_what_serves_whatever_the_policy():
    port = ServicePort(53, "dns", "UDP", node_port=30053)
    subject = service(type="NodePort", ports=(port,), external_traffic_policy="Local")
    dns = {"port": 53, "port_name": "dns", "protocol": "UDP"}
    slices = [
        *on("node1", piece("a", "10.0.0.1", **dns)),
        *on("node2", piece("b", "10.0.0.2", **dns)),
        *on("node1", piece("c", "10.0.0.3", ready=False, serving=True, terminating=True, **dns)),
        *on("node1", piece("d", "10.0.0.4", ready=False, serving=False, **dns)),
    ]
    everywhere = ("10.0.0.1 53", "10.0.0.2 53", "10.0.0.3 53 draining")
    assert planned(subject, *slices) == {
        "UDP 10.96.0.1 53": everywhere,
        "UDP 0.0.0.0 30053* has_external": everywhere,
        "UDP 0.0.0.0 30053* external keep_client": ("10.0.0.1 53", "10.0.0.2 53 draining", "10.0.0.3 53 draining"),
    }


def test_an_endpoint_here_is_known_where_another_node_may_send_to_it():
    """Hints lead zone-b to 10.0.0.2, which is on this node of zone-a: by direct server return, it comes here."""

    def hinted(name: str, zone: str, address: str, **conditions: bool) -> EndpointSlice:
        made = piece(name, address, **conditions)
        hints = EndpointHints(for_zones=[NamedHint(zone)])
        return replace(made, endpoints=[replace(e, hints=hints) for e in made.endpoints or ()])

    slices = [
        *on("node1", hinted("a", "zone-a", "10.0.0.1")),
        *on("node1", hinted("b", "zone-b", "10.0.0.2")),
        *on("node2", hinted("c", "zone-b", "10.0.0.3")),
        *on("node1", hinted("d", "zone-b", "10.0.0.4", ready=False, serving=False)),
    ]
    subject = service()
    assert planned(subject, *slices) == {"TCP 10.96.0.1 80": ("10.0.0.1 8080",)}
    subject = replace(subject, metadata=replace(subject.metadata, annotations={"waggle.dev/forwarding": "dsr"}))
    assert planned(subject, *slices) == {"TCP 10.96.0.1 80": ("10.0.0.1 8080", "10.0.0.2 8080 draining")}
