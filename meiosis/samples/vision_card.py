"""Plan and card of the vision family: how it is trained, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meiosis.samples.training import Phase

CARD = "card.json"
KIND: Literal["meiosis sample models: vision"] = "meiosis sample models: vision"
VERSION = 1
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
    base: Phase = Phase(steps=1500, batch=64, learning_rate=2e-3, final=0.2)
    task: Phase = Phase(steps=500, batch=64, learning_rate=1e-3)
    train: int = Field(15_000, ge=16, description="most training pictures of a task")
    search: int = Field(150, ge=4, description="pictures of a task that drive a search")
    select: int = Field(150, ge=4, description="pictures of a task that choose among the finalists")
    certify: int = Field(500, ge=4, description="pictures of a task for the number that is reported")

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


def search_config(tasks: tuple[str, ...]) -> str:
    """The config of a search over the family, as text."""
    lines = [
        "# Find the merge of eight small image models that is best at all eight tasks: the config that",
        "# `meiosis samples vision DIR` puts beside the models, as DIR/search.yaml. Every task has a frozen head,",
        "# which is no part of the merge. Paths start at the folder of this file.",
        "",
        "name: vision",
        "seed: 0",
        "",
        "models:",
        "  base: ./base",
        "  sources:",
        *(f"    {task}: ./{task}" for task in tasks),
        "",
        "space:",
        "  operator: task_arithmetic",
        "  layers_per_group: 1",
        "  split: [attention, mlp, norm, embedding]",
        "  parameters:",
        "    weight: {low: -0.2, high: 1.4, initial: 0.3}   # one gene per group and source",
        "",
        "evaluators:",
    ]
    for task in tasks:
        pools = ", ".join(f"{pool}: ./data/{task}/{pool}.npz" for pool in ("search", "select", "certify"))
        lines += [
            f"  {task}:",
            "    use: image_classification",
            f"    data: {{{pools}}}",
            f"    head: ./heads/{task}.safetensors",
            "    pool: mean",
        ]
    lines += [
        "",
        "objectives:                           # the mean accuracy over the tasks",
        "  normalize: none",
        f"  terms: [{', '.join(f'{task}.accuracy' for task in tasks)}]",
        "",
        "search:",
        "  optimizer: diagonal_cma",
        "  budget: 600",
        "  finalists: 5",
        "",
        "cluster:",
        "  pool: ray                           # `local` runs in one process, without Ray",
        "  workers: 2",
        "  threads: 1",
    ]
    return "\n".join(lines) + "\n"
