"""Flows that are not translated have no entry in wag_nat: their sockets keep translated flows off their ports."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator

import pytest
from packets import ANY, CLIENT, NODE, REMOTE, VIP, A, B, at, both, ends, tcp, udp
from sandboxes import sandbox_of
from scapy.layers.l2 import Ether

from waggle.kernel.netns import call_in_netns
from waggle.testing.machine import Machine

NETNS_ID = 7  # of the pod A's namespace, as the node's knows it
each = pytest.mark.parametrize(
    ("make", "name", "kind"), [(tcp, "TCP", socket.SOCK_STREAM), (udp, "UDP", socket.SOCK_DGRAM)]
)


@pytest.fixture(scope="module")
def sandbox(loaded: Machine) -> Iterator[str]:
    """That of pod A."""
    with sandbox_of(loaded, "a", A, NETNS_ID) as name:
        yield name


@pytest.fixture
def pods(machine: Machine, sandbox: str) -> Machine:
    for v in (4, 6):
        machine.add_pod(A[v], 101, netns=NETNS_ID)
        machine.add_pod(B[v], 102)
    return machine


@contextlib.contextmanager
def connection(netns: str, kind: int, v: int, source: tuple[str, int], target: tuple[str, int]) -> Iterator[None]:
    """A socket between the two: of TCP one that waits for its answer, which is as good as connected."""

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_INET if v == 4 else socket.AF_INET6, kind)
        sock.setblocking(False)
        sock.bind(source)
        with contextlib.suppress(BlockingIOError):
            sock.connect(target)
        return sock

    with call_in_netns(f"/run/netns/{netns}", connect):
        yield


def port_of(packet: bytes, name: str) -> int:
    return Ether(packet)[name].sport


@both
@each
def test_a_pods_connection_to_the_backend_keeps_its_port(pods, sandbox, v, make, name, kind):
    pods.add_service(VIP[v], 80, name, [(REMOTE[v], 8080)])
    with connection(sandbox, kind, v, (A[v], 1000), (REMOTE[v], 8080)):
        out = pods.run("wag_pod_egress", make(A[v], 1000, VIP[v], 80))
        assert 40000 <= port_of(out.packet, name) <= 50000
        answer = pods.run("wag_node_ingress", make(REMOTE[v], 8080, A[v], 1000))
        assert ends(answer.packet).startswith(f"{name} {at(REMOTE[v], 8080)} > {at(A[v], 1000)} ")
    out = pods.run("wag_pod_egress", make(A[v], 1001, VIP[v], 80))
    assert port_of(out.packet, name) == 1001


@both
@each
def test_sockets_that_talk_to_others_take_no_port_from_a_pod(pods, sandbox, v, make, name, kind):
    """That of the flow itself, for one: it has the same port, and is connected to the Service or to nobody."""
    pods.add_service(VIP[v], 80, name, [(REMOTE[v], 8080)])
    with connection(sandbox, kind, v, (A[v], 1000), (VIP[v], 80)):
        out = pods.run("wag_pod_egress", make(A[v], 1000, VIP[v], 80))
    assert port_of(out.packet, name) == 1000


@both
def test_a_clients_connection_to_a_local_backend_keeps_its_port(pods, sandbox, v):
    """The client is another machine: only the backend's socket shows that they talk."""
    pods.add_service(ANY[v], 30080, "TCP", [(A[v], 8080)])
    with connection(sandbox, socket.SOCK_STREAM, v, (A[v], 8080), (CLIENT[v], 1000)):
        out = pods.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080))
        assert 40000 <= port_of(out.packet, "TCP") <= 50000
        # in the middle of a connection that socket is the connection's own
        out = pods.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080, "A"))
        assert out.verdict != 2


@both
def test_a_lost_entry_comes_back_for_an_established_connection(pods, sandbox, v):
    pods.add_service(ANY[v], 30080, "TCP", [(A[v], 8080)])
    with connection(sandbox, socket.SOCK_STREAM, v, (A[v], 8080), (CLIENT[v], 1000)):
        out = pods.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080, "A"))
    assert port_of(out.packet, "TCP") == 1000


def test_a_new_port_of_a_direct_flow_is_none_of_the_nodes_own(machine):
    """Half of the ports are taken: 50 flows would not all miss them by luck."""
    machine.add_service("0.0.0.0", 30080, "UDP", [(REMOTE[4], 8080)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    taken: list[socket.socket] = []

    def bind_even_ports() -> None:
        for port in range(40000, 50001, 2):
            taken.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            taken[-1].bind((NODE[4], port))

    try:
        call_in_netns(f"/run/netns/{machine.netns}", bind_even_ports)
        for client in range(1000, 1050):
            machine.run("wag_node_ingress", udp(CLIENT[4], client, NODE[4], 30080))
            own = machine.run("wag_node_egress", udp(NODE[4], client, REMOTE[4], 8080))
            port = port_of(own.packet, "UDP")
            assert port == client or port % 2 == 1  # its own where eight tries found none
    finally:
        for sock in taken:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
