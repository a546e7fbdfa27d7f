"""What a sync of kube-proxy costs at the least: the time that `iptables-restore` or `nft -f` takes for its rules.

Full: into an empty namespace, as when kube-proxy starts. Partial: on top of that, what kube-proxy writes when one
Service has changed, and when many have. Reading objects, making the text and, for iptables, reading back what is there
come on top in a cluster; waggle's figures beside these have all of that in them.

Every sync is one transaction, as kube-proxy makes it. One that takes longer than the limit is ended, and the limit is
what is reported ("more than").
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from bench.leftovers import NETNS, PREFIX, delete_netns
from bench.places import BenchError, Place, checked
from bench.rule_sets import RuleSet, load_environment
from bench.service_ports import ServicePort, filler, made_up_endpoints

#: A full sync that takes longer than so many seconds is not repeated: no spread matters at that distance.
_ONCE = 20.0


class Sizes(Protocol):
    """The settings that matter here."""

    @property
    def starts(self) -> int: ...
    @property
    def burst(self) -> int: ...
    @property
    def sync_limit(self) -> float: ...


def measure_syncs(
    peer: RuleSet, services: int, endpoints: int, sizes: Sizes, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds of every full and partial sync; None for one that was given up at the limit."""
    ports = [filler(number, made_up_endpoints(number, endpoints)) for number in range(services)]
    text = peer.full(ports)
    full: list[float | None] = []
    partial: dict[str, list[float | None]] = {"1": [], str(sizes.burst): []}
    for number in range(sizes.starts):
        progress(f"{peer.title}: full sync {number + 1} of {sizes.starts}")
        place = Place(f"{PREFIX}-sync", NETNS / f"{PREFIX}-sync", ())
        try:
            checked(["ip", "netns", "add", place.name])
            base = peer.base()
            if base:
                _load(place, peer.command, base, sizes.sync_limit)
            full.append(_load(place, peer.command, text, sizes.sync_limit))
            if full[-1] is None:
                break
            for count in (1, sizes.burst):
                changed = peer.partial(ports, _changed(ports, count, endpoints))
                partial[str(count)].append(_load(place, peer.command, changed, sizes.sync_limit))
        finally:
            delete_netns(place.name)
        if full[-1] > _ONCE:
            break
    return {"full_s": full, "partial_s": partial, "limit_s": sizes.sync_limit, "full_bytes": len(text)}


def typical(seconds: Sequence[float | None]) -> float | None:
    """The median; None when the limit was reached, or nothing was measured."""
    measured = [value for value in seconds if value is not None]
    return statistics.median(measured) if measured and len(measured) == len(seconds) else None


def _changed(ports: Sequence[ServicePort], count: int, endpoints: int) -> dict[int, ServicePort]:
    """By index: `count` Services, spread over all of them, one endpoint of each replaced by another."""
    numbers = [index * len(ports) // count for index in range(count)]
    return {number: filler(number, made_up_endpoints(number, endpoints + 1)[1:]) for number in numbers}


def _load(place: Place, command: Sequence[str], text: str, limit: float) -> float | None:
    """Seconds from the start of the process to its end, its input from a file; None when it was ended at the limit."""
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}-") as folder, (Path(folder) / "rules").open("w+") as file:
        file.write(text)
        file.seek(0)
        started = time.monotonic()
        process = subprocess.Popen(
            place.command(command),
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=load_environment(Path(folder)),
            start_new_session=True,
        )
        try:
            _, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        took = time.monotonic() - started
    if process.returncode:
        raise BenchError(f"{command[0]}: {errors.strip()[:500]}")
    return took
