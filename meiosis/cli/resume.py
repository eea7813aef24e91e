"""`meiosis resume`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import debug_option, json_option, make_pool, results_option
from meiosis.cli.search import show
from meiosis.cli.watch import Watch


@click.command("resume", epilog="Example: meiosis resume first --workers 4")
@click.argument("run")
@click.option("--workers", type=int, help="Workers from now on; what is searched does not depend on it.")
@click.option("--address", help="Ray cluster to join from now on.")
@results_option
@json_option
@debug_option
def command(run: str, workers: int | None, address: str | None, results: Path, as_json: bool) -> None:
    """Go on with RUN (a name or a folder) exactly where it stopped."""
    from search.run import Watcher, resume
    from search.store.run_folder import RunFolder

    named = {"workers": workers, "address": address}
    changes = {key: value for key, value in named.items() if value is not None}
    folder = RunFolder.find(results, run)
    with Watch(quiet=as_json) as watch:
        finished = resume(folder, make_pool, Watcher(watch.line, watch.progress), changes)
    show(finished, as_json)
