"""waggle node-policy: what the node itself may reach and be reached from, and who confirms a change of it."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from waggle.cli import client
from waggle.cli.output import (
    DEFAULT_API_SOCKET,
    Output,
    OutputFormat,
    Socket,
    console,
    print_json,
    print_table,
    printable,
    show,
)

app = typer.Typer(help="NodePolicies: the traffic of the node itself.", no_args_is_help=True)
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Policies that must be on trial.")]


@app.callback()
def group() -> None:
    """NodePolicies: the traffic of the node itself."""


@app.command("list")
def node_policy_list(socket: Socket = DEFAULT_API_SOCKET, output: Output = OutputFormat.TABLE) -> None:
    """NodePolicies that are about this node, and whether they are confirmed."""
    show(output, client.get(socket, "/node-policies")["policies"], _print_policies)


def _print_policies(rows: list[dict[str, Any]]) -> None:
    lines = [
        (
            row["name"],
            row["state"],
            ", ".join(row["directions"]),
            "audit" if row["audit"] else "enforce",
            f"{row['confirmSeconds']} s" if row["confirmSeconds"] else "not needed",
            f"{row['file']}:{row['line']}" if row["line"] else str(row["file"] or row["origin"]),
        )
        for row in rows
    ]
    print_table(("NODEPOLICY", "STATE", "DIRECTIONS", "MODE", "CONFIRM", "FROM"), lines, "no NodePolicies")


@app.command("status")
def status(socket: Socket = DEFAULT_API_SOCKET, output: Output = OutputFormat.TABLE) -> None:
    """What is on trial, for how long, and what is in force afterwards."""
    found = client.get(socket, "/node-policies")
    if output is OutputFormat.JSON:
        print_json({name: value for name, value in found.items() if name != "policies"})
        return
    out, trial = console(), found["trial"]
    out.print(printable(f"confirmed: {', '.join(found['confirmed']) or 'none'}"))
    if trial is not None:
        out.print(printable(f"on trial:  {', '.join(trial['changed'])}, for {trial['secondsLeft']:.0f} s more"))
        out.print(printable(f"let in meanwhile: {', '.join(trial['letIn']) or 'nobody was logged in'}"))
    if found["notConfirmed"]:
        out.print(printable(f"tried, not confirmed: {', '.join(found['notConfirmed'])}"))


@app.command("confirm")
def confirm(
    names: Names = None,
    local: Annotated[
        bool,
        typer.Option("--local", help="On the machine's console: no SSH connection must have survived."),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also where you could not log in again from where you are.")
    ] = False,
    socket: Socket = DEFAULT_API_SOCKET,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Keep what is on trial, all of it.

    The SSH connection that this runs over must have carried something since the trial began, and the policies must let
    you log in again from there.
    """
    query = [("name", name) for name in names or ()] + [("local", "1")] * local + [("force", "1")] * force
    done = client.post(socket, f"/node-policies/confirm?{urlencode(query)}", 30)
    if output is OutputFormat.JSON:
        print_json(done)
        return
    for warning in done["warnings"]:
        console().print(printable(f"beware: {warning}"))
    console().print(printable(f"confirmed {', '.join(done['confirmed'])}"))


@app.command("revert")
def revert(names: Names = None, socket: Socket = DEFAULT_API_SOCKET, output: Output = OutputFormat.TABLE) -> None:
    """Take back what is on trial, now."""
    done = client.post(socket, f"/node-policies/revert?{urlencode([('name', name) for name in names or ()])}", 30)
    if output is OutputFormat.JSON:
        print_json(done)
        return
    console().print(printable(f"took back {', '.join(done['reverted'])}"))


@app.command("retry")
def retry(socket: Socket = DEFAULT_API_SOCKET, output: Output = OutputFormat.TABLE) -> None:
    """Try again what was tried and not confirmed."""
    done = client.post(socket, "/node-policies/retry", 30)
    if output is OutputFormat.JSON:
        print_json(done)
        return
    console().print(printable(f"on trial again: {', '.join(done['tried'])}"))
