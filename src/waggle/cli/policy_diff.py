"""`waggle policy diff` and `waggle policy check`: policies as files, before anybody depends on them."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from waggle.cli.output import Output, OutputFormat, console, print_json, printable
from waggle.errors import ConfigError, WaggleError
from waggle.model.meta import ObjectKey
from waggle.model.node_policy import changed_names, plain
from waggle.model.policy import PolicyWorld, decide, pod_addresses
from waggle.model.policy_diff import OTHER, Change, EndKind, Ends, Interval, differences, reason, state, unjudged
from waggle.model.policy_lint import Finding, lint
from waggle.model.policy_objects import NodePolicy
from waggle.model.service import family_of
from waggle.sources.policy_files import DEFAULT_POD_CIDR, PolicyFiles, read_policy_files

EXIT_DIFFERS = 1
EXIT_UNUSABLE = 2
MOST_SHOWN = 12

WithPods = Annotated[
    list[Path] | None,
    typer.Option("--with", help="More files for both sides: pods, namespaces, nodes. May be repeated."),
]

PodCidr = Annotated[str, typer.Option("--pod-cidr", help="Where pods are that have no address yet.")]


def diff(
    old: Annotated[Path, typer.Argument(help="File or directory of manifests; - is standard input.")],
    new: Annotated[Path, typer.Argument(help="The same, as it shall become.")],
    more: WithPods = None,
    flows: Annotated[
        Path | None, typer.Option("--flows", help="Recorded flows, one JSON document a line: which would change?")
    ] = None,
    pod_cidr: PodCidr = DEFAULT_POD_CIDR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Which flows pass under NEW and not under OLD, and the reverse: all of them, as sets of ends and ports.

    Pods are those of the files, and the pod templates of workloads. For those of a cluster:
    `kubectl get pods,namespaces,nodes -A -o yaml`, given with --with. Of NodePolicies, only which ones differ is said.

    Exit status: 0 nothing changes; 1 something does; 2 it cannot be told.
    """
    with _unusable_is_2():
        before, after = _read_both(old, new, more or [], pod_cidr)
        worlds = before.world(), after.world()
        own = _changed_node_policies(before, after)
        if not own and not worlds[0].pod_by_address and not worlds[1].pod_by_address:
            raise ConfigError("there are no pods to ask about: give files with pods or workloads by --with")
        changes = differences(*worlds)
        skipped = unjudged(*worlds)
        recorded = list(_changed_flows(flows, *worlds)) if flows is not None else None
    if output is OutputFormat.JSON:
        print_json(
            {
                "changes": [_change_json(change) for change in changes],
                "flows": [flow.as_json() for flow in recorded] if recorded is not None else None,
                "notCompared": skipped,
                "nodePolicies": own,
            }
        )
    else:
        _print_changes(changes, worlds[1], skipped)
        if own:
            text = f"NodePolicies that differ: {_some(own)}; each node tries them first, and `waggle why` explains them"
            console().print(printable(text))
        if recorded is not None:
            _print_flows(recorded)
    if changes or own:
        raise typer.Exit(EXIT_DIFFERS)


def check(
    files: Annotated[list[Path], typer.Argument(help="Files or directories of manifests; - is standard input.")],
    more: WithPods = None,
    pod_cidr: PodCidr = DEFAULT_POD_CIDR,
    output: Output = OutputFormat.TABLE,
) -> None:
    """What is surely not meant in policies: rules that do nothing, pods without DNS, one address family left out.

    Exit status: 0 nothing is found; 1 something is; 2 a file cannot be read, or an object is refused.
    """
    with _unusable_is_2():
        read = read_policy_files([*files, *(more or [])], pod_cidr)
    found = lint(read.world())
    rows = [_finding_json(read, finding) for finding in found]
    errors = [{"file": e.file, "line": e.line, "object": e.subject, "reason": e.reason} for e in read.errors]
    if output is OutputFormat.JSON:
        print_json({"findings": rows, "errors": errors})
    else:
        out = console()
        for error in read.errors:
            out.print(printable(f"error: {error}"))
        for row in rows:
            where = f"{row['file']}:{row['line']}: " if row["file"] else ""
            out.print(printable(f"{where}{row['object']}: {row['path']}: {row['reason']} [{row['code']}]"))
        world = read.world()
        count = len(world.policies) + len(world.cluster_policies)
        pods = len({pod.key for pod in world.pod_by_address.values()}) or "no"
        out.print(printable(f"{count} policies, {pods} pods: {len(found) or 'nothing'} found"))
    if errors:
        raise typer.Exit(EXIT_UNUSABLE)
    if found:
        raise typer.Exit(EXIT_DIFFERS)


class _unusable_is_2:
    """1 is an answer of these commands: what keeps them from answering is 2."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, WaggleError):
            typer.echo(f"waggle: {printable(error)}", err=True)
            raise typer.Exit(EXIT_UNUSABLE) from error


def _read_both(old: Path, new: Path, more: Sequence[Path], pod_cidr: str) -> tuple[PolicyFiles, PolicyFiles]:
    addresses: dict[ObjectKey, str] = {}
    before = read_policy_files([old, *more], pod_cidr, addresses)
    after = read_policy_files([new, *more], pod_cidr, addresses)
    errors = [*before.errors, *(error for error in after.errors if str(error) not in map(str, before.errors))]
    if errors:
        raise ConfigError("; ".join(str(error) for error in errors[:10]))
    return before, after


def _changed_node_policies(before: PolicyFiles, after: PolicyFiles) -> list[str]:
    old, new = ({key.name: plain(one) for key, one in files.of(NodePolicy).items()} for files in (before, after))
    return list(changed_names(old, new))


# -- changes --------------------------------------------------------------------------------------------------------


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "families": [family.value for family in change.families],
        "sources": [{"kind": end.kind.value, "names": list(end.names)} for end in change.sources],
        "destinations": [{"kind": end.kind.value, "names": list(end.names)} for end in change.destinations],
        "ports": [
            {
                "protocol": i.protocol,
                "first": i.first,
                "last": i.last,
                "before": i.before.value,
                "after": i.after.value,
                "reasonBefore": i.reason_before,
                "reasonAfter": i.reason_after,
            }
            for i in change.intervals
        ],
    }


def _print_changes(changes: Sequence[Change], world: PolicyWorld, skipped: Sequence[str]) -> None:
    out = console()
    for change in changes:
        only = f" ({change.families[0].value} only)" if len(change.families) == 1 else ""
        sources, targets = (_ends_text(ends, world) for ends in (change.sources, change.destinations))
        out.print(printable(f"{sources} → {targets}{only}"))
        for (before, after), group in _by_change(change.intervals).items():
            sign = {"deny": "-", "allow": "+"}.get(after, "~")
            ports = ", ".join(map(_interval_text, group))
            out.print(printable(f"  {sign} {before} → {after}: {ports}"))
            for word, reasons in (
                ("before", [i.reason_before for i in group]),
                ("after", [i.reason_after for i in group]),
            ):
                out.print(printable(f"      {word}: {'; '.join(dict.fromkeys(reasons))}"))
    if skipped:
        out.print(printable(f"not compared, another pod has the address on one side: {_some(skipped)}"))
    out.print(
        "nothing changes" if not changes else f"{len(changes)} {'set' if len(changes) == 1 else 'sets'} of flows change"
    )


def _by_change(intervals: Iterable[Interval]) -> dict[tuple[str, str], list[Interval]]:
    found: dict[tuple[str, str], list[Interval]] = {}
    for interval in intervals:
        found.setdefault((interval.before.value, interval.after.value), []).append(interval)
    return found


def _interval_text(interval: Interval) -> str:
    if interval.protocol == OTHER:
        return "ICMP and all else"
    if (interval.first, interval.last) == (1, 65535):
        return f"all {interval.protocol}"
    ports = str(interval.first) if interval.first == interval.last else f"{interval.first}-{interval.last}"
    return f"{interval.protocol} {ports}"


def _ends_text(ends: Sequence[Ends], world: PolicyWorld) -> str:
    return ", ".join(_end_text(end, world) for end in ends)


def _end_text(end: Ends, world: PolicyWorld) -> str:
    match end.kind:
        case EndKind.POD:
            return _some(_pod_names(end.names, world))
        case EndKind.NODE:
            nodes = [key.name for key in world.nodes]
            return "every node" if len(end.names) == len(nodes) > 1 else f"nodes {_some(end.names)}"
        case EndKind.OWN_NODE:
            return "its own node"
        case EndKind.NETWORK:
            return _some(_short_blocks(end.names)) + " outside"
        case EndKind.NAME:
            return f"addresses named {_some(end.names)}"


def _pod_names(names: Sequence[str], world: PolicyWorld) -> list[str]:
    """Whole namespaces as x/*, and everything as "every pod"."""
    everywhere: dict[str, set[str]] = {}
    for pod in world.pod_by_address.values():
        everywhere.setdefault(pod.metadata.namespace, set()).add(str(pod.key))
    mine: dict[str, list[str]] = {}
    for name in names:
        mine.setdefault(name.partition("/")[0], []).append(name)
    whole = [namespace for namespace, found in mine.items() if everywhere.get(namespace, set()) <= set(found)]
    if len(whole) == len(everywhere) > 1:
        return ["every pod"]
    shown = []
    for namespace, found in mine.items():
        shown += [f"{namespace}/*"] if namespace in whole and len(found) > 1 else found
    return shown


def _short_blocks(names: Sequence[str]) -> list[str]:
    """Blocks, or all but some where those are fewer."""
    found: list[str] = []
    for version, everything in ((4, "0.0.0.0/0"), (6, "::/0")):
        mine = [block for block in map(ipaddress.ip_network, names) if block.version == version]
        rest = [ipaddress.ip_network(everything)]
        for block in mine:
            rest = [part for one in rest for part in _without(one, block)]
        if mine and len(rest) + 1 < len(mine):
            found.append(f"{everything} except {', '.join(map(str, ipaddress.collapse_addresses(rest)))}")  # type: ignore[type-var]
        else:
            found += map(str, mine)
    return found


def _without(one: Any, block: Any) -> list[Any]:
    if block.supernet_of(one):
        return []
    return list(one.address_exclude(block)) if one.supernet_of(block) else [one]


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


# -- recorded flows -------------------------------------------------------------------------------------------------


class _Recorded(NamedTuple):
    """A recorded flow that would change, or of which nothing can be said. `seen`: its verdict then, "" for none."""

    line: int
    text: str
    before: str
    after: str
    reason_before: str
    reason_after: str
    seen: str

    def as_json(self) -> dict[str, Any]:
        return {
            "line": self.line,
            "flow": self.text,
            "before": self.before,
            "after": self.after,
            "reasonBefore": self.reason_before,
            "reasonAfter": self.reason_after,
            "verdict": self.seen,
        }


def _changed_flows(path: Path, old: PolicyWorld, new: PolicyWorld) -> Iterator[_Recorded]:
    """Those that would change. ConfigError names a line that is no flow."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            source, target, protocol, port, seen = _flow(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason_ = "src, dst, proto and dport are expected, or an event of `waggle flows -o json`"
            raise ConfigError(f"{path}:{number}: this is no flow: {error}; {reason_}") from error
        text = f"{protocol} {source} → {target}" + (f":{port}" if port else "")
        ends = [_addresses_of(end, old, new) for end in (source, target)]
        family = next((f for f in ends[0] if f in ends[1]), None)
        if family is None:
            yield _Recorded(number, text, "unknown", "unknown", "", "an end is not known here", seen)
            continue
        (was_from, now_from), (was_to, now_to) = ends[0][family], ends[1][family]
        before, after = decide(old, was_from, was_to, protocol, port), decide(new, now_from, now_to, protocol, port)
        if state(before) is not state(after):
            yield _Recorded(
                number,
                text,
                state(before).value,
                state(after).value,
                reason(old, before),
                reason(new, after),
                seen,
            )


def _flow(value: dict[str, Any]) -> tuple[str, str, str, int | None, str]:
    """(source, destination, protocol, port, verdict) of a line: short, or an event of `waggle flows`."""
    if "src" in value:
        port = value.get("dport")
        protocol = str(value.get("proto", "TCP")).upper()
        return (
            str(value["src"]),
            str(value["dst"]),
            protocol,
            int(port) if port else None,
            str(value.get("verdict", "")),
        )
    source, target = value["source"], value["destination"]
    if (value.get("backend") or {}).get("address"):
        target = value["backend"]  # what policies judge: after the Service
    port = target.get("port")
    seen = value.get("verdict") or ("dropped" if value.get("kind") == "drop" else "forwarded")
    return source["address"], target["address"], str(value["protocol"]).upper(), int(port) if port else None, str(seen)


def _addresses_of(end: str, old: PolicyWorld, new: PolicyWorld) -> dict[str, tuple[str, str]]:
    """(before, after) by family: of a pod by its name; an address is itself on both sides."""
    if "/" not in end:
        try:
            text = str(ipaddress.ip_address(end))
        except ValueError:
            return {}
        return {family_of(text).value: (text, text)}
    namespace, _, name = end.partition("/")
    key = ObjectKey(namespace, name)
    pods = [world.pods.get(key) for world in (old, new)]
    found = [pod or pods[1 - number] for number, pod in enumerate(pods)]
    by_family: list[dict[str, str]] = [
        {family_of(address).value: address for address in reversed(pod_addresses(pod))} if pod else {} for pod in found
    ]
    return {family: (by_family[0][family], by_family[1][family]) for family in by_family[0] if family in by_family[1]}


def _print_flows(recorded: Sequence[_Recorded]) -> None:
    out = console()
    changed = [flow for flow in recorded if flow.before != flow.after]
    unknown = [flow for flow in recorded if flow.before == flow.after]
    for flow in changed:
        seen = f" (seen: {flow.seen})" if flow.seen else ""
        out.print(printable(f"line {flow.line}: {flow.text}: {flow.before} → {flow.after}{seen}: {flow.reason_after}"))
    out.print(f"{len(changed) or 'no'} recorded {'flow' if len(changed) == 1 else 'flows'} would change")
    if unknown:
        numbers = _some([str(flow.line) for flow in unknown])
        out.print(printable(f"ends that are not known here, in lines {numbers}"))


def _finding_json(files: PolicyFiles, finding: Finding) -> dict[str, Any]:
    place = files.place(finding.kind, finding.key, finding.path)
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in finding.path).removeprefix(".")
    return {
        "code": finding.code,
        "object": f"{finding.kind} {finding.key}",
        "path": path,
        "reason": finding.reason,
        "file": place.file if place else None,
        "line": place.line if place else None,
    }
