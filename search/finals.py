"""After the search: choose on the select items, certify on items that nothing has seen.

Finalists are scored again on the select items, since the best of many noisy scores flatters itself; the
winner there, and every baseline, is scored once on the certify items. That is the number that is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluators.base import Evaluator
from search.bootstrap import Bootstrap, holm
from search.driver import Driver
from search.errors import RunError
from search.objective import Objective
from search.population import SEARCHED, Candidate
from search.store.events import End, Trial
from search.trials import usable_metrics

SIGNIFICANCE = 0.01
FEWEST_DOCUMENTS = 10
"""Certify documents per evaluator below which resampling them says little about others."""


@dataclass(frozen=True)
class Row:
    """One line of the final table, on the certify items.

    Attributes:
        label: origin of the candidate.
        candidate: its id.
        value: objective, smaller is better; low and high are its 95 % interval.
        metrics: the metrics of the objective and of the constraints.
        feasible: whether it keeps the constraints on these items.
        difference: objective of the winner minus this one (None for the winner itself).
        p: of that difference, corrected for the number of rows (Holm).
    """

    label: str
    candidate: int
    value: float
    low: float
    high: float
    metrics: Mapping[str, float]
    feasible: bool = True
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Verdict:
    """How a run ended.

    Attributes:
        winner: id of the chosen candidate.
        label: its origin and number.
        searched: whether the optimiser found it, or it is a baseline that nothing beat on the select items.
        candidates_searched: how many candidates came from the optimiser.
        best_baseline: label of the best baseline on the select items, None if none keeps the constraints.
        documents: the smallest number of certify documents behind a metric of the objective.
        weights_sha256: hash of the winner's tensors, as they were evaluated.
        rows: baselines by value, the winner last.
        unavailable: labels of baselines that could not be evaluated.
        earlier: verdicts of this run before it was extended; each of them looked at the certify items.
    """

    winner: int
    label: str
    searched: bool
    candidates_searched: int
    best_baseline: str | None
    documents: int
    weights_sha256: str
    rows: tuple[Row, ...]
    unavailable: tuple[str, ...] = ()
    earlier: int = 0

    @property
    def proven(self) -> bool:
        """Whether the found merge is better than every row that keeps the constraints, beyond chance."""
        return self._doubt() is None

    def sentence(self) -> str:
        """The verdict in words."""
        missing = f" Not evaluated: {', '.join(self.unavailable)}." if self.unavailable else ""
        if self.earlier:
            missing += (
                f" The run was extended after {self.earlier} earlier verdict(s) on the same certify items: whoever "
                "extends a run because of a verdict no longer has an unbiased one."
            )
        doubt = self._doubt()
        if doubt is not None:
            return doubt + missing
        kept = "" if all(row.feasible for row in self.rows) else " that keeps the constraints"
        return (
            f"The found merge beats every parent and every baseline{kept} "
            f"(paired bootstrap, Holm, p < {SIGNIFICANCE:g}).{missing}"
        )

    def _doubt(self) -> str | None:
        """Why the found merge is not proven better, or None."""
        if not self.candidates_searched:
            return f"Nothing was searched: the budget ends with generation 0. Its best, '{self.label}', is exported."
        if not self.searched:
            return f"No searched merge beat the baseline '{self.label}' on the select items; it is what is exported."
        if not self.rows[-1].feasible:
            return "The found merge does not keep the constraints on the certify items."
        rivals = [row for row in self.rows[:-1] if row.feasible and row.difference is not None and row.p is not None]
        behind = [row.label for row in rivals if (row.difference or 0.0) >= 0]
        if behind:
            return f"The found merge does not beat {', '.join(behind)} on the certify items."
        if self.documents < FEWEST_DOCUMENTS:
            return (
                f"The found merge is ahead of every parent and baseline, but {self.documents} certify document(s) "
                f"prove nothing; give at least {FEWEST_DOCUMENTS}."
            )
        unproven = [row.label for row in rivals if row.p is not None and row.p >= SIGNIFICANCE]
        if unproven:
            return (
                f"The found merge is ahead of every parent and baseline, but against {', '.join(unproven)} "
                f"that may be chance (p >= {SIGNIFICANCE:g})."
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        return {**asdict(self), "proven": self.proven, "sentence": self.sentence()}

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        data = json.loads(text)
        data["rows"] = tuple(Row(**row) for row in data["rows"])
        data["unavailable"] = tuple(data["unavailable"])
        return cls(**data)


def finish(driver: Driver, evaluators: Mapping[str, Evaluator], finalists: int, seed: int, earlier: int = 0) -> Verdict:
    """Select, certify and record the end of a run whose search is complete, after so many earlier verdicts.

    Raises:
        RunError: nothing that was evaluated is feasible.
    """
    candidates = driver.population.candidates
    baselines = [c for c in candidates if c.genome is None and not c.step]
    selected = {t.candidate: t for t in driver.score([*_finalists(driver, finalists), *baselines], "select")}
    searched = [c for c in candidates if c.id in selected and c.origin == SEARCHED]
    best_searched = _best(driver, searched, selected)
    best_baseline = _best(driver, baselines, selected)
    contenders = [c for c in (best_searched, best_baseline) if c is not None]
    winner = _best(driver, contenders, selected)
    if winner is None:
        raise RunError(
            "no candidate keeps the constraints and could be evaluated on the select items; loosen the constraints, "
            "or export one by number with `meiosis export RUN OUT --trial ID`"
        )
    rivals = [c for c in _one_per_family(driver, baselines, selected) if c.id != winner.id]
    certified = {t.candidate: t for t in driver.score([*rivals, winner], "certify")}
    verdict = _verdict(driver, evaluators, winner, best_baseline, rivals, certified, seed)
    verdict = replace(verdict, earlier=earlier)
    driver.history.append(End(winner.id, verdict.to_json()))
    return verdict


def _finalists(driver: Driver, count: int) -> list[Candidate]:
    """The best searched candidates on the search items, each recipe once."""
    ranked = sorted(
        (
            c
            for c in driver.population.candidates
            if c.origin == SEARCHED and _may_be_best(driver.trials[c.id, "search"])
        ),
        key=lambda c: (driver.population.cautious(c.id, driver.trials[c.id, "search"].loss or 0.0), c.id),
    )
    distinct: dict[str, Candidate] = {}
    for candidate in ranked:
        distinct.setdefault(candidate.recipe_hash, candidate)
    return list(distinct.values())[:count]


def _may_be_best(trial: Trial) -> bool:
    """Whether it keeps the constraints and was not stopped early."""
    return trial.feasible and not trial.censored


def _loss(driver: Driver, trial: Trial) -> float:
    return driver.population.objective.judge(usable_metrics(trial)).loss


def _best(driver: Driver, candidates: list[Candidate], trials: Mapping[int, Trial]) -> Candidate | None:
    objective = driver.population.objective
    feasible = [c for c in candidates if objective.judge(usable_metrics(trials[c.id])).feasible]
    return min(feasible, key=lambda c: (_loss(driver, trials[c.id]), c.id), default=None)


def _one_per_family(driver: Driver, baselines: list[Candidate], trials: Mapping[int, Trial]) -> list[Candidate]:
    """Parents one by one; of a baseline with several settings the best on the select items."""
    families: dict[str, Candidate] = {}
    for candidate in baselines:
        family = candidate.origin.split(" ")[0]
        known = families.get(family)
        if known is None or _loss(driver, trials[candidate.id]) < _loss(driver, trials[known.id]):
            families[family] = candidate
    return list(families.values())


def _verdict(
    driver: Driver,
    evaluators: Mapping[str, Evaluator],
    winner: Candidate,
    best_baseline: Candidate | None,
    rivals: list[Candidate],
    certified: Mapping[int, Trial],
    seed: int,
) -> Verdict:
    objective = driver.population.objective
    if certified[winner.id].failure_kind:
        raise RunError(f"candidate {winner.id} could not be certified: {certified[winner.id].failure_message}")
    usable = [c for c in rivals if usable_metrics(certified[c.id]) is not None]
    shown = [*usable, winner]
    bootstrap = Bootstrap(objective, evaluators, {c.id: certified[c.id].scores for c in shown}, seed)
    value = {c.id: objective.value(certified[c.id].metrics) for c in shown}
    compared = {c.id: bootstrap.compare(winner.id, c.id, value[winner.id] - value[c.id]) for c in usable}
    corrected = dict(zip(compared, holm([comparison.p for comparison in compared.values()]), strict=True))
    names = list(dict.fromkeys([*(t.metric for t in objective.terms), *(c.metric for c in objective.constraints)]))
    rows = []
    for c in [*sorted(usable, key=lambda c: -value[c.id]), winner]:
        low, high = bootstrap.interval(c.id)
        metrics = {name: certified[c.id].metrics[name] for name in names}
        label = _label(c)
        feasible = objective.violation(metrics) == 0
        row = Row(label, c.id, value[c.id], low, high, metrics, feasible)
        if c.id != winner.id:
            d = compared[c.id]
            row = replace(row, difference=d.difference, difference_low=d.low, difference_high=d.high, p=corrected[c.id])
        rows.append(row)
    return Verdict(
        winner=winner.id,
        label=_label(winner),
        searched=winner.origin == SEARCHED,
        candidates_searched=sum(c.origin == SEARCHED for c in driver.population.candidates),
        best_baseline=best_baseline.origin if best_baseline else None,
        documents=_documents(evaluators, certified[winner.id], objective),
        weights_sha256=certified[winner.id].weights_sha256 or "",
        rows=tuple(rows),
        unavailable=tuple(c.origin for c in rivals if c not in usable),
    )


def _documents(evaluators: Mapping[str, Evaluator], trial: Trial, objective: Objective) -> int:
    names = {term.metric.partition(".")[0] for term in objective.terms}
    return min(len({evaluators[name].document_of(item) for item in trial.scores[name].items}) for name in names)


def _label(candidate: Candidate) -> str:
    return f"found merge (trial {candidate.id})" if candidate.origin == SEARCHED else candidate.origin
