"""The card of an exported model: parents, recipe, metrics, and the command that remakes it."""

from __future__ import annotations

from pathlib import Path

import yaml

from search.checkpoints.reading import Checkpoint
from search.finals import Verdict
from search.population import Candidate
from search.recipe import Recipe
from search.setup import Setup
from search.store.events import Trial


def model_card(
    recipe: Recipe,
    donor: Checkpoint,
    candidate: Candidate | None = None,
    trial: Trial | None = None,
    verdict: Verdict | None = None,
    setup: Setup | None = None,
) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads."""
    parents = sorted({name for rule in recipe.rules for name in rule.sources})
    metadata = {
        # The hub reads these as repositories; folders of a machine are none.
        "base_model": [path for name in parents if (path := _short(recipe.models[name].path)).count("/") == 1],
        "tags": ["merge", "meiosis"],
        "library_name": "transformers",
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", ""]
    lines += [f"# Merge of {', '.join(parents)}", ""]
    operators = sorted({rule.operator for rule in recipe.rules})
    lines += [
        f"A merge of {len(parents)} model(s) with {', '.join(operators)}, made by Meiosis without training. "
        f"Architecture: {donor.architecture or 'unknown'}.",
        "",
        "| parent | checkpoint | sha256 of the weights |",
        "|---|---|---|",
    ]
    for name, ref in recipe.models.items():
        lines.append(f"| {name} | {_short(ref.path)} | {(ref.sha256 or '')[:16]} |")
    lines += ["", f"Recipe hash: `{recipe.hash}`.", ""]
    if candidate is not None:
        lines += [f"Candidate {candidate.id} of the run, origin: {candidate.origin}.", ""]
    if trial is not None and trial.metrics:
        lines += [f"Metrics on the {trial.items} items:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in sorted(trial.metrics.items())]
        lines.append("")
    if verdict is not None:
        lines += [verdict.sentence(), "", markdown_table(verdict), ""]
    if setup is not None:
        lines += [f"Seed of the run: {setup.config.seed}.", ""]
    lines += ["`recipe.yaml` beside this file is the whole merge. To make it again:", ""]
    lines += ["    meiosis merge recipe.yaml OUT", ""]
    return "\n".join(lines)


def markdown_table(verdict: Verdict) -> str:
    """The certify table of a verdict in Markdown."""
    metrics = list(verdict.rows[-1].metrics)
    head = ["model", "objective", "95 % interval", *metrics, "winner minus this", "p (Holm)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in verdict.rows:
        difference = "" if row.difference is None else f"{row.difference:+.4f}"
        p = "" if row.p is None else f"{row.p:.2g}"
        cells = [
            row.label,
            f"{row.value:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            *(f"{row.metrics[name]:.4f}" for name in metrics),
            difference,
            p,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(path: str) -> str:
    """A hub id as it is, a folder by its last part: cards travel, paths of a machine do not."""
    cached = next((part for part in Path(path).parts if part.startswith("models--")), None)
    if cached:  # where huggingface_hub keeps org/name
        return cached.removeprefix("models--").replace("--", "/")
    return Path(path).name if path.startswith((".", "/", "~")) else path
