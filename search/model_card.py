"""The card of an exported model: parents, recipe, metrics, and the command that remakes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from search.checkpoints.reading import Checkpoint
from search.recipe import Recipe
from search.verdict_text import notes

if TYPE_CHECKING:
    from search.candidate import Candidate
    from search.setup import Setup
    from search.store.events import Trial
    from search.verdict import Verdict


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
    operators = sorted({rule.operator for rule in recipe.rules})
    used = [name for name in recipe.models if name in parents or name == recipe.base]
    metadata: dict[str, Any] = {
        # Hub ids where they are known: the hub links them. Of a folder only its name: paths do not travel.
        "base_model": list(dict.fromkeys(_short(recipe.models[name].path) for name in used)),
        "base_model_relation": "merge",
        "library_name": "transformers",
        **_pipeline(donor.architecture),
        **_license(donor.folder),
        "tags": ["merge", "meiosis", *(name for name in operators if name not in ("merge", "meiosis"))],
    }
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).strip(), "---", ""]
    lines += [f"# Merge of {', '.join(parents)}", ""]
    lines += [
        f"A merge of {len(parents)} model(s) with {', '.join(operators)}, made by Meiosis without training. "
        f"Architecture: {donor.architecture or 'unknown'}.",
        "",
        "| parent | checkpoint | sha256 of the weights |",
        "|---|---|---|",
    ]
    for name, ref in recipe.models.items():
        placebo = "" if ref.random_delta is None else f", as a placebo of seed {ref.random_delta}"
        lines.append(f"| {name} | {_short(ref.path)}{placebo} | {(ref.sha256 or '')[:16]} |")
    lines += ["", f"Recipe hash: `{recipe.hash}`.", ""]
    if candidate is not None:
        lines += [f"Candidate {candidate.id} of the run, origin: {candidate.origin}.", ""]
    if trial is not None and trial.metrics:
        rough = "" if trial.scored is None else f", estimated from {trial.scored} of them"
        lines += [f"Metrics on the {trial.items} items{rough}:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in sorted(trial.metrics.items())]
        lines.append("")
    if verdict is not None:
        lines += [verdict.sentence(), "", markdown_table(verdict), ""]
        lines += [line for note in notes(verdict) for line in (note, "")]
    if setup is not None:
        lines += [f"Seed of the run: {setup.config.seed}.", ""]
    lines += ["`recipe.yaml` beside this file is the whole merge. To make it again:", ""]
    lines += ["    meiosis merge recipe.yaml OUT", ""]
    return "\n".join(lines)


PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
}
"""End of an architecture's name -> what the hub calls such a model's task."""


def _pipeline(architecture: str | None) -> dict[str, str]:
    task = next((task for end, task in PIPELINES.items() if (architecture or "").endswith(end)), None)
    return {"pipeline_tag": task} if task else {}


def _license(folder: Path) -> dict[str, str]:
    """What the card of the base says of its license: a merge of it is a derived work."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        metadata = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else None
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return {}
    if not isinstance(metadata, dict):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), str)}


def markdown_table(verdict: Verdict) -> str:
    """The certify table of a verdict in Markdown."""
    metrics = list(verdict.rows[-1].metrics)
    head = ["model", "objective", "95 % interval", *metrics, "winner minus this", "95 % interval", "d", "p (Holm)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in verdict.rows:
        difference = "" if row.difference is None else f"{row.difference:+.4f}"
        interval = "" if row.difference is None else f"{row.difference_low:+.4f} to {row.difference_high:+.4f}"
        effect = "" if row.effect is None else f"{row.effect:+.2f} ({row.effect_low:+.2f} to {row.effect_high:+.2f})"
        p = "" if row.p is None else f"{row.p:.2g}"
        cells = [
            row.label,
            f"{row.value:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            *(f"{row.metrics[name]:.4f}" for name in metrics),
            difference,
            interval,
            effect,
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
