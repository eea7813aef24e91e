"""`meiosis status`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meiosis.cli.common import debug_option, json_option, out, print_json, results_option

if TYPE_CHECKING:
    from search.status import RunStatus


@click.command("status", epilog="Example: meiosis status first")
@click.argument("run", required=False)
@results_option
@json_option
@debug_option
def command(run: str | None, results: Path, as_json: bool) -> None:
    """List the runs, or show progress, best and failures of RUN."""
    from search.status import run_status, status_or_damage
    from search.store.run_folder import RunFolder

    if run is None:
        found = [status_or_damage(folder) for folder in RunFolder.list_runs(results)]
    else:
        found = [run_status(RunFolder.find(results, run))]
    if as_json:
        print_json([asdict(status) for status in found] if run is None else asdict(found[0]))
    elif run is None:
        _list(found, results)
    else:
        _show(found[0])


def _list(found: list[RunStatus], results: Path) -> None:
    console = out()
    if not found:
        console.print(f"No runs in {results}.")
        return
    from rich.table import Table

    table = Table()
    for column in ("run", "state", "candidates", "best loss", "best", "failures", "last result"):
        table.add_column(column)
    for status in found:
        table.add_row(
            status.name,
            status.state,
            f"{status.done}/{status.budget}",
            "" if status.best_loss is None else f"{status.best_loss:.4f}",
            status.best_origin or "",
            str(sum(status.failures.values())),
            status.last_result or "",
        )
    console.print(table)


def _show(status: RunStatus) -> None:
    console = out()
    console.print(f"Run {status.name}: {status.state}, {status.done} of {status.budget} candidates told.")
    if status.best_loss is not None:
        best = f"trial {status.best_candidate} ({status.best_origin}), loss {status.best_loss:.4f}"
        console.print(f"Best on the search items: {best}")
        for name, value in sorted(status.best_metrics.items()):
            console.print(f"  {name} {value:.4f}")
    for message, count in status.failures.items():
        console.print(f"Failed: {count} x {message}", soft_wrap=True)
    for node, nbytes in status.copied_bytes.items():
        console.print(f"Copied to node {node}: {nbytes / 2**20:,.1f} MiB of models and data", soft_wrap=True)
    if status.verdict:
        console.print(status.verdict, soft_wrap=True)
    if status.model:
        console.print(f"Exported model: {status.model}", soft_wrap=True)
    if status.state == "stopped":
        console.print(f"Go on with: meiosis resume {status.path}", soft_wrap=True)
