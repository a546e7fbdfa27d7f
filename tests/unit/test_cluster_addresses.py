"""Services of manifests that come without a cluster address get one, the same one as long as they are there."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waggle.model.cluster_addresses import choose_address
from waggle.model.objects import ObjectKey, ObjectMeta, Service, ServicePort, ServiceSpec
from waggle.sources.cluster_addresses import ClusterAddresses
from waggle.sources.manifest_rows import ManifestRows
from waggle.sources.yaml_objects import parse_manifest
from waggle.store import Store

RANGES = ("10.96.0.0/16", "fd00:10:96::/112")


def service(name: str, **spec) -> Service:
    return Service(ObjectMeta(name=name, namespace="default"), ServiceSpec(ports=[ServicePort(80)], **spec))


def given_to(allocator: ClusterAddresses, *services: Service) -> dict[str, list[str]]:
    return {key.name: made.spec.cluster_ips or [] for key, made in allocator.complete(services).items()}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cluster-addresses.json"


@given(st.sampled_from(["10.96.0.0/16", "10.96.0.0/28", "10.96.0.0/30", "fd00::/112", "fd00::/64"]), st.text("abc"))
def test_an_address_of_the_range(text: str, name: str) -> None:
    network = ipaddress.ip_network(text)
    address = choose_address(network, ObjectKey("default", name), ())
    assert address is not None and ipaddress.ip_address(address) in network
    assert address == choose_address(network, ObjectKey("default", name), ())
    assert ipaddress.ip_address(address) not in (network.network_address, ipaddress.ip_address("10.96.255.255"))


def test_all_of_a_range_is_given_out() -> None:
    network = ipaddress.ip_network("10.96.0.0/27")
    taken: set[str] = set()
    while (address := choose_address(network, ObjectKey("default", "x"), taken)) is not None:
        assert address not in taken
        taken.add(address)
    assert len(taken) == 30
    assert choose_address(ipaddress.ip_network("10.96.0.1/32"), ObjectKey("default", "x"), ()) is None


def test_families(file: Path) -> None:
    found = given_to(
        ClusterAddresses(RANGES, file),
        service("single"),
        service("six", ip_families=["IPv6"]),
        service("dual", ip_family_policy="PreferDualStack"),
        service("both", ip_families=["IPv6", "IPv4"]),
    )
    assert {name: [":" in address for address in found[name]] for name in found} == {
        "single": [False],
        "six": [True],
        "dual": [False, True],
        "both": [True, False],
    }


def test_what_wants_none_gets_none(file: Path) -> None:
    services = service("a", cluster_ip="10.96.0.9"), service("b", cluster_ip="None"), service("c", type="ExternalName")
    assert given_to(ClusterAddresses(RANGES, file), *services) == {}
    assert given_to(ClusterAddresses((), file), service("d")) == {}
    assert given_to(ClusterAddresses(("none",), file), service("d")) == {}
    assert not file.exists()


def test_the_same_again(file: Path) -> None:
    # in a range this small, names collide: the file tells who was first
    ranges = ("10.96.0.0/28",)
    allocator = ClusterAddresses(ranges, file)
    before = {}
    for name in "abcdefgh":
        before |= given_to(allocator, service(name))
    assert len({tuple(one) for one in before.values()}) == 8
    again = ClusterAddresses(ranges, file)
    assert given_to(again, *(service(name) for name in "hgfedcba")) == before
    assert json.loads(file.read_text())["default/a"] == before["a"]


def test_an_address_that_somebody_chose_is_not_given_out(file: Path) -> None:
    (first,) = given_to(ClusterAddresses(RANGES, file), service("web")).values()
    file.unlink()
    allocator = ClusterAddresses(RANGES, file)
    found = given_to(allocator, service("other", cluster_ip=first[0]), service("web"))
    assert found["web"] != first
    # one that is written into its manifest later is no longer ours to give
    allocator.complete([service("web", cluster_ip="10.96.0.7")])
    assert "default/web" not in json.loads(file.read_text())


def test_a_full_range_is_told_and_ends(file: Path) -> None:
    allocator = ClusterAddresses(("10.96.0.0/30",), file)
    found = given_to(allocator, service("a"), service("b"), service("c"))
    assert found["c"] == [] and "no IPv4 address is left" in str(allocator.problems()[0])
    assert given_to(allocator, service("d", ip_families=["IPv6"]))["d"] == []
    assert "service-cidr has no IPv6 range" in str(allocator.problems()[1])
    allocator.release(service("a").key)
    allocator.release(service("d").key)
    assert given_to(allocator, service("c"))["c"] == found["a"] and allocator.problems() == []
    # those of Services that are no more make room at last
    assert len(given_to(ClusterAddresses(("10.96.0.0/30",), file), service("x"), service("y"))["y"]) == 1


@pytest.mark.parametrize("content", [b"", b"[]", b'{"default/web": ["x"]}', b"\xff"])
def test_garbage_in_the_file(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert len(given_to(ClusterAddresses(RANGES, file), service("web"))["web"]) == 1
    assert json.loads(file.read_text())


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    allocator = ClusterAddresses(RANGES, tmp_path / "none" / "file.json")
    assert given_to(allocator, service("web"))["web"]
    assert "addresses may change with a restart" in str(allocator.problems()[0])


def test_manifests(file: Path) -> None:
    store = Store()
    rows = ManifestRows(store, ClusterAddresses(RANGES, file))
    text = b"{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{port: 80}]}}"
    key = ObjectKey("default", "web")
    rows.update("a.yaml", parse_manifest(text, "a.yaml"))
    rows.commit()
    address = store.services[key].spec.cluster_ip
    assert address in json.loads(file.read_text())["default/web"]
    store.take_changes()
    rows.update("b.yaml", parse_manifest(text, "b.yaml"))  # it moves to another file
    rows.remove("a.yaml")
    rows.commit()
    assert store.services[key].spec.cluster_ip == address
    assert store.take_changes().services == set()
    rows.remove("b.yaml")
    rows.commit()
    assert key not in store.services
