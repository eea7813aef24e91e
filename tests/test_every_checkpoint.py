"""Checkpoints of every kind: what one merge makes of them is a merge of their state dicts, and loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from search.checkpoints.compatibility import check_compatible
from search.checkpoints.reading import open_checkpoint
from search.errors import CheckpointError, RecipeError
from search.export import merge_recipe
from search.recipe import Recipe

torch.set_num_threads(1)

DECODER: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
}
T5: dict[str, Any] = {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(DECODER | changes)))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**DECODER, num_local_experts=4)),
    "qwen2 mixture": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **DECODER, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=48, **ENCODER)),
    "roberta": lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=48, **ENCODER)),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**ENCODER, image_size=16, patch_size=8, num_labels=3)
    ),
    "resnet": lambda: transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    ),
}


def save(make: Callable[[], Any], folder: Path, seed: int, **options: Any) -> Path:
    """A random model of a kind; buffers too, as training leaves them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data += 0.1 * torch.rand_like(tensor)
    model.save_pretrained(folder, **options)
    return folder


def soup(paths: dict[str, Path]) -> Recipe:
    return recipe_of("linear", {name: {"weight": 1 / len(paths)} for name in paths}, None, paths)


def recipe_of(operator: str, sources: dict[str, dict[str, Any]], base: str | None, paths: dict[str, Path]) -> Recipe:
    return Recipe.from_data(
        {
            "base": base,
            "models": {name: {"path": str(path)} for name, path in paths.items()},
            "rules": [{"operator": operator, "sources": sources}],
        }
    )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def ties_by_hand(base: torch.Tensor, sources: list[torch.Tensor], density: float) -> torch.Tensor:
    """Trim, elect, average, with sorting."""
    trimmed = []
    for source in sources:
        delta = (source - base).flatten()
        order = delta.abs().argsort(descending=True, stable=True)
        kept = torch.zeros_like(delta)
        kept[order[: max(1, int(density * delta.numel()))]] = 1
        trimmed.append((delta * kept).view_as(base))
    stacked = torch.stack(trimmed)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == sign
    return base + (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_is_that_of_the_state_dicts_and_loads(name: str, sharded: bool, tmp_path: Path) -> None:
    options = {"max_shard_size": "4KB"} if sharded else {}
    paths = {key: save(FAMILIES[name], tmp_path / key, seed, **options) for seed, key in enumerate(("base", "a", "b"))}
    assert len(list(paths["a"].glob("*.safetensors"))) > 1 or not sharded
    states = {key: tensors_of(path) for key, path in paths.items()}
    mean = merge_recipe(
        soup({"a": paths["a"], "b": paths["b"]}), tmp_path / "mean", max_shard_bytes=5000 if sharded else 10**9
    )
    values = {"weight": 1.0, "density": 0.5}
    ties = merge_recipe(recipe_of("ties", {"a": values, "b": values}, "base", paths), tmp_path / "ties")
    for out in (mean, ties):
        found = tensors_of(out)
        assert found.keys() == states["base"].keys()
        for tensor, base in states["base"].items():
            a, b = states["a"][tensor], states["b"][tensor]
            if not base.is_floating_point():
                assert torch.equal(found[tensor], base)
                continue
            expected = (a + b) / 2 if out == mean else ties_by_hand(base, [a, b], 0.5)
            torch.testing.assert_close(found[tensor], expected, rtol=1e-5, atol=1e-6)
        kind = type(FAMILIES[name]())
        _, report = kind.from_pretrained(out, output_loading_info=True)
        assert not any(report.values()), report


@pytest.mark.parametrize("operator", ["linear", "ties"])
def test_models_of_several_dtypes_merge_and_each_tensor_keeps_that_of_the_donor(operator: str, tmp_path: Path) -> None:
    make = FAMILIES["llama"]
    paths = {key: save(make, tmp_path / key, seed) for seed, key in enumerate(("base", "a", "b"))}
    states = {key: tensors_of(path) for key, path in paths.items()}
    for key, dtypes in (
        ("base", {"norm": torch.float32, "": torch.bfloat16}),
        ("a", {"mlp": torch.float32, "": torch.float16}),
        ("b", {"": torch.bfloat16}),
    ):
        for name, tensor in states[key].items():
            states[key][name] = tensor.to(next(dtype for part, dtype in dtypes.items() if part in name))
        save_file(states[key], paths[key] / "model.safetensors")
    values = {"weight": 0.5} if operator == "linear" else {"weight": 0.5, "density": 1.0}
    out = merge_recipe(recipe_of(operator, {"a": values, "b": values}, "base", paths), tmp_path / "out")
    for name, found in tensors_of(out).items():
        base, a, b = (states[key][name].float() for key in ("base", "a", "b"))
        expected = (a + b) / 2 if operator == "linear" else ties_by_hand(base, [a, b], 1.0)
        assert found.dtype == states["base"][name].dtype
        torch.testing.assert_close(found.float(), expected.to(found.dtype).float(), rtol=1e-2, atol=1e-6)


def test_counters_that_differ_are_one_line_with_the_way_out_and_equal_ones_are_copied(tmp_path: Path) -> None:
    paths = {key: save(FAMILIES["resnet"], tmp_path / key, seed) for seed, key in enumerate(("a", "b"))}
    states = {key: tensors_of(path) for key, path in paths.items()}
    counters = [name for name in states["a"] if name.endswith("num_batches_tracked")]
    states["b"][counters[0]] += 7
    save_file(states["b"], paths["b"] / "model.safetensors")
    with pytest.raises(
        RecipeError, match=r"is int64 and differs between 'a' and 'b'.*a rule of its own with one source"
    ):
        merge_recipe(soup(paths), tmp_path / "out")
    own = {"tensors": [counters[0]], "operator": "linear", "sources": {"b": {"weight": 1.0}}}
    recipe = Recipe.from_data({**soup(paths).model_dump(), "rules": [own, soup(paths).rules[0].model_dump()]})
    found = tensors_of(merge_recipe(recipe, tmp_path / "out"))
    assert found[counters[0]] == states["b"][counters[0]]
    assert found[counters[1]] == states["a"][counters[1]]


@pytest.mark.parametrize("where", ["source", "base"])
def test_a_tensor_that_only_one_model_has_is_one_line_that_names_it(where: str, tmp_path: Path) -> None:
    paths = {
        "base": save(lambda: llama(attention_bias=where == "base"), tmp_path / "base", 0),
        "a": save(lambda: llama(attention_bias=where == "source"), tmp_path / "a", 1),
    }
    with pytest.raises(CheckpointError) as caught:
        merge_recipe(soup(paths), tmp_path / "out")
    (line,) = str(caught.value).splitlines()
    sign = "has an extra" if where == "source" else "has no"
    assert f"source 'a': {sign} tensor 'model.layers.0.self_attn.k_proj.bias' of shape [8]" in line
    assert "; merge models that were fine-tuned from this base" in line


# --- heads


@pytest.mark.parametrize("donor", ["tied", "untied"])
def test_a_model_that_ties_contributes_its_embedding_where_another_has_a_head(donor: str, tmp_path: Path) -> None:
    paths = {
        "tied": save(lambda: llama(tie_word_embeddings=True), tmp_path / "tied", 0),
        "untied": save(lambda: llama(tie_word_embeddings=False), tmp_path / "untied", 1),
    }
    states = {key: tensors_of(path) for key, path in paths.items()}
    assert "lm_head.weight" not in states["tied"]
    checkpoints = {key: open_checkpoint(path) for key, path in paths.items()}
    check_compatible(checkpoints.pop(donor), checkpoints)
    order = dict(sorted(paths.items(), key=lambda item: item[0] != donor))
    out = merge_recipe(soup(order), tmp_path / "out")
    found = tensors_of(out)
    embedding = states["tied"]["model.embed_tokens.weight"]
    assert torch.equal(found["lm_head.weight"], (embedding + states["untied"]["lm_head.weight"]) / 2)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(model.lm_head.weight, found["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def with_head(folder: Path, head: torch.Tensor | None = None) -> Path:
    """Write a head under its own name beside the embedding."""
    tensors = tensors_of(folder)
    tensors["lm_head.weight"] = (tensors["model.embed_tokens.weight"] if head is None else head).clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_copy_of_the_embedding_under_the_name_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    paths = {key: save(FAMILIES["llama, tied"], tmp_path / key, seed) for seed, key in enumerate(("a", "b"))}
    plain = tensors_of(merge_recipe(soup(paths), tmp_path / "plain"))
    with_head(paths["a"])
    for order in (("a", "b"), ("b", "a")):
        out = merge_recipe(soup({key: paths[key] for key in order}), tmp_path / "-".join(order))
        found = tensors_of(out)
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("others", ["tied", "untied"])
def test_a_tied_head_with_other_numbers_than_the_embedding_is_one_line(others: str, tmp_path: Path) -> None:
    odd = with_head(save(FAMILIES["llama, tied"], tmp_path / "odd", 0), torch.ones(48, 16))
    other = save(FAMILIES["llama, tied" if others == "tied" else "llama"], tmp_path / "other", 1)
    with pytest.raises(CheckpointError) as caught:
        merge_recipe(soup({"odd": odd, "other": other}), tmp_path / "out")
    (line,) = str(caught.value).splitlines()
    assert "config.json ties 'lm_head.weight' to 'model.embed_tokens.weight'" in line
    assert "say tie_word_embeddings: false there" in line
    assert not (tmp_path / "out").exists()


def test_every_copy_of_a_tied_embedding_is_looked_at(tmp_path: Path) -> None:
    path = save(FAMILIES["llama, tied"], tmp_path / "odd", 0)
    other = save(FAMILIES["llama, tied"], tmp_path / "other", 1)
    state = load_file(path / "model.safetensors")
    copies = {head: state["model.embed_tokens.weight"].clone() for head in ("lm_head.weight", "embed_out.weight")}
    save_file({**state, **copies}, path / "model.safetensors", {"format": "pt"})
    merge_recipe(soup({"odd": path, "other": other}), tmp_path / "good")
    for head, copy in copies.items():
        save_file({**state, **copies, head: copy + 1}, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"ties '{head}'"):
            merge_recipe(soup({"odd": path, "other": other}), tmp_path / "bad")


THREADED: dict[str, dict[str, Any]] = {
    "ties": {"weight": 0.6, "density": 0.4},
    "della": {"weight": 0.6, "density": 0.6},
    "sce": {},
    "linear": {"weight": 0.5},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("compute", ["inputs", "float32"])
@pytest.mark.parametrize("name", ["llama, tied", "mixtral", "gpt2", "resnet"])
def test_threads_change_no_bit_whatever_the_checkpoint(name: str, compute: str, dtype: str, tmp_path: Path) -> None:
    paths = {key: save(FAMILIES[name], tmp_path / key, seed) for seed, key in enumerate(("base", "a", "b"))}
    for path in paths.values():
        state = {
            key: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for key, t in tensors_of(path).items()
        }
        save_file(state, path / "model.safetensors", {"format": "pt"})
    for operator, values in THREADED.items():
        recipe = recipe_of(operator, {"a": values, "b": values}, None if operator == "linear" else "base", paths)
        recipe = recipe.model_copy(update={"compute": compute, "seed": 3})
        one, four = (
            tensors_of(merge_recipe(recipe, tmp_path / f"{operator}-{threads}", threads=threads)) for threads in (1, 4)
        )
        assert one.keys() == four.keys()
        assert all(torch.equal(one[key], four[key]) for key in one), operator
        assert {t.dtype for t in one.values() if t.is_floating_point()} == {getattr(torch, dtype)}


def test_a_t5_that_ties_is_not_merged_with_one_that_does_not(tmp_path: Path) -> None:
    paths = {name: save(FAMILIES["t5"], tmp_path / name, seed) for seed, name in enumerate(("tied", "untied"))}
    for name, path in paths.items():
        tensors = {key: tensor for key, tensor in tensors_of(path).items() if key != "lm_head.weight"}
        if name == "untied":
            tensors["lm_head.weight"] = torch.ones(48, 16)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": name == "tied"}
        (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a t5 model scales what goes into a tied head; save all models the same"):
        merge_recipe(soup(paths), tmp_path / "out")
