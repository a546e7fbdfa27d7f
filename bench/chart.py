"""The ratios as a picture: a dot per test, comparison and number of Services, a line over the middle half of rounds.

One panel per placement, side by side, tests below one another. Plain SVG on a white ground.
"""

from __future__ import annotations

from html import escape

from bench.report import COMPARISONS, Comparison, Report
from bench.rounds import Spread
from bench.tables import AIM

_ROW, _GAP = 12.0, 12.0  # height of a row, space between tests
_LABELS, _PANEL, _BETWEEN, _RIGHT = 290.0, 290.0, 34.0, 64.0
_TOP = 92.0
_LOW, _HIGH = 0.80, 1.20
_SHOWN = tuple(zip(COMPARISONS[:3], ("#1f6feb", "#d1680f", "#2a8c4a"), strict=True))
_GREY, _BLACK, _RED = "#57606a", "#1f2328", "#cf222e"


def chart(report: Report) -> str:
    """An SVG document."""
    body: list[str] = []
    top = _TOP
    for test in report.tests:
        rows = [(comparison, colour, size) for comparison, colour in _SHOWN for size in report.sizes]
        rows = [
            row for row in rows if any(_has(report, place, test.key, row[0], row[2]) for place in report.placements)
        ]
        body.append(_text(10, top + len(rows) * _ROW / 2 + 4, test.title))
        for comparison, colour, size in rows:
            for number, place in enumerate(report.placements):
                if _has(report, place, test.key, comparison, size):
                    ratio = report.rates.ratio(size, place, test.key, comparison.way, comparison.to)
                    body += _dot(_left(number), top + _ROW / 2, colour, ratio)
            body.append(_text(_end(report) + 10, top + _ROW - 2, f"{size:,}", size=10, colour=_GREY))
            top += _ROW
        top += _GAP
    grid: list[str] = []
    for number, place in enumerate(report.placements):
        grid += _panel(_left(number), place, top - _GAP / 2)
    width, height = _end(report) + _RIGHT, top + 40
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        _text(10, 22, "Ratios of medians; the lines cover the middle half of the rounds", size=15, weight="600"),
        *_legend(report),
        _text(_end(report) + 10, _TOP - 12, "Services", size=10, colour=_GREY),
    ]
    return "\n".join([*head, *grid, *body, "</svg>"]) + "\n"


def _has(report: Report, placement: str, test: str, comparison: Comparison, size: int) -> bool:
    return comparison in report.available(size, placement, test)


def _left(panel: int) -> float:
    return _LABELS + panel * (_PANEL + _BETWEEN)


def _end(report: Report) -> float:
    return _left(len(report.placements) - 1) + _PANEL


def _legend(report: Report) -> list[str]:
    parts, left = [], 14.0
    for comparison, colour in _SHOWN:
        if comparison.way not in report.ways or comparison.to not in report.ways:
            continue
        parts.append(f'<circle cx="{left:.1f}" cy="44" r="4" fill="{colour}"/>')
        parts.append(_text(left + 9, 48, comparison.title))
        left += 32 + 7 * len(comparison.title)
    return parts


def _panel(left: float, title: str, bottom: float) -> list[str]:
    """Title, grid and scale of one placement."""
    parts = [_text(left, _TOP - 12, title.capitalize(), size=13, weight="600")]
    for step in range(5):
        value = _LOW + (_HIGH - _LOW) * step / 4
        x = _x(left, value)
        stroke = "#8c959f" if step == 2 else "#d8dee4"
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{bottom:.1f}" stroke="{stroke}"/>')
        parts.append(_text(x, bottom + 14, f"{value:.2f}", anchor="middle", colour=_GREY))
    aim = _x(left, AIM)
    parts.append(
        f'<line x1="{aim:.1f}" x2="{aim:.1f}" y1="{_TOP - 4}" y2="{bottom:.1f}" stroke="{_RED}" '
        'stroke-dasharray="3 3"/>'
    )
    parts.append(_text(aim, bottom + 29, f"aim {AIM}", anchor="middle", colour=_RED))
    return parts


def _dot(left: float, y: float, colour: str, ratio: Spread) -> list[str]:
    x, low, high = _x(left, ratio.median), _x(left, ratio.low), _x(left, ratio.high)
    beyond = not _LOW <= ratio.median <= _HIGH
    fill = f'fill="#ffffff" stroke="{colour}" stroke-width="1.5"' if beyond else f'fill="{colour}"'
    return [
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2" opacity="0.45"/>',
        f'<circle cx="{x:.1f}" cy="{y}" r="3.5" {fill}><title>{ratio.median:.3f}</title></circle>',
    ]


def _x(left: float, ratio: float) -> float:
    """Position of a ratio; beyond the scale it sticks to the edge, as a hollow dot."""
    return left + _PANEL * (min(max(ratio, _LOW), _HIGH) - _LOW) / (_HIGH - _LOW)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 12,
    weight: str = "400",
    anchor: str = "start",
    colour: str = _BLACK,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="{colour}">{escape(text)}</text>'
    )
