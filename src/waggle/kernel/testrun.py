"""BPF_PROG_TEST_RUN: a packet through a program, and what came out."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

from waggle.kernel import syscall
from waggle.kernel.syscall import Fd, attr_of, bpf


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of one run: the program's return value, the packet afterwards, nanoseconds per repetition, skb->mark."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    verdict: int
    packet: bytes
    duration_ns: int
    mark: int = 0


_CHECKSUM_COMPLETE = 1 << 2  # BPF_F_TEST_SKB_CHECKSUM_COMPLETE


def run_packet(
    program: Fd, packet: bytes, *, repeat: int = 1, ifindex: int = 0, mark: int = 0, summed: bool = False
) -> TestRun:
    """Runs a tc program on a packet that begins with its Ethernet header.

    `ifindex` becomes skb->ifindex and ingress_ifindex, `mark` skb->mark (struct __sk_buff; with an ifindex). `summed`:
    as from a card that has added up the whole packet (CHECKSUM_COMPLETE, kernel v6.17); KernelError with EBADMSG where
    the program leaves that sum wrong.
    """
    context = bytearray(192)
    struct.pack_into("=I", context, 8, mark)
    struct.pack_into("=I", context, 36, ifindex)  # __sk_buff.ingress_ifindex
    struct.pack_into("=I", context, 40, ifindex)  # __sk_buff.ifindex
    flags = _CHECKSUM_COMPLETE if summed else 0
    verdict, out, duration, after = _run(program, packet, bytes(context) if ifindex else b"", repeat, flags)
    return TestRun(verdict, out, duration, struct.unpack_from("=I", after, 8)[0] if ifindex else 0)


def run_xdp(program: Fd, packet: bytes, *, repeat: int = 1, ifindex: int = 0) -> TestRun:
    """Runs an XDP program on a packet that begins with its Ethernet header, as if it came in by `ifindex`."""
    context = struct.pack("=6I", 0, len(packet), 0, ifindex, 0, 0)  # struct xdp_md
    verdict, out, duration, _ = _run(program, packet, context, repeat)
    return TestRun(verdict, out, duration)


def _run(program: Fd, packet: bytes, context: bytes, repeat: int, flags: int = 0) -> tuple[int, bytes, int, bytes]:
    """(return value, packet, nanoseconds per repetition, context) afterwards."""
    data_in = ctypes.create_string_buffer(packet, len(packet))
    data_out = ctypes.create_string_buffer(len(packet) + 256)
    argument = ctypes.create_string_buffer(context, len(context) or 1)
    at = ctypes.addressof(argument) if context else 0
    attr = attr_of(
        "IIIIQQIIIIQQI",
        program.number,
        0,
        len(packet),
        len(data_out),
        ctypes.addressof(data_in),
        ctypes.addressof(data_out),
        repeat,
        0,
        len(context),
        len(context),
        at,
        at,
        flags,
        size=80,
    )
    bpf(syscall.PROG_TEST_RUN, attr, "test run")
    verdict, _in, out = struct.unpack_from("=III", attr, 4)
    return verdict, data_out.raw[:out], struct.unpack_from("=I", attr, 36)[0], argument.raw


def run_syscall(program: Fd, context: bytes) -> int:
    """Runs a program of type syscall with its argument. What it returned. Raises KernelError."""
    argument = ctypes.create_string_buffer(context, len(context))
    attr = attr_of(
        "IIIIQQIIIIQQ", program.number, 0, 0, 0, 0, 0, 0, 0, len(context), 0, ctypes.addressof(argument), 0, size=80
    )
    bpf(syscall.PROG_TEST_RUN, attr, "run a program")
    return int(struct.unpack_from("=I", attr, 4)[0])
