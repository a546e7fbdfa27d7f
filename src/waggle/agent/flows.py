"""Events in the agent: read from the kernel, remembered, written to the flow log, and handed to who asks for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from waggle.config import AgentConfig
from waggle.kernel.maps import Map
from waggle.observe.denials import Denials
from waggle.observe.events import EventReader, Seen, describe
from waggle.observe.flow_filter import FlowFilter
from waggle.observe.flow_log import FlowLog
from waggle.observe.history import History
from waggle.observe.names import Names
from waggle.observe.rules import Rules
from waggle.sources.problem import Problem

POLL_SECONDS = 0.1
BACKLOG = 10_000  # events that one reader may be behind
SIFTED_AT_ONCE = 1000  # events of the history that are looked at before other work gets its turn


class Flows:
    """The events of one node."""

    def __init__(self, config: AgentConfig, maps: Mapping[str, Map], names: Names, rules: Rules) -> None:
        self.history = History(config.flow_history)
        self.denials = Denials(maps["wag_denials"], rules)
        self.log = FlowLog(config.flow_log, config.flow_log_size) if config.flow_log is not None else None
        self._unwritten: list[Seen] = []
        self._names = names
        self._reader = EventReader(maps["wag_events_rb"], names, rules)
        if config.flow_history:
            self._reader.listen(self.history.add)
        if self.log is not None:
            self._reader.listen(self._unwritten.append)

    async def run(self) -> None:
        """Polls until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            await self.poll()

    async def poll(self) -> None:
        """Takes what is waiting; returns when the log has it."""
        self._reader.poll()
        if self.log is not None and self._unwritten:
            events = [self.describe(seen) for seen in self._unwritten]
            self._unwritten.clear()
            await asyncio.to_thread(self.log.write, events)

    def problems(self) -> list[Problem]:
        return [Problem("flow log", self.log.problem)] if self.log is not None and self.log.problem else []

    def describe(self, seen: Seen) -> dict[str, Any]:
        """An event as JSON-able facts."""
        return describe(seen, self.history.identity(seen))

    def find(self, identity: str) -> dict[str, Any] | None:
        """The event with this id, None where it is not remembered any more."""
        seen = self.history.find(identity)
        return self.describe(seen) if seen is not None else None

    async def show(
        self, wanted: FlowFilter, *, since: float | None = None, last: int | None = None, follow: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Remembered events that are wanted, oldest first: those of the last `since` seconds, the `last` so many, or
        both; none where neither is given. Then, if told to `follow`, those that come, for ever. Who is too slow loses
        events, and is told: `lost`."""
        queue: asyncio.Queue[Seen] = asyncio.Queue(BACKLOG)
        lost = 0

        def listener(seen: Seen) -> None:
            nonlocal lost
            if not wanted.wants(seen, self._names.service_addresses):
                return
            try:
                queue.put_nowait(seen)
            except asyncio.QueueFull:
                lost += 1

        stop = self._reader.listen(listener) if follow else lambda: None
        try:
            for seen in await self._remembered(wanted, since, last):
                yield self.describe(seen)
            while follow:
                facts = self.describe(await queue.get())
                if lost:
                    facts["lost"], lost = lost, 0
                yield facts
        finally:
            stop()

    async def _remembered(self, wanted: FlowFilter, since: float | None, last: int | None) -> list[Seen]:
        if since is None and last is None:
            return []
        oldest = time.time() - since if since is not None else 0.0
        found: list[Seen] = []
        for number, seen in enumerate(self.history.newest_first(), 1):
            if last is not None and len(found) >= last:
                break
            if seen.time >= oldest and wanted.wants(seen, self._names.service_addresses):
                found.append(seen)
            if number % SIFTED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return found[::-1]
