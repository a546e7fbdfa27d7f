"""XDP programs that give every frame the same verdict: virtual Ethernet needs one before XDP can send to it."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from waggle.kernel import links, syscall
from waggle.kernel.links import AttachType
from waggle.kernel.netns import call_in_netns
from waggle.kernel.syscall import Fd

XDP_DROP, XDP_PASS = 1, 2
_PROG_LOAD, _PROG_TYPE_XDP = 5, 6


def give_verdict(verdict: int, netns: str | Path, wanted: Callable[[str], bool]) -> list[Fd]:
    """Puts an XDP program that says XDP_DROP or XDP_PASS to everything on the interfaces of a namespace whose names are
    wanted, for as long as what is returned stays open. Without one nobody is woken for what XDP sends there
    (veth_xdp_flush in drivers/net/veth.c)."""
    program = struct.pack("=BBhiBBhi", 0xB7, 0, 0, verdict, 0x95, 0, 0, 0)  # r0 = verdict; exit
    code, text = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(b"GPL")
    attr = syscall.attr_of("IIQQ", _PROG_TYPE_XDP, 2, ctypes.addressof(code), ctypes.addressof(text), size=128)
    loaded = Fd(syscall.bpf(_PROG_LOAD, attr, "load a program that gives a verdict"))

    def attach() -> list[Fd]:
        return [
            links.link_create(loaded.number, index, AttachType.XDP, flags=links.XDP_DRV_MODE)
            for index, name in socket.if_nameindex()
            if wanted(name)
        ]

    return [loaded, *call_in_netns(netns, attach)]
