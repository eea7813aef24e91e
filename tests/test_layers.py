"""Stacks of layers: models with other layers than their sources, by the recipe's `layers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_files import make_model, merge, tensors_of
from safetensors.torch import load_file, save_file

from search.errors import MeiosisError
from search.export import merge_recipe
from search.layers import find_stack
from search.recipe import Recipe

torch.set_num_threads(1)

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}


def save_random(kind: str, folder: Path, layers: int, seed: int) -> Path:
    """A tiny model of transformers with random weights."""
    import transformers

    configs = {
        "llama": lambda: transformers.LlamaConfig(num_hidden_layers=layers, num_key_value_heads=1, **SMALL),
        "qwen2": lambda: transformers.Qwen2Config(
            num_hidden_layers=layers,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=2,
            **SMALL,
        ),
        "gpt2": lambda: transformers.GPT2Config(n_layer=layers, n_embd=16, n_head=2, vocab_size=32, n_positions=16),
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(configs[kind]())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


PREFIX = {"llama": "model.layers", "qwen2": "model.layers", "gpt2": "transformer.h"}


def passthrough(models: dict[str, Path], layers: list[dict[str, int]], prefix: str, outer: str) -> Recipe:
    """Every layer as it is in the one model that `layers` names, the rest from `outer`."""
    rules: list[dict[str, Any]] = [
        {"tensors": [f"{prefix}.{index}.*"], "operator": "passthrough", "sources": {next(iter(layer)): {}}}
        for index, layer in enumerate(layers)
    ]
    rules.append({"tensors": ["*"], "operator": "passthrough", "sources": {outer: {}}})
    refs = {name: {"path": str(path)} for name, path in models.items()}
    return Recipe.from_data({"models": refs, "rules": rules, "layers": layers})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_stack_loads_in_stock_transformers_and_equals_one_made_by_hand(kind: str, tmp_path: Path) -> None:
    import transformers

    models = {
        name: save_random(kind, tmp_path / name, depth, seed) for seed, (name, depth) in enumerate([("a", 3), ("b", 4)])
    }
    layers = [{"a": 0}, {"a": 1}, {"b": 1}, {"b": 2}, {"b": 3}, {"a": 2}]
    out = merge_recipe(passthrough(models, layers, PREFIX[kind], "a"), tmp_path / "out")

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    originals = {name: transformers.AutoModelForCausalLM.from_pretrained(path) for name, path in models.items()}
    by_hand = originals["a"]
    body = by_hand.transformer if kind == "gpt2" else by_hand.model
    stack = "h" if kind == "gpt2" else "layers"
    blocks = []
    for index, layer in enumerate(layers):
        ((name, number),) = layer.items()
        inner = originals[name].transformer if kind == "gpt2" else originals[name].model
        block = getattr(inner, stack)[number]
        attention = block.attn if kind == "gpt2" else block.self_attn
        attention.layer_idx = index
        blocks.append(block)
    setattr(body, stack, torch.nn.ModuleList(blocks))
    by_hand.config.num_hidden_layers = len(layers)
    if kind == "qwen2":
        body.config.layer_types = loaded.config.layer_types
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        ours, theirs = loaded.eval()(ids).logits, by_hand.eval()(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_lists_with_an_entry_for_every_layer_follow_the_layers(tmp_path: Path) -> None:
    models = {name: save_random("qwen2", tmp_path / name, 3, seed) for seed, name in enumerate("ab")}
    kinds = json.loads((models["a"] / "config.json").read_text())["layer_types"]
    assert kinds == ["full_attention", "full_attention", "sliding_attention"]
    out = merge_recipe(
        passthrough(models, [{"a": 2}, {"b": 0}, {"a": 1}, {"b": 2}], "model.layers", "a"), tmp_path / "out"
    )
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    assert config["layer_types"] == ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]


def test_several_models_are_merged_layer_onto_layer(tmp_path: Path) -> None:
    for name, depth in (("a", 2), ("b", 4)):
        make_model(tmp_path / name, layers=depth, seed=depth)
    rule = {"operator": "task_arithmetic", "sources": {"b": {"weight": 0.5}}}
    recipe = Recipe.from_data(
        {
            "base": "a",
            "models": {name: {"path": str(tmp_path / name)} for name in "ab"},
            "rules": [rule],
            "layers": [{"a": 1, "b": 3}, {"a": 0, "b": 2}, {"a": 1, "b": 0}],
        }
    )
    out = tensors_of(merge_recipe(recipe, tmp_path / "out"))
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    for index, (first, second) in enumerate([(1, 3), (0, 2), (1, 0)]):
        for rest in ("mlp.down_proj.weight", "input_layernorm.weight"):
            x, y = a[f"model.layers.{first}.{rest}"], b[f"model.layers.{second}.{rest}"]
            torch.testing.assert_close(out[f"model.layers.{index}.{rest}"], x + 0.5 * (y - x))
    assert len(out) == 3 + 3 * 3


def test_layers_of_their_own_in_order_give_the_same_model(tmp_path: Path) -> None:
    make_model(tmp_path / "a")
    models = {"a": {"path": str(tmp_path / "a")}}
    data = {"models": models, "rules": [{"operator": "passthrough", "sources": {"a": {}}}]}
    plain = merge(Recipe.from_data(data))
    stacked = merge(Recipe.from_data({**data, "layers": [{"a": k} for k in range(3)]}))
    assert plain.keys() == stacked.keys()
    assert all(torch.equal(plain[name], stacked[name]) for name in plain)


def faulty(tmp_path: Path, **changes: Any) -> Recipe:
    data = {
        "models": {name: {"path": str(tmp_path / name)} for name in "ab"},
        "rules": [{"operator": "linear", "sources": {"a": {"weight": 1}, "b": {"weight": 1}}}],
        "layers": [{"a": 0, "b": 0}],
    }
    return Recipe.from_data({**data, **changes})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"a": 3, "b": 0}], "layers[0].a: there is no layer 3; the model has layers 0 to 2"),
        (
            [{"a": 0, "b": 0}, {"a": 1}],
            "layers[1]: reads no layer of 'b', which rules[0] merges into 'model.layers.1.input_layernorm.weight'; "
            "name one, or give the layer a rule of its own",
        ),
        ([{}], "layers[0]: names no model; expected model name -> number of the layer"),
    ],
)
def test_layers_that_are_not_there_are_told_in_one_line(
    layers: list[dict[str, int]], message: str, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed)
    with pytest.raises(MeiosisError) as error:
        merge_recipe(faulty(tmp_path, layers=layers), tmp_path / "out")
    assert str(error.value) == message


def test_layers_of_two_kinds_are_not_merged(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed)
    tensors = tensors_of(tmp_path / "b")
    tensors["model.layers.1.mlp.experts.0.weight"] = torch.ones(2)
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.ones(4, 7)
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    with pytest.raises(MeiosisError) as error:
        merge_recipe(faulty(tmp_path, layers=[{"a": 0, "b": 1}]), tmp_path / "out")
    assert str(error.value) == (
        "layers[0]: layer 1 of 'b' has a tensor 'mlp.experts.0.weight', layer 0 of 'a' has none; "
        "merge layers of one kind"
    )
    with pytest.raises(MeiosisError, match=r"layers\[0\]: 'mlp.down_proj.weight' has shape \[4, 6\] in layer 0"):
        merge_recipe(faulty(tmp_path, layers=[{"a": 0, "b": 2}]), tmp_path / "out")


def change_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def test_layers_whose_kind_follows_from_their_number_cannot_change_places(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        change_config(make_model(tmp_path / name, seed=seed), first_k_dense_replace=1)
    with pytest.raises(MeiosisError, match=r"by first_k_dense_replace = 1 in config.json the kind of a layer follows"):
        merge_recipe(faulty(tmp_path), tmp_path / "out")


def test_layers_whose_described_kinds_differ_are_not_merged(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        change_config(make_model(tmp_path / name, seed=seed), layer_types=["full", "full", "sliding"])
    with pytest.raises(MeiosisError, match=r"layers\[0\]: merges layers whose layer_types differ \(full and sliding\)"):
        merge_recipe(faulty(tmp_path, layers=[{"a": 0, "b": 2}]), tmp_path / "out")


def test_numbers_of_layers_in_the_config_are_renumbered(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        change_config(make_model(tmp_path / name, seed=seed), mlp_only_layers=[1])
    out = merge_recipe(
        faulty(tmp_path, layers=[{"a": 1, "b": 1}, {"a": 0, "b": 0}, {"a": 1, "b": 1}]), tmp_path / "out"
    )
    assert json.loads((out / "config.json").read_text())["mlp_only_layers"] == [0, 2]


def test_a_config_that_does_not_count_its_layers_is_refused(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        change_config(make_model(tmp_path / name, seed=seed), num_hidden_layers=7)
    with pytest.raises(MeiosisError, match=r"config.json of 'a' counts its 3 layers under none of num_hidden_layers"):
        merge_recipe(faulty(tmp_path), tmp_path / "out")


def test_models_with_two_stacks_are_refused() -> None:
    names = [f"{side}.block.{k}.layer.weight" for side in ("encoder", "decoder") for k in range(2)]
    with pytest.raises(MeiosisError, match=r"has 2 stacks of layers \(encoder.block, decoder.block\)"):
        find_stack(names, {"num_layers": 2, "num_decoder_layers": 2}, "t5")


def test_numbers_elsewhere_do_not_hide_the_stack_that_the_config_counts() -> None:
    names = ["classifier.0.weight", "model.layers.0.x.weight", "model.layers.1.x.weight"]
    stack = find_stack(names, {"num_hidden_layers": 2}, "model")
    assert (stack.prefix, len(stack.layers), stack.before) == ("model.layers", 2, ("classifier.0.weight",))


def test_a_hole_in_the_numbers_is_told() -> None:
    with pytest.raises(MeiosisError, match=r"has no layer 1 among h.0 to h.2"):
        find_stack(["h.0.w", "h.2.w"], {"n_layer": 2}, "model")


def test_the_recipe_of_a_stack_makes_it_again(tmp_path: Path) -> None:
    from search.recipe_file import read_recipe

    for seed, name in enumerate("ab"):
        make_model(tmp_path / name, seed=seed)
    out = merge_recipe(faulty(tmp_path, layers=[{"a": 1, "b": 2}] * 4), tmp_path / "out")
    again = merge_recipe(read_recipe(out / "recipe.yaml"), tmp_path / "again")
    first, second = load_file(out / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
