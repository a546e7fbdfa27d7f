"""How commands speak: JSON for programs, tables for people, one line for errors."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from waggle.config import DEFAULT_SOCKET

EXIT_ERROR = 1
EXIT_PROBLEMS = 3  # the command worked; what it looked at is not well


class OutputFormat(enum.StrEnum):
    """What `-o` takes."""

    TABLE = "table"
    JSON = "json"


Output = Annotated[OutputFormat, typer.Option("-o", "--output", help="table for people, json for programs.")]
Socket = Annotated[
    Path,
    typer.Option("--api-socket", envvar="WAGGLE_API_SOCKET", help="Unix socket of the agent to ask.", readable=False),
]
BpfRoot = Annotated[
    Path,
    typer.Option(
        "--bpf-root", envvar="WAGGLE_BPF_ROOT", help="Directory on bpffs of the agent's pins.", readable=False
    ),
]
DEFAULT_API_SOCKET = DEFAULT_SOCKET


def print_json(value: Any) -> None:
    """One JSON document, indented for a terminal and plain for a pipe."""
    json.dump(value, sys.stdout, indent=2 if sys.stdout.isatty() else None, default=str)
    sys.stdout.write("\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], empty: str) -> None:
    """A plain table; `empty` says what it means that there are no rows. A cell that is a list has a line per item."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    count = 0
    for row in rows:
        table.add_row(*("\n".join(map(printable, cell)) if isinstance(cell, list) else printable(cell) for cell in row))
        count += 1
    console().print(table if count else empty)


def console() -> Console:
    """Standard output; a pipe gets lines as long as they are. Text is taken as it is: fd00:a::1 holds no emoji."""
    width = None if sys.stdout.isatty() else 10_000
    return Console(highlight=False, markup=False, emoji=False, width=width, soft_wrap=False)


def printable(value: object) -> str:
    """`value` on one line, without what a terminal would act on: names come from whoever may create objects."""
    return "".join(c if c.isprintable() else "?" for c in str(value))


def show(output: OutputFormat, value: Any, table: Callable[[Any], None]) -> None:
    """Prints `value` in the asked form."""
    if output is OutputFormat.JSON:
        print_json(value)
    else:
        table(value)
