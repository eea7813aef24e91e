"""What a one-shot merge will do, from headers alone: its tensors, operators, bytes and memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from search.checkpoints.header import TensorInfo, is_floating
from search.checkpoints.reading import Checkpoint
from search.checkpoints.shard_writer import Planned, split
from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.merge.check import bind_rules
from search.recipe import Recipe
from search.sources import OpenedSources

SCRATCH_BYTES = 160 << 20
"""Buffers of blocks, of eight tensors under way at a time."""


HashState = Literal["known", "to be taken", "not asked for"]
"""Of the content hash of a model: the cache has it, the merge takes it, or neither."""


@dataclass(frozen=True)
class PlannedModel:
    """One model of a plan. `dtype` is that of most of its bytes."""

    name: str
    folder: Path
    nbytes: int
    dtype: str
    hash: HashState


@dataclass(frozen=True)
class MergePlan:
    """What a merge will read, do and write.

    Attributes:
        operators: name -> number of output tensors.
        shards: bytes of the tensors of every file.
        bytes_read: of the sources, each tensor once for every rule that reads it.
        bytes_hashed: of models whose hash is to be taken.
        peak_bytes: estimate of the private memory beside that of Python and torch, for operators that go
            block by block.
        peak_bytes_whole: the same for operators that need whole matrices of all models, such as those with
            singular values.
    """

    models: tuple[PlannedModel, ...]
    operators: Mapping[str, int]
    tensors: int
    shards: tuple[int, ...]
    bytes_read: int
    bytes_hashed: int
    peak_bytes: int
    peak_bytes_whole: int

    @property
    def bytes_written(self) -> int:
        return sum(self.shards)


def output_layout(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], opened: OpenedSources) -> list[Planned]:
    """The tensors of the output, in the order in which the donor's files have them.

    Dtypes are the recipe's, or else the donor's; of a tensor that the donor lacks, the first source's.
    """
    donor = checkpoints[recipe.donor].tensors
    names = tuple(opened.tensors[recipe.donor].names) if opened.names is None else opened.names
    rules = recipe.assign(names)
    target = {theirs: ours for ours, theirs in TORCH_NAMES.items()}.get(recipe.dtype or "")
    layout = []
    for name in names:
        model = recipe.donor if name in opened.specs[recipe.donor] else next(iter(rules[name].sources))
        spec = _spec(opened, model, name)
        layout.append(replace(spec, dtype=target) if target and is_floating(spec.dtype) else spec)
    if opened.names is not None:
        return layout
    # Files are read from their beginning to their end.
    return sorted(layout, key=lambda planned: _place(donor.get(planned.name)))


def plan_merge(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    opened: OpenedSources,
    max_shard_bytes: int,
    hashes: Mapping[str, HashState],
) -> MergePlan:
    """The plan of a merge whose recipe fits its models.

    Args:
        hashes: of every model.
    """
    layout = output_layout(recipe, checkpoints, opened)
    rules = recipe.assign([planned.name for planned in layout])
    bound = {id(rule): bound for rule, bound in zip(recipe.rules, bind_rules(recipe), strict=True)}
    bytes_read = blocks = whole = 0
    for planned in layout:
        models = bound[id(rules[planned.name])].models
        bytes_read += sum(_spec(opened, model, planned.name).nbytes for model in models)
        # Three on their way to the file, and two of the largest, or smaller ones of their size, in the making.
        blocks = max(blocks, 5 * planned.nbytes)
        whole = max(whole, 5 * planned.nbytes + 2 * 2 * len(models) * 4 * math.prod(planned.shape))
    planned_models = tuple(
        PlannedModel(name, one.folder, one.nbytes, _main_dtype(one), hashes[name]) for name, one in checkpoints.items()
    )
    return MergePlan(
        models=planned_models,
        operators=dict(Counter(rules[planned.name].operator for planned in layout)),
        tensors=len(layout),
        shards=tuple(sum(planned.nbytes for planned in shard) for shard in split(layout, max_shard_bytes)),
        bytes_read=bytes_read,
        bytes_hashed=sum(model.nbytes for model in planned_models if model.hash == "to be taken"),
        peak_bytes=blocks + SCRATCH_BYTES,
        peak_bytes_whole=whole + SCRATCH_BYTES,
    )


def _place(info: TensorInfo | None) -> tuple[str, int]:
    return ("", 0) if info is None else (str(info.file), info.start)


def _spec(opened: OpenedSources, model: str, name: str) -> Planned:
    """Dtype and shape of a tensor as the merge sees it, without reading it."""
    spec = opened.specs[model][name]
    return Planned(name, spec.dtype, spec.shape)


def _main_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of most of the bytes, as torch calls it."""
    counts: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        counts[info.dtype] += info.nbytes
    return TORCH_NAMES[counts.most_common(1)[0][0]]
