"""What virtual Ethernet needs at its other end before XDP can send to it."""

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

_PASS = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)  # r0 = XDP_PASS; exit
_PROG_LOAD, _PROG_TYPE_XDP = 5, 6


def pass_frames(netns: str | Path, wanted: Callable[[str], bool]) -> list[Fd]:
    """Puts an XDP program that passes everything on the interfaces of a namespace whose names are wanted, for as long
    as what is returned stays open. Without one nobody is woken for what XDP sends there (veth_xdp_flush in
    drivers/net/veth.c)."""
    code, text = ctypes.create_string_buffer(_PASS, len(_PASS)), ctypes.create_string_buffer(b"GPL")
    attr = syscall.attr_of("IIQQ", _PROG_TYPE_XDP, 2, ctypes.addressof(code), ctypes.addressof(text), size=128)
    program = Fd(syscall.bpf(_PROG_LOAD, attr, "load a program that passes"))

    def attach() -> list[Fd]:
        return [
            links.link_create(program.number, index, AttachType.XDP, flags=links.XDP_DRV_MODE)
            for index, name in socket.if_nameindex()
            if wanted(name)
        ]

    return [program, *call_in_netns(netns, attach)]
