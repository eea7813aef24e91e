"""A worker on paths: layers that come back share memory, and nothing of a path is left for the next candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from path_models import LAYERS, Worker, logits, path_recipe, save_pair

from evaluators.base import EvaluatorSpec
from search.checkpoints.writing import written_sha256
from search.errors import RecipeError
from search.evaluation import Evaluation
from search.export import merge_recipe
from search.model_state import model_state
from search.pool import Job, WorkerPlan
from search.recipe import Recipe

torch.set_num_threads(1)

HOPS = [("merged", 0), ("other", 1), ("merged", 2), ("other", 1), ("merged", 1), ("merged", 2), ("merged", 3)]
SCALES = [1.0, 0.9, -1.2, 1.1, 0.8, -1.3, 1.0]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_pair("llama", tmp_path_factory.mktemp("llama"))


def recipe_of(models: dict[str, Path], **more: Any) -> Recipe:
    return path_recipe("llama", models, HOPS, SCALES, **more)


def plain(models: dict[str, Path]) -> Recipe:
    recipe = recipe_of(models)
    return recipe.model_copy(update={"layers": None, "scales": None, "rules": recipe.rules[-1:]})


def body(models: dict[str, Path], *evaluators: EvaluatorSpec, dtype: str | None = None) -> Evaluation:
    return Evaluation(WorkerPlan(recipe_of(models).models, "base", evaluators, "cpu", dtype))


def memory(model: Any) -> list[set[int]]:
    """Of every layer, where its tensors are."""
    return [{tensor.data_ptr() for tensor in layer.state_dict().values()} for layer in model.model.layers]


def test_hops_share_the_memory_of_their_layer_and_of_no_other(models: dict[str, Path]) -> None:
    worker = Worker(models)
    own = memory(worker.live.model)
    with worker.on(recipe_of(models)) as live:
        found = memory(live)
        assert [layer.self_attn.layer_idx for layer in live.model.layers] == list(range(len(HOPS)))
    for i, a in enumerate(HOPS):
        for j, b in enumerate(HOPS):
            assert (found[i] == found[j]) if a == b else not (found[i] & found[j])
    assert [found[0], found[1], found[2], found[6]] == own  # and layer 1 of the other merge is elsewhere
    with worker.on(recipe_of(models)) as live:
        assert memory(live) == found


def test_layers_whose_merge_did_not_change_are_not_merged_again(models: dict[str, Path]) -> None:
    worker = Worker(models)
    with worker.paths.on(recipe_of(models)) as first:
        assert first.bytes_read > 0
    other_way = path_recipe("llama", models, [HOPS[0], HOPS[1], HOPS[1], HOPS[6]], [1.0, 0.5, 2.0, 1.1])
    with worker.paths.on(other_way) as again:
        assert again.bytes_read == 0


def test_after_a_path_the_model_is_as_it_was(models: dict[str, Path]) -> None:
    worker, fresh = Worker(models), Worker(models)
    config, names = worker.live.model.config.to_dict(), list(model_state(worker.live.model))
    with worker.on(recipe_of(models)):
        assert len(worker.live.model.model.layers) == worker.live.model.config.num_hidden_layers == len(HOPS)
    assert worker.live.model.config.to_dict() == config
    assert list(model_state(worker.live.model)) == names
    assert [layer.self_attn.layer_idx for layer in worker.live.model.model.layers] == list(range(LAYERS))
    for one in (worker, fresh):
        one.merger.merge_into(plain(models), one.targets)
    assert torch.equal(logits(worker.live.model), logits(fresh.live.model))


def test_hidden_states_of_every_hop_can_be_asked_for(models: dict[str, Path]) -> None:
    worker = Worker(models)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = len(worker.live.model(ids, output_hidden_states=True).hidden_states)
        with worker.on(recipe_of(models)) as live:
            states = live(ids, output_hidden_states=True).hidden_states
        after = len(worker.live.model(ids, output_hidden_states=True).hidden_states)
    assert (before, len(states), after) == (LAYERS + 1, len(HOPS) + 1, LAYERS + 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("operator", "dtype"), [("linear", None), ("dare_linear", None), ("linear", "bfloat16")])
def test_what_is_exported_are_the_tensors_that_the_worker_had(
    kind: str, operator: str, dtype: str | None, models: dict[str, Path], tmp_path: Path
) -> None:
    if kind != "llama":
        models = save_pair(kind, tmp_path)
    recipe = path_recipe(kind, models, HOPS, SCALES, operator, dtype=dtype)
    worker = body(models, dtype=dtype)
    evaluated = [worker.run(Job(i, r, "search", hash_weights=True)) for i, r in enumerate([plain(models), recipe] * 2)]
    assert [outcome.failure for outcome in evaluated] == [None] * 4
    exported = written_sha256(merge_recipe(recipe, tmp_path / "out"))
    assert [outcome.weights_sha256 for outcome in evaluated][1::2] == [exported] * 2
    assert evaluated[0].weights_sha256 == evaluated[2].weights_sha256 != exported


def test_a_layer_has_the_same_masks_wherever_it_is_on_the_path(models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    hops = [("merged", layer) for layer in range(LAYERS)]
    short = path_recipe("llama", models, hops, [1.0] * 4, "dare_linear")
    long = path_recipe("llama", models, [hops[0], hops[2], hops[1], hops[2]], [1.0] * 4, "dare_linear")
    outs = [merge_recipe(one, tmp_path / str(index)) for index, one in enumerate((short, long))]
    first, second = (load_file(out / "model.safetensors") for out in outs)
    for ours, theirs in {0: 0, 1: 2, 2: 1, 3: 2}.items():
        for name, tensor in second.items():
            if name.startswith(f"model.layers.{ours}."):
                assert torch.equal(tensor, first[name.replace(f".{ours}.", f".{theirs}.", 1)])


def test_a_block_that_fails_on_a_path_leaves_a_model_that_works(models: dict[str, Path]) -> None:
    worker = Worker(models)
    with pytest.raises(ValueError, match="seven"), worker.on(recipe_of(models)):
        raise ValueError("seven")
    assert len(worker.live.model.model.layers) == worker.live.model.config.num_hidden_layers == LAYERS
    with worker.on(recipe_of(models)) as live:
        assert len(live.model.layers) == len(HOPS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scales": [1.0, 2.0]}, "found 2 numbers for 7 layers"),
        ({"scales": [1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]}, r"scales\[1\]: is 0"),
        ({"layers": None}, "found 7 numbers for 0 layers"),
    ],
)
def test_scales_that_do_not_fit_their_layers_are_refused(
    change: dict[str, Any], words: str, models: dict[str, Path]
) -> None:
    data = {**recipe_of(models).model_dump(mode="json"), **change}
    with pytest.raises(RecipeError, match=words):
        Recipe.from_data(data)


def test_a_path_that_merges_layers_of_several_numbers_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(models)
    assert recipe.layers is not None
    layers = ({"base": 0, "other": 1}, *recipe.layers[1:])
    with pytest.raises(RecipeError, match=r"layers\[0\]: merges layers 0, 1"):
        merge_recipe(recipe.model_copy(update={"layers": layers}), tmp_path / "out")


def test_scales_in_a_recipe_over_post_norm_models_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=40
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    rule = {"operator": "linear", "sources": {"bert": {"weight": 1.0}}}
    recipe = Recipe.from_data(
        {
            "models": {"bert": {"path": str(tmp_path / "bert")}},
            "rules": [rule],
            "layers": [{"bert": 0}, {"bert": 1}],
            "scales": [1.0, 0.5],
        }
    )
    with pytest.raises(RecipeError, match="scales: layers of a 'bert' model cannot form a path"):
        merge_recipe(recipe, tmp_path / "out")


def test_the_hash_of_a_recipe_covers_scales_and_without_them_is_what_it_was(models: dict[str, Path]) -> None:
    recipe = recipe_of(models)
    assert recipe.hash != recipe.model_copy(update={"scales": (1.0,) * len(HOPS)}).hash
    assert "scales" not in plain(models).canonical()
    assert Recipe.from_data(yaml.safe_load(recipe.to_yaml())) == recipe
