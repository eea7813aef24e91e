"""`meiosis certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meiosis.cli.budget import places_option, pool_options
from meiosis.cli.common import debug_option, find_run, json_option, results_option, run_command
from meiosis.cli.search import show
from meiosis.cli.watch import Watch
from meiosis.cli.workers import make_pool


@click.command("certify", epilog="Example: meiosis certify first --arms random_search,placebo")
@click.argument("run")
@click.option(
    "--arms",
    "arms",
    default="standard,random_search,placebo",
    show_default=True,
    metavar="NAME,NAME",
    help="standard: standard merges that generation 0 did not have; random_search: at equal item-evaluations; "
    "placebo: the same search over random changes as large as those of the sources.",
)
@pool_options
@places_option
@results_option
@json_option
@debug_option
@run_command
def command(
    run: str,
    arms: str,
    workers: int | None,
    pool: str | None,
    address: str | None,
    places: tuple[Path, ...],
    results: Path,
    as_json: bool,
) -> None:
    """Compare what RUN found with more, on the certify items; its winner stays.

    random_search and placebo cost about as much as the search did, each. What was stopped goes on where it stopped,
    here or with `meiosis resume`; a run whose search is not over finishes it first.
    """
    from search.certificate import arms_named
    from search.progress import Watcher
    from search.run import resume

    named = {"workers": workers, "pool": pool, "address": address}
    changes: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if address == "none":
        changes["address"] = None
    wanted = arms_named([name.strip() for name in arms.split(",")])
    folder = find_run(results, run)
    with Watch(quiet=as_json) as watch:
        finished = resume(folder, make_pool, Watcher(watch.line, watch.progress), changes, places=places, arms=wanted)
    show(finished, as_json)
