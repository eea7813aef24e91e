"""A path model is a plain checkpoint: what is exported computes what the live model on its path did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from path_models import PREFIX, Worker, greedy, logits, path_recipe, save_pair

from search.export import merge_recipe
from search.recipe import Recipe

torch.set_num_threads(1)

HOPS = [
    ("merged", 0),
    ("merged", 2),
    ("other", 1),
    ("merged", 2),
    ("merged", 1),
    ("base", 3),
    ("merged", 2),
    ("merged", 3),
]
SCALES = [1.0, 0.7, -1.3, 1.1, -0.6, -1.4, 1.25, 0.8]


@pytest.fixture(scope="module", params=sorted(PREFIX))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def models(kind: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pair(kind, tmp_path_factory.mktemp(kind))


def loaded(folder: Path) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def test_the_exported_model_computes_and_generates_as_the_live_one_on_its_path(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = path_recipe(kind, models, HOPS, SCALES)
    worker = Worker(models)
    with worker.on(recipe) as live:
        expected, without_cache, with_cache = logits(live), greedy(live, use_cache=False), greedy(live)
    exported = loaded(merge_recipe(recipe, tmp_path / "out"))
    torch.testing.assert_close(logits(exported), expected, rtol=0, atol=1e-4)
    assert with_cache == without_cache == greedy(exported)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported.config.num_hidden_layers == len(HOPS)
    again = Recipe.from_data(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text()))
    assert again.scales == recipe.scales
    assert again.layers == recipe.layers


def test_a_path_that_is_the_model_as_it_is_computes_the_same_bits(kind: str, models: dict[str, Path]) -> None:
    worker = Worker(models)
    plain = path_recipe(kind, models, [("merged", layer) for layer in range(4)], [1.0] * 4)
    with worker.on(plain) as live:
        on_path = logits(live)
    assert torch.equal(on_path, logits(worker.live.model))
