"""Statistics of a model: right by brute force, there whole or not at all, and used by merge and search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import meiosis
from family import DOMAINS, copy_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import open_checkpoint
from search.config import load_config
from search.errors import ConfigError, UserError
from search.export import merge_recipe
from search.merge.apply import Merger
from search.merge.statistics import identities, open_statistics
from search.recipe import Recipe
from search.setup import check
from search.sources import open_sources
from search.statistics.collect import collect_statistics

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def collected(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the statistics of every fine-tune of the family, <name>.safetensors."""
    folder = tmp_path_factory.mktemp("statistics")
    for name in DOMAINS:
        data = family / "data" / name / "search.jsonl"
        collect_statistics(str(family / name), data, folder / f"{name}.safetensors", kinds=("fisher", "gram"))
    return folder


def recipe_of(family: Path, collected: Path, operator: str, **parameters: Any) -> Recipe:
    models = {name: {"path": str(family / name)} for name in ("base", *DOMAINS)}
    for name in DOMAINS:
        models[name]["statistics"] = str(collected / f"{name}.safetensors")
    rule = {"operator": operator, "sources": {name: {} for name in DOMAINS}, "parameters": parameters}
    return Recipe.from_data({"base": "base", "models": models, "rules": [rule]})


def token_ids(folder: Path, texts: list[str]) -> list[Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in texts]


def windows_of(ids: Tensor, size: int = 128) -> list[Tensor]:
    """What a model of `size` positions reads of a text at once, and one token more to predict."""
    return [ids[:, start : start + size + 1] for start in range(0, ids.shape[1] - 1, size)]


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def likelihood(model: Any, ids: Tensor) -> Tensor:
    """log p of a text given its first token."""
    logits = model(ids[:, :-1]).logits.log_softmax(-1)
    return logits.gather(2, ids[:, 1:, None]).sum()


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_fisher_is_the_mean_square_of_the_gradients_of_the_items(family: Path, collected: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family / "python")
    items = token_ids(family / "python", texts_of(family / "data/python/search.jsonl"))
    wanted = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for ids in items:
        model.zero_grad()
        for window in windows_of(ids):
            likelihood(model, window).backward()
        for name, parameter in model.named_parameters():
            wanted[name] += parameter.grad.square() / len(items)
    found = load_file(collected / "python.safetensors")
    assert {name for name in found if name.startswith("fisher/")} == {
        f"fisher/{name}" for name in open_checkpoint(family / "python").tensors
    }
    for name, value in wanted.items():
        torch.testing.assert_close(found[f"fisher/{name}"], value, rtol=1e-4, atol=1e-9)


def test_gram_is_the_mean_outer_product_of_the_inputs_of_a_layer(family: Path, collected: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family / "python")
    seen: dict[str, list[Tensor]] = {"model.layers.1.mlp.down_proj": [], "lm_head": []}
    for name, rows in seen.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][0]))
    with torch.no_grad():
        for ids in token_ids(family / "python", texts_of(family / "data/python/search.jsonl")):
            for window in windows_of(ids):
                model(window[:, :-1])
    found = load_file(collected / "python.safetensors")
    for name, rows in seen.items():
        inputs = torch.cat(rows).double()
        wanted = (inputs.T @ inputs / len(inputs)).float()
        torch.testing.assert_close(found[f"gram/{name}.weight"], wanted, rtol=1e-4, atol=1e-6)
        assert int(found[f"gram_axis/{name}.weight"]) == 1
    grams = {name.removeprefix("gram/") for name in found if name.startswith("gram/")}
    matrices = {n for n in open_checkpoint(family / "python").tensors if "proj" in n or n.startswith("lm_head")}
    assert grams == matrices


def test_the_file_says_what_it_was_made_of(family: Path, collected: Path) -> None:
    facts = metadata_of(collected / "python.safetensors")
    assert facts["kinds"] == "fisher,gram"
    assert facts["model_sha256"] == fingerprint(open_checkpoint(family / "python")).sha256
    assert facts["items"] == "8"
    assert len(facts["data_sha256"]) == len(facts["sha256"]) == 64


def test_the_same_items_in_another_order_give_the_same_bytes(family: Path, tmp_path: Path) -> None:
    lines = (family / "data/english/search.jsonl").read_text().splitlines()
    for name, rows in (("one", lines), ("two", lines[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
        out = tmp_path / f"{name}.safetensors"
        collect_statistics(str(family / "base"), tmp_path / f"{name}.jsonl", out, kinds=("fisher",), items=3)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert metadata_of(tmp_path / "one.safetensors")["items"] == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.jsonl",
        "one.safetensors",
        "two.jsonl",
        "two.safetensors",
    ]


def test_windows_of_a_long_text_are_one_item(family: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = texts_of(family / "data/english/search.jsonl")[0]
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "out.safetensors"
    found = collect_statistics(str(family / "base"), tmp_path / "text.txt", out, kinds=("fisher",), max_tokens=20)
    (ids,) = token_ids(family / "base", [text])
    assert found.tokens == ids.shape[1] - 1
    model = AutoModelForCausalLM.from_pretrained(family / "base")
    for window in windows_of(ids, 20):
        likelihood(model, window).backward()
    wanted = model.lm_head.weight.grad.square()
    torch.testing.assert_close(load_file(out)["fisher/lm_head.weight"], wanted, rtol=1e-4, atol=1e-9)


@pytest.fixture(scope="module")
def gpt2(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small GPT-2 with tied heads and the family's tokenizer, in folders a and b."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    for seed, name in enumerate(("a", "b")):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = GPT2Config(
                vocab_size=320, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
            )
            GPT2LMHeadModel(config).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(family / "base").save_pretrained(folder / name)
    return folder


def test_gpt2_keeps_its_names_its_side_and_one_fisher_for_the_tied_matrix(
    family: Path, gpt2: Path, tmp_path: Path
) -> None:
    weights = load_file(gpt2 / "a/model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()  # as some published checkpoints have it
    folder = copy_of(gpt2 / "a", tmp_path / "a")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "a.safetensors"
    collect_statistics(str(folder), family / "data/cpp/search.jsonl", out, kinds=("fisher", "gram"), items=2)
    found = load_file(out)
    assert {name.removeprefix("fisher/") for name in found if name.startswith("fisher/")} == set(weights)
    assert torch.equal(found["fisher/lm_head.weight"], found["fisher/transformer.wte.weight"])
    assert "gram/lm_head.weight" not in found
    name = "transformer.h.0.attn.c_attn.weight"
    assert weights[name].shape == (32, 96)
    assert found[f"gram/{name}"].shape == (32, 32)
    assert int(found[f"gram_axis/{name}"]) == 0


def test_regmean_of_gpt2_comes_closer_to_the_outputs_of_both_models_than_the_average(
    family: Path, gpt2: Path, tmp_path: Path
) -> None:
    models = {}
    for name in ("a", "b"):
        out = tmp_path / f"{name}.safetensors"
        collect_statistics(str(gpt2 / name), family / "data/cpp/search.jsonl", out, kinds=("gram",))
        models[name] = {"path": str(gpt2 / name), "statistics": str(out)}
    rule = {"operator": "regmean", "sources": {"a": {}, "b": {}}}
    merge_recipe(Recipe.from_data({"models": models, "rules": [rule]}), tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")
    key = "transformer.h.0.mlp.c_fc.weight"
    parents = [load_file(gpt2 / name / "model.safetensors")[key] for name in ("a", "b")]
    grams = [load_file(tmp_path / f"{name}.safetensors")[f"gram/{key}"] for name in ("a", "b")]

    def loss(weight: Tensor) -> float:
        return sum(float(((weight - w).T @ g @ (weight - w)).trace()) for w, g in zip(parents, grams, strict=True))

    average = (parents[0] + parents[1]) / 2
    assert loss(merged[key]) < 0.99 * loss(average)
    other = "transformer.wte.weight"
    torch.testing.assert_close(
        merged[other], sum(load_file(gpt2 / name / "model.safetensors")[other] for name in ("a", "b")) / 2
    )


@pytest.mark.parametrize("kind", ["fisher", "regmean"])
def test_from_the_command_line_to_a_model_that_loads(family: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "statistics").mkdir()
    for name in DOMAINS:
        data, out = family / "data" / name / "search.jsonl", tmp_path / "statistics" / f"{name}.safetensors"
        done = meiosis(
            "statistics",
            family / name,
            out,
            "--data",
            data,
            "--kind",
            {"regmean": "gram"}.get(kind, kind),
            "--items",
            4,
            "--device",
            "cpu",
            "--json",
        )
        assert done.status == 0, done.err
        assert json.loads(done.out)["items"] == 4
    recipe = recipe_of(family, Path("statistics"), kind)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = meiosis("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    assert done.status == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    average = sum(load_file(family / n / "model.safetensors")["lm_head.weight"] for n in DOMAINS) / 3
    assert not torch.allclose(model.lm_head.weight, average, atol=1e-5)
    # The recipe that goes with the model finds the statistics from there.
    written = yaml.safe_load((tmp_path / "merged/recipe.yaml").read_text())
    assert written["models"]["cpp"]["statistics"] == str(tmp_path / "statistics/cpp.safetensors")


def test_a_merge_with_layers_takes_the_statistics_of_the_layers_it_reads(
    family: Path, collected: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(family, collected, "fisher")
    merge_recipe(recipe, tmp_path / "plain")
    order = (1, 0, 1)
    layers = tuple({name: layer for name in ("base", *DOMAINS)} for layer in order)
    merge_recipe(recipe.model_copy(update={"layers": layers}), tmp_path / "stacked")
    plain, stacked = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "stacked"))
    for index, layer in enumerate(order):
        for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
            assert torch.equal(stacked[f"model.layers.{index}.{name}"], plain[f"model.layers.{layer}.{name}"])


def test_what_was_prepared_from_other_statistics_is_not_taken(family: Path, collected: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in DOMAINS:
        data, out = family / "data" / name / "search.jsonl", fewer / f"{name}.safetensors"
        collect_statistics(str(family / name), data, out, kinds=("fisher", "gram"), items=1)
    key = "model.layers.0.mlp.up_proj.weight"

    def merged(folder: Path, prepared: Path | None) -> Tensor:
        recipe = recipe_of(family, folder, "regmean")
        opened = open_sources({name: open_checkpoint(ref.path) for name, ref in recipe.models.items()}, recipe)
        identity = {**{name: name for name in recipe.models}, **identities(opened.statistics)}
        merger = Merger(
            opened.tensors,
            statistics=opened.statistics,
            prepared_folder=prepared,
            identity=identity if prepared else None,
        )
        return dict(merger.merge_tensors(recipe, [key]))[key]

    first, second = (merged(folder, tmp_path / "prepared") for folder in (collected, fewer))
    assert not torch.equal(first, second)
    assert torch.equal(first, merged(collected, None))
    assert torch.equal(second, merged(fewer, None))


def config_file(config: dict[str, Any], folder: Path) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def searched(config: dict[str, Any], collected: Path, operator: str) -> dict[str, Any]:
    config["models"]["statistics"] = {name: str(collected / f"{name}.safetensors") for name in DOMAINS}
    config["space"] = {"operator": operator, "layers_per_group": 0}
    config["search"] = {"budget": 6, "finalists": 1, "optimizer": "random_search", "baselines": ["uniform_soup"]}
    config["cluster"]["workers"] = 1
    return config


def test_a_search_over_fisher_runs_and_exports_what_it_evaluated(
    family_config: dict[str, Any], collected: Path, tmp_path: Path
) -> None:
    path = config_file(searched(family_config, collected, "fisher"), tmp_path)
    done = meiosis("search", path)
    assert done.status == 0, done.err
    (best,) = (tmp_path / "results").glob("*/best")
    assert (best / "model.safetensors").is_file()


def refusal(call: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_statistics_that_are_not_there_not_ours_damaged_or_of_another_model_are_refused(
    family: Path, collected: Path, tmp_path: Path
) -> None:
    good = collected / "python.safetensors"
    assert "no such file; make it with `meiosis statistics" in refusal(open_statistics, tmp_path / "x", model="a")
    model = family / "python/model.safetensors"
    assert refusal(open_statistics, model, model="a").endswith(
        "was not written by `meiosis statistics`; name a file that was"
    )
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(good.read_bytes()[:-10])
    assert str(torn) in refusal(open_statistics, torn, model="a")
    assert "of the weights" not in refusal(open_statistics, torn, model="a")
    other = refusal(open_statistics, good, model="a", model_sha256="0" * 64)
    assert other.startswith(f"models.a.statistics: {good}: was made from the weights ")
    assert other.endswith("those of 'a' are 000000000000; make it again from this model")
    collect_statistics(
        str(family / "python"), family / "data/cpp/search.jsonl", tmp_path / "g.safetensors", kinds=("gram",), items=1
    )
    assert "holds gram statistics, expected fisher; make it again with --kind fisher" in refusal(
        open_statistics, tmp_path / "g.safetensors", model="a", kinds=("fisher",)
    )


def test_a_merge_with_the_statistics_of_another_model_leaves_nothing_behind(
    family: Path, collected: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(family, collected, "fisher")
    models = dict(recipe.models)
    models["cpp"] = models["cpp"].model_copy(update={"statistics": models["python"].statistics})
    found = refusal(merge_recipe, recipe.model_copy(update={"models": models}), tmp_path / "out")
    assert found.startswith("models.cpp.statistics: ")
    assert "was made from the weights" in found
    assert not list(tmp_path.iterdir())


def test_a_config_without_or_with_wrong_statistics_is_refused_with_its_lines(
    family_config: dict[str, Any], collected: Path, tmp_path: Path
) -> None:
    config = searched(family_config, collected, "regmean")
    config["models"]["statistics"] = {
        "pyton": str(collected / "python.safetensors"),
        "english": str(collected / "cpp.safetensors"),
    }
    with pytest.raises(ConfigError) as caught:
        check(load_config(config_file(config, tmp_path)))
    lines = sorted(line.partition(": ")[2] for line in str(caught.value).splitlines())
    assert len(lines) == 3
    assert any("models.statistics.pyton: no source is called 'pyton'; did you mean 'python'?" in line for line in lines)
    assert any("models.statistics.english: " in line and "was made from the weights" in line for line in lines)
    assert any(
        "space.operator: 'regmean' needs gram statistics of every source, 'cpp' has none" in line for line in lines
    )


def test_nothing_is_collected_for_what_cannot_be_written_or_read(family: Path, collected: Path, tmp_path: Path) -> None:
    model, data = str(family / "base"), family / "data/cpp/search.jsonl"

    def collect(out: Path, *, model: str = model, data: Path = data, **options: Any) -> str:
        return refusal(collect_statistics, model, data, out, kinds=("gram",), **options)

    assert "is a folder, expected the name of a file" in collect(tmp_path)
    assert "there is no folder" in collect(tmp_path / "a/b")
    assert "give --overwrite" in collect(collected / "cpp.safetensors")
    (tmp_path / "text").write_text("mine")
    assert "is no file of statistics; choose a new file" in collect(tmp_path / "text", overwrite=True)
    assert "device 'cuda:99': cannot be used here" in collect(tmp_path / "out", device="cuda:99")
    assert "no such file or folder" in collect(tmp_path / "out", data=tmp_path / "none.jsonl")
    (tmp_path / "short.jsonl").write_text('{"text": "a"}')
    assert "is 1 token with the tokenizer" in collect(tmp_path / "out", data=tmp_path / "short.jsonl")
    assert "no key 'body'" in collect(tmp_path / "out", field="body")
    folder = copy_of(family / "base", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    assert "expected a model that predicts the next token" in collect(tmp_path / "out", model=str(folder))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "text").read_text() == "mine"


def test_a_file_of_ours_is_replaced_when_asked_for(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for items in (1, 2):
        collect_statistics(
            str(family / "base"), family / "data/cpp/search.jsonl", out, kinds=("gram",), items=items, overwrite=True
        )
        assert metadata_of(out)["items"] == str(items)
    assert list(tmp_path.iterdir()) == [out]


# Folders that are not merged as they are


def fp8_of(folder: Path, to: Path, *, stored: bool) -> Path:
    """A copy whose layers are in fp8 with scales, or (not `stored`) the numbers that these stand for."""
    copy_of(folder, to)
    tensors = load_file(to / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max().reshape(1, 1) / 448
        narrow = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors |= {name: narrow, f"{name}_scale_inv": scale} if stored else {name: narrow.float() * scale}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    if stored:
        config = json.loads((to / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (to / "config.json").write_text(json.dumps(config))
    return to


def test_statistics_of_a_model_in_fp8_are_those_of_its_numbers(family: Path, tmp_path: Path) -> None:
    data, found = family / "data" / "python" / "search.jsonl", []
    for stored in (True, False):
        folder = fp8_of(family / "python", tmp_path / f"model-{stored}", stored=stored)
        out = tmp_path / f"{stored}.safetensors"
        collect_statistics(str(folder), data, out, kinds=("fisher", "gram"), items=2)
        found.append(load_file(out))
    assert found[0].keys() == found[1].keys()
    assert not [name for name in found[0] if "scale" in name]
    for name, tensor in found[1].items():
        torch.testing.assert_close(found[0][name], tensor)


def test_statistics_of_an_adapter_are_refused(family: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {"lora_A": torch.ones(2, 32), "lora_B": torch.ones(32, 2)}
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{layer}.{part}.weight": tensor for part, tensor in factors.items()}, adapter / "adapter_model.safetensors"
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    data = family / "data" / "python" / "search.jsonl"
    told = meiosis("statistics", adapter, tmp_path / "out.safetensors", "--data", data, "--kind", "gram")
    assert told.status == 2
    assert "is a LoRA adapter, expected a whole model; write it as one with `meiosis merge`" in told.err
    assert len(told.err.splitlines()) == 1
