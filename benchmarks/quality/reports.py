"""The table and the curves of `search_quality.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from quality.curves import items_to_reach
from quality.methods import PEER
from quality.picture import curves_svg
from quality.runs import Curve
from quality.target import peer_target


@dataclass(frozen=True)
class Row:
    """One method on one landscape or family.

    Attributes:
        genes: how many numbers are searched.
        window: candidates in flight.
        reached: how many seeds came to the quality of the peer.
        items: median item-evaluations until then; infinite where most did not.
        ratio: the peer's divided by these.
        final: median quality at the end.
    """

    family: str
    method: str
    seeds: int
    genes: int
    window: int
    reached: int
    items: float
    ratio: float
    final: float
    items_in_all: float
    seconds: float


def rows(family: str, curves: Sequence[Curve], tolerance: float) -> list[Row]:
    """Every method against the median of what the peer has at its end; `tolerance`: see `peer_target`."""
    methods = list(dict.fromkeys(curve.method for curve in curves))
    target = peer_target(curves, tolerance).quality
    found, peer = [], np.nan
    for method in methods:
        own = [curve for curve in curves if curve.method == method]
        needed = [items_to_reach(curve.steps, curve.quality.__getitem__, target) for curve in own]
        # The upper middle one of an even number: between a number and infinity there is no mean.
        median = float(np.sort(needed)[len(needed) // 2]) if own else np.inf
        if method == PEER:
            peer = median if np.isfinite(median) else float(np.median([curve.items for curve in own]))
        found.append(
            Row(
                family=family,
                method=method,
                seeds=len(own),
                genes=own[0].genes,
                window=own[0].window,
                reached=int(np.isfinite(needed).sum()),
                items=median,
                ratio=peer / median,
                final=float(np.median([curve.final for curve in own])),
                items_in_all=float(np.median([curve.items for curve in own])),
                seconds=float(np.median([curve.seconds for curve in own])),
            )
        )
    return found


def markdown(name: str, found: Sequence[Row], command: str, notes: Sequence[str], tolerance: float) -> str:
    """The table as a page, with the picture that `write` puts beside it under the same name."""
    lines = [
        "# Quality against item-evaluations",
        "",
        "Quality is what the best known candidate is worth on items that no search saw (mean loss, share of wrong",
        "answers, or minus that of right ones; smaller is better). The target is the median quality of CMA-ES as",
        "mergekit-evolve sets it up at the end of its budget, every candidate on all items, but for",
        f"{tolerance:.0%} of what it gained since its first candidate. `items to target`: median over the seeds of the",
        "item-evaluations from which on the best known candidate is that good; `ratio`: those of CMA-ES divided by",
        "them. `genes`: how many numbers are searched; `in flight`: how many candidates are asked for before the",
        "result of the first of them is told.",
        "",
        f"Command: `{command}`",
        "",
        "The picture: medians over the seeds, pale from the lowest seed to the highest. The thin line is the target. A",
        "panel ends at what CMA-ES has at first; `(above)`: never below that.",
        "",
        f"![Median quality of the best known candidate after so many item-evaluations]({name}.svg)",
        "",
        "| family | method | seeds | genes | in flight | reach it | items to target | ratio | final quality "
        "| items in all | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        items = f"{row.items:,.0f}" if np.isfinite(row.items) else "not reached"
        ratio = f"{row.ratio:.1f}" if np.isfinite(row.items) else ""
        lines.append(
            f"| {row.family} | {row.method} | {row.seeds} | {row.genes} | {row.window} | {row.reached} | {items} "
            f"| {ratio} | {row.final:.4f} | {row.items_in_all:,.0f} | {row.seconds:.1f} |"
        )
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join([*lines, ""])


def write(folder: Path, name: str, curves: Mapping[str, Sequence[Curve]], tolerance: float, text: str) -> None:
    """`<name>.md`, the curves as `<name>.svg`, and `<name>.parquet` with every step of every curve."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.svg").write_text(curves_svg(curves, tolerance), encoding="utf-8")
    steps: list[dict[str, Any]] = [
        {
            "family": family,
            "method": curve.method,
            "seed": curve.seed,
            "items": step.items,
            "candidate": step.candidate,
            "quality": curve.quality[step.candidate],
        }
        for family, many in curves.items()
        for curve in many
        for step in curve.steps
    ]
    pq.write_table(pa.Table.from_pylist(steps), folder / f"{name}.parquet", compression="zstd")


def page(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """The median curve of every method, as an html page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(curves), cols=1, subplot_titles=list(curves), vertical_spacing=0.08)
    for number, many in enumerate(curves.values(), 1):
        most = max(curve.items for curve in many)
        grid = np.unique(np.geomspace(50, most, 120).astype(int))
        for method in dict.fromkeys(curve.method for curve in many):
            own = [curve for curve in many if curve.method == method]
            values = np.array([[curve.at(items) for items in grid] for curve in own])
            figure.add_trace(
                go.Scatter(
                    x=grid, y=np.median(values, axis=0), name=method, legendgroup=method, showlegend=number == 1
                ),
                row=number,
                col=1,
            )
    figure.update_xaxes(type="log", title="item-evaluations")
    figure.update_layout(height=420 * len(curves), title="Median quality of the best known candidate")
    figure.write_html(path, include_plotlyjs="cdn")
