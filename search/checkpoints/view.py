"""A model as a merge sees it: names, dtypes and shapes from headers alone, and a way to get at the numbers.

What a folder holds may differ from what is merged: numbers in fp8 with scales beside them, an adapter
without its base, a head that is the embedding. Each such difference is a function from one view to
another; nothing is read before `View.open`, and nothing is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from search.checkpoints.header import is_floating
from search.checkpoints.reading import Checkpoint, CheckpointTensors
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from search.merge.sources import TensorSource


class Spec(NamedTuple):
    """What is known of a tensor without reading it; `dtype` as in safetensors (`BF16`)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        return is_floating(self.dtype)


@dataclass(frozen=True)
class View:
    """A model whose tensors can be listed at once and opened later.

    Attributes:
        checkpoint: the folder it comes from; of an adapter, that of the adapter.
        config: the model's `config.json`, without what does not hold for this view.
        tensors: tensor name -> its shape, and the dtype of an output that takes after it, sorted by name.
            What `open` gives may have more digits than that dtype, never fewer.
        opener: maps the files.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tensors: Mapping[str, Spec]
    opener: Callable[[], TensorSource]

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.checkpoint.folder

    def open(self) -> TensorSource:
        """The tensors, readable.

        Raises:
            CheckpointError: a file is gone or was changed since the checkpoint was opened.
        """
        return self.opener()

    def having(self, makers: Mapping[str, tuple[Spec, Maker]], without: Iterable[str] = ()) -> View:
        """This view with some tensors made on the fly from others, and some left out.

        Args:
            makers: tensor name -> what it is, and what makes it of the tensors of this view.
        """
        dropped = frozenset(without)
        specs = {name: spec for name, spec in self.tensors.items() if name not in dropped}
        specs |= {name: spec for name, (spec, _) in makers.items()}
        specs = {name: specs[name] for name in sorted(specs)}
        made = {name: maker for name, (_, maker) in makers.items()}
        return replace(self, tensors=specs, opener=lambda: _Made(self.open(), tuple(specs), made))


Maker = Callable[["TensorSource"], "Tensor"]
"""Makes one tensor of those of a model."""


class _Made:
    """The tensors of a model, some of them computed whenever they are asked for."""

    def __init__(self, source: TensorSource, names: tuple[str, ...], makers: Mapping[str, Maker]) -> None:
        self._source, self._makers, self.names = source, makers, names

    def get(self, name: str) -> Tensor:
        maker = self._makers.get(name)
        return self._source.get(name) if maker is None else maker(self._source)


def file_view(checkpoint: Checkpoint) -> View:
    """A checkpoint as its files are."""
    specs = {name: Spec(info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    return View(checkpoint, checkpoint.config, specs, lambda: CheckpointTensors(checkpoint))


def require_model(checkpoint: Checkpoint, what: str) -> None:
    """Raise `CheckpointError` for an adapter where a whole model is needed."""
    if checkpoint.kind == "adapter":
        raise CheckpointError(
            f"{checkpoint.folder}: is a LoRA adapter, which cannot be {what}; give the model that it was trained on"
        )
