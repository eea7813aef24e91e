"""`meiosis status`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meiosis.cli.common import debug_option, find_run, json_option, out, print_json, results_option
from meiosis.cli.run_lines import exported, front_lines, nodes, pace, workers_table

if TYPE_CHECKING:
    from search.status import RunStatus


@click.command("status", epilog="Example: meiosis status first --watch")
@click.argument("run", required=False)
@click.option(
    "--watch", is_flag=True, help="Show RUN again and again until it is finished, or Ctrl-C; changes nothing."
)
@click.option(
    "--every",
    type=click.FloatRange(min=0.1, max=3600),
    default=2.0,
    show_default=True,
    help="Seconds between two looks of --watch.",
)
@results_option
@json_option
@debug_option
def command(run: str | None, watch: bool, every: float, results: Path, as_json: bool) -> None:
    """List the runs, or show progress, best, failures, workers and nodes of RUN."""
    from search.status import run_status, status_or_damage
    from search.store.run_folder import RunFolder

    if watch:
        from evaluators.errors import UserError
        from meiosis.cli.watch_run import watch_run
        from search.store.urls import is_url

        if run is None:
            names = ", ".join(folder.name for folder in RunFolder.list_runs(results))
            raise UserError(f"--watch needs the name of a run; {results} has {names or 'none'}")
        if is_url(run):
            raise UserError(f"--watch needs a folder in which a driver works; look at {run} without --watch")
        watch_run(RunFolder.find(results, run), every, as_json=as_json)
        return
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
    for name, told in status.arms.items():
        console.print(f"Compared with {name.replace('_', ' ')}: {told} candidates told", soft_wrap=True)
    for line in (*front_lines(status), *pace(status)):
        console.print(line, soft_wrap=True)
    if status.use is not None:
        console.print(workers_table(status.uses, status.use))
    lines = [f"Failed: {count} x {message}" for message, count in status.failures.items()]
    if status.workers is not None and status.state != "finished":
        lines += nodes(status.workers, running=status.state == "running")
    lines += [f"Copied to node {n}: {b / 2**20:,.1f} MiB of models and data" for n, b in status.copied_bytes.items()]
    for line in (*lines, *status.warnings):
        console.print(line, soft_wrap=True)
    if status.verdict:
        console.print(status.verdict, soft_wrap=True)
    if status.model:
        console.print(exported(status), soft_wrap=True)
    if status.state == "stopped":
        console.print(f"Go on with: meiosis resume {status.path}", soft_wrap=True)


def _amount(name: str, value: float) -> str:
    from search.limits import duration as as_typed

    return as_typed(round(value, 1)) if name == "wall_clock" else f"{value:,.4g}" if value % 1 else f"{value:,.0f}"
