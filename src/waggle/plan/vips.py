"""Addresses of Services and Service ranges as the maps hold them (wag_vips, wag_svc_ranges)."""

from __future__ import annotations

from collections.abc import Iterable

from waggle.abi._generated import ServiceRange, ServiceRangeFlag, VipFlag
from waggle.abi.address import pack_address
from waggle.model.objects import Service
from waggle.model.service import IPNetwork
from waggle.model.vip import vips

_V4_BITS = 96  # of a mapped IPv4 address before its own


def plan_vips(service: Service | None) -> dict[bytes, int]:
    """Key and value of each address of a Service. What is no address is left out, as in `plan_service`."""
    found: dict[bytes, int] = {}
    for address, is_cluster in (vips(service) if service is not None else {}).items():
        try:
            key = pack_address(address)
        except ValueError:
            continue
        found[key] = int(VipFlag.CLUSTER_IP) if is_cluster else 0
    return found


def plan_ranges(networks: Iterable[IPNetwork]) -> list[ServiceRange]:
    """One record per range."""
    records = []
    for network in networks:
        bits = network.prefixlen + (_V4_BITS if network.version == 4 else 0)
        mask = ((1 << bits) - 1) << (128 - bits)
        records.append(
            ServiceRange(
                pack_address(str(network.network_address)), mask.to_bytes(16, "big"), int(ServiceRangeFlag.USED)
            )
        )
    return records


def holds(record: ServiceRange, address: bytes) -> bool:
    """Whether a range holds an address, as wag_range_holds says."""
    masked = int.from_bytes(address, "big") & int.from_bytes(record.mask, "big")
    return masked.to_bytes(16, "big") == record.network
