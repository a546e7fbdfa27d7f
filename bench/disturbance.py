"""How much of the machine something else took while a run was measured: other processes, and the hypervisor.

A run that was disturbed is measured again. What counts as a disturbance is seen from outside, never from the figure
itself: leaving out runs because their result looks odd would be choosing the result. Agents belong to what is
measured, so what they take is no disturbance.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

#: Shares of all CPU time beyond which a run is measured again.
FOREIGN_LIMIT = 0.05
STOLEN_LIMIT = 0.05
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Shares of all CPU time: taken by other processes, and by the hypervisor."""

    foreign: float
    stolen: float

    @property
    def too_much(self) -> bool:
        return self.foreign > FOREIGN_LIMIT or self.stolen > STOLEN_LIMIT


@dataclass(frozen=True, slots=True)
class _Snapshot:
    total: float  # seconds of all CPUs, idle ones too
    busy: float
    stolen: float
    own: dict[int, float]


class CpuMeter:
    """`own` gives the processes that belong to the measurement, children of this one excepted."""

    def __init__(self, own: Callable[[], Iterable[int]]) -> None:
        self._own = own
        self._softirq = [
            int(path.parent.name) for path in Path("/proc").glob("[0-9]*/comm") if _read(path).startswith("ksoftirqd/")
        ]

    def snapshot(self) -> _Snapshot:
        user, nice, system, idle, wait, irq, softirq, stolen = (
            int(field) / _TICKS for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        busy = user + nice + system + irq + softirq
        own = {pid: cpu_seconds(pid) for pid in (*self._softirq, *self._own())}
        for key, who in ((0, resource.RUSAGE_SELF), (-1, resource.RUSAGE_CHILDREN)):
            usage = resource.getrusage(who)
            own[key] = usage.ru_utime + usage.ru_stime
        return _Snapshot(busy + idle + wait + stolen, busy, stolen, own)

    def since(self, before: _Snapshot) -> Disturbance:
        after = self.snapshot()
        total = after.total - before.total
        if total <= 0:
            return Disturbance(0.0, 0.0)
        # What a process had used that ended meanwhile, and was waited for, is among the children's now.
        own = sum(after.own.values()) - sum(before.own.values())
        foreign = max(0.0, after.busy - before.busy - own)
        return Disturbance(foreign / total, (after.stolen - before.stolen) / total)


def cpu_seconds(pid: int) -> float:
    """Seconds of CPU a process has used, all threads; 0 when it has ended."""
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS if len(fields) > 12 else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""
