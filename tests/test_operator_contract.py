"""What every registered operator keeps to, found by name: nothing here lists them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from search.merge.apply import Merger
from search.merge.check import check_recipe
from search.merge.operator import Operator
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe
from search.registry import OPERATORS

torch.set_num_threads(1)

SHAPES = {
    "matrix": (37, 111),
    "vector": (1500,),
    "one": (1,),
    "scalar": (),
    "nothing": (0, 4),
    "large": (300, 301),
}
OPERATOR_NAMES = OPERATORS.names()
every_operator = pytest.mark.parametrize("name", OPERATOR_NAMES)
either_way = pytest.mark.parametrize("compute", ["float32", "inputs"])


def family(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """A base and three models near it, as fine-tunes are."""
    generator = torch.Generator().manual_seed(seed)
    base = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
    models = {"base": base}
    for model in ("a", "b", "c"):
        models[model] = {
            key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in base.items()
        }
    return {model: {k: v.to(dtype) for k, v in tensors.items()} for model, tensors in models.items()}


def recipe_for(name: str, **changes: Any) -> Recipe:
    """A recipe that exercises the operator: parameters searched by default stand at their initial values."""
    operator = OPERATORS.get(name)
    count = min(3, operator.max_sources or 3)
    values = {
        p.name: p.search[2] if p.search is not None else 0.5 if p.default is None else p.default
        for p in operator.parameters
    }
    scope = {p.name: p.scope for p in operator.parameters}
    sources = {
        source: {key: value for key, value in values.items() if scope[key] == "source"}
        for source in ("a", "b", "c")[: max(count, operator.min_sources)]
    }
    shared = {key: value for key, value in values.items() if scope[key] == "shared"}
    data = {
        "base": "base" if operator.needs_base else None,
        "models": {
            model: {"path": model, "statistics": operator.statistics and "file"} for model in ("a", "base", "b", "c")
        },
        "rules": [{"operator": name, "sources": sources, "parameters": shared}],
        **changes,
    }
    return Recipe.from_data(data)


def statistics() -> dict[str, InMemoryTensors]:
    """Statistics of every kind for the models of `family`."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for model in ("base", "a", "b", "c"):
        tensors = {f"fisher/{key}": torch.rand(shape, generator=generator) for key, shape in SHAPES.items()}
        for key in ("matrix", "large"):
            inputs = torch.randn(40, SHAPES[key][1], generator=generator)
            tensors |= {f"gram/{key}": inputs.T @ inputs / 40, f"gram_axis/{key}": torch.tensor(1)}
        found[model] = InMemoryTensors(tensors)
    return found


STATISTICS = statistics()


def merger(models: dict[str, dict[str, Tensor]], **options: Any) -> Merger:
    sources = {model: InMemoryTensors(tensors) for model, tensors in models.items()}
    return Merger(sources, statistics=STATISTICS, **options)


def merged(recipe: Recipe, models: dict[str, dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    return dict(merger(models, **options).merge_tensors(recipe))


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@every_operator
def test_an_operator_describes_itself(name: str) -> None:
    operator = OPERATORS.get(name)
    assert isinstance(operator, Operator)
    assert operator.help
    assert "\n" not in operator.help
    assert operator.source
    assert len({p.name for p in operator.parameters}) == len(operator.parameters)
    assert 1 <= operator.min_sources <= (operator.max_sources or operator.min_sources)
    for parameter in operator.parameters:
        low = -float("inf") if parameter.low is None else parameter.low
        high = float("inf") if parameter.high is None else parameter.high
        assert parameter.help
        assert parameter.default is None or low <= float(parameter.default) <= high
        if parameter.search is not None:
            assert low <= parameter.search[0] <= parameter.search[2] <= parameter.search[1] <= high


def test_listing_and_checking_operators_does_not_load_torch() -> None:
    code = (
        "import sys; from search.registry import OPERATORS; import search.merge.check; "
        "assert all(operator.help for _, operator in OPERATORS); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@every_operator
def test_the_default_recipe_is_accepted(name: str) -> None:
    check_recipe(recipe_for(name))


@every_operator
def test_identical_models_merge_to_themselves(name: str) -> None:
    base = family()["base"]
    found = merged(recipe_for(name), dict.fromkeys(("base", "a", "b", "c"), base))
    for key, tensor in base.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)


@every_operator
@either_way
@pytest.mark.parametrize("block_elements", [1, 1024, 5 * 1024, 1 << 20])
def test_bits_do_not_depend_on_the_block_size(name: str, compute: str, block_elements: int) -> None:
    recipe, models = recipe_for(name, compute=compute), family()
    assert_same_bits(merged(recipe, models, block_elements=block_elements), merged(recipe, models))


@every_operator
@either_way
def test_bits_do_not_depend_on_the_number_of_threads(name: str, compute: str) -> None:
    recipe, models = recipe_for(name, compute=compute), family()
    one = merged(recipe, models)
    torch.set_num_threads(2)
    try:
        assert_same_bits(merged(recipe, models), one)
    finally:
        torch.set_num_threads(1)


@every_operator
def test_bits_do_not_depend_on_what_the_target_held_or_how_it_lies_in_memory(name: str) -> None:
    recipe, models = recipe_for(name), family()
    wanted = merged(recipe, models)
    noise = {key: torch.full_like(tensor, float("nan")) for key, tensor in wanted.items()}
    turned = {
        key: torch.full((*reversed(t.shape), 2), 3.0).permute(*range(t.dim(), -1, -1))[0] for key, t in wanted.items()
    }
    assert not turned["matrix"].is_contiguous()
    for targets in (noise, turned):
        merger(models, block_elements=1024).merge_into(recipe, targets)
        assert_same_bits(targets, wanted)


@every_operator
def test_bits_do_not_depend_on_earlier_merges(name: str) -> None:
    models = family()
    engine = merger(models)
    targets = {key: torch.empty_like(tensor) for key, tensor in models["base"].items()}
    for other in OPERATOR_NAMES:
        engine.merge_into(recipe_for(other, seed=3), targets)
    engine.merge_into(recipe_for(name), targets)
    assert_same_bits(targets, merged(recipe_for(name), models))


@every_operator
def test_merging_in_place_and_exporting_give_the_same_bits(name: str) -> None:
    models = family(torch.bfloat16)
    for dtype in (None, "float32", "float16"):
        recipe = recipe_for(name, dtype=dtype)
        exported = merged(recipe, models)
        targets = {key: torch.empty_like(tensor) for key, tensor in exported.items()}
        merger(models).merge_into(recipe, targets)
        assert_same_bits(targets, exported)
        assert {tensor.dtype for tensor in targets.values()} == {getattr(torch, dtype or "bfloat16")}


@every_operator
def test_narrow_types_are_merged_in_float32_and_rounded_once(name: str) -> None:
    narrow = family(torch.bfloat16)
    wide = {model: {key: t.float() for key, t in tensors.items()} for model, tensors in narrow.items()}
    rounded = {key: tensor.bfloat16() for key, tensor in merged(recipe_for(name), wide).items()}
    assert_same_bits(merged(recipe_for(name), narrow), rounded)


@every_operator
def test_double_precision_stays_double_precision(name: str) -> None:
    double = {  # numbers that float32 cannot hold
        model: {key: t * (1.0 + 2.0**-30) for key, t in tensors.items()}
        for model, tensors in family(torch.float64).items()
    }
    single = {model: {key: t.float() for key, t in tensors.items()} for model, tensors in double.items()}
    found = merged(recipe_for(name), double)
    for key, tensor in merged(recipe_for(name), single).items():
        assert found[key].dtype == torch.float64
        torch.testing.assert_close(found[key].float(), tensor, rtol=1e-5, atol=1e-6)
    if found["matrix"].numel():
        assert not torch.equal(found["matrix"], found["matrix"].float().double())


@every_operator
def test_sources_are_left_as_they_were(name: str) -> None:
    models = family()
    before = {model: {key: t.clone() for key, t in tensors.items()} for model, tensors in models.items()}
    merged(recipe_for(name), models)
    for model, tensors in before.items():
        assert_same_bits(models[model], tensors)


@every_operator
@either_way
def test_what_is_prepared_through_files_gives_the_same_bits(name: str, compute: str, tmp_path: Path) -> None:
    recipe, models = recipe_for(name, compute=compute), family()
    identity = {model: f"hash of {model}" for model in models}
    wanted = merged(recipe, models)
    for _ in range(2):  # the first writes the files, the second reads them
        assert_same_bits(merged(recipe, models, prepared_folder=tmp_path, identity=identity), wanted)
    assert bool(list(tmp_path.glob("*.safetensors"))) == (OPERATORS.get(name).prepares != "nothing")


@every_operator
def test_the_seed_matters_just_where_the_operator_says_that_it_draws(name: str) -> None:
    models = family()
    first, second = (merged(recipe_for(name, seed=seed), models)["matrix"] for seed in (0, 1))
    assert torch.equal(first, second) != OPERATORS.get(name).draws


@every_operator
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees_with_the_cpu(name: str) -> None:
    recipe, models = recipe_for(name), family()
    wanted = merged(recipe, models)
    for key, tensor in merged(recipe, models, device="cuda").items():
        torch.testing.assert_close(tensor.cpu(), wanted[key], rtol=1e-6, atol=1e-7)
