"""Namespaces of pods, for programs that ask for their sockets."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from waggle.testing.machine import Machine


@contextlib.contextmanager
def sandbox_of(machine: Machine, suffix: str, addresses: dict[int, str], netns_id: int) -> Iterator[str]:
    """The namespace of a pod, which the machine's knows by `netns_id`; its addresses are on an interface to nowhere."""
    name = f"{machine.netns}-{suffix}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True)
        for line in (
            "link add eth0 type veth peer name nowhere",
            "link set eth0 up",
            "link set nowhere up",
            f"addr add {addresses[4]}/24 dev eth0",
            f"addr add {addresses[6]}/64 dev eth0 nodad",
            "route add default dev eth0",
            "-6 route add default dev eth0",
        ):
            subprocess.run(["ip", "-n", name, *line.split()], check=True)
        subprocess.run(["ip", "-n", machine.netns, "netns", "set", name, str(netns_id)], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
