"""The arithmetic of LoRA and DoRA: what an adapter makes of one tensor of its base."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from search.checkpoints.header import quoted
from search.checkpoints.view import Spec
from search.errors import CheckpointError
from search.torch_threads import one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from search.checkpoints.reading import Checkpoint
    from search.merge.sources import TensorSource


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one tensor.

    Attributes:
        a, b: the factors, by their names in the adapter; None for `a` where `b` alone is added (a bias).
        scale: what their product is multiplied by.
        turned: whether the tensor is (in, out), as those of GPT-2 and embeddings are.
        magnitude: DoRA's norms, one per output.
    """

    a: str | None
    b: str
    scale: float
    turned: bool = False
    magnitude: str | None = None

    def check(self, adapter: Checkpoint, target: str, shape: tuple[int, ...], specs: Mapping[str, Spec]) -> None:
        """Raise `CheckpointError` if the factors do not make a tensor of this shape."""
        b = specs[self.b].shape
        if self.a is None:
            fits = b == shape
            found = f"{list(b)}"
        else:
            a = specs[self.a].shape
            inner, outer = math.prod(a[1:]), b[0] if b else 0
            wanted = (shape[1], shape[0]) if self.turned and len(shape) == 2 else shape
            fits = bool(a and b) and b[1:2] == a[:1] and math.prod(b[2:]) == 1
            fits = fits and (outer, inner) == (wanted[0], math.prod(wanted[1:]))
            fits = fits and (self.magnitude is None or math.prod(specs[self.magnitude].shape) == outer)
            found = f"{list(a)} and {list(b)}"
        if not fits:
            raise CheckpointError(
                f"{adapter.folder}: its factors of {quoted(target)} have shapes {found}, which do not fit "
                f"{list(shape)} of the base; name the model that the adapter was trained on{trained_on(adapter)}"
            )

    def apply(self, weight: Tensor, files: TensorSource) -> Tensor:
        """A new tensor in float32, or float64 where the weight is: W + scale * B A (Hu 2021, eq. 3), with DoRA
        m (W + scale * B A) / norm of each row (Liu 2024, https://arxiv.org/abs/2402.09353, eq. 5)."""
        import torch

        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        b = files.get(self.b).to(dtype)
        if self.a is None:
            return torch.add(weight.to(dtype), b, alpha=self.scale)
        # In one layout and order whatever the shape: B A, then onto the weight.
        with one_thread():
            change = b.flatten(1) @ files.get(self.a).to(dtype).flatten(1)
        change = change.mul_(self.scale)
        view = weight.to(dtype).T if self.turned else weight.to(dtype).reshape(change.shape)
        changed = change.add_(view)
        if self.magnitude is not None:
            with one_thread():
                norms = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            changed = changed.mul_(files.get(self.magnitude).to(dtype).reshape(-1, 1) / norms)
        return changed.T.contiguous() if self.turned else changed.view(weight.shape)


def is_turned(shape: tuple[int, ...], factors: tuple[tuple[int, ...], ...], says: bool) -> bool:
    """Whether a weight is (in, out). peft's flag holds for all layers, whatever each of them is."""
    a, b = factors
    if len(shape) != 2 or len(a) != 2 or len(b) != 2:
        return False
    plain, other = shape == (b[0], a[1]), shape == (a[1], b[0])
    return says if plain == other else other


def scale_of(adapter: Checkpoint, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
    config = adapter.config
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    expected = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if not isinstance(alpha, int | float) or not rank or expected != rank:
        raise CheckpointError(
            f"{adapter.folder}: module {quoted(module)} has factors of rank {rank}, adapter_config.json says r = "
            f"{quoted(expected)} and alpha = {quoted(alpha)}; save the adapter again"
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that is the end of a module's name, as peft matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def trained_on(adapter: Checkpoint) -> str:
    """What the config says the base was, for messages: a hint, and no more than that."""
    name = adapter.config.get("base_model_name_or_path")
    return f" (its config says {quoted(name)})" if name else ""
