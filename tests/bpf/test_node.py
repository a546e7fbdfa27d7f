"""What comes in by the uplink: NodePort with and without SNAT, delivery to pods, and replies of the node itself."""

from __future__ import annotations

import pytest
from packets import ANY, CLIENT, NODE, NOWHERE, REMOTE, VIP, at, both, build, ends, macs, source_port, tcp, udp
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from waggle.abi._generated import Nat, NatFlag
from waggle.testing.machine import HOST_MAC, NODE4, PASS, POD_MAC, REDIRECT, Flow

POD = {4: "10.244.1.10", 6: "fd00:10:244:1::10"}
each = pytest.mark.parametrize("make, name", [(tcp, "TCP"), (udp, "UDP")])


@pytest.fixture
def node(machine):
    for v in (4, 6):
        machine.add_pod(POD[v], 101)
    return machine


@both
def test_to_a_local_pod(node, v):
    out = node.run("wag_node_ingress", tcp(REMOTE[v], 1000, POD[v], 80))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"TCP {at(REMOTE[v], 1000)} > {at(POD[v], 80)} ttl 63"
    assert macs(out.packet) == (HOST_MAC, POD_MAC)


@both
def test_everything_else_goes_up_the_stack_unchanged(node, v):
    for target in (NODE[v], "198.51.100.1" if v == 4 else "2001:db8:1::1"):
        packet = tcp(CLIENT[v], 1000, target, 22)
        out = node.run("wag_node_ingress", packet)
        assert (out.verdict, out.packet) == (PASS, packet)


def test_echo_to_node_and_pod(node):
    assert node.run("wag_node_ingress", build(CLIENT[4], NODE4, ICMP())).verdict == PASS
    assert node.run("wag_node_ingress", build(CLIENT[4], POD[4], ICMP())).verdict == REDIRECT


@both
@each
def test_nodeport_with_a_local_backend_keeps_the_client_address(node, v, make, name):
    node.add_service(ANY[v], 30080, name, [(POD[v], 8080)])
    out = node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080))
    assert out.verdict == REDIRECT
    assert ends(out.packet) == f"{name} {at(CLIENT[v], 1000)} > {at(POD[v], 8080)} ttl 63"
    assert node.nat_used(POD[v])
    reply = node.run("wag_pod_egress", make(POD[v], 8080, CLIENT[v], 1000))
    assert reply.verdict == REDIRECT
    assert ends(reply.packet) == f"{name} {at(NODE[v], 30080)} > {at(CLIENT[v], 1000)} ttl 63"


@both
@each
def test_nodeport_with_a_remote_backend_is_snatted_and_comes_back(node, v, make, name):
    node.add_service(ANY[v], 30080, name, [(REMOTE[v], 8080)])
    out = node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080))
    assert out.verdict == REDIRECT
    port = source_port(out.packet)
    assert 40000 <= port <= 50000
    assert ends(out.packet) == f"{name} {at(NODE[v], port)} > {at(REMOTE[v], 8080)} ttl 63"
    assert node.nat() == {
        Flow(
            f"{name} {at(CLIENT[v], 1000)} > {at(NODE[v], 30080)}",
            f"{name} {at(NODE[v], port)} > {at(REMOTE[v], 8080)}",
            True,
        ),
        Flow(
            f"{name} {at(REMOTE[v], 8080)} > {at(NODE[v], port)}",
            f"{name} {at(NODE[v], 30080)} > {at(CLIENT[v], 1000)}",
            False,
        ),
    }
    reply = node.run("wag_node_ingress", make(REMOTE[v], 8080, NODE[v], port))
    assert reply.verdict == REDIRECT
    assert ends(reply.packet) == f"{name} {at(NODE[v], 30080)} > {at(CLIENT[v], 1000)} ttl 63"


def test_two_clients_with_one_port_get_different_snat_ports(node):
    node.add_service("0.0.0.0", 30080, "TCP", [(REMOTE[4], 8080)])
    node.run("wag_node_ingress", tcp("192.0.2.77", 1000, NODE4, 30080))
    out = node.run("wag_node_ingress", tcp("192.0.2.78", 1000, NODE4, 30080))
    port = Ether(out.packet)[TCP].sport
    assert 40000 <= port <= 50000
    reply = node.run("wag_node_ingress", tcp(REMOTE[4], 8080, NODE4, port, flags="SA"))
    assert ends(reply.packet) == f"TCP {NODE4}:30080 > 192.0.2.78:1000 ttl 63"


@both
def test_a_backend_that_is_a_process_of_the_node(node, v):
    node.add_service(ANY[v], 30080, "TCP", [(NODE[v], 8080)])
    out = node.run("wag_node_ingress", tcp(CLIENT[v], 1000, NODE[v], 30080))
    assert out.verdict == PASS
    assert ends(out.packet) == f"TCP {at(CLIENT[v], 1000)} > {at(NODE[v], 8080)} ttl 64"
    reply = node.run("wag_node_egress", tcp(NODE[v], 8080, CLIENT[v], 1000, flags="SA"))
    assert reply.verdict == PASS
    assert ends(reply.packet) == f"TCP {at(NODE[v], 30080)} > {at(CLIENT[v], 1000)} ttl 64"


@both
def test_a_cluster_address_from_outside(node, v):
    node.add_service(VIP[v], 80, "TCP", [(REMOTE[v], 8080)])
    out = node.run("wag_node_ingress", tcp(CLIENT[v], 1000, VIP[v], 80))
    assert ends(out.packet) == f"TCP {at(NODE[v], source_port(out.packet))} > {at(REMOTE[v], 8080)} ttl 63"


def test_nodeport_protocols_are_apart(node):
    node.add_service("0.0.0.0", 30080, "TCP", [(POD[4], 8080)])
    packet = udp(CLIENT[4], 1000, NODE4, 30080)
    out = node.run("wag_node_ingress", packet)
    assert (out.verdict, out.packet) == (PASS, packet)


def test_many_clients_fill_the_table_and_new_flows_still_work(node):
    node.add_service("0.0.0.0", 30080, "UDP", [(REMOTE[4], 8080)])
    for number in range(3000):  # the table has room for about 500 flows
        client = f"198.51.{number >> 8}.{number & 255}"
        out = node.run("wag_node_ingress", udp(client, 5000, NODE4, 30080))
        assert out.verdict == REDIRECT, (number, node.drops())


def evict_replies(node):
    """What the LRU may do to flows nobody used for a while: only the entries of the client's packets are left."""
    nat = node.maps["wag_nat"]
    for key, raw in list(nat.dump()):
        entry = Nat.unpack(raw)
        if entry.flags & NatFlag.FORWARD:
            nat.update(key, entry._replace(seen_ns=0).pack())
        else:
            nat.delete_many([key])


@both
@each
def test_replies_whose_entry_was_evicted_get_it_back(node, v, make, name):
    node.add_service(ANY[v], 30080, name, [(REMOTE[v], 8080)])
    first = node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080))
    flows = node.nat()
    evict_replies(node)
    assert len(node.nat()) == 1
    again = node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080))
    assert (again.verdict, again.packet) == (first.verdict, first.packet)
    assert node.nat() == flows


def test_an_entry_of_replies_that_another_flow_took_is_left_to_it(node):
    node.add_service("0.0.0.0", 30080, "UDP", [(REMOTE[4], 8080)])
    port = source_port(node.run("wag_node_ingress", udp(CLIENT[4], 1000, NODE4, 30080)).packet)
    nat = node.maps["wag_nat"]
    (replies,) = [key for key, raw in nat.dump() if not Nat.unpack(raw).flags & NatFlag.FORWARD]
    evict_replies(node)
    node.run("wag_node_ingress", udp("192.0.2.78", 1000, NODE4, 30080))
    (others,) = [raw for _, raw in nat.dump() if not Nat.unpack(raw).flags & NatFlag.FORWARD]
    nat.update(replies, others)
    again = node.run("wag_node_ingress", udp(CLIENT[4], 1000, NODE4, 30080))
    assert source_port(again.packet) != port
    assert nat.lookup(replies) == others


def test_a_port_of_the_node_itself_is_not_used_for_snat(node):
    import socket

    from waggle.kernel.netns import call_in_netns

    def bind() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((NODE4, 1000))
        return sock

    node.add_service("0.0.0.0", 30080, "UDP", [(REMOTE[4], 8080)])
    with call_in_netns(f"/run/netns/{node.netns}", bind):
        out = node.run("wag_node_ingress", udp(CLIENT[4], 1000, NODE4, 30080))
    assert 40000 <= Ether(out.packet)["UDP"].sport <= 50000


@each
def test_a_connection_of_the_node_with_a_port_that_snat_uses_gets_another(node, make, name):
    node.add_service("0.0.0.0", 30080, name, [(REMOTE[4], 8080)])
    used = source_port(node.run("wag_node_ingress", make(CLIENT[4], 1000, NODE4, 30080)).packet)
    own = node.run("wag_node_egress", make(NODE4, used, REMOTE[4], 8080))
    port = Ether(own.packet)[name].sport
    assert 40000 <= port <= 50000
    assert port != used
    assert ends(own.packet) == f"{name} {NODE4}:{port} > {REMOTE[4]}:8080 ttl 64"
    answer = node.run("wag_node_ingress", make(REMOTE[4], 8080, NODE4, port))
    assert answer.verdict == PASS
    assert ends(answer.packet) == f"{name} {at(REMOTE[4], 8080)} > {NODE4}:{used} ttl 64"
    other = node.run("wag_node_ingress", make(REMOTE[4], 8080, NODE4, used))
    assert ends(other.packet) == f"{name} {NODE4}:30080 > {CLIENT[4]}:1000 ttl 63"


@both
@each
def test_one_client_port_through_a_nodeport_and_directly(node, v, make, name):
    node.add_service(ANY[v], 30080, name, [(POD[v], 8080)])
    node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080))
    direct = node.run("wag_node_ingress", make(CLIENT[v], 1000, POD[v], 8080))
    port = Ether(direct.packet)[name].sport
    assert ends(direct.packet) == f"{name} {at(CLIENT[v], port)} > {at(POD[v], 8080)} ttl 63"
    answer = node.run("wag_pod_egress", make(POD[v], 8080, CLIENT[v], port))
    assert ends(answer.packet) == f"{name} {at(POD[v], 8080)} > {at(CLIENT[v], 1000)} ttl 63"
    through = node.run("wag_pod_egress", make(POD[v], 8080, CLIENT[v], 1000))
    assert ends(through.packet) == f"{name} {at(NODE[v], 30080)} > {at(CLIENT[v], 1000)} ttl 63"


@both
@each
def test_what_is_translated_and_goes_by_the_stack_is_not_translated_again(node, v, make, name):
    """The stack forwards what the programs' own route look-up could not: here, because there is no route."""
    node.add_service(ANY[v], 30080, name, [(NOWHERE[v], 8080)])
    out = node.run("wag_node_ingress", make(CLIENT[v], 1000, NODE[v], 30080))
    assert out.verdict == PASS
    assert ends(out.packet) == f"{name} {at(NODE[v], source_port(out.packet))} > {at(NOWHERE[v], 8080)} ttl 64"
    on = node.run("wag_node_egress", out.packet, mark=out.mark)
    assert (on.verdict, on.packet) == (PASS, out.packet)


@both
@each
def test_a_nodeport_that_is_gone_stops_answering_those_who_knew_it(node, v, make, name):
    for address, target, port in ((ANY[v], NODE[v], 30080), (VIP[v], VIP[v], 80)):
        node.add_service(address, port, name, [(POD[v], 8080)])
        node.run("wag_node_ingress", make(CLIENT[v], 1000, target, port))
        node.remove_service(address, port, name)
        anew = make(CLIENT[v], 1000, target, port)
        out = node.run("wag_node_ingress", anew)
        assert (out.verdict, out.packet) == (PASS, anew)


@both
def test_an_established_connection_outlives_its_frontend(node, v):
    for address, target, port in ((ANY[v], NODE[v], 30080), (VIP[v], VIP[v], 80)):
        node.add_service(address, port, "TCP", [(POD[v], 8080)])
        node.run("wag_node_ingress", tcp(CLIENT[v], 1000 + port, target, port))
        node.remove_service(address, port, "TCP")
        kept = node.run("wag_node_ingress", tcp(CLIENT[v], 1000 + port, target, port, flags="A"))
        assert ends(kept.packet) == f"TCP {at(CLIENT[v], 1000 + port)} > {at(POD[v], 8080)} ttl 63"


def test_frames_for_another_machine_are_left_alone(node):
    node.add_service(VIP[4], 80, "TCP", [])
    packet = bytes.fromhex("02aaaaaaaa99") + tcp(CLIENT[4], 1000, VIP[4], 80)[6:]
    out = node.run("wag_node_ingress", packet)
    assert (out.verdict, out.packet, node.drops()) == (PASS, packet, {})


def test_what_is_malformed_is_left_to_the_stack(node):
    packet = bytearray(tcp(CLIENT[4], 1000, POD[4], 80))
    packet[14] = 0x44
    out = node.run("wag_node_ingress", bytes(packet))
    assert (out.verdict, out.packet) == (PASS, bytes(packet))


# -- what the node's own processes send to Services, where no socket hook has seen it


@pytest.fixture
def sender(node):
    """A node with Services at cluster addresses, as all of them are seen by packets."""
    for v in (4, 6):
        node.add_vip(VIP[v])
    node.set_service_ranges("10.96.0.0/16", "fd00:10:96::/112")
    return node


def destination(packet: bytes) -> str:
    parsed = Ether(packet)
    return parsed[IPv6].dst if IPv6 in parsed else parsed[IP].dst


@both
@each
def test_a_process_reaches_a_local_backend_through_its_interface(sender, v, make, name):
    sender.add_service(VIP[v], 80, name, [(POD[v], 8080)])
    out = sender.run("wag_node_egress", make(NODE[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT and out.mark
    assert ends(out.packet) == f"{name} {at(NODE[v], 1000)} > {at(POD[v], 8080)} ttl 63"
    assert macs(out.packet) == (HOST_MAC, POD_MAC)
    on = sender.run("wag_pod_ingress", out.packet, mark=out.mark)
    assert (on.verdict, on.packet) == (PASS, out.packet)
    reply = sender.run("wag_pod_egress", make(POD[v], 8080, NODE[v], 1000))
    assert reply.verdict == PASS
    assert ends(reply.packet) == f"{name} {at(VIP[v], 80)} > {at(NODE[v], 1000)} ttl 64"


@both
@each
def test_a_process_reaches_a_remote_backend_and_keeps_it(sender, v, make, name):
    sender.add_service(VIP[v], 80, name, [(f"{REMOTE[v]}{n}", 8080) for n in range(4)])
    out = sender.run("wag_node_egress", make(NODE[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT and out.mark
    backend = destination(out.packet)
    later = {"flags": "A"} if name == "TCP" else {}
    for _ in range(8):
        more = sender.run("wag_node_egress", make(NODE[v], 1000, VIP[v], 80, **later))
        assert destination(more.packet) == backend
    reply = sender.run("wag_node_ingress", make(backend, 8080, NODE[v], 1000, **later))
    assert reply.verdict == PASS
    assert ends(reply.packet) == f"{name} {at(VIP[v], 80)} > {at(NODE[v], 1000)} ttl 64"


@both
def test_a_process_does_not_reach_the_node_itself_this_way(sender, v):
    """The stack takes nothing that comes in with an address of its own as the source: it is told so at once."""
    sender.summed = False  # of an answer
    sender.add_service(VIP[v], 80, "TCP", [(NODE[v], 8080)])
    out = sender.run("wag_node_egress", tcp(NODE[v], 1000, VIP[v], 80))
    assert out.verdict == REDIRECT
    assert ends(out.packet).startswith(f"TCP {at(VIP[v], 80)} > {at(NODE[v], 1000)}")
    assert Ether(out.packet)[TCP].flags == "RA"
