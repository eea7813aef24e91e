"""Searches over adapters, fp8, mixed dtypes and tied heads: what is exported is what was evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import meiosis, write_config
from family import copy_of
from safetensors.torch import load_file, save_file

from cluster.shards import attach, shard_refs
from search.errors import WorkerError
from search.recipe import ModelRef

torch.set_num_threads(1)

WEIGHTS = "model.safetensors"


def adapter(folder: Path, base: Path, seed: int = 0) -> Path:
    """A LoRA adapter of the family's base, with random factors."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / WEIGHTS).items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1], generator=generator) * 0.1
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2, generator=generator) * 0.1
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def change(folder: Path, config: dict[str, Any], **how: Any) -> None:
    """Rewrite tensors whose names contain a word, and keys of the config."""
    tensors = load_file(folder / WEIGHTS)
    for name in tensors:
        tensors[name] = next((make for word, make in how.items() if word in name), lambda t: t)(tensors[name])
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def search(config: dict[str, Any], tmp_path: Path) -> Path:
    """A short search; returns the folder of its last candidate. That of the winner, loaded from its files, has the
    metrics that were recorded for the live one."""
    config["search"] = {"budget": 8, "finalists": 1, "baselines": ["uniform_soup", "ties"]}
    file = write_config(config, tmp_path)
    ended = meiosis("search", file, "--run", "run", "--json")
    assert ended.status == 0, ended.err
    status = meiosis("status", tmp_path / "results" / "run", "--json").json
    assert status["failures"] == {}
    verdict = ended.json["verdict"]
    winner = next(row for row in verdict["rows"] if row["candidate"] == verdict["winner"])
    again = meiosis("evaluate", ended.json["model"], "--config", file, "--items", "certify", "--json")
    assert winner["metrics"].items() <= again.json["metrics"].items()
    out = tmp_path / "out"
    exported = meiosis("export", tmp_path / "results" / "run", out, "--trial", 7)
    assert exported.status == 0, exported.err
    return out


def test_a_search_over_a_model_and_an_adapter(family: Path, family_config: dict[str, Any], tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", family / "base")
    family_config["models"]["sources"] = {"python": str(family / "python"), "lora": str(lora)}
    planned = meiosis("plan", write_config(family_config, tmp_path), "--json").json["models"]
    assert {name: one["kind"] for name, one in planned.items()} == {
        "base": "model",
        "python": "model",
        "lora": "adapter",
    }
    assert planned["lora"]["bytes"] == sum(t.nbytes for t in load_file(lora / "adapter_model.safetensors").values())
    shown = meiosis("plan", write_config(family_config, tmp_path))
    assert "LoRA" in shown.out
    out = search(family_config, tmp_path)
    base = load_file(family / "base" / WEIGHTS)
    found = load_file(out / WEIGHTS)
    assert found.keys() == base.keys()
    again = meiosis("merge", out / "recipe.yaml", tmp_path / "again")
    assert again.status == 0, again.err
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["fp8 base", "fp8 source", "mixed base", "tied base", "tied source"])
def test_a_search_over_models_that_are_stored_in_different_ways(
    kind: str, family: Path, family_config: dict[str, Any], tmp_path: Path
) -> None:
    what, where = kind.split()
    paths = {name: copy_of(family / name, tmp_path / name) for name in ("base", "python", "cpp")}
    odd = paths["base" if where == "base" else "cpp"]
    match what:
        case "fp8":
            tensors = load_file(odd / WEIGHTS)
            for name in [name for name in tensors if name.endswith("_proj.weight")]:
                scale = tensors[name].abs().amax() / 400
                tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
                tensors[name.replace(".weight", ".weight_scale")] = scale
            save_file(tensors, odd / WEIGHTS, metadata={"format": "pt"})
            change(odd, {"quantization_config": {"quant_method": "fp8"}})
        case "mixed":
            change(odd, {}, up_proj=lambda t: t.bfloat16(), k_proj=lambda t: t.half())
        case "tied":
            tensors = load_file(odd / WEIGHTS)
            del tensors["lm_head.weight"]
            save_file(tensors, odd / WEIGHTS, metadata={"format": "pt"})
            change(odd, {"tie_word_embeddings": True})
    family_config["models"] = {
        "base": str(paths["base"]),
        "sources": {"python": str(paths["python"]), "cpp": str(paths["cpp"])},
    }
    out = search(family_config, tmp_path)
    found = load_file(out / WEIGHTS)
    assert found.keys() == load_file(family / "base" / WEIGHTS).keys()
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] is False
    dtypes = {tensor.dtype for tensor in found.values()}
    assert len(dtypes) == 1


def test_an_adapter_alone_is_not_evaluated(family: Path, family_config: dict[str, Any], tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", family / "base")
    ended = meiosis("evaluate", lora, "--config", write_config(family_config, tmp_path))
    assert ended.status == 2
    assert "is a LoRA adapter, which cannot be evaluated; give the model that it was trained on" in ended.err
    family_config["models"]["base"] = str(lora)
    ended = meiosis("plan", write_config(family_config, tmp_path))
    assert ended.status == 2
    assert "models.base" in ended.err
    assert "is a LoRA adapter, which cannot be the base of a search" in ended.err


def test_workers_know_an_adapter_by_its_tensors_and_config(family: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", family / "base")
    models = {"base": ModelRef(path=str(family / "base")), "lora": ModelRef(path=str(lora))}
    refs = shard_refs(models, "base")
    assert attach(refs)["lora"].kind == "adapter"
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(WorkerError, match=r"model 'lora': .* hash to"):
        attach(refs)
    shutil.rmtree(lora)
    with pytest.raises(WorkerError, match="model 'lora': no folder"):
        attach(refs)
