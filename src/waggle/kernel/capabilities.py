"""The privileges that an agent needs, and giving up all others.

Found by taking each away from an agent with pods, Services and health ports. SYS_ADMIN is for entering pods' network
namespaces and for opening BPF objects by their numbers; it implies BPF and PERFMON.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from waggle.errors import KernelError

#: Name (without CAP_) → its number (include/uapi/linux/capability.h).
NUMBERS: Mapping[str, int] = MappingProxyType(
    {
        "CHOWN": 0,
        "DAC_READ_SEARCH": 2,
        "KILL": 5,
        "SETGID": 6,
        "SETUID": 7,
        "NET_BIND_SERVICE": 10,
        "NET_ADMIN": 12,
        "SYS_CHROOT": 18,
        "SYS_PTRACE": 19,
        "SYS_ADMIN": 21,
    }
)
#: What each is for.
NEEDED: Mapping[str, str] = MappingProxyType(
    {
        "SYS_ADMIN": "pods' network namespaces, BPF objects by number",
        "NET_ADMIN": "interfaces, routes, forwarding, programs on network hooks",
        "DAC_READ_SEARCH": "manifests and network namespaces of other users",
        "SYS_PTRACE": "naming the process that is on a Service's port, handing over health ports",
        "KILL": "ending waggle-health, which runs as nobody",
        "SETUID": "waggle-health becomes nobody",
        "SETGID": "waggle-health becomes nobody",
        "SYS_CHROOT": "waggle-health shuts itself in",
        "NET_BIND_SERVICE": "health ports below 1024",
        "CHOWN": "giving the API's socket to a group",
    }
)
_VERSION_3 = 0x20080522
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_SETPCAP = 8
_libc = ctypes.CDLL(None, use_errno=True)


def drop_others(names: Iterable[str] = NEEDED) -> None:
    """Leaves the calling thread, the threads and the processes that it will start only these, and no way to more.

    So it must run before other threads exist. What was not there before does not appear. Raises KernelError.
    """
    wanted = sum(1 << NUMBERS[name] for name in names)
    permitted = held("CapPrm")
    if permitted >> _SETPCAP & 1:  # else the bounding set is what the one who started us made of it
        for number in range(64):
            if not wanted >> number & 1 and held("CapBnd") >> number & 1:
                _prctl(_PR_CAPBSET_DROP, number)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    keep = permitted & wanted
    low, high = keep & 0xFFFFFFFF, keep >> 32
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    data = ctypes.create_string_buffer(struct.pack("=6I", low, low, 0, high, high, 0))
    if _libc.capset(header, data) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"cannot give up capabilities: {os.strerror(number)}", number)


def missing(names: Iterable[str] = NEEDED) -> list[str]:
    """Those of them that the calling thread does not have."""
    effective = held("CapEff")
    return [name for name in names if not effective >> NUMBERS[name] & 1]


def held(which: str) -> int:
    """One of the calling thread's sets ("CapEff", "CapPrm", "CapBnd"), as bits."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return int(value, 16)
    raise KernelError(f"/proc/thread-self/status has no {which}")


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    if _libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        number = ctypes.get_errno()
        raise KernelError(f"cannot give up privileges (prctl {option}): {os.strerror(number)}", number)
