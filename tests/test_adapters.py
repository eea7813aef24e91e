"""LoRA adapters as sources: what is merged is what peft would make of the base, never stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import open_checkpoint
from search.errors import CheckpointError
from search.export import merge_recipe
from search.recipe import ModelRef, Recipe
from search.sources import open_models, open_sources

torch.set_num_threads(1)

CASES = Path(__file__).parent / "adapters"
"""Made by peft; see make.py there."""

BASES = {
    "plain": "llama",
    "rslora_bias": "llama",
    "lora_bias": "llama",
    "embedding": "llama",
    "dora": "llama",
    "dora_embedding": "llama",
    "conv1d": "gpt2",
    "dora_conv1d": "gpt2",
    "conv2d": "resnet",
    "dora_conv2d": "resnet",
}


def read(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an adapted model, as a merge reads it."""
    models = {"base": ModelRef(path=str(base)), "lora": ModelRef(path=str(adapter))}
    source = open_sources(open_models(models, base="base")).tensors["lora"]
    return {name: source.get(name) for name in source.names}


@pytest.mark.parametrize("case", BASES)
def test_an_adapted_model_is_what_peft_merges(case: str) -> None:
    ours = read(CASES / BASES[case], CASES / case)
    expected = load_file(CASES / case / "merged" / "model.safetensors")
    assert ours.keys() == expected.keys()
    base = load_file(CASES / BASES[case] / "model.safetensors")
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-5, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        changed += not torch.equal(tensor, base[name])
    assert changed >= 1, "the case changes nothing"


def parts(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter folder with these tensors."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def model(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["A"], "model_type": "a"} | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(
    rank=st.integers(1, 4),
    alpha=st.floats(0.5, 32),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_weight_is_w_plus_scale_times_b_a_in_float32(
    rank: int, alpha: float, rows: int, columns: int, rslora: bool, dtype: torch.dtype, tmp_path_factory: Any
) -> None:
    tmp_path = tmp_path_factory.mktemp("adapter")
    weight, a, b = (numbers(*s, seed=i) for i, s in enumerate([(rows, columns), (rank, columns), (rows, rank)]))
    base = model(tmp_path / "base", {"x.weight": weight.to(dtype), "x.bias": weight[0].to(dtype).clone()})
    lora = parts(
        tmp_path / "lora",
        {"x.lora_A.weight": a, "x.lora_B.weight": b},
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
    )
    ours = read(base, lora)
    scale = alpha / rank**0.5 if rslora else alpha / rank
    expected = weight.to(dtype).double() + scale * (b.double() @ a.double())
    assert ours["x.weight"].dtype == torch.float32
    torch.testing.assert_close(ours["x.weight"].double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(ours["x.bias"], weight[0].to(dtype)), "an untouched tensor is that of the base"


def test_a_recipe_merges_an_adapter_as_it_merges_the_model_that_peft_makes(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(CASES / "plain" / "merged", whole)
    shutil.copy(CASES / "llama" / "config.json", whole)
    for operator, values in (("linear", {"weight": 0.5}), ("ties", {"weight": 0.7, "density": 0.5})):
        outs = []
        for name, path in (("adapter", CASES / "plain"), ("whole", whole)):
            sources = {"lora": values} | ({"base": values} if operator == "linear" else {})
            recipe = Recipe.from_data(
                {
                    "base": "base",
                    "models": {"base": {"path": "llama"}, "lora": {"path": str(path)}},
                    "rules": [{"operator": operator, "sources": sources}],
                }
            )
            outs.append(load_file(merge_recipe(recipe, tmp_path / operator / name, folder=CASES) / "model.safetensors"))
        for tensor, expected in outs[1].items():
            torch.testing.assert_close(outs[0][tensor], expected, rtol=1e-5, atol=1e-6)
    written = json.loads((tmp_path / "linear" / "adapter" / "config.json").read_text())
    assert written == json.loads((CASES / "llama" / "config.json").read_text())


def test_the_hash_stands_for_adapter_config_and_base(tmp_path: Path) -> None:
    def hashed(base: Path, adapter: Path) -> str:
        models = {"b": ModelRef(path=str(base)), "l": ModelRef(path=str(adapter))}
        return fingerprint(open_models(models, base="b")["l"]).sha256

    first = hashed(CASES / "llama", CASES / "plain")
    assert first == hashed(CASES / "llama", CASES / "plain")
    copy = tmp_path / "copy"
    shutil.copytree(CASES / "plain", copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    assert hashed(CASES / "llama", copy) == first, "where it was trained is no part of what it does"
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6}))
    assert hashed(CASES / "llama", copy) != first
    other = tmp_path / "base"
    shutil.copytree(CASES / "llama", other)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, other / "model.safetensors")
    assert hashed(other, CASES / "plain") != first


def test_the_recipe_beside_the_output_makes_it_again_from_the_adapter(tmp_path: Path) -> None:
    from search.recipe_file import read_recipe

    recipe = Recipe.from_data(
        {
            "base": "base",
            "models": {"base": {"path": "llama"}, "lora": {"path": "dora"}},
            "rules": [{"operator": "task_arithmetic", "sources": {"lora": {"weight": 0.5}}}],
        }
    )
    first = merge_recipe(recipe, tmp_path / "first", folder=CASES, hash_models=True)
    again = read_recipe(first / "recipe.yaml")
    assert again.models["lora"].sha256 is not None
    second = merge_recipe(again, tmp_path / "second")
    assert fingerprint(open_checkpoint(first)) == fingerprint(open_checkpoint(second))


@pytest.mark.parametrize("case", ["plain", "dora"])
def test_threads_change_no_bit_of_a_merged_adapter(case: str, tmp_path: Path) -> None:
    recipe = Recipe.from_data(
        {
            "base": "base",
            "models": {"base": {"path": "llama"}, "lora": {"path": case}},
            "rules": [{"operator": "task_arithmetic", "sources": {"lora": {"weight": 0.5}}}],
        }
    )
    one, four = (
        fingerprint(open_checkpoint(merge_recipe(recipe, tmp_path / str(n), folder=CASES, threads=n))) for n in (1, 4)
    )
    assert one.sha256 == four.sha256


def test_an_adapter_may_belong_to_another_model_than_the_base(tmp_path: Path) -> None:
    other = model(tmp_path / "other", {"x.weight": torch.ones(2, 2)})
    base = model(tmp_path / "base", {"x.weight": torch.zeros(2, 2)})
    lora = parts(
        tmp_path / "lora", {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)}, lora_alpha=2
    )
    recipe = Recipe.from_data(
        {
            "base": "base",
            "models": {
                "base": {"path": str(base)},
                "other": {"path": str(other)},
                "lora": {"path": str(lora), "adapts": "other"},
            },
            "rules": [{"operator": "linear", "sources": {"lora": {"weight": 1.0}}}],
        }
    )
    out = merge_recipe(recipe, tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["x.weight"], torch.full((2, 2), 3.0))


FACTORS = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)}
DORA = FACTORS | {"x.lora_magnitude_vector": torch.ones(4)}


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        (FACTORS, {"peft_type": "IA3"}, "is an adapter of the type 'IA3', expected 'LORA'"),
        (FACTORS, {"use_qalora": True}, "has use_qalora in adapter_config.json (QA-LoRA)"),
        (FACTORS, {"target_parameters": ["a"]}, "has target_parameters in adapter_config.json"),
        (FACTORS, {"init_lora_weights": "pissa_niter_4"}, "was initialised with 'pissa_niter_4', which also changed"),
        (FACTORS, {"r": 3}, "module 'x' has factors of rank 2, adapter_config.json says r = 3"),
        (FACTORS, {"use_dora": True}, "module 'x' has no lora_magnitude_vector"),
        (DORA, {}, "module 'x' has a lora_magnitude_vector"),
        ({"y" + name[1:]: t for name, t in FACTORS.items()}, {}, "belongs to 'y.weight', which the base"),
        ({"x.lora_A.weight": torch.ones(2, 3)}, {}, "module 'x' has lora_A, expected lora_A and lora_B"),
        (FACTORS | {"x.lora_B.weight": torch.ones(5, 2)}, {}, "have shapes [2, 3] and [5, 2], which do not fit [4, 3]"),
        (FACTORS | {"n.weight": torch.ones(3, 3)}, {}, "belongs to 'n.weight', which the base"),
        (FACTORS | {"x.bias": torch.ones(4, 4)}, {}, "has 'x.bias' in full with shape [4, 4], the base"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_one_line_with_its_folder(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    base = model(tmp_path / "base", {"x.weight": torch.ones(4, 3), "x.bias": torch.ones(4)})
    lora = parts(tmp_path / "lora", tensors, **config)
    recipe = Recipe.from_data(
        {
            "base": "base",
            "models": {"base": {"path": str(base)}, "lora": {"path": str(lora)}},
            "rules": [{"operator": "task_arithmetic", "sources": {"lora": {"weight": 1.0}}}],
        }
    )
    with pytest.raises(CheckpointError) as caught:
        merge_recipe(recipe, tmp_path / "out")
    (line,) = str(caught.value).splitlines()
    assert str(lora) in line
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("no base", "is a LoRA adapter; name the model that it was trained on as `base`"),
        ("first", "is a LoRA adapter; name the model that it was trained on as `base`"),
        ("pickle", "is an adapter with only adapter_model.bin, and pickle is never loaded"),
        ("nothing", "is an adapter with no adapter_model.safetensors"),
        ("both", "has both adapter_config.json and model.safetensors"),
    ],
)
def test_an_adapter_without_what_it_needs_is_one_line(change: str, expected: str, tmp_path: Path) -> None:
    base = model(tmp_path / "base", {"x.weight": torch.ones(4, 3)})
    lora = parts(tmp_path / "lora", FACTORS)
    models = {"base": ModelRef(path=str(base)), "lora": ModelRef(path=str(lora))}
    if change in ("pickle", "nothing"):
        (lora / "adapter_model.safetensors").unlink()
        if change == "pickle":
            (lora / "adapter_model.bin").touch()
    if change == "both":
        shutil.copy(base / "model.safetensors", lora)
    if change == "first":
        models = {"base": ModelRef(path=str(lora)), "lora": ModelRef(path=str(lora))}
    with pytest.raises(CheckpointError) as caught:
        open_models(models, base=None if change == "no base" else "base")
    assert "\n" not in str(caught.value)
    assert expected in str(caught.value)


def test_a_tied_base_gets_a_head_of_its_own_from_an_adapter_that_trained_one(tmp_path: Path) -> None:
    embedding, head = torch.arange(8.0).reshape(4, 2), torch.full((4, 2), 10.0)
    base = model(tmp_path / "base", {"model.embed_tokens.weight": embedding}, tie_word_embeddings=True, vocab_size=4)
    lora = parts(tmp_path / "lora", {"lm_head.weight": head})
    recipe = Recipe.from_data(
        {
            "base": "base",
            "models": {"base": {"path": str(base)}, "lora": {"path": str(lora)}},
            "rules": [{"operator": "linear", "sources": {"base": {"weight": 0.5}, "lora": {"weight": 0.5}}}],
        }
    )
    out = merge_recipe(recipe, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], (embedding + head) / 2)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
