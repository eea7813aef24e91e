"""The families whose layers can form a path: pre-norm transformers, of which it is known what undoes a scale.

In a pre-norm block the hidden state h runs through: h + f(N(h)), where the norm N does not see how large h is. So a
factor on h on entry of a block is the same as a divisor of what the block, and every later one, adds to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.errors import RecipeError, nearest


@dataclass(frozen=True)
class Family:
    """Where in a model of one `model_type` things are.

    Attributes:
        layers: attribute of the base model that holds the layers.
        outputs: modules of a layer whose weight and bias add to the hidden state.
        norms: weights in a layer that scale what a norm gives, before anything is added to it.
        final_norm: the same after the last layer; the end of a name outside of the layers.
        forbidden: keys of the config by which a layer depends on its number, or adds in other ways.
    """

    layers: str
    outputs: tuple[str, ...]
    norms: tuple[str, ...]
    final_norm: str
    forbidden: tuple[str, ...] = ()


_LLAMA = Family(
    "layers",
    ("self_attn.o_proj", "mlp.down_proj"),
    ("input_layernorm.weight", "post_attention_layernorm.weight"),
    "norm.weight",
)

FAMILIES: Mapping[str, Family] = {
    "gpt2": Family(
        "h",
        ("attn.c_proj", "mlp.c_proj"),
        ("ln_1.weight", "ln_2.weight"),
        "ln_f.weight",
        ("scale_attn_by_inverse_layer_idx", "add_cross_attention"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}

_POST_NORM = ("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "roberta", "xlm-roberta")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model.

    Args:
        config: its `config.json`.

    Raises:
        RecipeError: a model whose layers cannot form a path; why, and which can.
    """
    kind = str(config.get("model_type"))
    family = FAMILIES.get(kind)
    known = ", ".join(sorted(FAMILIES))
    if family is None and kind in _POST_NORM:
        raise RecipeError(
            f"layers of a '{kind}' model cannot form a path: it normalises the sum of a block and its input, so a "
            f"scale on the hidden state cannot be folded into its weights; models that can: {known}"
        )
    if family is None:
        raise RecipeError(
            f"it is not known how the scales of a path fold into the weights of a '{kind}' model"
            f"{nearest(kind, FAMILIES)}; models that can form a path: {known}"
        )
    for key in family.forbidden:
        if config.get(key):
            raise RecipeError(
                f"layers of a model with {key} = {config[key]} in config.json cannot form a path: what they do "
                "depends on more than their weights and their input"
            )
    return family
