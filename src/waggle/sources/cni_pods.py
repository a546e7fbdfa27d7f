"""What the rest of waggle learns of a pod's interface, and what it must do with it."""

from __future__ import annotations

from pathlib import Path

from waggle.model.interface import PodDatapath, PodInterface
from waggle.sources.cni_records import Attachment

__all__ = ["PodDatapath", "PodInterface", "pod_interface"]


def pod_interface(record: Attachment, index: int) -> PodInterface:
    """`index` is that of the host side, 0 where it does not exist."""
    return PodInterface(
        container_id=record.container_id,
        ifname=record.ifname,
        host_ifname=record.host_ifname,
        host_ifindex=index,
        host_mac=record.host_mac,
        pod_mac=record.pod_mac,
        addresses=record.ips,
        netns=Path(record.netns),
        namespace=record.namespace,
        name=record.name,
        host_ports=record.host_ports,
        bandwidth=record.bandwidth,
        chained=bool(record.chained_to),
    )
