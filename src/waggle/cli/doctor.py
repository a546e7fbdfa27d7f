"""`waggle doctor`: has the agent compare the maps with what they should hold."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from waggle.cli import client
from waggle.cli.output import (
    DEFAULT_API_SOCKET,
    EXIT_PROBLEMS,
    Output,
    OutputFormat,
    Socket,
    console,
    printable,
    show,
)

TIMEOUT_SECONDS = 600.0  # 50,000 Services, on a busy machine


def doctor(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what is wrong, and leave it so.")] = False,
    socket: Socket = DEFAULT_API_SOCKET,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Has the agent check every map now: against the plan, and the plan against the objects.

    What is wrong is named and repaired. Exit status 3 when something was wrong, repaired or not. The agent does the
    same by itself, slowly (`drift-check`); what it found before is shown too.
    """
    report = client.post(socket, f"/doctor{'?dry-run=1' if dry_run else ''}", TIMEOUT_SECONDS)
    show(output, report, _print_report)
    if report["found"] or report["error"]:
        raise typer.Exit(EXIT_PROBLEMS)


def _print_report(report: dict[str, Any]) -> None:
    out = console()
    for found in report["found"]:
        out.print(printable(f"{_sentence(found)}{'; repaired' if found['repaired'] else ''}"))
    if report["error"]:
        out.print(printable(report["error"]))
    for found in report["earlier"]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["time"]))
        out.print(printable(f"{when}: {_sentence(found)}"))
    checked = ", ".join(f"{count} of {name}" for name, count in report["checked"].items())
    out.print(printable(f"checked {checked}: {len(report['found']) or 'nothing'} wrong"))


def _sentence(found: dict[str, Any]) -> str:
    return ": ".join(found[part] for part in ("table", "subject", "entry", "problem") if found[part])
