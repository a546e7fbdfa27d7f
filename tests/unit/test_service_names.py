"""What names of Services mean: Kubernetes' DNS specification, line by line."""

from __future__ import annotations

import ipaddress

import pytest

from waggle.model.objects import (
    SERVICE_NAME_LABEL,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    ObjectMeta,
    Service,
    ServicePort,
    ServiceSpec,
)
from waggle.model.workload import Attached, Workload, pod_rows
from waggle.plan.names import Answer, Outcome, ServiceNames
from waggle.store import Store


def service(name: str, *ports: ServicePort, namespace: str = "default", **spec) -> Service:
    return Service(ObjectMeta(name=name, namespace=namespace), ServiceSpec(ports=list(ports), **spec))


def piece(name: str, *endpoints: tuple[str, bool], family: str = "IPv4", port: int = 8080) -> EndpointSlice:
    return EndpointSlice(
        ObjectMeta(name=f"{name}-{family}", namespace="default", labels={SERVICE_NAME_LABEL: name}),
        family,
        [Endpoint([address], EndpointConditions(ready=ready)) for address, ready in endpoints],
        [EndpointPort("http", "TCP", port)],
    )


HTTP = ServicePort(80, "http", target_port=8080)
DNS_UDP, DNS_TCP = ServicePort(53, "dns", "UDP"), ServicePort(53, "dns", "TCP")


@pytest.fixture
def names() -> ServiceNames:
    store = Store()
    for obj in (
        service("web", HTTP, cluster_ip="10.96.0.1", cluster_ips=["10.96.0.1", "fd00:96::1"]),
        service("dns", DNS_UDP, DNS_TCP, namespace="kube-system", cluster_ip="10.96.0.10"),
        service("db", HTTP, cluster_ip="None"),
        service("idle", HTTP, cluster_ip="None"),
        service("peers", cluster_ip="None", selector={"app": "peer"}),
        service("far", type="ExternalName", external_name="Example.COM."),
        service("bare", ServicePort(80)),
        piece("db", ("10.0.0.2", True), ("10.0.0.3", False), ("10.0.0.4", True)),
        piece("db", ("fd00::2", True), family="IPv6"),
        *pod_rows("here", [Attached("c", ("10.0.0.9",), workload=Workload("podman", "p", {"app": "peer"}, True))]),
    ):
        store.upsert(obj, "test")
    return ServiceNames(
        store, "cluster.local", [ipaddress.ip_network("10.96.0.0/16"), ipaddress.ip_network("fd00:96::/112")]
    )


def ask(names: ServiceNames, name: str, kind: str) -> Answer:
    return names.answer(tuple(name.split(".")), kind)


def data(answer: Answer) -> list[object]:
    assert answer.outcome is Outcome.FOUND
    return [r.data if isinstance(r.data, str) else ".".join(r.data) for r in answer.records]


@pytest.mark.parametrize("suffix", ["svc.cluster.local", "svc"])
def test_cluster_address(names: ServiceNames, suffix: str) -> None:
    name = f"web.default.{suffix}"
    assert data(ask(names, name, "A")) == ["10.96.0.1"]
    assert data(ask(names, name, "AAAA")) == ["fd00:96::1"]
    assert data(ask(names, name, "ANY")) == ["10.96.0.1", "fd00:96::1"]
    assert ".".join(ask(names, name, "A").records[0].owner) == name


def test_no_record_of_a_type_is_not_a_missing_name(names: ServiceNames) -> None:
    for name, kind in (
        ("dns.kube-system.svc.cluster.local", "AAAA"),
        ("web.default.svc.cluster.local", "MX"),
        ("bare.default.svc.cluster.local", "A"),
        ("idle.default.svc.cluster.local", "A"),
        ("default.svc.cluster.local", "A"),
        ("svc.cluster.local", "A"),
        ("cluster.local", "A"),
        ("svc", "A"),
        ("_tcp.web.default.svc.cluster.local", "A"),
        ("_http._tcp.web.default.svc.cluster.local", "A"),
        ("_http._tcp.idle.default.svc.cluster.local", "SRV"),
    ):
        answer = ask(names, name, kind)
        assert (answer.outcome, answer.records) == (Outcome.FOUND, ()), name
        assert answer.zone == (("cluster", "local") if name.endswith("local") else ("svc",))


@pytest.mark.parametrize(
    "name",
    [
        "nope.default.svc.cluster.local",
        "web.nope.svc.cluster.local",
        "nope.svc.cluster.local",
        "nope.cluster.local",
        "web.default.svc.svc",
        "default.svc.svc.cluster.local",
        "10-96-0-1.web.default.svc.cluster.local",
        "_udp.web.default.svc.cluster.local",
        "_http._udp.web.default.svc.cluster.local",
        "_nope._tcp.web.default.svc.cluster.local",
        "http._tcp.web.default.svc.cluster.local",
        "_x._http._tcp.web.default.svc.cluster.local",
        "10-0-0-3.db.default.svc.cluster.local",
        "10-0-0-2.default.pod.cluster.local",
        "web.default.svc.example.com.cluster.local",
    ],
)
def test_missing(names: ServiceNames, name: str) -> None:
    for kind in ("A", "SRV", "ANY"):
        assert ask(names, name, kind).outcome is Outcome.MISSING


@pytest.mark.parametrize("name", ["example.com", "local", "web", "web.default", "svc.com", "xsvc", "mycluster.local"])
def test_names_of_others(names: ServiceNames, name: str) -> None:
    assert ask(names, name, "A").outcome is Outcome.ELSEWHERE


def test_headless(names: ServiceNames) -> None:
    assert data(ask(names, "db.default.svc.cluster.local", "A")) == ["10.0.0.2", "10.0.0.4"], "ready ones alone"
    assert data(ask(names, "db.default.svc.cluster.local", "AAAA")) == ["fd00::2"]
    assert data(ask(names, "10-0-0-2.db.default.svc.cluster.local", "A")) == ["10.0.0.2"]
    assert data(ask(names, "fd00--2.db.default.svc", "AAAA")) == ["fd00::2"]
    assert data(ask(names, "peers.default.svc.cluster.local", "A")) == ["10.0.0.9"], "without ports, from labels"


def test_ports(names: ServiceNames) -> None:
    answer = ask(names, "_http._tcp.web.default.svc.cluster.local", "SRV")
    (record,) = answer.records
    assert (record.port, ".".join(record.data)) == (80, "web.default.svc.cluster.local")
    assert [r.data for r in answer.additional] == ["10.96.0.1", "fd00:96::1"]
    answer = ask(names, "_http._tcp.db.default.svc", "SRV")
    assert {(r.port, ".".join(r.data)) for r in answer.records} == {
        (8080, "10-0-0-2.db.default.svc"),
        (8080, "10-0-0-4.db.default.svc"),
        (8080, "fd00--2.db.default.svc"),
    }
    for record in answer.additional:
        (found,) = data(ask(names, ".".join(record.owner), record.type))
        assert found == record.data
    for protocol in ("udp", "tcp"):
        assert ask(names, f"_dns._{protocol}.dns.kube-system.svc.cluster.local", "SRV").records[0].port == 53


def test_external_name(names: ServiceNames) -> None:
    for kind in ("A", "AAAA", "CNAME"):
        (record,) = ask(names, "far.default.svc.cluster.local", kind).records
        assert (record.type, record.data) == ("CNAME", ("example", "com"))


def test_version(names: ServiceNames) -> None:
    assert data(ask(names, "dns-version.cluster.local", "TXT")) == ["1.1.0"]


def test_addresses_have_names(names: ServiceNames) -> None:
    def back(address: str) -> Answer:
        return ask(names, ipaddress.ip_address(address).reverse_pointer, "PTR")

    assert data(back("10.96.0.1")) == data(back("fd00:96::1")) == ["web.default.svc.cluster.local"]
    assert data(back("10.0.0.4")) == ["10-0-0-4.db.default.svc.cluster.local"]
    assert back("10.96.9.9").outcome is Outcome.MISSING and back("10.96.9.9").zone == ("96", "10", "in-addr", "arpa")
    assert back("fd00:96::9").outcome is Outcome.MISSING and len(back("fd00:96::9").zone) == 28 + 2
    assert back("10.0.0.3").outcome is back("192.0.2.1").outcome is Outcome.ELSEWHERE
    for name in (
        "96.10.in-addr.arpa",
        "x.1.96.10.in-addr.arpa",
        "300.1.96.10.in-addr.arpa",
        "in-addr.arpa",
        "1.ip6.arpa",
    ):
        assert ask(names, name, "PTR").outcome is Outcome.ELSEWHERE


def test_another_domain() -> None:
    store = Store()
    store.upsert(service("web", HTTP, cluster_ip="10.96.0.1"), "test")
    names = ServiceNames(store, "k8s.example.org")
    assert data(ask(names, "web.default.svc.k8s.example.org", "A")) == ["10.96.0.1"]
    assert ask(names, "web.default.svc.cluster.local", "A").outcome is Outcome.ELSEWHERE
    assert names.search("shop") == ["shop.svc.k8s.example.org", "svc.k8s.example.org", "k8s.example.org"]


def test_it_follows_the_store(names: ServiceNames) -> None:
    assert ask(names, "new.svc.cluster.local", "A").outcome is Outcome.MISSING
    names._store.upsert(service("web", HTTP, namespace="new", cluster_ip="10.96.0.77"), "test")
    names.stale = True
    assert ask(names, "new.svc.cluster.local", "A").outcome is Outcome.FOUND
    assert data(ask(names, "77.0.96.10.in-addr.arpa", "PTR")) == ["web.new.svc.cluster.local"]
