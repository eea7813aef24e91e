"""Workers, nodes and pace of a run, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meiosis.cli.watch import duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.table import Table

    from search.status import RunStatus
    from search.store.nodes_file import WorkersState
    from search.utilisation import WorkerUse

MOST_ROWS = 20
"""Workers that are shown one by one."""


def exported(status: RunStatus) -> str:
    """Which model a run wrote, and where."""
    which = "" if status.winner is None else f" (trial {status.winner})"
    return f"Exported model{which}: {status.model}"


def nodes(workers: WorkersState, *, running: bool) -> Iterator[str]:
    """Workers and nodes of a run on Ray, a line each."""
    when = "" if running else f" when it stopped, {workers.written_at}"
    yield f"Workers: {workers.up} of at most {workers.wanted} up{when}"
    if workers.others:
        share = f"its share is {_count(workers.share or 0, 'worker')}"
        yield f"Shares the cluster with {', '.join(workers.others)}: {share}"
    for node in workers.nodes:
        state = f"{node.state} until {node.until}" if node.until and node.state == "set aside" else node.state
        if node.until and node.state == "draining":
            state = f"{node.state}, goes at {node.until}"
        counts = f"{_count(len(node.workers), 'worker')}, {_count(node.deaths, 'death')}"
        why = f": {node.why}" if node.why else ""
        yield f"  node {node.host} ({node.id}): {state}, {counts}{why}"


def front_lines(status: RunStatus) -> Iterator[str]:
    """The front of a search for one, on the search items."""
    if status.front is not None and status.hypervolume is not None:
        yield f"Front: {_count(status.front, 'point')}, hypervolume {status.hypervolume:.4f}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def pace(status: RunStatus) -> Iterator[str]:
    """How a run at work gets on, a sentence each."""
    if status.phase is not None and status.phase != "search":
        yield f"Now: {status.phase} items, {status.phase_done} of {status.phase_total} candidates"
    if status.trials_per_hour is not None:
        left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} left"
        yield f"Rate: {status.trials_per_hour:.0f} candidates per hour{left}"
    if status.workers_wanted is not None and status.workers_busy is not None:
        yield f"Busy: {status.workers_busy} of {status.workers_wanted} workers"


def workers_table(uses: Sequence[WorkerUse], use: WorkerUse, most: int = MOST_ROWS) -> Table:
    """What workers did with their time: one by one, as far as there is room, and together."""
    from rich.table import Table

    table = Table()
    for column in ("worker", "node"):
        table.add_column(column, no_wrap=True)
    for column in ("trials", "failed", "busy", "merge s", "evaluate s", "read GB", "messages MB", "reused"):
        table.add_column(column, justify="right", no_wrap=True)
    # Where there are too many, those that were heard of last: the others may be gone.
    shown = list(uses) if len(uses) <= most else sorted(uses, key=lambda one: -one.last_end)[: max(0, most)]
    for one in [*shown, use] if len(uses) > 1 else shown or [use]:
        table.add_row(
            one.worker,
            one.node,
            str(one.trials),
            str(one.failures),
            "" if one.busy is None else f"{100 * one.busy:.0f} %",
            f"{one.merge_seconds:.1f}",
            f"{one.evaluate_seconds:.1f}",
            f"{one.bytes_read / 1e9:.3f}",
            f"{one.bytes_moved / 1e6:.2f}",
            "" if one.reused is None else f"{100 * one.reused:.0f} %",
            style="bold" if one is use else None,
            end_section=bool(shown) and one is shown[-1],
        )
    if len(shown) < len(uses):
        table.caption = f"and {len(uses) - len(shown)} more workers"
    return table
