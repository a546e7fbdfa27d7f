"""Host ports: frontends of the node that lead to one pod, also where NodePorts are not served."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from packets import ANY, CLIENT, NODE, A, B, at, both, ends, tcp, udp

from waggle.abi._generated import ServiceFlag
from waggle.testing.machine import PASS, REDIRECT, Machine

each = pytest.mark.parametrize("make", [tcp, udp], ids=["tcp", "udp"])
OTHER = {4: "192.0.2.2", 6: "2001:db8::2"}


@both
@each
def test_on_every_address_of_the_node(node: Machine, v: int, make: Callable[..., bytes]) -> None:
    name = make.__name__.upper()
    node.add_node(OTHER[v], nodeports=False)
    node.add_service(ANY[v], 8080, name, [(B[v], 80)], flags=ServiceFlag.HOST_PORT)
    node.add_service(ANY[v], 30080, name, [(B[v], 80)])
    for hook, source in (("node_ingress", CLIENT), ("pod_egress", A)):
        for number, target in enumerate((NODE[v], OTHER[v])):
            out = node.run(f"wag_{hook}", make(source[v], 1000 + number, target, 8080))
            assert ends(out.packet) == f"{name} {at(source[v], 1000 + number)} > {at(B[v], 80)} ttl 63"
        assert node.run(f"wag_{hook}", make(source[v], 2000, OTHER[v], 30080)).verdict == PASS


@both
def test_on_the_address_that_it_names_alone(node: Machine, v: int) -> None:
    node.add_node(OTHER[v])
    node.add_service(OTHER[v], 8080, "TCP", [(B[v], 80)], flags=ServiceFlag.HOST_PORT)
    out = node.run("wag_node_ingress", tcp(CLIENT[v], 1000, OTHER[v], 8080))
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(B[v], 80)} ttl 63"
    assert node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 8080)).verdict == PASS


@both
def test_the_reply_comes_from_the_host_port(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 8080, "TCP", [(B[v], 80)], flags=ServiceFlag.HOST_PORT)
    node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 8080))
    back = node.run("wag_pod_egress", tcp(B[v], 80, CLIENT[v], 1000, flags="SA"))
    assert back.verdict == REDIRECT
    assert ends(back.packet) == f"TCP {at(NODE[v], 8080)} > {at(CLIENT[v], 1000)} ttl 63"


@both
def test_a_pod_that_asks_its_own_host_port(node: Machine, v: int) -> None:
    """It must not see itself as the sender: it would answer without passing here."""
    node.add_service(ANY[v], 8080, "TCP", [(A[v], 80)], flags=ServiceFlag.HOST_PORT)
    out = node.run("wag_pod_egress", tcp(A[v], 1000, NODE[v], 8080))
    source, _, target = ends(out.packet).removeprefix("TCP ").removesuffix(" ttl 63").partition(" > ")
    assert source.startswith(at(NODE[v], 0)[:-1]) and target == at(A[v], 80)
