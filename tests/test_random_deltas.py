"""Placebos: as large a change as the real one, in a direction that is random and always the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from evaluators.base import EvaluatorSpec
from search.errors import RecipeError
from search.evaluation import Evaluation
from search.export import merge_recipe
from search.merge.random_deltas import Kept, RandomDelta
from search.merge.sources import InMemoryTensors
from search.pool import Job, WorkerPlan
from search.recipe import ModelRef, Recipe

SHAPES = {"large": (130, 4097), "small": (3, 5), "vector": (7,), "number": (), "long": (1 << 21,)}


def pair(dtype: torch.dtype = torch.float32, scale: float = 0.1) -> tuple[InMemoryTensors, InMemoryTensors]:
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    source = {
        name: (t.float() + scale * torch.randn(t.shape, generator=generator)).to(dtype) for name, t in base.items()
    }
    return InMemoryTensors(source), InMemoryTensors(base)


def change(made: Any, base: InMemoryTensors, name: str) -> torch.Tensor:
    return made.get(name).double() - base.get(name).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_tensor_changes_by_as_much_as_that_of_the_source(dtype: torch.dtype) -> None:
    source, base = pair(dtype)
    placebo = RandomDelta(source, base, 5)
    for name in SHAPES:
        real = change(source, base, name).norm()
        assert float(change(placebo, base, name).norm()) == pytest.approx(float(real), rel=1e-4)
        assert placebo.get(name).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_direction_has_nothing_to_do_with_that_of_the_source_nor_with_that_of_another_seed_or_tensor() -> None:
    source, base = pair()
    one, two = RandomDelta(source, base, 5), RandomDelta(source, base, 6)
    first, other = change(one, base, "large").flatten(), change(two, base, "large").flatten()
    real, long = change(source, base, "large").flatten(), change(one, base, "long").flatten()
    for against in (other, real, long):
        count = min(len(first), len(against))
        cosine = torch.nn.functional.cosine_similarity(first[:count], against[:count], dim=0)
        assert abs(float(cosine)) < 5 / count**0.5
    standard = first / first.std()
    assert float((standard**4).mean()) == pytest.approx(3.0, rel=0.02)  # a Gaussian direction


def test_bits_depend_neither_on_threads_nor_on_order_nor_on_what_is_kept() -> None:
    source, base = pair()
    first = RandomDelta(source, base, 5)
    expected = {name: first.get(name) for name in SHAPES}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        second = RandomDelta(source, base, 5, Kept(0))
        for name in reversed(SHAPES):
            assert torch.equal(second.get(name), expected[name])
            assert torch.equal(second.get(name), expected[name])
    finally:
        torch.set_num_threads(threads)
    assert first.get("large") is expected["large"]


def test_whole_numbers_and_tensors_that_no_fine_tune_changed_stay() -> None:
    base = InMemoryTensors({"ids": torch.arange(5), "same": torch.ones(9)})
    source = InMemoryTensors({"ids": torch.arange(5), "same": torch.ones(9)})
    placebo = RandomDelta(source, base, 1)
    assert torch.equal(placebo.get("ids"), torch.arange(5))
    assert torch.equal(placebo.get("same"), torch.ones(9))


def recipe(family: Path, seed: int | None, **options: Any) -> Recipe:
    return Recipe.from_data(
        {
            "base": "base",
            "models": {
                "base": {"path": str(family / "base")},
                "python": {"path": str(family / "python"), "random_delta": seed},
                "cpp": {"path": str(family / "cpp")},
            },
            "rules": [{"operator": "ties", "sources": {n: {"weight": 0.5, "density": 0.5} for n in ("python", "cpp")}}],
            **options,
        }
    )


def test_a_placebo_is_part_of_a_recipe_and_of_its_hash(family: Path) -> None:
    plain, one, two = recipe(family, None), recipe(family, 1), recipe(family, 2)
    assert len({plain.hash, one.hash, two.hash}) == 3
    assert "random_delta" not in plain.hashed_text
    assert Recipe.from_data(yaml.safe_load(one.to_yaml())).hash == one.hash
    with pytest.raises(RecipeError, match=r"models.python.random_delta: .* has no base; name a base"):
        recipe(family, 1, base=None)
    on_base = copy.deepcopy(one.model_dump())
    on_base["models"]["base"]["random_delta"] = 3
    with pytest.raises(RecipeError, match="is the base itself"):
        Recipe.from_data(on_base)


def test_a_worker_merges_placebos_and_real_models_in_turn_and_export_gives_the_same_bits(
    family: Path, family_config: dict[str, Any], tmp_path: Path
) -> None:
    options = {k: v for k, v in family_config["evaluators"]["cpp"].items() if k != "use"}
    models = {name: ModelRef(path=str(family / name)) for name in ("base", "python", "cpp")}
    plan = WorkerPlan(
        models, "base", (EvaluatorSpec("cpp", "perplexity", options),), prepared_folder=str(tmp_path / "p")
    )
    worker = Evaluation(plan)
    hashes = []
    for number, seed in enumerate((None, 1, None, 2, 1)):
        outcome = worker.run(Job(number, recipe(family, seed), "search", hash_weights=True))
        assert outcome.failure is None
        hashes.append(outcome.weights_sha256)
    assert hashes[0] == hashes[2] != hashes[1] == hashes[4] != hashes[3]
    # What a placebo prepared is not taken for what the model has, in this process or another.
    again = Evaluation(plan).run(Job(0, recipe(family, None), "search", hash_weights=True))
    assert again.weights_sha256 == hashes[0]
    merge_recipe(recipe(family, 1), tmp_path / "out", threads=2)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    live = worker._model.targets(tuple(merged))
    assert all(torch.equal(merged[name], live[name]) for name in merged)
    assert "random_delta: 1" in (tmp_path / "out" / "recipe.yaml").read_text()
