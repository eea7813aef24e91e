"""Options of the commands that take or change a budget, and of those that go on with a run, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

LIMITS = ("item_evaluations", "gpu_hours", "wall_clock")


def limit_options(function: F) -> F:
    """`--item-evaluations`, `--gpu-hours` and `--wall-clock`: keys of `search.limits`."""
    options = {
        "--wall-clock": "Time of the search over all resumes, finals apart: 8h, 30m, 1h30m; none lifts it.",
        "--gpu-hours": "Hours of workers on candidates, times GPUs per worker; none lifts it.",
        "--item-evaluations": "Search items scored, over all candidates; none lifts it.",
    }
    for name, text in options.items():
        function = click.option(name, metavar="LIMIT", help=text)(function)
    return function


def given(options: Mapping[str, str | None]) -> dict[str, Any]:
    """The limits that the user gave, as YAML would read them: `none` is None."""
    found: dict[str, Any] = {}
    for name, text in options.items():
        if text is None:
            continue
        found[name] = None if text.lower() in ("none", "null") else text if name == "wall_clock" else number(text)
    return found


def number(text: str) -> Any:
    """A number where the text is one; what is none is refused later, with its name."""
    for kind in (int, float):
        try:
            return kind(text.replace(",", "").replace("_", ""))
        except ValueError:
            continue
    return text


def places_option(function: F) -> F:
    """`--models` and `--data`: where to look for what is no longer at its path."""
    return click.option(
        "--models",
        "--data",
        "places",
        multiple=True,
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="Look here, up to two levels deep, for models and data that are no longer where they were; repeat for "
        "more. Models are known by their hash. It is remembered for the run.",
    )(function)


def pool_options(function: F) -> F:
    """`--workers`, `--pool` and `--address` of a run that goes on."""
    kind = click.Choice(["ray", "local"])
    options = (
        click.option("--address", help="Ray cluster to join from now on; none starts one here."),
        click.option("--pool", type=kind, help="Where they run from now on."),
        click.option("--workers", type=int, help="Workers from now on; what is found does not depend on it."),
    )
    for option in options:
        function = option(function)
    return function
