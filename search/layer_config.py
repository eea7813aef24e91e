"""Configs of models with other layers than their donor's: what counts layers, and what describes them one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from search.errors import RecipeError

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks")
"""What configs call the number of layers."""

_PER_LAYER = re.compile(r"layer|block|attn|attention|heads|types", re.IGNORECASE)
"""Keys whose lists, where they are as long as the model is deep, have an entry for every layer."""

_NUMBERS_OF_LAYERS = ("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")
"""Keys whose lists name layers by number."""

_BY_POSITION = {
    "first_k_dense_replace": 0,
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "moe_layer_interval": 1,
    "interleave_moe_layer_step": 1,
    "expert_layer_period": 1,
    "attn_layer_period": 1,
}
"""Keys by which a layer's kind follows from its number, and the value with which it does not."""


def changed_config(
    configs: Mapping[str, Mapping[str, Any]],
    depths: Mapping[str, int],
    layers: Sequence[Mapping[str, int]],
    donor_model: str,
) -> dict[str, Any]:
    """The keys of the donor's config that count layers or describe them one by one, with their new values.

    Args:
        configs: model name -> its config.
        depths: model name -> number of its layers.
        layers: for every layer of the output, model name -> number of the layer that is read.
        donor_model: the model whose config it is.

    Raises:
        RecipeError: the config does not count the layers, layers of several kinds would be merged, or their
            kinds follow from their numbers.
    """
    donor, depth = configs[donor_model], depths[donor_model]
    changes: dict[str, Any] = {}
    for place in ((), *((key,) for key, value in donor.items() if isinstance(value, dict))):
        part = _at(donor, place)
        changed: dict[str, Any] = {key: len(layers) for key in LAYER_COUNTS if _is_count(part.get(key), depth)}
        if not changed:
            continue
        for key, default in _BY_POSITION.items():
            if part.get(key) not in (None, default) and not isinstance(part[key], list):
                raise RecipeError(
                    f"layers: by {key} = {part[key]} in config.json the kind of a layer follows from its number, "
                    "so layers cannot change places in this architecture"
                )
        kinds = {model: _derived(_at(config, place)) for model, config in configs.items()}
        for key in kinds[donor_model]:
            if (values := _per_layer(key, kinds, depths, layers)) is not None:
                changed[key] = values
        changes |= {place[0]: {**part, **changed}} if place else changed
    if not changes:
        raise RecipeError(
            f"layers: config.json of '{donor_model}' counts its {depth} layers under none of "
            f"{', '.join(LAYER_COUNTS)}, so the output's could not be told"
        )
    return changes


def _per_layer(
    key: str,
    configs: Mapping[str, Mapping[str, Any]],
    depths: Mapping[str, int],
    layers: Sequence[Mapping[str, int]],
) -> list[Any] | None:
    """The value of a key that describes layers one by one; None for other keys."""
    numbers = key in _NUMBERS_OF_LAYERS
    if not numbers and not _PER_LAYER.search(key):
        return None
    described: dict[str, list[Any]] = {}
    for model, config in configs.items():
        value, depth = config.get(key), depths[model]
        if isinstance(value, list) and (numbers or len(value) == depth):
            described[model] = [number in value for number in range(depth)] if numbers else value
    chosen: list[Any] = []
    for index, layer in enumerate(layers):
        kinds = [described[model][number] for model, number in layer.items() if model in described]
        if not kinds:
            return None
        if any(kind != kinds[0] for kind in kinds):
            raise RecipeError(
                f"layers[{index}]: merges layers whose {key} differ ({kinds[0]} and "
                f"{next(kind for kind in kinds if kind != kinds[0])}); merge layers of one kind"
            )
        chosen.append(kinds[0])
    return [index for index, named in enumerate(chosen) if named] if numbers else chosen


def _derived(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the kinds of its layers written out, where transformers derives them from other keys."""
    varies = any(re.search(r"window|pattern|chunk|interval", key) for key in config)
    if "layer_types" in config or "model_type" not in config or not varies:
        return dict(config)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        known = AutoConfig.for_model(**config)
    except (
        ValueError,
        KeyError,
        TypeError,
        StrictDataclassError,
    ):  # a model type of newer versions, or of other people's code
        return dict(config)
    kinds = getattr(known, "layer_types", None)
    return {**config, "layer_types": list(kinds)} if kinds and len(set(kinds)) > 1 else dict(config)


def _is_count(value: Any, depth: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == depth


def _at(config: Mapping[str, Any], place: tuple[str, ...]) -> Mapping[str, Any]:
    for key in place:
        config = config.get(key, {})
    return config
