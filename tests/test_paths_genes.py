"""Genes of a path: which layers run, within which limits, and what scales the hidden state between them."""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from search.config import SpaceConfig
from search.genome import Genome
from search.parameter_genes import SpaceError
from search.paths.config import PathConfig
from search.paths.genes import Path, PathGenes, make_path_genes
from search.paths.scales import Slot
from search.recipe import ModelRef
from search.space import Space, make_space

DEPTH = 5
CONFIG = {"model_type": "llama", "num_hidden_layers": DEPTH}
TENSORS = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{rest}" for i in range(DEPTH) for rest in ("mlp.down_proj.weight", "self_attn.q_proj.weight")),
    "model.norm.weight",
)


def genes(**path: Any) -> PathGenes:
    return make_path_genes(PathConfig(**path), TENSORS, ("a", "b"), CONFIG)


def space(path: dict[str, Any] | None, **config: Any) -> Space:
    models = {name: ModelRef(path=name) for name in ("base", "a", "b")}
    section = SpaceConfig.model_validate({"path": path, "split": [], **config})
    return make_space(section, tensors=TENSORS, models=models, sources=("a", "b"), model_config=CONFIG)


def layers(path: Path) -> list[tuple[str, int]]:
    return [(slot.entry, slot.layer) for slot in path.slots]


OPTIONS = st.fixed_dictionaries(
    {
        "pool": st.sampled_from([("merged",), ("a", "b"), ("merged", "b"), ("b", "merged", "base")]),
        "repeats": st.integers(1, 3),
        "scales": st.sampled_from(["none", "slot", "pair", "network"]),
        "pinned": st.booleans(),
        "min_length": st.integers(1, DEPTH),
        "max_length": st.integers(DEPTH, 12),
    }
)


@given(OPTIONS)
def test_the_search_starts_with_the_first_model_of_the_pool_as_it_is(options: dict[str, Any]) -> None:
    found = genes(**options)
    path = found.decode(found.initial())
    assert layers(path) == [(options["pool"][0], layer) for layer in range(DEPTH)]
    assert path.scales == (1.0,) * DEPTH
    assert found.is_plain(path)


@given(OPTIONS, st.data())
def test_every_path_keeps_order_ends_and_limits(options: dict[str, Any], data: st.DataObject) -> None:
    found = genes(**options)
    x = data.draw(st.lists(st.floats(0, 1), min_size=len(found.genes), max_size=len(found.genes)))
    path = found.decode(x)
    assert options["min_length"] <= len(path.slots) <= options["max_length"]
    order = [(slot.repeat, options["pool"].index(slot.entry), slot.layer) for slot in path.slots]
    if options["pinned"]:
        first = options["pool"][0]
        assert layers(path)[0] == (first, 0)
        assert layers(path)[-1] == (first, DEPTH - 1)
        assert not {(first, 0), (first, DEPTH - 1)} & set(layers(path)[1:-1])
        order = order[1:-1]
    assert order == sorted(set(order))


@given(OPTIONS, st.data())
def test_scales_and_their_product_keep_their_bounds(options: dict[str, Any], data: st.DataObject) -> None:
    limit = data.draw(st.sampled_from([1.0, 1.5, 8.0]))
    low = data.draw(st.sampled_from([-1.5, 0.0, 0.5]))
    found = genes(**{**options, "scales": {"by": options["scales"], "low": low, "high": 2.0, "limit": limit}})
    path = found.decode(data.draw(st.lists(st.floats(0, 1), min_size=len(found.genes), max_size=len(found.genes))))
    products = list(accumulate(path.scales, mul))
    assert path.scales[0] == 1.0
    assert all(1 / limit * (1 - 1e-9) <= abs(product) <= limit * (1 + 1e-9) for product in products)
    if limit == 8.0 and low == 0.5 and max(map(abs, products)) < 7.9 and min(map(abs, products)) > 1 / 7.9:
        assert all(low - 1e-9 <= scale <= 2.0 + 1e-9 for scale in path.scales)


def test_a_path_too_long_loses_its_weakest_layers_and_one_too_short_gets_the_strongest() -> None:
    found = genes(pool=("a",), repeats=2, pinned=False, scales="none", min_length=3, max_length=5)
    long = found.decode([0.9, 0.6, 0.8, 0.7, 0.6, 0.95, 0.51, 0.0, 0.0, 0.0])
    assert layers(long) == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 0)]
    short = found.decode([0.1, 0.4, 0.2, 0.4, 0.0, 0.0, 0.7, 0.0, 0.0, 0.4])
    assert layers(short) == [("a", 1), ("a", 3), ("a", 1)]


def test_pairs_have_a_scale_for_every_two_layers_whatever_the_repeat() -> None:
    found = genes(pool=("a", "b"), scales="pair", pinned=False)
    names = [gene.name for gene in found.scales.genes]
    assert len(names) == (2 * DEPTH) ** 2
    values = [1.0] * len(names)
    values[names.index("path/a.1-b.2.scale")] = 0.9
    scales = found.scales.of(values, (Slot("a", 1, 0), Slot("b", 2, 0), Slot("a", 1, 1), Slot("b", 2, 1)))
    assert scales == (1.0, 0.9, 1.0, 0.9)


def test_the_network_gives_the_scales_that_its_formula_says() -> None:
    found = genes(
        pool=("a", "b"), repeats=2, scales={"by": "network", "hidden": 2, "low": 0.5, "high": 3.0}, pinned=False
    )
    weights = [0.3, -0.2, 0.5, 0.1, -0.4, 0.6, 0.2, -0.3, 0.8, -0.7, 0.05]
    assert len(found.scales.genes) == len(weights)

    def scale(i: int, j: int, t: int) -> float:
        x = [2 * i / 9 - 1, 2 * j / 9 - 1, 2 * t / 19 - 1]
        units = [
            math.tanh(sum(w * v for w, v in zip(weights[k : k + 3], x, strict=True)) + weights[k + 3]) for k in (0, 4)
        ]
        out = math.tanh(0.8 * units[0] - 0.7 * units[1] + 0.05)
        return 1 + out * (2.0 if out > 0 else 0.5)

    path = (Slot("a", 1, 0), Slot("b", 0, 0), Slot("a", 4, 1))
    assert found.scales.of(weights, path) == pytest.approx((1.0, scale(1, 5, 5), scale(5, 4, 14)))


def test_a_plain_path_is_the_recipe_without_one_so_that_it_is_known_already() -> None:
    both, plain = space({"pool": ["merged", "a"]}), space(None)
    start = both.decode(both.initial())
    assert start == plain.decode(plain.initial())
    assert both.recipe_hash(both.initial()) == start.hash
    assert both.suggest({"a": 0.5, "b": 0.1}) is not None
    only_a = space({"pool": ["a", "b"]})
    assert only_a.decode(only_a.initial()).layers is None
    assert only_a.groups == plain.groups


def test_a_recipe_of_a_path_reads_every_layer_where_the_path_has_it_and_merges_it_as_the_genome_says() -> None:
    found = space({"pool": ["merged", "a"], "repeats": 1, "scales": "none"})
    assert found.path is not None
    count = len(found.parameters.genes)
    x = [*found.initial().coordinates]
    on = {"path/merged.1.0.use": 0.0, "path/a.0.0.use": 1.0}
    for index, gene in enumerate(found.genes):
        x[index] = on.get(gene.name, x[index])
    recipe = found.decode(Genome(tuple(x)))
    everything = {"base": 0, "a": 0, "b": 0}
    assert recipe.layers is not None
    assert list(recipe.layers) == [
        everything,
        dict.fromkeys(everything, 2),
        dict.fromkeys(everything, 3),
        {"base": 0, "a": 0},
        dict.fromkeys(everything, 4),
    ]
    assert recipe.scales == (1.0,) * 5
    recipe.check()
    outputs = [
        *(name for name in TENSORS if ".layers." not in name),
        *(f"model.layers.{i}.{rest}" for i in range(5) for rest in ("mlp.down_proj.weight", "self_attn.q_proj.weight")),
    ]
    rules = recipe.assign(outputs)
    plain = space(None).decode(Genome(tuple(x[:count]))).assign(TENSORS)
    for hop, layer in enumerate([0, 2, 3, None, 4]):
        rule = rules[f"model.layers.{hop}.mlp.down_proj.weight"]
        if layer is None:
            assert rule.sources == {"a": {"weight": 1.0}}
        else:
            assert rule.sources == plain[f"model.layers.{layer}.mlp.down_proj.weight"].sources
    assert found.recipe_hash(Genome(tuple(x))) is None


@pytest.mark.parametrize(
    ("path", "key", "words"),
    [
        ({"pool": ["merged", "c"]}, ("path", "pool", 1), "no model is called 'c'"),
        (
            {"max_length": 4},
            ("path", "max_length"),
            "starts with the 5 layers of 'merged'; expected at least 5, found 4",
        ),
        ({"min_length": 6}, ("path", "min_length"), "expected at most 5, found 6"),
    ],
)
def test_what_no_path_could_be_is_refused_with_its_key(path: dict[str, Any], key: tuple[str], words: str) -> None:
    with pytest.raises(SpaceError, match=words) as error:
        space(path)
    assert error.value.key == key


def test_parameters_of_a_merge_that_is_not_in_the_pool_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"'merged' is not in space\.path\.pool"):
        space({"pool": ["a"]}, parameters={"weight": {"low": 0, "high": 1}})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ({"pool": ["a", "a"]}, "stands twice"),
        ({"min_length": 5, "max_length": 4}, "above max_length"),
        ({"pool": ["a"], "stage": "after"}, "must be in the pool"),
        ({"scales": {"by": "slot", "low": 1.1, "high": 1.2}}, "expected low <= 1 <= high"),
    ],
)
def test_options_that_exclude_each_other_are_refused(path: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PathConfig.model_validate(path)
