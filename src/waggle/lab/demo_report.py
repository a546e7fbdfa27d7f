"""What the demonstration found, as figures and as tables for people."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from waggle.lab.netfilter import NetfilterState
from waggle.lab.traffic import Outcome
from waggle.model.objects import ServicePort
from waggle.model.service import FrontendKind
from waggle.plan.services import PortView


@dataclass
class PortResult:
    """One Service port over both families: its addresses, its backends ({name: addresses}) and who answered."""

    service: str
    port: ServicePort
    addresses: list[str] = field(default_factory=list)
    node_port: int | None = None
    backends: dict[str, list[str]] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)

    def add_view(self, view: PortView, names: Mapping[str, str]) -> None:
        """`names` are those of the pods, by address."""
        for frontend in view.frontends:
            if frontend.kind is FrontendKind.NODE_PORT:
                self.node_port = frontend.port
            else:
                self.addresses.append(frontend.address)
        for backend in view.backends:
            name = names.get(backend.address, backend.address)
            self.backends.setdefault(name, []).append(_address_and_port(backend.address, backend.port))

    def add_outcome(self, outcome: Outcome) -> None:
        self.answers += outcome.answers


@dataclass(frozen=True)
class PathResult:
    """Requests from one place through one frontend of one Service."""

    origin: str
    frontend: str
    protocol: str
    family: str
    service: str
    outcome: Outcome


@dataclass(frozen=True)
class Latency:
    """Requests through a Service and directly to its backends, interleaved."""

    service: str
    port: ServicePort
    family: str
    through: Outcome
    direct: Outcome

    @property
    def medians_us(self) -> tuple[float, float] | None:
        """(through the Service, direct); None where one of them had no answer at all."""
        if not (self.through.latencies_us and self.direct.latencies_us):
            return None
        return statistics.median(self.through.latencies_us), statistics.median(self.direct.latencies_us)


@dataclass
class Report:
    """Everything the demonstration found."""

    lab: str
    ports: list[PortResult] = field(default_factory=list)
    paths: list[PathResult] = field(default_factory=list)
    latencies: list[Latency] = field(default_factory=list)
    netfilter: list[NetfilterState] = field(default_factory=list)
    without_backends: list[str] = field(default_factory=list)
    kept: bool = False

    @property
    def requests(self) -> tuple[int, int]:
        """(answered, failed) over everything that was asked, latency measurements included."""
        outcomes = [path.outcome for path in self.paths]
        outcomes += [outcome for latency in self.latencies for outcome in (latency.through, latency.direct)]
        return sum(outcome.ok for outcome in outcomes), sum(outcome.failed.total() for outcome in outcomes)

    @property
    def passed(self) -> bool:
        """Requests were answered, none failed, and Netfilter had no part in it."""
        answered, failed = self.requests
        return answered > 0 and failed == 0 and all(state.is_clean for state in self.netfilter)

    def document(self) -> dict[str, Any]:
        """The report for programs."""
        answered, failed = self.requests
        return {
            "lab": self.lab,
            "passed": self.passed,
            "requests": {"answered": answered, "failed": failed},
            "services": [_port_document(port) for port in self.ports],
            "paths": [_path_document(path) for path in self.paths],
            "latencies": [_latency_document(latency) for latency in self.latencies],
            "netfilter": [
                {
                    "namespace": state.name,
                    "nftRules": state.nft_rules,
                    "iptablesRules": state.iptables_rules,
                    "conntrackEntries": state.conntrack_entries,
                }
                for state in self.netfilter
            ],
            "withoutBackends": self.without_backends,
            "kept": self.kept,
        }

    def show(self, console: Console) -> None:
        """The report for people."""
        self._show_services(console)
        self._show_paths(console)
        self._show_latencies(console)
        self._show_netfilter(console)
        answered, failed = self.requests
        verdict = f"{answered} requests answered, {failed} failed"
        console.print(Text(verdict, style="bold green" if self.passed else "bold red"))
        if self.kept:
            console.print(Text(_what_next(self.lab, self.ports)))

    def _show_services(self, console: Console) -> None:
        table = _table("Services, and who answered", "service", "addresses", "backends", "answers")
        for port in self.ports:
            where = [*port.addresses, *([f"node port {port.node_port}"] if port.node_port else [])]
            total = max(1, port.answers.total())
            lines = []
            for name, addresses in sorted(port.backends.items()):
                first, *rest = _without_ports(addresses)
                lines.append(
                    (name if first == name else f"{name} {first}", f"{100 * port.answers[name] / total:.0f} %")
                )
                lines += [(f"  {address}", "") for address in rest]
            # Answers of somebody who should not have been asked are shown, whatever they mean.
            lines += [(f"{name}?", f"{100 * count / total:.0f} %") for name, count in port.answers.items()
                      if name not in port.backends]  # fmt: skip
            backends, answers = ("\n".join(column) for column in zip(*lines, strict=True))
            _add_row(table, _title(port.service, port.port), "\n".join(where), backends, answers)
        console.print(table)
        if self.without_backends:
            console.print(Text(f"Without ready backends, so not asked: {', '.join(self.without_backends)}\n"))

    def _show_paths(self, console: Console) -> None:
        columns = [(protocol, family) for protocol in ("TCP", "UDP") for family in ("IPv4", "IPv6")]
        table = _table("Paths tested", "from", "to", *(f"{protocol} {family}" for protocol, family in columns))
        rows: dict[tuple[str, str], dict[tuple[str, str], Outcome]] = {}
        for path in self.paths:
            cells = rows.setdefault((path.origin, path.frontend), {})
            at = (path.protocol, path.family)
            cells[at] = cells[at].merged(path.outcome) if at in cells else path.outcome
        for (origin, frontend), cells in rows.items():
            _add_row(table, origin, frontend, *(_cell(cells.get(column)) for column in columns))
        console.print(table)

    def _show_latencies(self, console: Console) -> None:
        columns = ("service", "family", "Service", "pod", "Service / pod", "")
        table = _table(
            "Median latency through the Service and straight to the pod: new socket, one request, one answer", *columns
        )
        for latency in self.latencies:
            medians = latency.medians_us
            shown = ("-", "-", "-")
            if medians is not None:
                through, direct = medians
                shown = (f"{through:.0f} µs", f"{direct:.0f} µs", f"{through / direct:.2f}")
            failed = latency.through.failed + latency.direct.failed
            _add_row(table, _title(latency.service, latency.port), latency.family, *shown, _reasons(failed))
        console.print(table)

    def _show_netfilter(self, console: Console) -> None:
        checks = (
            ("rules of nftables", [state.nft_rules for state in self.netfilter]),
            ("rules of iptables and ip6tables", [state.iptables_rules for state in self.netfilter]),
            ("connections followed by Netfilter's conntrack", [state.conntrack_entries for state in self.netfilter]),
        )
        table = _table(
            f"Netfilter, in {len(self.netfilter)} network namespaces after all this traffic", "what", "found"
        )
        for what, counts in checks:
            _add_row(table, what, _found(counts))
        console.print(table)
        for state in self.netfilter:
            if not state.is_clean:
                console.print(Text(f"{state.name} has Netfilter rules or connections: {state}", style="red"))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, caption=" ")
    for column in columns:
        table.add_column(column, overflow="fold", header_style="dim")
    return table


def _add_row(table: Table, *cells: str | Text) -> None:
    """Strings as they are: an IPv6 address in brackets is no markup."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _title(service: str, port: ServicePort) -> str:
    name = f" {port.name}" if port.name else ""
    return f"{service.removeprefix('default/')}{name} {port.port}/{port.protocol}"


def _cell(outcome: Outcome | None) -> Text:
    if outcome is None:
        return Text("-", style="dim")
    if not outcome.failed:
        return Text(f"{outcome.ok} ok", style="green")
    return Text(f"{outcome.ok} ok, ").append_text(_reasons(outcome.failed))


def _reasons(failed: Counter[str]) -> Text:
    if not failed:
        return Text()
    reasons = ", ".join(f"{count} {reason}" for reason, count in failed.most_common(3))
    return Text(f"{failed.total()} failed ({reasons})", style="red")


def _found(counts: Iterable[int | None]) -> Text:
    listed = list(counts)
    known = [count for count in listed if count is not None]
    if not known:
        return Text("not checked: the tool or the kernel part is not on this machine", style="yellow")
    note = f" (not checked in {len(listed) - len(known)})" if len(known) < len(listed) else ""
    return Text(f"{sum(known)}{note}", style="red" if any(known) else "green")


def _without_ports(addresses: list[str]) -> list[str]:
    return [address.rpartition(":")[0].strip("[]") for address in addresses]


def _address_and_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _what_next(lab: str, ports: list[PortResult]) -> str:
    node_port = next((port.node_port for port in ports if port.node_port and port.port.protocol == "TCP"), None)
    ask = f"  waggle lab exec --name {lab} client -- curl -s http://10.77.0.11:{node_port}/"
    return "\n".join(
        (
            "The lab is still up. What to type next:",
            f"  waggle lab status --name {lab}",
            f"  waggle lab exec --name {lab} node1 -- waggle service list",
            f"  waggle lab exec --name {lab} node1 -- waggle flows",
            *([ask] if node_port else []),
            f"  waggle lab down --name {lab}",
        )
    )


def _port_document(port: PortResult) -> dict[str, Any]:
    return {
        "service": port.service,
        "port": port.port.port,
        "protocol": port.port.protocol,
        "addresses": port.addresses,
        "nodePort": port.node_port,
        "backends": port.backends,
        "answers": dict(port.answers),
    }


def _path_document(path: PathResult) -> dict[str, Any]:
    return {
        "from": path.origin,
        "to": path.frontend,
        "service": path.service,
        "protocol": path.protocol,
        "family": path.family,
        "ok": path.outcome.ok,
        "failed": dict(path.outcome.failed),
    }


def _latency_document(latency: Latency) -> dict[str, Any]:
    medians = latency.medians_us
    return {
        "service": latency.service,
        "port": latency.port.port,
        "protocol": latency.port.protocol,
        "family": latency.family,
        "serviceMedianMicroseconds": medians[0] if medians else None,
        "directMedianMicroseconds": medians[1] if medians else None,
        "serviceFailed": dict(latency.through.failed),
        "directFailed": dict(latency.direct.failed),
    }
