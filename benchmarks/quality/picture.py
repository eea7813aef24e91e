"""The curves of `search_quality.py` as a picture beside its page: text that any page of Markdown shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from quality.runs import Curve
from quality.target import Target, peer_target

from search.pareto.drawing import COLOURS, Axis, Box, axis, grid, mark, opening, text, ticks, upright

_WIDTH = 800
_TITLE = "Median quality of the best known candidate on unseen items; smaller is better"
_LEFT, _RIGHT, _HEAD, _ABOVE, _BELOW = 68, 276, 30, 32, 46
_LOWEST, _ROW = 260, 18
"""Pixels: a panel is so high, or higher where the rows of its legend need more."""
_BETWEEN_MARKS = 110
_DASHES = ("none", "7 3", "2 3")
"""Colours and shapes come again after six methods; the dashes then differ."""
_FEW_LABELS = 6


@dataclass(frozen=True)
class _Line:
    """The seeds of one method: what holds from each of `items` until the next one.

    Attributes:
        number: says which colour, shape and dashes it has.
    """

    method: str
    number: int
    items: list[int]
    low: list[float]
    median: list[float]
    high: list[float]


@dataclass(frozen=True)
class _Panel:
    """Where things are: item-evaluations and quality -> pixels."""

    box: Box
    x: Axis
    y: Axis


def curves_svg(curves: Mapping[str, Sequence[Curve]], tolerance: float) -> str:
    """Draw how good the best known candidate is after how many item-evaluations: a panel per family, a line per method.

    A line is the median over the seeds, from where all of them have a candidate to the end of the longest; the pale
    band behind it goes from the lowest seed to the highest. A panel ends at what the peer has at first: how badly
    some begin would otherwise press together what happens at the target. The legend says which lines are never below.

    Args:
        curves: family -> the curves of all methods and seeds; no panel for a family without any.
        tolerance: see `peer_target`.

    Returns:
        An SVG document.
    """
    curves = {family: many for family, many in curves.items() if many}
    # Counted over all families, so that a method looks the same in every panel.
    methods = dict.fromkeys(curve.method for many in curves.values() for curve in many)
    height = max(_LOWEST, _ROW * (len(methods) + 1))
    step = _ABOVE + height + _BELOW
    lines = [*opening(_WIDTH, _HEAD + step * len(curves), _TITLE), text(_LEFT, 22, _TITLE, size=14)]
    for place, (family, many) in enumerate(curves.items()):
        found = [_line(many, method, number) for number, method in enumerate(methods)]
        top = _HEAD + step * place + _ABOVE
        box = Box(_LEFT, top, _WIDTH - _RIGHT, top + height)
        lines += _panel(family, [line for line in found if line], peer_target(many, tolerance), box, f"inside-{place}")
    return "\n".join([*lines, "</svg>", ""])


def _line(curves: Sequence[Curve], method: str, number: int) -> _Line | None:
    """None: not run on this family."""
    own = [curve for curve in curves if curve.method == method]
    if not own:
        return None
    begin, end = max(curve.steps[0].items for curve in own), max(curve.items for curve in own)
    items = sorted({begin, end, *(step.items for curve in own for step in curve.steps if step.items > begin)})
    values = np.array([[curve.at(place) for curve in own] for place in items])
    low, median, high = values.min(1).tolist(), np.median(values, axis=1).tolist(), values.max(1).tolist()
    return _Line(method, number, items, low, median, high)


def _panel(family: str, lines: Sequence[_Line], target: Target, box: Box, inside: str) -> list[str]:
    """One family; `inside` names what is cut off at its frame."""
    low_x, high_x = _items(lines)
    low_y, high_y = _qualities(lines, target)
    log_x = axis(math.log10(low_x), math.log10(high_x), box.left, box.right)
    true_y = axis(low_y, high_y, box.bottom, box.top)
    # What is above the frame is not seen; without a bound a failed candidate would be at infinity.
    highest = 2 * high_y - low_y
    panel = _Panel(
        box, lambda items: log_x(math.log10(max(items, low_x))), lambda quality: true_y(min(quality, highest))
    )
    return [
        f'<g aria-label="{escape(family)}">',
        text(box.left, box.top - 10, family, size=13),
        *grid(
            box,
            [(panel.x(items), label) for items, label in _log_ticks(low_x, high_x)],
            [(panel.y(value), f"{value:g}") for value in ticks(low_y, high_y)],
        ),
        text((box.left + box.right) / 2, box.bottom + 34, "item-evaluations", anchor="middle"),
        upright(16, (box.top + box.bottom) / 2, "quality"),
        *_target(target, panel, len(lines)),
        f'<clipPath id="{inside}"><rect x="{box.left}" y="{box.top}" width="{box.right - box.left}" '
        f'height="{box.bottom - box.top}"/></clipPath>',
        f'<g clip-path="url(#{inside})">',
        *(_band(line, panel, min(0.12, 0.4 / len(lines))) for line in lines),
        *(_median(line, panel) for line in lines),
        "</g>",
        *(part for line in lines for part in _marks(line, panel)),
        *_legend(lines, panel),
        "</g>",
    ]


def _items(lines: Sequence[_Line]) -> tuple[float, float]:
    low, high = min(line.items[0] for line in lines), max(line.items[-1] for line in lines)
    return max(low, 1), max(high, 2 * low, 2)


def _qualities(lines: Sequence[_Line], target: Target) -> tuple[float, float]:
    values = [target.quality, *(value for line in lines for value in (*line.low, *line.median))]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    # A peer that gained nothing, or whose first candidate failed, says nothing about where to end.
    if target.quality < target.first < math.inf:
        high = target.first
    margin = 0.04 * ((high - low) or abs(low) or 1.0)
    return low - margin, high + margin


def _log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Numbers in [low, high] and their labels: 1, 2 and 5 times powers of ten; only the powers where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10**power for power in powers for factor in (1, 2, 5) if low <= factor * 10**power <= high]
    few = len(found) <= _FEW_LABELS
    return [(value, f"{value:,}" if few or str(value).startswith("1") else "") for value in found]


def _steps(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[str, str]]:
    """The places where a line has another height, as far as a picture shows it."""
    found = [(f"{xs[0]:.1f}", f"{ys[0]:.1f}")]
    for x, y in zip(xs, ys, strict=True):
        if f"{y:.1f}" != found[-1][1]:
            found.append((f"{x:.1f}", f"{y:.1f}"))
    return found


def _stairs(xs: Sequence[float], ys: Sequence[float]) -> str:
    (first_x, first_y), *others = _steps(xs, ys)
    return f"M{first_x} {first_y}" + "".join(f"H{x}V{y}" for x, y in others) + f"H{xs[-1]:.1f}"


def _band(line: _Line, panel: _Panel, opacity: float) -> str:
    xs = [panel.x(items) for items in line.items]
    back = _steps(xs, [panel.y(quality) for quality in line.low])
    path = _stairs(xs, [panel.y(quality) for quality in line.high]) + "".join(f"V{y}H{x}" for x, y in reversed(back))
    return f'<path class="band" d="{path}Z" fill="{_colour(line)}" fill-opacity="{opacity:.2f}"/>'


def _median(line: _Line, panel: _Panel) -> str:
    path = _stairs([panel.x(items) for items in line.items], [panel.y(quality) for quality in line.median])
    return f'<path class="median" d="{path}" {_stroke(line)}><title>{escape(line.method)}</title></path>'


def _marks(line: _Line, panel: _Panel) -> list[str]:
    """Its shape at its end and on the way."""
    xs = [panel.x(items) for items in line.items]
    # Where lines lie on each other the places show it, so no two methods have the same (0.382: the golden section).
    offset = (0.5 + line.number * 0.382) % 1 * _BETWEEN_MARKS
    places = [*np.arange(panel.box.left + offset, xs[-1] - 12, _BETWEEN_MARKS).tolist(), xs[-1]]
    found = []
    for place in places:
        known = [quality for x, quality in zip(xs, line.median, strict=True) if x <= place]
        if known and panel.box.top <= panel.y(known[-1]):
            found.append(mark(line.number, place, panel.y(known[-1])))
    return found


def _target(target: Target, panel: _Panel, row: int) -> list[str]:
    """The thin line and this row of the legend, unless the peer failed and nothing can be reached."""
    if not math.isfinite(target.quality):
        return []
    y = panel.y(target.quality)
    return [
        f'<path class="target" d="M{panel.box.left} {y:.1f}H{panel.box.right}" stroke="#222"/>',
        *_row(panel, row, 'stroke="#222"', f"target: {target.quality:.4f}"),
    ]


def _legend(lines: Sequence[_Line], panel: _Panel) -> list[str]:
    found = []
    for row, line in enumerate(lines):
        above = panel.y(min(line.median)) < panel.box.top
        found += _row(panel, row, _stroke(line), f"{line.method} (above)" if above else line.method)
        found.append(mark(line.number, panel.box.right + 28, panel.box.top + 8 + _ROW * row))
    return found


def _row(panel: _Panel, row: int, stroke: str, label: str) -> list[str]:
    left, y = panel.box.right + 14, panel.box.top + 8 + _ROW * row
    return [f'<path d="M{left} {y}h28" {stroke}/>', text(left + 36, y + 4, label)]


def _colour(line: _Line) -> str:
    return COLOURS[line.number % len(COLOURS)]


def _stroke(line: _Line) -> str:
    dashes = _DASHES[line.number // len(COLOURS) % len(_DASHES)]
    return f'fill="none" stroke="{_colour(line)}" stroke-width="2" stroke-dasharray="{dashes}"'
