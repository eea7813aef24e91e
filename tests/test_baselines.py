"""The standard merges of generation 0: what each proposes, by hand and by brute force, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import meiosis, write_config
from family import DOMAINS
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape import TENSORS
from pydantic import ValidationError

from search.baseline import BASELINES, Facts, Generation0, Proposal, check_baseline, parent_label, start_baseline
from search.curves import slerp_rules
from search.grouping import Group
from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors
from search.objective import FAILED_LOSS
from search.recipe import ModelRef, Recipe, Rule
from search.scales import PAPER, at_depth
from search.status import run_status
from search.store.run_folder import RunFolder

Loss = Callable[[Proposal], float]
ABC = ("a", "b", "c")


def proposals(
    name: str,
    loss: Loss,
    options: Mapping[str, Any] | None = None,
    sources: tuple[str, ...] = ABC,
    parents: Mapping[str, float] | None = None,
) -> dict[str, Proposal]:
    """All that a baseline proposes, each evaluated at once."""
    losses = {parent_label(source): (parents or {}).get(source, float(i)) for i, source in enumerate(sources)}
    known = Generation0(sources, losses.get, groups=(Group("all", tuple(TENSORS)),))
    found: dict[str, Proposal] = {}
    for proposal in start_baseline(name, options or {}, known):
        assert proposal is not None, "it waits for what it has"
        assert proposal.label not in found
        found[proposal.label] = proposal
        losses[proposal.label] = loss(proposal)
    return found


def weights(rule: Rule) -> dict[str, Any]:
    return {source: values.get("weight") for source, values in rule.sources.items()}


def flat(_: Proposal) -> float:
    return 1.0


# Soups


def members(proposal: Proposal) -> frozenset[str]:
    return frozenset(proposal.rules[0].sources)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_greedy_soup_is_that_of_recipe_1_of_the_paper(data: st.DataObject) -> None:
    """Against the recipe written down a second time, on losses with many ties."""
    sources = tuple("abcde")[: data.draw(st.integers(1, 5))]
    values = st.sampled_from([0.0, 1.0, 2.0, FAILED_LOSS])
    losses: dict[frozenset[str], float] = {}

    def loss(soup: frozenset[str]) -> float:
        return losses.setdefault(soup, data.draw(values))

    accuracy = {source: -loss(frozenset([source])) for source in sources}
    order = sorted(sources, key=lambda source: (-accuracy[source], sources.index(source)))
    ingredients: list[str] = [order[0]]
    for source in order[1:]:
        if -loss(frozenset([*ingredients, source])) >= -loss(frozenset(ingredients)):
            ingredients.append(source)
    parents = {source: -value for source, value in accuracy.items()}
    found = proposals("greedy_soup", lambda p: loss(members(p)), sources=sources, parents=parents)
    final = found["greedy_soup"]
    assert tuple(final.rules[0].sources) == tuple(ingredients)
    assert set(weights(final.rules[0]).values()) == {1.0}  # a mean over the members
    assert final.rules[0].parameters.get("normalize", True)
    steps = [p for p in found.values() if p.step]
    assert len(steps) == len(sources) - 1
    assert not final.step


def test_an_ingredient_that_changes_nothing_is_kept_as_in_the_paper() -> None:
    found = proposals("greedy_soup", flat, parents={"a": 1.0, "b": 1.0, "c": 1.0})
    assert members(found["greedy_soup"]) == frozenset(ABC)


def test_the_uniform_soup_is_the_mean_of_all() -> None:
    (soup,) = proposals("uniform_soup", flat).values()
    assert set(weights(soup.rules[0]).values()) == {1.0}
    assert members(soup) == frozenset(ABC)


# Arithmetic


def test_task_arithmetic_takes_a_list_of_scales_or_that_of_the_paper() -> None:
    assert len(proposals("task_arithmetic", flat)) == 7
    swept = proposals("task_arithmetic", flat, {"scales": "paper"})
    assert [p.rules[0].sources["b"]["weight"] for p in swept.values()] == list(PAPER)
    assert PAPER[:3] == (0.0, 0.05, 0.1)
    assert (len(PAPER), PAPER[-1]) == (21, 1.0)


def merged(rules: tuple[Rule, ...], models: Mapping[str, torch.Tensor], name: str = "w") -> torch.Tensor:
    recipe = Recipe(base="base", models={model: ModelRef(path=model) for model in models}, rules=rules)
    held = {model: InMemoryTensors({name: tensor}) for model, tensor in models.items()}
    return dict(Merger(held).merge_tensors(recipe))[name]


def random_models(names: tuple[str, ...] = ("base", *ABC), spread: float = 0.1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(40, generator=generator)
    return {name: base + (name != "base") * spread * torch.randn(40, generator=generator) for name in names}


def test_negation_takes_a_task_vector_away() -> None:
    models = random_models()
    found = proposals("negation", flat, {"forget": "b", "scales": [0, 0.5, 1]})
    assert list(found) == ["negation:b 0", "negation:b 0.5", "negation:b 1"]
    for scale, proposal in zip((0, 0.5, 1), found.values(), strict=True):
        expected = models["base"] - scale * (models["b"] - models["base"])
        assert torch.allclose(merged(proposal.rules, models), expected, atol=1e-6)


@pytest.mark.parametrize("start", ["base", "c"])
def test_an_analogy_goes_from_c_as_from_a_to_b(start: str) -> None:
    models = random_models()
    found = proposals("analogy", flat, {"a": "a", "b": "b", "c": "c", "start": start, "scales": [0.3, 1]})
    base, a, b, c = (models[name] for name in ("base", *ABC))
    for scale, proposal in zip((0.3, 1), found.values(), strict=True):
        step = (c - base) + (b - base) - (a - base)
        expected = base + scale * step if start == "base" else c + scale * (b - a)
        assert torch.allclose(merged(proposal.rules, models), expected, atol=1e-6)


def test_ties_sweeps_the_density_and_then_lambda_at_the_best_one() -> None:
    best = {"ties 0.5": 0.0, "ties 0.5 x1.5": -1.0}
    assert list(proposals("ties", flat)) == ["ties 0.2", "ties 0.5", "ties 1", "ties 0.2 x0.5"]
    assert list(proposals("ties", flat, {"halvings": 0})) == ["ties 0.2", "ties 0.5", "ties 1"]
    found = proposals("ties", lambda p: best.get(p.label, 1.0), {"lambdas": [0.5, 1, 1.5]})
    assert list(found) == ["ties 0.2", "ties 0.5", "ties 1", "ties 0.5 x0.5", "ties 0.5 x1.5"]
    assert found["ties 0.5 x1.5"].rules[0].parameters == {"lambda": 1.5}
    assert found["ties 0.2"].rules[0].parameters == {}
    grid = proposals("dare_ties", flat, {"densities": [0.1, 0.9], "lambdas": [1, 2], "grid": True})
    assert list(grid) == ["dare_ties 0.1", "dare_ties 0.9", "dare_ties 0.1 x2", "dare_ties 0.9 x2"]


def test_a_sweep_goes_on_below_its_smallest_value_as_long_as_that_is_better_than_all_others() -> None:
    def smaller_is_better_down_to(least: float) -> Loss:
        return lambda p: abs(float(p.label.split(" ")[-1].lstrip("x")) - least)

    for name in ("task_arithmetic", "tsv_m", "iso_c"):
        given = {"scales": [0.5, 0.8, 1]}
        found = proposals(name, smaller_is_better_down_to(0.13), given)
        assert list(found) == [f"{name} {scale}" for scale in ("0.5", "0.8", "1", "0.25", "0.125", "0.0625")]
        assert len(proposals(name, smaller_is_better_down_to(0), given)) == 3 + 3, "it ends after three halvings"
        assert len(proposals(name, smaller_is_better_down_to(0), {**given, "halvings": 1})) == 3 + 1
        assert len(proposals(name, smaller_is_better_down_to(0.8), given)) == 3
        assert len(proposals(name, flat, given)) == 3, "as good as others is not better"
        assert len(proposals(name, smaller_is_better_down_to(0), {"scales": [0, 0.5]})) == 2
    # What is best in density is then best with the last of the lambdas, by the label.
    found = proposals("ties", smaller_is_better_down_to(0.1), {"densities": [0.2, 1], "halvings": 2})
    assert list(found) == ["ties 0.2", "ties 1", "ties 0.1", "ties 0.05", "ties 0.1 x0.5"]


# Spherical


def angle(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    return float(torch.arccos((x @ y / x.norm() / y.norm()).clamp(-1, 1)))


def slerp(models: Mapping[str, torch.Tensor], first: str, second: str, t: float) -> torch.Tensor:
    rule = Rule(operator="slerp", sources={first: {}, second: {}}, parameters={"t": t})
    return merged((rule,), models)


@pytest.fixture
def sphere() -> dict[str, torch.Tensor]:
    """Three vectors of norm 3, far from each other."""
    generator = torch.Generator().manual_seed(1)
    vectors = {name: torch.randn(50, generator=generator) for name in ("base", *ABC)}
    return {name: 3 * vector / vector.norm() for name, vector in vectors.items()}


def test_slerp_keeps_the_norm_where_the_mean_shrinks_to_the_cosine_of_half_the_angle(
    sphere: dict[str, torch.Tensor],
) -> None:
    half = angle(sphere["a"], sphere["b"]) / 2
    assert float(slerp(sphere, "a", "b", 0.5).norm()) == pytest.approx(3, rel=1e-5)
    (mean,) = (
        merged(p.rules, {name: sphere[name] for name in ("base", "a", "b")})
        for p in proposals("uniform_soup", flat, sources=("a", "b")).values()
    )
    assert float(mean.norm()) == pytest.approx(3 * float(torch.cos(torch.tensor(half))), rel=1e-5)


def test_slerp_goes_in_equal_angles(sphere: dict[str, torch.Tensor]) -> None:
    whole = angle(sphere["a"], sphere["b"])
    angles = [angle(sphere["a"], slerp(sphere, "a", "b", t)) for t in (0.2, 0.4, 0.6, 0.8)]
    assert angles == pytest.approx([whole * t for t in (0.2, 0.4, 0.6, 0.8)], rel=1e-4)
    mean = [0.8 * sphere["a"] + 0.2 * sphere["b"]][0]
    assert angle(sphere["a"], mean) < 0.9 * 0.2 * whole


def karcher(models: Mapping[str, torch.Tensor], *names: str) -> torch.Tensor:
    return merged((Rule(operator="karcher", sources={name: {} for name in names}),), models)


def test_slerp_of_three_one_after_the_other_depends_on_the_order_and_the_karcher_mean_does_not(
    sphere: dict[str, torch.Tensor],
) -> None:
    chained, means = [], []
    for one, two, three in permutations(ABC):
        pair = {**sphere, "pair": slerp(sphere, one, two, 0.5)}
        chained.append(slerp(pair, "pair", three, 1 / 3))
        means.append(karcher(sphere, one, two, three))
    assert max(angle(chained[0], other) for other in chained) > 0.01
    assert max(angle(means[0], other) for other in means) < 1e-4
    assert float(means[0].norm()) == pytest.approx(3, rel=1e-5)
    # By definition: the directions to the points, as long as the angles, cancel out.
    pull = torch.zeros(50, dtype=torch.float64)
    mean = means[0].double() / 3
    for name in ABC:
        point = sphere[name].double() / 3
        across = point - (point @ mean) * mean
        pull += angle(point, mean) * across / across.norm()
    assert float(pull.norm()) < 1e-3


def test_the_karcher_mean_of_two_is_slerp_half_way_and_multislerp_is_not_the_karcher_mean(
    sphere: dict[str, torch.Tensor],
) -> None:
    assert torch.allclose(karcher(sphere, "a", "b"), slerp(sphere, "a", "b", 0.5), atol=1e-5)
    # Among vectors that do not stand symmetrically.
    near = {**sphere, "b": sphere["a"] + 0.3 * sphere["b"]}
    near["b"] = 3 * near["b"] / near["b"].norm()
    rule = Rule(operator="multislerp", sources={name: {"weight": 1.0} for name in ABC})
    assert angle(merged((rule,), near), karcher(near, *ABC)) > 0.02
    mean = sum(near[name] / 3 for name in ABC)
    assert angle(merged((rule,), near), torch.as_tensor(mean)) < 1e-3  # it is the normalised mean


def test_slerp_of_task_vectors_keeps_their_norm() -> None:
    models = random_models(spread=0.01)  # as whole tensors nearly parallel
    (pair,) = (p for p in proposals("nuslerp", flat).values() if p.label == "nuslerp a+b")
    first, second = models["a"] - models["base"], models["b"] - models["base"]
    norm = float((merged(pair.rules, models) - models["base"]).norm())
    assert norm == pytest.approx(float(first.norm() + second.norm()) / 2, rel=0.05)
    mean = float((slerp(models, "a", "b", 0.5) - models["base"]).norm())
    assert mean == pytest.approx(float((first + second).norm()) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("curve", "depth", "t"),
    [((0, 0.3, 1), 0.25, 0.15), ((0, 0.3, 1), 1.0, 1.0), ((0.4,), 0.7, 0.4), ((1, 0), 0.25, 0.75)],
)
def test_a_curve_is_linear_between_its_values(curve: tuple[float, ...], depth: float, t: float) -> None:
    assert at_depth(curve, depth) == pytest.approx(t)


def test_curves_go_by_layer_and_kind_and_the_rest_has_its_own_t() -> None:
    names = [
        f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")
    ]
    names += ["model.embed_tokens.weight", "lm_head.weight"]
    opposed = {"attention": (0.0, 0.5, 0.3, 0.7, 1.0), "mlp": (1.0, 0.5, 0.7, 0.3, 0.0)}
    rules = slerp_rules(names, "a", "b", opposed, 0.4)
    t = {name: rule.parameters["t"] for rule in rules for name in rule.tensors}
    assert [t[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(5)] == list(opposed["attention"])
    assert [t[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)] == list(opposed["mlp"])
    assert t["model.layers.2.norm.weight"] == t["model.embed_tokens.weight"] == t["lm_head.weight"] == 0.4
    assert len(t) == len(names)


def test_the_curve_baseline_takes_the_best_two_sources_and_sums_to_their_weights() -> None:
    found = proposals("slerp_curve", flat, {"curves": ["up"], "t": [0.25]}, parents={"a": 3.0, "b": 1.0, "c": 2.0})
    assert list(found) == ["slerp_curve up b+c", "slerp_curve t b+c"]
    up, flat_t = found.values()
    assert len(up.rules) > 1
    assert up.weights == pytest.approx({"a": 0.0, "b": 0.5, "c": 0.5})
    assert flat_t.weights == pytest.approx({"a": 0.0, "b": 0.75, "c": 0.25})


# What is refused, before anything is spent


@pytest.mark.parametrize(
    ("baseline", "fault"),
    [
        ({"negation": {"forget": "pyton"}}, "negation: forget: no source is called 'pyton'; did you mean 'python'?"),
        ("negation", "forget: missing; this key must be given"),
        ({"negation": {"forget": "cpp", "forgt": "cpp"}}, "negation.forgt: unknown key; did you mean 'forget'?"),
        ({"analogy": {"a": "cpp", "b": "cpp", "c": "python"}}, "an analogy needs three different sources"),
        ({"task_arithmetic": {"scales": "papers"}}, "'papers' is no list of numbers"),
        ({"task_arithmetic": {"scales": [0.1, 0.2, 0.1]}}, "0.1 stands twice"),
        ({"task_arithmetic": {"scales": []}}, "scales"),
        ({"ties": {"densities": ["x"]}}, "ties.densities.0"),
        ({"slerp_curve": {"curves": ["upp"]}}, "no curve is called 'upp'; did you mean 'up'?"),
        ({"slerp_curve": {"pair": ["cpp", "cpp"]}}, "pair: 'cpp' stands twice; expected two sources"),
        ({"slerp_curve": {"t": [1.5]}}, "slerp_curve.t.0: "),
        ({"karcher": {"x": 1}}, "karcher.x: unknown key"),
        ({"tes": {}}, "unknown baseline 'tes'; did you mean 'ties'?"),
        ({"ties": {}, "slerp": {}}, "expected the name of a baseline, or one {name: options}"),
        ({"ties": 3}, "'ties' needs a mapping of options, found 3"),
        (7, "expected the name of a baseline, or one {name: options}, found 7"),
        ("uniform_soup", "'uniform_soup' stands twice"),
    ],
    ids=str,
)
def test_a_mistake_in_a_baseline_is_one_line_with_its_place(
    baseline: object, fault: str, family_config: dict[str, Any], tmp_path: Path
) -> None:
    family_config["search"]["baselines"] = ["uniform_soup", baseline]
    ended = meiosis("plan", write_config(family_config, tmp_path))
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert "search.baselines.1" in line
    assert fault in line
    assert f"{tmp_path / 'config.yaml'}:" in line


def test_every_baseline_proposes_recipes_that_can_be_carried_out(family: Path) -> None:
    """All that are registered, with their defaults or the fewest options, through the operators' own checks."""
    from search.merge.check import check_recipe

    needed = {"negation": {"forget": "a"}, "analogy": {"a": "a", "b": "b", "c": "c"}}
    facts = Facts(ABC, {}, ())
    models = {name: ModelRef(path=name) for name in ("base", *ABC)}
    for name in BASELINES.names():
        if name in ("learned_soup", "recycling"):
            continue
        check_baseline(name, needed.get(name, {}), facts)
        for proposal in proposals(name, flat, needed.get(name)).values():
            check_recipe(Recipe(base="base", models=models, rules=proposal.rules))
    with pytest.raises(ValidationError):
        check_baseline("slerp", {"t": [float("nan")]}, facts)


# meiosis baselines


def test_the_three_families_run_on_the_shards_of_the_search_and_no_search_follows(
    family_config: dict[str, Any], tmp_path: Path
) -> None:
    family_config["search"]["baselines"] = [
        "uniform_soup",
        "greedy_soup",
        {"task_arithmetic": {"scales": [0.3, 0.6]}},
        {"negation": {"forget": "cpp", "scales": [0.5]}},
        {"analogy": {"a": "python", "b": "english", "c": "cpp", "scales": [0.5]}},
        "slerp",
        {"slerp_curve": {"curves": ["opposed"]}},
        "karcher",
    ]
    path = write_config(family_config, tmp_path)
    ended = meiosis("baselines", path, "--run", "all", "--json")
    assert ended.status == 0, ended.err
    verdict = ended.json["verdict"]
    families = {row["label"].split(" ")[0] for row in verdict["rows"]}
    own = {"uniform_soup", "greedy_soup", "task_arithmetic", "negation:cpp", "slerp", "slerp_curve", "karcher"}
    assert families == own | {"analogy:python:english::cpp", "base", *(f"parent:{name}" for name in DOMAINS)}
    assert verdict["candidates_searched"] == 0
    assert all(row["low"] <= row["value"] <= row["high"] for row in verdict["rows"])
    state = run_status(RunFolder(tmp_path / "results" / "all"))
    assert (state.state, state.done) == ("finished", state.budget)
    assert f"{state.done} candidates" in (tmp_path / "results" / "all" / "report.md").read_text()
    assert meiosis("resume", tmp_path / "results" / "all", "--json").json["verdict"] == verdict


def test_only_some_baselines_keep_their_options(family_config: dict[str, Any], tmp_path: Path) -> None:
    family_config["search"]["baselines"] = ["uniform_soup", {"task_arithmetic": {"scales": [0.3]}}]
    path = write_config(family_config, tmp_path)
    ended = meiosis("baselines", path, "--only", "task_arithmetic", "--only", "slerp", "--run", "some")
    assert ended.status == 0, ended.err
    assert "task_arithmetic 0.3" in ended.out
    assert "slerp " in ended.out
    assert "uniform_soup" not in ended.out
    wrong = meiosis("baselines", path, "--only", "slrp")
    assert wrong.status == 2
    assert "unknown baseline 'slrp'; did you mean 'slerp'?" in wrong.err


def test_a_run_writes_the_options_of_its_baselines_in_full(family_config: dict[str, Any], tmp_path: Path) -> None:
    family_config["search"]["baselines"] = ["slerp"]
    assert meiosis("baselines", write_config(family_config, tmp_path), "--run", "one").status == 0
    manifest = RunFolder(tmp_path / "results" / "one").manifest()
    assert manifest["config"]["search"]["baselines"] == [{"slerp": {"t": [0.5]}}]
    json.dumps(manifest)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c"])
def test_a_sweep_of_scales_proposes_its_operator_at_every_scale(name: str) -> None:
    options = {"scales": [0.5, 2], "halvings": 0}
    for operator, weights in ((name, {"a": 0.5, "b": 0.5}), ("task_arithmetic", None)):
        known = Generation0(("a", "b"), lambda _: None, operators=(operator,))
        found = [proposal for proposal in start_baseline(name, options, known) if proposal is not None]
        assert [proposal.label for proposal in found] == [f"{name} 0.5", f"{name} 2"]
        assert [proposal.rules[0].parameters for proposal in found] == [{"lambda": 0.5}, {"lambda": 2.0}]
        assert {proposal.rules[0].operator for proposal in found} == {name}
        # Where the space has the same operator, a search over weights can start there.
        assert found[0].weights == weights
