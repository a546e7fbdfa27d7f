"""`waggle lab`: a cluster of nodes on one machine, from the command line.

What a command says while it works goes to standard error; what it answers goes to standard output, so that
`-o json` can be piped.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from waggle.cli.output import EXIT_PROBLEMS, Output, OutputFormat, print_json, print_table, show
from waggle.config import parse_settings
from waggle.lab.layout import DEFAULT_LAB, DEFAULT_NODES

# What does the work is imported by the commands that need it, so that all others start without.
if TYPE_CHECKING:
    from waggle.lab.applying import Applied
    from waggle.lab.lock import Say

app = typer.Typer(
    help="A cluster of nodes on this machine: network namespaces, each with a real agent of its own.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


NameOption = Annotated[str, typer.Option("--name", "-n", metavar="LAB", help="Which lab: 1-20 of a-z and 0-9.")]
FilesOption = Annotated[
    list[Path],
    typer.Option("--filename", "-f", metavar="FILE", help="Manifest, directory of manifests, or - for standard input."),
]
GraceOption = Annotated[
    float, typer.Option("--grace", metavar="SECONDS", min=0, help="How long a pod may take to end before it is killed.")
]


def _progress() -> Say:
    """Prints each line with the time since now, for people who wonder what takes so long."""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f}s] {line}", file=sys.stderr, flush=True)

    return say


@app.command()
def up(
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            metavar="N",
            help=f"How many nodes. Default: as many as there are, else {DEFAULT_NODES}.",
        ),
    ] = None,
    name: NameOption = DEFAULT_LAB,
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Let the agents watch this Kubernetes API as well, reached from this machine."
        ),
    ] = None,
    segments: Annotated[
        int | None,
        typer.Option(
            "--segments",
            metavar="N",
            help="How many networks the nodes are on, in turns, with a router in between that lets no pod's packets "
            "through. Default: one.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SETTING=VALUE",
            help="A setting of every agent, such as forwarding=dsr (docs/reference/configuration.md). Repeat for more.",
        ),
    ] = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Start a lab, or bring back what died of it.

    Running it again is always right: agents, namespaces and containers that are gone come back, the rest stays
    untouched, and `--nodes` with a larger number adds nodes.
    """
    from waggle.lab import lifecycle, status

    problems = lifecycle.up(
        name,
        _progress(),
        nodes=nodes,
        kubeconfig=kubeconfig,
        settings=parse_settings(settings or []),
        segments=segments,
    )
    lab, record = lifecycle.find_lab(name)
    if output is OutputFormat.JSON:
        print_json(status.lab_status(lab, record))
    if problems:
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
def down(name: NameOption = DEFAULT_LAB, output: Output = OutputFormat.TABLE) -> None:
    """Remove everything of a lab, also what a crash left behind."""
    from waggle.lab import lifecycle

    removed = lifecycle.down(name, _progress())
    show(output, {"name": name, "removed": removed}, lambda _: None)


@app.command()
def apply(
    filename: FilesOption,
    name: NameOption = DEFAULT_LAB,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait until all pods are ready.")
    ] = 30.0,
    grace: GraceOption = 2.0,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Apply Kubernetes manifests: Services, EndpointSlices, Pods, Namespaces, and policies.

    The command of a Pod's container runs on this machine's own file system, inside the pod's namespaces. Pods go to
    the node they name (spec.nodeName) or to the one with the fewest. Services without clusterIP or nodePort get one.
    Nothing is applied when any object is refused.
    """
    from waggle.lab import applying

    done = applying.apply(name, filename, _progress(), timeout=timeout, grace=grace)
    show(output, [_applied(item) for item in done], lambda _: None)
    if any(item.problem for item in done):
        raise typer.Exit(EXIT_PROBLEMS)


@app.command()
def delete(
    filename: FilesOption,
    name: NameOption = DEFAULT_LAB,
    grace: GraceOption = 2.0,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Delete the objects of manifests from a lab. What is not there is no error."""
    from waggle.lab import applying

    done = applying.delete(name, filename, _progress(), grace=grace)
    show(output, [_applied(item) for item in done], lambda _: None)


def _applied(item: Applied) -> dict[str, str]:
    return {
        "kind": item.kind,
        "namespace": item.key.namespace,
        "name": item.key.name,
        "action": item.action,
        "problem": item.problem,
    }


@app.command(name="status")
def show_status(name: NameOption = DEFAULT_LAB, output: Output = OutputFormat.TABLE) -> None:
    """Show nodes and their agents, pods and Services. Exit status 3 when something is not well."""
    from waggle.lab import lifecycle, status

    lab, record = lifecycle.find_lab(name)
    document = status.lab_status(lab, record)
    show(output, document, _status_tables)
    if not status.is_healthy(document):
        raise typer.Exit(EXIT_PROBLEMS)


def _status_tables(document: dict[str, Any]) -> None:
    nodes: list[tuple[str | list[str], ...]] = []
    for node in document["nodes"]:
        agent = node["agent"]["state"] if node["present"] else "no network namespace"
        pid = str(node["agent"]["pid"] or "-")
        nodes.append((node["name"], node["addresses"], node["podCIDRs"], agent, pid))
    client = document["client"]
    place = "outside the cluster" if client["present"] else "no network namespace"
    nodes.append(("client", client["addresses"], "-", place, "-"))
    print_table(("NODE", "ADDRESSES", "POD RANGES", "AGENT", "PID"), nodes, "")
    print()
    pods = [
        (
            _shown(pod),
            pod["node"],
            pod["addresses"],
            pod["phase"],
            "yes" if pod["ready"] else "no",
            pod["reason"],
        )
        for pod in document["pods"]
    ]
    print_table(
        ("POD", "NODE", "ADDRESSES", "PHASE", "READY", "REASON"), pods, "No pods. Try: waggle lab apply -f FILE"
    )
    if document["services"]:
        print()
        services = [
            (
                _shown(service),
                service["type"],
                service["clusterIPs"],
                ", ".join(_port(port) for port in service["ports"]),
            )
            for service in document["services"]
        ]
        print_table(("SERVICE", "TYPE", "CLUSTER ADDRESSES", "PORTS"), services, "")


def _shown(item: dict[str, Any]) -> str:
    from waggle.lab.entering import shown_name
    from waggle.model.objects import ObjectKey

    return shown_name(ObjectKey(item["namespace"], item["name"]))


def _port(port: dict[str, Any]) -> str:
    node_port = f" (node {port['nodePort']})" if port["nodePort"] else ""
    return f"{port['port']}/{port['protocol']}{node_port}"


@app.command(
    name="exec",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help"]},
)
def execute(
    target: Annotated[str, typer.Argument(metavar="NODE|POD|client", help="Where: node1, web-1, other/web-1, client.")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="What to run.")],
    name: NameOption = DEFAULT_LAB,
    _terminal: Annotated[
        bool, typer.Option("-i", "-t", hidden=True, help="Taken for habit's sake: the terminal is always passed on.")
    ] = False,
) -> None:
    """Run a command on a node, in a pod, or on the machine outside the cluster.

    It runs inside the network namespace, host name and cgroup of that place, so that Services work as they do for a
    pod's own processes. Files are those of this machine. Terminal, standard input and exit status are the command's.
    """
    from waggle.lab import entering, lifecycle

    lab, record = lifecycle.find_lab(name)
    entering.become(lab, record, target, command)


@app.command()
def logs(
    pod: Annotated[str, typer.Argument(metavar="POD|NODE", help="web-1, other/web-1; for a node, its agent's log.")],
    container: Annotated[
        str | None, typer.Option("--container", "-c", help="Which container. Default: the first.")
    ] = None,
    name: NameOption = DEFAULT_LAB,
) -> None:
    """Print what a pod's container, or a node's agent, has written."""
    from waggle.lab import entering, lifecycle

    lab, record = lifecycle.find_lab(name)
    sys.stdout.write(entering.log_of(lab, record, pod, container))


@app.command(name="list")
def list_labs(output: Output = OutputFormat.TABLE) -> None:
    """List the labs of this machine."""
    from waggle.lab import lifecycle

    names = lifecycle.lab_names()
    show(output, names, lambda _: print("\n".join(names)) if names else None)


@app.command()
def demo(
    examples: Annotated[Path, typer.Option(metavar="DIR", help="Manifests to apply.")] = Path("examples"),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab up afterwards.")] = False,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="How many nodes.")] = 3,
    requests: Annotated[int, typer.Option("--requests", metavar="N", min=1, help="Requests per path.")] = 60,
    name: NameOption = "demo",
    output: Output = OutputFormat.TABLE,
) -> None:
    """Start a lab, send real traffic through its Services, and say what happened.

    Exit status 1 when any request failed, or when Netfilter was involved.
    """
    from rich.console import Console

    from waggle.lab import demo as demonstration

    report = demonstration.run(name, examples, _progress(), nodes=nodes, requests=requests, keep=keep)
    show(output, report.document(), lambda _: report.show(Console()))
    if not report.passed:
        raise typer.Exit(1)
