"""`meiosis search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from meiosis.cli.budget import given, limit_options
from meiosis.cli.common import debug_option, json_option, note, out, print_json, run_command
from meiosis.cli.memory import refuse_at_once
from meiosis.cli.watch import Watch
from meiosis.cli.workers import early_ray, make_pool

if TYPE_CHECKING:
    from search.run import Finished


@click.command("search", epilog="Example: meiosis search samples/text/search.yaml --run first --workers 2")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--run", "name", help="Name of the run; by default the name in the config and the time.")
@click.option("--budget", type=int, help="Candidates to evaluate, generation 0 included.")
@limit_options
@click.option("--workers", type=int, help="Candidates evaluated at once; sets the window where the config does not.")
@click.option("--address", help="Ray cluster to join; by default one is started here.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a value of the config.")
@json_option
@debug_option
@run_command
def command(
    config: Path,
    name: str | None,
    budget: int | None,
    item_evaluations: str | None,
    gpu_hours: str | None,
    wall_clock: str | None,
    workers: int | None,
    address: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Search for the best merge that CONFIG describes, certify it and export it.

    Ctrl-C stops cleanly and prints how to resume.
    """
    import json

    from search.config import load_config
    from search.progress import Watcher
    from search.setup import check

    limits = given({"item_evaluations": item_evaluations, "gpu_hours": gpu_hours, "wall_clock": wall_clock})
    named = {"search.budget": budget, "cluster.workers": workers, "cluster.address": address}
    values = {key: None if value == "none" else value for key, value in named.items() if value is not None}
    values |= {f"search.limits.{key}": value for key, value in limits.items()}
    loaded = load_config(config, (*overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())))
    with early_ray(loaded.config) as start_ray:
        setup = check(loaded, report=note, sound=start_ray)
        refuse_at_once(setup)
        from search.run import start  # more to import, while Ray starts

        with Watch(quiet=as_json) as watch:
            finished = start(setup, make_pool, Watcher(watch.line, watch.progress), name)
    show(finished, as_json)


def show(finished: Finished, as_json: bool) -> None:
    """Print the verdict: the table, what follows from it and where the model is."""
    from meiosis.cli.tables import verdict_table

    if as_json:
        print_json(
            {
                "run": str(finished.folder.path),
                "model": str(finished.model),
                "verdict": finished.verdict.to_dict(),
            }
        )
        return
    console = out()
    console.print(verdict_table(finished.verdict, console.width))
    console.print(finished.verdict.sentence(), soft_wrap=True)
    console.print(f"Exported model: {finished.model}", soft_wrap=True)
    console.print(f"Report: {finished.folder.report}", soft_wrap=True)
    if finished.verdict.missing:
        arms = f"meiosis certify {finished.folder.address}"
        console.print(f"To compare it with what is missing: {arms}", soft_wrap=True)
    if finished.folder.remote is not None:
        console.print(f"All of it is at {finished.folder.remote} as well.", soft_wrap=True)
