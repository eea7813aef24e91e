"""`meiosis resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from meiosis.cli.budget import given, limit_options, places_option, pool_options
from meiosis.cli.common import debug_option, find_run, json_option, results_option, run_command
from meiosis.cli.search import show
from meiosis.cli.watch import Watch
from meiosis.cli.workers import make_pool


@click.command("resume", epilog="Example: meiosis resume first --workers 4")
@click.argument("run")
@click.option("--budget", type=int, help="Candidates in all from now on; more than at first extends the run.")
@limit_options
@pool_options
@click.option("--gpus-per-worker", type=float, help="GPUs that a worker reserves from now on.")
@click.option("--device", help="Device of the workers from now on: cpu, cuda, ...")
@places_option
@results_option
@json_option
@debug_option
@run_command
def command(
    run: str,
    budget: int | None,
    item_evaluations: str | None,
    gpu_hours: str | None,
    wall_clock: str | None,
    workers: int | None,
    pool: str | None,
    address: str | None,
    gpus_per_worker: float | None,
    device: str | None,
    places: tuple[Path, ...],
    results: Path,
    as_json: bool,
) -> None:
    """Go on with RUN (a name, a folder or a URL) exactly where it stopped; with a larger budget also after its end."""
    from search.progress import Watcher
    from search.run import resume

    named = {
        "workers": workers,
        "pool": pool,
        "address": address,
        "gpus_per_worker": gpus_per_worker,
        "device": device,
    }
    changes: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    if address == "none":
        changes["address"] = None
    limits = given({"item_evaluations": item_evaluations, "gpu_hours": gpu_hours, "wall_clock": wall_clock})
    if budget is not None:
        limits["budget"] = budget
    folder = find_run(results, run)
    with Watch(quiet=as_json) as watch:
        finished = resume(folder, make_pool, Watcher(watch.line, watch.progress), changes, budget=limits, places=places)
    show(finished, as_json)
