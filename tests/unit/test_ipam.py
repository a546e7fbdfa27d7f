"""Addresses: exclusive, all of them used before "full", oldest first, and the same after a restart."""

from __future__ import annotations

import ipaddress
import itertools
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from waggle.sources.ipam import Ipam, IPNetwork, RangeFull


def networks(*texts: str) -> list[IPNetwork]:
    return [ipaddress.ip_network(text) for text in texts]


V4 = networks("10.0.0.0/29")  # .2 to .6
DUAL = networks("fd00::/64", "10.0.0.0/29")


@pytest.fixture
def ipam(tmp_path: Path) -> Ipam:
    ipam = Ipam(tmp_path / "rotation.json")
    ipam.load()
    return ipam


def take(ipam: Ipam, owner: str, ranges: list[IPNetwork]) -> list[str]:
    return [str(address) for address in ipam.reserve(owner, ranges)]


def restarted(tmp_path: Path, owned: dict[str, list[str]]) -> Ipam:
    ipam = Ipam(tmp_path / "rotation.json")
    ipam.load()
    for owner, texts in owned.items():
        assert ipam.occupy(owner, [ipaddress.ip_address(text) for text in texts]) == ()
    return ipam


def test_one_address_per_family_ipv4_first(ipam: Ipam) -> None:
    assert take(ipam, "a", DUAL) == ["10.0.0.2", "fd00::2"]
    assert take(ipam, "b", DUAL) == ["10.0.0.3", "fd00::3"]


def test_network_first_host_and_broadcast_are_never_used(ipam: Ipam) -> None:
    assert [take(ipam, str(n), V4)[0] for n in range(5)] == [f"10.0.0.{n}" for n in range(2, 7)]
    with pytest.raises(RangeFull, match=r"^no free address in 10\.0\.0\.0/29: all 5 are in use$"):
        ipam.reserve("more", V4)


@pytest.mark.parametrize("text", ["10.0.0.0/32", "10.0.0.0/31", "fd00::/128", "fd00::/127"])
def test_range_too_small(ipam: Ipam, text: str) -> None:
    with pytest.raises(RangeFull, match="too small"):
        ipam.reserve("a", networks(text))


def test_last_ipv6_address_is_used(ipam: Ipam) -> None:
    assert [take(ipam, str(n), networks("fd00::/126"))[0] for n in range(2)] == ["fd00::2", "fd00::3"]


def test_same_owner_gets_the_same_addresses(ipam: Ipam) -> None:
    assert take(ipam, "a", DUAL) == take(ipam, "a", DUAL)


def test_family_without_room_reserves_nothing_in_the_other(ipam: Ipam) -> None:
    for n in range(5):
        ipam.reserve(str(n), V4)
    with pytest.raises(RangeFull, match=r"10\.0\.0\.0/29"):
        ipam.reserve("a", DUAL)
    assert ipam.owned_by("a") == ()
    assert take(ipam, "b", networks("fd00::/64")) == ["fd00::2"]


def test_second_range_of_a_family_is_used_when_the_first_is_full(ipam: Ipam) -> None:
    ranges = networks("10.0.0.0/30", "10.0.1.0/30")
    assert [take(ipam, str(n), ranges)[0] for n in range(2)] == ["10.0.0.2", "10.0.1.2"]
    with pytest.raises(RangeFull, match=r"10\.0\.0\.0/30, 10\.0\.1\.0/30: all 2 are in use"):
        ipam.reserve("more", ranges)


def test_freed_addresses_come_last_and_in_the_order_of_freeing(ipam: Ipam) -> None:
    for n in range(4):
        ipam.reserve(str(n), V4)
    for owner in ("2", "0", "3"):
        ipam.release(owner)
    assert [take(ipam, f"new{n}", V4)[0] for n in range(4)] == ["10.0.0.6", "10.0.0.4", "10.0.0.2", "10.0.0.5"]


def test_address_that_was_never_on_an_interface_comes_first(ipam: Ipam) -> None:
    for n in range(5):
        ipam.reserve(str(n), V4)
    ipam.release("0")
    ipam.release("1", unused=True)
    assert take(ipam, "x", V4) == ["10.0.0.3"]


def test_release_of_an_unknown_owner_is_nothing(ipam: Ipam) -> None:
    ipam.release("nobody")
    assert take(ipam, "a", V4) == ["10.0.0.2"]


def test_full_says_why_before_it_happens(ipam: Ipam) -> None:
    for n in range(5):
        assert ipam.full(V4) == ""
        ipam.reserve(str(n), V4)
    assert "10.0.0.0/29" in ipam.full(V4)
    ipam.release("3")
    assert ipam.full(V4) == ""


def test_order_survives_a_restart(ipam: Ipam, tmp_path: Path) -> None:
    for n in range(4):
        ipam.reserve(str(n), V4)
    for owner in ("2", "0"):
        ipam.save_order(owner, V4)
        ipam.release(owner)
    again = restarted(tmp_path, {"1": ["10.0.0.3"], "3": ["10.0.0.5"]})
    assert [take(again, f"new{n}", V4)[0] for n in range(3)] == ["10.0.0.6", "10.0.0.4", "10.0.0.2"]


def test_order_survives_a_restart_during_which_the_range_is_not_known_yet(ipam: Ipam, tmp_path: Path) -> None:
    ipam.reserve("a", V4)
    ipam.reserve("b", V4)
    ipam.save_order("a", V4)
    ipam.release("a")
    early = restarted(tmp_path, {"b": ["10.0.0.3"]})
    early.save_order("b", [])  # a DEL comes before the Node object with its podCIDRs
    early.release("b")
    late = restarted(tmp_path, {})
    assert [take(late, str(n), V4)[0] for n in range(5)] == [f"10.0.0.{n}" for n in (4, 5, 6, 2, 3)]


def test_crash_between_saving_the_order_and_removing_the_record(ipam: Ipam, tmp_path: Path) -> None:
    ipam.reserve("a", V4)
    ipam.save_order("a", V4)
    again = restarted(tmp_path, {"a": ["10.0.0.2"]})
    assert [take(again, str(n), V4)[0] for n in range(4)] == [f"10.0.0.{n}" for n in (3, 4, 5, 6)]
    with pytest.raises(RangeFull):
        again.reserve("more", V4)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"no network": {"next": 2, "freed": []}}', b'{"10.0.0.0/29": 7}']
)
def test_damaged_order_costs_only_the_order(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rotation.json").write_bytes(content)
    again = restarted(tmp_path, {"a": ["10.0.0.2"], "b": ["10.0.0.4"]})
    assert {take(again, str(n), V4)[0] for n in range(3)} == {"10.0.0.3", "10.0.0.5", "10.0.0.6"}


def test_hostile_order_cannot_lead_out_of_the_range(tmp_path: Path) -> None:
    (tmp_path / "rotation.json").write_text('{"10.0.0.0/29": {"next": 999, "freed": [-1, 0, 1, 7, 8, 3, 3]}}')
    again = restarted(tmp_path, {})
    assert {take(again, str(n), V4)[0] for n in range(5)} == {f"10.0.0.{n}" for n in range(2, 7)}


def test_address_outside_all_ranges_stays_owned(tmp_path: Path) -> None:
    again = restarted(tmp_path, {"old": ["10.0.9.2"]})
    assert take(again, "a", V4) == ["10.0.0.2"]
    assert take(again, "b", networks("10.0.9.0/24")) == ["10.0.9.3"], "the range came back with its pod still there"


def test_address_recorded_twice_is_not_stolen(tmp_path: Path) -> None:
    again = restarted(tmp_path, {"a": ["10.0.0.2"]})
    address = ipaddress.ip_address("10.0.0.2")
    assert again.occupy("b", [address]) == (address,)
    again.release("b")
    assert again.owned_by("a") == (address,)
    assert take(again, "c", V4) == ["10.0.0.3"]


def test_overlapping_ranges_never_give_one_address_twice(ipam: Ipam) -> None:
    small, large = networks("10.0.0.0/29"), networks("10.0.0.0/24")
    given = [take(ipam, str(n), small if n % 2 else large)[0] for n in range(5)]
    assert len(set(given)) == 5


def test_threads_get_different_addresses(ipam: Ipam) -> None:
    ranges = networks("10.0.0.0/16")
    given: list[str] = []
    names = itertools.count()

    def work() -> None:
        for _ in range(50):
            given.extend(take(ipam, str(next(names)), ranges))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(given) == len(set(given)) == 200


class Exclusive(RuleBasedStateMachine):
    """Any order of reserving, releasing, failing and restarting: a model with a plain set agrees."""

    RANGES = networks("10.0.0.0/28", "fd00::/124")  # 13 and 14 pods

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.ipam = restarted(Path(self.directory.name), {})
        self.owned: dict[str, list[str]] = {}
        self.released_at: dict[str, int] = {}
        self.clock = itertools.count(1)
        self.names = itertools.count()

    def teardown(self) -> None:
        self.directory.cleanup()

    @precondition(lambda self: len(self.owned) < 13)
    @rule()
    def reserve(self) -> None:
        taken = {text for texts in self.owned.values() for text in texts}
        name = f"pod{next(self.names)}"
        given = take(self.ipam, name, self.RANGES)
        assert not taken & set(given)
        free = [f"10.0.0.{n}" for n in range(2, 15) if f"10.0.0.{n}" not in taken]
        age = min(self.released_at.get(text, 0) for text in free)
        assert self.released_at.get(given[0], 0) == age, "the longest free one comes first"
        self.owned[name] = given

    @precondition(lambda self: len(self.owned) == 13)
    @rule()
    def full(self) -> None:
        assert self.ipam.full(self.RANGES)
        with pytest.raises(RangeFull):
            self.ipam.reserve("too many", self.RANGES)

    @precondition(lambda self: self.owned)
    @rule(choice=st.randoms(use_true_random=False))
    def release(self, choice) -> None:
        name = choice.choice(sorted(self.owned))
        self.ipam.save_order(name, self.RANGES)
        self.ipam.release(name)
        for text in self.owned.pop(name):
            self.released_at[text] = next(self.clock)

    @rule()
    def restart(self) -> None:
        self.ipam = restarted(Path(self.directory.name), self.owned)

    @invariant()
    def owners_are_known(self) -> None:
        for name, texts in self.owned.items():
            assert [str(address) for address in self.ipam.owned_by(name)] == texts


TestExclusive = Exclusive.TestCase
TestExclusive.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
