"""Attachments on disk, and the result that is made of them."""

from __future__ import annotations

import ipaddress
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from waggle.errors import CniError
from waggle.sources.cni_records import (
    Attachment,
    AttachmentRecords,
    host_ifname,
    is_host_ifname,
    new_attachment,
    random_mac,
)
from waggle.sources.cni_request import CniRequest
from waggle.sources.cni_result import add_result, faults_of_result

ADDRESSES = (ipaddress.ip_address("10.0.0.2"), ipaddress.ip_address("fd00::2"))
REQUEST = CniRequest("ADD", "1.1.0", network="pods", container_id="c", ifname="eth0", netns="/run/netns/c")


def attachment(container_id: str = "c") -> Attachment:
    return new_attachment(container_id, "eth0", "pods", "/run/netns/c", ADDRESSES, boot="b", namespace="n", name="p")


def test_record_comes_back(tmp_path: Path) -> None:
    records = AttachmentRecords(tmp_path / "cni")
    record = attachment()
    records.write(record)
    assert AttachmentRecords(tmp_path / "cni").load() == ({record.host_ifname: record}, {})
    assert record.ips == ADDRESSES
    records.remove(record.host_ifname)
    records.remove(record.host_ifname)
    assert records.load() == ({}, {})
    assert list((tmp_path / "cni").iterdir()) == []


def test_record_is_readable_by_people(tmp_path: Path) -> None:
    record = attachment()
    AttachmentRecords(tmp_path).write(record)
    text = (tmp_path / f"{record.host_ifname}.json").read_text()
    assert json.loads(text)["addresses"] == ["10.0.0.2", "fd00::2"]
    assert len(text.splitlines()) > 5


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"{}", b'{"container_id": "x"}'],
)
def test_unreadable_record_is_reported_and_left(tmp_path: Path, content: bytes) -> None:
    records = AttachmentRecords(tmp_path)
    good = attachment()
    records.write(good)
    (tmp_path / "wag0123456789a.json").write_bytes(content)
    found, unreadable = records.load()
    assert found.keys() == {good.host_ifname}
    assert unreadable.keys() == {"wag0123456789a"}
    assert "wag0123456789a.json" in unreadable["wag0123456789a"]


def test_record_under_another_name_is_not_believed(tmp_path: Path) -> None:
    records = AttachmentRecords(tmp_path)
    records.write(attachment())
    (tmp_path / f"{host_ifname('c', 'eth0')}.json").rename(tmp_path / "wag0123456789a.json")
    found, unreadable = records.load()
    assert (found, list(unreadable)) == ({}, ["wag0123456789a"])


@pytest.mark.parametrize("addresses", [["10.0.0.256"], [], ["10.0.0.0/24"]])
def test_record_with_impossible_addresses(tmp_path: Path, addresses: list[str]) -> None:
    records = AttachmentRecords(tmp_path)
    records.write(attachment())
    file = next(tmp_path.glob("*.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "addresses": addresses}))
    assert list(records.load()[1]) == [file.stem]


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    for name in ("rotation.json", "wagon.json", "README"):
        (tmp_path / name).write_text("x")
    (tmp_path / "wag0123456789a.tmp").write_text('{"half')
    assert AttachmentRecords(tmp_path).load() == ({}, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README", "rotation.json", "wagon.json"]


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs /dev/full as root")
def test_disk_that_refuses_is_an_io_failure(tmp_path: Path) -> None:
    records = AttachmentRecords(tmp_path / "cni")
    record = attachment()
    (tmp_path / "cni" / f"{record.host_ifname}.tmp").symlink_to("/dev/full")
    with pytest.raises(CniError) as caught:
        records.write(record)
    assert caught.value.code == 5
    assert records.load() == ({}, {})


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CniError) as caught:
        AttachmentRecords(tmp_path / "file" / "cni")
    assert caught.value.code == 5


def test_host_interface_name() -> None:
    name = host_ifname("c", "eth0")
    assert name == host_ifname("c", "eth0") != host_ifname("c", "eth1")
    assert is_host_ifname(name)
    assert len(name) < 16
    for other in ("wag", "wagon", "wag0123456789", "wag0123456789ab", "wag0123456789A", "xwag0123456789a"):
        assert not is_host_ifname(other)


def test_mac_is_local_and_unicast() -> None:
    for _ in range(64):
        first = int(random_mac()[:2], 16)
        assert first & 0b11 == 0b10


# -- the result


def test_result_of_each_version() -> None:
    record = attachment()
    for version in ("0.3.1", "0.4.0", "1.0.0", "1.1.0"):
        result = add_result(replace(REQUEST, version=version), record, 1450)
        assert result["cniVersion"] == version
        assert [entry["address"] for entry in result["ips"]] == ["10.0.0.2/32", "fd00::2/128"]
        assert [entry.get("version") for entry in result["ips"]] == (
            ["4", "6"] if version.startswith("0.") else [None, None]
        )
        assert [entry.get("mtu") for entry in result["interfaces"]] == (
            [1450] * 2 if version == "1.1.0" else [None] * 2
        )
        assert result["interfaces"][1]["sandbox"] == "/run/netns/c"
        assert "sandbox" not in result["interfaces"][0]


def test_dns_of_the_configuration_is_passed_on() -> None:
    dns = {"nameservers": ["10.96.0.10"], "search": ["cluster.local"]}
    assert add_result(replace(REQUEST, dns=dns), attachment(), 0)["dns"] == dns


def test_own_result_has_no_faults() -> None:
    record = attachment()
    assert faults_of_result(add_result(REQUEST, record, 0), record) == ([], list(ADDRESSES))


def test_result_that_later_plugins_changed() -> None:
    record = attachment()
    result = add_result(REQUEST, record, 0)
    result["interfaces"].append({"name": "eth0", "sandbox": "/run/netns/c", "mac": "02:00:00:00:00:01"})
    result["ips"].append({"address": "192.168.1.1/24", "interface": 0})
    result["routes"] = [route for route in result["routes"] if route["dst"] == "::/0"]
    assert faults_of_result(result, record) == ([], [ADDRESSES[1]])


def test_faults_of_a_result() -> None:
    record = attachment()
    good = add_result(REQUEST, record, 0)
    for change, words in [
        ({"interfaces": []}, "no interface eth0"),
        ({"interfaces": [good["interfaces"][0], {**good["interfaces"][1], "sandbox": ""}]}, "no interface eth0"),
        ({"interfaces": [good["interfaces"][0], {**good["interfaces"][1], "mac": "02:00:00:00:00:01"}]}, "MAC"),
        ({"ips": good["ips"][:1]}, "lacks address fd00::2"),
        ({"ips": [*good["ips"], {"interface": 1, "address": "10.0.0.3/32"}]}, "10.0.0.3, which it was not given"),
    ]:
        faults, _ = faults_of_result({**good, **change}, record)
        assert len(faults) == 1 and words in faults[0], (change, faults)


@pytest.mark.parametrize(
    "change",
    [{"ips": "x"}, {"ips": [1]}, {"interfaces": {}}, {"ips": [{"interface": 1, "address": "x"}]}, {"routes": 5}],
)
def test_result_that_is_none(change: dict[str, object]) -> None:
    record = attachment()
    with pytest.raises(CniError) as caught:
        faults_of_result({**add_result(REQUEST, record, 0), **change}, record)
    assert caught.value.code == 7


def test_names_are_resolved_as_the_network_says_else_as_the_node_does() -> None:
    record, node = attachment(), {"nameservers": ["169.254.53.53"], "search": ["n.svc.cluster.local"]}
    assert add_result(REQUEST, record, 0, node)["dns"] == node
    said = {"nameservers": ["192.0.2.53"]}
    assert add_result(replace(REQUEST, dns=said), record, 0, node)["dns"] == said
    assert add_result(replace(REQUEST, prev_result={"dns": said}), record, 0, node)["dns"] == said
    assert add_result(REQUEST, record, 0)["dns"] == {}


def test_records_of_earlier_agents_are_read(tmp_path: Path) -> None:
    """They know nothing of labels."""
    records, record = AttachmentRecords(tmp_path), attachment()
    records.write(record)
    file = tmp_path / f"{record.host_ifname}.json"
    old = {
        name: value for name, value in json.loads(file.read_text()).items() if name not in ("uid", "labels", "workload")
    }
    file.write_text(json.dumps(old))
    assert records.load() == ({record.host_ifname: record}, {})
