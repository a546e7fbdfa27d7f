"""The host's sysctls that routing pods' packets needs."""

from __future__ import annotations

import logging
from pathlib import Path

from waggle.errors import KernelError

log = logging.getLogger(__name__)

_SYSCTLS = Path("/proc/sys")
_FORWARDING = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")


def enable_forwarding() -> None:
    """Turns on IP forwarding where it is off: without it the kernel's routes are not asked for pods' packets.

    Raises KernelError naming the setting that cannot be written.
    """
    _keep_router_advertisements()
    for name in _FORWARDING:
        try:
            if (_SYSCTLS / name).read_text().strip() != "1":
                _write(name, "1")
        except FileNotFoundError:
            log.warning("%s does not exist: this family is off in the kernel", name)


def _keep_router_advertisements() -> None:
    """A host that forwards IPv6 forgets its default router, unless told to listen all the same (accept_ra = 2)."""
    forwarding = _SYSCTLS / "net/ipv6/conf/all/forwarding"
    if not forwarding.exists() or forwarding.read_text().strip() == "1":
        return
    for setting in (_SYSCTLS / "net/ipv6/conf").glob("*/accept_ra"):
        if setting.parent.name != "all" and setting.read_text().strip() == "1":
            _write(str(setting.relative_to(_SYSCTLS)), "2")


def _write(name: str, value: str) -> None:
    shown = name.replace("/", ".")
    try:
        (_SYSCTLS / name).write_text(value)
    except OSError as error:
        raise KernelError(f"cannot set {shown}: {error.strerror}", error.errno or 0) from error
    log.info("set %s = %s", shown, value)
