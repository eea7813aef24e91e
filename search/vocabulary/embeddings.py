"""Embeddings and heads of models in the rows of the output's vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from search.checkpoints.header import quoted
from search.checkpoints.heads import EMBEDDING, HEAD
from search.checkpoints.view import Maker, Spec, View
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from search.merge.sources import TensorSource
    from search.vocabulary.rows import Place, Plan, Reads

Compute = Literal["float32", "inputs"]

_BIAS = re.compile(r"(^|\.)(lm_head|embed_out|cls\.predictions(\.decoder)?)\.bias$")


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """The number of rows that a config says embeddings have."""
    size = config.get("vocab_size")
    inner = config.get("text_config")
    if size is None and isinstance(inner, dict):
        size = inner.get("vocab_size")
    return size if isinstance(size, int) else None


def is_by_token(name: str, view: View) -> bool:
    """Whether a tensor of a model has a row for every token: by its name, and the size of the vocabulary."""
    shape = view.tensors[name].shape
    named = EMBEDDING.search(name) or HEAD.search(name) or _BIAS.search(name)
    return bool(named and shape) and shape[0] == vocabulary_size(view.config)


def by_token(view: View) -> tuple[str, ...]:
    """The tensors of a model that have a row for every token.

    Raises:
        CheckpointError: there is none.
    """
    found = tuple(name for name in view.tensors if is_by_token(name, view))
    if not found:
        raise CheckpointError(
            f"{view.folder}: no embedding has as many rows as config.json says there are tokens "
            f"(vocab_size {vocabulary_size(view.config)}), so `vocabulary` cannot be carried out"
        )
    return found


def with_rows(views: Mapping[str, View], plan: Plan, compute: Compute = "float32") -> dict[str, View]:
    """Every model with the rows of the output in place of its own.

    Args:
        views: the models that the plan was made for.
        compute: as in the recipe.

    Raises:
        CheckpointError: a model whose row another one needs does not have that tensor.
    """
    sources: dict[str, TensorSource] = {}

    def source_of(model: str) -> TensorSource:
        if model not in sources:
            sources[model] = views[model].open()
        return sources[model]

    found = {}
    for model, view in views.items():
        reads = plan.reads[model]
        if list(reads.own) == list(range(vocabulary_size(view.config) or 0)):
            found[model] = view
            continue
        makers: dict[str, tuple[Spec, Maker]] = {}
        needed = {place.model for places in reads.given.values() for place in places}
        for name in by_token(view):
            for other in sorted(needed):
                if name not in views[other].tensors:
                    raise CheckpointError(
                        f"model '{other}': {views[other].folder} has no tensor {quoted(name)}, whose rows '{model}' "
                        "needs for tokens that it lacks; give them a source under vocabulary.tokens"
                    )
            spec = view.tensors[name]
            makers[name] = (Spec(spec.dtype, (plan.count, *spec.shape[1:])), _maker(name, reads, source_of, compute))
        config = _resized(view.config, plan.count)
        found[model] = replace(_opened_once(view, model, source_of).having(makers), config=config)
    return found


def _opened_once(view: View, model: str, source_of: Callable[[str], TensorSource]) -> View:
    return replace(view, opener=lambda: source_of(model))


def _resized(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    changed = dict(config)
    if "vocab_size" in config or not isinstance(config.get("text_config"), dict):
        changed["vocab_size"] = count
    if isinstance(inner := config.get("text_config"), dict) and "vocab_size" in inner:
        changed["text_config"] = {**inner, "vocab_size": count}
    return changed


def _maker(name: str, reads: Reads, source_of: Callable[[str], TensorSource], compute: Compute) -> Maker:
    def make(source: TensorSource) -> Tensor:
        return read_rows(source.get(name), reads, lambda place: source_of(place.model).get(name)[place.row], compute)

    return make


def read_rows(tensor: Tensor, reads: Reads, row_of: Callable[[Place], Tensor], compute: Compute = "float32") -> Tensor:
    """The rows of the output, newly allocated, in the dtype of the tensor.

    Args:
        tensor: (own rows, ...).
        row_of: gives a row of a model.
        compute: `inputs` takes means as torch has them in the dtype of the tensor, else they are in float64.
    """
    import torch

    from search.torch_threads import one_thread

    exact = tensor.dtype if compute == "inputs" else torch.float64
    own = torch.tensor(reads.own)
    out = torch.zeros((len(own), *tensor.shape[1:]), dtype=tensor.dtype)
    have = torch.nonzero(own >= 0).reshape(-1)
    out[have] = tensor.index_select(0, own[have])
    for number, places in reads.given.items():
        if places:
            rows = torch.stack([row_of(place).to(exact) for place in places])
            out[number] = rows.mean(0).to(tensor.dtype)
    if reads.padding:
        real = torch.ones(len(own), dtype=torch.bool)
        real[list(reads.padding)] = False
        if compute == "inputs":
            with one_thread():
                out[list(reads.padding)] = out[real].mean(0)
        else:
            out[list(reads.padding)] = _mean(out, real).to(tensor.dtype)
    return out


def _mean(rows: Tensor, of: Tensor) -> Tensor:
    """The mean of some rows in float64, a few at a time."""
    import torch

    total = torch.zeros(rows.shape[1:], dtype=torch.float64)
    for part, chosen in zip(rows.split(4096), of.split(4096), strict=True):
        total += part[chosen].sum(0, dtype=torch.float64)
    return total / int(of.sum())
