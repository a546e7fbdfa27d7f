"""Commands that look: status, service list, endpoint list, flows, map dump."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

import typer

from waggle.cli import client
from waggle.cli.output import (
    DEFAULT_API_SOCKET,
    EXIT_PROBLEMS,
    BpfRoot,
    Output,
    OutputFormat,
    Socket,
    console,
    print_json,
    print_table,
    printable,
    show,
)
from waggle.errors import NotFound

service_app = typer.Typer(help="Services as this node serves them.", no_args_is_help=True)
endpoint_app = typer.Typer(help="Pods attached on this node.", no_args_is_help=True)
map_app = typer.Typer(help="The pinned maps of the data path.", no_args_is_help=True)

DEFAULT_BPF_ROOT = Path("/sys/fs/bpf/waggle")


def status(socket: Socket = DEFAULT_API_SOCKET, output: Output = OutputFormat.TABLE) -> None:
    """The node at a glance. Exit status 3 when something has a problem."""
    facts = client.get(socket, "/status")
    show(output, facts, _print_status)
    if facts["problems"]:
        raise typer.Exit(EXIT_PROBLEMS)


def _print_status(facts: dict[str, Any]) -> None:
    out = console()
    counts = facts["counts"]
    addresses = [a for a in facts["addresses"].values() if a]
    sources = [f"{name} ({_source_state(s)})" for name, s in facts["sources"].items()]
    behind = [
        f"{name} ({len(nodes)} {'node' if len(nodes) == 1 else 'nodes'})" for name, nodes in facts["tunnels"].items()
    ]
    lines = {
        "Node": facts["node"],
        "Up": _duration(time.time() - facts["started"]),
        "State": "in sync" if facts["synced"] else "waiting for its sources",
        "Sources": ", ".join(sources) or "none",
        "Addresses": ", ".join(addresses) or "none",
        "Uplinks": ", ".join(facts["devices"]) or "none",
        "Tunnels": ", ".join(behind) or "none",
        "Pod ranges": ", ".join(facts["podRanges"]) or "none",
        "DNS": ", ".join(facts["dns"]) or "none",
        "Services": f"{counts['services']} ({counts['frontends']} frontends, {counts['backends']} backend records)",
        "Policies": str(counts["policies"]),
        "Pods": str(counts["pods"]),
        "Nodes": str(counts["nodes"]),
        "Maps": f"{facts['mapMemoryBytes'] / 2**20:.1f} MiB in {facts['bpfRoot']}",
        "cgroup": facts["cgroupRoot"],
    }
    for name, value in lines.items():
        out.print(printable(f"{name + ':':<12}{value}"))
    for problem in facts["problems"]:
        where = f"{problem['file']}:{problem['line']}: " if problem["file"] and problem["line"] else ""
        out.print(printable(f"{'Problem:':<12}{where}{problem['subject']}: {problem['reason']}"))


def _source_state(source: dict[str, Any]) -> str:
    if not source["synced"]:
        return "waiting"
    return "in sync" if source["policiesSynced"] else "policies not known yet"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (rest, "s")]
    shown = [f"{n}{unit}" for n, unit in parts if n]
    return " ".join(shown[:2]) or "0s"


@service_app.command("list")
def service_list(
    namespace: Annotated[str | None, typer.Option("-n", "--namespace", help="Only this namespace.")] = None,
    socket: Socket = DEFAULT_API_SOCKET,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Services with their frontends and the backends that traffic may go to now."""
    rows = [r for r in client.get(socket, "/services") if namespace is None or r["namespace"] == namespace]
    show(output, rows, _print_services)


def _print_services(rows: list[dict[str, Any]]) -> None:
    lines: list[tuple[str | list[str], ...]] = []
    for row in rows:
        name = f"{row['namespace']}/{row['name']}"
        if not row["ports"]:
            lines.append((name, row["type"], "-", "-", row["problem"] or "not served"))
        for port in row["ports"]:
            shown = [_host_port(b) + (f" ({b['name']})" if b["name"] else "") for b in port["backends"][:10]]
            more = len(port["backends"]) - len(shown)
            if more > 0:
                shown.append(f"and {more} more")
            lines.append(
                (
                    name,
                    row["type"],
                    port["protocol"],
                    [f["text"] for f in port["frontends"]],
                    shown or f"none usable of {port['endpoints']}",
                )
            )
            name = ""
        if row["healthCheck"]:
            counts = row["healthCheck"]["localEndpoints"].items()
            ready = ", ".join(f"{count} ready here ({family})" for family, count in counts)
            lines.append(("", "", "health", f"*:{row['healthCheck']['port']}", ready))
        if row["ports"] and row["problem"]:
            lines.append(("", "", "", "", f"problem: {row['problem']}"))
    print_table(("SERVICE", "TYPE", "PROTOCOL", "FRONTENDS", "BACKENDS"), lines, "no Services")


def _host_port(backend: dict[str, Any]) -> str:
    address, port = backend["address"], backend["port"]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@endpoint_app.command("list")
def endpoint_list(socket: Socket = DEFAULT_API_SOCKET, output: Output = OutputFormat.TABLE) -> None:
    """Pods that the CNI plugin attached on this node."""
    rows = client.get(socket, "/endpoints")
    show(output, rows, _print_endpoints)


def _print_endpoints(rows: list[dict[str, Any]]) -> None:
    lines = [
        (
            f"{r['namespace'] or 'default'}/{r['name']}" if r["name"] else r["containerID"][:12],
            r["addresses"],
            r["interface"],
            r["mac"],
        )
        for r in rows
    ]
    print_table(("POD", "ADDRESSES", "INTERFACE", "MAC"), lines, "no pods on this node")


_ENDS = "a pod, NAMESPACE/, a Service, an address, a network, or node:NAME. Names may hold *."


def flows(
    source: Annotated[list[str] | None, typer.Option("--from", metavar="END", help=f"Source: {_ENDS}")] = None,
    target: Annotated[list[str] | None, typer.Option("--to", metavar="END", help=f"Destination: {_ENDS}")] = None,
    service: Annotated[
        list[str] | None,
        typer.Option("--service", metavar="NAME", help="The Service that was asked: [NAMESPACE/]NAME."),
    ] = None,
    verdict: Annotated[
        list[str] | None,
        typer.Option(
            "--verdict",
            help="forwarded, dropped, rejected (dropped, and the sender told), audit, or drop for all drops.",
        ),
    ] = None,
    port: Annotated[
        list[str] | None, typer.Option("--port", help="Port of destination or backend, or a range such as 8000-8080.")
    ] = None,
    proto: Annotated[list[str] | None, typer.Option("--proto", help="tcp, udp, sctp, icmp, or a number.")] = None,
    reason: Annotated[
        list[str] | None,
        typer.Option("--reason", help="Why it was dropped, as docs/reference/drop-reasons.md names it."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="Events of the last 30s, 5m, 1h30m, if they are remembered."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option("--last", help="At most so many, the latest. Default without --since and --follow: 20."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with events as they happen.")] = False,
    limit: Annotated[int, typer.Option("--limit", help="End after so many events; 0: never.")] = 0,
    socket: Socket = DEFAULT_API_SOCKET,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Flows that began and drops, the latest ones or as they happen.

    Flows between the same ends are counted together: there is a line when one is new and then at most once a second,
    with the count so far. An option that is given several times takes any of its values; different options must all
    hold. Names without a namespace are of default.
    """
    if limit < 0:
        raise typer.BadParameter("must not be negative", param_hint="--limit")
    if last is not None and last < 0:
        raise typer.BadParameter("must not be negative", param_hint="--last")
    asked = {
        "from": source,
        "to": target,
        "service": service,
        "verdict": verdict,
        "port": port,
        "proto": proto,
        "reason": reason,
    }
    query = [(name, value) for name, values in asked.items() for value in values or ()]
    if since is not None:
        query.append(("since", str(_seconds(since))))
    elif last is None and not follow:
        last = 20
    if last is not None:
        query.append(("last", str(last)))
    if follow:
        query.append(("follow", "1"))
    _check_questions(asked)
    for number, event in enumerate(client.stream(socket, f"/events?{urlencode(query)}"), 1):
        if output is OutputFormat.JSON:
            print_json_line(event)
        else:
            typer.echo(printable(event_line(event)))
        if number == limit:
            return


def _check_questions(asked: dict[str, list[str] | None]) -> None:
    """As the agent will, before it is asked: what is wrong is an option, with the exit status for that."""
    from waggle.observe.flow_filter import parse_filter

    for question, answers in asked.items():
        try:
            parse_filter({question: answers or []})
        except ValueError as error:
            raise typer.BadParameter(str(error).removeprefix(f"{question}: "), param_hint=f"--{question}") from error


def _seconds(text: str) -> float:
    from waggle.observe.flow_filter import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--since") from error


def print_json_line(event: dict[str, Any]) -> None:
    """One compact JSON document on one line."""
    import json

    typer.echo(json.dumps(event, separators=(",", ":")))


def event_line(event: dict[str, Any]) -> str:
    """An event on one line."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"])) + f".{int(event['time'] % 1 * 1000):03d}"
    source = _end(event["source"])
    target = _end(event["destination"])
    service = f" (Service {event['service']})" if event.get("service") else ""
    text = f"{event['verdict'].upper():<9} {event['protocol']} {source} → {target}{service}"
    text += f" → {_end(event['backend'])}" if event.get("backend") else ""
    if event["kind"] == "flow":
        text += f" ×{event['count']}"
    else:
        text += f": {_why(event)} [{event['reason']}]"
    notes = []
    if event.get("suppressed"):
        notes.append(f"{event['suppressed']} more before it were left out")
    if event.get("lost"):
        notes.append(f"{event['lost']} events lost: this reader was too slow")
    shown = f" #{event['id']}" if event["kind"] != "flow" and event.get("id") else ""
    more = f"  ({'; '.join(notes)})" if notes else ""
    return f"{clock} {text} at {event['hook']}{shown}{more}"


def _why(event: dict[str, Any]) -> str:
    """What decided, in words."""
    if event["kind"] != "policy":
        return str(event["explanation"])
    rule, policies = event["rule"], event["policies"]
    if rule:
        where = f" ({rule['file']}:{rule['line']})" if rule.get("file") else ""
        return f"{rule['direction']} rule {rule['index']} of {rule['object']}{where}"
    of = f" by {', '.join(policies)}" if policies else ""
    return f"no {event['direction']} rule allows it: isolated{of}"


def _end(end: dict[str, Any]) -> str:
    if not end["address"]:
        return end["name"] or "a socket"
    text = end["text"] if end["port"] else end["address"]
    return f"{end['name']} {text}" if end["name"] else text


@map_app.command("list")
def map_list(bpf_root: BpfRoot = DEFAULT_BPF_ROOT, output: Output = OutputFormat.TABLE) -> None:
    """The maps, their sizes and their memory. Works without an agent."""
    from waggle.observe.dump import list_maps

    rows = list_maps(bpf_root)
    show(
        output,
        rows,
        lambda rows: print_table(
            ("MAP", "TYPE", "SIZE", "MEMORY"),
            [(r["name"], r["type"], r["maxEntries"], f"{r['memoryBytes'] / 1024:.0f} KiB") for r in rows],
            "no maps",
        ),
    )


@map_app.command("dump")
def map_dump(
    name: Annotated[str, typer.Argument(help="Name as `map list` shows it; the prefix wag_ may be left out.")],
    bpf_root: BpfRoot = DEFAULT_BPF_ROOT,
    output: Output = OutputFormat.TABLE,
) -> None:
    """All entries of a map, decoded. Works without an agent."""
    from waggle.observe.dump import dump_map, list_maps

    try:
        rows = dump_map(bpf_root, name)
    except NotFound as error:
        known = ", ".join(r["name"] for r in list_maps(bpf_root)) or f"none under {bpf_root}: has an agent run here?"
        raise NotFound(f"no map {name}: there is {known}") from error
    if output is OutputFormat.JSON:
        print_json(rows)
        return
    columns = list(rows[0]) if rows else []
    print_table([c.upper() for c in columns], [list(r.values()) for r in rows], "no entries")
