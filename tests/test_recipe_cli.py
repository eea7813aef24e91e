"""`meiosis recipe`: what it writes is ready for `meiosis merge`, and makes what its formula says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import meiosis
from family import DOMAINS
from safetensors.torch import load_file

from search.recipe_file import read_recipe

SUBCOMMANDS = ("soup", "add", "negate", "analogy", "slerp", "karcher")


@pytest.fixture(scope="module")
def weights(family: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(family / name / "model.safetensors") for name in ("base", *DOMAINS)}


def merged(recipe: Path, folder: Path) -> dict[str, torch.Tensor]:
    ended = meiosis("merge", recipe, folder)
    assert ended.status == 0, ended.err
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_every_kind_has_help_with_an_example(command: str) -> None:
    ended = meiosis("recipe", command, "--help")
    assert ended.status == 0
    assert f"Example: meiosis recipe {command} " in ended.out


@pytest.mark.parametrize(
    ("arguments", "factors"),
    [
        (["soup", "{python}", "{cpp}"], {"python": 0.5, "cpp": 0.5}),
        (["soup", "{python}", "{cpp}", "--weights", "3,1"], {"python": 0.75, "cpp": 0.25}),
        (["add", "--base", "{base}", "{python}", "{cpp}"], {"base": 0.2, "python": 0.4, "cpp": 0.4}),
        (["negate", "--base", "{base}", "{python}", "--scale", "0.7"], {"base": 1.7, "python": -0.7}),
        (
            ["analogy", "--a", "{python}", "--b", "{cpp}", "--c", "{english}", "--scale", "0.5"],
            {"english": 1.0, "cpp": 0.5, "python": -0.5},
        ),
        (
            ["analogy", "--a", "{python}", "--b", "{cpp}", "--c", "{english}", "--base", "{base}", "--scale", "0.5"],
            {"base": 0.5, "english": 0.5, "cpp": 0.5, "python": -0.5},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_recipe_makes_what_its_formula_says(
    arguments: list[str],
    factors: dict[str, float],
    family: Path,
    weights: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    places = {name: str(family / name) for name in ("base", *DOMAINS)}
    recipe = tmp_path / "recipe.yaml"
    ended = meiosis("recipe", *(argument.format(**places) for argument in arguments), "-o", recipe)
    assert ended.status == 0, ended.err
    assert ended.out == ""
    found = merged(recipe, tmp_path / "out")
    for name, tensor in found.items():
        expected = sum(factor * weights[model][name].double() for model, factor in factors.items())
        assert torch.allclose(tensor.double(), torch.as_tensor(expected), atol=1e-5), name


def test_it_prints_the_recipe_where_no_file_is_named(family: Path, tmp_path: Path) -> None:
    ended = meiosis("recipe", "karcher", *(family / name for name in DOMAINS))
    assert ended.status == 0
    assert ended.err == ""
    (tmp_path / "r.yaml").write_text(ended.out)
    recipe = read_recipe(tmp_path / "r.yaml")
    assert tuple(recipe.models) == DOMAINS
    assert recipe.rules[0].operator == "karcher"


def test_a_curve_changes_t_over_the_layers_and_t_is_for_the_rest(family: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    arguments = [family / "python", family / "cpp", "--t", 0.3, "--t-curve", "0,0.2,1", "-o", path]
    assert meiosis("recipe", "slerp", *arguments).status == 0
    t = {name: rule.parameters["t"] for rule in read_recipe(path).rules for name in rule.tensors}
    assert t["model.layers.0.mlp.up_proj.weight"] == 0.0  # two layers: the ends of the curve
    assert t["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert t["model.embed_tokens.weight"] == t["model.norm.weight"] == 0.3
    found, cpp = merged(path, tmp_path / "out"), load_file(family / "cpp" / "model.safetensors")
    assert torch.allclose(found["model.layers.1.mlp.up_proj.weight"], cpp["model.layers.1.mlp.up_proj.weight"])


def test_slerp_with_a_base_interpolates_task_vectors(
    family: Path, weights: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    base = ["--base", family / "base"]
    assert meiosis("recipe", "slerp", family / "python", family / "cpp", *base, "-o", path).status == 0
    found, name = merged(path, tmp_path / "out"), "model.layers.0.mlp.up_proj.weight"
    first, second = (weights[model][name] - weights["base"][name] for model in ("python", "cpp"))
    norm = float((found[name] - weights["base"][name]).norm())
    assert norm > 1.05 * float((first + second).norm() / 2)  # a mean would be shorter
    assert min(float(first.norm()), float(second.norm())) * 0.95 < norm


def test_models_get_the_names_of_their_folders_or_their_own(family: Path) -> None:
    again = meiosis("recipe", "soup", family / "python", f"mine={family / 'cpp'}", family / "python")
    assert again.status == 0
    for name in ("  python:", "  mine:", "  python-2:"):
        assert name in again.out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["soup", "{family}/pyton"], "pyton"),
        (["soup", "{family}/python", "{family}/cpp", "--weights", "1"], "1 weights for 2 models"),
        (["soup", "{family}/python", "{family}/cpp", "--weights", "1,-1"], "add up to 0"),
        (["soup", "{family}/python", "--weights", "1;2"], "found '1;2', expected numbers with commas"),
        (["soup", "x={family}/python", "x={family}/cpp"], "two models are called 'x'"),
        (["soup", "x="], "no model after the '='"),
        (["soup", "x y={family}/python"], "names are made of letters"),
        (["soup"], "Missing argument 'MODEL...'"),
        (["slerp", "{family}/python"], "SECOND"),
        (["add", "{family}/python"], "--base"),
        (["soup", "{family}/python", "-o", "{family}/no/such/r.yaml"], "there is no folder"),
        (["soup", "{family}/python", "-o", "{family}/search.yaml/r.yaml"], "there is no folder"),
        (["soup", "{family}/python", "-o", "{family}/data/cpp/search.jsonl"], "exists, and nothing is overwritten"),
        (["slerp", "{family}/python", "{family}/cpp", "--t", "nan"], "expected a finite number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(arguments: list[str], fault: str, family: Path) -> None:
    ended = meiosis("recipe", *(argument.format(family=family) for argument in arguments))
    assert ended.status == 2
    assert ended.out == ""
    assert fault in ended.err
    assert len(ended.err.splitlines()) == 1
