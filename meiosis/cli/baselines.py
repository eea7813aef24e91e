"""`meiosis baselines`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import debug_option, json_option, note, run_command
from meiosis.cli.memory import refuse_at_once
from meiosis.cli.search import show
from meiosis.cli.watch import Watch
from meiosis.cli.workers import early_ray, make_pool


@click.command(
    "baselines", epilog="Example: meiosis baselines samples/text/search.yaml --only uniform_soup --only ties"
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--only", multiple=True, metavar="NAME", help="Only this baseline; repeat for more. Parents always are in."
)
@click.option("--run", "name", help="Name of the run; by default the name in the config and the time.")
@click.option("--workers", type=int, help="Candidates evaluated at once.")
@click.option("--address", help="Ray cluster to join; by default one is started here.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a value of the config.")
@json_option
@debug_option
@run_command
def command(
    config: Path,
    only: tuple[str, ...],
    name: str | None,
    workers: int | None,
    address: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Evaluate parents and baselines of CONFIG, choose among their settings and certify the best; search nothing.

    The run is one like any other, on the same models, items and workers; it can be resumed and exported from.
    """
    import json

    from search.config import load_config
    from search.progress import Watcher
    from search.run import start
    from search.setup import check

    named = {"cluster.workers": workers, "cluster.address": address}
    given = [f"{key}={value}" for key, value in named.items() if value is not None]
    loaded = load_config(config, (*overrides, *given, "search.baselines_only=true"))
    if only:
        options = {entry.name: entry.options for entry in loaded.config.search.baselines}
        chosen = [{one: options[one]} if options.get(one) else one for one in dict.fromkeys(only)]
        overrides = (*overrides, f"search.baselines={json.dumps(chosen)}")
        loaded = load_config(config, (*overrides, *given, "search.baselines_only=true"))
    with early_ray(loaded.config) as start_ray:
        setup = check(loaded, report=note, sound=start_ray)
        refuse_at_once(setup)
        with Watch(quiet=as_json) as watch:
            finished = start(setup, make_pool, Watcher(watch.line, watch.progress), name)
    show(finished, as_json)
