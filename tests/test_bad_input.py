"""Whatever is wrong with a recipe or its models: one line that names it, and nothing is left behind."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from search.errors import UserError
from search.export import merge_recipe
from search.recipe_file import read_recipe

torch.set_num_threads(1)

SHAPES = {"layers.0.weight": (6, 4), "layers.1.weight": (6, 4), "norm.weight": (4,)}
OPERATORS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.1},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "task_arithmetic": {"weight": 0.5},
}
SPOILED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    # what is put there -> where, and a strategy of wrong values
    "operator": ("operator", lambda draw: draw(st.text("abcdefgxyz_", min_size=1, max_size=9)) + "q"),
    "density": ("source", lambda draw: draw(st.one_of(st.floats(max_value=-1e-6), st.floats(min_value=1.000001)))),
    "weight": ("source", lambda draw: draw(st.sampled_from([float("nan"), float("inf"), "half", None, [1, 2]]))),
    "wieght": ("source", lambda draw: draw(st.floats(0, 1))),
    "lambda": ("shared", lambda draw: draw(st.sampled_from([float("nan"), "one", float("-inf"), {}]))),
    "nonsense": ("shared", lambda draw: draw(st.floats(0, 1))),
    "model": ("model", lambda draw: draw(st.sampled_from(["aa", "B", "", "base "]))),
    "tensors": ("tensors", lambda draw: draw(st.sampled_from(["layer.*", "layers.7.*", "norm.wieght", "[", "re:("]))),
}


def family(folder: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir()
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["L"]}))


def recipe_of(operator: str) -> dict[str, Any]:
    return {
        "base": "base",
        "models": {name: {"path": name} for name in ("base", "a", "b")},
        "rules": [
            {"operator": operator, "sources": {name: dict(OPERATORS[operator]) for name in "ab"}, "parameters": {}}
        ],
        "seed": 1,
    }


def refused(folder: Path, recipe: dict[str, Any]) -> str:
    """The one line that says why."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(UserError) as caught:
        merge_recipe(read_recipe(folder / "recipe.yaml"), folder / "out", folder=folder)
    assert {path.name for path in folder.iterdir()} == before
    line = str(caught.value)
    assert "\n" not in line, line
    return line


@given(data=st.data(), operator=st.sampled_from(list(OPERATORS)), fault=st.sampled_from(list(SPOILED)))
@settings(max_examples=120, deadline=None)
def test_a_recipe_with_one_fault_is_one_line_that_names_it(data: st.DataObject, operator: str, fault: str) -> None:
    where, wrong = SPOILED[fault]
    recipe = recipe_of(operator)
    rule, value = recipe["rules"][0], wrong(data.draw)
    if fault == "density" and "density" not in OPERATORS[operator]:
        fault = "wieght"  # any number is wrong where there is no such parameter
    match where:
        case "source":
            rule["sources"]["a"][fault] = value
        case "shared":
            rule["parameters"][fault] = value
        case "operator":
            rule["operator"] = value
        case "model":
            rule["sources"][value] = rule["sources"].pop("a")
        case "tensors":
            recipe["rules"].insert(0, {**rule, "tensors": [value]})
    with tempfile.TemporaryDirectory() as folder:
        family(Path(folder))
        line = refused(Path(folder), recipe)
    named = {"operator": "operator", "model": repr(value).strip("'"), "tensors": value}.get(fault, fault)
    assert str(named) in line


@given(
    data=st.data(),
    operator=st.sampled_from(list(OPERATORS)),
    fault=st.sampled_from(["shape", "missing", "nan", "inf", "cut", "text", "config"]),
    model=st.sampled_from(["base", "a", "b"]),
)
@settings(max_examples=120, deadline=None)
def test_a_model_with_one_fault_is_one_line_that_names_it(
    data: st.DataObject, operator: str, fault: str, model: str
) -> None:
    if operator == "linear" and model == "base":
        model = "a"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family(folder)
        file = folder / model / "model.safetensors"
        tensors = load_file(file)
        spoiled = data.draw(st.sampled_from(sorted(tensors)))
        match fault:
            case "shape":
                tensors[spoiled] = torch.zeros(*tensors[spoiled].shape, 2)
                save_file(tensors, file)
            case "missing":
                del tensors[spoiled]
                save_file(tensors, file)
            case "nan" | "inf":
                place = data.draw(st.integers(0, tensors[spoiled].numel() - 1))
                tensors[spoiled].view(-1)[place] = float(fault)
                save_file(tensors, file)
            case "cut":
                whole = file.read_bytes()
                file.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
            case "text":
                file.write_bytes(data.draw(st.binary(max_size=40)))
            case "config":
                (folder / model / "config.json").write_text(data.draw(st.sampled_from(["", "{", "[1]", "null"])))
        line = refused(folder, recipe_of(operator))
    assert model in line
    if fault in ("shape", "missing", "nan", "inf"):
        assert spoiled in line
