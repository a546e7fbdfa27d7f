"""The node's ports that lead elsewhere: kept from the kernel's own choice, and those who were on them before named."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

from waggle.abi.address import host_port
from waggle.errors import KernelError, WaggleError
from waggle.kernel.sockets import bound_sockets, socket_owners
from waggle.model.bound import LocalPort, sockets_in_vain
from waggle.model.host_port import HostPortOwner
from waggle.reconcile.datapath import Datapath
from waggle.reconcile.reserved_ports import ReservedPorts
from waggle.reconcile.services import Owner, ServiceTables, named
from waggle.sources.problem import Problem

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.1  # between two looks: changes come in bursts
AGAIN_SECONDS = 5.0  # between two looks while somebody is on such a port


class PortGuard:
    """`notice` after the tables' local ports have changed."""

    def __init__(self, datapath: Datapath, state_dir: Path) -> None:
        self._datapath = datapath
        self._reserved = ReservedPorts(state_dir)
        self._due = asyncio.Event()
        self._cut_off: list[Problem] = []  # sockets of the node on ports that lead elsewhere
        self._unreserved = ""

    def notice(self) -> None:
        """Something may have changed."""
        self._due.set()

    async def run(self, tables: ServiceTables) -> None:
        """Until cancelled. Nobody new can come by such a port, so that this looks at a change only, and again while
        there is somebody."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), AGAIN_SECONDS if self._cut_off else None)
            self._due.clear()
            ports = tables.local_ports()
            self._unreserved = ""
            try:
                await asyncio.to_thread(self._reserved.apply, {port.port for port in ports})
            except KernelError as error:
                self._unreserved = str(error)
                log.error("%s", error)
            try:
                self._cut_off = await asyncio.to_thread(self._sockets_in_vain, _for_nobody(ports))
            except (WaggleError, OSError) as error:
                log.error("cannot tell who uses ports of Services: %s", error)
            await asyncio.sleep(PAUSE_SECONDS)

    def problems(self) -> list[Problem]:
        """Who is on a port in vain, and why ports could not be reserved."""
        return self._cut_off + ([Problem("ports", self._unreserved)] if self._unreserved else [])

    def _sockets_in_vain(self, ports: Mapping[LocalPort, Owner]) -> list[Problem]:
        met = sockets_in_vain(bound_sockets(), ports, self._datapath.serves_nodeports_at)
        owners = socket_owners({socket.inode for socket, _ in met})
        found: list[Problem] = []
        for socket, port in met:
            where = f"{socket.protocol} {host_port(socket.address, socket.port)}"
            who = owners.get(socket.inode, "a process that cannot be seen from here")
            problem = Problem(named(ports[port]), f"{who} was on {where} before and gets nothing there any more")
            if problem not in found:
                found.append(problem)
            if problem not in self._cut_off:
                log.warning("%s", problem)
        return found


def _for_nobody(ports: Mapping[LocalPort, Owner]) -> dict[LocalPort, Owner]:
    """Those on which no process of the node should be: without what a runtime keeps for itself."""
    return {port: owner for port, owner in ports.items() if not (isinstance(owner, HostPortOwner) and owner.held)}
