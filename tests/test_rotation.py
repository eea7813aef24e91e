"""Candidates that are scored on one part of the items each, put together by the optimiser."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import meiosis, write_config
from hypothesis import given
from hypothesis import strategies as st
from racing_runs import Quiet, checked, contents, pool_of, stopped, whole_and_resumed
from unscored import Unscored

from evaluators.base import Scores
from search.budget import Used
from search.config import load_config
from search.errors import ConfigError
from search.evaluation import Evaluation
from search.objective import Objective, Term
from search.optimizer import Problem, Result
from search.optimizers.gaussian_process import GaussianProcess, GaussianProcessOptions
from search.pool import Job
from search.racing.config import FitnessConfig
from search.racing.ladder import item_order
from search.racing.race import Race
from search.racing.rotation import Rotation
from search.replay import replay_ordered
from search.run import export_trial, make_population, start
from search.setup import check
from search.store.events import Ask, Trial
from search.store.history import History
from search.store.sessions import Sessions
from search.worker_plan import worker_plan

pytest_plugins = ["family", "racing_family"]

SEED = 3


def rotation_of(counts: Sequence[int], first: float = 0.1) -> Rotation:
    evaluators = {f"e{k}": Unscored(count) for k, count in enumerate(counts)}
    return Rotation(FitnessConfig.model_validate({"rotate": True, "first": first}), evaluators, SEED, 2)


def objective_of(counts: Sequence[int]) -> Objective:
    return Objective(tuple(Term(f"e{k}.loss", 1.0 + k, 1) for k in range(len(counts))), (), needs_parents=False)


def scored(
    race: Race, counts: Sequence[int], values: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, Scores]:
    """What a worker returns for a race."""
    found = {}
    for k, count in enumerate(counts):
        name = f"e{k}"
        items = tuple(Unscored(count).items("search"))
        chosen = tuple(race.chosen(name, item_order(SEED, name, items)))[: race.rungs[-1][name]]
        places = [items.index(item) for item in chosen]
        found[name] = Scores(chosen, {"loss": values[name][places]}, weights[name][places])
    return found


@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), st.integers(0, 2**31), st.floats(0.02, 1))
def test_the_losses_of_all_parts_have_the_loss_as_their_mean_and_hold_every_item_once(
    counts: list[int], seed: int, first: float
) -> None:
    rotation, objective = rotation_of(counts, first), objective_of(counts)
    random = np.random.default_rng(seed)
    values = {f"e{k}": random.normal(size=count) for k, count in enumerate(counts)}
    weights = {f"e{k}": random.uniform(0.5, 2, count) for k, count in enumerate(counts)}
    whole = scored(rotation.race(objective, True), counts, values, weights)
    rotation.learn(whole, parent=True)
    metrics = {f"{name}.loss": float(np.average(values[name], weights=weights[name])) for name in values}
    parts = rotation.losses_of_parts(objective, metrics, whole)
    if rotation.parts == 1:
        assert parts == {}
        return
    assert np.mean(list(parts.values())) == pytest.approx(objective.value(metrics))
    seen: dict[str, list[str]] = {name: [] for name in values}
    for _ in range(rotation.parts):
        race = rotation.race(objective, False)
        block = scored(race, counts, values, weights)
        [(part, loss)] = rotation.losses_of_parts(objective, {}, block).items()
        assert loss == pytest.approx(parts[part])
        for name, scores in block.items():
            seen[name] += scores.items
    cut = [k for k, count in enumerate(counts) if count > 3 and count >= rotation.parts]
    assert cut
    for k in cut:
        assert sorted(seen[f"e{k}"]) == sorted(Unscored(counts[k]).items("search"))


def test_a_part_whose_items_weigh_nothing_has_nothing_to_say() -> None:
    rotation, objective = rotation_of([40]), objective_of([40])
    items = Unscored(40).items("search")
    order = item_order(SEED, "e0", tuple(items))
    weights = np.array([float(order.index(item) >= 4) for item in items])
    values = np.random.default_rng(0).normal(size=40)
    whole = scored(rotation.race(objective, True), [40], {"e0": values}, {"e0": weights})
    rotation.learn(whole, parent=True)
    parts = rotation.losses_of_parts(objective, {}, whole)
    assert (len(parts), parts[0]) == (10, 0)
    assert np.mean(list(parts.values())) == pytest.approx(np.average(values, weights=weights))


def test_generation_0_is_compared_on_the_same_items_and_decides_on_more() -> None:
    counts = [80, 100]
    rotation, objective = rotation_of(counts), objective_of(counts)
    baselines = [rotation.race(objective, False, "baseline") for _ in range(3)]
    assert len({(tuple(race.rungs[0].items()), tuple(race.begin.items())) for race in baselines}) == 1
    step = rotation.race(objective, False, "step")
    assert step.items > 2 * baselines[0].items
    turns = [rotation.race(objective, False) for _ in range(rotation.parts)]
    assert len({race.chosen_items for race in turns}) == rotation.parts
    assert sum(race.items for race in turns) == sum(counts), "one turn has every item"


def problem(parts: int, budget: int = 200, **options: Any) -> Problem:
    given = GaussianProcessOptions.model_validate(options)
    return Problem(np.full(3, 0.5), budget, 1, SEED, 0.1, options=given, parts=parts)


def test_the_optimiser_asks_for_all_items_now_and_then_and_finds_what_no_part_shows() -> None:
    random = np.random.default_rng(8)
    optimum, parts = np.array([0.3, 0.7, 0.6]), 10
    levels, tilts = random.normal(0, 3, parts), random.normal(0, 1, (parts, 3))
    tilts -= tilts.mean(0)

    def losses(point: Any, chosen: Sequence[int]) -> dict[int, float]:
        shared = float(((point - optimum) ** 2).sum())
        return {part: shared + float(levels[part] + tilts[part] @ point) for part in chosen}

    optimizer = GaussianProcess(problem(parts, confirm=15))
    wholes, told = 0, []
    for number in range(70):
        point = optimizer.ask()
        chosen = range(parts) if optimizer.wants_all_items() else [int(random.integers(parts))]
        wholes += len(chosen) > 1
        found = losses(point, chosen)
        optimizer.tell_result(point, Result(float(np.mean(list(found.values()))), parts=found))
        told.append(point)
        assert number > 0 or not optimizer.wants_all_items()
    assert 3 <= wholes <= 6
    best = told[int(np.argmin(optimizer.held_for_best(told)))]
    assert best == pytest.approx(optimum, abs=0.05)


def test_failures_are_kept_away_from_and_do_not_stop_it() -> None:
    optimizer = GaussianProcess(problem(1))
    points = []
    for number in range(60):
        point = optimizer.ask()
        failed = number < 2 or point[0] > 0.55  # what fails lies beside the optimum
        points.append(point)
        optimizer.tell(point, 2e9 if failed else float(((point - [0.6, 0.2, 0.9]) ** 2).sum()))
    late = np.stack(points[40:])
    assert (late[:, 0] <= 0.55).mean() > 0.6
    assert late[:, 1:].mean(0) == pytest.approx([0.2, 0.9], abs=0.1)


@pytest.fixture
def rotating_config(racing_config: dict[str, Any]) -> dict[str, Any]:
    racing_config["search"] |= {"budget": 60, "optimizer": "gaussian_process", "fitness": {"first": 0.1}}
    racing_config["search"]["baselines"] = ["greedy_soup"]
    return racing_config


def test_a_search_on_parts_takes_few_items_and_its_finalists_are_those_held_for_the_best(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    setup = checked(rotating_config, tmp_path)
    assert setup.config.search.fitness.rotate
    finished = start(setup, pool_of(1), Quiet())
    events = finished.folder.events()
    trials = {e.candidate: e for e in events if isinstance(e, Trial) and e.items == "search"}
    origins = {e.candidate: e.origin for e in events if isinstance(e, Ask)}
    items = 3 * 48
    scored = {origin: trials[id_].scored for id_, origin in origins.items()}
    parents = {count for origin, count in scored.items() if origin.startswith("parent:")}
    assert scored["base"] is None
    assert parents == {3 * (48 * 3 // 10)}, "parts 0, 1 and 2 of ten"
    spent = sum(trial.scored or items for trial in trials.values() if trial.attempts)
    assert spent < 60 * items / 4
    seen = {item for id_, trial in trials.items() if origins[id_] == "search" for item in trial.scores["cpp"].items}
    assert len(seen) == 48
    assert any(origins[id_] == "search" and trial.scored is None for id_, trial in trials.items())
    finalists = [e.candidate for e in events if isinstance(e, Trial) and e.items == "select"]
    assert any(origins[id_] == "search" for id_ in finalists)
    assert (finished.model / "model.safetensors").exists()
    pools = {(e.candidate, e.items) for e in events if isinstance(e, Trial)}
    optimism = finished.verdict.optimism
    assert optimism is not None
    assert optimism.on_part == trials[finished.verdict.winner].scored
    part = next(id_ for id_, trial in trials.items() if trial.scored is not None and (id_, "select") not in pools)
    export_trial(finished.folder, tmp_path / "part", part, Quiet())
    card = (tmp_path / "part" / "README.md").read_text()
    assert f"Metrics on the search items, estimated from {trials[part].scored} of them:" in card
    # What all candidates say together is nearer to the truth than the few items of one can be.
    everything = Evaluation(worker_plan(setup))
    population = make_population(setup, 4)
    assert not replay_ordered(events, population, 4)
    found = [c for c in population.candidates if c.origin == "search" and trials[c.id].scored is not None][::6]
    exact = [population.objective.value(everything.run(Job(c.id, c.recipe, "search")).metrics) for c in found]
    expected = [population.expected(c.id) for c in found]
    rough = [trials[c.id].loss for c in found]
    errors = [float(np.abs(np.array(guesses, float) - exact).mean()) for guesses in (expected, rough)]
    assert errors[0] < 0.7 * errors[1], errors


def test_random_search_spends_on_merges_of_its_own_what_a_search_on_parts_spent(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    rotating_config["search"]["budget"] = 50
    certify = {"random_search": True, "standard": True}
    finished = start(checked(rotating_config | {"certify": certify}, tmp_path), pool_of(1), Quiet())
    with History.open(finished.folder.arms / "random_search" / "history", writable=False) as history:
        events = history.events()
    origins = [event.origin for event in events if isinstance(event, Ask)]
    items, none = 3 * 48, Sessions(tmp_path / "none")
    spent = Used.of(finished.folder.events(), none, items).item_evaluations
    assert spent - items < Used.of(events, none, items).item_evaluations <= spent
    trials = [event for event in events if isinstance(event, Trial)]
    on_parts = {origins[trial.candidate] for trial in trials if trial.scored is not None}
    assert on_parts == {origin for origin in origins if origin.startswith("parent:")}, "as in the search"
    parents = sum(trial.scored or 0 for trial in trials)
    assert origins.count("search") == (spent - items - parents) // items, "all but what parents and base take"
    assert {trial.items for trial in trials} == {"search", "select", "certify"}
    with History.open(finished.folder.arms / "standard" / "history", writable=False) as history:
        tuned = [event for event in history.events() if isinstance(event, Trial)]
    assert all(trial.scored is None for trial in tuned), "rivals are tuned on all items"


def test_a_search_on_parts_has_the_same_history_after_a_stop_and_on_more_workers(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    whole, resumed = whole_and_resumed(checked(rotating_config, tmp_path), stop_after=35)
    assert contents(resumed) == contents(whole.folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"search": {"optimizer": "diagonal_cma"}}, "'diagonal_cma' takes every score as it is"),
        ({"search": {"fitness": {"rotate": True, "racing": True}}}, "choose one of them"),
        ({"objectives": {"search": "pareto", "terms": ["python.nll", "cpp.nll"]}}, "for one best merge"),
        (
            {"search": {"fitness": {"estimate": "p_irt"}}},
            "p_irt has no effect where candidates are scored on all items",
        ),
        ({"search": {"fitness": {"rotate": True, "estimate": "p_irt"}}}, "use control_variate or auto, or leave"),
        (
            {"search": {"fitness": {"rotate": True, "estimate": "gp_irt"}}},
            "estimate: gp_irt needs the same first items",
        ),
        ({"constraints": ["python.nll <= 5"]}, "cannot be seen on a few items"),
        ({"objectives": ["python.perplexity", "cpp.nll"]}, "'python.perplexity' has no value per item"),
    ],
)
def test_what_cannot_be_scored_on_parts_is_refused(
    rotating_config: dict[str, Any], tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    rotating_config["search"]["fitness"] = {"rotate": True}
    rotating_config["search"] |= changed.get("search", {})
    rotating_config |= {key: value for key, value in changed.items() if key != "search"}
    with pytest.raises(ConfigError) as caught:
        checked(rotating_config, tmp_path)
    assert said in str(caught.value)


def test_the_plan_of_a_search_on_parts_says_what_it_costs_at_most(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    shown = meiosis("plan", write_config(rotating_config, tmp_path))
    assert f"60 candidates, at most {60 * 3 * 48:,} item evaluations" in " ".join(shown.out.split())


def test_where_it_is_left_open_all_items_are_scored_if_parts_do_not_serve(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    assert checked(rotating_config, tmp_path).config.search.fitness.rotate
    alone = {**rotating_config["search"], "baselines_only": True}
    fitness = [{"estimate": one, "racing": True} for one in ("p_irt", "gp_irt")]
    estimates = ({"search": {**rotating_config["search"], "fitness": one}} for one in fitness)
    changes = [{"constraints": ["python.nll <= 5"]}, {"search": alone}, *estimates]
    for number, change in enumerate(changes):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(rotating_config | change))
        assert not check(load_config(file)).config.search.fitness.rotate


@pytest.mark.parametrize(
    ("terms", "rotates"),
    [(["questions.nll"], True), (["questions.acc"], False), (["questions.nll", "questions.acc"], False)],
)
def test_right_and_wrong_answers_are_scored_on_all_items(
    rotating_config: dict[str, Any], tmp_path: Path, terms: list[str], rotates: bool
) -> None:
    data = {}
    for pool in ("search", "select", "certify"):
        lines = [
            {"id": f"{pool}{n}", "context": f"{pool} {n}", "choices": ["a", "b"], "answer": n % 2} for n in range(40)
        ]
        file = tmp_path / f"{pool}.jsonl"
        file.write_text("\n".join(json.dumps(line) for line in lines))
        data[pool] = str(file)
    rotating_config["evaluators"] = {"questions": {"use": "multiple_choice", "data": data}}
    rotating_config["objectives"]["terms"] = terms
    rotating_config["search"]["fitness"] = {}
    assert checked(rotating_config, tmp_path).config.search.fitness.rotate == rotates
    rotating_config["search"]["fitness"] = {"rotate": True}
    assert checked(rotating_config, tmp_path).config.search.fitness.rotate


def test_parents_have_all_items_where_the_objective_is_measured_by_theirs(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    rotating_config["objectives"]["normalize"] = "parents"
    rotating_config["search"]["budget"] = 12
    rotating_config["certify"] = {"random_search": True}
    folder = start(checked(rotating_config, tmp_path), pool_of(1), Quiet()).folder
    with History.open(folder.arms / "random_search" / "history", writable=False) as history:
        histories = folder.events(), history.events()
    for events in histories:
        parents = [e.candidate for e in events if isinstance(e, Ask) and e.origin.startswith("parent:")]
        trials = {e.candidate: e for e in events if isinstance(e, Trial) and e.items == "search"}
        assert [trials[id_].scored for id_ in parents] == [None] * 3
    assert [trials[id_].attempts for id_ in parents] == [0] * 3, "the random search takes them over"


def test_in_order_of_arrival_parents_have_all_items(rotating_config: dict[str, Any], tmp_path: Path) -> None:
    assert checked(rotating_config, tmp_path).config.search.fitness.parents == 0.25
    rotating_config["search"]["order"] = "arrival"
    assert checked(rotating_config, tmp_path).config.search.fitness.parents == 1


def test_of_a_stopped_search_on_parts_the_merge_that_is_held_for_best_is_exported(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    rotating_config["search"] |= {"budget": 30, "window": 2}
    folder = stopped(checked(rotating_config, tmp_path), 1, stop_after=16)
    exported = export_trial(folder, tmp_path / "out", None, Quiet())
    assert exported.origin == "search", "though none of them has all items yet"


def test_parents_scored_on_a_share_are_completed_by_how_they_differ_from_the_base(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    rotating_config["search"]["budget"] = 6
    setup = checked(rotating_config, tmp_path)
    events = start(setup, pool_of(1), Quiet()).folder.events()
    parents = [e.candidate for e in events if isinstance(e, Ask) and e.origin.startswith("parent:")]
    trials = {e.candidate: e for e in events if isinstance(e, Trial) and e.items == "search"}
    base = next(trials[e.candidate] for e in events if isinstance(e, Ask) and e.origin == "base")
    for id_ in parents:
        for name, seen in trials[id_].scores.items():
            everything = base.scores[name]
            there = [everything.items.index(item) for item in seen.items]
            weights = np.asarray(seen.weights)
            differs = np.average(seen.values["nll"] - everything.values["nll"][there], weights=weights)
            exact = np.average(everything.values["nll"], weights=everything.weights) + differs
            assert trials[id_].metrics[f"{name}.nll"] == pytest.approx(exact, rel=1e-5)


def test_a_limit_of_items_is_too_small_below_what_base_and_parents_take(
    rotating_config: dict[str, Any], tmp_path: Path
) -> None:
    items = 3 * 48
    for fitness, least in ({"first": 0.1}, items + 3 * items // 4), ({"rotate": False}, 5 * items):
        rotating_config["search"]["fitness"] = fitness
        rotating_config["search"]["limits"] = {"item_evaluations": least}
        checked(rotating_config, tmp_path)
        rotating_config["search"]["limits"] = {"item_evaluations": least - 1}
        with pytest.raises(ConfigError, match=f"{least - 1} is too small; .* at least {least} search items"):
            checked(rotating_config, tmp_path)
