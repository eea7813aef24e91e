"""The report of a finished run: what won, against what, and how sure that is."""

from __future__ import annotations

from search.finals import Verdict
from search.model_card import markdown_table
from search.setup import Setup
from search.store.atomic import write_atomic
from search.store.run_folder import RunFolder


def write_report(folder: RunFolder, setup: Setup, verdict: Verdict, candidates: int, ended: str = "") -> None:
    """Write `report.md` into the run folder of a search that evaluated so many candidates; `ended` says by what."""
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
    ]
    write_atomic(folder.report, "\n".join(lines).encode())
