"""A front as a small picture: text that any browser and any page of Markdown shows, without a plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from search.pareto.drawing import COLOURS, Box, axis, grid, mark, opening, text, ticks, upright
from search.pareto.front import Front, FrontPoint

WIDTH, HEIGHT = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 190, 40, 52
_FEW = len(COLOURS)
_BINS = 4


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
    x = axis(low_x, high_x, _LEFT, WIDTH - _RIGHT)
    y = axis(low_y, high_y, HEIGHT - _BOTTOM, _TOP)
    lines = [
        *opening(WIDTH, HEIGHT, title or "Front"),
        text(_LEFT, 22, title, size=14),
        *grid(
            Box(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
            [(x(value), f"{value:g}") for value in ticks(low_x, high_x)],
            [(y(value), f"{value:g}") for value in ticks(low_y, high_y)],
        ),
        text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 12, first, anchor="middle"),
        upright(16, (HEIGHT - _BOTTOM + _TOP) / 2, second),
    ]
    for point in others:
        at_x, at_y = point.metrics[first], point.metrics[second]
        if low_x <= at_x <= high_x and low_y <= at_y <= high_y:
            lines.append(f'<circle cx="{x(at_x):.1f}" cy="{y(at_y):.1f}" r="2" fill="#cfd4da"/>')
    legend = _TOP + 8.0
    groups = _groups(front)
    if len(front.metrics) == 3:
        lines.append(text(WIDTH - _RIGHT + 16, legend, front.metrics[2]))
        legend += 20
    for number, (label, points) in enumerate(groups):
        for point in points:
            lines.append(mark(number, x(point.metrics[first]), y(point.metrics[second])))
        if label:
            lines += [
                mark(number, WIDTH - _RIGHT + 22, legend - 4),
                text(WIDTH - _RIGHT + 34, legend, f"{label} ({len(points)})"),
            ]
            legend += 18
    for point in front.points:
        if point.candidate in marked:
            at_x, at_y = x(point.metrics[first]), y(point.metrics[second])
            lines += [
                f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="9" fill="none" stroke="#000" stroke-width="1.5"/>',
                text(at_x + 12, at_y - 8, marked[point.candidate]),
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
