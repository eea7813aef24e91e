"""A search with racing: fewer item-evaluations, and the same history however it was run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from racing_runs import DOMAINS, Quiet, checked, contents, pool_of, whole_and_resumed

from search.budget import Used
from search.errors import ConfigError
from search.optimizers.natural_niches import NaturalNiches
from search.pareto.recorded import tracked_front
from search.replay import replay_ordered
from search.run import make_population, start
from search.setup import window
from search.store.events import Ask, Event, Trial
from search.store.history import History
from search.store.sessions import Sessions

pytest_plugins = ["family", "racing_family"]


def test_racing_scores_fewer_items_and_exports(racing_config: dict[str, Any], tmp_path: Path) -> None:
    finished = start(checked(racing_config, tmp_path), pool_of(1), Quiet())
    trials = [e for e in finished.folder.events() if isinstance(e, Trial) and e.items == "search"]
    items = 3 * 48
    assert [t.scored for t in trials[:4]] == [None] * 4, "parents and base are scored on all items"
    counts = {t.scored for t in trials}
    assert len(counts) >= 3, counts
    assert any(t.censored for t in trials)
    used = Used.of(finished.folder.events(), Sessions(finished.folder.sessions), items)
    assert used.item_evaluations == sum(t.scored or items for t in trials)
    assert used.item_evaluations < 44 * items / 2
    assert (finished.model / "model.safetensors").exists()
    for trial in trials:
        assert all(value > 0 for value in trial.metrics.values())


def test_the_history_is_the_same_after_a_stop_and_on_more_workers(
    racing_config: dict[str, Any], tmp_path: Path
) -> None:
    whole, resumed = whole_and_resumed(checked(racing_config, tmp_path), stop_after=28)
    assert contents(resumed) == contents(whole.folder)


def test_another_search_takes_over_what_was_scored_and_estimates_it_alike(
    racing_config: dict[str, Any], tmp_path: Path
) -> None:
    racing_config["evaluators"]["cost"] = {"use": "cost"}
    racing_config["objectives"]["terms"].append("cost.layers")
    racing_config["search"] |= {"budget": 30, "baselines": ["uniform_soup", "task_arithmetic"]}
    finished = start(checked(racing_config | {"certify": {"random_search": True}}, tmp_path), pool_of(1), Quiet())
    arm = finished.folder.arms / "random_search" / "history"
    with History.open(arm, writable=False) as history:
        theirs, asked = searched(history.events()), history.events()
    ours = searched(finished.folder.events())
    origins = {event.candidate: event.origin for event in asked if isinstance(event, Ask)}
    shared = [candidate for candidate, origin in origins.items() if origin != "search"]
    assert [c for c in shared if ours[c].scored is not None], "of the baselines some are estimated"
    for candidate in shared:
        assert (theirs[candidate].metrics, theirs[candidate].scored) == (
            ours[candidate].metrics,
            ours[candidate].scored,
        )
    # An evaluator of one item is scored with everyone, and keeps nobody from being raced.
    assert any(t.scored is not None and t.scored < 3 * 48 / 2 for t in ours.values())
    assert {len(t.scores["cost"].items) for t in ours.values()} == {1}
    main, arm_used = (
        Used.of(events, Sessions(tmp_path / "none"), 3 * 48 + 1).item_evaluations
        for events in (finished.folder.events(), asked)
    )
    assert arm_used <= main


def searched(events: list[Event]) -> dict[int, Trial]:
    return {event.candidate: event for event in events if isinstance(event, Trial) and event.items == "search"}


def test_a_front_is_raced_to_the_end_of_all_items_unless_it_dominates_and_repeats_exactly(
    racing_config: dict[str, Any], tmp_path: Path
) -> None:
    racing_config["evaluators"]["cost"] = {"use": "cost"}
    racing_config["objectives"] = {"search": "pareto", "terms": ["python.nll", "english.nll", "cost.layers"]}
    # Only two of the domains are asked for, so that many candidates are dominated.
    racing_config["search"]["optimizer"] = "random_search"
    whole, resumed = whole_and_resumed(checked(racing_config, tmp_path), stop_after=28)
    assert contents(resumed) == contents(whole.folder)
    trials = searched(whole.folder.events())
    stopped = {id_: trial for id_, trial in trials.items() if trial.censored}
    assert len(stopped) >= 3
    assert all(trial.scored is None for id_, trial in trials.items() if id_ not in stopped)
    assert all(trial.scored is not None and trial.scored < 3 * 48 + 1 for trial in stopped.values())
    parents = {number: f"parent:{name}" for number, name in enumerate(DOMAINS)}
    tracked = tracked_front(whole.folder.manifest(), trials.values(), parents)
    assert tracked is not None
    assert not {point.candidate for point in tracked.front().points} & set(stopped)


def test_an_objective_without_values_per_item_cannot_be_raced(racing_config: dict[str, Any], tmp_path: Path) -> None:
    racing_config["objectives"]["terms"][0] = "python.perplexity"
    with pytest.raises(ConfigError, match=r"'python.perplexity' has no value per item.*use python.nll"):
        checked(racing_config, tmp_path)


def test_natural_niches_race_with_members_that_were_scored_on_different_items(
    racing_config: dict[str, Any], tmp_path: Path
) -> None:
    racing_config["search"]["optimizer"] = {"name": "natural_niches", "archive": 6}
    racing_config["search"]["fitness"]["precision"] = 0.15
    setup = checked(racing_config, tmp_path)
    found = start(setup, pool_of(1), Quiet())
    events = list(found.folder.events())
    population = make_population(setup, window(setup.config))
    assert not replay_ordered(events, population, window(setup.config))
    niches = population._optimizer
    assert isinstance(niches, NaturalNiches)
    searched = {
        tuple(event.genome): event.candidate for event in events if isinstance(event, Ask) and event.genome is not None
    }
    inside = [searched[tuple(member.point)] for member in niches.members if tuple(member.point) in searched]
    assert len(niches.members) == 6
    assert len(inside) >= 4
    trials = {event.candidate: event for event in events if isinstance(event, Trial) and event.items == "search"}
    assert not any(trials[candidate].scored is None for candidate in inside), "none of them was scored on all items"
    assert len({int(np.isfinite(member.row).sum()) for member in niches.members}) > 1
