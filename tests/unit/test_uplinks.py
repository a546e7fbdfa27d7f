"""On which interfaces XDP works."""

from __future__ import annotations

from waggle.kernel.netlink_wire import Link
from waggle.reconcile.uplinks import xdp_uplinks


def link(index: int, name: str, kind: str = "", on: int = 0) -> Link:
    return Link(index, name, f"02:00:00:00:00:{index:02x}", 1500, 1, kind, 0, on, None)


def test_xdp_works_where_no_vlan_is() -> None:
    links = [link(1, "eth0"), link(2, "eth1"), link(3, "eth1.7", "vlan", 2), link(4, "veth0", "veth", 1)]
    macs, rests = xdp_uplinks([("eth0", 1), ("eth1", 2), ("gone", 9)], links)
    assert macs == {1: bytes.fromhex("020000000001")}
    assert list(rests) == ["eth1"] and "VLAN eth1.7" in rests["eth1"]
