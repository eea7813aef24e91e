"""A live model's weights are written under the names of its checkpoint, whatever its family."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from search.errors import CheckpointError
from search.merge.apply import Merger
from search.merge.live import LiveModel, build_live_model
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

torch.set_num_threads(1)

TEXT = {"input_ids": torch.tensor([[5, 9, 2, 31, 7, 1], [3, 3, 60, 8, 0, 12]])}
IMAGE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))}
DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1}


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, **changes))


def gpt2_sizes() -> Any:
    return transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=16, **SPECIAL)


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "llama": (lambda: llama(tie_word_embeddings=False), TEXT),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), TEXT),
    "llama with biases": (lambda: llama(attention_bias=True), TEXT),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER)), TEXT),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(gpt2_sizes()), TEXT),
    "gpt2 without a head": (lambda: transformers.GPT2Model(gpt2_sizes()), TEXT),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **ENCODER)), TEXT),
    "vit": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=3)
        ),
        IMAGE,
    ),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)),
        TEXT,
    ),
    "qwen2 mixture": (
        lambda: transformers.Qwen2MoeForCausalLM(
            transformers.Qwen2MoeConfig(
                **DECODER, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
            )
        ),
        TEXT,
    ),
    "t5": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
        ),
        {**TEXT, "decoder_input_ids": TEXT["input_ids"][:, :3]},
    ),
    "resnet": (
        lambda: transformers.ResNetForImageClassification(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        ),
        IMAGE,
    ),
}


def save_random(make: Callable[[], Any], folder: Path, seed: int) -> Path:
    """A checkpoint with every tensor random, norms, biases and running statistics included."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else 0.2 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> InMemoryTensors:
    return InMemoryTensors(load_file(folder / "model.safetensors"))


def copy_recipe(folder: Path) -> Recipe:
    return Recipe.from_data(
        {
            "models": {"other": {"path": str(folder)}},
            "rules": [{"operator": "linear", "sources": {"other": {"weight": 1.0}}}],
        }
    )


def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_model_with_the_weights_of_another_checkpoint_computes_the_same_bits(
    family: str, tmp_path: Path
) -> None:
    make, inputs = FAMILIES[family]
    base, other = save_random(make, tmp_path / "base", 1), save_random(make, tmp_path / "other", 2)
    live = build_live_model(base, device="cpu", dtype=None)
    live.check_holds(tensors_of(base))
    wanted = getattr(transformers, type(live.model).__name__).from_pretrained(other).eval()
    assert not torch.equal(outputs(live.model, inputs), outputs(wanted, inputs))

    source = tensors_of(other)
    stats = Merger({"other": source}).merge_into(copy_recipe(other), live.targets(source.names))

    assert stats.written > 0
    assert torch.equal(outputs(live.model, inputs), outputs(wanted, inputs))
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(live.model.state_dict()[name], tensor), name
    live.check_holds(source)


def test_experts_are_views_into_one_fused_parameter(tmp_path: Path) -> None:
    folder = save_random(FAMILIES["mixtral"][0], tmp_path / "m", 1)
    live = build_live_model(folder, device="cpu", dtype=None)
    targets = live.targets(tensors_of(folder).names)
    fused = {name: tensor for name, tensor in live.model.named_parameters() if name.endswith("gate_up_proj")}
    expert = targets["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert len(fused) == 2
    assert expert.untyped_storage().data_ptr() == fused["model.layers.1.mlp.experts.gate_up_proj"].data_ptr()


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    folder = save_random(FAMILIES["llama, tied"][0], tmp_path / "m", 1)
    live = build_live_model(folder, device="cpu", dtype=None)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    targets = live.targets([*tensors, "lm_head.weight"])
    assert "lm_head.weight" not in targets
    assert live.model.get_parameter("lm_head.weight").data_ptr() == targets["model.embed_tokens.weight"].data_ptr()


def test_names_with_and_without_the_prefix_of_the_base_model_find_their_place(tmp_path: Path) -> None:
    folder = save_random(FAMILIES["gpt2"][0], tmp_path / "m", 1)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    live = build_live_model(folder, device="cpu", dtype=None)
    source = tensors_of(folder)
    assert "h.0.attn.c_attn.weight" in source.names
    live.check_holds(source)
    assert set(live.targets(source.names)) == set(source.names)


def test_tensors_that_the_class_does_not_use_are_left_out(tmp_path: Path) -> None:
    folder = save_random(FAMILIES["gpt2"][0], tmp_path / "m", 1)
    tensors = load_file(folder / "model.safetensors")
    extra = {"left.over.weight": torch.ones(3), "transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    live = build_live_model(folder, device="cpu", dtype=None)
    assert set(live.targets([*tensors, *extra])) == set(tensors)


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_random(FAMILIES["llama"][0], tmp_path / "m", 1)
    live = build_live_model(folder, device="cpu", dtype=None)
    with pytest.raises(CheckpointError, match=r"'model.layers.7.mlp.up_proj.weight' has no place"):
        live.targets([*tensors_of(folder).names, "model.layers.7.mlp.up_proj.weight"])


def test_a_weight_that_no_tensor_gives_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_random(FAMILIES["llama"][0], tmp_path / "m", 1)
    live = build_live_model(folder, device="cpu", dtype=None)
    names = [name for name in tensors_of(folder).names if name != "model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"no tensor for 'model.norm.weight'"):
        live.targets(names)


def test_a_conversion_that_computes_new_values_is_refused(tmp_path: Path) -> None:
    # The checkpoint holds twice the live weight, under the same name.
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Double(ConversionOps):  # type: ignore[misc]
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
            (tensor,) = input_dict.values()
            return {target_patterns[0]: (tensor[0] if isinstance(tensor, list) else tensor) * 2}

        @property
        def reverse_op(self) -> Any:
            return Double()

    model = llama()
    model._weight_conversions = [WeightConverter("up_proj.weight", "up_proj.weight", [Double()])]
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.up_proj.weight' has no place"):
        LiveModel(model).targets(model.state_dict())


def test_the_live_dtype_may_differ_from_that_of_the_checkpoint(tmp_path: Path) -> None:
    folder = save_random(FAMILIES["llama"][0], tmp_path / "m", 1)
    live = build_live_model(folder, device="cpu", dtype="bfloat16")
    assert {tensor.dtype for tensor in live.model.parameters()} == {torch.bfloat16}
    live.check_holds(tensors_of(folder))


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed here")
def test_a_model_whose_class_needs_another_library_is_refused_with_its_name(tmp_path: Path) -> None:
    config = {"architectures": ["TimmBackbone"], "model_type": "timm_backbone", "backbone": "resnet18"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"TimmBackbone needs a library .* the (PIL|timm) library") as caught:
        build_live_model(tmp_path, device="cpu", dtype=None)
    assert "\n" not in str(caught.value)


def test_the_model_is_in_eval_mode_without_gradients(tmp_path: Path) -> None:
    live = build_live_model(save_random(FAMILIES["bert"][0], tmp_path / "m", 1), device="cpu", dtype=None)
    assert not live.model.training
    assert not any(tensor.requires_grad for tensor in live.model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}, "never run"),
        ({"architectures": ["AutoModel"]}, "no model class 'AutoModel'"),
        ({"architectures": None}, "names no class"),
        ({"intermediate_size": 32}, "cannot load it"),
        ({"num_hidden_layers": 3}, "has no weights for 'model.layers.2"),
    ],
)
def test_a_folder_that_does_not_fit_its_class_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_random(FAMILIES["llama"][0], tmp_path / "m", 1)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError) as caught:
        build_live_model(folder, device="cpu", dtype=None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        build_live_model(tmp_path, device="cpu", dtype=None)
