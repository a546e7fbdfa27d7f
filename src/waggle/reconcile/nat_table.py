"""The NAT table: how large it is, how it changes its size without losing a flow, and what starts the kernel's sweep."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from pathlib import Path

from waggle.errors import KernelError, TableFull
from waggle.kernel import syscall
from waggle.kernel.maps import Map, map_of_program, program_at_work
from waggle.kernel.syscall import Fd
from waggle.kernel.testrun import run_syscall


def nat_entries(memory: int, pinned: Map | None = None) -> int:
    """How large a NAT table a machine with so many bytes of memory has: in full it takes 1/300 of them.

    One that is there stays while it is not far from that: memory that is plugged in does not make all flows move.
    """
    wanted = min(max(memory >> 16, 1 << 16), 1 << 22)
    entries = pinned.info.max_entries if pinned is not None else 0
    return entries if wanted <= 2 * entries and entries <= 2 * wanted else wanted


def young_flows(entries: int) -> int:
    """How many flows may have begun and not be confirmed, in a NAT table of so many entries: a quarter of its flows."""
    return max(entries // 8, 16)


def tables_at_work(links: Path) -> list[Map]:
    """The NAT tables of the programs behind pinned links: several where an agent was killed while it replaced one."""
    programs = {program_at_work(link) for link in [*links.glob("dev-*"), *links.glob("pod-*")]}
    found = [map_of_program(program, "wag_nat") for program in programs]
    return list({table.info.id: table for table in found if table is not None}.values())


def copy_missing(before: Map, now: Map) -> int:
    """Writes the entries of `before` that `now` does not have, while programs write into `now`; how many.

    Tables of another layout have none in common. Where `now` is full, the rest has no place and is left out.
    """
    if (before.key_size, before.value_size) != (now.key_size, now.value_size):
        return 0
    there = set(now.keys())
    copied = 0
    for key, value in before.dump():
        if key in there:
            continue
        try:
            now.update(key, value, syscall.BPF_NOEXIST)
        except TableFull:
            break
        except KernelError as error:
            if error.errno != errno.EEXIST:  # a flow that has just begun anew
                raise
        else:
            copied += 1
    return copied


def start_sweeping(program: Fd) -> int:
    """Runs wag_sweep_start; 0, or a negative errno.

    The kernel takes memory for it without waiting. It may have none at hand on one CPU for a long time (v6.18,
    kmalloc_nolock), so every CPU is asked.
    """
    failed = 0
    allowed = os.sched_getaffinity(0)
    cpus = sorted(allowed)
    try:
        for attempt in range(20):
            os.sched_setaffinity(0, {cpus[attempt % len(cpus)]})
            failed = ctypes.c_int32(run_syscall(program, bytes(8))).value
            if not failed:
                break
            time.sleep(0.01)
    finally:
        os.sched_setaffinity(0, allowed)
    return failed
