"""`meiosis status RUN --watch`: a run from outside, from its folder alone."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import click

from meiosis.cli.common import out
from meiosis.cli.run_lines import exported, front_lines, nodes, pace, workers_table
from meiosis.cli.watch import duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from search.status import RunStatus
    from search.store.run_folder import RunFolder

LINES_BESIDE_WORKERS = 16
"""Of the terminal's height, what the rest of the picture needs."""


def watch_run(folder: RunFolder, every: float, *, as_json: bool) -> None:
    """Show a run every so many seconds, until it is finished or the user has seen enough (Ctrl-C).

    A picture that is drawn anew on a terminal; elsewhere a line, or with `as_json` an object on one line, for every
    change. A run that is stopped is watched on: somebody may resume it.

    Raises:
        MeiosisError: the run is damaged.
    """
    try:
        if sys.stdout.isatty() and not as_json:
            _draw(folder, every)
        else:
            _tell(folder, every, as_json)
    except KeyboardInterrupt:
        return  # the only way to end the watch of a run that goes on, so no failure


def _draw(folder: RunFolder, every: float) -> None:
    from rich.live import Live

    from search.status import run_status
    from search.store.following import Follower

    console, follower = out(), Follower(folder.history)
    status = run_status(folder, follower)
    with Live(_picture(status, console), console=console, auto_refresh=False, transient=False) as live:
        while status.state != "finished":
            time.sleep(every)
            status = run_status(folder, follower)
            live.update(_picture(status, console), refresh=True)


def _tell(folder: RunFolder, every: float, as_json: bool) -> None:
    from search.status import run_status
    from search.store.following import Follower

    follower, before = Follower(folder.history), ""
    while True:
        status = run_status(folder, follower)
        mark = f"{status.state} {status.done} {status.phase} {status.phase_done} {status.model} {status.warnings}"
        if mark != before:
            before = mark
            click.echo(json.dumps(asdict(status), default=str) if as_json else line_of(status))
            sys.stdout.flush()
        if status.state == "finished":
            return
        time.sleep(every)


def line_of(status: RunStatus) -> str:
    """All of it in a line."""
    parts = [f"{status.name}: {status.state}, {status.done}/{status.budget} candidates"]
    if status.state == "running" and status.phase in ("select", "certify"):
        parts.append(f"{status.phase} {status.phase_done}/{status.phase_total}")
    if status.best_loss is not None:
        parts.append(f"best {status.best_loss:.4f} ({status.best_origin} {status.best_candidate})")
    if status.hypervolume is not None:
        parts.append(f"front {status.front}, hypervolume {status.hypervolume:.4f}")
    if status.workers_wanted is not None and status.workers_busy is not None:
        parts.append(f"{status.workers_busy}/{status.workers_wanted} workers busy")
    if status.use is not None and status.use.busy is not None:
        parts.append(f"utilisation {100 * status.use.busy:.0f} %")
    if status.trials_per_hour is not None:
        parts.append(f"{status.trials_per_hour:.0f} per hour")
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    if failed := sum(status.failures.values()):
        parts.append(f"{failed} failed")
    return ", ".join(parts)


def _picture(status: RunStatus, console: Console) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    def text(line: str, style: str = "") -> Text:
        return Text(line, style=style, overflow="ellipsis", no_wrap=True)

    done = f"{status.done} of {status.budget} candidates told"
    rows: list[RenderableType] = [
        text(f"Run {status.name}: {status.state}, {done}", "bold"),
        ProgressBar(total=max(1, status.budget), completed=status.done, width=min(60, console.width)),
    ]
    rows += [text(line) for line in pace(status)]
    if status.best_loss is not None:
        best = f"trial {status.best_candidate} ({status.best_origin}), loss {status.best_loss:.4f}"
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(status.best_metrics.items()))
        rows += [text(f"Best so far: {best}"), text(f"  {metrics}")]
    rows += [text(line) for line in front_lines(status)]
    if status.use is not None:
        rows.append(workers_table(status.uses, status.use, max(1, console.height - LINES_BESIDE_WORKERS)))
    if status.workers is not None and status.state == "running":
        troubled = replace(status.workers, nodes=tuple(n for n in status.workers.nodes if n.state != "in use"))
        rows += [text(line) for line in nodes(troubled, running=True)]
    for message, count in list(status.failures.items())[:3]:
        rows.append(text(f"Failed: {count} x {message}", "red"))
    rows += [text(line, "yellow") for line in status.warnings]
    if status.verdict:
        rows.append(Text(status.verdict))
    if status.model and status.state == "finished":
        rows.append(text(exported(status)))
    if status.state == "stopped":
        rows.append(text(f"Go on with: meiosis resume {status.path}"))
    elif status.state == "running":
        rows.append(text("Ctrl-C ends this view, not the run", "dim"))
    return Group(*rows)
