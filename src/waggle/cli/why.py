"""`waggle why`: what happens to a packet, from the frontend to the rule; and for a drop, what would let it pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlencode

import typer
import yaml

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
from waggle.errors import ConfigError
from waggle.model.choice import NodeFacts
from waggle.model.meta import ObjectKey
from waggle.model.packets import Cluster, LocalNode
from waggle.model.policy_objects import NodePolicy
from waggle.model.service import Family
from waggle.model.why import Situation
from waggle.model.why import why as explain
from waggle.observe.why import why_json
from waggle.sources.policy_files import DEFAULT_POD_CIDR, PolicyFiles, read_policy_files

MOST_ENDPOINTS = 10
_YES, _NO, _AUDIT = "+", "-", "~"


def why(
    source: Annotated[str, typer.Argument(help="Who sends: a pod as NAMESPACE/NAME, a node, an address.")] = "",
    destination: Annotated[
        str,
        typer.Argument(help="Where to: NAME:PORT of a Service or pod, an address or a domain name. pod/… names a pod."),
    ] = "",
    drop: Annotated[str, typer.Option("--drop", help="Ask about a drop that `waggle flows` showed, by its id.")] = "",
    protocol: Annotated[
        str, typer.Option("--proto", help="tcp, udp, sctp or icmp. Without it, the Service's or tcp.")
    ] = "",
    family: Annotated[int, typer.Option("--family", help="4 or 6; without it, the first that both have.")] = 0,
    manifests: Annotated[
        list[Path] | None, typer.Option("--manifests", help="Ask files instead of an agent. May be repeated.")
    ] = None,
    pod_cidr: Annotated[str, typer.Option("--pod-cidr", help="With --manifests: where pods without address are.")] = (
        DEFAULT_POD_CIDR
    ),
    socket: Socket = DEFAULT_API_SOCKET,
    output: Output = OutputFormat.TABLE,
) -> None:
    """What happens to the first packet from SOURCE to DESTINATION and why: frontend, backends, policies, rule, verdict.

    For a drop, the smallest change that would let it pass comes last, as YAML; it was tried out on the model.
    An agent compares with the tables of the kernel, for the pods of its node.
    Exit status: 0 it passes; 3 it is dropped or rejected, that depends on the backend, or the kernel says otherwise.
    """
    if bool(drop) == bool(source and destination) or (drop and (source or manifests)):
        raise typer.BadParameter("say SOURCE and DESTINATION, or --drop ID of a drop that an agent remembers")
    if family not in (0, 4, 6):
        raise typer.BadParameter("must be 4 or 6", param_hint="--family")
    if manifests:
        files = read_policy_files(manifests, pod_cidr)
        if files.errors:
            raise ConfigError("; ".join(map(str, files.errors[:10])))
        wanted = {4: Family.IPV4, 6: Family.IPV6}.get(family)
        answer = why_json(explain(_situation(files), source, destination, protocol, wanted), _place(files))
    else:
        event = client.get(socket, f"/events/{quote(drop, safe='')}") if drop else None
        if event:
            source, destination, protocol = _asked_about(event)
        asked = {"source": source, "destination": destination, "protocol": protocol, "family": family or ""}
        answer = {**client.get(socket, f"/why?{urlencode(asked)}"), "event": event}
    show(output, answer, _print_why)
    if answer["verdict"] not in ("passes", "audit") or not all(_agreeing(answer)):
        raise typer.Exit(EXIT_PROBLEMS)


def _asked_about(event: dict[str, Any]) -> tuple[str, str, str]:
    """The ends and the protocol of a recorded event."""
    source, target = event["source"], event["destination"]
    address = f"[{target['address']}]" if ":" in target["address"] else target["address"]
    if not source["address"]:
        raise ConfigError(f"event {event['id']} has no source address: it was seen at a socket. Say SOURCE yourself")
    return source["address"], f"{address}:{target['port']}" if target["port"] else address, event["protocol"]


def _agreeing(answer: dict[str, Any]) -> Iterator[bool]:
    """Whether the kernel says the same, for each side that it was asked about; tables that are behind do not count."""
    for path in answer["paths"]:
        for side in (path["egress"], path["ingress"], *path["nodes"]):
            if side["kernel"] and not side["kernel"]["behind"]:
                yield side["kernel"]["agrees"]


def _situation(files: PolicyFiles) -> Situation:
    world = files.world()
    cluster = Cluster(files.services, files.slices, world.pods, world.nodes)
    local = LocalNode(NodeFacts(""), frozenset(), ())
    return Situation(cluster, world, local, tuple(files.of(NodePolicy).values()))


def _place(files: PolicyFiles) -> Any:
    def place(kind: str, key: ObjectKey, path: tuple[str | int, ...]) -> tuple[str | None, int | None]:
        found = files.place(kind, key, path)
        return (found.file, found.line) if found else (None, None)

    return place


class _Dumper(yaml.SafeDumper):
    """Quotes what Kubernetes would read as something else: y and n are true and false to it."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = '"' if value.lower() in ("y", "n") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(manifest: dict[str, Any]) -> str:
    """A manifest as it can be applied."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False)


# -- words ----------------------------------------------------------------------------------------------------------


def _print_why(answer: dict[str, Any]) -> None:
    out = console()
    for line in lines(answer):
        out.print(printable(line))


def lines(answer: dict[str, Any]) -> Iterator[str]:
    """The answer as people read it."""
    if answer.get("event"):
        yield from _event(answer["event"])
    port = f":{answer['port']}" if answer["port"] else ""
    yield f"{_party(answer['source'])} → {_party(answer['destination'])}{port} {answer['protocol']}: {_verdict(answer)}"
    for note in answer["notes"]:
        yield f"note: {note}"
    if answer["service"]:
        yield ""
        yield from _service(answer["service"])
    for path in answer["paths"]:
        yield ""
        yield from _path(path)


def _event(event: dict[str, Any]) -> Iterator[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    reason = f"{event['explanation']} [{event['reason']}]" if event.get("explanation") else event["kind"]
    yield f"{event['id']}, {when}: {event['verdict']}: {reason} at {event['hook']}"
    rule = event.get("rule")
    if rule:
        yield f"  it was decided by {rule['object']} {rule['direction'].lower()}[{rule['index']}]{_at(rule)}"
    yield "as the objects are now:"


def _verdict(answer: dict[str, Any]) -> str:
    words = {
        "passes": "passes",
        "audit": "passes, and is reported: audited policies would drop it",
        "dropped": "is dropped",
        "rejected": "is rejected",
        "depends": "depends on the backend",
    }
    return words[answer["verdict"]]


def _party(party: dict[str, Any]) -> str:
    known = [a for a in party["addresses"] if a and a != party["text"]]
    around = [*known[:1], *([party["node"]] if party["node"] and party["kind"] == "pod" else [])]
    return f"{party['text']} ({', '.join(around)})" if around else party["text"]


def _service(service: dict[str, Any]) -> Iterator[str]:
    name = f" ({service['portName']})" if service["portName"] else ""
    client_is = "a client in the cluster" if service["client"] == "internal" else "a client outside"
    where = f"{service['protocol']} {service['port']}{name}, {service['frontend']}, {client_is}{_at(service)}"
    yield f"Service {service['namespace']}/{service['name']}: {where}"
    chosen = [one for one in service["endpoints"] if one["chosen"]]
    others = [one for one in service["endpoints"] if not one["chosen"]]
    for sign, group in ((_YES, chosen), (_NO, others)):
        for one in group[:MOST_ENDPOINTS]:
            on = f" on {one['node']}" if one["node"] else ""
            why_ = f": {one['why']}" if one["why"] else ""
            yield f"  {sign} {one['pod'] or 'endpoint'} {one['text']}{on}{why_}"
        if len(group) > MOST_ENDPOINTS:
            yield f"  {sign} and {len(group) - MOST_ENDPOINTS} more"
    if not service["endpoints"]:
        yield f"  {_NO} it has no endpoints"
    if service["refused"]:
        yield f"  so that {service['refused']}"


def _path(path: dict[str, Any]) -> Iterator[str]:
    alike = f", and {len(path['alike'])} more backends alike" if path["alike"] else ""
    name = f"{path['name']} {path['text']}" if path["name"] and path["name"] != path["destination"] else path["text"]
    yield f"to {name}{alike}: {_word(path['allowed'], path['audited'])}"
    for side in (path["egress"], path["ingress"]):
        yield from _side(side)
    for look in path["nodes"]:
        yield from _node(look)
    if path["fixes"]:
        yield "  what would let it pass:"
    for number, fix in enumerate(path["fixes"], 1):
        yield f"  {number}. {fix['words']}"
        if fix["manifest"]:
            yield from (f"       {line}" for line in as_yaml(fix["manifest"]).splitlines())
        for other in fix["instead"]:
            yield f"     or: {other}"


def _word(allowed: bool, audited: bool) -> str:
    return "passes, and is reported" if audited else "passes" if allowed else "is dropped"


def _side(side: dict[str, Any]) -> Iterator[str]:
    sign = _YES if side["allowed"] else _NO
    whose = f" of {side['pod']}" if side["pod"] else ""
    where = _at(side["rule"]) if side["rule"] else ""
    yield f"  {sign} {side['direction'].lower()}{whose}: {side['because']}{where}"
    if side["audit"]:
        rule = side["audit"]["rule"]
        by = f"{rule['text']}{_at(rule)} would deny it" if rule else "no rule would allow it"
        yield f"  {_AUDIT} were the audited policies enforced, {by}"
    yield from _kernel(side["kernel"])
    for policy in side["policies"]:
        yield from _policy(policy)
    if side["policies"] and side["beside"]:
        yield f"      not about it: {side['beside']} more in its namespace"


def _node(look: dict[str, Any]) -> Iterator[str]:
    where = _at(look["rule"]) if look["rule"] else ""
    trial = ", on trial" if look["onTrial"] else "" if look["known"] else ", if it has confirmed what these objects say"
    sign = _YES if look["allowed"] else _NO
    yield f"  {sign} {look['direction'].lower()} of node {look['node']}{trial}: {look['because']}{where}"
    if look["audited"]:
        yield f"  {_AUDIT} were the audited policies enforced, no rule would allow it"
    yield from _kernel(look["kernel"])
    for policy in look["policies"]:
        yield from _policy(policy)


def _kernel(kernel: dict[str, Any] | None) -> Iterator[str]:
    if kernel and not kernel["agrees"]:
        says = _word(kernel["allowed"], kernel["audited"])
        late = (
            "; something has changed that is not in force yet" if kernel["behind"] else "; waggle doctor compares all"
        )
        yield f"  ! the kernel's tables differ: it {says} by rule {kernel['rule']:08x}{late}"
    elif kernel:
        yield "    the kernel's tables say the same"


def _policy(policy: dict[str, Any]) -> Iterator[str]:
    name = f"{policy['namespace']}/{policy['name']}" if policy["namespace"] else policy["name"]
    tier = f" ({policy['tier']}, priority {policy['priority']})" if policy["priority"] is not None else ""
    audit = ", audited: it decides nothing" if policy["audit"] else ""
    rules = "" if policy["rules"] else ", no rules"
    yield f"      {policy['kind']} {name}{tier}{audit}{rules}{_at(policy)}"
    for rule in policy["rules"]:
        label = f"{rule['direction'].lower()}[{rule['index']}]" + (f" {rule['ruleName']}" if rule["ruleName"] else "")
        words = "matches" if rule["matches"] else rule["why"]
        yield f"        {_YES if rule['matches'] else _NO} {label} {rule['action']}: {words}"


def _at(value: dict[str, Any]) -> str:
    if not value["file"]:
        return ""
    return f" ({value['file']}:{value['line']})" if value["line"] else f" ({value['file']})"
