"""BPF_PROG_TEST_RUN: a packet through a program, and what came out."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from waggle.kernel import syscall
from waggle.kernel.syscall import Fd, attr_of, bpf


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of one run: the program's return value, the packet afterwards, nanoseconds per repetition."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    verdict: int
    packet: bytes
    duration_ns: int


def run_packet(program: Fd, packet: bytes, *, repeat: int = 1, ifindex: int = 0) -> TestRun:
    """Runs a tc or XDP program on a packet that begins with its Ethernet header.

    `ifindex` becomes skb->ifindex and ingress_ifindex (struct __sk_buff, tc only).
    """
    data_in = ctypes.create_string_buffer(packet, len(packet))
    data_out = ctypes.create_string_buffer(len(packet) + 256)
    context = ctypes.create_string_buffer(192)
    struct.pack_into("=I", context, 36, ifindex)  # __sk_buff.ingress_ifindex
    struct.pack_into("=I", context, 40, ifindex)  # __sk_buff.ifindex
    attr = attr_of(
        "IIIIQQIIIIQQ",
        program.number,
        0,
        len(packet),
        len(data_out),
        ctypes.addressof(data_in),
        ctypes.addressof(data_out),
        repeat,
        0,
        len(context) if ifindex else 0,
        0,
        ctypes.addressof(context) if ifindex else 0,
        0,
        size=80,
    )
    bpf(syscall.PROG_TEST_RUN, attr, "test run")
    verdict, _in, out = struct.unpack_from("=III", attr, 4)
    duration = struct.unpack_from("=I", attr, 36)[0]
    return TestRun(verdict, data_out.raw[:out], duration)
