"""Fisher averaging and RegMean compute what their papers say: against NumPy in float64 and cases by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_form_cases import (
    close,
    merged,
    normal,
    recipe_of,
    tasks_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.errors import RecipeError
from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors

torch.set_num_threads(1)


# Fisher


def fisher(*values: Tensor, name: str = "w") -> list[dict[str, Tensor]]:
    return [{f"fisher/{name}": value.float()} for value in values]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 3.0), min_size=1, max_size=4), st.floats(0.5, 1.5), st.integers(0, 10**6))
def test_fisher_weighs_every_element_by_its_information(weights: list[float], scale: float, seed: int) -> None:
    tasks = tasks_of(len(weights), (30, 50), seed)
    base = normal(30, 50, seed=seed + 1)
    known = [normal(30, 50, seed=seed + 10 + i).square().float() for i in range(len(weights))]
    floor = 0.01 * np.mean([one.double().numpy().mean() for one in known])
    shares = [w * np.maximum(one.double().numpy(), floor) for w, one in zip(weights, known, strict=True)]
    mean = sum(s * task.numpy() for s, task in zip(shares, tasks, strict=True)) / sum(shares)
    found = merged(
        "fisher",
        tasks,
        base=base,
        statistics=fisher(*known),
        per_source=[{"weight": weight} for weight in weights],
        floor=0.01,
        **{"lambda": scale},
    )
    np.testing.assert_allclose(found.numpy(), scale * mean, rtol=1e-6, atol=1e-9)


def test_fisher_with_equal_information_is_the_average() -> None:
    tasks = tasks_of(3, (20, 30))
    known = normal(20, 30, seed=9).square()
    close(merged("fisher", tasks, statistics=fisher(known, known, known)), sum(tasks) / 3)


def test_elements_and_tensors_without_information_are_averaged() -> None:
    tasks = tasks_of(2, (4,))
    known = [torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 2.0, 3.0])]
    a, b = tasks
    wanted = [(a[0] + b[0]) / 2, a[1], b[2], (a[3] + 3 * b[3]) / 4]
    np.testing.assert_allclose(merged("fisher", tasks, statistics=fisher(*known), floor=0.0), wanted, rtol=1e-12)
    for statistics in (fisher(known[0]), fisher(*[torch.zeros(4)] * 2), fisher(*known, name="other")):
        found = merged("fisher", tasks, statistics=statistics, per_source=[{"weight": 3.0}, {"weight": 1.0}])
        close(found, (3 * a + b) / 4)


def test_tiny_information_is_not_lost_in_float32() -> None:
    known = [torch.full((3,), 3e-36), torch.full((3,), 1e-36)]
    tasks = [torch.ones(3), torch.zeros(3)]
    np.testing.assert_allclose(merged("fisher", tasks, statistics=fisher(*known)), [0.75] * 3, rtol=1e-6)


def test_statistics_of_another_shape_and_weights_of_zero_are_refused() -> None:
    tasks = tasks_of(2, (4,))
    with pytest.raises(
        RecipeError, match=r"^tensor 'w': the fisher statistics of 'm0' have shape \[3\], expected \[4\]"
    ):
        merged("fisher", tasks, statistics=fisher(torch.ones(3), torch.ones(4)))
    for operator in ("fisher", "regmean"):
        with pytest.raises(RecipeError, match=rf"^rules\[0\]: operator '{operator}': the weights 0, 0 sum to 0"):
            merged(operator, tasks, statistics=fisher(torch.ones(4), torch.ones(4)), per_source=[{"weight": 0.0}] * 2)


@pytest.mark.parametrize("operator", ["fisher", "regmean"])
def test_a_recipe_without_statistics_is_refused(operator: str) -> None:
    recipe = recipe_of(operator, 2, {}, None)
    bare = recipe.model_copy(
        update={"models": {name: ref.model_copy(update={"statistics": None}) for name, ref in recipe.models.items()}}
    )
    models = {name: InMemoryTensors({"w": torch.zeros(2)}) for name in bare.models}
    with pytest.raises(RecipeError, match=rf"^models.m0: operator '{operator}' needs its .* `meiosis statistics`"):
        dict(Merger(models).merge_tensors(bare))


# RegMean


def gram(inputs: list[Tensor], axis: int = 1) -> list[dict[str, Tensor]]:
    return [{"gram/w": (x.T @ x / len(x)), "gram_axis/w": torch.tensor(axis)} for x in inputs]


def test_regmean_minimises_the_change_of_the_outputs_of_every_model() -> None:
    tasks, inputs = tasks_of(3, (5, 8)), [normal(40, 8, seed=50 + i) for i in range(3)]
    stacked = np.concatenate([x.numpy() / np.sqrt(len(x)) for x in inputs])
    outputs = np.concatenate([(x @ w.T).numpy() / np.sqrt(len(x)) for x, w in zip(inputs, tasks, strict=True)])
    wanted = np.linalg.lstsq(stacked, outputs, rcond=None)[0].T
    found = merged("regmean", tasks, statistics=gram(inputs), alpha=1.0)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.1, 3.0), min_size=2, max_size=4), st.sampled_from([0.9, 0.4]), st.integers(0, 10**6))
def test_regmean_is_the_weighted_normal_equation(weights: list[float], alpha: float, seed: int) -> None:
    tasks = tasks_of(len(weights), (5, 8), seed)
    base = normal(5, 8, seed=seed + 5)
    statistics = gram([normal(30, 8, seed=seed + 50 + i) for i in range(len(weights))])
    grams = [one["gram/w"].numpy() for one in statistics]
    ridge = 1e-6 * np.mean([g.diagonal().mean() for g in grams])
    scaled = [
        w * (alpha * g + np.diag((1 - alpha) * g.diagonal() + ridge)) for w, g in zip(weights, grams, strict=True)
    ]
    wanted = np.linalg.solve(sum(scaled), sum(g @ t.numpy().T for g, t in zip(scaled, tasks, strict=True))).T
    per_source = [{"weight": weight} for weight in weights]
    found = merged(
        "regmean", tasks, base=base, statistics=statistics, per_source=per_source, alpha=alpha, **{"lambda": 0.7}
    )
    np.testing.assert_allclose(found.numpy(), 0.7 * wanted, rtol=1e-7, atol=1e-8)


def test_regmean_of_matrices_with_inputs_first_is_the_same_turned() -> None:
    tasks, inputs = tasks_of(2, (8, 5)), [normal(20, 8, seed=50 + i) for i in range(2)]
    turned = merged("regmean", [task.T for task in tasks], statistics=gram(inputs))
    close(merged("regmean", tasks, statistics=gram(inputs, axis=0)), turned.T)


def test_regmean_averages_where_no_input_went() -> None:
    tasks = tasks_of(2, (5, 4))
    inputs = [normal(20, 4, seed=50 + i) for i in range(2)]
    for x in inputs:
        x[:, 2] = 0.0
    found = merged("regmean", tasks, statistics=gram(inputs))
    close(found[:, 2], (tasks[0] + tasks[1])[:, 2] / 2)
    dead = gram([torch.zeros(3, 4, dtype=torch.float64)] * 2)
    for statistics in (dead, gram(inputs)[:1], [{}, {}]):
        close(merged("regmean", tasks, statistics=statistics), (tasks[0] + tasks[1]) / 2)


def test_regmean_takes_the_model_whose_inputs_are_the_only_ones() -> None:
    tasks = tasks_of(2, (5, 4))
    inputs = [normal(20, 4, seed=50), 1e-9 * normal(20, 4, seed=51)]
    np.testing.assert_allclose(merged("regmean", tasks, statistics=gram(inputs)), tasks[0], atol=1e-4)
