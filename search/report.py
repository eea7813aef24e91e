"""The report of a finished run: what won, against what, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable

from search.model_card import markdown_table
from search.setup import Setup
from search.store.atomic import write_atomic
from search.store.events import Trial
from search.store.run_folder import RunFolder
from search.utilisation import WorkerUse, together, worker_uses
from search.verdict import Verdict
from search.verdict_text import notes


def write_report(
    folder: RunFolder,
    setup: Setup,
    verdict: Verdict,
    candidates: int,
    ended: str = "",
    trials: Iterable[Trial] = (),
    front: Iterable[str] = (),
) -> None:
    """Write `report.md` into the run folder of a search that evaluated so many candidates in these trials.

    Args:
        ended: sentence that says by what the search ended.
        front: the section on the front of the run.
    """
    objectives = ", ".join(f"{term.metric} (weight {term.weight:g})" for term in setup.config.objectives.terms)
    scaled = "each scaled to best parent 0, worst parent 1"
    unit = scaled if setup.config.objectives.normalize == "parents" else "as they are"
    lines = [
        f"# Run {folder.name}",
        "",
        verdict.sentence(),
        "",
        *([ended, ""] if ended else []),
        f"Objective, smaller is better: {objectives}; {unit}. "
        f"{candidates} candidates, {len(setup.space.genes)} genes, seed {setup.config.seed}.",
        "Certify items: no candidate was scored on them before; of a baseline with several settings, the one that "
        "is best on the select items stands here. Intervals and p-values: paired bootstrap over "
        "documents, 10,000 draws; p corrected for the number of rows (Holm).",
        "",
        markdown_table(verdict),
        "",
        *(line for note in notes(verdict) for line in (note, "")),
        *front,
        *_workers(worker_uses(trials)),
    ]
    write_atomic(folder.report, "\n".join(lines).encode())


def _workers(uses: list[WorkerUse]) -> list[str]:
    """What each worker did, as a table."""
    if not uses:
        return []
    lines = [
        "## Workers",
        "",
        "Busy: the share of the time from a worker's first trial to its last in which it merged or evaluated. "
        "Layers reused: the share of the layers of all forward passes that an earlier candidate had run.",
        "",
        "| worker | node | trials | failed | busy | merge s | evaluate s | read GB | messages MB | layers reused |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for use in [*uses, together(uses)] if len(uses) > 1 else uses:
        busy = "" if use.busy is None else f"{100 * use.busy:.0f} %"
        seconds = f"{use.merge_seconds:.1f} | {use.evaluate_seconds:.1f}"
        reused = "" if use.reused is None else f"{100 * use.reused:.0f} %"
        moved = f"{use.bytes_read / 1e9:.3f} | {use.bytes_moved / 1e6:.2f} | {reused}"
        lines.append(f"| {use.worker} | {use.node} | {use.trials} | {use.failures} | {busy} | {seconds} | {moved} |")
    return [*lines, ""]
