"""BPF iterators: a program that the kernel runs for every object of a kind, here for sockets.

An iterator sees the objects of the network namespace of the thread that opens it (kernel/bpf/bpf_iter.c,
bpf_iter_init_seq_net).
"""

from __future__ import annotations

import os
from pathlib import Path

from waggle.kernel import syscall
from waggle.kernel.netns import call_in_netns
from waggle.kernel.syscall import Fd, attr_of, bpf

_BPF_TRACE_ITER = 28
_READ_BYTES = 4096


class Iterator:
    """A loaded `SEC("iter/…")` program, ready to run as often as wanted."""

    def __init__(self, program: Fd) -> None:
        attr = attr_of("IIIIQII", program.number, 0, _BPF_TRACE_ITER, 0, 0, 0, 0, size=64)
        self._link = Fd(bpf(syscall.LINK_CREATE, attr, "attach iterator"))

    def close(self) -> None:
        self._link.close()

    def run(self, netns: str | Path | None = None) -> int:
        """Runs the program over every object of the network namespace at `netns`, or of the caller's. How many bytes it
        printed.

        Raises NotFound where the namespace is gone.
        """
        if netns is None:
            return self._run()
        return call_in_netns(netns, self._run)

    def _run(self) -> int:
        printed = 0
        with Fd(bpf(syscall.ITER_CREATE, attr_of("II", self._link.number, 0), "run iterator")) as opened:
            while part := os.read(opened.number, _READ_BYTES):  # reading is what runs it
                printed += len(part)
        return printed
