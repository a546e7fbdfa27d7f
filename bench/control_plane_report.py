"""The control plane as tables: waggle's agent, and beside it what loading the rules takes that kube-proxy writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.peer_sync import typical
from bench.tables import quantile, table

_MIB = 1 << 20


def summary(scale: dict[str, Any]) -> dict[str, float]:
    """The figures of one size: seconds, milliseconds and bytes."""
    changes = scale["change_ms"]
    memory = list(scale["agent_memory"].values())
    return {
        "cold start": statistics.median(start["all"] for start in scale["cold_start_s"]),
        "restart": statistics.median(start["applied"] for start in scale["restart_s"]),
        "change p50": quantile(changes, 0.5),
        "change p90": quantile(changes, 0.9),
        "change p99": quantile(changes, 0.99),
        "burst": statistics.median(burst["applied"] for burst in scale["burst_s"]),
        "agent PSS": max(entry["pss"] for entry in memory),
        "agent RSS": max(entry["rss"] for entry in memory),
        "maps": sum(entry["bytes"] for entry in scale["maps"]),
    }


def control_plane(scale: dict[str, Any]) -> str:
    """One size."""
    title = f"### Control plane with {scale['services']:,} Services of {scale['endpoints']} endpoints"
    parts = [f"{title}\n\n{_agent(scale)}"]
    if scale["peers"]:
        parts.append(_peers(scale))
    return "\n\n".join(parts)


def _agent(scale: dict[str, Any]) -> str:
    figures = summary(scale)
    starts, changes = scale["cold_start_s"], scale["change_disturbance"]
    rows = [
        ["Cold start until every map is written", f"{figures['cold start']:.2f} s"],
        ["Restart with everything pinned, until a change made meanwhile is applied", f"{figures['restart']:.2f} s"],
        ["One EndpointSlice change until its map entry is written, p50", f"{figures['change p50']:.2f} ms"],
        ["… p90", f"{figures['change p90']:.2f} ms"],
        ["… p99", f"{figures['change p99']:.2f} ms"],
        [f"{scale['burst']:,} EndpointSlice changes at once, until the last is written", f"{figures['burst']:.3f} s"],
        ["Memory of the agent (proportional set)", f"{figures['agent PSS'] / _MIB:.0f} MiB"],
        ["Memory of the agent (resident set)", f"{figures['agent RSS'] / _MIB:.0f} MiB"],
        ["Memory of the maps", f"{figures['maps'] / _MIB:.1f} MiB"],
        ["Agent's share of one CPU while nothing changes", f"{scale['agent_idle_cpu']:.1%}"],
    ]
    maps = sorted(scale["maps"], key=lambda entry: -int(entry["bytes"]))[:6]
    largest = ", ".join(f"{entry['name']} {entry['bytes'] / _MIB:.1f} MiB" for entry in maps)
    return (
        table(["waggle", "measured"], rows)
        + f"\n\n{len(starts)} cold starts: {_listed(starts, 'all')} s, of which the agent's own CPU time "
        + f"{_listed(starts, 'cpu')} s; {len(scale['restart_s'])} restarts: {_listed(scale['restart_s'], 'applied')} "
        + f"s; {len(scale['change_ms'])} changes; {len(scale['burst_s'])} bursts: "
        + f"{_listed(scale['burst_s'], 'applied', '.3f')} s. Other processes took "
        + f"{_listed(starts, 'foreign', '.0%')} of the CPU time during the starts and {changes['foreign']:.0%} "
        + f"during the changes. Largest maps: {largest}."
    )


def _peers(scale: dict[str, Any]) -> str:
    figures, peers = summary(scale), scale["peers"]
    burst = str(scale["burst"])
    rows = [_row("Everything, from nothing", figures["cold start"], [peer["full_s"] for peer in peers.values()], peers)]
    for count, ours in (("1", figures["change p50"] / 1e3), (burst, figures["burst"])):
        times = [peer["partial_s"][count] for peer in peers.values()]
        rows.append(_row(f"{int(count):,} changed", ours, times, peers))
    return (
        "The same beside what a sync of kube-proxy takes at the least, which is the time that loading its rules takes. "
        "waggle's figures begin with the process being made, or with the event at the API server:\n\n"
        + table(["", "waggle", *peers, *(f"{peer} / waggle" for peer in peers)], rows)
    )


def _row(
    title: str, ours: float, theirs: Sequence[Sequence[float | None]], peers: dict[str, dict[str, Any]]
) -> list[str]:
    cells, ratios = [], []
    for times, peer in zip(theirs, peers.values(), strict=True):
        # a full sync that was given up leaves nothing for partial ones to change
        measured, limit = typical(times), float(peer["limit_s"])
        least, more = (limit, "> ") if measured is None else (measured, "")
        cells.append(f"{more}{_seconds(least)}" if times else "")
        ratios.append(f"{more}{least / ours:,.1f}" if times else "")
    return [title, _seconds(ours), *cells, *ratios]


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def _listed(runs: Sequence[dict[str, float]], key: str, form: str = ".2f") -> str:
    return ", ".join(format(run[key], form) for run in runs)
