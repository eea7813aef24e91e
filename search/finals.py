"""After the search: choose on the select items, certify on items that nothing has seen.

Finalists are scored again on the select items, since the best of many noisy scores flatters itself; the
winner there, and every baseline, is scored once on the certify items. That is the number that is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from evaluators.base import Evaluator, ItemPool
from search.bootstrap import Bootstrap, holm
from search.candidate import SEARCHED, Candidate
from search.certificate import missing_comparisons
from search.driver import Driver
from search.effect_size import EffectSizes
from search.errors import RunError
from search.objective import Objective
from search.pareto.finals import choose_from_front, front_finalists, front_sentence
from search.selection_bias import Optimism, expected_flattery
from search.store.events import End, Event, Extended, Trial
from search.trials import may_be_best, usable_metrics
from search.verdict import ArmSummary, Row, Verdict


@dataclass(frozen=True)
class Rival:
    """What a search beside the main one found, certified there.

    Attributes:
        label: what the table calls it.
        candidate: its id in that search.
        trial: on the certify items.
    """

    label: str
    candidate: int
    trial: Trial


@dataclass(frozen=True)
class ArmResult:
    """How a search beside the main one ended.

    Attributes:
        name: `standard`, `random_search` or `placebo`.
        candidates: how many it evaluated or took over, and `item_evaluations` what they stand for.
        rivals: empty where it found nothing that keeps the constraints.
    """

    name: str
    candidates: int
    item_evaluations: int
    rivals: tuple[Rival, ...] = ()


def earlier_verdicts(events: Iterable[Event]) -> int:
    """How often the run was extended after a verdict. A verdict that only got more rows counts once."""
    earlier, ended = 0, False
    for event in events:
        if isinstance(event, Extended):
            earlier, ended = earlier + ended, False
        ended = ended or isinstance(event, End)
    return earlier


def finish(
    driver: Driver,
    evaluators: Mapping[str, Evaluator],
    finalists: int,
    seed: int,
    earlier: int = 0,
    arms: Callable[[], Sequence[ArmResult]] = tuple,
) -> Verdict:
    """Select, certify and record the end of a run whose search is complete, after so many earlier verdicts.

    Args:
        arms: carries out the searches beside the main one, once it is known that there is a winner to compare.

    Raises:
        RunError: nothing that was evaluated is feasible.
    """
    candidates = driver.population.candidates
    baselines = [c for c in candidates if c.genome is None and not c.step]
    pareto = driver.population.objective.pareto
    of_search = (front_finalists if pareto else best_searched)(driver, finalists)
    selected = {t.candidate: t for t in driver.score([*of_search, *baselines], "select")}
    searched = [c for c in candidates if c.id in selected and c.origin == SEARCHED]
    best_found = best_of(driver, searched, selected)
    best_baseline = best_of(driver, baselines, selected)
    contenders = [c for c in (best_found, best_baseline) if c is not None]
    chosen = choose_from_front(driver, selected) if pareto else None
    winner = chosen.candidate if chosen is not None else best_of(driver, contenders, selected)
    if winner is None:
        raise RunError(
            "no candidate keeps the constraints and could be evaluated on the select items; loosen the constraints, "
            "or export one by number with `meiosis export RUN OUT --trial ID`"
        )
    rivals = [c for c in best_of_families(driver, baselines, selected) if c.id != winner.id]
    beside = tuple(arms())
    certified = {t.candidate: t for t in driver.score([*rivals, winner], "certify")}
    verdict = _verdict(driver, evaluators, winner, best_baseline, rivals, certified, seed, beside)
    optimism = None
    if winner.origin == SEARCHED:
        optimism = _optimism(driver, evaluators, winner, best_baseline, finalists, seed)
    verdict = replace(verdict, earlier=earlier, optimism=optimism)
    if chosen is not None:
        said = front_sentence(driver.population.objective, verdict.rows, winner.id, chosen.how)
        verdict = replace(verdict, front=said)
    driver.history.append(End(winner.id, verdict.to_json()))
    return verdict


def best_searched(driver: Driver, count: int) -> list[Candidate]:
    """The best searched candidates on the search items, each recipe once."""
    losses = {
        c.id: trial.loss or 0.0
        for c in driver.population.candidates
        if c.origin == SEARCHED and may_be_best(trial := driver.trials[c.id, "search"])
    }
    distinct: dict[str, Candidate] = {}
    for id_ in driver.population.ranked(losses):
        candidate = driver.population.candidate(id_)
        distinct.setdefault(candidate.recipe_hash, candidate)
    return list(distinct.values())[:count]


def _loss(driver: Driver, trial: Trial) -> float:
    return driver.population.objective.judge(usable_metrics(trial)).loss


def best_of(driver: Driver, candidates: Sequence[Candidate], trials: Mapping[int, Trial]) -> Candidate | None:
    objective = driver.population.objective
    feasible = [c for c in candidates if objective.judge(usable_metrics(trials[c.id])).feasible]
    return min(feasible, key=lambda c: (_loss(driver, trials[c.id]), c.id), default=None)


def best_of_families(driver: Driver, baselines: Sequence[Candidate], trials: Mapping[int, Trial]) -> list[Candidate]:
    """Parents one by one; of a baseline with several settings the best on the select items."""
    families: dict[str, Candidate] = {}
    for candidate in baselines:
        family = candidate.origin.split(" ")[0]
        known = families.get(family)
        if known is None or _loss(driver, trials[candidate.id]) < _loss(driver, trials[known.id]):
            families[family] = candidate
    return list(families.values())


@dataclass(frozen=True)
class _Entry:
    """One row in the making."""

    label: str
    candidate: int
    trial: Trial
    arm: str = ""


def _verdict(
    driver: Driver,
    evaluators: Mapping[str, Evaluator],
    winner: Candidate,
    best_baseline: Candidate | None,
    rivals: list[Candidate],
    certified: Mapping[int, Trial],
    seed: int,
    arms: Sequence[ArmResult] = (),
) -> Verdict:
    objective = driver.population.objective
    if certified[winner.id].failure_kind:
        raise RunError(f"candidate {winner.id} could not be certified: {certified[winner.id].failure_message}")
    beside = [_Entry(rival.label, rival.candidate, rival.trial, arm.name) for arm in arms for rival in arm.rivals]
    # Candidates of other searches have numbers of their own there.
    entries = {c.id: _Entry(_label(c), c.id, certified[c.id]) for c in rivals}
    entries |= {-number: entry for number, entry in enumerate(beside, 1)}
    unavailable = [entry.label for entry in entries.values() if usable_metrics(entry.trial) is None]
    unavailable += [arm.name for arm in arms if not arm.rivals]
    families = {
        entry.label.split(" ")[0]
        for entry in (*entries.values(), _Entry(winner.origin, winner.id, certified[winner.id]))
    }
    entries = {key: entry for key, entry in entries.items() if usable_metrics(entry.trial) is not None}
    entries[winner.id] = _Entry(_label(winner), winner.id, certified[winner.id])
    scores = {key: entry.trial.scores for key, entry in entries.items()}
    bootstrap = Bootstrap(objective, evaluators, scores, seed)
    effects = EffectSizes(objective, evaluators, scores, seed)
    value = {key: objective.value(entry.trial.metrics) for key, entry in entries.items()}
    others = [key for key in entries if key != winner.id]
    compared = {key: bootstrap.compare(winner.id, key, value[winner.id] - value[key]) for key in others}
    corrected = dict(zip(compared, holm([comparison.p for comparison in compared.values()]), strict=True))
    names = list(dict.fromkeys([*(t.metric for t in objective.terms), *(c.metric for c in objective.constraints)]))
    rows = []
    for key in [*sorted(others, key=lambda key: -value[key]), winner.id]:
        entry = entries[key]
        low, high = bootstrap.interval(key)
        metrics = {name: entry.trial.metrics[name] for name in names}
        feasible = objective.violation(metrics) == 0
        row = Row(entry.label, entry.candidate, value[key], low, high, metrics, feasible, arm=entry.arm)
        if key != winner.id:
            d, effect = compared[key], effects.compare(winner.id, key)
            row = replace(row, difference=d.difference, difference_low=d.low, difference_high=d.high, p=corrected[key])
            if effect is not None:
                row = replace(row, effect=effect.d, effect_low=effect.low, effect_high=effect.high)
        rows.append(row)
    candidates = driver.population.candidates
    sources, found = (
        sum(c.is_parent for c in candidates),
        any(c.origin == SEARCHED for c in candidates),
    )
    return Verdict(
        winner=winner.id,
        label=_label(winner),
        searched=winner.origin == SEARCHED,
        candidates_searched=sum(c.origin == SEARCHED for c in candidates),
        best_baseline=best_baseline.origin if best_baseline else None,
        documents=_documents(evaluators, certified[winner.id], objective),
        weights_sha256=certified[winner.id].weights_sha256 or "",
        rows=tuple(rows),
        unavailable=tuple(unavailable),
        arms=tuple(ArmSummary(arm.name, arm.candidates, arm.item_evaluations) for arm in arms),
        missing=missing_comparisons(families | {arm.name for arm in arms}, sources) if found else (),
    )


def _optimism(
    driver: Driver,
    evaluators: Mapping[str, Evaluator],
    winner: Candidate,
    reference: Candidate | None,
    finalists: int,
    seed: int,
) -> Optimism:
    """What the search saw of a winner that it found; the reference is the best baseline."""
    objective, trials = driver.population.objective, driver.trials
    seen = {
        c.id: trials[c.id, "search"].scores
        for c in driver.population.candidates
        if c.origin == SEARCHED and trials[c.id, "search"].feasible
    }
    pools: tuple[ItemPool, ...] = ("search", "select", "certify")
    value = {pool: objective.value(trials[winner.id, pool].metrics) for pool in pools}
    shrunken = expected = driver.population.expected(winner.id)
    if shrunken is None:
        flattery = expected_flattery(objective, evaluators, seen, winner.id, finalists, seed)
        shrunken = value["search"] - flattery
    known: dict[ItemPool, float] = {}
    if reference is not None:
        found = {pool: trials.get((reference.id, pool)) for pool in pools}
        if expected is not None and (there := found["search"]) is not None and there.scored is not None:
            del found["search"]  # other items than the winner's
        known = {p: objective.value(m) for p, t in found.items() if t is not None and (m := usable_metrics(t))}
    compared = known.keys() == value.keys() and reference is not None
    return Optimism(
        candidates=len(seen),
        search=value["search"],
        shrunken=shrunken,
        select=value["select"],
        certify=value["certify"],
        reference=reference.origin if compared and reference else None,
        reference_search=known.get("search") if compared else None,
        reference_certify=known.get("certify") if compared else None,
        on_part=trials[winner.id, "search"].scored if expected is not None else None,
        pooled=expected is not None,
    )


def _documents(evaluators: Mapping[str, Evaluator], trial: Trial, objective: Objective) -> int:
    every = {term.metric.partition(".")[0] for term in objective.terms}
    # What is known exactly, whatever the items, needs no documents.
    names = {name for name in every if not evaluators[name].exact} or every
    return min(len({evaluators[name].document_of(item) for item in trial.scores[name].items}) for name in names)


def _label(candidate: Candidate) -> str:
    return f"found merge (trial {candidate.id})" if candidate.origin == SEARCHED else candidate.origin
