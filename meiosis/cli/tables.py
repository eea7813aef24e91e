"""Tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from search.verdict import Verdict


def verdict_table(verdict: Verdict, width: int) -> Table:
    """Each parent, each baseline and the found merge on the certify items.

    Args:
        width: characters of the terminal; columns for which there is no room are left out, the least important first.
    """
    from rich.table import Table

    metrics = list(verdict.rows[-1].metrics)
    heads = ["model", "objective", "95 % interval", *metrics, "winner minus this", "95 % interval", "p (Holm)"]
    rows = []
    for row in verdict.rows:
        compared = ["", "", ""]
        if row.difference is not None and row.p is not None:
            interval = f"{row.difference_low:+.4f} to {row.difference_high:+.4f}"
            compared = [f"{row.difference:+.4f}", interval, f"{row.p:.2g}"]
        figures = [f"{row.value:.4f}", f"{row.low:.4f} to {row.high:.4f}"]
        rows.append([row.label, *figures, *(f"{row.metrics[name]:.4f}" for name in metrics), *compared])
    shown = list(range(len(heads)))
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    droppable = [*range(2 + len(metrics), 2, -1), 2, len(heads) - 2, len(heads) - 1]
    while sum(widths[index] + 3 for index in shown) + 1 > width and droppable:
        shown.remove(droppable.pop(0))
    table = Table(title="On the certify items (smaller is better)", title_justify="left")
    for index in shown:
        table.add_column(heads[index], justify="right" if index else "left", no_wrap=index > 0, overflow="fold")
    for row, cells in zip(verdict.rows, rows, strict=True):
        table.add_row(
            *(cells[index] for index in shown),
            style="bold" if row.candidate == verdict.winner and not row.arm else None,
            end_section=row is verdict.rows[-2] if len(verdict.rows) > 1 else False,
        )
    if len(shown) < len(heads):
        left_out = dict.fromkeys(heads[index] for index in range(len(heads)) if index not in shown)
        table.caption = f"No room here for: {', '.join(left_out)}. The report has all columns."
    return table
