"""The ratios as a picture: a dot per test and comparison, a line over the middle half of the rounds. Plain SVG."""

from __future__ import annotations

from html import escape

from bench.report import AIM, COMPARISONS, Report
from bench.rounds import Spread

_ROW, _LABELS, _PLOT, _TOP, _PANEL_GAP = 16, 300, 460, 64, 46
_LOW, _HIGH = 0.80, 1.20
_COLOURS = ("#1f6feb", "#d1680f", "#2a8c4a", "#8250df")


def chart(report: Report) -> str:
    """An SVG document; works on light and dark backgrounds."""
    body: list[str] = []
    top = float(_TOP)
    for placement in report.placements:
        body.append(_text(10, top + 2, placement.capitalize(), size=14, weight="600"))
        top += 14
        panel_top = top
        for test in report.tests:
            rows = _rows(report, placement, test.key)
            middle = top + len(rows) * _ROW / 2
            body.append(_text(10, middle + 4, test.title))
            for colour, label, ratio in rows:
                body += _dot(top + _ROW / 2, colour, ratio, label)
                top += _ROW
            top += _ROW / 2
        body += _axis(panel_top, top)
        top += _PANEL_GAP
    width, height = _LABELS + _PLOT + 90, round(top)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(10, 22, "Ratios of medians; the lines cover the middle half of the rounds", size=15, weight="600"),
        *_legend(report),
    ]
    return "\n".join([*head, *body, "</svg>"]) + "\n"


def _rows(report: Report, placement: str, test: str) -> list[tuple[str, str, Spread]]:
    """(colour, label at the right, ratio): per comparison one row per number of Services."""
    rows = []
    for comparison, colour in zip(COMPARISONS, _COLOURS, strict=True):
        for size in report.sizes:
            if comparison in report.available(size, placement, test):
                ratio = report.rates.ratio(size, placement, test, comparison.way, comparison.to)
                rows.append((colour, f"{size:,}", ratio))
    return rows


def _legend(report: Report) -> list[str]:
    used = {
        comparison
        for size in report.sizes
        for placement in report.placements
        for test in report.tests
        for comparison in report.available(size, placement, test.key)
    }
    parts, left = [], 14.0
    for comparison, colour in zip(COMPARISONS, _COLOURS, strict=True):
        if comparison in used:
            parts.append(f'<circle cx="{left}" cy="40" r="4" fill="{colour}"/>')
            parts.append(_text(left + 9, 44, comparison.title))
            left += 30 + 6.6 * len(comparison.title)
    parts.append(_text(_LABELS + _PLOT + 12, 44, "Services", colour="#57606a"))
    return parts


def _axis(top: float, bottom: float) -> list[str]:
    parts = []
    for step in range(5):
        value = _LOW + (_HIGH - _LOW) * step / 4
        x = _x(value)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#d0d7de"/>')
        parts.append(_text(x, bottom + 14, f"{value:.2f}", anchor="middle", colour="#57606a"))
    aim = _x(AIM)
    parts.append(
        f'<line x1="{aim:.1f}" x2="{aim:.1f}" y1="{top}" y2="{bottom}" stroke="#cf222e" stroke-dasharray="3 3"/>'
    )
    parts.append(_text(aim, bottom + 28, f"aim {AIM}", anchor="middle", colour="#cf222e"))
    return parts


def _dot(y: float, colour: str, ratio: Spread, label: str) -> list[str]:
    x, low, high = _x(ratio.median), _x(ratio.low), _x(ratio.high)
    return [
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2" opacity="0.45"/>',
        f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{colour}"><title>{ratio.median:.3f}</title></circle>',
        _text(_LABELS + _PLOT + 12, y + 4, label, colour="#57606a", size=10),
    ]


def _x(ratio: float) -> float:
    """Position of a ratio; beyond the scale it sticks to the edge."""
    return _LABELS + _PLOT * (min(max(ratio, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "400",
    anchor: str = "start",
    colour: str = "#1f2328",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
