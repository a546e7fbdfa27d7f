"""Sees to it that health ports are answered: the process is there when the table has ports, and knows of changes.

The process answers without us; here it is only started, told and watched. Ending the agent ends nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Sequence

from waggle.errors import WaggleError
from waggle.metrics import Metrics
from waggle.reconcile.health import HealthTable
from waggle.reconcile.health_process import MAX_PACKET, HealthProcess, Status, listen_request, read_status
from waggle.sources.problem import Problem

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
RETRY_SECONDS = 1.0


class HealthSupervisor:
    """`notice` when the table's ports, or the addresses to listen on, have changed. `addresses` gives those."""

    def __init__(
        self, process: HealthProcess, table: HealthTable, addresses: Callable[[], Sequence[str]], metrics: Metrics
    ) -> None:
        self._process = process
        self._table = table
        self._addresses = addresses
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._changed = True
        self._error = ""
        self._status = Status("", {})

    def notice(self) -> None:
        """Has the process told."""
        self._changed = True
        self._wake.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            begin = loop.time()
            try:
                while self._table.ports:
                    await self._serve()
                if await asyncio.to_thread(self._process.end):
                    log.info("no Service has a health port any more: nothing answers them")
                self._error = ""
            except (WaggleError, OSError) as error:
                if str(error) != self._error:
                    log.error("health ports: %s; trying again", error)
                self._error = str(error)
                if loop.time() - begin < RETRY_SECONDS:
                    await asyncio.sleep(RETRY_SECONDS)
                continue
            while not self._table.ports:
                self._wake.clear()
                await self._wake.wait()

    async def _serve(self) -> None:
        """Until the last port has gone. Raises OSError when the process has ended, or answers no more."""
        loop = asyncio.get_running_loop()
        running = await asyncio.to_thread(self._process.find)
        control = await asyncio.to_thread(self._process.connect, self._addresses())
        try:
            pids = await asyncio.to_thread(self._process.find)
            if pids != running:
                self._metrics.health_starts.inc()
            log.info("health ports are answered by process %s", ", ".join(map(str, pids)))
            self._changed = True  # what has changed since `connect` read it
            self._error = ""
            loop.add_reader(control.fileno(), self._wake.set)
            try:
                await self._follow(control)
            finally:
                loop.remove_reader(control.fileno())
        finally:
            control.close()
            self._status = Status("", {})

    async def _follow(self, control: socket.socket) -> None:
        answered = True
        while self._table.ports:
            try:
                await asyncio.wait_for(self._wake.wait(), HEARTBEAT_SECONDS)
            except TimeoutError:
                if not answered:
                    raise OSError(f"the process that answers them hangs: no word for {HEARTBEAT_SECONDS:g} s") from None
                self._changed = True
            self._wake.clear()
            while (status := _receive(control)) is not None:
                answered = True
                self._take(status)
            if self._changed:
                self._changed = False
                control.send(listen_request(self._addresses()))
                answered = False

    def _take(self, status: Status) -> None:
        for (port, family), number in sorted(status.failed.items()):
            if self._status.failed.get((port, family)) != number:
                log.warning("health port %d (IPv%d) cannot be opened: %s", port, family, os.strerror(number))
        self._status = status

    def problems(self) -> list[Problem]:
        """What keeps health ports from being answered."""
        found = [Problem("health ports", self._error)] if self._error else []
        for (port, family), number in sorted(self._status.failed.items()):
            holder = self._table.holder(port, family)
            if holder is not None:
                reason = f"healthCheckNodePort {port} cannot be opened for IPv{family}: {os.strerror(number)}"
                found.append(Problem(f"Service {holder}", reason))
        return found + [Problem(f"Service {key}", reason) for key, reason in self._table.problems().items()]


def _receive(control: socket.socket) -> Status | None:
    """The next packet, or None where there is none yet. Raises OSError when the other side has gone."""
    try:
        packet = control.recv(MAX_PACKET)
    except BlockingIOError:
        return None
    if not packet:
        raise OSError("the process that answers them has ended")
    return read_status(packet)
