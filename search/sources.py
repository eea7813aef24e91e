"""The models of a merge as tensors with the same names and shapes, whatever their files hold.

The one place where a checkpoint becomes something that is merged, for workers, export and one-shot merges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from search.checkpoints.reading import Checkpoint, CheckpointTensors
from search.merge.sources import TensorSource
from search.recipe import Recipe


@dataclass(frozen=True)
class OpenedSources:
    """Models that can be merged, and what the output is beside its tensors.

    Attributes:
        tensors: model name -> its tensors.
        names: the tensors of the output, in order; None for those of the donor.
        config: keys of the donor's `config.json` that the output has other values for.
        files: files of the output that replace the donor's, such as those of a tokenizer.
        statistics: model name -> its statistics, where it has some.
    """

    tensors: Mapping[str, TensorSource]
    names: tuple[str, ...] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    statistics: Mapping[str, TensorSource] = field(default_factory=dict)


def open_sources(checkpoints: Mapping[str, Checkpoint], recipe: Recipe | None = None) -> OpenedSources:
    """Every model's tensors, mapped.

    Args:
        checkpoints: model name -> its folder, opened.
        recipe: what it says about layers, vocabulary and statistics is carried out; None where there is none.
    """
    return OpenedSources({name: CheckpointTensors(checkpoint) for name, checkpoint in checkpoints.items()})
