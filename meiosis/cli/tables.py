"""Tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from search.finals import Verdict


def verdict_table(verdict: Verdict) -> Table:
    """Each parent, each baseline and the found merge on the certify items."""
    from rich.table import Table

    table = Table(title="On the certify items (smaller is better)", title_justify="left")
    metrics = list(verdict.rows[-1].metrics)
    table.add_column("model")
    for name in ("objective", "95 % interval", *metrics, "winner minus this", "95 % interval", "p (Holm)"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in verdict.rows:
        compared = ["", "", ""]
        if row.difference is not None and row.p is not None:
            interval = f"{row.difference_low:+.4f} to {row.difference_high:+.4f}"
            compared = [f"{row.difference:+.4f}", interval, f"{row.p:.2g}"]
        table.add_row(
            row.label,
            f"{row.value:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            *(f"{row.metrics[name]:.4f}" for name in metrics),
            *compared,
            style="bold" if row.candidate == verdict.winner else None,
            end_section=row is verdict.rows[-2] if len(verdict.rows) > 1 else False,
        )
    return table
