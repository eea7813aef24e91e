"""`meiosis evaluators`."""

from __future__ import annotations

import click

from meiosis.cli.common import debug_option, json_option, out, print_json


@click.command("evaluators", epilog="Example: meiosis evaluators --json")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """List the evaluators that are installed, with metrics, options and one-line help."""
    from dataclasses import asdict

    from evaluators.registry import EVALUATORS

    found = dict(EVALUATORS)
    if as_json:
        print_json(
            {
                name: {
                    "help": plugin.help,
                    "source": plugin.source,
                    "architectures": list(plugin.architectures),
                    "metrics": {metric: asdict(meaning) for metric, meaning in plugin.metrics.items()},
                    "options": plugin.Options.model_json_schema(),
                }
                for name, plugin in found.items()
            }
        )
        return
    from rich.table import Table

    table = Table(title="Evaluators", title_justify="left", show_lines=True)
    for column in ("evaluator", "what it does", "metrics", "options"):
        table.add_column(column)
    for name, plugin in found.items():
        metrics = [f"{metric} ({meaning.direction})" for metric, meaning in plugin.metrics.items()]
        options = [f"{key}: {field.description or ''}" for key, field in plugin.Options.model_fields.items()]
        table.add_row(name, f"{plugin.help}\n{plugin.source}".strip(), "\n".join(metrics), "\n".join(options))
    out().print(table)
