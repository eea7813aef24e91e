"""Training a vision family into an empty folder, in a process of its own (see `vision.py`).

It sets torch's thread count and global seed, which is why it never runs inside the caller's process.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluators.base import ITEM_POOLS
from meiosis.samples.card import file_hashes
from meiosis.samples.pictures import SPLITS, Album, Part, make_album
from meiosis.samples.training import Phase, Report
from meiosis.samples.vision_card import CARD, VERSION, TaskCard, VisionCard, VisionPlan, VisionShape

if TYPE_CHECKING:
    from torch import Tensor

PROBED = 3000
"""Training pictures on which the head of a task is fitted."""


def build_family(folder: Path, *, seed: int, plan: VisionPlan, data: Path | None, digest: str, report: Report) -> None:
    """Train base and fine-tunes and write everything, the card last.

    Args:
        folder: exists and is empty.
        data: see `make_album`.
        digest: hash of the data, for the card.
    """
    import torch

    torch.set_num_threads(1)
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(stage: str) -> None:
        seconds[stage] = round(time.monotonic() - began - sum(seconds.values()), 2)

    album = make_album(data, size=plan.shape.size, items=plan.items, train=plan.train, seed=seed)
    lap("pictures")
    report(f"pictures: {len(album.tasks)} tasks, {seconds['pictures']:.0f} s")
    torch.manual_seed(seed)
    base = new_model(plan.shape)
    general = {name: torch.nn.Linear(plan.shape.hidden, task.classes) for name, task in album.general.items()}
    sets = {name: task.parts["train"] for name, task in album.general.items()}
    train(base, general, sets, plan.base, seed=seed, name="base", report=report)
    lap("base")
    models, heads = {"base": base}, {}
    for number, (name, task) in enumerate(album.tasks.items()):
        # As with the text heads of CLIP: fitted to the base, then frozen, so that what all fine-tunes change can be
        # merged and the heads stay what they are.
        heads[name] = fitted_head(base, task.parts["train"], task.classes)
        models[name] = copy.deepcopy(base)
        part = {name: task.parts["train"]}
        train(models[name], {name: heads[name]}, part, plan.task, seed=seed + number + 1, name=name, report=report)
    lap("tasks")
    accuracy: dict[str, dict[str, dict[str, float]]] = {
        pool: {
            model: {
                task: accuracy_of(models[model], heads[task], album.tasks[task].parts[pool]) for task in album.tasks
            }
            for model in models
        }
        for pool in ITEM_POOLS
    }
    lap("evaluate")
    card = VisionCard(
        version=VERSION,
        seed=seed,
        plan=plan,
        data=digest,
        parameters=sum(parameter.numel() for parameter in base.parameters()),
        tasks={
            name: TaskCard(
                about=task.about,
                classes=task.classes,
                pictures={split: len(task.parts[split]) for split in SPLITS},
            )
            for name, task in album.tasks.items()
        },
        accuracy=accuracy,
        seconds={**seconds, "total": round(time.monotonic() - began, 2)},
        versions={
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("torch", "transformers", "numpy")},
        },
        files={},
    )
    _write(folder, models, heads, album, card)


def new_model(shape: VisionShape) -> Any:
    """A vision transformer without a head. Its pooler, which the class insists on, has one output and is not used."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp,
        image_size=shape.size,
        patch_size=shape.patch,
        pooler_output_size=1,
        hidden_act="gelu",
    )
    return ViTModel(config)


def features(model: Any, x: Any) -> Tensor:
    """(n, hidden), the mean over the patches, of pictures (n, size, size, 3)."""
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() / 127.5 - 1
    found: Tensor = model(pixel_values=pixels).last_hidden_state[:, 1:].mean(1)
    return found


def train(
    model: Any,
    heads: Mapping[str, Any],
    sets: Mapping[str, Part],
    phase: Phase,
    *,
    seed: int,
    name: str,
    report: Report,
) -> None:
    """Train a model in place with AdamW, a linear warm-up and a cosine decay; of several sets, one after the other.

    Heads that want a gradient are trained as well.
    """
    import torch

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    parameters += [p for head in heads.values() for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)
    began, warmup = time.monotonic(), max(1, min(phase.steps // 10, 50))
    turns = {key: _batches(part, phase.batch, seed) for key, part in sets.items()}
    keys, loss = tuple(sets), torch.zeros(())
    for step in range(phase.steps):
        progress = max(0.0, (step - warmup) / max(1, phase.steps - warmup))
        decay = phase.final + (1 - phase.final) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = phase.learning_rate * min((step + 1) / warmup, decay)
        key = keys[step % len(keys)]
        batch = next(turns[key])
        loss = torch.nn.functional.cross_entropy(heads[key](features(model, batch.x)), torch.from_numpy(batch.y))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()
    report(f"{name}: {phase.steps} steps, loss {float(loss.detach()):.2f}, {time.monotonic() - began:.0f} s")


def fitted_head(model: Any, part: Part, classes: int) -> Any:
    """A linear layer on the features of a model, fitted to training pictures and frozen."""
    import torch

    with torch.no_grad():
        x = torch.cat([features(model, part.x[row : row + 500]) for row in range(0, min(len(part), PROBED), 500)])
    y = torch.from_numpy(part.y[: len(x)])
    head = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(x), y) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.requires_grad_(False)


def accuracy_of(model: Any, head: Any, part: Part) -> float:
    """Share of right answers."""
    import torch

    with torch.no_grad():
        right = [
            int((head(features(model, part.x[row : row + 250])).argmax(1).numpy() == part.y[row : row + 250]).sum())
            for row in range(0, len(part), 250)
        ]
    return sum(right) / len(part)


def _batches(part: Part, size: int, seed: int) -> Iterator[Part]:
    """Shuffled anew for every pass over the pictures."""
    random = np.random.default_rng(seed)
    size = min(size, len(part))
    while True:
        order = random.permutation(len(part))
        for start in range(0, len(order) - size + 1, size):
            rows = order[start : start + size]
            yield Part(part.x[rows], part.y[rows])


def _write(folder: Path, models: Mapping[str, Any], heads: Mapping[str, Any], album: Album, card: VisionCard) -> None:
    from safetensors.torch import save_file

    (folder / "heads").mkdir()
    for name, model in models.items():
        model.save_pretrained(folder / name)
        (folder / name / "README.md").write_text(model_readme(name, card), encoding="utf-8")
    for name, task in album.tasks.items():
        save_file(
            {key: value.contiguous() for key, value in heads[name].state_dict().items()},
            folder / "heads" / f"{name}.safetensors",
        )
        (folder / "data" / name).mkdir(parents=True)
        for pool in ITEM_POOLS:
            np.savez_compressed(folder / "data" / name / f"{pool}.npz", x=task.parts[pool].x, y=task.parts[pool].y)
    # safetensors makes its files readable by the owner only; the others follow the umask.
    mode = (folder / "base" / "README.md").stat().st_mode & 0o777
    for path in folder.rglob("*.safetensors"):
        path.chmod(mode)
    final = card.model_copy(update={"files": file_hashes(folder)})
    (folder / CARD).write_text(final.model_dump_json(indent=2) + "\n", encoding="utf-8")


def model_readme(model: str, card: VisionCard) -> str:
    """A short model card for one checkpoint folder."""
    trained = "trained from scratch" if model == "base" else f"fine-tuned from `base` on: {card.tasks[model].about}"
    found = card.accuracy["certify"]
    rows = "\n".join(f"| {task} | {found['base'][task]:.3f} | {found[model][task]:.3f} |" for task in card.tasks)
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [meiosis-sample]
---

# {model}

A sample model of Meiosis: ViTModel, {card.parameters:,} parameters, float32, {trained}. It exists to be merged, not
to be used. The head of a task, in `../heads`, reads the mean over the patches of the last hidden state.

| task | base, accuracy | {model}, accuracy |
|---|---|---|
{rows}

Over the certify pictures, which no training has seen. Remake: `meiosis samples vision DIR --seed {card.seed}`.
"""


def main() -> None:
    """Read the order from stdin (one JSON line), report on stdout."""
    order = json.loads(sys.stdin.readline())
    build_family(
        Path(order["folder"]),
        seed=order["seed"],
        plan=VisionPlan.model_validate(order["plan"]),
        data=Path(order["data"]) if order["data"] else None,
        digest=order["digest"],
        report=lambda line: print(line + "\n", end="", flush=True),
    )
