"""Estimates of the mean of all items from some: right on average, and closer than the plain mean."""

from __future__ import annotations

import numpy as np
import pytest

from search.estimation.control_variate import ControlVariates, corrected_mean
from search.estimation.item_response import MergedAbility, fit_2pl, gp_irt, p_irt
from search.estimation.stratum import Stratum

ITEMS = 300


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def losses(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Real-valued losses of four models and of a merge that is a mix of them with noise of its own."""
    hard = generator.exponential(1.0, ITEMS)
    known = np.stack([hard + 0.5 * generator.normal(size=ITEMS) for _ in range(4)])
    merge = np.array([0.4, 0.3, 0.2, 0.1]) @ known - 0.2 + 0.1 * generator.normal(size=ITEMS)
    return known, merge


def test_control_variates_are_right_on_average_and_several_times_closer_than_the_plain_mean() -> None:
    generator = np.random.default_rng(0)
    known, merge = losses(generator)
    weights = np.ones(ITEMS)
    errors = []
    for _ in range(300):
        order = generator.permutation(ITEMS)
        seen = merge[order][:30]
        predicted = ControlVariates(known[:, order], weights).predict(seen)
        estimate = corrected_mean(predicted, seen - predicted[:30], weights)
        errors.append((estimate - merge.mean(), seen.mean() - merge.mean()))
    ours, plain = np.array(errors).T
    assert abs(ours.mean()) < 4 * ours.std() / np.sqrt(len(ours))
    assert plain.std() > 4 * ours.std()


def test_control_variates_follow_the_weights_of_items() -> None:
    generator = np.random.default_rng(1)
    known, merge = losses(generator)
    weights = generator.integers(1, 30, ITEMS).astype(float)
    truth = float(weights @ merge / weights.sum())
    errors = []
    for _ in range(200):
        order = generator.permutation(ITEMS)
        seen = merge[order][:30]
        predicted = ControlVariates(known[:, order], weights[order]).predict(seen)
        estimate = corrected_mean(predicted, seen - predicted[:30], weights[order])
        plain = float(weights[order][:30] @ seen / weights[order][:30].sum())
        errors.append((estimate - truth, plain - truth))
    ours, plain_errors = np.array(errors).T
    assert np.sqrt((plain_errors**2).mean()) > 3 * np.sqrt((ours**2).mean())


def test_a_candidate_like_a_known_one_has_its_mean() -> None:
    known, _ = losses(np.random.default_rng(2))
    predicted = ControlVariates(known, np.ones(ITEMS)).predict(known[2, :10])
    assert corrected_mean(predicted, known[2, :10] - predicted[:10], np.ones(ITEMS)) == pytest.approx(known[2].mean())


def test_a_2pl_model_is_found_again_in_simulated_responses() -> None:
    generator = np.random.default_rng(3)
    slopes, difficulties = np.exp(generator.normal(0, 0.3, 60)), generator.normal(0, 1, 60)
    abilities = generator.normal(0, 1, 400)
    chances = sigmoid(np.outer(abilities, slopes) - difficulties)
    model = fit_2pl((generator.random(chances.shape) < chances).astype(float), 1)
    assert np.corrcoef(model.slopes[:, 0], slopes)[0, 1] > 0.8
    assert np.corrcoef(model.difficulties, difficulties)[0, 1] > 0.97
    assert np.corrcoef(model.abilities[:, 0], abilities)[0, 1] > 0.9
    found = np.array([model.probabilities(theta) for theta in model.abilities])
    assert np.abs(found - chances).mean() < 0.08


def test_the_ability_of_a_merge_is_found_from_a_few_of_its_responses() -> None:
    irt, plain = [], []
    for seed in (4, 5, 6):  # one merge alone says little: what it gains varies from 0.7 to 0.9 of the plain error
        generator = np.random.default_rng(seed)
        difficulties = generator.normal(0, 1.5, 400)
        abilities = np.linspace(-1.5, 1.5, 16)
        known = (generator.random((16, 400)) < sigmoid(2 * abilities[:, None] - difficulties)).astype(float)
        merge = (generator.random(400) < sigmoid(2 * 0.8 - difficulties)).astype(float)
        for _ in range(25):
            order = generator.permutation(400)
            predicted = MergedAbility(known[:, order], np.ones(400)).predict(merge[order][:20])
            seen = float(merge[order][:20].mean())
            irt.append(p_irt(seen, float(predicted[20:].mean()), 0.05) - merge.mean())
            plain.append(seen - merge.mean())
    assert np.sqrt(np.mean(np.square(irt))) < 0.9 * np.sqrt(np.mean(np.square(plain)))


def test_p_irt_and_gp_irt_are_the_formulas_of_the_paper() -> None:
    # 10 of 40 items seen, 7 right; the model expects 0.5 of the others: 0.25 * 0.7 + 0.75 * 0.5 = 0.55
    assert p_irt(0.7, 0.5, 0.25) == pytest.approx(0.55)
    assert gp_irt(0.7, 0.55) == pytest.approx(0.625)


@pytest.mark.parametrize("estimate", ["none", "control_variate", "p_irt", "gp_irt"])
def test_a_candidate_that_was_scored_on_all_items_has_its_own_mean(estimate: str) -> None:
    generator = np.random.default_rng(5)
    stratum = Stratum(50, estimate)  # type: ignore[arg-type]  # a literal, from the list above
    responses = (generator.random((4, 50, 1)) < 0.6).astype(float)
    weights = generator.integers(1, 5, 50).astype(float)
    for one in responses:
        stratum.learn(one, weights, parent=True)
    assert stratum.estimate(responses[1], weights).values[0] == pytest.approx(
        weights @ responses[1, :, 0] / weights.sum()
    )
    part = stratum.estimate(responses[2, :12], weights[:12])
    assert part.residuals.shape == (12, 1)
    assert 0 <= part.values[0] <= 1


def test_scores_that_are_not_right_or_wrong_are_estimated_by_control_variates() -> None:
    known, merge = losses(np.random.default_rng(6))
    found = []
    for estimate in ("control_variate", "gp_irt"):
        stratum = Stratum(ITEMS, estimate)  # type: ignore[arg-type]  # literals
        for one in known:
            stratum.learn(one[:, None], np.ones(ITEMS), parent=True)
        found.append(stratum.estimate(merge[:25, None], np.ones(25)).values[0])
    assert found[0] == found[1]
