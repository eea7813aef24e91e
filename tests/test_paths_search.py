"""A search over paths, from config to exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from command_line import meiosis, write_config

from search.checkpoints.writing import written_sha256
from search.config import load_config
from search.errors import ConfigError
from search.evaluation import Evaluation
from search.genome import Genome
from search.local_pool import LocalPool
from search.pool import Job
from search.progress import Watcher
from search.recipe import Recipe
from search.run import Finished, export_trial, load_setup, start
from search.setup import Setup, check
from search.store.events import Ask, Trial
from search.worker_plan import worker_plan

torch.set_num_threads(1)


@pytest.fixture
def path_config(family_config: dict[str, Any]) -> dict[str, Any]:
    """A merge and its path in one genome."""
    family_config["space"]["path"] = {"pool": ["merged", "cpp"], "repeats": 2, "min_length": 2, "max_length": 5}
    family_config["search"] |= {"budget": 20, "baselines": ["uniform_soup"]}
    for section in family_config["evaluators"].values():
        section["max_tokens"] = 64
    return family_config


def setup_of(config: dict[str, Any], folder: Path) -> Setup:
    return check(load_config(write_config(config, folder)))


def search(setup: Setup) -> Finished:
    return start(setup, lambda setup, plan, folder: LocalPool(plan, setup.config.cluster.workers), Watcher(), "run")


def searched(found: Finished, setup: Setup) -> dict[int, Recipe]:
    """The recipes that the optimiser asked for."""
    asks = [event for event in found.folder.events() if isinstance(event, Ask) and event.genome is not None]
    return {ask.candidate: setup.space.decode(Genome(ask.genome)) for ask in asks if ask.genome is not None}


def test_merge_and_path_are_searched_together_and_a_path_is_exported_as_the_tensors_that_were_evaluated(
    path_config: dict[str, Any], tmp_path: Path
) -> None:
    path_config["space"]["path"]["margin"] = 0.05
    setup = setup_of(path_config, tmp_path)
    found = search(setup)
    failures = [event for event in found.folder.events() if isinstance(event, Trial) and event.failure_kind]
    assert not failures
    recipes = searched(found, setup)
    assert len({len(recipe.layers) for recipe in recipes.values() if recipe.layers}) > 1
    number, recipe = max(recipes.items(), key=lambda item: len(item[1].layers or ()))
    assert recipe.layers is not None
    assert len(recipe.layers) > 2
    out = tmp_path / "out"
    export_trial(found.folder, out, number, Watcher())
    written = Recipe.from_data(yaml.safe_load((out / "recipe.yaml").read_text()))
    assert (written.layers, written.scales) == (recipe.layers, recipe.scales)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == len(recipe.layers)

    body = Evaluation(replace(worker_plan(setup), evaluators=()))
    assert body.run(Job(0, recipe, "search", hash_weights=True)).weights_sha256 == written_sha256(out)
    ids = torch.arange(20)[None] * 13 % 300
    with torch.no_grad(), body._merged(recipe):
        live = body._model.model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, live, rtol=0, atol=1e-4)


def test_two_stages_move_parameters_first_then_the_path_and_replay(path_config: dict[str, Any], tmp_path: Path) -> None:
    path_config["space"] |= {"layers_per_group": 0, "split": []}
    path_config["space"]["path"] |= {"stage": "after", "share": 0.4, "margin": 0.05}
    setup = setup_of(path_config, tmp_path)
    found = search(setup)
    recipes = list(searched(found, setup).values())
    assert len(recipes) == 15  # of 20, after three parents, the base and a soup
    assert all(recipe.layers is None for recipe in recipes[:6])
    assert any(recipe.layers for recipe in recipes[6:])
    parameters = {
        str(rule.sources) for recipe in recipes[6:] for rule in recipe.rules if rule.operator == "task_arithmetic"
    }
    assert len(parameters) <= 2  # the merge is one, which has a rule for all that is in layers and one for the rest
    export_trial(found.folder, tmp_path / "out", None, Watcher())  # replays the history


def test_a_search_over_paths_alone_starts_at_the_first_model_of_the_pool(
    path_config: dict[str, Any], tmp_path: Path
) -> None:
    path_config["space"] = {"path": {"pool": ["python", "cpp"], "scales": "none", "repeats": 1}}
    setup = setup_of(path_config, tmp_path)
    assert all(gene.name.startswith("path/") for gene in setup.space.genes)
    first = setup.space.decode(setup.space.initial())
    assert first.layers is None
    assert [dict(rule.sources) for rule in first.rules] == [{"python": {"weight": 1.0}}]
    path_config["search"]["budget"] = 9
    assert load_setup(search(setup_of(path_config, tmp_path)).folder, Watcher()).space.path is not None


def test_plan_shows_the_genes_of_a_path(path_config: dict[str, Any], tmp_path: Path) -> None:
    path_config["space"]["path"]["stage"] = "after"
    ended = meiosis("plan", write_config(path_config, tmp_path))
    assert ended.status == 0, ended.err
    assert "4 layers used or not" in ended.out
    assert "5 scales" in ended.out
    assert "Paths: 2 to 5 layers, of merged, cpp with 2 each, offered 2 times; scales by slot" in ended.out
    assert "after the merge, which has 50% of the budget" in ended.out
    path = meiosis("plan", write_config(path_config, tmp_path), "--json").json["path"]
    assert (path["pool"], path["min_length"], path["max_length"]) == (["merged", "cpp"], 2, 5)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ({"pool": ["merged", "pyton"]}, "path.pool.1: no model is called 'pyton'; did you mean 'python'?"),
        ({"pool": ["merged"], "max_length": 1}, "path.max_length: the search starts with the 2 layers"),
        ({"pool": ["merged"], "repeat": 3}, "path.repeat: unknown key; did you mean 'repeats'?"),
        ({"pool": ["python"], "stage": "after"}, "path: stage: after searches paths of the best merge"),
    ],
)
def test_faults_of_a_path_are_told_with_their_line(
    path: dict[str, Any], line: str, path_config: dict[str, Any], tmp_path: Path
) -> None:
    path_config["space"]["path"] = path
    with pytest.raises(ConfigError) as error:
        setup_of(path_config, tmp_path)
    (found,) = str(error.value).splitlines()
    assert line in found
    assert found.split(":")[1].isdigit()


def test_a_path_over_post_norm_models_is_refused_before_anything_runs(
    path_config: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=320
    )
    for name in ("base", "python"):
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / name)
    path_config["models"] = {"base": str(tmp_path / "base"), "sources": {"python": str(tmp_path / "python")}}
    path_config["space"]["path"] = {"pool": ["merged", "python"]}
    with pytest.raises(ConfigError, match=r":\d+:\d+: space\.path: layers of a 'bert' model cannot form a path"):
        setup_of(path_config, tmp_path)


def test_the_example_over_paths_is_sound() -> None:
    example = Path(__file__).parent.parent / "examples" / "paths.yaml"
    config = load_config(example).config
    assert config.space.path is not None
    assert config.space.path.stage == "after"


def test_a_path_over_several_gpus_is_refused(path_config: dict[str, Any], tmp_path: Path) -> None:
    path_config["cluster"] |= {"pool": "ray", "gpus_per_worker": 2, "address": "head:6379"}
    with pytest.raises(ConfigError, match=r"space\.path: a path cannot be laid over several GPUs yet"):
        setup_of(path_config, tmp_path)
