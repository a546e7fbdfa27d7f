"""`waggle takeover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from waggle.cli import client
from waggle.cli.output import DEFAULT_API_SOCKET, BpfRoot, Output, OutputFormat, Socket, console, print_json


def takeover(
    restore: Annotated[
        bool, typer.Option("--restore", help="Put kube-proxy's rules back and take waggle's programs off the node.")
    ] = False,
    api_socket: Socket = DEFAULT_API_SOCKET,
    bpf_root: BpfRoot = Path("/sys/fs/bpf/waggle"),
    state_dir: Annotated[
        Path, typer.Option(help="The agent's directory: what is removed is kept there.", metavar="DIR", readable=False)
    ] = Path("/var/lib/waggle"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Move this node from kube-proxy to waggle without breaking a connection, or back.

    Stop kube-proxy (its rules stay at work), start the agent, run this: established flows go on with waggle, then
    kube-proxy's rules are written down and removed. With --restore, once the agent is stopped: the rules are put back,
    conntrack goes on with waggle's flows, waggle's programs leave the node; start kube-proxy then.
    """
    from waggle.reconcile import takeover as flows
    from waggle.reconcile.kube_proxy import KubeProxyRules

    rules = KubeProxyRules(state_dir)
    if restore:
        done = rules.restore(dry_run=dry_run)
        moved = 0 if dry_run else flows.give_back(bpf_root, api_socket, state_dir)
        words = "put back"
    else:
        flows.refuse_running_kube_proxy()
        moved = 0 if dry_run else client.post(api_socket, "/takeover", 60)["flows"]
        done = rules.remove(dry_run=dry_run)
        words = "removed"
    if output is OutputFormat.JSON:
        print_json({"dryRun": dry_run, "restore": restore, "flows": moved, "rules": done})
        return
    for one in done:
        console().print(f"{'would have ' if dry_run else ''}{words} {one}")
    if not done:
        console().print("no rules of kube-proxy are known" if restore else "no rules of kube-proxy are here")
    if not dry_run:
        console().print(f"{moved} flows changed hands")
