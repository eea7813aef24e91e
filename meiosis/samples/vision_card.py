"""Plan and card of the vision family: how it is trained, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meiosis.samples.training import Phase

CARD = "card.json"
KIND: Literal["meiosis sample models: vision"] = "meiosis sample models: vision"
VERSION = 2
"""Raise it when a change gives other models or items for the same seed: cached families are rebuilt."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VisionShape(_Model):
    """Size of the models: a vision transformer on colour pictures."""

    size: int = Field(32, ge=16, multiple_of=8, description="height and width of the pictures")
    patch: int = Field(8, ge=2)
    hidden: int = Field(96, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    mlp: int = Field(192, ge=8)


class VisionPlan(_Model):
    """How the family is trained."""

    shape: VisionShape = VisionShape()
    base: Phase = Phase(steps=2500, batch=64, learning_rate=2e-3, final=0.1)
    # With 1e-3 fine-tunes are further apart and 1.4 points better, but merges 1.8 points worse.
    task: Phase = Phase(steps=600, batch=64, learning_rate=4e-4)
    train: int = Field(15_000, ge=16, description="most training pictures of a task")
    # Weights fitted to 150 pictures of a task were hardly better on other pictures than tuned TSV-M, and on 500 even
    # differences of 1.5 points of accuracy, more than merges of this family differ by, are within chance.
    search: int = Field(400, ge=4, description="pictures of a task that drive a search")
    select: int = Field(200, ge=4, description="pictures of a task that choose among the finalists")
    certify: int = Field(2000, ge=4, description="pictures of a task for the number that is reported")

    @property
    def items(self) -> dict[str, int]:
        """Pool -> pictures of a task."""
        return {"search": self.search, "select": self.select, "certify": self.certify}


class TaskCard(_Model):
    """One task."""

    about: str
    classes: int
    pictures: dict[str, int] = Field(description="split -> how many")


class VisionCard(_Model):
    """`card.json`."""

    kind: Literal["meiosis sample models: vision"] = KIND
    version: int
    seed: int
    plan: VisionPlan
    data: str = Field(description="hash of the given data; empty for the digits of scikit-learn alone")
    parameters: int = Field(description="of one model")
    tasks: dict[str, TaskCard]
    accuracy: dict[str, dict[str, dict[str, float]]] = Field(
        description="pool -> model -> task -> share of right answers; `base` has heads fitted on its own features"
    )
    seconds: dict[str, float]
    versions: dict[str, str]
    files: dict[str, str] = Field(description="path inside the folder -> sha256")


def read_vision_card(folder: Path) -> VisionCard | None:
    """The card in a folder; None where there is none that this version of the code can read."""
    try:
        return VisionCard.model_validate_json((folder / CARD).read_bytes())
    except (OSError, ValidationError):
        return None


def search_config(tasks: tuple[str, ...], family: str = ".") -> str:
    """The config of a search over a family, as text.

    Args:
        family: its folder, as the config's own folder sees it.
    """
    lines = [
        "# Find the merge of eight small image models that is best at all eight tasks: the config that",
        "# `meiosis samples vision DIR` puts beside the models, as DIR/search.yaml. Every task has a frozen head,",
        "# which is no part of the merge. Paths start at the folder of this file.",
        "",
        "name: vision",
        "seed: 0",
        "",
        "models:",
        f"  base: {family}/base",
        "  sources:",
        *(f"    {task}: {family}/{task}" for task in tasks),
        "",
        "space:",
        "  operator: tsv_m                     # the strongest of the standard merges here: its weights are searched",
        "  layers_per_group: 1                 # every layer has genes of its own",
        "  split: []                           # one for all of a layer: finer genes fit the search pictures only",
        "  parameters:",
        "    weight: {low: -1, high: 3.5, initial: 0.75}   # one gene per layer and source",
        "    lambda: 1",
        "",
        "evaluators:",
    ]
    for task in tasks:
        lines += [
            f"  {task}:",
            "    use: image_classification",
            "    data:",
            *(f"      {pool}: {family}/data/{task}/{pool}.npz" for pool in ("search", "select", "certify")),
            f"    head: {family}/heads/{task}.safetensors",
            "    pool: mean                        # the head reads the mean over the patches",
        ]
    lines += [
        "",
        "# The mean over the tasks of the loss on the right class, in nats: it tells merges apart that differ too",
        "# little for the accuracy on as many pictures, which is recorded along with it.",
        "objectives:",
        "  normalize: none",
        f"  terms: [{', '.join(f'{task}.nll' for task in tasks)}]",
        "",
        "search:",
        "  optimizer: {name: diagonal_cma, step: 0.1}",
        "  budget: 550                         # candidates, those of generation 0 included",
        "  window: 4                           # candidates in flight: part of the run, like the seed",
        "  fitness: {racing: true, first: 0.25}   # early candidates are scored on some of the pictures only",
        "  # Tuned on the search pictures. The single models always take part.",
        "  baselines: [uniform_soup, blend, greedy_soup, task_arithmetic, slerp, ties, dare_ties, tsv_m, iso_c]",
        "  finalists: 5",
        "",
        "cluster:",
        "  pool: ray                           # `local` runs in one process, without Ray",
        "  workers: 2",
        "  threads: 1                          # CPU threads of a worker",
    ]
    return "\n".join(lines) + "\n"
