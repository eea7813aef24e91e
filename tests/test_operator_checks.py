"""Parameters that are each within their bounds and do not go together: told before anything is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import meiosis
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import PARAMETERS

from search.errors import RecipeError
from search.merge.apply import Merger
from search.merge.check import check_recipe
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe
from search.registry import OPERATORS


def recipe(operator: str, *per_source: dict[str, Any], **shared: Any) -> Recipe:
    names = [f"m{index}" for index in range(len(per_source))]
    rule = {"operator": operator, "sources": dict(zip(names, per_source, strict=True)), "parameters": shared}
    models = {name: {"path": name, "statistics": "file"} for name in ("base", *names)}
    return Recipe.from_data({"base": "base", "models": models, "rules": [rule]})


def weighted(operator: str, *weights: float, **shared: Any) -> Recipe:
    return recipe(operator, *({"weight": weight} for weight in weights), **shared)


def merge(made: Recipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    models = {name: InMemoryTensors({"w": torch.randn(7, 5, generator=generator)}) for name in made.models}
    return dict(Merger(models).merge_tensors(made))["w"]


def test_recipes_of_the_tests_cover_every_operator_that_needs_no_statistics() -> None:
    assert set(PARAMETERS) == {name for name, operator in OPERATORS if operator.statistics is None}


@pytest.mark.parametrize(
    ("made", "fault"),
    [
        (weighted("linear", 1.0, -1.0), "the weights 1, -1 sum to 0"),
        (weighted("linear", 0.0), "the weights 0 sum to 0"),
        (weighted("linear", 0.1, 0.2, -0.3), "sum to 0"),
        (weighted("multislerp", 1.0, 1.0, -2.0), "the weights 1, 1, -2 sum to 0"),
        (weighted("fisher", 0.0, 0.0), "sum to 0"),
        (weighted("regmean", 0.0), "sum to 0"),
        (recipe("della", {"weight": 1.0, "density": 0.1}), "density 0.1 of 'm0' with epsilon 0.15 .* smaller epsilon"),
        (
            recipe("della_linear", {"weight": 1.0}, {"weight": 1.0, "density": 0.9}),
            r"density 0.9 of 'm1' with epsilon 0.15 gives probabilities from 0.75 to 1.05",
        ),
        (recipe("tall_mask", {}, {}, task=2), "task is 2, expected .* counted from 0: at most 1"),
    ],
)
def test_parameters_that_do_not_go_together_are_refused_by_the_check(made: Recipe, fault: str) -> None:
    with pytest.raises(RecipeError, match=rf"^rules\[0\]: operator '{made.rules[0].operator}': .*{fault}") as caught:
        check_recipe(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "made",
    [
        weighted("linear", 1.0, -1.0, normalize=False),
        weighted("multislerp", 1.0, -1.0, normalize_weights=False),
        weighted("multislerp", 0.0),
        weighted("task_arithmetic", 1.0, -1.0, normalize=True),
        weighted("dare_linear", 0.0, 0.0, normalize=True),
        weighted("ties", 1.0, -1.0),
        weighted("della", 1.0, 1.0),
        weighted("nuslerp", 0.0, 0.0),
        weighted("nuslerp", 1.0, -1.0),
        recipe("consensus", {}, k=2),
    ],
)
def test_a_sum_of_zero_has_a_finite_result_where_nothing_is_divided_by_it(made: Recipe) -> None:
    assert merge(made).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    operator=st.sampled_from(["linear", "multislerp", "nuslerp", "task_arithmetic", "ties", "dare_ties", "sce"]),
    weights=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 1e-9, 0.3, 0.5, 1.0]), min_size=2, max_size=2),
)
def test_weights_give_a_finite_merge_or_are_refused(operator: str, weights: list[float]) -> None:
    made = recipe("sce", {}, {}) if operator == "sce" else weighted(operator, *weights)
    if operator in ("linear", "multislerp") and abs(sum(weights)) <= 1e-6 * sum(map(abs, weights)):
        with pytest.raises(RecipeError, match="sum to 0"):
            merge(made)
    else:
        assert merge(made).isfinite().all()


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_ramplus_is_defined_where_every_model_changed_every_element(epsilon: float) -> None:
    base = torch.zeros(6)
    models = {"base": base, "m0": base + 1.0, "m1": base + 3.0}
    tensors = {name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()}
    found = dict(Merger(tensors).merge_tensors(recipe("ramplus_tl", {}, {}, epsilon=epsilon)))["w"]
    assert torch.equal(found, base + 2.0)


@pytest.mark.parametrize("operator", ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "della"])
def test_what_has_no_effect_in_mergekit_is_accepted_and_changes_nothing(operator: str) -> None:
    sources = ({"weight": 0.7}, {"weight": 0.4})
    idle = {"int8_mask": True} | ({"rescale": True} if operator == "task_arithmetic" else {})
    plain = merge(recipe(operator, *sources))
    assert torch.equal(merge(recipe(operator, *sources, **idle)), plain)
    if operator == "task_arithmetic":
        assert torch.equal(merge(recipe(operator, *({**one, "density": 0.2} for one in sources))), plain)


def test_a_dry_run_refuses_them_with_the_line_of_the_rule(family: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: base\nmodels:\n  base: {{path: {family / 'base'}}}\n  python: {{path: {family / 'python'}}}\n"
        "rules:\n- operator: della\n  sources:\n    python: {weight: 1.0, density: 0.1}\n"
    )
    told = meiosis("merge", file, tmp_path / "out", "--dry-run")
    assert told.status == 2
    assert told.err.startswith(f"meiosis: {file}:6:3: rules.0: operator 'della': density 0.1 of 'python'")
    assert len(told.err.splitlines()) == 1


def test_checks_do_not_load_torch() -> None:
    code = (
        "import sys; from search.merge.check import check_recipe; from search.errors import RecipeError\n"
        "from search.recipe import Recipe\n"
        "for name in ('linear', 'multislerp', 'della', 'tall_mask'):\n"
        "    rule = {'operator': name, 'sources': {'m': {}}, 'parameters': {}}\n"
        "    rule['parameters'] = {'task': 0} if name == 'tall_mask' else {'weight': 1.0}\n"
        "    check_recipe(Recipe.from_data({'base': 'b', 'models': {'b': {'path': 'b'}, 'm': {'path': 'm'}}, "
        "'rules': [rule]}))\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
