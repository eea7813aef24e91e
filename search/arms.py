"""Searches beside the main one, which it is compared with: arms of the experiment that a certificate is.

An arm has a folder `arms/<name>` in that of the run, with a history and a spool of its own, and the same driver,
workers, window and limits of trials as the main search; its seed derives from that of the run. It may use as many
item-evaluations as the main search did. What the main history knows of a recipe on the same items is taken over. Its
best candidate is chosen on the select items and scored once on the certify items, all in its own history: that of the
run stays what it is, however many arms there are, and an arm that is killed goes on exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from evaluators.base import ItemPool
from search.budget import Budget, Used, budget_in_force
from search.candidate import BASE_LABEL, SEARCHED, Candidate, work_name
from search.certificate import ARMS, PAIRS, STANDARD, ArmName, CertifyConfig
from search.config import BaselineConfig, OptimizerConfig
from search.errors import RunError
from search.extension import items_per_candidate
from search.finals import ArmResult, Rival, best_of, best_of_families, best_searched
from search.optimizers import optimizer_named
from search.pareto.finals import choose_from_front, front_finalists
from search.pool import Job, Outcome, Pool
from search.recipe import ModelRef
from search.seeds import derive_seed
from search.store.events import Extended, Trial
from search.store.history import History
from search.store.sessions import SESSIONS, Sessions
from search.trials import outcome_of

if TYPE_CHECKING:
    from search.driver import Driver
    from search.setup import Setup

MOST_CANDIDATES = 10
"""An arm ends after so many times the candidates of the main search, whatever they cost: in a small space candidates
come again, and such a one costs nothing."""

DriveArm = Callable[["Setup", History, Path, Budget, Callable[[], Pool], ArmName], "Driver"]
"""Makes the driver of an arm: setup, history, folder of the spool, budget, workers, name."""


@dataclass(frozen=True)
class Arms:
    """The searches beside the main one of a run.

    Args:
        setup: of the run; its config names the arms.
        folder: where the arms have theirs.
        drive: makes their drivers.
        pool: the workers of the run.
        report: is told what begins.
        main: the search of the run.
    """

    setup: Setup
    folder: Path
    drive: DriveArm
    pool: Callable[[], Pool]
    report: Callable[[str], None]
    main: Driver

    def run(self, item_evaluations: int) -> list[ArmResult]:
        """Carry out what is missing of the arms, or all of them; none where the main search has found nothing.

        Args:
            item_evaluations: how many the main search used, which is over.
        """
        if not any(candidate.origin == SEARCHED for candidate in self.main.population.candidates):
            return []
        return [self._run(name, item_evaluations) for name in self.setup.config.certify.arms]

    def _run(self, name: ArmName, item_evaluations: int) -> ArmResult:
        main, report = self.main, self.report
        setup = arm_setup(self.setup, name, main)
        if setup.config.search.baselines_only and not setup.config.search.baselines:
            return ArmResult(name, 0, 0)
        report(f"comparing with: {name.replace('_', ' ')}")
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        budget = Budget(None)
        if name != "standard":
            budget = Budget(MOST_CANDIDATES * main.population.asked, item_evaluations)
        with History.open(folder / "history") as history:
            events = history.events()
            if budget_in_force(Budget(None), events) != budget:
                history.append(Extended(budget.to_json()))
            pool = Remembered(self.pool, main)
            driver = self.drive(setup, history, folder / "spool", budget, lambda: pool, name)
            try:
                driver.search()
                rivals = _certified(driver, name, setup.config.search.finalists)
            except RunError as error:
                if not driver.population.parents_failed():
                    raise
                report(f"{name}: {error}")  # of placebos, say, that no evaluator can score: the table says it as well
                rivals = ()
            used = Used.of(history.events(), Sessions(folder / SESSIONS), items_per_candidate(setup))
            return ArmResult(name, driver.population.asked, used.item_evaluations, rivals)


def arm_setup(setup: Setup, name: ArmName, main: Driver) -> Setup:
    """The setup of the run as an arm has it: losses are measured on the same scale, the seed is another."""
    search = setup.config.search
    make_optimizer, space = setup.make_optimizer, setup.space
    match name:
        case "standard":
            known = {c.origin.split(" ")[0] for c in main.population.candidates}
            missing = [one for one in STANDARD if one not in known and (len(space.sources) > 1 or one not in PAIRS)]
            baselines = tuple(BaselineConfig(name=one) for one in missing)
            search = search.model_copy(update={"baselines": baselines, "baselines_only": True})
        case "random_search":
            if search.fitness.rotate:
                # Parents and base are those of the search; what it has used goes into merges on all items.
                search = search.model_copy(update={"baselines": ()})
            search = search.model_copy(update={"optimizer": OptimizerConfig(name=name)})
            make_optimizer = optimizer_named(name)
        case "placebo":
            space = replace(space, models=placebo_models(setup))
    if name == "standard":  # who is compared with is to be as good as it can be
        search = search.model_copy(update={"fitness": search.fitness.model_copy(update={"rotate": False})})
    config = setup.config.model_copy(update={"search": search, "seed": derive_seed(setup.config.seed, "arm", name)})
    objective = main.population.objective
    return replace(setup, config=config, space=space, objective=objective, make_optimizer=make_optimizer)


def placebo_models(setup: Setup) -> dict[str, ModelRef]:
    """The models of a run with a placebo for every source; the base stays."""
    return {
        name: ref.model_copy(update={"random_delta": derive_seed(setup.config.seed, "placebo", name)})
        if name in setup.space.sources
        else ref
        for name, ref in setup.space.models.items()
    }


def with_arms(setup: Setup, folder: Path, asked: Iterable[str]) -> Setup:
    """The setup with all arms of the run: those of its config, those that are asked for now, and those begun before.

    What is asked for is begun with its folder: a run that is stopped then goes on with all of it.
    """
    for name in asked:
        (folder / name).mkdir(parents=True, exist_ok=True)
    wanted = {name: name in setup.config.certify.arms or (folder / name).is_dir() for name in ARMS}
    return replace(setup, config=setup.config.model_copy(update={"certify": CertifyConfig.model_validate(wanted)}))


def _certified(driver: Driver, name: ArmName, finalists: int) -> tuple[Rival, ...]:
    """What the winner is compared with, chosen on the select items as the winner is."""
    baselines = [c for c in driver.population.candidates if c.genome is None and not c.step]
    pareto = driver.population.objective.pareto
    entrants: list[Candidate] = []
    if name != "standard":
        entrants = (front_finalists if pareto else best_searched)(driver, finalists)
    if name != "random_search":  # which shares generation 0 with the search: its baselines have rows of their own
        entrants += baselines
    if name == "standard":
        entrants = [c for c in entrants if c.origin != BASE_LABEL and not c.is_parent]
    selected = {trial.candidate: trial for trial in driver.score(entrants, "select")}
    if name == "standard":
        chosen = best_of_families(driver, entrants, selected)
    elif pareto:
        point = choose_from_front(driver, selected)
        chosen = [] if point is None else [point.candidate]
    else:
        best = best_of(driver, entrants, selected)
        chosen = [] if best is None else [best]
    trials = driver.score(chosen, "certify")
    labels = [c.origin if name == "standard" else name for c in chosen]
    return tuple(Rival(label, c.id, trial) for label, c, trial in zip(labels, chosen, trials, strict=True))


class Remembered:
    """The workers of a run, asked only for what its history does not know. A pool; the run closes the workers.

    Args:
        pool: the workers.
        main: the search that knows results.
    """

    def __init__(self, pool: Callable[[], Pool], main: Driver) -> None:
        self._make_pool = pool
        self._pool: Pool | None = None
        self._answers: list[Outcome] = []
        self._known: dict[tuple[str, ItemPool], Trial] = {}
        for (candidate, items), trial in sorted(main.trials.items()):
            self._known.setdefault((main.population.candidate(candidate).work, items), trial)

    @property
    def size(self) -> int:
        """How many workers there are, 0 before one is needed."""
        return 0 if self._pool is None else self._pool.size

    @property
    def busy(self) -> int:
        """How many of them work now."""
        return 0 if self._pool is None else self._pool.busy

    def submit(self, job: Job) -> None:
        """Queue a job, or answer it."""
        known = self._known.get((work_of(job), job.items))
        if known is not None:
            self._answers.append(replace(outcome_of(known), candidate=job.candidate, attempts=0))
            return
        if self._pool is None:
            self._pool = self._make_pool()
        self._pool.submit(job)

    def wait(self, timeout: float | None = None) -> Sequence[Outcome]:
        """Outcomes that are there, see `Pool.wait`."""
        if self._answers or self._pool is None:
            answers, self._answers = self._answers, []
            return answers
        return self._pool.wait(timeout)

    def cancel(self, key: tuple[int, ItemPool]) -> None:
        """Forget a job."""
        self._answers = [answer for answer in self._answers if answer.key != key]
        if self._pool is not None:
            self._pool.cancel(key)

    def close(self) -> None:
        """Nothing: the workers are those of the run."""


def work_of(job: Job) -> str:
    """`Candidate.work` of the candidate that a job evaluates."""
    return work_name(job.recipe.hash, job.learn, job.race)
