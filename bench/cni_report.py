"""What a pod's network costs its runtime, as a table."""

from __future__ import annotations

import statistics
from typing import Any

from bench.tables import in_order, quantile, table


def cni(rows: list[dict[str, Any]]) -> str:
    """Over all rounds; the last column is the ratio of the two ways."""
    networks = in_order(row["network"] for row in rows)
    found = {name: [row for row in rows if row["network"] == name] for name in networks}
    pods = rows[0]["pods"]
    lines = []
    for what, title in (("add", "ADD"), ("del", "DEL")):
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            lines.append((f"{title}, one at a time, {name}", _quantiles(found, f"{what}_ms", share), "ms"))
        for share, name in ((0.5, "p50"), (0.99, "p99")):
            lines.append((f"{title}, {pods} at once, {name}", _quantiles(found, f"{what}_at_once_ms", share), "ms"))
        lines.append(
            (f"{title}, {pods} at once, all", [_median(found[name], f"{what}_all_s") for name in networks], "s")
        )
    ratio = [f"{networks[1]} / {networks[0]}"] if len(networks) > 1 else []
    cells = [
        [title, *(f"{value:.1f} {unit}" for value in values), *(f"{values[1] / values[0]:.1f}" for _ in ratio)]
        for title, values, unit in lines
    ]
    head = f"### Pods by CNI\n\nWhat a runtime waits for; {len(found[networks[0]])} alternated rounds.\n\n"
    return head + table(["", *networks, *ratio], cells)


def _quantiles(found: dict[str, list[dict[str, Any]]], key: str, share: float) -> list[float]:
    return [quantile((value for row in rows for value in row[key]), share) for rows in found.values()]


def _median(rows: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(row[key] for row in rows))
