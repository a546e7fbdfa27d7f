"""The host's sysctls that routing pods' packets needs.

Reverse path filtering (rp_filter) takes a packet only by an interface that the way back to its sender leads out of.
What the programs deliver never meets it. But answers to the node's own processes do, and where a program has turned one
back into the Service's, its sender is an address whose way leads out of the uplink, while it came from a pod or out of
a tunnel. On an interface without an address, as ours are, the loose filter (2) is as strict as the strict one (1). Of
the setting of an interface and that for all of them the larger counts: so the one for all becomes 0, and every other
interface gets for itself what it has had by it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from waggle.reconcile.sysctls import Sysctls
from waggle.reconcile.uplinks import TUNNELS, is_pod_interface

log = logging.getLogger(__name__)

_SYSCTLS = Path("/proc/sys")
_FILTER_OF_ALL = "net/ipv4/conf/all/rp_filter"
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


def keep_filters(sysctls: Sysctls) -> None:
    """Moves the reverse path filter for all interfaces to each of them, so that ours can go without. Raises KernelError
    naming the setting that cannot be written.
    """
    known = sysctls.read(_FILTER_OF_ALL)
    if known in (None, "0"):
        return
    for name in sysctls.matching("net/ipv4/conf/*/rp_filter"):
        interface = Path(name).parent.name
        if interface != "all" and not _is_ours(interface) and int(sysctls.read(name) or 0) < int(known or 0):
            sysctls.set(name, str(known))
    sysctls.set(_FILTER_OF_ALL, "0")


def drop_filters() -> None:
    """Takes the reverse path filter off all interfaces of ours: hosts set it anew on each that appears."""
    for setting in (_SYSCTLS / "net/ipv4/conf").glob("wag*"):
        if _is_ours(setting.name):
            drop_filter(setting.name)


def drop_filter(interface: str) -> None:
    """Lets an interface of ours take packets whose way back leads out of another one."""
    setting = _SYSCTLS / "net/ipv4/conf" / interface / "rp_filter"
    try:
        if setting.read_text().strip() != "0":
            setting.write_text("0")
    except FileNotFoundError:
        return  # it has gone meanwhile
    except OSError as error:
        reason = "answers of Services to processes of the node may be dropped"
        log.warning("cannot set %s to 0: %s: %s", setting, error.strerror, reason)


def _is_ours(interface: str) -> bool:
    return interface in TUNNELS.values() or is_pod_interface(interface)
