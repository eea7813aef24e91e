"""A front as a small picture: text that any browser and any page of Markdown shows, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

from search.pareto.front import Front, FrontPoint

WIDTH, HEIGHT = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 40, 52
_COLOURS = ("#1b4f8a", "#c2571a", "#2e7d4f", "#8a3b8f", "#a88400", "#5f6b7a")
"""Dark enough on white, and apart from each other for those who see no red or green; the shapes differ as well."""
_FEW = len(_COLOURS)
_BINS = 4

Axis = Callable[[float], float]


def front_svg(
    front: Front,
    *,
    others: Sequence[FrontPoint] = (),
    marked: Mapping[int, str] | None = None,
    title: str = "",
) -> str:
    """Draw a front of two or three terms: the first two are the axes, the third is colour and shape.

    Args:
        front: its points; of the third term every value gets a colour, or a range of values where there are many.
        others: points in pale grey, such as all other trials. What is far from the front is left out.
        marked: candidate -> label of a point of the front.
        title: above the picture.

    Returns:
        An SVG document.

    Raises:
        ValueError: a front without points, or with another number of terms.
    """
    if len(front.metrics) not in (2, 3) or not front.points:
        raise ValueError(f"a picture needs 2 or 3 terms and a point; found {len(front.metrics)}, {len(front.points)}")
    marked = marked or {}
    first, second = front.metrics[:2]
    xs, ys = ([point.metrics[name] for point in front.points] for name in (first, second))
    low_x, high_x, low_y, high_y = *_padded(xs), *_padded(ys)
    x = _axis(low_x, high_x, _LEFT, WIDTH - _RIGHT)
    y = _axis(low_y, high_y, HEIGHT - _BOTTOM, _TOP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title or 'Front')}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(_LEFT, 22, title, size=14),
        *_grid(low_x, high_x, x, low_y, high_y, y),
        _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 12, first, anchor="middle"),
        f'<text transform="translate(16 {(HEIGHT - _BOTTOM + _TOP) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(second)}</text>',
    ]
    for point in others:
        at_x, at_y = point.metrics[first], point.metrics[second]
        if low_x <= at_x <= high_x and low_y <= at_y <= high_y:
            lines.append(f'<circle cx="{x(at_x):.1f}" cy="{y(at_y):.1f}" r="2" fill="#cfd4da"/>')
    legend = _TOP + 8.0
    groups = _groups(front)
    if len(front.metrics) == 3:
        lines.append(_text(WIDTH - _RIGHT + 16, legend, front.metrics[2]))
        legend += 20
    for number, (label, points) in enumerate(groups):
        colour = _COLOURS[number % len(_COLOURS)]
        for point in points:
            lines.append(_shape(number, x(point.metrics[first]), y(point.metrics[second]), colour))
        if label:
            lines += [
                _shape(number, WIDTH - _RIGHT + 22, legend - 4, colour),
                _text(WIDTH - _RIGHT + 34, legend, f"{label} ({len(points)})"),
            ]
            legend += 18
    for point in front.points:
        if point.candidate in marked:
            at_x, at_y = x(point.metrics[first]), y(point.metrics[second])
            lines += [
                f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="9" fill="none" stroke="#000" stroke-width="1.5"/>',
                _text(at_x + 12, at_y - 8, marked[point.candidate]),
            ]
    return "\n".join([*lines, "</svg>", ""])


def _groups(front: Front) -> list[tuple[str, list[FrontPoint]]]:
    """Label and points of every colour."""
    if len(front.metrics) == 2:
        return [("", list(front.points))]
    name = front.metrics[2]
    values = sorted({point.metrics[name] for point in front.points})
    if len(values) <= _FEW:
        bounds = [(value, value) for value in values]
    else:
        edges = [len(values) * part // _BINS for part in range(_BINS + 1)]
        bounds = [(values[begin], values[end - 1]) for begin, end in pairwise(edges)]
    return [
        (
            f"{low:.6g}" if low == high else f"{low:.4g} to {high:.4g}",
            [point for point in front.points if low <= point.metrics[name] <= high],
        )
        for low, high in bounds
    ]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(low) or 1.0)
    return low - margin, high + margin


def _axis(low: float, high: float, begin: float, end: float) -> Axis:
    return lambda value: begin + (value - low) / (high - low) * (end - begin)


def _grid(low_x: float, high_x: float, x: Axis, low_y: float, high_y: float, y: Axis) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    lines = [
        f'<rect x="{_LEFT}" y="{_TOP}" width="{right - _LEFT}" height="{bottom - _TOP}" fill="none" stroke="#888"/>'
    ]
    for value in ticks(low_x, high_x):
        at = x(value)
        lines.append(f'<path d="M{at:.1f} {_TOP}V{bottom}" stroke="#eee"/>')
        lines.append(_text(at, bottom + 16, f"{value:g}", anchor="middle"))
    for value in ticks(low_y, high_y):
        at = y(value)
        lines.append(f'<path d="M{_LEFT} {at:.1f}H{right}" stroke="#eee"/>')
        lines.append(_text(_LEFT - 6, at + 4, f"{value:g}", anchor="end"))
    return lines


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], four to eight: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [float(f"{k * step:.12g}") for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _shape(number: int, x: float, y: float, colour: str) -> str:
    r = 4.5
    match number % 3:
        case 0:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}"/>'
        case 1:
            return f'<rect x="{x - r + 0.5:.1f}" y="{y - r + 0.5:.1f}" width="8" height="8" fill="{colour}"/>'
        case _:
            return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 9.5h-11z" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
