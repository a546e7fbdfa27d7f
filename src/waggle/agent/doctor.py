"""The drift check: what the objects say, against what was planned, against what the maps hold.

In the background it goes through everything slowly, one small step per turn of the event loop; `waggle doctor` has it
go through everything at once. What is found is named, counted and repaired by the ordinary way of writing maps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from waggle.errors import NotReady, WaggleError
from waggle.reconcile.drift import Drift, FrontendCheck, RangeCheck
from waggle.reconcile.services import Owner, named

if TYPE_CHECKING:
    from waggle.agent.agent import Agent

log = logging.getLogger(__name__)

PAUSE_SECONDS = 0.05  # between two steps in the background, at least,
PAUSE_FACTOR = 50  # and at least so many times what the step took: no more than 2 % of a core
PLAN_STEP = 64  # Services
MOST_REMEMBERED = 100


@dataclass
class Report:
    """One check. `checked`: entries by table. `failed`: why something that was found could not be repaired."""

    checked: dict[str, int] = field(default_factory=dict)
    found: list[Drift] = field(default_factory=list)
    failed: str = ""
    repaired: bool = False

    def fail(self, why: str) -> None:
        """Something that was found stays as it is."""
        self.failed = why
        log.error("drift: %s", why)

    def as_json(self) -> dict[str, Any]:
        """What `waggle doctor -o json` prints."""
        found = [
            {"table": d.table, "subject": d.subject, "entry": d.entry, "problem": d.problem, "repaired": self.repaired}
            for d in self.found
        ]
        return {"checked": self.checked, "found": found, "error": self.failed}


class Doctor:
    """Checks one agent's maps. `failed` says what a check found and could not repair; `earlier` what checks found
    before: (when, what) in Unix seconds. Several checks may run at once: each step is one turn of the event loop."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.failed = ""
        self.earlier: deque[tuple[float, Drift]] = deque(maxlen=MOST_REMEMBERED)

    async def run(self, seconds: float) -> None:
        """Checks every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.check(pause=PAUSE_SECONDS)
            except NotReady:
                continue
            except Exception as error:  # a fault of the check must not cost the node its agent
                self.failed = f"the check failed: {type(error).__name__}: {error}"
                log.exception("drift: the check failed")

    async def check(self, *, pause: float = 0.0, repair: bool = True) -> Report:
        """Goes through everything once, waiting `pause` seconds between steps. NotReady before the first sync."""
        agent = self._agent
        if not (agent.synced and agent.network.attached):
            raise NotReady("the sources have not given their first full view yet")
        report, pace = Report(), _Pace(agent, pause)
        await self._check_plan(report, pace, repair)
        await self._check_table("wag_services", FrontendCheck(agent.tables), report, pace, repair)
        await self._check_table("wag_source_ranges", RangeCheck(agent.ranges), report, pace, repair)
        await self._check_endpoints(report, repair)
        await pace.turn()
        self._check_policies(report, repair)
        report.repaired = repair and not report.failed
        if repair:
            self.failed = report.failed
        agent.metrics.last_drift_check.set_to_current_time()
        return report

    async def _check_plan(self, report: Report, pace: _Pace, repair: bool) -> None:
        """Whether what was planned is what the objects mean now: a change may have been missed."""
        agent = self._agent
        keys = iter(sorted({*agent.store.services, *agent.host_ports, *agent.tables.services()}, key=named))
        report.checked["services"] = 0
        while part := list(islice(keys, PLAN_STEP)):
            await pace.turn()
            stale = [key for key in part if self._is_stale(key)]
            report.checked["services"] += len(part)
            found = [Drift("plan", named(key), "", "is not planned as its objects are now") for key in stale]
            self._tell(report, found)
            if stale and repair:
                agent.plan_again(stale)

    def _is_stale(self, key: Owner) -> bool:
        agent = self._agent
        if key in agent.unplanned or key in agent.tables.starved:
            return False  # told by other ways
        return agent.plan(key) != agent.tables.rows(key)

    async def _check_table(
        self, name: str, check: FrontendCheck | RangeCheck, report: Report, pace: _Pace, repair: bool
    ) -> None:
        while True:
            await pace.turn()
            found = check.step()
            if found is None:
                break
            self._tell(report, found)
            if found and repair:
                try:
                    check.repair(found)
                    self._agent.flush()
                except (WaggleError, OSError) as error:
                    report.fail(f"{found[0]}: cannot be repaired: {error}")
        report.checked[name] = check.checked

    async def _check_endpoints(self, report: Report, repair: bool) -> None:
        """Few enough, those of this node's pods, to be looked at in one step."""
        datapath, pods = self._agent.datapath, self._agent.cni.pods()
        try:
            count, found = await asyncio.to_thread(datapath.check_endpoints, pods, repair=repair)
        except (WaggleError, OSError) as error:
            report.fail(f"the endpoint table cannot be checked: {error}")
            return
        report.checked["wag_endpoints, wag_netns"] = count
        self._tell(report, found)

    def _check_policies(self, report: Report, repair: bool) -> None:
        """In one step: a change would look like drift."""
        try:
            count, found = self._agent.policies.check(repair=repair)
        except (WaggleError, OSError) as error:
            report.fail(f"the tables of policy cannot be checked: {error}")
            return
        report.checked["wag_policy, wag_classes"] = count
        self._tell(report, found)

    def _tell(self, report: Report, found: list[Drift]) -> None:
        now = time.time()
        for drift in found:
            log.warning("drift: %s", drift)
            self._agent.metrics.drift.labels(drift.table).inc()
            self.earlier.append((now, drift))
        report.found += found


class _Pace:
    """When the next step of a check may be made."""

    def __init__(self, agent: Agent, pause: float) -> None:
        self._agent = agent
        self._pause = pause
        self._began = time.monotonic()

    async def turn(self) -> None:
        """Lets others work, and waits until the tables are as planned: no step may see half a change."""
        pause = max(self._pause, PAUSE_FACTOR * (time.monotonic() - self._began)) if self._pause else 0.0
        while True:
            await asyncio.sleep(pause)
            self._began = time.monotonic()
            if not self._agent.is_behind:
                return
            if self._agent.last_error:
                raise NotReady(f"the maps cannot be written: {self._agent.last_error}")
            pause = max(pause, 0.01)
