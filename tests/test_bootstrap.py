"""The paired bootstrap against closed forms and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unscored import Unscored

from evaluators.base import ItemPool, Scores
from search.bootstrap import Bootstrap, holm
from search.objective import Objective, Term


class Measured(Unscored):
    """Knows its documents; the scores come from the test."""

    def __init__(self, documents: dict[str, str]) -> None:
        super().__init__()
        self._documents = documents

    def items(self, pool: ItemPool) -> list[str]:
        return list(self._documents)

    def document_of(self, item: str) -> str:
        return self._documents[item]


OBJECTIVE = Objective((Term("e.loss", 1.0, 1),), (), needs_parents=False)


def scores(values: np.ndarray, weights: np.ndarray | None = None) -> dict[str, Scores]:
    names = tuple(f"i{k:04d}" for k in range(len(values)))
    return {"e": Scores(names, {"loss": values}, np.ones(len(values)) if weights is None else weights)}


def own_document(count: int) -> Measured:
    return Measured({f"i{k:04d}": f"d{k}" for k in range(count)})


def test_the_interval_of_a_mean_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = Bootstrap(OBJECTIVE, {"e": own_document(400)}, {0: scores(values)}, seed=1).interval(0)
    error = values.std(ddof=0) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_a_paired_difference_is_seen_through_noise_that_both_share() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 10, 300)
    better = shared - 0.2 + generator.normal(0, 0.5, 300)
    made = Bootstrap(OBJECTIVE, {"e": own_document(300)}, {0: scores(better), 1: scores(shared)}, seed=1)
    compared = made.compare(0, 1, better.mean() - shared.mean())
    assert compared.p < 0.001
    assert compared.low < compared.difference < compared.high < 0
    low, high = made.interval(0)
    assert high - low > 10 * (compared.high - compared.low)


def test_candidates_that_do_not_differ_are_called_different_as_rarely_as_promised() -> None:
    generator = np.random.default_rng(0)
    rejected = 0
    for trial in range(200):
        a, b = generator.normal(size=(2, 60))
        made = Bootstrap(OBJECTIVE, {"e": own_document(60)}, {0: scores(a), 1: scores(b)}, trial, resamples=1000)
        rejected += made.compare(0, 1, a.mean() - b.mean()).p < 0.05
    # 10 expected; 22 would be four standard deviations too many.
    assert rejected <= 22


def test_items_of_one_document_count_as_one_observation() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=30), 10)
    alone = Bootstrap(OBJECTIVE, {"e": own_document(300)}, {0: scores(values)}, seed=1).interval(0)
    clustered = Measured({f"i{k:04d}": f"d{k // 10}" for k in range(300)})
    together = Bootstrap(OBJECTIVE, {"e": clustered}, {0: scores(values)}, seed=1).interval(0)
    ratio = (together[1] - together[0]) / (alone[1] - alone[0])
    assert ratio == pytest.approx(np.sqrt(10), rel=0.2)


def test_weights_enter_as_in_a_plain_loop_over_the_same_draws() -> None:
    generator = np.random.default_rng(0)
    values, weights = generator.normal(size=50), generator.integers(1, 40, 50).astype(float)
    made = Bootstrap(OBJECTIVE, {"e": own_document(50)}, {0: scores(values, weights)}, seed=3)
    plain = []
    for _ in range(4000):
        drawn = generator.integers(0, 50, 50)
        plain.append((values[drawn] * weights[drawn]).sum() / weights[drawn].sum())
    low, high = made.interval(0)
    assert (low, high) == pytest.approx(tuple(np.percentile(plain, [2.5, 97.5])), abs=0.04)


def test_the_same_seed_gives_the_same_bits() -> None:
    values = np.random.default_rng(0).normal(size=40)
    first, second = (Bootstrap(OBJECTIVE, {"e": own_document(40)}, {0: scores(values)}, seed=5) for _ in range(2))
    assert first.interval(0) == second.interval(0)


def test_the_order_of_items_does_not_matter() -> None:
    values = np.random.default_rng(0).normal(size=40)
    made = scores(values)["e"]
    turned = Scores(made.items[::-1], {"loss": values[::-1]}, made.weights)
    first = Bootstrap(OBJECTIVE, {"e": own_document(40)}, {0: {"e": made}}, seed=5).interval(0)
    second = Bootstrap(OBJECTIVE, {"e": own_document(40)}, {0: {"e": turned}}, seed=5).interval(0)
    assert first == second


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
@settings(max_examples=50)
def test_holm_lies_between_the_raw_values_and_bonferroni(p_values: list[float]) -> None:
    for raw, corrected in zip(p_values, holm(p_values), strict=True):
        assert raw <= corrected <= min(1.0, raw * len(p_values)) + 1e-12
