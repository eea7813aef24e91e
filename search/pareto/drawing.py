"""The parts that small pictures are made of: marks, texts and axes of an SVG document."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape

COLOURS = ("#1b4f8a", "#c2571a", "#2e7d4f", "#8a3b8f", "#a88400", "#5f6b7a")
"""Dark enough on white, and apart from each other for those who see no red or green; the shapes differ as well."""

Axis = Callable[[float], float]


@dataclass(frozen=True)
class Box:
    """Where the lines and points of a picture are, in pixels from its upper left corner."""

    left: float
    top: float
    right: float
    bottom: float


def opening(width: int, height: int, title: str) -> list[str]:
    """The first lines of a document: its size in pixels, its name and a white ground; `</svg>` ends it."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]


def axis(low: float, high: float, begin: float, end: float) -> Axis:
    """Value -> pixels: `low` is at `begin`, `high` at `end`."""
    return lambda value: begin + (value - low) / (high - low) * (end - begin)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], four to eight: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [float(f"{k * step:.12g}") for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def grid(box: Box, across: Iterable[tuple[float, str]], up: Iterable[tuple[float, str]]) -> list[str]:
    """A frame with pale lines, each at its place in pixels and with its label, which may be empty."""
    width, height = box.right - box.left, box.bottom - box.top
    lines = [f'<rect x="{box.left}" y="{box.top}" width="{width}" height="{height}" fill="none" stroke="#888"/>']
    for at, label in across:
        lines.append(f'<path d="M{at:.1f} {box.top}V{box.bottom}" stroke="#eee"/>')
        if label:
            lines.append(text(at, box.bottom + 16, label, anchor="middle"))
    for at, label in up:
        lines.append(f'<path d="M{box.left} {at:.1f}H{box.right}" stroke="#eee"/>')
        if label:
            lines.append(text(box.left - 6, at + 4, label, anchor="end"))
    return lines


def mark(number: int, x: float, y: float) -> str:
    """The point of the group of this number: its colour and its shape."""
    r, colour = 4.5, COLOURS[number % len(COLOURS)]
    match number % 3:
        case 0:
            return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" fill="{colour}"/>'
        case 1:
            return f'<rect x="{x - r + 0.5:.1f}" y="{y - r + 0.5:.1f}" width="8" height="8" fill="{colour}"/>'
        case _:
            return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 9.5h-11z" fill="{colour}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 12) -> str:
    """Words on a line; `anchor` is the end of them that is at x: start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'


def upright(x: float, y: float, words: str) -> str:
    """Words from below to above, their middle at (x, y)."""
    return f'<text transform="translate({x:.0f} {y:.0f}) rotate(-90)" text-anchor="middle">{escape(words)}</text>'
