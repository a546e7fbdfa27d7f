"""Cluster addresses for Services that come without one where no apiserver is there to choose.

An address follows from the Service's name: it is the same again after the Service was away, or all state was lost, and
on another node, unless another Service had it first.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Sequence
from hashlib import blake2b

from waggle.model.objects import ObjectKey, Service
from waggle.model.service import Family, IPNetwork, family_of

#: More of an IPv6 range is not used: it is enough, and numbers stay short.
_MOST = 1 << 16


def needs_address(service: Service) -> bool:
    """Whether an apiserver would choose its address. A headless Service wants none."""
    spec = service.spec
    return spec.type != "ExternalName" and not spec.cluster_ip and not spec.cluster_ips


def wanted_families(service: Service, ranges: Sequence[IPNetwork]) -> list[Family]:
    """The families a Service is to have addresses in, the first one first: as it says, else that of the first range."""
    spec = service.spec
    found = [Family(name) for name in spec.ip_families or () if name in ("IPv4", "IPv6")]
    offered = list(dict.fromkeys(family_of(str(network)) for network in ranges))
    found = found or offered[:1]
    if spec.ip_family_policy in ("PreferDualStack", "RequireDualStack"):
        found += [family for family in offered if family not in found]
    return found


def choose_address(network: IPNetwork, key: ObjectKey, taken: Collection[str]) -> str | None:
    """A free address of a range for a Service; None when there is none.

    The lower part of a range is left to those who choose their address themselves, as an apiserver does
    (min(max(16, size/16), 256) addresses; Kubernetes' KEP-3070).
    """
    size = min(network.num_addresses, _MOST)
    first = min(max(16, size // 16), 256) if size > 32 else 1
    last = size - 1 if network.version == 4 else size  # no broadcast address
    if last <= first:
        return None
    start = int.from_bytes(blake2b(str(key).encode(), digest_size=8).digest(), "big")
    for step in range(last - first):
        address = str(ipaddress.ip_address(int(network.network_address) + first + (start + step) % (last - first)))
        if address not in taken:
            return address
    return None
