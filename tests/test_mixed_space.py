"""Spaces that choose operators and sources: genes, recipes, hashes, faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape import BASELINES, SOURCES, TENSORS, population
from test_population import drive
from test_space import LLAMA, MODELS, space

from search.baseline import soup_rule, vectors_rule
from search.config import SpaceConfig
from search.genome import Gene, Genome
from search.grouping import BEHIND, Group, positions
from search.optimizers import optimizer_named
from search.population import Population
from search.recipe import Recipe
from search.same_merge import same_merge
from search.space import Space, SpaceError, make_space

OPERATORS = ["task_arithmetic", "ties", "della", "linear"]


def point(made: Space, **values: float | str) -> list[float]:
    """The start with some genes, named by what stands behind the group, at other values everywhere."""
    found = list(made.initial().coordinates)
    for index, gene in enumerate(made.genes):
        value = values.get(gene.name.partition("/")[2].replace(".", "_"))
        if value is not None:
            found[index] = gene.coordinate(gene.choices.index(value) if isinstance(value, str) else value)
    return found


def test_every_group_has_an_operator_gene_and_the_union_of_what_its_operators_search() -> None:
    made = space(operator=OPERATORS, layers_per_group=0, split=[])
    names = ["operator", *(f"{s}.{p}" for p in ("weight", "density", "epsilon") for s in ("a", "b"))]
    assert [gene.name for gene in made.genes] == [f"{g}/{n}" for g in ("layers", "rest") for n in names]
    assert made.genes[0].choices == tuple(OPERATORS)
    assert (made.genes[3].low, made.genes[3].high) == (0.1, 1.0)  # density: that of ties holds that of della


def test_each_operator_takes_its_own_parameters_within_its_own_bounds() -> None:
    made = space(operator=OPERATORS, layers_per_group=0, split=[])
    for name, own in [
        ("task_arithmetic", {"weight": 1.5}),
        ("ties", {"weight": 1.5, "density": 0.2001953125}),  # in steps of 1/1024
        ("della", {"weight": 1.5, "density": 0.3, "epsilon": 0.1}),
        ("linear", {"weight": 1.0}),
    ]:
        genome = Genome(
            tuple(point(made, operator=name, a_weight=1.5, b_weight=1.5, a_density=0.2, b_density=0.2, a_epsilon=0.1))
        )
        rule = made.decode(genome).rules[0]
        assert rule.operator == name
        assert rule.sources["a"] == pytest.approx(own, abs=1e-12)
        assert Recipe.from_data(made.decode(genome).model_dump()).hash == made.decode(genome).hash


def test_bounds_in_the_config_hold_for_the_operators_that_search_the_parameter_and_a_value_for_all_that_have_it() -> (
    None
):
    ranged = space(operator=OPERATORS[:2], split=[], parameters={"density": {"low": 0.2, "high": 0.4}})
    rule = ranged.decode(Genome(tuple(point(ranged, operator="task_arithmetic")))).rules[0]
    assert rule.sources["a"] == {"weight": 0.5}
    fixed = space(operator=OPERATORS[:2], split=[], parameters={"density": 0.3, "lambda": 2.0})
    assert not any("density" in gene.name for gene in fixed.genes)
    rule = fixed.decode(Genome(tuple(point(fixed, operator="ties")))).rules[0]
    assert rule.sources["a"] == {"density": 0.3, "weight": 0.5}
    assert rule.parameters == {"lambda": 2.0}


@given(operators=st.sampled_from([["ties"], OPERATORS]), subset=st.sampled_from([True, "group"]), data=st.data())
@settings(max_examples=40, deadline=None)
def test_genomes_that_differ_in_what_is_not_used_have_equal_hashes_and_others_do_not(
    operators: list[str], subset: object, data: st.DataObject
) -> None:
    made = space(operator=operators, subset=subset, layers_per_group=0, split=[])
    size = len(made.genes)
    coordinates = data.draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
    recipe = made.decode(Genome(tuple(coordinates)))
    hash_ = recipe.hash
    assert made.recipe_hash(Genome(tuple(coordinates))) is None  # there is no faster way than that
    assert Recipe.from_data(recipe.model_dump()).hash == hash_
    for index, gene in enumerate(made.genes):
        other = list(coordinates)
        other[index] = 1 - coordinates[index] if coordinates[index] != 0.5 else 0.75
        moved = made.decode(Genome(tuple(other)))
        assert (made.decode(Genome(tuple(other))).hash == hash_) == (moved.rules == recipe.rules)
        source, _, parameter = gene.name.partition("/")[2].partition(".")
        group = next((i for i, g in enumerate(made.groups) if g.name == gene.name.partition("/")[0]), None)
        if group is not None and parameter in ("weight", "density", "epsilon"):
            used = recipe.rules[group].sources.get(source, {})
            if parameter not in used:
                assert made.decode(Genome(tuple(other))).hash == hash_


def test_a_left_out_source_has_no_part_and_a_group_without_sources_is_the_base() -> None:
    made = space(subset=True, split=[])
    assert [gene.name for gene in made.genes[:2]] == ["all/a.included", "all/b.included"]
    without_b = made.decode(Genome(tuple(point(made, b_included=0.0))))
    assert {tuple(rule.sources) for rule in without_b.rules} == {("a",)}
    none = made.decode(Genome(tuple(point(made, a_included=0.0, b_included=0.0))))
    assert {(rule.operator, tuple(rule.sources)) for rule in none.rules} == {("linear", ("base",))}
    by_group = space(subset="group", split=[])
    coordinates = point(by_group)
    coordinates[0] = 0.0
    first, second, *_ = by_group.decode(Genome(tuple(coordinates))).rules
    assert (tuple(first.sources), tuple(second.sources)) == (("b",), ("a", "b"))


def test_the_start_has_all_sources_and_the_operator_of_the_best_baseline() -> None:
    made = space(operator=["ties", "task_arithmetic"], subset=True, split=[])
    start = made.decode(made.initial())
    assert {(rule.operator, tuple(rule.sources)) for rule in start.rules} == {("ties", ("a", "b"))}
    for asked, used in [("task_arithmetic", "task_arithmetic"), ("slerp", "ties"), (None, "ties")]:
        genome = made.suggest({"a": 1.0, "b": 0.25}, asked)
        assert genome is not None
        rules = made.decode(genome).rules
        assert {(rule.operator, tuple(rule.sources)) for rule in rules} == {(used, ("a", "b"))}
        assert rules[0].sources["b"]["weight"] == pytest.approx(0.25)
    first_has_none = space(operator=["slerp", "task_arithmetic"], split=[])
    genome = first_has_none.suggest({"a": 1.0, "b": 0.25}, "ties")
    assert genome is not None
    assert first_has_none.decode(genome).rules[0].operator == "task_arithmetic"
    assert space(operator=["slerp", "karcher"], split=[]).suggest({"a": 1.0}) is None


def test_a_choice_stands_in_the_middle_of_its_part_of_the_range() -> None:
    gene = Gene("g/operator", 0, 2, 0, "choice", None, ("x", "y", "z"))
    assert [gene.value(gene.coordinate(index)) for index in range(3)] == ["x", "y", "z"]
    assert gene.coordinate(1) == 0.5


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"operator": ["ties", "tiess"]}, ("operator", 1), "did you mean 'ties'"),
        ({"operator": ["ties", "passthrough"]}, ("operator", 1), "'passthrough' takes .* the config has 2"),
        ({"operator": ["ties", "slerp"], "subset": True}, ("subset",), "'slerp' takes no fewer than 2 sources"),
        ({"operator": "nuslerp", "subset": "group"}, ("subset",), "'nuslerp' takes no fewer than 2"),
        ({"operator": ["ties", "della"], "parameters": {"densty": 1.0}}, ("parameters", "densty"), "mean 'density'"),
        (
            {"operator": ["ties", "della"], "parameters": {"density": {"low": 0, "high": 2}}},
            ("parameters", "density"),
            "go beyond",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_at_its_key(
    changes: dict[str, object], key: tuple[str | int, ...], message: str
) -> None:
    with pytest.raises(SpaceError, match=message) as refused:
        space(**changes)
    assert refused.value.key == key


def test_an_operator_of_two_is_refused_beside_others_when_there_are_three_sources() -> None:
    config = SpaceConfig.model_validate({"operator": ["ties", "slerp"]})
    with pytest.raises(SpaceError, match="'slerp' takes exactly 2 sources, the config has 3"):
        make_space(config, tensors=LLAMA, models=MODELS, sources=("a", "b", "c"))


@pytest.mark.parametrize(
    ("value", "message"),
    [(3, "found 3"), ([], r"found \[\]"), (["ties", 1], "list of names"), (["ties", "ties"], "'ties' stands twice")],
)
def test_a_list_of_operators_that_is_none_is_one_fault(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        SpaceConfig.model_validate({"operator": value})
    assert refused.value.error_count() == 1  # type: ignore[attr-defined]  # of pydantic's ValidationError


def test_one_operator_in_a_list_is_that_operator() -> None:
    assert space(operator=["ties"]).recipe_hash(space(operator="ties").initial()) == (
        space(operator="ties").recipe_hash(space(operator="ties").initial())
    )
    assert space(operator=["ties"]).genes == space(operator="ties").genes


def test_genes_know_where_a_forward_pass_meets_them() -> None:
    made = space(layers_per_group=2, split=["embedding", "attention", "head", "norm"], subset=True)
    where = {gene.name.partition("/")[0]: gene.position for gene in made.genes}
    assert where["all"] == 0
    assert where["embedding"] == 0
    assert (where["layers0-1"], where["layers0-1.attention"], where["layers10-11.norm"]) == (1, 1, 11)
    assert where["head"] == where["norm"] == BEHIND
    together = space(layers_per_group=0, split=[])  # the embedding shares its genes with norm and head
    assert {gene.name.partition("/")[0]: gene.position for gene in together.genes} == {"layers": 1, "rest": 0}
    mine = space(split=[], patterns={"mine": r"layers\.[57]\."})
    assert next(gene.position for gene in mine.genes if gene.name.startswith("mine/")) == 6


def test_the_layers_of_a_decoder_come_after_those_of_its_encoder() -> None:
    names = ["shared.weight", *(f"{s}.block.{n}.layer.0.q.weight" for s in ("decoder", "encoder") for n in (0, 1))]
    groups = tuple(Group(name, (name,)) for name in names)
    assert [positions(groups)[name] for name in names] == [0, 3, 4, 1, 2]


def test_the_same_merge_is_recognised_however_it_is_written() -> None:
    made = space(split=[], parameters={"weight": {"low": 0, "high": 1}})

    def expressed(rule: object, weights: dict[str, float]) -> bool:
        genome = made.suggest(weights)
        assert genome is not None
        return same_merge(made.recipe((rule,)), made.decode(genome))  # type: ignore[arg-type]  # a Rule

    assert expressed(soup_rule(("a",)), {"a": 1.0, "b": 0.0})
    assert expressed(soup_rule(("a", "b")), {"a": 0.5, "b": 0.5})
    assert expressed(soup_rule(("base",)), {"a": 0.0, "b": 0.0})
    assert expressed(vectors_rule({"a": 0.25, "b": 1.0}), {"a": 0.25, "b": 1.0})
    assert not expressed(vectors_rule({"a": 1.5}), {"a": 1.5, "b": 0.0})  # clipped at 1
    assert not expressed(soup_rule(("a", "b")), {"a": 0.5, "b": 0.4})
    slerp = soup_rule(("a", "b")).model_copy(update={"operator": "slerp", "parameters": {"t": 0.5}})
    assert not expressed(slerp, {"a": 0.5, "b": 0.5})
    assert not expressed(
        soup_rule(("a", "b")).model_copy(update={"tensors": ("lm_head.weight",)}), {"a": 0.5, "b": 0.5}
    )
    soup = made.recipe((soup_rule(("a", "b")),))
    assert same_merge(soup, soup)
    assert not same_merge(soup, made.recipe(soup.rules, ({"a": 0}, {"a": 0})))  # on a path


def mixed_population(optimizer: str, seed: int = 0) -> Population:
    """The landscape's population with operators and sources to choose from."""
    made = population(budget=70, optimizer=optimizer)
    config = SpaceConfig.model_validate(
        {"operator": ["task_arithmetic", "linear", "ties"], "subset": "group", "split": []}
    )
    mixed = make_space(config, tensors=TENSORS, models=made._space.models, sources=SOURCES)
    return Population(
        mixed, made.objective, BASELINES, optimizer_named(optimizer), budget=70, window=4, seed=seed, step=0.1
    )


@pytest.mark.parametrize("optimizer", ["diagonal_cma", "natural_niches", "map_elites", "TwoPointsDE"])
def test_a_search_over_operators_and_sources_repeats_itself_and_knows_its_hashes(optimizer: str) -> None:
    first, second = (drive(mixed_population(optimizer), 70, 4) for _ in range(2))
    assert [c.genome for c in first] == [c.genome for c in second]
    assert all(candidate.recipe_hash == replace(candidate, known_hash=None).recipe_hash for candidate in first)
    operators = {rule.operator for c in first if c.genome is not None for rule in c.recipe.rules}
    assert operators == {"task_arithmetic", "linear", "ties"}
    start = next(c for c in first if c.genome is not None)
    assert all(tuple(rule.sources) == ("a", "b", "c") for rule in start.recipe.rules)
