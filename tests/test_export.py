"""From a trial to a checkpoint: the bits that were evaluated, with all that a model needs and how to remake it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import Ended, meiosis, write_config
from family import DOMAINS, config_of, copy_of
from recipes import PARAMETERS, models_of, recipe_of

from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import CheckpointTensors, open_checkpoint
from search.evaluation import Evaluation
from search.export import merge_recipe
from search.pool import Job, WorkerPlan
from search.recipe import Recipe
from search.recipe_file import read_recipe
from search.store.events import Trial
from search.store.history import History
from search.store.run_folder import RunFolder

PARTS = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "recipe.yaml",
    "README.md",
    "meiosis.json",
}


@pytest.fixture(scope="module")
def run(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; its config is beside `runs`."""
    folder = tmp_path_factory.mktemp("export")
    config = config_of(family, folder / "runs")
    config["search"] |= {"budget": 20, "finalists": 2, "baselines": ["uniform_soup", "ties"]}
    ended = meiosis("search", write_config(config, folder), "--run", "run")
    assert ended.status == 0, ended.err
    return folder / "runs" / "run"


def config_file(run: Path) -> Path:
    return run.parents[1] / "config.yaml"


def trials_of(run: Path) -> list[Trial]:
    with History.open(RunFolder(run).history, writable=False) as history:
        return [event for event in history.events() if isinstance(event, Trial)]


def sha256(folder: Path) -> str:
    return fingerprint(open_checkpoint(folder), cache=False).sha256


def evaluated(model: Path, run: Path, items: str) -> dict[str, float]:
    ended = meiosis("evaluate", model, "--config", config_file(run), "--items", items, "--json")
    assert ended.status == 0, ended.err
    metrics = ended.json["metrics"]
    assert isinstance(metrics, dict)
    return metrics


# Out of a run


def test_the_winner_is_exported_with_the_tensors_that_were_certified(run: Path, tmp_path: Path) -> None:
    ended = meiosis("export", run, tmp_path / "out")
    assert ended.status == 0, ended.err
    assert sha256(tmp_path / "out") == sha256(run / "best")
    winner = json.loads((run / "best" / "meiosis.json").read_text())["weights_sha256"]
    certified = {trial.weights_sha256 for trial in trials_of(run) if trial.items == "certify"}
    assert winner in certified
    assert str(tmp_path / "out") in ended.out


def test_any_trial_exports_to_a_model_with_exactly_the_metrics_recorded(run: Path, tmp_path: Path) -> None:
    recorded = {(trial.candidate, trial.items): trial for trial in trials_of(run)}
    for candidate in (0, 3, 4, 19):
        out = tmp_path / str(candidate)
        ended = meiosis("export", run, out, "--trial", candidate)
        assert ended.status == 0, ended.err
        assert f"trial {candidate} " in ended.out
        for items in ("search", "select", "certify"):
            if (candidate, items) in recorded:
                assert evaluated(out, run, items) == dict(recorded[candidate, items].metrics)
    assert sha256(tmp_path / "0") == models_of(Path(yaml_of(run)["models"]["base"]["path"]).parent)["python"].sha256


def yaml_of(run: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((run / "run.yaml").read_text()))


def test_the_recipe_of_an_export_makes_the_same_bits_again(run: Path, tmp_path: Path) -> None:
    for name, trial in (("best", None), ("ties", 5), ("searched", 19)):
        out = tmp_path / name
        chosen = [] if trial is None else ["--trial", trial]
        assert meiosis("export", run, out, *chosen).status == 0
        again = tmp_path / f"{name} again"
        ended = meiosis("merge", out / "recipe.yaml", again)
        assert ended.status == 0, ended.err
        assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
        # And so on: the recipe of the copy works from where it is.
        third = tmp_path / f"{name} third"
        assert meiosis("merge", again / "recipe.yaml", third).status == 0
        assert sha256(third) == sha256(out)
        assert read_recipe(third / "recipe.yaml").hash == read_recipe(out / "recipe.yaml").hash


def test_an_exported_folder_is_whole_and_stock_transformers_loads_it(run: Path, family: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = run / "best"
    assert {path.name for path in folder.iterdir()} == PARTS
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tensors = CheckpointTensors(open_checkpoint(folder))
    assert all(torch.equal(tensors.get(name), model.state_dict()[name]) for name in tensors.names)
    tokenizer, theirs = (AutoTokenizer.from_pretrained(where) for where in (folder, family / "base"))
    text = "def main():\n    return 'ä'\n"
    assert tokenizer(text).input_ids == theirs(text).input_ids
    assert GenerationConfig.from_pretrained(folder) == GenerationConfig.from_pretrained(family / "base")
    inputs = tokenizer(text, return_tensors="pt").input_ids
    made = model.generate(inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, inputs.shape[1] + 4)


def test_the_card_names_parents_recipe_metrics_and_how_to_remake_it(run: Path, tmp_path: Path) -> None:
    folder = run / "best"
    card = (folder / "README.md").read_text()
    recipe = read_recipe(folder / "recipe.yaml")
    parts = card.split("---\n")
    metadata = yaml.safe_load(parts[1])
    assert metadata["library_name"] == "transformers"
    assert "merge" in metadata["tags"]
    assert set(metadata["base_model"]) <= set(DOMAINS) | {"base"}
    assert recipe.hash in card
    for name, ref in recipe.models.items():
        assert f"| {name} | {name} | {str(ref.sha256)[:16]} |" in card
    assert "meiosis merge recipe.yaml OUT" in card
    assert "Seed of the run: 0" in card
    winner = json.loads((folder / "meiosis.json").read_text())["weights_sha256"]
    certified = next(t for t in trials_of(run) if t.items == "certify" and t.weights_sha256 == winner)
    for metric, value in certified.metrics.items():
        assert f"| {metric} | {value:.6g} |" in card
    out = tmp_path / "out"
    assert meiosis("export", run, out, "--trial", 19).status == 0
    assert "Candidate 19 of the run, origin: search" in (out / "README.md").read_text()


def test_no_card_or_report_holds_a_path_of_this_machine(run: Path, family: Path, tmp_path: Path) -> None:
    relative = tmp_path / "recipes"
    relative.mkdir()
    (tmp_path / "models").symlink_to(family)
    recipe = recipe_of(family, "linear").model_dump(mode="json", exclude_none=True)
    for name, model in recipe["models"].items():
        model["path"] = f"../models/{name}"
    (relative / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert meiosis("merge", relative / "recipe.yaml", tmp_path / "out").status == 0
    for card in (run / "best" / "README.md", tmp_path / "out" / "README.md", run / "report.md"):
        text = card.read_text()
        assert str(family) not in text
        assert str(tmp_path.anchor + tmp_path.parts[1]) not in text
        assert ".." not in text.replace("...", "")


def test_the_best_so_far_of_an_unfinished_run_can_be_exported(run: Path, tmp_path: Path) -> None:
    """A history that ends in the search: as after a kill, before the finals."""
    from search.store.events import End

    copy = copy_of(run, tmp_path / "copy")
    shutil.rmtree(copy / "history")
    shutil.rmtree(copy / "best")
    with History.open(RunFolder(run).history, writable=False) as history:
        events = [e for e in history.events() if not isinstance(e, End) and getattr(e, "items", "search") == "search"]
    with History.open(RunFolder(copy).history) as history:
        for event in events:
            history.append(event)
    best = min((t for t in trials_of(copy) if t.loss is not None), key=lambda t: (t.loss, t.candidate))
    ended = meiosis("export", copy, tmp_path / "out")
    assert ended.status == 0, ended.err
    assert f"trial {best.candidate} " in ended.out
    assert evaluated(tmp_path / "out", run, "search") == dict(best.metrics)


def test_tensors_that_differ_from_the_evaluated_ones_are_not_handed_out(run: Path, tmp_path: Path) -> None:
    """The check itself: a trial that recorded other weights."""
    from dataclasses import replace

    from search.driver import Key, replay
    from search.errors import MeiosisError
    from search.export import export_candidate
    from search.run import Watcher, load_setup, make_population

    setup = load_setup(RunFolder(run), Watcher())
    population = make_population(setup, int(yaml_of(run)["window"]))
    with History.open(RunFolder(run).history, writable=False) as history:
        trials = replay(history.events(), population)
    candidate = population.candidates[0]
    good = trials[0, "search"]
    bad: dict[Key, Trial] = {(0, "search"): replace(good, weights_sha256="0" * 64)}
    with pytest.raises(MeiosisError, match="not those that were evaluated"):
        export_candidate(setup, candidate, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Where to


def test_a_folder_that_is_taken_is_refused_and_left_alone(run: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("all my work")
    recipe = run / "best" / "recipe.yaml"
    for command in (["export", run, taken], ["export", run, taken, "--overwrite"], ["merge", recipe, taken]):
        ended = meiosis(*command)
        assert ended.status == 2
        assert ended.err.count("\n") == 1
        assert str(taken) in ended.err
        assert ended.out == ""
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_a_model_that_was_exported_before(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert meiosis("export", run, out, "--trial", 1).status == 0
    first = sha256(out)
    assert meiosis("export", run, out, "--trial", 2).status == 2
    assert sha256(out) == first
    assert meiosis("export", run, out, "--trial", 2, "--overwrite").status == 0
    assert sha256(out) != first


# Every operator, and every dtype of the live model


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("operator", PARAMETERS)
def test_the_exported_tensors_are_the_evaluated_ones(
    operator: str, dtype: str | None, family: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(family, operator, dtype)
    body = Evaluation(WorkerPlan(models_of(family), "base", (), "cpu", dtype, threads=1))
    outcome = body.run(Job(0, recipe, "search", hash_weights=True))
    out = merge_recipe(recipe, tmp_path / "out")
    assert sha256(out) == outcome.weights_sha256
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    wanted = torch.float32 if dtype is None else getattr(torch, dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    inputs = torch.arange(40).reshape(2, 20)
    live = body._model.model
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, live(inputs).logits)
    assert json.loads((out / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")


def test_a_search_in_bfloat16_exports_what_it_evaluated(family: Path, tmp_path: Path) -> None:
    config = config_of(family, tmp_path / "runs")
    config["cluster"]["dtype"] = "bfloat16"
    config["search"] |= {"budget": 6, "finalists": 1, "baselines": []}
    file = write_config(config, tmp_path)
    ended = meiosis("search", file, "--run", "half", "--json")
    assert ended.status == 0, ended.err
    model = Path(ended.json["model"])
    winner = ended.json["verdict"]["winner"]
    recorded = next(t for t in trials_of(tmp_path / "runs" / "half") if (t.candidate, t.items) == (winner, "certify"))
    assert recorded.weights_sha256 == sha256(model)
    again = meiosis("evaluate", model, "--config", file, "--items", "certify", "--json")
    assert again.json["metrics"] == dict(recorded.metrics)


# Recipes by hand


def merged(recipe: dict[str, Any], folder: Path) -> Ended:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return meiosis("merge", path, folder / "out")


@pytest.fixture
def recipe(family: Path) -> dict[str, Any]:
    made: dict[str, Any] = recipe_of(family, "task_arithmetic").model_dump(mode="json", exclude_none=True)
    return made


def change(recipe: dict[str, Any], path: str, value: object) -> None:
    here: Any = recipe
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        here = here[part]
    here[last] = value


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("rulez", [], ["rulez", "did you mean 'rules'?"]),
        ("rules", [], ["rules", "at least 1"]),
        ("rules.0.operator", "tas_arithmetic", ["rules.0.operator", "did you mean 'task_arithmetic'?"]),
        ("rules.0.parameters.lambada", 1.0, ["rules.0.parameters.lambada", "did you mean 'lambda'?"]),
        ("rules.0.sources.cpp.weight", "much", ["rules.0.sources.cpp.weight", "'much'", "a number"]),
        ("rules.0.sources.cpp", {}, ["rules.0.sources.cpp", "needs a value for 'weight'"]),
        ("rules.0.sources.ccp", {"weight": 1.0}, ["rules.0.sources", "'ccp'", "did you mean 'cpp'?"]),
        ("rules.0.tensors", ["lm_haed.weight"], ["no rule of the recipe matches", "lm_head.weight"]),
        ("base", "bsae", ["base", "'bsae'", "did you mean 'base'?"]),
        ("dtype", "bfloat61", ["dtype", "did you mean 'bfloat16'?"]),
        ("models.cpp.path", "/no/such/model", ["/no/such/model"]),
        ("models.cpp.sha256", "0" * 64, ["models.cpp.sha256", "0" * 12, "leave sha256 out"]),
        ("meiosis", 2, ["meiosis", "2"]),
        ("seed", -1, ["seed", "greater than or equal to 0"]),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_a_mistake_in_a_recipe_is_one_line_with_status_2(
    path: str, value: object, expected: list[str], recipe: dict[str, Any], tmp_path: Path
) -> None:
    change(recipe, path, value)
    ended = merged(recipe, tmp_path)
    assert ended.status == 2, ended
    assert ended.err.count("\n") == 1, ended.err
    assert ended.out == ""
    for text in expected:
        assert text in ended.err
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_models_that_do_not_fit_is_refused_in_one_line(
    recipe: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, LlamaForCausalLM

    small = AutoConfig.from_pretrained(family / "base")
    small.intermediate_size = 40
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    recipe["models"]["cpp"] = {"path": "small"}
    ended = merged(recipe, tmp_path)
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert "'cpp'" in ended.err
    assert "shape" in ended.err


def test_a_recipe_over_weights_that_are_not_numbers_is_refused(
    recipe: dict[str, Any], family: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = copy_of(family / "cpp", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    recipe["models"]["cpp"] = {"path": "broken"}
    ended = merged(recipe, tmp_path)
    assert ended.status == 2
    assert ended.err.count("\n") == 1, ended.err
    assert "NaN" in ended.err


def test_a_recipe_may_leave_models_unused(recipe: dict[str, Any], family: Path, tmp_path: Path) -> None:
    recipe["rules"][0]["sources"] = {"english": {"weight": 1.0}}
    assert merged(recipe, tmp_path).status == 0
    assert Recipe.from_data(yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())).models.keys() == {
        "base",
        *DOMAINS,
    }


def test_a_taken_folder_with_a_model_of_ours_says_how_to_replace_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert merged(recipe, tmp_path).status == 0
    ended = merged(recipe, tmp_path)
    assert ended.status == 2
    assert "--overwrite" in ended.err
