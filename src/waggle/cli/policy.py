"""waggle policy list, names: the policies that this node knows, and the names that its pods have asked for."""

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


@app.command("names")
def policy_names(
    namespace: Annotated[str | None, typer.Option("-n", "--namespace", help="Only pods of this namespace.")] = None,
    socket: Socket = DEFAULT_API_SOCKET,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Addresses that pods may reach because a DNS answer gave them for a name that their policies accept, and for how
    long new connections may begin.
    """
    rows = [r for r in client.get(socket, "/policy-names") if namespace is None or r["namespace"] == namespace]
    show(output, rows, _print_names)


def _print_names(rows: list[dict[str, Any]]) -> None:
    lines = [
        (
            f"{row['namespace']}/{row['pod']}" if row["namespace"] else row["pod"],
            row["address"],
            row["name"] + "…" * row["cut"],
            row["pattern"],
            f"{row['seconds']} s",
        )
        for row in rows
    ]
    print_table(("POD", "ADDRESS", "LAST NAME", "ACCEPTED AS", "FOR"), lines, "no names have been learned")


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
