"""What the lab fills in for a Service, as an apiserver would."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from waggle.errors import LabError
from waggle.lab.allocation import ServiceAllocator
from waggle.lab.layout import NODE_PORTS, SERVICE_CIDR_V4, SERVICE_CIDR_V6


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": {"ports": [port()], **spec}}


def port(**fields: Any) -> dict[str, Any]:
    return {"port": 80, "protocol": "TCP", **fields}


def complete(document: dict[str, Any], *existing: dict[str, Any]) -> dict[str, Any]:
    return ServiceAllocator(existing).complete(document)["spec"]


def test_an_address_of_the_range_is_chosen() -> None:
    spec = complete(service("a"))
    assert ipaddress.ip_address(spec["clusterIP"]) in ipaddress.ip_network(SERVICE_CIDR_V4)
    assert spec["clusterIPs"] == [spec["clusterIP"]]
    assert spec["ipFamilies"] == ["IPv4"]


@pytest.mark.parametrize("policy", ["PreferDualStack", "RequireDualStack"])
def test_both_families(policy: str) -> None:
    spec = complete(service("a", ipFamilyPolicy=policy))
    first, second = map(ipaddress.ip_address, spec["clusterIPs"])
    assert first in ipaddress.ip_network(SERVICE_CIDR_V4)
    assert second in ipaddress.ip_network(SERVICE_CIDR_V6)


def test_ipv6_alone_and_ipv6_first() -> None:
    assert complete(service("a", ipFamilies=["IPv6"]))["ipFamilies"] == ["IPv6"]
    both = complete(service("a", ipFamilies=["IPv6"], ipFamilyPolicy="PreferDualStack"))
    assert [":" in address for address in both["clusterIPs"]] == [True, False]


def test_a_health_port_where_load_balancers_need_one() -> None:
    document = service("a", type="LoadBalancer", externalTrafficPolicy="Local")
    spec = complete(document)
    health = spec["healthCheckNodePort"]
    assert health in NODE_PORTS and health != spec["ports"][0]["nodePort"]
    existing = {**document, "spec": spec}
    assert complete(document, existing)["healthCheckNodePort"] == health  # applied again
    assert complete(service("b", type="LoadBalancer", externalTrafficPolicy="Local"), existing)[
        "healthCheckNodePort"
    ] not in (health, spec["ports"][0]["nodePort"])
    assert complete(service("b", type="NodePort"), existing)["ports"][0]["nodePort"] != health
    assert "healthCheckNodePort" not in complete(service("a", type="LoadBalancer"), existing)
    with pytest.raises(LabError, match=f"default/a has the node port {health}/TCP"):
        complete(service("b", type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=health), existing)


def test_given_addresses_stay() -> None:
    assert complete(service("a", clusterIP="10.96.7.7"))["clusterIPs"] == ["10.96.7.7"]
    second_given = complete(service("a", clusterIP="10.96.7.7", ipFamilyPolicy="PreferDualStack"))
    assert second_given["clusterIPs"][0] == "10.96.7.7"
    assert len(second_given["clusterIPs"]) == 2


@pytest.mark.parametrize("spec", [{"clusterIP": "None"}, {"type": "ExternalName", "externalName": "example.org"}])
def test_headless_and_external_names_get_nothing(spec: dict[str, Any]) -> None:
    document = service("a", **spec)
    assert complete(document) == document["spec"]


def test_no_two_services_share_anything() -> None:
    allocator = ServiceAllocator([])
    done = [
        allocator.complete(service(f"s{number}", type="NodePort", ipFamilyPolicy="PreferDualStack"))["spec"]
        for number in range(300)
    ]
    assert len({address for spec in done for address in spec["clusterIPs"]}) == 600
    node_ports = [spec["ports"][0]["nodePort"] for spec in done]
    assert len(set(node_ports)) == 300
    assert all(number in NODE_PORTS for number in node_ports)


def test_a_service_applied_again_keeps_what_it_has() -> None:
    document = service("a", type="NodePort", ipFamilyPolicy="PreferDualStack")
    first = ServiceAllocator([]).complete(document)
    others = [ServiceAllocator([first]).complete(service("b", type="NodePort"))]
    assert ServiceAllocator([*others, first]).complete(document) == first


def test_a_new_port_gets_a_node_port_and_the_old_one_keeps_its_own() -> None:
    first = ServiceAllocator([]).complete(service("a", type="NodePort", ports=[port(name="x")]))
    ports = [port(name="y", port=81), port(name="x")]
    second = ServiceAllocator([first]).complete(service("a", type="NodePort", ports=ports))["spec"]["ports"]
    assert second[1]["nodePort"] == first["spec"]["ports"][0]["nodePort"]
    assert second[0]["nodePort"] != second[1]["nodePort"]


def test_what_another_service_holds_is_refused() -> None:
    holder = ServiceAllocator([]).complete(
        service("a", type="NodePort", clusterIP="10.96.0.9", ports=[port(nodePort=30001)])
    )
    with pytest.raises(LabError, match=r"default/b: default/a has the address 10\.96\.0\.9"):
        complete(service("b", clusterIP="10.96.0.9"), holder)
    with pytest.raises(LabError, match="default/a has the node port 30001/TCP"):
        complete(service("b", type="NodePort", ports=[port(nodePort=30001)]), holder)
    # The same number for the other protocol is another port.
    udp = complete(service("b", type="NodePort", ports=[port(nodePort=30001, protocol="UDP")]), holder)
    assert udp["ports"][0]["nodePort"] == 30001


def test_the_manifest_itself_is_not_changed() -> None:
    document = service("a", type="NodePort")
    complete(document)
    assert document == service("a", type="NodePort")
