"""The front of a finished run, for people: a section of the report, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.candidate import SEARCHED
from search.pareto.finals import final_fronts, origins_of
from search.pareto.front import Front, FrontPoint, feasible_points
from search.store.atomic import write_atomic

if TYPE_CHECKING:
    from search.driver import Driver

PICTURE = "front.html"
"""File of the run folder with the picture of the front."""
MOST_ROWS = 200
"""Points that the report lists."""


def front_section(driver: Driver, winner: int) -> list[str]:
    """Lines of Markdown: the hypervolume, and the points on the search and on the select items."""
    searched, selected = final_fronts(driver)
    lines = ["## Front", "", _volumes(driver, searched), ""]
    for front in (searched, selected):
        if front.points:
            lines += [f"Points that nothing beats in every term, on the {front.items} items:", ""]
            lines += [*_table(front, winner), ""]
    return lines


def _volumes(driver: Driver, searched: Front) -> str:
    """How much the search added to generation 0."""
    before = [point for point in searched.points if point.origin != SEARCHED]
    points = feasible_points(
        driver.trials.values(), driver.population.objective, origins_of(driver.population.candidates), "search"
    )
    zero = Front("search", searched.metrics, tuple(p for p in points if p.origin != SEARCHED), searched.reference)
    volume = searched.hypervolume()
    if volume is None or searched.reference is None:
        return "No parent was scored, so the front has no hypervolume."
    corner = ", ".join(f"{value:g}" for value in searched.reference)
    return (
        f"Hypervolume on the search items: {volume:.4f}, of generation 0 alone {zero.hypervolume() or 0.0:.4f} "
        f"(normalised losses up to the reference point {corner}: the worst parent of each term and a tenth of the "
        f"distance to the best). {len(searched.points)} points, {len(before)} of them parents or baselines."
    )


def _table(front: Front, winner: int) -> list[str]:
    lines = [
        f"| trial | origin | {' | '.join(front.metrics)} |",
        f"|--:|---|{'--:|' * len(front.metrics)}",
    ]
    for point in front.points[:MOST_ROWS]:
        chosen = " (chosen)" if point.candidate == winner else ""
        figures = " | ".join(f"{point.metrics[name]:.6g}" for name in front.metrics)
        lines.append(f"| {point.candidate} | {point.origin}{chosen} | {figures} |")
    if len(front.points) > MOST_ROWS:
        lines += ["", f"And {len(front.points) - MOST_ROWS} more."]
    return lines


def write_picture(driver: Driver, winner: int, path: Path) -> bool:
    """Write the front as an HTML page that needs no network; only where there are two or three terms.

    Returns:
        Whether there is a picture.
    """
    objective, candidates = driver.population.objective, driver.population.candidates
    names = [term.metric for term in objective.terms]
    if len(names) not in (2, 3):
        return False
    import plotly.graph_objects as go

    searched, selected = final_fronts(driver)
    trials = list(driver.trials.values())
    every = feasible_points(trials, objective, origins_of(candidates), "search")
    kept = {point.candidate for point in searched.points}
    groups: list[tuple[str, Sequence[FrontPoint], str, str]] = [
        ("other trials", [p for p in every if p.candidate not in kept and p.origin == SEARCHED], "#b8bfc9", "circle"),
        ("parents and baselines", [p for p in every if p.origin != SEARCHED], "#c2703d", "square"),
        ("front, search items", searched.points, "#2b6cb0", "circle"),
        ("front, select items", selected.points, "#2f855a", "diamond"),
        ("chosen, select items", [p for p in selected.points if p.candidate == winner], "#c53030", "x"),
    ]
    figure = go.Figure([_trace(go, *group, names=names) for group in groups if group[1]])
    axes = {axis: {"title": {"text": name}} for axis, name in zip(("xaxis", "yaxis", "zaxis"), names, strict=False)}
    figure.update_layout(title={"text": "Front"}, template="plotly_white")
    figure.update_layout(**(axes if len(names) == 2 else {"scene": axes}))
    page = figure.to_html(include_plotlyjs=True, full_html=True, div_id="front")
    write_atomic(path, page.encode())
    return True


def _trace(go: Any, label: str, points: Sequence[FrontPoint], colour: str, symbol: str, *, names: list[str]) -> Any:
    axes = {axis: [point.metrics[name] for point in points] for axis, name in zip(("x", "y", "z"), names, strict=False)}
    text = [f"trial {point.candidate} ({point.origin})" for point in points]
    marker = {"color": colour, "symbol": symbol, "size": 4 if len(names) == 3 else 8}
    kind = go.Scatter3d if len(names) == 3 else go.Scatter
    return kind(**axes, mode="markers", name=label, text=text, marker=marker)
