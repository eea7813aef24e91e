"""Effect sizes, Holm and the winner's curse, against what they are by definition and by simulation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unscored import Unscored

from evaluators.base import Evaluator, Metric, Scores
from search.bootstrap import Bootstrap, holm
from search.certificate import arms_named, missing_comparisons
from search.config import ObjectivesConfig
from search.effect_size import DocumentParts, EffectSizes
from search.errors import RunError, UserError
from search.finals import earlier_verdicts
from search.objective import Objective, make_objective
from search.selection_bias import Optimism, expected_flattery, expected_optimism
from search.store.events import End, Event, Extended
from search.verdict import Row, Verdict


class Losses(Unscored):
    """A loss per item and, of it, a metric that is no mean; two items a document."""

    metrics = {"loss": Metric("minimize"), "root": Metric("minimize", per_item=False)}  # noqa: RUF012

    def document_of(self, item: str) -> str:
        return item.partition("-")[0]

    def aggregate(self, scores: Scores) -> dict[str, float]:
        mean = float(np.average(scores.values["loss"], weights=scores.weights))
        return {"loss": mean, "root": float(np.sqrt(mean))}


def scores_of(values: np.ndarray) -> Scores:
    """(n_documents,): two items each, whose mean is the value."""
    both = np.stack([values + 0.01, values - 0.01], 1).ravel()
    return Scores(tuple(f"{i:04}-{j}" for i in range(len(values)) for j in "ab"), {"loss": both}, np.ones(len(both)))


def objective_of(*terms: str) -> tuple[Objective, dict[str, Evaluator]]:
    metrics = {term: Metric("minimize") for term in terms}
    config = ObjectivesConfig.model_validate({"terms": list(terms), "normalize": "none"})
    return make_objective(config, (), metrics), {term.partition(".")[0]: Losses() for term in terms}


def test_the_effect_size_of_one_evaluator_is_the_mean_over_the_deviation_of_paired_differences() -> None:
    chance = np.random.default_rng(0)
    base = chance.normal(3, 1, 40)
    better = base - 0.2 + chance.normal(0, 0.25, 40)
    objective, evaluators = objective_of("e.loss")
    sizes = EffectSizes(objective, evaluators, {0: {"e": scores_of(better)}, 1: {"e": scores_of(base)}}, 0)
    effect = sizes.compare(0, 1)
    assert effect is not None
    d = (better - base).mean() / (better - base).std(ddof=1)
    assert effect.d == pytest.approx((1 - 3 / (4 * 39 - 1)) * d)
    assert effect.low < effect.d < effect.high < 0
    back = sizes.compare(1, 0)
    assert back is not None
    assert (back.d, back.low, back.high) == pytest.approx((-effect.d, -effect.high, -effect.low), rel=1e-6)
    assert sizes.compare(0, 0) is None


def test_the_effect_size_of_several_evaluators_counts_one_document_of_each() -> None:
    chance = np.random.default_rng(1)
    a, b = chance.normal(-0.1, 0.3, 30), chance.normal(-0.3, 0.6, 50)
    objective, evaluators = objective_of("a.loss", "b.loss")
    ours = {"a": scores_of(3 + a), "b": scores_of(5 + b)}
    theirs = {"a": scores_of(np.full(30, 3.0)), "b": scores_of(np.full(50, 5.0))}
    effect = EffectSizes(objective, evaluators, {0: ours, 1: theirs}, 0).compare(0, 1)
    assert effect is not None
    d = (a.mean() + b.mean()) / 2 / np.sqrt(a.var(ddof=1) / 4 + b.var(ddof=1) / 4)
    assert effect.d == pytest.approx((1 - 3 / (4 * 29 - 1)) * d)


def test_the_interval_of_an_effect_size_has_the_true_one_in_it_as_often_as_it_says() -> None:
    objective, evaluators = objective_of("e.loss")
    within = 0
    for seed in range(120):
        chance = np.random.default_rng(seed)
        found = {0: {"e": scores_of(chance.normal(-0.5, 1, 60))}, 1: {"e": scores_of(np.zeros(60))}}
        effect = EffectSizes(objective, evaluators, found, seed).compare(0, 1)
        assert effect is not None
        within += effect.low <= -0.5 <= effect.high
    assert 0.88 <= within / 120 <= 1.0


def test_the_parts_of_a_metric_that_is_no_mean_tell_its_standard_error() -> None:
    values = np.random.default_rng(2).gamma(4, 1, 200)
    objective, evaluators = objective_of("e.root")
    (part,) = DocumentParts(objective, evaluators).of({"e": scores_of(values)}).values()
    assert part.shape == (200,)
    assert part.mean() == pytest.approx(np.sqrt(values.mean()), rel=1e-3)
    delta_method = values.std(ddof=1) / np.sqrt(200) / (2 * np.sqrt(values.mean()))
    assert part.std(ddof=1) / np.sqrt(200) == pytest.approx(delta_method, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_all_bonferroni_tests(p_values: list[float]) -> None:
    """An adjusted p is the largest Bonferroni p of all sets of hypotheses that the hypothesis is in."""
    everything = range(len(p_values))
    for index, corrected in enumerate(holm(p_values)):
        sets = (s for size in range(1, len(p_values) + 1) for s in itertools.combinations(everything, size))
        worst = max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets if index in s)
        assert corrected == pytest.approx(worst)


def test_p_of_the_bootstrap_is_that_of_all_resamples_of_few_documents() -> None:
    differences = np.array([-0.917, -0.531, 0.113, -0.239, 0.317])  # no mean of them is 0
    objective, evaluators = objective_of("e.loss")
    found = {0: {"e": scores_of(1 + differences)}, 1: {"e": scores_of(np.ones(5))}}
    comparison = Bootstrap(objective, evaluators, found, 0).compare(0, 1, float(differences.mean()))
    means = np.array([np.mean(drawn) for drawn in itertools.product(differences, repeat=5)])
    exact = 2 * min((means <= 0).mean(), (means >= 0).mean())
    assert comparison.p == pytest.approx(exact, abs=0.01)
    assert (comparison.low, comparison.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.03)


def winners(truth: np.ndarray, noise: float, documents: int, runs: int) -> tuple[float, float]:
    """Mean error of what the best seemed to be, and of that without its expected flattery."""
    seen = corrected = 0.0
    for run in range(runs):
        chance = np.random.default_rng(run)
        hard = chance.normal(0, 2.0, (documents, 1))  # what all candidates share must not matter
        part = truth[None, :] + hard + chance.normal(0, noise, (documents, len(truth)))
        means = part.mean(0)
        best = int(means.argmin())
        real = truth[best] + hard.mean()
        seen += means[best] - real
        corrected += means[best] - expected_optimism([part], 1, run, resamples=300) - real
    return seen / runs, corrected / runs


def test_the_shrunken_value_of_the_best_of_equals_is_less_flattered_than_what_was_seen() -> None:
    seen, corrected = winners(np.zeros(40), noise=1.0, documents=50, runs=60)
    assert seen < -0.25
    assert abs(corrected) < 0.45 * abs(seen)


def test_the_shrunken_value_is_less_biased_where_candidates_differ_too() -> None:
    truth = np.random.default_rng(9).normal(0, 0.1, 60)
    seen, corrected = winners(truth, noise=1.0, documents=80, runs=60)
    assert abs(corrected) < 0.6 * abs(seen)


def test_a_winner_far_ahead_owes_nothing_to_having_been_chosen() -> None:
    truth = np.zeros(40)
    truth[7] = -5.0
    seen, corrected = winners(truth, noise=1.0, documents=50, runs=20)
    assert corrected == pytest.approx(seen, abs=0.02)


def test_candidates_that_were_stopped_early_are_left_out_of_the_correction() -> None:
    chance = np.random.default_rng(3)
    objective, evaluators = objective_of("e.loss")
    found: dict[int, Mapping[str, Scores]] = {i: {"e": scores_of(chance.normal(1, 1, 30))} for i in range(8)}
    whole = expected_flattery(objective, evaluators, found, 3, 2, 0)
    assert whole < 0
    assert expected_flattery(objective, evaluators, {**found, 9: {"e": scores_of(np.zeros(4))}}, 3, 2, 0) == whole


def test_a_lead_is_told_as_it_was_seen_shrunken_and_certified() -> None:
    seen = Optimism(9, 1.0, 1.1, 1.2, 1.5, "ties 1", 1.4, 1.7)
    assert seen.seen_lead == pytest.approx(0.4)
    assert seen.shrunken_lead == pytest.approx(0.3)
    assert seen.certified_lead == pytest.approx(0.2)
    assert seen.flattery == pytest.approx(-0.2)
    assert Optimism(9, 1.0, 1.1, 1.2, 1.5).flattery == pytest.approx(-0.5)


def test_verdicts_of_older_runs_load_and_those_of_younger_versions_are_refused() -> None:
    row = {"label": "base", "candidate": 3, "value": 1.0, "low": 0.9, "high": 1.1, "metrics": {"e.loss": 1.0}}
    old = {"winner": 3, "label": "base", "searched": False, "candidates_searched": 5, "best_baseline": "base"}
    old |= {"documents": 20, "weights_sha256": "x", "rows": [row], "unavailable": []}
    verdict = Verdict.from_json(json.dumps(old))
    assert verdict.rows == (Row("base", 3, 1.0, 0.9, 1.1, {"e.loss": 1.0}),)
    assert (verdict.arms, verdict.missing, verdict.optimism) == ((), (), None)
    assert Verdict.from_json(verdict.to_json()) == verdict
    with pytest.raises(RunError, match="version 99, this Meiosis reads 2"):
        Verdict.from_json(json.dumps({**old, "version": 99}))


def test_a_verdict_that_only_got_more_rows_is_no_earlier_one() -> None:
    end, more = End(1, "{}"), Extended("{}")
    cases: list[tuple[list[Event], int]] = [
        ([], 0), ([end], 0), ([end, end], 0), ([end, more], 1), ([more, end, end, more, end, more], 2)
    ]  # fmt: skip
    assert [earlier_verdicts(events) for events, _ in cases] == [count for _, count in cases]


def test_what_a_full_certificate_lacks_is_named() -> None:
    default = {"uniform_soup", "greedy_soup", "task_arithmetic", "slerp", "ties"}
    assert missing_comparisons(default, 3) == ("blend", "dare_ties", "random_search", "placebo")
    assert missing_comparisons(default, 2) == ("dare_ties", "random_search", "placebo")
    assert missing_comparisons({*default, "dare_ties", "random_search", "placebo", "blend"}, 3) == ()
    assert "slerp" not in missing_comparisons(set(), 1)
    assert arms_named(["placebo", "standard", "placebo"]) == ("standard", "placebo")
    with pytest.raises(UserError, match=r"unknown comparison 'placbo'; did you mean 'placebo'\?"):
        arms_named(["placbo"])


def test_every_arm_has_its_sentence() -> None:
    from search.certificate import ARMS
    from search.verdict_text import _WHAT

    assert set(ARMS) == set(_WHAT)
