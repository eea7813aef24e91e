"""`meiosis evaluators`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from meiosis.cli.common import debug_option, json_option, out, print_json
from meiosis.cli.plugins import described

if TYPE_CHECKING:
    from evaluators.base import Evaluator


@click.command("evaluators", epilog="Example: meiosis evaluators --json")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """List the evaluators that are installed, with metrics, options and one-line help."""
    from evaluators.registry import EVALUATORS

    if as_json:
        print_json({name: described(plugin, _data) for name, plugin in EVALUATORS.listing()})
        return
    from rich.table import Table

    table = Table(title="Evaluators", title_justify="left", show_lines=True)
    for column in ("evaluator", "what it does", "metrics", "options"):
        table.add_column(column)
    for name, plugin in EVALUATORS.listing():
        row = described(plugin, _row)
        table.add_row(name, *([row["error"]] if isinstance(row, dict) else row))
    out().print(table)


def _data(plugin: type[Evaluator]) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "help": plugin.help,
        "source": plugin.source,
        "architectures": list(plugin.architectures),
        "metrics": {metric: asdict(meaning) for metric, meaning in plugin.metrics.items()},
        "options": plugin.Options.model_json_schema(),
    }


def _row(plugin: type[Evaluator]) -> tuple[str, str, str]:
    metrics = [f"{metric} ({meaning.direction})" for metric, meaning in plugin.metrics.items()]
    options = [f"{key}: {field.description or ''}" for key, field in plugin.Options.model_fields.items()]
    return f"{plugin.help}\n{plugin.source}".strip(), "\n".join(metrics), "\n".join(options)
