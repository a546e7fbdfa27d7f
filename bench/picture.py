"""waggle and its peers as one picture: curves over the number of Services, and bars. Plain SVG on a white ground.

Four panels, each there when it was measured: connections per second, first packet, north-south, loading and changing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

from bench.control_plane_report import summary
from bench.peer_sync import typical
from bench.plain import ONE_NODE
from bench.report import Report

_WIDTH, _HEIGHT, _GAP = 400.0, 190.0, 40.0
_LEFT, _TOP = 24.0, 96.0
_GREY, _BLACK, _LINE = "#57606a", "#1f2328", "#d8dee4"
#: The same colour for the same way in all panels.
_COLOURS = {
    "waggle": "#1f6feb",
    "waggle, per packet": "#58a6ff",
    "direct": "#57606a",
    "plain routing": "#8c959f",
    "iptables": "#cf222e",
    "iptables (nft)": "#a40e26",
    "nftables": "#d1680f",
}
_LABELS = {
    "service": "waggle",
    "service-packet": "waggle, per packet",
    "direct": "direct",
    "route": "plain routing",
    "iptables-legacy": "iptables",
    "iptables-nft": "iptables (nft)",
    "nftables": "nftables",
    "tc-snat": "waggle",
}

Curves = Mapping[str, Sequence[tuple[int, float]]]
Bars = Sequence[tuple[str, float, str]]  # label, value, the value as text


def picture(report: Report) -> str:
    """An SVG document; empty when nothing that it shows was measured."""
    panels = [
        _curves("Connections per second, one node (log scale)", _connections(report), "{:,.0f}"),
        _curves("First packet, median, µs (log scale)", _first_packets(report), "{:,.1f}"),
        _bars("NodePort, one core: thousand packets per second", _north_south(report)),
        _bars(_control_plane_title(report), _control_plane(report)),
    ]
    drawn = [panel for panel in panels if panel]
    if not drawn:
        return ""
    rows = math.ceil(len(drawn) / 2)
    width = 2 * _LEFT + 2 * _WIDTH + _GAP
    height = _TOP + rows * (_HEIGHT + 70)
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        _text(_LEFT, 26, "waggle beside the rules of kube-proxy, measured side by side", size=15, weight="600"),
        *_legend(report),
    ]
    for number, panel in enumerate(drawn):
        x = _LEFT + number % 2 * (_WIDTH + _GAP)
        y = _TOP + number // 2 * (_HEIGHT + 70)
        body += [f'<g transform="translate({x:.1f} {y:.1f})">', *panel, "</g>"]
    return "\n".join([*body, "</svg>"]) + "\n"


# -- what is shown --------------------------------------------------------------------------------------------------


def _connections(report: Report) -> Curves:
    found: dict[str, list[tuple[int, float]]] = {}
    for way in (way for way in report.ways if way in _LABELS):
        for size in report.sizes:
            if report.rates.has(size, ONE_NODE, "connect", way):
                rate = report.rates.rate(size, ONE_NODE, "connect", way).median
                found.setdefault(_LABELS[way], []).append((size, rate))
    return found


def _first_packets(report: Report) -> Curves:
    figures = report.first_packets
    if figures is None:
        return {}
    return {
        _LABELS[way]: [(size, figures.us(size, way, 0.5)) for size in figures.sizes]
        for way in figures.ways
        if way in _LABELS
    }


def _north_south(report: Report) -> Bars:
    figures = report.north_south
    if figures is None:
        return []
    rates = [(mode, figures.rate(mode).median / 1e3) for mode in figures.modes if mode != "floor"]
    return [(_LABELS.get(mode, f"waggle, {mode}"), rate, f"{rate:,.0f}") for mode, rate in rates]


def _control_plane_title(report: Report) -> str:
    if not report.control_plane:
        return ""
    scale = report.control_plane[-1]
    return f"{scale['services']:,} Services of {scale['endpoints']} endpoints, from nothing: seconds"


def _control_plane(report: Report) -> Bars:
    """Cold start, and full syncs; one that was given up is as long as its limit, and said to be longer."""
    if not report.control_plane:
        return []
    scale = report.control_plane[-1]
    start = summary(scale)["cold start"]
    bars = [("waggle", start, f"{start:.1f}")]
    for name, peer in scale["peers"].items():
        seconds = typical(peer["full_s"])
        said = f"> {peer['limit_s']:.0f}" if seconds is None else f"{seconds:.1f}"
        bars.append((_LABELS[name], peer["limit_s"] if seconds is None else seconds, said))
    return bars


# -- drawing --------------------------------------------------------------------------------------------------------


def _curves(title: str, curves: Curves, form: str) -> list[str]:
    """Both axes logarithmic: numbers of Services below, values as text at the last point."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return []
    plot = _WIDTH - 130  # the rest is for the names and values at the ends
    sizes = sorted({size for size, _ in points})
    low, high = min(value for _, value in points), max(value for _, value in points)
    span = math.log(high / low) or 1.0

    def x(size: int) -> float:
        return plot * sizes.index(size) / max(1, len(sizes) - 1)

    def y(value: float) -> float:
        return _HEIGHT - 12 - (_HEIGHT - 30) * math.log(value / low) / span

    parts = [_text(0, -14, title, size=13, weight="600")]
    for size in sizes:
        parts.append(f'<line x1="{x(size):.1f}" x2="{x(size):.1f}" y1="0" y2="{_HEIGHT}" stroke="{_LINE}"/>')
        parts.append(_text(x(size), _HEIGHT + 16, f"{size:,}", anchor="middle", colour=_GREY))
    parts.append(_text(plot / 2, _HEIGHT + 32, "Services", anchor="middle", colour=_GREY))
    ends = _spread_out([y(curve[-1][1]) for curve in curves.values()], 14)
    for (name, curve), end in zip(curves.items(), ends, strict=True):
        path = " ".join(f"{x(size):.1f},{y(value):.1f}" for size, value in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>')
        for size, value in curve:
            said = f"{name}, {size:,}: {form.format(value)}"
            parts.append(
                f'<circle cx="{x(size):.1f}" cy="{y(value):.1f}" r="3.5" fill="{_COLOURS[name]}">'
                f"<title>{escape(said)}</title></circle>"
            )
        parts.append(_text(plot + 10, end + 4, f"{form.format(curve[-1][1])} {name}", size=11, colour=_COLOURS[name]))
    return parts


def _bars(title: str, bars: Bars) -> list[str]:
    """From zero, one below the other."""
    if not bars:
        return []
    plot, label = _WIDTH - 170, 110.0
    high = max(value for _, value, _ in bars) or 1.0
    step = min(34.0, _HEIGHT / len(bars))
    parts = [_text(0, -14, title, size=13, weight="600")]
    for number, (name, value, said) in enumerate(bars):
        top, width = number * step + 4, plot * value / high
        colour = _COLOURS.get(name, _COLOURS["waggle"])
        parts.append(_text(label - 8, top + step / 2 + 2, name, anchor="end"))
        parts.append(f'<rect x="{label}" y="{top:.1f}" width="{width:.1f}" height="{step - 10:.1f}" fill="{colour}"/>')
        parts.append(_text(label + width + 6, top + step / 2 + 2, said))
    return parts


def _spread_out(wanted: Sequence[float], least: float) -> list[float]:
    """Positions near the ones wanted, in the same order, none closer than `least` to the next."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    for before, index in itertools.pairwise(order):
        placed[index] = max(placed[index], placed[before] + least)
    return placed


def _legend(report: Report) -> list[str]:
    machine = report.document["machine"]
    said = f"{report.document['made']}, {machine['cpus']} × {machine['cpu']}, Linux {machine['kernel']}"
    return [
        _text(_LEFT, 46, f"Medians of {report.document['options']['rounds']} alternated rounds. {said}", colour=_GREY)
    ]


def _text(
    x: float, y: float, text: str, *, size: int = 12, weight: str = "400", anchor: str = "start", colour: str = _BLACK
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
