"""`meiosis status`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meiosis.cli.common import debug_option, find_run, json_option, out, print_json, results_option

if TYPE_CHECKING:
    from search.status import RunStatus
    from search.store.nodes_file import WorkersState


@click.command("status", epilog="Example: meiosis status first")
@click.argument("run", required=False)
@results_option
@json_option
@debug_option
def command(run: str | None, results: Path, as_json: bool) -> None:
    """List the runs, or show progress, best, failures, workers and nodes of RUN."""
    from search.status import run_status, status_or_damage
    from search.store.run_folder import RunFolder

    if run is None:
        found = [status_or_damage(folder) for folder in RunFolder.list_runs(results)]
    else:
        found = [run_status(find_run(results, run))]
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
    for name, limit in status.limits.items():
        console.print(f"Limit {name}: {_amount(name, status.used[name])} of {_amount(name, limit)} used.")
    if status.ended_by:
        console.print(status.ended_by)
    if status.best_loss is not None:
        best = f"trial {status.best_candidate} ({status.best_origin}), loss {status.best_loss:.4f}"
        console.print(f"Best on the search items: {best}")
        for name, value in sorted(status.best_metrics.items()):
            console.print(f"  {name} {value:.4f}")
    for message, count in status.failures.items():
        console.print(f"Failed: {count} x {message}", soft_wrap=True)
    if status.workers is not None and status.state != "finished":
        _show_workers(status.workers, running=status.state == "running")
    if status.verdict:
        console.print(status.verdict, soft_wrap=True)
    if status.model:
        console.print(f"Exported model: {status.model}", soft_wrap=True)
    if status.state == "stopped":
        console.print(f"Go on with: meiosis resume {status.path}", soft_wrap=True)


def _show_workers(workers: WorkersState, *, running: bool) -> None:
    console = out()
    when = "" if running else f" when it stopped, {workers.written_at}"
    console.print(f"Workers: {workers.up} of at most {workers.wanted} up{when}")
    for node in workers.nodes:
        state = f"{node.state} until {node.until}" if node.until and node.state == "set aside" else node.state
        if node.until and node.state == "draining":
            state = f"{node.state}, goes at {node.until}"
        counts = f"{_count(len(node.workers), 'worker')}, {_count(node.deaths, 'death')}"
        why = f": {node.why}" if node.why else ""
        console.print(f"  node {node.host} ({node.id}): {state}, {counts}{why}", soft_wrap=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _amount(name: str, value: float) -> str:
    from search.budget import duration

    return duration(round(value, 1)) if name == "wall_clock" else f"{value:,.4g}" if value % 1 else f"{value:,.0f}"
