"""Datagrams in pieces: only the first has ports, all go the same way, both ways."""

from __future__ import annotations

from packets import ANY, CLIENT, MACS, NODE, REMOTE, VIP, A, B, at, both, check_sums, source_port, udp
from scapy.layers.inet import IP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, defragment6, fragment6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from waggle.testing.machine import DROP, REDIRECT, Machine

PAYLOAD = bytes(range(256)) * 14  # three pieces at 1,500 bytes


def pieces(source: str, sport: int, target: str, dport: int, number: int = 7) -> list[bytes]:
    """A datagram of 3,584 bytes as the frames that carry it."""
    layer = UDP(sport=sport, dport=dport) / Raw(PAYLOAD)
    if ":" in source:
        whole = IPv6(bytes(IPv6(src=source, dst=target) / layer))
        parts: list[Packet] = fragment6(
            IPv6(src=source, dst=target) / IPv6ExtHdrFragment(id=number) / whole.payload, 1500
        )
    else:
        parts = fragment(IP(bytes(IP(src=source, dst=target, id=number) / layer)), 1480)
    assert len(parts) == 3
    return [bytes(Ether(**MACS) / part) for part in parts]


def whole(frames: list[bytes]) -> str:
    """Puts the pieces together again: "UDP a:1 > b:2". Fails when a checksum or the payload is not right."""
    parts = [Ether(frame) for frame in frames]
    if IPv6 in parts[0]:
        joined = IPv6(bytes(defragment6([part[IPv6] for part in parts])))
        head, payload = IPv6(src=joined.src, dst=joined.dst), joined[UDP]
    else:
        for part in parts:
            check = part[IP].chksum
            del part[IP].chksum
            assert IP(bytes(part[IP])).chksum == check
        data = b"".join(bytes(part[IP].payload) for part in sorted(parts, key=lambda part: part[IP].frag))
        head, payload = IP(src=parts[0][IP].src, dst=parts[0][IP].dst), UDP(data)
    assert bytes(payload.payload) == PAYLOAD
    check_sums(Ether(bytes(Ether(**MACS) / head / payload)))
    return f"UDP {at(head.src, payload.sport)} > {at(head.dst, payload.dport)}"


def through(node: Machine, hook: str, frames: list[bytes]) -> list[bytes]:
    runs = [node.run(f"wag_{hook}", frame) for frame in frames]
    assert [run.verdict for run in runs] == [REDIRECT] * len(frames)
    return [run.packet for run in runs]


@both
def test_to_a_service_and_back(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 53, "UDP", [(B[v], 8053)])
    asked = through(node, "pod_egress", pieces(A[v], 1000, VIP[v], 53))
    assert whole(asked) == f"UDP {at(A[v], 1000)} > {at(B[v], 8053)}"
    answer = through(node, "pod_egress", pieces(B[v], 8053, A[v], 1000))
    assert whole(answer) == f"UDP {at(VIP[v], 53)} > {at(A[v], 1000)}"


@both
def test_to_a_node_port_with_snat_and_back(node: Machine, v: int) -> None:
    node.add_service(ANY[v], 30053, "UDP", [(REMOTE[v], 8053)])
    asked = through(node, "node_ingress", pieces(CLIENT[v], 1000, NODE[v], 30053))
    port = source_port(asked[0])
    assert 40000 <= port <= 50000
    assert whole(asked) == f"UDP {at(NODE[v], port)} > {at(REMOTE[v], 8053)}"
    answer = through(node, "node_ingress", pieces(REMOTE[v], 8053, NODE[v], port))
    assert whole(answer) == f"UDP {at(NODE[v], 30053)} > {at(CLIENT[v], 1000)}"


@both
def test_two_datagrams_at_once_are_kept_apart(node: Machine, v: int) -> None:
    node.add_service(VIP[v], 53, "UDP", [(B[v], 8053)])
    node.add_service(VIP[v], 54, "UDP", [(B[v], 8054)])
    one, two = pieces(A[v], 1000, VIP[v], 53, 7), pieces(A[v], 1001, VIP[v], 54, 8)
    mixed = through(node, "pod_egress", [frame for pair in zip(one, two, strict=True) for frame in pair])
    assert whole(mixed[::2]) == f"UDP {at(A[v], 1000)} > {at(B[v], 8053)}"
    assert whole(mixed[1::2]) == f"UDP {at(A[v], 1001)} > {at(B[v], 8054)}"


@both
def test_directly_in_any_order(node: Machine, v: int) -> None:
    frames = pieces(A[v], 1000, B[v], 80)
    for order in (frames, frames[::-1]):
        out = through(node, "pod_egress", order)
        assert whole(out if order is frames else out[::-1]) == (f"UDP {at(A[v], 1000)} > {at(B[v], 80)}")
    assert node.nat() == set()


@both
def test_a_later_piece_of_a_flow_that_is_not_known_is_dropped_with_its_reason(node: Machine, v: int) -> None:
    node.summed = False
    node.add_service(VIP[v], 53, "UDP", [])
    first, *later = pieces(A[v], 1000, VIP[v], 53)
    node.run("wag_pod_egress", first)
    assert [node.run("wag_pod_egress", frame).verdict for frame in later] == [DROP, DROP]
    assert node.drops() == {("no_backend", "pod_egress"): 1, ("fragment", "pod_egress"): 2}


def test_a_short_datagram_is_no_fragment(node: Machine) -> None:
    node.run("wag_pod_egress", udp(A[4], 1000, B[4], 80))
    assert node.maps["wag_fragments"].dump() == []
