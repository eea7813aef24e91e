"""The loss ranks: feasible by objective, then infeasible by violation, then failed; and it is finite."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluators.base import Metric
from search.config import Config, ObjectivesConfig
from search.objective import FAILED_LOSS, Objective, make_objective

METRICS = {"a.loss": Metric("minimize"), "b.acc": Metric("maximize")}
number = st.floats(allow_nan=True, allow_infinity=True)


def objective(*constraints: str, normalize: str = "none") -> Objective:
    config = ObjectivesConfig.model_validate(
        {"terms": ["a.loss", {"metric": "b.acc", "weight": 3}], "normalize": normalize}
    )
    parsed = Config.model_validate(
        {
            "models": {"base": "x", "sources": {"s": "y"}},
            "evaluators": {"a": {"use": "perplexity"}},
            "objectives": ["a.loss"],
            "constraints": list(constraints),
        }
    ).constraints
    return make_objective(config, parsed, METRICS)


def test_the_value_is_the_weighted_mean_with_maximised_metrics_negated() -> None:
    assert objective().value({"a.loss": 2.0, "b.acc": 0.5}) == pytest.approx((2.0 - 3 * 0.5) / 4)


def test_the_best_parent_is_0_and_the_worst_is_1_on_every_metric() -> None:
    made = objective(normalize="parents").against([{"a.loss": 2.0, "b.acc": 0.5}, {"a.loss": 4.0, "b.acc": 0.9}])
    loss, accuracy = made.terms
    assert [loss.loss(2.0), loss.loss(4.0), loss.loss(1.0)] == pytest.approx([0, 1, -0.5])
    assert [accuracy.loss(0.9), accuracy.loss(0.5)] == pytest.approx([0, 1])


def test_parents_that_agree_do_not_divide_by_zero() -> None:
    made = objective(normalize="parents").against([{"a.loss": 0.0, "b.acc": 0.5}] * 2)
    assert math.isfinite(made.value({"a.loss": 1.0, "b.acc": 0.1}))


@given(number, number)
def test_the_loss_is_always_finite(loss: float, accuracy: float) -> None:
    judged = objective("b.acc >= 0.5").judge({"a.loss": loss, "b.acc": accuracy})
    assert math.isfinite(judged.loss)
    assert judged.loss <= FAILED_LOSS


def test_infeasible_candidates_rank_behind_feasible_ones_by_how_far_they_are_off() -> None:
    made = objective("b.acc >= 0.5", "a.loss <= 10")
    good = made.judge({"a.loss": 9.0, "b.acc": 0.5})
    near = made.judge({"a.loss": 1.0, "b.acc": 0.49})
    far = made.judge({"a.loss": 1.0, "b.acc": 0.1})
    failed = made.judge(None)
    assert good.feasible
    assert not near.feasible
    assert good.loss < near.loss < far.loss < failed.loss
