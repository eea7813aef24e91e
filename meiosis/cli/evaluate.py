"""`meiosis evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from meiosis.cli.common import debug_option, json_option, note, out, print_json


@click.command("evaluate", epilog="Example: meiosis evaluate samples/text/python --config samples/text/search.yaml")
@click.argument("model")
@click.option("--config", "config", required=True, type=click.Path(path_type=Path), help="Whose evaluators to use.")
@click.option(
    "--items",
    type=click.Choice(["search", "select", "certify"]),
    default="search",
    show_default=True,
    help="Pool of items; what was looked at before choosing a model does not certify it.",
)
@json_option
@debug_option
def command(model: str, config: Path, items: str, as_json: bool) -> None:
    """Score MODEL, a checkpoint folder or hub id, with the evaluators of a config."""
    from search.config import load_config
    from search.evaluate import evaluate_model

    metrics = evaluate_model(model, load_config(config), items, report=note)  # type: ignore[arg-type]  # click.Choice
    if as_json:
        print_json({"model": model, "items": items, "metrics": metrics})
        return
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.6g}")
    # No title, which would be broken where the table ends: a path is to be copied.
    out().print(f"{model} on the {items} items", markup=False, highlight=False, soft_wrap=True)
    out().print(table)
