"""Names in policies as the programs have them: keys of patterns, what was learned, and what people are shown of it."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from pathlib import Path

import pytest

from waggle.abi._generated import Name, NameKey, PatternKey
from waggle.abi.address import pack_address
from waggle.abi.learned_names import Learned, learned, pack_pattern
from waggle.model.interface import PodInterface
from waggle.model.policy import PolicyWorld, cluster_peer_matches
from waggle.model.policy_objects import ClusterPeer
from waggle.observe.policy_names import name_rows, told

NOW = 1000.7
PATTERNS = {"*.example.com": 6, "www.example.com": 5}
ADDRESS = "203.0.113.1"


def entry(patterns: dict[int, int], text: str = "www.example.com", ifindex: int = 3) -> tuple[bytes, bytes]:
    """`patterns`: id → when it ends."""
    numbers = [*patterns, *[0] * (16 - len(patterns))]
    until = [*patterns.values(), *[0] * (16 - len(patterns))]
    raw = Name(struct.pack("=16I", *numbers), struct.pack("=16I", *until), text.encode()[:64].ljust(64, b"\0")).pack()
    return NameKey(ifindex, pack_address(ADDRESS)).pack(), raw


def interface(ifindex: int = 3) -> PodInterface:
    addresses = (ip_address("10.244.1.5"), ip_address("fd00::5"))
    return PodInterface("c", "eth0", "wag1", ifindex, "", "", addresses, Path("/x"), "t", "client")


@pytest.mark.parametrize(
    ("pattern", "exact", "text"),
    [
        ("www.example.com", 1, b"moc.elpmaxe.www."),
        ("*.example.com", 0, b"moc.elpmaxe."),
        (".".join(["a" * 49] * 5) + ".com", 1, b"moc." + b".".join([b"a" * 49] * 5) + b"."),
    ],
)
def test_a_pattern_is_its_letters_turned_round(pattern: str, exact: int, text: bytes) -> None:
    packed = pack_pattern(pattern)
    assert packed is not None
    found = PatternKey.unpack(packed)
    assert (found.exact, found.text.rstrip(b"\0")) == (exact, text)


@pytest.mark.parametrize("pattern", ["a" * 250 + ".com", "*." + "a" * 260, "bücher.example"])
def test_what_no_name_can_be_of_has_no_key(pattern: str) -> None:
    assert pack_pattern(pattern) is None


def test_only_what_is_in_force_is_read() -> None:
    entries = [entry({5: 1000, 6: 999, 7: 1030}), entry({5: 999}, ifindex=4)]
    assert list(learned(entries, NOW)) == [Learned(3, ADDRESS, "www.example.com", {5: 0, 7: 30})]


def test_rows_are_of_pods_and_patterns_that_there_are() -> None:
    found = [Learned(3, ADDRESS, "www.example.com", {5: 50, 6: 40, 99: 60}), Learned(8, ADDRESS, "gone", {5: 50})]
    rows = list(name_rows(found, [interface()], PATTERNS))
    assert [(r["namespace"], r["pod"], r["address"], r["pattern"], r["seconds"]) for r in rows] == [
        ("t", "client", ADDRESS, "*.example.com", 40),
        ("t", "client", ADDRESS, "www.example.com", 50),
    ]


def test_the_model_is_told_for_the_pod_alone() -> None:
    found = told([Learned(3, ADDRESS, "www.example.com", {5: 50, 6: 40})], [interface()], PATTERNS)
    assert set(found) == {"10.244.1.5", "fd00::5"}
    assert found["fd00::5"] == {ADDRESS: ["www.example.com", "www.example.com", "*.example.com"]}
    world = PolicyWorld(told=found)
    peer = ClusterPeer(domain_names=["*.example.com"])
    assert cluster_peer_matches(world, peer, ADDRESS, "10.244.1.5")
    assert not cluster_peer_matches(world, peer, ADDRESS, "10.244.1.6")
    assert not cluster_peer_matches(world, peer, "203.0.113.2", "10.244.1.5")


def test_a_name_whose_time_is_over_is_none_for_the_model() -> None:
    """The wildcard was learned by another name, which holds longer."""
    found = told([Learned(3, ADDRESS, "www.example.com", {6: 40})], [interface()], PATTERNS)
    assert found["10.244.1.5"] == {ADDRESS: ["*.example.com"]}
    peer = ClusterPeer(domain_names=["www.example.com"])
    assert not cluster_peer_matches(PolicyWorld(told=found), peer, ADDRESS, "10.244.1.5")
