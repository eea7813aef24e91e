"""`meiosis recipe`: recipe files from the shell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meiosis.cli.common import F, check_new_file, debug_option, note, write_text

if TYPE_CHECKING:
    from search.recipe import Recipe


@click.group("recipe", no_args_is_help=False, epilog="Example: meiosis recipe soup python english cpp -o soup.yaml")
def command() -> None:
    """Write the recipe of a common merge, ready for `meiosis merge`.

    Models are folders or hub ids; name=model gives one a name of its own in the recipe.
    """


def _written(make: Callable[[], Recipe], output: Path | None) -> None:
    check_new_file(output)
    write_text(output, make().to_yaml())
    if output is not None:
        note(f"Recipe: {output}; carry it out with: meiosis merge {output} OUT")


def output_option(function: F) -> F:
    """`-o`: where the recipe goes."""
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="File; by default it is printed."
    )(debug_option(function))


def _models(least: int) -> Callable[[F], F]:
    def check(context: click.Context, parameter: click.Parameter, models: tuple[str, ...]) -> tuple[str, ...]:
        if len(models) < least:
            raise click.UsageError(f"expected at least {least} models, found {len(models)}", context)
        return models

    return click.argument("models", nargs=-1, required=True, metavar="MODEL...", callback=check)


def _numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"found '{text}', expected numbers with commas, such as 0,0.3,1", context) from None


@command.command("soup", epilog="Example: meiosis recipe soup python english cpp -o soup.yaml")
@_models(1)
@click.option("--weights", callback=_numbers, metavar="W,W,...", help="One per model; by default the plain mean.")
@output_option
def soup_command(models: tuple[str, ...], weights: tuple[float, ...], output: Path | None) -> None:
    """The mean of models, or their weighted mean."""
    from search.recipe_making import soup

    _written(lambda: soup(models, weights), output)


@command.command("add", epilog="Example: meiosis recipe add --base base python english --scale 0.4")
@click.option("--base", required=True, help="Model that the others were tuned from.")
@click.option("--scale", default=0.4, show_default=True, help="Factor on the sum of the task vectors.")
@_models(1)
@output_option
def add_command(base: str, scale: float, models: tuple[str, ...], output: Path | None) -> None:
    """Task arithmetic: the base plus SCALE times the sum of the task vectors."""
    from search.recipe_making import add

    _written(lambda: add(base, models, scale), output)


@command.command("negate", epilog="Example: meiosis recipe negate --base base python --scale 1")
@click.option("--base", required=True, help="Model that the others were tuned from.")
@click.option("--scale", default=1.0, show_default=True, help="How much of the task vectors is taken away.")
@_models(1)
@output_option
def negate_command(base: str, scale: float, models: tuple[str, ...], output: Path | None) -> None:
    """Task arithmetic: the base without what the models learned."""
    from search.recipe_making import add

    _written(lambda: add(base, models, -scale), output)


@command.command("analogy", epilog="Example: meiosis recipe analogy --a formal --b casual --c formal-french")
@click.option("--a", "a", required=True, help="A is to B ...")
@click.option("--b", "b", required=True, help="... as A is to B ...")
@click.option("--c", "c", required=True, help="... so C is to what is made.")
@click.option("--base", help="Start from here: base + SCALE (C + B - A), as task vectors.")
@click.option("--scale", default=1.0, show_default=True, help="Without a base: C + SCALE (B - A).")
@output_option
def analogy_command(a: str, b: str, c: str, base: str | None, scale: float, output: Path | None) -> None:
    """Task arithmetic: A is to B as C is to what is made."""
    from search.recipe_making import analogy

    _written(lambda: analogy(a, b, c, scale, base), output)


@command.command("slerp", epilog="Example: meiosis recipe slerp python english --t 0.5 --t-curve 0,0.3,1")
@click.argument("first")
@click.argument("second")
@click.option("--t", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="0: FIRST, 1: SECOND.")
@click.option("--t-curve", "curve", callback=_numbers, metavar="T,T,...", help="t from the first layer to the last.")
@click.option("--base", help="Interpolate the task vectors from this model instead of the models.")
@output_option
def slerp_command(
    first: str, second: str, t: float, curve: tuple[float, ...], base: str | None, output: Path | None
) -> None:
    """Spherical interpolation; with a curve, tensors outside of the layers take --t."""
    from search.recipe_making import slerp

    for share in curve:
        if not 0.0 <= share <= 1.0:
            raise click.BadParameter(f"found {share:g}, expected 0 (FIRST) to 1 (SECOND)", param_hint="'--t-curve'")
    _written(lambda: slerp(first, second, t, curve, base), output)


@command.command("karcher", epilog="Example: meiosis recipe karcher python english cpp -o mean.yaml")
@_models(1)
@output_option
def karcher_command(models: tuple[str, ...], output: Path | None) -> None:
    """Karcher mean: SLERP for any number of models, in no order."""
    from search.recipe_making import karcher

    _written(lambda: karcher(models), output)
