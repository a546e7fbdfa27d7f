"""`waggle install` and `waggle uninstall`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from waggle.cli.output import Output, OutputFormat, console, print_json
from waggle.config import parse_settings

Root = Annotated[
    Path, typer.Option(help="Root directory of the machine: another one's while its image is made.", metavar="DIR")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")]


def install(
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A setting for /etc/waggle/agent.yaml, such as pod-cidr=10.244.1.0/24. Repeat.",
            metavar="SETTING=VALUE",
        ),
    ] = None,
    root: Root = Path("/"),
    executable: Annotated[
        Path | None, typer.Option(help="The waggle command that the service runs. Default: this one.", metavar="PATH")
    ] = None,
    start: Annotated[bool, typer.Option(help="Start the service, or restart it.")] = True,
    dry_run: DryRun = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Make waggle a service of this machine, which needs no Kubernetes.

    A systemd unit that may do no more than it has to, /etc/waggle/agent.yaml with every setting, /etc/waggle/manifests
    for Kubernetes YAML, and files that keep NetworkManager and systemd-networkd away from pods' interfaces. Run it
    again after an upgrade. A file that you changed stays as it is.
    """
    from waggle.install.installation import Installation

    installation = Installation(root.absolute(), dry_run=dry_run)
    program = executable.absolute() if executable is not None else Path(sys.executable).with_name("waggle")
    done = installation.install(program, parse_settings(settings or []), start=start)
    _show(done, dry_run, output)
    if output is OutputFormat.TABLE and installation.here and not installation.systemd:
        console().print(f"systemd does not run here; to start: {program} agent --config /etc/waggle/agent.yaml")


def uninstall(
    root: Root = Path("/"),
    purge: Annotated[bool, typer.Option("--purge", help="Remove changed files and all manifests as well.")] = False,
    dry_run: DryRun = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Stop the service, clean the node as `waggle cleanup` does, and remove what `waggle install` wrote."""
    from waggle.install.installation import Installation

    _show(Installation(root.absolute(), dry_run=dry_run).uninstall(purge=purge), dry_run, output)


def _show(done: list[tuple[str, str]], dry_run: bool, output: OutputFormat) -> None:
    if output is OutputFormat.JSON:
        print_json({"dryRun": dry_run, "done": [{"what": what, "name": name} for what, name in done]})
        return
    for what, name in done:
        console().print(f"{'would ' if dry_run else ''}{what} {name}")
    if not done:
        console().print("nothing to do")
