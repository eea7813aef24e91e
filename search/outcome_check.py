"""What counts as an outcome: nothing that a worker returned is told before it was looked at here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, get_args

import numpy as np

from evaluators.base import EvaluatorSpec, ItemPool, Scores
from search.pool import Failure, FailureKind, Job, Outcome
from search.racing.ladder import item_order
from search.racing.race import Race

MESSAGE_BYTES = 64 * 2**20
"""Largest outcome that is sent and read: scores of about a million items."""
LINE_CHARACTERS = 2_000
DETAIL_CHARACTERS = 100_000
"""Longer messages and tracebacks of failures are cut."""
NAME_CHARACTERS = 500
"""Longest name of a metric or evaluator."""
LONGEST_SECONDS = 1e9
_SHA256 = re.compile(r"[0-9a-f]{64}")


def checked(outcome: object, job: Job) -> Outcome:
    """The outcome with plain floats for metrics and scores; one that is no finite number makes it a failure.

    Raises:
        TypeError: not an `Outcome`, or parts of it have other types than it declares.
        ValueError: the outcome of another job, or scores whose lengths disagree.
    """
    if not isinstance(outcome, Outcome):
        raise TypeError(f"the worker returned {type(outcome).__name__}, expected Outcome")
    if outcome.key != job.key:
        raise ValueError(f"the worker returned the outcome of {outcome.key!r:.200}, expected that of {job.key}")
    if not (isinstance(outcome.metrics, Mapping) and isinstance(outcome.scores, Mapping)):
        raise TypeError("outcome.metrics and outcome.scores must be mappings")
    failure = None if outcome.failure is None else cleaned(outcome.failure)
    if not isinstance(outcome.censored, bool):
        raise TypeError(f"outcome.censored is {type(outcome.censored).__name__}, expected bool")
    if failure is not None and (outcome.scores or outcome.metrics):
        raise ValueError("the outcome has a failure and scores; expected one of them")
    seconds = [_number(f"outcome.{name}", getattr(outcome, name)) for name in ("merge_seconds", "evaluate_seconds")]
    if not all(0 <= value <= LONGEST_SECONDS for value in seconds):  # not a number is neither
        raise ValueError(f"outcome.merge_seconds and evaluate_seconds are {seconds}, expected at least 0")
    for name, what in (("bytes_read", "bytes"), ("layers_run", "layers"), ("layers_reused", "layers")):
        count = getattr(outcome, name)
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"outcome.{name} is {count!r}, expected a number of {what}")
    _check_hash(outcome.weights_sha256)
    untrusted: Mapping[Any, Any] = outcome.metrics
    metrics: dict[str, float] = {}
    for name, value in untrusted.items():
        _check_name("outcome.metrics", name)
        metrics[name] = _number(f"outcome.metrics[{name!r}]", value)
    scores = {name: _checked_scores(name, block) for name, block in outcome.scores.items()}
    bad = next((f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)), None)
    bad = bad or next(filter(None, (_not_finite(name, block) for name, block in scores.items())), None)
    if bad is not None:
        failure = Failure("not_finite", bad)
    return replace(
        outcome,
        candidate=job.candidate,  # equal to what came, and an integer
        items=job.items,
        metrics={} if failure else metrics,
        scores={} if failure else scores,
        failure=failure,
        censored=outcome.censored and failure is None,
        merge_seconds=seconds[0],
        evaluate_seconds=seconds[1],
    )


class OutcomeCheck:
    """Checks outcomes against what the evaluators of a plan are to score.

    Args:
        evaluators: those of the plan; without any, only the form of outcomes is checked.
        seed: of the plan, by which the items of a race are put in order.
    """

    def __init__(self, evaluators: Sequence[EvaluatorSpec], seed: int = 0) -> None:
        self._specs, self._seed = evaluators, seed
        self._metrics: tuple[str, ...] | None = None
        self._items: dict[ItemPool, dict[str, frozenset[str]]] = {}

    def check(self, outcome: object, job: Job) -> Outcome:
        """The outcome as `checked` returns it.

        Raises:
            TypeError, ValueError: as `checked`; also scores of other evaluators or items than were asked for, or
                a metric that an evaluator declares and that is not there.
        """
        good = checked(outcome, job)
        if good.failure is not None or not self._specs:
            return good
        if job.hash_weights and good.weights_sha256 is None:
            raise ValueError("the worker returned no hash of the weights, which the job asked for")
        expected = self._expected(job.items)
        if good.scores.keys() != expected.keys():
            raise ValueError(f"the worker returned scores of {sorted(good.scores)}, expected {sorted(expected)}")
        if job.race is not None:
            self._check_race(good, job.race, job.items)
            expected = {}
        elif good.censored:
            raise ValueError("the worker stopped a candidate that was to be scored on all items")
        for name, items in expected.items():
            found = good.scores[name].items
            if len(found) != len(items) or not items.issuperset(found):
                other = next((item for item in found if item not in items), None)
                what = f"'{other}' is not one of them" if other is not None else f"{len(found)} were scored"
                raise ValueError(f"outcome.scores['{name}']: expected the {len(items)} {job.items} items, but {what}")
        missing = next((name for name in self._metrics or () if name not in good.metrics), None)
        if missing is not None:
            raise ValueError(f"the worker returned no '{missing}', which its evaluator declares as a metric")
        return good

    def _check_race(self, outcome: Outcome, race: Race, pool: ItemPool) -> None:
        """Raise `ValueError` unless the items are those of a rung, and that of the last if it was not stopped."""
        sizes = {name: len(scores.items) for name, scores in outcome.scores.items()}
        rung = race.rung_of(sizes)
        last = len(race.rungs) - 1
        if rung is None or (rung == last) == outcome.censored:
            what = "stopped before" if outcome.censored else "carried on to"
            raise ValueError(
                f"outcome.scores: expected a candidate that was {what} the last of {[dict(one) for one in race.rungs]} "
                f"items, but {sizes} were scored"
            )
        for name, scores in outcome.scores.items():
            wanted = tuple(race.chosen(name, self._order(name, pool)))[: len(scores.items)]
            if tuple(scores.items) != wanted:
                raise ValueError(
                    f"outcome.scores['{name}']: expected the first {len(wanted)} items in the order of the race"
                )

    def _order(self, name: str, pool: ItemPool) -> tuple[str, ...]:
        return item_order(self._seed, name, tuple(sorted(self._expected(pool)[name])))

    def _expected(self, pool: ItemPool) -> dict[str, frozenset[str]]:
        """Evaluator -> ids of its items, read once per pool."""
        if pool not in self._items:
            from evaluators.registry import make_evaluator

            made = {spec.name: make_evaluator(spec) for spec in self._specs}
            self._items[pool] = {name: frozenset(evaluator.items(pool)) for name, evaluator in made.items()}
            self._metrics = tuple(f"{name}.{metric}" for name, each in made.items() for metric in each.metrics)
        return self._items[pool]


def check_size(message: bytes) -> None:
    """Raise `ValueError` for an outcome that is too large to be one."""
    if len(message) > MESSAGE_BYTES:
        raise ValueError(f"the outcome has {len(message)} bytes, expected at most {MESSAGE_BYTES}")


def printable(text: str) -> str:
    """The text; what a terminal would obey, and what UTF-8 cannot hold, is written out."""
    if text.isprintable():
        return text
    keep = "\t\n"
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def cleaned(failure: object) -> Failure:
    """The failure with one line for a message, which like the traceback is cut and printable.

    Raises:
        TypeError, ValueError: not a `Failure`, or parts of it have other types than it declares.
    """
    if not isinstance(failure, Failure):
        raise TypeError(f"outcome.failure is {type(failure).__name__}, expected Failure or None")
    untrusted: Any = failure
    if untrusted.kind not in get_args(FailureKind):
        raise ValueError(f"outcome.failure.kind is {untrusted.kind!r}, expected one of {get_args(FailureKind)}")
    if not (isinstance(untrusted.message, str) and isinstance(untrusted.detail, str)):
        raise TypeError("outcome.failure.message and detail must be text")
    line = next(iter(failure.message.strip().splitlines()), "")
    return Failure(failure.kind, printable(line[:LINE_CHARACTERS]), printable(failure.detail[-DETAIL_CHARACTERS:]))


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} is {type(value).__name__}, expected a float")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{what} is larger than any float") from None


def _check_name(where: str, name: object) -> None:
    """Raise for what the history cannot hold as the name of a metric or evaluator, or a table cannot show."""
    if not isinstance(name, str):
        raise TypeError(f"{where} has the name {name!r:.50}, expected text")
    if not name or len(name) > NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"{where} has the name {name[:50]!r}, expected 1 to {NAME_CHARACTERS} printable characters")


def _check_hash(digest: object) -> None:
    if digest is None:
        return
    if not isinstance(digest, str):
        raise TypeError(f"outcome.weights_sha256 is {type(digest).__name__}, expected text or None")
    if not _SHA256.fullmatch(digest):
        raise ValueError(f"outcome.weights_sha256 is {digest[:80]!r}, expected 64 hex digits")


def _not_finite(name: str, scores: Scores) -> str | None:
    """Which value of which item is no finite number, if one is."""
    for metric, values in scores.values.items():
        finite = np.isfinite(values)
        if not finite.all():
            first = int(np.argmin(finite))
            return f"{name}.{metric} of item '{scores.items[first]}' is {values[first]}"
    return None


def _checked_scores(name: object, scores: object) -> Scores:
    """The scores as float64."""
    _check_name("outcome.scores", name)
    if not isinstance(scores, Scores):
        raise TypeError(f"outcome.scores[{name!r}] is {type(scores).__name__}, expected Scores")
    untrusted: Any = scores
    if not isinstance(untrusted.values, Mapping) or not isinstance(untrusted.items, tuple):
        raise TypeError(f"outcome.scores[{name!r}]: values must be a mapping and items a tuple")
    for metric in untrusted.values:
        _check_name(f"outcome.scores[{name!r}].values", metric)
    if colon := next((part for part in (name, *untrusted.values) if ":" in part), None):  # the history's separator
        raise ValueError(f"outcome.scores[{name!r}] has the name {colon!r}, expected no colon in it")
    for what, array in [("weights", untrusted.weights), *untrusted.values.items()]:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 1:
            raise TypeError(f"outcome.scores[{name!r}]: {what!r} must be a row of floats")
    lengths = {len(scores.items), len(scores.weights), *map(len, scores.values.values())}
    if len(lengths) > 1:
        raise ValueError(f"outcome.scores[{name!r}] has {sorted(lengths)} items, weights and values")
    if len(set(untrusted.items)) < len(scores.items) or not all(isinstance(item, str) for item in untrusted.items):
        raise ValueError(f"outcome.scores[{name!r}]: items must be different ids")
    scores = Scores(
        scores.items,
        {metric: np.asarray(values, np.float64) for metric, values in scores.values.items()},
        np.asarray(scores.weights, np.float64),
    )
    if not (np.isfinite(scores.weights).all() and (scores.weights >= 0).all()):
        raise ValueError(f"outcome.scores[{name!r}]: weights must be finite and at least 0")
    return scores
