"""waggle policy list: the policies that this node knows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from waggle.cli import client
from waggle.cli.output import DEFAULT_API_SOCKET, Output, OutputFormat, Socket, print_table, show

app = typer.Typer(help="Policies: who may talk to whom.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Policies: who may talk to whom."""


@app.command("list")
def policy_list(
    namespace: Annotated[
        str | None, typer.Option("-n", "--namespace", help="Only the NetworkPolicies of this namespace.")
    ] = None,
    socket: Socket = DEFAULT_API_SOCKET,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Policies in the order in which they are asked, with how many pods of this node each is about.

    ClusterNetworkPolicies of tier Admin come first, then NetworkPolicies, then ClusterNetworkPolicies of tier Baseline.
    """
    rows = [r for r in client.get(socket, "/policies") if namespace is None or r["namespace"] == namespace]
    show(output, rows, _print_policies)


def _print_policies(rows: list[dict[str, Any]]) -> None:
    lines = [
        (
            f"{row['namespace']}/{row['name']}" if row["namespace"] else row["name"],
            row["kind"],
            f"{row['tier']} {row['priority']}" if row["tier"] else "-",
            ", ".join(row["directions"]) or "-",
            str(row["selects"]),
            "audit" if row["audit"] else "enforce",
            _origin(row),
        )
        for row in rows
    ]
    print_table(("POLICY", "KIND", "TIER", "DIRECTIONS", "PODS HERE", "MODE", "FROM"), lines, "no policies")


def _origin(row: dict[str, Any]) -> str:
    if row["file"] is None:
        return str(row["origin"])
    return f"{row['file']}:{row['line']}" if row["line"] else str(row["file"])
