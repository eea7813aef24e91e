"""Output heads of which some models have their own and others take the embedding for it ("tied").

Policy: where any model that takes part has a head of its own, so has the output, and a model that ties
contributes its embedding; the output's config then says so. Where all tie, a copy of the embedding that
some file holds under the head's name is left out, since stock transformers would not read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from search.checkpoints.header import quoted
from search.checkpoints.view import Maker, View
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from search.merge.sources import TensorSource

HEAD = re.compile(
    r"(^|\.)((lm_head|embed_out|output_projection)\.weight|(cls\.predictions|lm_head)\.decoder\.(weight|bias))$"
)
"""Output heads that may be tied to the token embedding, by the names that transformers gives them."""

EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|embed_in|embed|embeddings?|emb|word_embeddings?|tok_embeddings|wte|shared)\.weight$"
)
"""Token embeddings, likewise."""

SCALED_WHEN_TIED = ("t5", "mt5", "umt5", "switch_transformers", "longt5", "pix2struct_text_model")
"""Families that multiply what goes into a tied head by d_model ** -0.5, so that the embedding is no head."""


@dataclass(frozen=True)
class Heads:
    """Models whose heads agree: model name -> view, all with the same heads. The donor's config says so."""

    views: Mapping[str, View]


def tied_heads(config: Mapping[str, Any]) -> bool | None:
    """What a config says about its head; None where it says nothing."""
    said = config.get("tie_word_embeddings")
    inner = config.get("text_config")
    if said is None and isinstance(inner, dict):
        said = inner.get("tie_word_embeddings")
    return said if isinstance(said, bool) else None


def agree_on_heads(views: Mapping[str, View], donor: str) -> Heads:
    """The same heads for all models.

    Raises:
        CheckpointError: a head that a model lacks and that its embedding cannot stand for. Reading the
            tensors raises it where a model ties its head and yet has another one in its files.
    """
    names = dict.fromkeys(name for view in views.values() for name in view.tensors if HEAD.search(name))
    own = [name for name in names if any(_has_own(view, name) for view in views.values())]
    copies = [name for name in names if name not in own]
    found = {model: _with_heads(model, _without(view, copies), own) for model, view in views.items()}
    changed = any(found[model] is not view for model, view in views.items())
    if changed and own and tied_heads(views[donor].config) is not False:
        config = found[donor].config
        found[donor] = replace(found[donor], config={**config, **_untied(config)})
    return Heads(found)


def _has_own(view: View, name: str) -> bool:
    return name in view.tensors and tied_heads(view.config) is not True


def _with_heads(model: str, view: View, names: list[str]) -> View:
    """The view with its embedding as the heads that it ties or lacks."""
    makers = {}
    for name in names:
        if _has_own(view, name):
            continue
        twin = _twin(view, name)
        if twin is None:
            raise CheckpointError(
                f"model '{model}': {view.folder} has no {quoted(name)}, which others have, and no embedding that could "
                "stand for it; save all models with their heads, or all without"
            )
        if view.config.get("model_type") in SCALED_WHEN_TIED:
            raise CheckpointError(
                f"model '{model}': {view.folder} ties its head to its embedding, others do not, and a "
                f"{view.config.get('model_type')} model scales what goes into a tied head; save all models the same way"
            )
        makers[name] = (view.tensors[twin], _reader(view, twin, [name]))
    return view.having(makers) if makers else view


def _without(view: View, copies: list[str]) -> View:
    """The view without heads that are copies of what they are tied to."""
    held = [name for name in copies if name in view.tensors]
    twins: dict[str, list[str]] = {}
    for name in held:
        if (twin := _twin(view, name)) is not None:
            twins.setdefault(twin, []).append(name)
    makers = {twin: (view.tensors[twin], _reader(view, twin, heads)) for twin, heads in twins.items()}
    return view.having(makers, held) if held else view


def _reader(view: View, twin: str, heads: list[str]) -> Maker:
    """Reads what heads are tied to; the first time it looks whether copies of it are what they should be."""
    copies = [name for name in heads if name in view.tensors]
    seen = not copies

    def read(source: TensorSource) -> Tensor:
        import torch

        nonlocal seen
        tensor = source.get(twin)
        for name in () if seen else copies:
            if not torch.equal(source.get(name), tensor):
                raise CheckpointError(
                    f"{view.folder}: config.json ties {quoted(name)} to {quoted(twin)} (tie_word_embeddings), but "
                    "its files hold different numbers for the two; say tie_word_embeddings: false there, or delete one"
                )
        seen = True
        return tensor

    return read


def _twin(view: View, head: str) -> str | None:
    """The tensor that a missing head is tied to."""
    stem, _, kind = head.rpartition(".")
    if kind == "bias":  # of BERT's decoder: that of the head around it
        outer = f"{stem.rpartition('.')[0]}.bias"
        return outer if outer in view.tensors else None
    # Encoder and decoder of T5 may hold copies of what they share.
    found = [name for name in view.tensors if EMBEDDING.search(name) and not name.startswith(("encoder.", "decoder."))]
    found = found or [name for name in view.tensors if EMBEDDING.search(name)]
    return found[0] if len(found) == 1 else None


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    if isinstance(inner, dict):
        changes["text_config"] = {**inner, "tie_word_embeddings": False}
    return changes
