"""Models and adapters by hub id and revision, from the hub's cache: no network is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from search.checkpoints.reading import open_checkpoint
from search.errors import CheckpointError
from search.export import merge_recipe
from search.recipe import Recipe
from search.recipe_file import read_recipe

OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as huggingface_hub lays it out: a model in two revisions, and an adapter of it."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    for commit, value in ((OLD, 1.0), (NEW, 2.0)):
        snapshot = folder / "models--org--base" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"architectures": ["A"], "model_type": "a"}))
        save_file({"x.weight": torch.full((2, 2), value)}, snapshot / "model.safetensors")
    refs = folder / "models--org--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text(NEW)
    (refs / "v1").write_text(OLD)
    snapshot = folder / "models--org--lora" / "snapshots" / OLD
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    factors = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
    factors = {f"base_model.model.{name}": tensor for name, tensor in factors.items()}
    save_file(factors, snapshot / "adapter_model.safetensors")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(OLD)
    return folder


@pytest.mark.parametrize(
    ("name", "revision", "commit"),
    [
        ("org/base", None, NEW),
        ("org/base", "v1", OLD),
        ("org/base", OLD, OLD),
        ("org/base@v1", None, OLD),
        (f"org/base@{OLD}", None, OLD),
    ],
)
def test_a_revision_chooses_the_files(cache: Path, name: str, revision: str | None, commit: str) -> None:
    found = open_checkpoint(name, revision)
    assert found.folder == cache / "models--org--base" / "snapshots" / commit


def test_a_recipe_of_hub_ids_is_written_with_its_revisions_and_makes_the_same_again(
    cache: Path, tmp_path: Path
) -> None:
    recipe = Recipe.from_data(
        {
            "base": "base",
            "models": {"base": {"path": "org/base", "revision": "v1"}, "lora": {"path": "org/lora"}},
            "rules": [{"operator": "linear", "sources": {"lora": {"weight": 1.0}}}],
        }
    )
    out = merge_recipe(recipe, tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["x.weight"], torch.full((2, 2), 2.0))
    again = read_recipe(out / "recipe.yaml")
    assert again.models["base"].revision == "v1"
    second = merge_recipe(again, tmp_path / "second")
    assert (second / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_revision_that_is_not_there_is_one_line(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^'org/base@v9': no such folder, and no model of the hub"):
        open_checkpoint("org/base@v9")
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'v1'"):
        open_checkpoint(tmp_path, "v1")
