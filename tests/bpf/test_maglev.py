"""Maglev tables as the program fills them, and the backends that flows get by them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from packets import ANY, CLIENT, NODE, VIP, A, at, both, ends, tcp
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from waggle.abi._generated import Backend, MaglevBackend, ServiceFlag
from waggle.abi.address import pack_address
from waggle.plan.maglev import SLOTS, maglev_table
from waggle.testing.machine import Machine

BY_HASH = int(ServiceFlag.BY_HASH)


def backends(count: int, *, without: int | None = None) -> list[tuple[str, int]]:
    return [(f"10.244.{2 + i // 200}.{i % 200 + 1}", 8080) for i in range(count) if i != without]


def by_the_book(packed: bytes, weights: list[int]) -> list[int]:
    """The algorithm of the paper, with turns by weight, as plainly as it can be said."""
    states = [MaglevBackend.unpack(raw) for raw in pieces(maglev_table(packed, weights).work)]
    greatest, slots = max(weights), [-1] * SLOTS
    orders = [iter([(s.start + i * s.step) % SLOTS for i in range(SLOTS)]) for s in states]
    credit = [0] * len(weights)
    while True:
        for i, weight in enumerate(weights):
            credit[i] += weight
            if credit[i] < greatest:
                continue
            credit[i] -= greatest
            slots[next(slot for slot in orders[i] if slots[slot] == -1)] = i
            if -1 not in slots:
                return slots


def pieces(work: bytes) -> list[bytes]:
    size = len(MaglevBackend(0, 0, 0, 0, 0).pack())
    return [work[i : i + size] for i in range(0, len(work), size)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_program_fills_as_the_paper_says(machine: Machine, count: int, weighted: bool) -> None:
    chosen = backends(count)
    dice = random.Random(count)
    weights = [dice.randint(1, 1000) for _ in chosen] if weighted else [1] * count
    packed = b"".join(Backend(pack_address(address), port, 0).pack() for address, port in chosen)
    assert machine.slots(machine.add_maglev(chosen, weights)) == by_the_book(packed, weights)


def test_shares_are_even_or_as_weights_say(machine: Machine) -> None:
    even = Counter(machine.slots(machine.add_maglev(backends(10))))
    assert max(even.values()) - min(even.values()) <= 1
    shares = Counter(machine.slots(machine.add_maglev(backends(4), [1, 1, 2, 4])))
    for index, share in enumerate((1 / 8, 1 / 8, 2 / 8, 4 / 8)):
        assert abs(shares[index] / SLOTS - share) < 0.005


def test_few_flows_move_when_a_backend_goes(machine: Machine) -> None:
    before = machine.slots(machine.add_maglev(backends(20)))
    left = backends(20, without=7)
    after = machine.slots(machine.add_maglev(left))
    names = backends(20)
    kept = [(names[old], left[new]) for old, new in zip(before, after, strict=True) if old != 7]
    moved = sum(old != new for old, new in kept) / len(kept)
    assert moved < 0.06  # the paper's figure for a table of this size; a plain modulo moves 95 %


def test_more_endpoints_than_slots(machine: Machine) -> None:
    with pytest.raises(ValueError, match="room for 4093 endpoints, not 4094"):
        maglev_table(bytes(24 * (SLOTS + 1)), [1] * (SLOTS + 1))
    chosen = [(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", 80) for i in range(SLOTS)]
    assert sorted(machine.slots(machine.add_maglev(chosen))) == list(range(SLOTS))


def target(packet: bytes) -> str:
    parsed = Ether(packet)
    return parsed[IPv6].dst if IPv6 in parsed else parsed[IP].dst


@both
def test_a_flow_has_the_same_backend_on_every_node(machine: Machine, v: int) -> None:
    chosen = backends(10) if v == 4 else [(f"fd00:10:244:2::{i + 1:x}", 8080) for i in range(10)]
    found = []
    for _ in range(3):  # as many nodes, one after the other
        machine.reset()
        machine.add_service(VIP[v], 80, "TCP", chosen, flags=BY_HASH, maglev=machine.add_maglev(chosen))
        found.append(
            [target(machine.run("wag_node_ingress", tcp(CLIENT[v], p, VIP[v], 80)).packet) for p in range(1000, 1100)]
        )
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 10


@both
def test_without_the_hash_weights_hold_all_the_same(machine: Machine, v: int) -> None:
    chosen = [(A[v], 8080), (A[v], 8081)]
    machine.add_pod(A[v], 101)
    machine.add_service(ANY[v], 30080, "TCP", chosen, maglev=machine.add_maglev(chosen, [1, 9]))
    ports = Counter(
        ends(machine.run("wag_node_ingress", tcp(CLIENT[v], p, NODE[v], 30080)).packet).split(" > ")[1].split(" ")[0]
        for p in range(1000, 1400)
    )
    assert 0.82 < ports[at(A[v], 8081)] / 400 < 0.97


@both
def test_with_affinity_the_client_alone_counts(machine: Machine, v: int) -> None:
    chosen = backends(10) if v == 4 else [(f"fd00:10:244:2::{i + 1:x}", 8080) for i in range(10)]
    found = set()
    for port in range(1000, 1020):
        machine.reset()  # another node, that has never seen the client
        machine.add_service(VIP[v], 80, "TCP", chosen, flags=BY_HASH, affinity_s=60, maglev=machine.add_maglev(chosen))
        found.add(target(machine.run("wag_node_ingress", tcp(CLIENT[v], port, VIP[v], 80)).packet))
    assert len(found) == 1


def test_a_table_that_is_missing_leaves_chance(machine: Machine) -> None:
    machine.add_service(VIP[4], 80, "TCP", backends(4), flags=BY_HASH, maglev=12345)
    found = {target(machine.run("wag_node_ingress", tcp(CLIENT[4], p, VIP[4], 80)).packet) for p in range(1000, 1100)}
    assert len(found) == 4
