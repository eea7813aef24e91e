"""Outcomes are checked before they are told."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_bodies import job

from evaluators.base import EvaluatorSpec, Scores
from search.outcome_check import MESSAGE_BYTES, OutcomeCheck, check_size, checked
from search.pool import Failure, Job, Outcome
from search.racing.ladder import item_order
from search.racing.race import Race
from search.store.columns import encode
from search.store.side_files import SideFiles
from search.trials import trial_event

SET_BY_THE_POOL = {"worker", "attempts", "node", "started_at", "queue_seconds", "bytes_moved"}
ONES = np.ones(2)
GOOD = Outcome(3, "search", scores={"e": Scores(("a", "b"), {"x": ONES}, ONES)}, metrics={"e.x": 1.0})


def scores(**changes: Any) -> Outcome:
    return replace(GOOD, scores={"e": replace(GOOD.scores["e"], **changes)})


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (replace(GOOD, metrics=3), "must be mappings"),
        (replace(GOOD, metrics={1: 1.0}), "the name 1, expected text"),
        (replace(GOOD, metrics={"e.x": True}), "is bool, expected a float"),
        (replace(GOOD, merge_seconds="1"), "merge_seconds is str"),
        (replace(GOOD, evaluate_seconds=float("nan")), "expected at least 0"),
        (replace(GOOD, weights_sha256=7), "weights_sha256 is int"),
        (replace(GOOD, bytes_read="many"), "bytes_read is 'many', expected a number of bytes"),
        (replace(GOOD, bytes_read=-1), "bytes_read is -1"),
        (replace(GOOD, bytes_read=2**63), "bytes_read is 9223372036854775808"),
        (replace(GOOD, failure="broken"), "outcome.failure is str"),
        (replace(GOOD, failure=Failure("error", "broken")), "a failure and scores"),
        (Outcome(3, "search", failure=Failure("odd", "broken")), "kind is 'odd'"),  # type: ignore[arg-type]
        (Outcome(3, "search", failure=Failure("error", 5)), "must be text"),  # type: ignore[arg-type]
        (replace(GOOD, items="select"), "expected that of"),
        (replace(GOOD, scores={"e": {"a": 1.0}}), "is dict, expected Scores"),
        (scores(items=("a",)), r"has \[1, 2\] items"),
        (scores(items=("a", "a")), "different ids"),
        (scores(items=["a", "b"]), "items a tuple"),
        (scores(values={"x": [1.0, 2.0]}), "row of floats"),
        (scores(values={"x": np.ones((2, 2))}), "row of floats"),
        (scores(values={"x": np.array(["a", "b"])}), "row of floats"),
        (scores(weights=np.array([1.0, np.nan])), "weights must be finite"),
        (scores(weights=np.array([1.0, -1.0])), "weights must be finite"),
        (replace(GOOD, metrics={"e.x": 10**400}), "is larger than any float"),
        (replace(GOOD, metrics={"e\x1b[2J": 1.0}), "printable characters"),
        (replace(GOOD, metrics={"e.\ud800": 1.0}), "printable characters"),
        (replace(GOOD, metrics={"e" * 501: 1.0}), "printable characters"),
        (replace(GOOD, metrics={"": 1.0}), "printable characters"),
        (replace(GOOD, merge_seconds=1e300), "expected at least 0"),
        (replace(GOOD, merge_seconds=-0.5), "expected at least 0"),
        (replace(GOOD, weights_sha256="../../etc/passwd"), "expected 64 hex digits"),
        (replace(GOOD, weights_sha256="A" * 64), "expected 64 hex digits"),
        (replace(GOOD, weights_sha256="0" * 64 + "\n"), "expected 64 hex digits"),
        (replace(GOOD, candidate=4), "expected that of"),
        (replace(GOOD, scores={"e:f": GOOD.scores["e"]}), "'e:f', expected no colon"),
        (scores(values={"x:y": ONES}), "'x:y', expected no colon"),
        (scores(values={"x\n": ONES}), "printable characters"),
        (scores(items=("a", 3)), "different ids"),
        (scores(items=("a", ["b"])), "unhashable"),
    ],
)
def test_what_is_not_an_outcome_is_refused(outcome: Outcome, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        checked(outcome, job(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_metric_that_is_no_finite_number_is_a_failure_of_that_kind(value: float) -> None:
    found = checked(replace(GOOD, metrics={"e.y": 2.0, "e.x": value}), job(3))
    assert found.failure == Failure("not_finite", f"e.x is {float(value)}")
    assert (found.metrics, found.scores) == ({}, {})


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_item_whose_score_is_no_finite_number_makes_the_trial_a_failure(value: float) -> None:
    """Whatever the metric says: the item would make the comparison with other trials meaningless."""
    found = checked(scores(values={"x": np.array([1.0, value])}), job(3))
    assert found.failure == Failure("not_finite", f"e.x of item 'b' is {value}")
    assert (found.metrics, found.scores) == ({}, {})


def test_scores_and_the_key_are_of_the_types_that_are_recorded() -> None:
    found = checked(
        replace(
            scores(values={"x": np.array([1, 2], np.int8)}, weights=np.ones(2, np.float16)),
            candidate=3.0,  # type: ignore[arg-type]
            metrics={"e.x": np.float32(0.5), "e.n": 3},
        ),
        job(3),
    )
    block = found.scores["e"]
    assert (block.values["x"].dtype, block.weights.dtype) == (np.float64, np.float64)
    assert type(found.candidate) is int
    assert {name: type(value) for name, value in found.metrics.items()} == {"e.x": float, "e.n": float}


def test_what_a_terminal_would_obey_and_utf8_cannot_hold_is_written_out() -> None:
    failure = Failure("error", "red \x1b[31m\ud800 ü", "Traceback:\n\tline \x07")
    found = checked(Outcome(3, "search", failure=failure), job(3)).failure
    assert found is not None
    assert (found.message, found.detail) == (r"red \x1b[31m\ud800 ü", "Traceback:\n\tline \\x07")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400) | st.just(ONES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    field=st.sampled_from([field.name for field in fields(Outcome) if field.name not in SET_BY_THE_POOL]),
    value=anything,
)
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_an_outcome_it_is_refused_in_words_or_can_be_recorded(field: str, value: object) -> None:
    try:
        found = checked(replace(GOOD, **{field: value}), job(3))
    except (TypeError, ValueError):
        return
    record(found)


@given(part=st.sampled_from(["items", "values", "weights"]), value=anything | st.dictionaries(st.text(), st.just(ONES)))
@settings(max_examples=200, deadline=None)
def test_whatever_stands_in_scores_it_is_refused_in_words_or_can_be_recorded(part: str, value: object) -> None:
    try:
        found = checked(scores(**{part: value}), job(3))
    except (TypeError, ValueError):
        return
    record(found)


def record(outcome: Outcome) -> None:
    """Fails where the history could not hold the outcome."""
    trial = trial_event(outcome, None, True)
    with tempfile.TemporaryDirectory() as folder:
        assert encode(trial, 0, SideFiles(Path(folder), 1000))


def test_a_failure_keeps_one_line_and_a_traceback_of_bounded_length() -> None:
    found = checked(Outcome(3, "search", failure=Failure("error", "first\nsecond", "x" * 10**6)), job(3))
    assert found.failure is not None
    assert found.failure.message == "first"
    assert len(found.failure.detail) == 100_000


def test_a_message_that_is_too_large_is_refused() -> None:
    check_size(bytes(10))
    with pytest.raises(ValueError, match="expected at most"):
        check_size(bytes(MESSAGE_BYTES + 1))


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Outcome]:
    """Checks an outcome of a plan with one evaluator, whose search items are a and b."""
    for pool, names in (("search", "ab"), ("select", "cd"), ("certify", "ef")):
        rows = [json.dumps({"id": name, "text": f"text of {name}"}) for name in names]
        (tmp_path / f"{pool}.jsonl").write_text("\n".join(rows) + "\n")
    data = {pool: str(tmp_path / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
    checker = OutcomeCheck((EvaluatorSpec("e", "perplexity", {"data": data}),))
    from evaluators.registry import make_evaluator

    evaluator = make_evaluator(EvaluatorSpec("e", "perplexity", {"data": data}))
    metrics = {f"e.{name}": 1.0 for name in evaluator.metrics}
    items = tuple(evaluator.items("search"))

    def check(items: tuple[str, ...] = items, asked: Job = job(3), **changes: Any) -> Outcome:  # noqa: B008
        ones = np.ones(len(items))
        outcome = Outcome(3, "search", scores={"e": Scores(items, {"nll": ones}, ones)}, metrics=metrics)
        return checker.check(replace(outcome, **changes), asked)

    return check


def test_scores_of_other_items_evaluators_or_metrics_than_were_asked_for_are_refused(
    check: Callable[..., Outcome],
) -> None:
    good = check()
    items = good.scores["e"].items
    assert check(items[::-1]).failure is None, "in which order items come back is up to the evaluator"
    assert check(metrics={**good.metrics, "extra.one": 1.0}).metrics["extra.one"] == 1.0
    failure = Failure("error", "boom")
    assert check(scores={}, metrics={}, failure=failure).failure == failure
    with pytest.raises(ValueError, match="'z' is not one of them"):
        check((items[0], "z"))
    with pytest.raises(ValueError, match="but 1 were scored"):
        check(items[:1])
    with pytest.raises(ValueError, match=r"scores of \['f'\], expected \['e'\]"):
        check(scores={"f": good.scores["e"]})
    with pytest.raises(ValueError, match=r"scores of \[\], expected \['e'\]"):
        check(scores={})
    with pytest.raises(ValueError, match=r"returned no 'e\.nll'"):
        check(metrics={})
    with pytest.raises(ValueError, match="no hash of the weights, which the job asked for"):
        check(asked=replace(job(3), hash_weights=True))
    assert check(asked=replace(job(3), hash_weights=True), weights_sha256="0" * 64).failure is None


def test_a_race_ends_on_a_rung_with_the_first_items_in_its_order(check: Callable[..., Outcome]) -> None:
    order = item_order(0, "e", ("a", "b"))
    raced = replace(job(3), race=Race(({"e": 1}, {"e": 2})))
    assert check(order, raced).scores["e"].items == order
    assert check(order[:1], raced, censored=True).censored
    with pytest.raises(ValueError, match="carried on to the last"):
        check(order[:1], raced)
    with pytest.raises(ValueError, match="stopped before the last"):
        check(order, raced, censored=True)
    with pytest.raises(ValueError, match="the first 1 items in the order of the race"):
        check(order[1:], raced, censored=True)
    with pytest.raises(ValueError, match="was to be scored on all items"):
        check(censored=True)
    with pytest.raises(TypeError, match=r"outcome\.censored is int"):
        check(order[:1], raced, censored=1)
