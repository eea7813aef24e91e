"""Folding the scales of a path into its weights, against the path carried out as it is written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import RecipeError
from search.paths.families import FAMILIES, family_of
from search.paths.fold import Fold

WIDTH = 6
Tensors = dict[str, torch.Tensor]


def block(kind: str, layers: int) -> Tensors:
    """Random weights of a toy pre-norm model, in float64, under the names of a family."""
    generator = torch.Generator().manual_seed(layers)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    family = FAMILIES[kind]
    stack = "h" if kind == "gpt2" else "model.layers"
    tensors = {
        ("ln_f.weight" if kind == "gpt2" else "model.norm.weight"): random(WIDTH),
        "wte.weight": random(4, WIDTH),
    }
    for layer in range(layers):
        for norm, output in zip(family.norms, family.outputs, strict=True):
            tensors[f"{stack}.{layer}.{norm}"] = random(WIDTH)
            tensors[f"{stack}.{layer}.{output}.weight"] = random(WIDTH, WIDTH)
            tensors[f"{stack}.{layer}.{output}.bias"] = random(WIDTH)
    return tensors


def run(kind: str, tensors: Tensors, scales: list[float], x: torch.Tensor) -> torch.Tensor:
    """Both blocks of every layer in turn: a norm, something that is not linear, and an output that adds to x."""
    family = FAMILIES[kind]
    stack = "h" if kind == "gpt2" else "model.layers"

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if kind == "gpt2":
            x = x - x.mean(-1, keepdim=True)
        return x / x.pow(2).mean(-1, keepdim=True).sqrt() * weight

    for layer, scale in enumerate(scales):
        x = scale * x
        for name, output in zip(family.norms, family.outputs, strict=True):
            inner = torch.sigmoid(norm(x, tensors[f"{stack}.{layer}.{name}"]) + 0.3)
            x = x + inner @ tensors[f"{stack}.{layer}.{output}.weight"] + tensors[f"{stack}.{layer}.{output}.bias"]
    return norm(x, tensors["ln_f.weight" if kind == "gpt2" else "model.norm.weight"])


SCALE = st.floats(0.2, 3.0).flatmap(lambda size: st.sampled_from([size, -size]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["llama", "gpt2"]), st.lists(SCALE, min_size=1, max_size=7))
def test_folded_weights_without_scales_compute_what_the_scales_did(kind: str, scales: list[float]) -> None:
    tensors = block(kind, len(scales))
    fold = Fold(FAMILIES[kind], scales)
    folded = {name: fold(name, tensor) for name, tensor in tensors.items()}
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        run(kind, folded, [1.0] * len(scales), x), run(kind, tensors, scales, x), rtol=1e-9, atol=1e-9
    )


@given(st.lists(SCALE, min_size=1, max_size=5))
def test_only_norms_and_outputs_change_and_the_dtype_stays(scales: list[float]) -> None:
    fold = Fold(FAMILIES["qwen2"], scales)
    last = len(scales) - 1
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        f"model.layers.{last}.self_attn.q_proj.weight",
        f"model.layers.{last}.self_attn.q_proj.bias",
        f"model.layers.{last}.mlp.up_proj.weight",
    ):
        assert fold.factor(name) == 1.0
    product = math.prod(scales)
    assert fold.factor(f"model.layers.{last}.input_layernorm.weight") == math.copysign(1.0, product)
    assert fold.factor("model.norm.weight") == math.copysign(1.0, product)
    assert fold.factor(f"model.layers.{last}.self_attn.o_proj.weight") == pytest.approx(1 / product)
    tensor = torch.ones(3, dtype=torch.bfloat16)
    assert fold(f"model.layers.{last}.mlp.down_proj.weight", tensor).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "'bert' model cannot form a path: it normalises the sum.*gpt2, llama, mistral, qwen2"),
        ({"model_type": "lama"}, "not known how .* 'lama' model; did you mean 'llama'"),
        ({}, "not known"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_models_whose_scales_cannot_be_folded_are_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        family_of(config)
