"""The host's sysctls that routing pods' packets needs."""

from __future__ import annotations

import logging
from pathlib import Path

from waggle.reconcile.sysctls import Sysctls

log = logging.getLogger(__name__)

_IPV6_FORWARDING = "net/ipv6/conf/all/forwarding"
# What the kernel sets along with the switch of a whole family: each interface's own, and whether redirects are heeded.
_FORWARDING = {
    "net/ipv4/ip_forward": ("net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/accept_redirects"),
    _IPV6_FORWARDING: ("net/ipv6/conf/*/forwarding",),
}


def enable_forwarding(sysctls: Sysctls) -> None:
    """Turns on IP forwarding where it is off: without it the kernel's routes are not asked for pods' packets.

    Raises KernelError naming the setting that cannot be written.
    """
    _keep_router_advertisements(sysctls)
    for name, disturbs in _FORWARDING.items():
        if not sysctls.set(name, "1", disturbs):
            log.warning("%s does not exist: this family is off in the kernel", name)


def _keep_router_advertisements(sysctls: Sysctls) -> None:
    """A host that forwards IPv6 forgets its default router, unless told to listen all the same (accept_ra = 2)."""
    if sysctls.read(_IPV6_FORWARDING) in (None, "1"):
        return
    for name in sysctls.matching("net/ipv6/conf/*/accept_ra"):
        if Path(name).parent.name != "all" and sysctls.read(name) == "1":
            sysctls.set(name, "2")
