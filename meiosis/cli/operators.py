"""`meiosis operators`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from meiosis.cli.common import debug_option, json_option, out, print_json
from meiosis.cli.plugins import described

if TYPE_CHECKING:
    from search.merge.operator import Operator


@click.command("operators", epilog="Example: meiosis operators --json")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """List the merge operators that are installed, with parameters and one-line help."""
    from search.registry import OPERATORS

    if as_json:
        print_json({name: described(operator, _data) for name, operator in OPERATORS.listing()})
        return
    from rich.table import Table

    table = Table(title="Operators", title_justify="left", show_lines=True)
    for column in ("operator", "what it does", "parameters (* one value per source)"):
        table.add_column(column)
    for name, operator in OPERATORS.listing():
        row = described(operator, _row)
        table.add_row(name, *([row["error"]] if isinstance(row, dict) else row))
    out().print(table)


def _data(operator: Operator) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "help": operator.help,
        "source": operator.source,
        "needs_base": operator.needs_base,
        "min_sources": operator.min_sources,
        "max_sources": operator.max_sources,
        "parameters": [asdict(parameter) for parameter in operator.parameters],
    }


def _row(operator: Operator) -> tuple[str, str]:
    lines = []
    for parameter in operator.parameters:
        star = "*" if parameter.scope == "source" else ""
        default = "required" if parameter.default is None else f"default {_shown(parameter.default)}"
        lines.append(f"{parameter.name}{star}: {parameter.help} ({default})")
    base = "needs the base" if operator.needs_base else "base not used"
    count = _count(operator.min_sources, operator.max_sources)
    return f"{operator.help}\n{operator.source}\n{count}; {base}", "\n".join(lines)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _count(least: int, most: int | None) -> str:
    if most == least:
        return f"exactly {least} source{'s' if least > 1 else ''}"
    return f"at least {least} source{'s' if least > 1 else ''}"
