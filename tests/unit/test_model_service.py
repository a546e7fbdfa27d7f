"""What a Service means: the rules of Kubernetes that frontends and endpoints follow, one case each."""

from __future__ import annotations

import itertools

import pytest

from waggle.model.choice import NodeFacts, cluster_set
from waggle.model.endpoints import Endpoint, pod_address, pod_endpoints, slice_endpoints, target_port
from waggle.model.objects import (
    HEADLESS_LABEL,
    SERVICE_PROXY_NAME_LABEL,
    Container,
    ContainerPort,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    ObjectMeta,
    Pod,
    PodCondition,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
)
from waggle.model.objects import Endpoint as SliceEndpoint
from waggle.model.service import (
    Family,
    Frontend,
    FrontendKind,
    cluster_ips,
    families,
    family_of,
    frontends,
    is_proxied,
)

HERE = NodeFacts("node1")

V4, V6 = Family.IPV4, Family.IPV6
HTTP = ServicePort(80, "http", "TCP", "web")
HTTP_SLICE_PORT = EndpointPort("http", "TCP", 8080)


def service(labels: dict[str, str] | None = None, **spec) -> Service:
    return Service(ObjectMeta("web", "default", labels=labels), ServiceSpec(**spec))


def piece(*endpoints: SliceEndpoint, ports=(HTTP_SLICE_PORT,), address_type="IPv4", labels=None) -> EndpointSlice:
    return EndpointSlice(ObjectMeta("web-1", "default", labels=labels), address_type, list(endpoints), list(ports))


def end(*addresses: str, node: str | None = None, **conditions: bool | None) -> SliceEndpoint:
    return SliceEndpoint(list(addresses), EndpointConditions(**conditions), node)


def pod(
    name: str = "web-1",
    *addresses: str,
    ready: bool = True,
    labels: dict[str, str] | None = None,
    phase: str = "Running",
    deleted: bool = False,
    ports: tuple[ContainerPort, ...] = (ContainerPort(8080, "web"),),
    sidecars: tuple[Container, ...] = (),
    **spec,
) -> Pod:
    addresses = addresses or ("10.0.0.1",)
    return Pod(
        ObjectMeta(
            name,
            "default",
            labels={"app": "web"} if labels is None else labels,
            deletion_timestamp="2026-01-01T00:00:00Z" if deleted else None,
        ),
        PodSpec(containers=[Container("main", ports=list(ports))], init_containers=list(sidecars), **spec),
        PodStatus(
            phase,
            addresses[0],
            [PodIP(address) for address in addresses],
            conditions=[PodCondition("Ready", "True" if ready else "False")],
        ),
    )


def where(endpoints: list[Endpoint]) -> list[str]:
    return sorted(f"{e.address} {e.port}" for e in endpoints)


# -- the Service ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "proxied"),
    [
        (service(cluster_ip="10.96.0.1"), True),
        (service(type="NodePort"), True),
        (service(type="LoadBalancer", cluster_ip="10.96.0.1"), True),
        (service(type="ExternalName"), False),
        (service(type="ExternalName", cluster_ip="10.96.0.1"), False),
        (service(cluster_ip="None"), False),
        (service({SERVICE_PROXY_NAME_LABEL: "other"}, cluster_ip="10.96.0.1"), False),
        (service({SERVICE_PROXY_NAME_LABEL: ""}, cluster_ip="10.96.0.1"), False),
        (service({"app": "web"}, cluster_ip="10.96.0.1"), True),
    ],
    ids=[
        "ClusterIP",
        "NodePort without cluster address",
        "LoadBalancer",
        "ExternalName",
        "ExternalName that kept its address",
        "headless",
        "another proxy's",
        "another proxy's, empty value",
        "other labels",
    ],
)
def test_is_proxied(subject: Service, proxied: bool):
    assert is_proxied(subject) is proxied


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, []),
        ({"cluster_ip": "None"}, []),
        ({"cluster_ip": "None", "cluster_ips": ["None"]}, []),
        ({"cluster_ip": "10.96.0.1"}, ["10.96.0.1"]),
        ({"cluster_ip": "10.96.0.1", "cluster_ips": ["10.96.0.1", "fd00::1"]}, ["10.96.0.1", "fd00::1"]),
        ({"cluster_ip": "10.96.0.9", "cluster_ips": ["10.96.0.1"]}, ["10.96.0.1"]),
        ({"cluster_ips": ["", "fd00::1"]}, ["fd00::1"]),
    ],
)
def test_cluster_ips_prefers_the_list(spec: dict, expected: list[str]):
    assert cluster_ips(service(**spec)) == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"cluster_ip": "10.96.0.1"}, [V4]),
        ({"cluster_ip": "fd00::1"}, [V6]),
        ({"cluster_ips": ["fd00::1", "10.96.0.1"]}, [V4, V6]),
        ({"type": "NodePort", "ip_families": ["IPv6"]}, [V6]),
        ({"type": "NodePort", "ip_families": ["IPv6", "IPv4"]}, [V4, V6]),
        ({"type": "NodePort"}, [V4, V6]),
        ({"cluster_ip": "10.96.0.1", "ip_families": ["IPv4"]}, [V4]),
        ({"cluster_ip": "10.96.0.1", "ip_families": ["IPv9"]}, [V4]),
    ],
)
def test_families(spec: dict, expected: list[Family]):
    assert families(service(**spec)) == expected


@pytest.mark.parametrize(
    ("address", "family"), [("10.0.0.1", V4), ("::1", V6), ("fd00:a::1", V6), ("::ffff:10.0.0.1", V6)]
)
def test_family_of(address: str, family: Family):
    assert family_of(address) is family


@pytest.mark.parametrize(
    ("spec", "family", "expected"),
    [
        ({"cluster_ip": "10.96.0.1"}, V4, ["10.96.0.1 80"]),
        ({"cluster_ip": "10.96.0.1"}, V6, []),
        ({"type": "NodePort", "cluster_ip": "10.96.0.1"}, V4, ["10.96.0.1 80", " 30080"]),
        ({"type": "LoadBalancer", "cluster_ip": "10.96.0.1"}, V4, ["10.96.0.1 80", " 30080"]),
        ({"type": "NodePort"}, V6, [" 30080"]),
        ({"type": "ClusterIP"}, V4, []),  # a nodePort that a change of type left behind
        ({"cluster_ips": ["10.96.0.1", "fd00::1"]}, V6, ["fd00::1 80"]),
    ],
)
def test_frontends(spec: dict, family: Family, expected: list[str]):
    made = frontends(service(**spec), ServicePort(80, node_port=30080), family)
    assert [f"{f.address} {f.port}" for f in made] == expected
    assert {f.kind for f in made if f.address} <= {FrontendKind.CLUSTER_IP}


def test_a_node_port_of_zero_is_no_frontend():
    made = frontends(service(type="NodePort", cluster_ip="10.96.0.1"), ServicePort(80), V4)
    assert made == [Frontend(FrontendKind.CLUSTER_IP, "10.96.0.1", 80)]


# -- endpoints from slices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, (True, True, False)),
        ({"ready": None, "serving": None, "terminating": None}, (True, True, False)),
        ({"ready": False}, (False, True, False)),
        ({"serving": False}, (True, False, False)),
        ({"ready": False, "serving": True, "terminating": True}, (False, True, True)),
        ({"ready": True, "serving": True, "terminating": True}, (True, True, True)),  # publishNotReadyAddresses
    ],
)
def test_a_condition_that_is_not_said_means_ready_serving_and_not_terminating(conditions, expected):
    (found,) = slice_endpoints([piece(end("10.0.0.1", **conditions))], HTTP, V4)
    assert (found.ready, found.serving, found.terminating) == expected


def test_only_the_first_address_of_an_endpoint_counts():
    assert where(slice_endpoints([piece(end("10.0.0.1", "10.0.0.2"), end())], HTTP, V4)) == ["10.0.0.1 8080"]


def test_the_node_of_an_endpoint_is_kept():
    found = slice_endpoints([piece(end("10.0.0.1", node="a"), end("10.0.0.2"))], HTTP, V4)
    assert {e.address: e.node for e in found} == {"10.0.0.1": "a", "10.0.0.2": None}


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        ([], []),
        ([EndpointPort("http", "TCP", 8080)], ["10.0.0.1 8080"]),
        ([EndpointPort("http", None, 8080)], ["10.0.0.1 8080"]),
        ([EndpointPort("http", "UDP", 8080)], []),
        ([EndpointPort("http", "SCTP", 8080)], []),
        ([EndpointPort("metrics", "TCP", 9090)], []),
        ([EndpointPort(None, "TCP", 8080)], []),
        ([EndpointPort("", "TCP", 8080)], []),
        ([EndpointPort("http", "TCP", None)], []),
        ([EndpointPort("http", "TCP", 0)], []),
        ([EndpointPort("metrics", "TCP", 9090), EndpointPort("http", "TCP", 8080)], ["10.0.0.1 8080"]),
        (
            [EndpointPort("http", "TCP", 8080), EndpointPort("http", "TCP", 8081)],
            ["10.0.0.1 8080", "10.0.0.1 8081"],
        ),
    ],
)
def test_which_slice_ports_serve_a_service_port(ports: list[EndpointPort], expected: list[str]):
    assert where(slice_endpoints([piece(end("10.0.0.1"), ports=ports)], HTTP, V4)) == expected


def test_a_service_port_without_name_is_served_by_the_slice_port_with_the_empty_name_only():
    one = piece(end("10.0.0.1"), ports=[EndpointPort("", "TCP", 8080), EndpointPort(None, "TCP", 8081)])
    assert where(slice_endpoints([one], ServicePort(80), V4)) == ["10.0.0.1 8080"]


def test_a_named_target_port_may_be_another_number_in_each_slice():
    slices = [
        piece(end("10.0.0.1"), ports=[EndpointPort("http", "TCP", 8080)]),
        piece(end("10.0.0.2"), ports=[EndpointPort("http", "TCP", 9090)]),
    ]
    assert where(slice_endpoints(slices, HTTP, V4)) == ["10.0.0.1 8080", "10.0.0.2 9090"]


@pytest.mark.parametrize(
    ("address_type", "family", "count"),
    [("IPv4", V4, 1), ("IPv4", V6, 0), ("IPv6", V6, 1), ("IPv6", V4, 0), ("FQDN", V4, 0), ("FQDN", V6, 0)],
)
def test_slices_of_another_address_type_are_ignored(address_type: str, family: Family, count: int):
    address = {"IPv4": "10.0.0.1", "IPv6": "fd00::1", "FQDN": "example.org"}[address_type]
    assert len(slice_endpoints([piece(end(address), address_type=address_type)], HTTP, family)) == count


@pytest.mark.parametrize("value", ["", "true", "false"])
def test_a_slice_with_the_headless_label_is_ignored_whatever_its_value(value: str):
    slices = [piece(end("10.0.0.1"), labels={HEADLESS_LABEL: value}), piece(end("10.0.0.2"))]
    assert where(slice_endpoints(slices, HTTP, V4)) == ["10.0.0.2 8080"]


def test_slices_without_endpoints_or_ports_give_none():
    empty = EndpointSlice(ObjectMeta("web-1", "default"))
    assert slice_endpoints([empty, piece(), piece(end("10.0.0.1"), ports=())], HTTP, V4) == []


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_of_the_same_address_in_several_slices_the_one_that_does_not_terminate_wins(order):
    slices = [
        piece(end("10.0.0.1", ready=False, terminating=True, node="dying")),
        piece(end("10.0.0.1", ready=True, node="alive")),
        piece(end("10.0.0.1", ready=False, serving=False, terminating=True, node="dead")),
    ]
    (found,) = slice_endpoints([slices[i] for i in order], HTTP, V4)
    assert found == Endpoint("10.0.0.1", 8080, True, True, False, "alive")


def test_of_equally_good_entries_the_same_wins_whatever_the_order_of_slices():
    a, b = (
        EndpointSlice(ObjectMeta(name, "default"), "IPv4", [end("10.0.0.1", node=node)], [HTTP_SLICE_PORT])
        for name, node in (("web-a", "node1"), ("web-b", "node2"))
    )
    assert slice_endpoints([a, b], HTTP, V4) == slice_endpoints([b, a], HTTP, V4)


def test_of_two_pods_with_one_address_the_same_counts_whichever_came_first():
    subject = service(selector={"app": "web"})
    a, b = pod("web-a", node_name="node1"), pod("web-b", node_name="node2")
    assert pod_endpoints(subject, [a, b], HTTP, V4) == pod_endpoints(subject, [b, a], HTTP, V4)


@pytest.mark.parametrize("terminating", [False, True])
def test_of_equally_good_entries_the_last_seen_wins(terminating: bool):
    slices = [piece(end("10.0.0.1", terminating=terminating, node=node)) for node in ("old", "new")]
    (found,) = slice_endpoints(slices, HTTP, V4)
    assert found.node == "new"


@pytest.mark.parametrize("terminating", [False, True])
def test_of_two_entries_the_ready_one_wins_in_either_order(terminating: bool):
    slices = [piece(end("10.0.0.1", ready=ready, terminating=terminating)) for ready in (True, False)]
    for order in (slices, slices[::-1]):
        (found,) = slice_endpoints(order, HTTP, V4)
        assert found.ready


def test_the_same_address_with_two_ports_is_two_endpoints():
    slices = [
        piece(end("10.0.0.1", terminating=True), ports=[EndpointPort("http", "TCP", 8081)]),
        piece(end("10.0.0.1"), ports=[EndpointPort("http", "TCP", 8080)]),
    ]
    found = {e.port: e.terminating for e in slice_endpoints(slices, HTTP, V4)}
    assert found == {8080: False, 8081: True}


# -- endpoints from a selector ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "labels", "selected"),
    [
        ({"app": "web"}, {"app": "web"}, True),
        ({"app": "web"}, {"app": "web", "tier": "front"}, True),
        ({"app": "web", "tier": "front"}, {"app": "web"}, False),
        ({"app": "web"}, {"app": "db"}, False),
        ({"app": "web"}, {}, False),
        ({"app": ""}, {}, False),
        ({}, {"app": "web"}, False),
        (None, {"app": "web"}, False),
    ],
)
def test_the_selector_selects(selector, labels, selected: bool):
    found = pod_endpoints(service(selector=selector), [pod(labels=labels)], HTTP, V4)
    assert bool(found) is selected


def test_a_pod_without_labels_is_selected_by_nothing():
    bare = Pod(ObjectMeta("web-1", "default"), status=PodStatus("Running", "10.0.0.1"))
    assert pod_endpoints(service(selector={"app": "web"}), [bare], ServicePort(80), V4) == []


@pytest.mark.parametrize(
    ("phase", "counts"),
    [("Running", True), ("Pending", True), ("Unknown", True), ("", True), ("Succeeded", False), ("Failed", False)],
)
@pytest.mark.parametrize("publish", [False, True])
def test_pods_that_have_finished_are_no_endpoints(phase: str, counts: bool, publish: bool):
    owner = service(selector={"app": "web"}, publish_not_ready_addresses=publish)
    assert bool(pod_endpoints(owner, [pod(phase=phase)], HTTP, V4)) is counts


@pytest.mark.parametrize(
    ("ready", "deleted", "publish", "expected"),
    [
        (True, False, False, (True, True, False)),
        (False, False, False, (False, False, False)),
        (True, True, False, (False, True, True)),
        (False, True, False, (False, False, True)),
        (True, False, True, (True, True, False)),
        (False, False, True, (True, False, False)),
        (True, True, True, (True, True, True)),
        (False, True, True, (True, False, True)),
    ],
)
def test_readiness_of_a_pod(ready: bool, deleted: bool, publish: bool, expected: tuple[bool, bool, bool]):
    owner = service(selector={"app": "web"}, publish_not_ready_addresses=publish)
    (found,) = pod_endpoints(owner, [pod(ready=ready, deleted=deleted)], HTTP, V4)
    assert (found.ready, found.serving, found.terminating) == expected


@pytest.mark.parametrize(
    "conditions",
    [
        [],
        [PodCondition("Ready", "Unknown")],
        [PodCondition("ContainersReady", "True"), PodCondition("Initialized", "True")],
    ],
)
def test_without_a_true_ready_condition_a_pod_is_not_ready(conditions: list[PodCondition]):
    one = Pod(
        ObjectMeta("web-1", "default", labels={"app": "web"}),
        status=PodStatus("Running", "10.0.0.1", [], "", conditions),
    )
    (found,) = pod_endpoints(service(selector={"app": "web"}), [one], ServicePort(80), V4)
    assert not found.ready and not found.serving


def test_a_pod_without_address_is_no_endpoint():
    one = Pod(ObjectMeta("web-1", "default", labels={"app": "web"}), status=PodStatus("Pending"))
    assert pod_endpoints(service(selector={"app": "web"}), [one], ServicePort(80), V4) == []


@pytest.mark.parametrize(
    ("status", "v4", "v6"),
    [
        (PodStatus(pod_ip="10.0.0.1"), "10.0.0.1", None),
        (PodStatus(pod_ip="fd00::1"), None, "fd00::1"),
        (PodStatus(pod_ip="10.0.0.1", pod_ips=[PodIP("10.0.0.1"), PodIP("fd00::1")]), "10.0.0.1", "fd00::1"),
        (PodStatus(pod_ip="fd00::1", pod_ips=[PodIP("fd00::1"), PodIP("10.0.0.1")]), "10.0.0.1", "fd00::1"),
        (PodStatus(), None, None),
    ],
)
def test_pod_address_by_family(status: PodStatus, v4: str | None, v6: str | None):
    one = Pod(ObjectMeta("web-1", "default"), status=status)
    assert (pod_address(one, V4), pod_address(one, V6)) == (v4, v6)


def test_a_dual_stack_pod_is_one_endpoint_in_each_family():
    owner, one = service(selector={"app": "web"}), pod("web-1", "10.0.0.1", "fd00::1")
    assert where(pod_endpoints(owner, [one], HTTP, V4)) == ["10.0.0.1 8080"]
    assert where(pod_endpoints(owner, [one], HTTP, V6)) == ["fd00::1 8080"]


@pytest.mark.parametrize("target", [None, 0, ""])
def test_without_a_target_port_the_port_itself_is_the_target(target):
    assert target_port(pod(), ServicePort(80, target_port=target)) == 80


def test_a_number_needs_no_container_port():
    assert target_port(pod(ports=()), ServicePort(80, target_port=9000)) == 9000


@pytest.mark.parametrize(
    ("ports", "protocol", "expected"),
    [
        ((ContainerPort(8080, "web"),), "TCP", 8080),
        ((ContainerPort(8080, "web"),), "UDP", None),
        ((ContainerPort(5353, "web", "UDP"), ContainerPort(8080, "web", "TCP")), "TCP", 8080),
        ((ContainerPort(8080, "admin"),), "TCP", None),
        ((ContainerPort(8080),), "TCP", None),
        ((), "TCP", None),
        ((ContainerPort(8080, "web"), ContainerPort(8081, "web")), "TCP", 8080),
    ],
)
def test_a_named_target_port_is_looked_up_by_name_and_protocol(ports, protocol: str, expected: int | None):
    assert target_port(pod(ports=ports), ServicePort(80, "http", protocol, "web")) == expected


def test_a_pod_without_the_named_port_is_no_endpoint_and_the_others_are():
    pods = [
        pod("a", "10.0.0.1", ports=()),
        pod("b", "10.0.0.2"),
        pod("c", "10.0.0.3", ports=(ContainerPort(9, "web"),)),
    ]
    assert where(pod_endpoints(service(selector={"app": "web"}), pods, HTTP, V4)) == ["10.0.0.2 8080", "10.0.0.3 9"]


@pytest.mark.parametrize(("policy", "expected"), [("Always", 7000), ("", None), ("Never", None)])
def test_init_containers_offer_ports_only_where_they_keep_running(policy: str, expected: int | None):
    sidecar = Container("proxy", ports=[ContainerPort(7000, "web")], restart_policy=policy)
    assert target_port(pod(ports=(), sidecars=(sidecar,)), HTTP) == expected


def test_containers_go_before_sidecars():
    sidecar = Container("proxy", ports=[ContainerPort(7000, "web")], restart_policy="Always")
    assert target_port(pod(sidecars=(sidecar,)), HTTP) == 8080


@pytest.mark.parametrize("first_terminates", [False, True])
def test_of_two_pods_with_one_address_the_one_that_does_not_terminate_wins(first_terminates: bool):
    pods = [pod("a", "10.0.0.1", deleted=first_terminates), pod("b", "10.0.0.1", deleted=not first_terminates)]
    (found,) = pod_endpoints(service(selector={"app": "web"}), pods, HTTP, V4)
    assert (found.ready, found.terminating) == (True, False)


def test_pods_on_the_host_network_are_endpoints_with_the_address_of_their_node():
    one = pod("web-1", "192.168.1.10", host_network=True, node_name="node1")
    (found,) = pod_endpoints(service(selector={"app": "web"}), [one], HTTP, V4)
    assert found == Endpoint("192.168.1.10", 8080, True, True, False, "node1")


def test_a_pod_that_is_on_no_node_yet_is_nobodys():
    (found,) = pod_endpoints(service(selector={"app": "web"}), [pod()], HTTP, V4)
    assert found.node is None


# -- which endpoints are chosen from ----------------------------------------------------------------------------------


def made(name: str) -> Endpoint:
    """r: ready; s: serving; t: terminating."""
    return Endpoint(f"10.0.0.{ord(name[0]) % 64}", 80, "r" in name[1:], "s" in name[1:], "t" in name[1:], None)


@pytest.mark.parametrize(
    ("endpoints", "chosen"),
    [
        ("", ""),
        ("ars bs", "ars"),
        ("ars brs", "ars brs"),
        ("ars bst", "ars"),  # one is ready: nobody goes to those that terminate
        ("ast bst cs d", "ast bst"),  # none is ready: those that terminate and still serve
        ("at b cs", ""),  # not ready and not terminating is never used
        ("arst bst", "arst"),  # publishNotReadyAddresses: ready although terminating
        ("ar b", "ar"),  # ready decides, serving does not matter
    ],
)
def test_cluster_set(endpoints: str, chosen: str):
    assert cluster_set((made(name) for name in endpoints.split()), HERE) == [made(name) for name in chosen.split()]


@pytest.mark.parametrize("bits", list(itertools.product([False, True], repeat=3)))
def test_an_endpoint_alone_is_chosen_when_ready_or_when_it_serves_while_it_terminates(bits):
    ready, serving, terminating = bits
    one = Endpoint("10.0.0.1", 80, ready, serving, terminating, None)
    assert bool(cluster_set([one], HERE)) is (ready or (serving and terminating))
