"""Host ports: whose they are, where they are served, and what of them cannot be."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from waggle.abi._generated import BACKEND_SIZE, Backend, ServiceFlag, ServiceKey
from waggle.abi._generated import Service as ServiceValue
from waggle.abi.address import host_port, protocol_name, unpack_address
from waggle.kernel.maps import ARRAY, HASH
from waggle.model.host_port import HostPortOwner, PodPorts, changed, faults, host_ports, node_host_ports
from waggle.model.interface import HostPort, PodInterface
from waggle.model.objects import Container, ContainerPort, ObjectKey, ObjectMeta, Pod, PodIP, PodSpec, PodStatus
from waggle.plan.host_ports import plan_host_ports
from waggle.plan.services import FrontendSettings, ServiceRow
from waggle.reconcile.services import ServiceTables
from waggle.testing.memory_map import MemoryMap

V4, V6 = "10.244.1.5", "fd00:244:1::5"
NODE = {"192.0.2.1", "2001:db8::1"}
WEB = HostPortOwner("default", "web", "wag0")


def pod(name: str = "web", *ports: ContainerPort, **more: Any) -> Pod:
    spec = PodSpec(
        node_name=more.pop("node", "node1"),
        host_network=more.pop("host_network", False),
        containers=[Container("main", ports=list(ports))],
        init_containers=more.pop("init", []),
    )
    return Pod(
        ObjectMeta(name, "default"), spec, PodStatus(more.pop("phase", "Running"), pod_ips=[PodIP(V4), PodIP(V6)])
    )


def interface(name: str, *ports: HostPort, address: str = V4) -> PodInterface:
    return PodInterface(
        "c", "eth0", f"wag-{name}", 7, "", "", (ip_address(address),), Path("/x"), "default", name, tuple(ports)
    )


PORT = ContainerPort(80, host_port=8080)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        (pod("web", PORT), [HostPort("TCP", 8080, 80)]),
        (pod("web", ContainerPort(80)), []),
        (pod("web", PORT, PORT), [HostPort("TCP", 8080, 80)]),
        (
            pod("web", ContainerPort(53, protocol="UDP", host_port=53, host_ip="127.0.0.1")),
            [HostPort("UDP", 53, 53, "127.0.0.1")],
        ),
        (pod("web", PORT, host_network=True), []),
        (pod("web", PORT, phase="Succeeded"), []),
        (pod("web", PORT, phase="Failed"), []),
        (pod("web", init=[Container("side", ports=[PORT], restart_policy="Always")]), [HostPort("TCP", 8080, 80)]),
        (pod("web", init=[Container("once", ports=[PORT])]), []),
    ],
)
def test_host_ports_of_a_pod_object(subject: Pod, expected: list[HostPort]) -> None:
    assert list(host_ports(subject)) == expected


def test_whichever_is_there() -> None:
    asked = HostPort("TCP", 8080, 80)
    by_object = {HostPortOwner("default", "web", ""): PodPorts((asked,), (V4, V6))}
    assert node_host_ports("node1", [pod("web", PORT)], []) == by_object
    by_runtime = {HostPortOwner("default", "web", "wag-web"): PodPorts((asked,), (V4,))}
    assert node_host_ports("node1", [], [interface("web", asked)]) == by_runtime
    # both mean one pod; its addresses are those that it has, whatever its object says by now
    assert node_host_ports("node1", [pod("web", PORT)], [interface("web", asked)]) == by_runtime
    assert node_host_ports("node1", [pod("web", PORT)], [interface("web")]) == by_runtime
    more = ContainerPort(443, host_port=8443)
    both = node_host_ports("node1", [pod("web", PORT, more)], [interface("web", asked)])
    assert [ports.port for ports in both[HostPortOwner("default", "web", "wag-web")].ports] == [8080, 8443]


def test_pods_of_other_nodes_have_no_host_ports_here() -> None:
    assert node_host_ports("node1", [pod("web", PORT, node="node2"), pod("new", PORT, node="")], []) == {}


def test_runtimes_without_kubernetes_give_no_namespace() -> None:
    one = HostPort("TCP", 1, 2)
    made = PodInterface("c", "eth0", "wag7", 7, "", "", (ip_address(V4),), Path("/x"), host_ports=(one,))
    assert node_host_ports("node1", [], [made]) == {HostPortOwner("", "", "wag7"): PodPorts((one,), (V4,))}
    assert str(HostPortOwner("", "", "wag7")) == "wag7"
    assert str(HostPortOwner("", "box", "wag7")) == "box"
    assert str(WEB) == "default/web"


def test_what_changed() -> None:
    one, other = PodPorts((), (V4,)), PodPorts((), (V6,))
    a, b, c, d = (HostPortOwner("", name, "") for name in "abcd")
    assert changed({a: one, b: one, c: one}, {a: one, b: other, d: one}) == {b, c, d}


# -- where they are served -------------------------------------------------------------------------------------------


def rows(*ports: HostPort, addresses: tuple[str, ...] = (V4, V6), node: set[str] = NODE) -> dict[str, str]:
    found = {}
    for row in plan_host_ports(PodPorts(ports, addresses), node):
        assert row.settings[0].flags & ServiceFlag.HOST_PORT
        key = ServiceKey.unpack(row.keys[0])
        address = unpack_address(key.addr)
        assert bool(row.settings[0].flags & ServiceFlag.NODEPORT) == (address in ("0.0.0.0", "::"))
        backend = Backend.unpack(row.backends)
        found[f"{protocol_name(key.proto)} {host_port(address, key.port)}"] = host_port(
            unpack_address(backend.addr), backend.port
        )
    return found


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        (
            HostPort("TCP", 8080, 80),
            {"TCP 0.0.0.0:8080": "10.244.1.5:80", "TCP [::]:8080": "[fd00:244:1::5]:80"},
        ),
        (HostPort("SCTP", 8080, 80, "0.0.0.0"), {"SCTP 0.0.0.0:8080": "10.244.1.5:80"}),
        (HostPort("UDP", 8080, 80, "::"), {"UDP [::]:8080": "[fd00:244:1::5]:80"}),
        (HostPort("TCP", 8080, 80, "192.0.2.1"), {"TCP 192.0.2.1:8080": "10.244.1.5:80"}),
        (HostPort("TCP", 8080, 80, "127.0.0.1"), {"TCP 127.0.0.1:8080": "10.244.1.5:80"}),
        (HostPort("TCP", 8080, 80, "::1"), {"TCP [::1]:8080": "[fd00:244:1::5]:80"}),
        (HostPort("TCP", 8080, 80, "8.8.8.8"), {}),  # would take traffic that is somebody else's
        (HostPort("TCP", 8080, 80, "what"), {}),
        (HostPort("GRE", 8080, 80), {}),
    ],
)
def test_frontends_of_a_host_port(port: HostPort, expected: dict[str, str]) -> None:
    assert rows(port) == expected


def test_a_pod_of_one_family_serves_that_family() -> None:
    assert rows(HostPort("TCP", 8080, 80), addresses=(V6,)) == {"TCP [::]:8080": "[fd00:244:1::5]:80"}
    assert rows(HostPort("TCP", 8080, 80, "127.0.0.1"), addresses=(V6,)) == {}


def test_a_port_given_twice_leads_to_the_first() -> None:
    assert rows(HostPort("TCP", 8080, 80), HostPort("TCP", 8080, 81), addresses=(V4,)) == {
        "TCP 0.0.0.0:8080": "10.244.1.5:80"
    }


def test_ports_that_the_runtime_holds_itself() -> None:
    ports = PodPorts((HostPort("TCP", 8080, 80),), (V4, V6))
    assert HostPortOwner("", "web", "wag1").held, "a runtime without Kubernetes names no namespace"
    assert not HostPortOwner("default", "web", "wag1").held
    for held in (True, False):
        found = {row.settings[0].flags & ServiceFlag.HELD for row in plan_host_ports(ports, NODE, held=held)}
        assert found == {ServiceFlag.HELD if held else 0}


def test_a_pod_that_is_gone_has_none() -> None:
    assert plan_host_ports(None, NODE) == []


def test_addresses_that_are_not_the_nodes_are_named() -> None:
    ports = (HostPort("TCP", 1, 2), HostPort("TCP", 8080, 80, "8.8.8.8"), HostPort("TCP", 3, 4, "127.0.0.1"))
    assert faults(PodPorts(ports, (V4,)), NODE) == ["host port 8080/TCP: hostIP 8.8.8.8 is no address of this node"]


# -- conflicts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tables() -> ServiceTables:
    return ServiceTables(
        MemoryMap(
            HASH,
            len(ServiceKey(bytes(16), 0, 0, 0).pack()),
            len(ServiceValue(*[0] * len(ServiceValue._fields)).pack()),
            100,
        ),
        MemoryMap(ARRAY, 4, BACKEND_SIZE, 100),
    )


def planned(*ports: HostPort, address: str = V4) -> list[ServiceRow]:
    return plan_host_ports(PodPorts(ports, (address,)), NODE)


def test_two_pods_with_one_port_the_second_waits_and_is_named(tables: ServiceTables) -> None:
    other = HostPortOwner("default", "other", "wag1")
    tables.apply(WEB, planned(HostPort("TCP", 8080, 80)))
    tables.apply(other, planned(HostPort("TCP", 8080, 80), address="10.244.1.6"))
    assert tables.problems == {other: "TCP *:8080 is already served by Pod default/web"}
    assert tables.apply(WEB, []) == {other}
    tables.apply(other, planned(HostPort("TCP", 8080, 80), address="10.244.1.6"))
    assert not tables.problems
    tables.flush()
    assert tables.frontend_count == 1


def test_a_service_and_a_pod_with_one_port(tables: ServiceTables) -> None:
    node_port = planned(HostPort("TCP", 30080, 80))[0]
    tables.apply(ObjectKey("default", "web"), [node_port._replace(settings=(FrontendSettings(1),))])
    tables.apply(WEB, [node_port])
    assert tables.problems == {WEB: "TCP *:30080 is already served by Service default/web"}


def test_a_port_of_one_address_besides_that_of_all_is_named(tables: ServiceTables) -> None:
    other = HostPortOwner("default", "other", "wag1")
    tables.apply(WEB, planned(HostPort("TCP", 8080, 80), HostPort("UDP", 8080, 80)))
    tables.apply(other, planned(HostPort("TCP", 8080, 80, "127.0.0.1"), address="10.244.1.6"))
    assert tables.overlaps() == {
        other: "TCP 127.0.0.1:8080 leads here, that port of all other addresses to Pod default/web"
    }
    # different addresses are no conflict, nor is a pod with itself
    tables.apply(WEB, planned(HostPort("TCP", 8080, 80, "192.0.2.1"), HostPort("UDP", 8080, 80)))
    assert not tables.overlaps()
    tables.apply(other, planned(HostPort("UDP", 99, 80), HostPort("UDP", 99, 80, "127.0.0.1"), address="10.244.1.6"))
    assert not tables.overlaps()
