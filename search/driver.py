"""The main loop: ask, submit, collect, record, tell.

Steady state: there is no generation barrier. At most `window` candidates are in flight; whenever a result
is told, the next candidate is asked. In ordered commit, results are recorded and told in the order of the
candidates, so what is asked depends on seed and window only, never on timing or on how many workers there
are. Every ask and every result is on disk before it takes effect; a driver that starts on a history
replays it and goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from evaluators.base import ItemPool
from search.budget import Spending, limit_in_force
from search.errors import RunError
from search.pool import Job, Outcome, Pool
from search.population import Candidate, Population
from search.progress import Progress
from search.replay import check_ask, replay_ordered
from search.store.events import Ask, Event, LimitReached, Trial
from search.store.history import History
from search.store.spool import Spool
from search.trials import ask_event, outcome_of, trial_event, usable_metrics

Key = tuple[int, ItemPool]
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Limits:
    """How far and how wide a search goes: candidates in all (None: until none is asked), candidates in flight,
    order of commit."""

    budget: int | None
    window: int
    ordered: bool = True


class Driver:
    """Carries a population through a pool into a history.

    Args:
        population: fresh; what the history holds is replayed into it.
        history: open for writing.
        spool: where results wait that came before their turn.
        pool: makes the workers; called when the first job must be sent, since a run may need none.
        limits: budget and window.
        report: is called with the state after every change.
        stop: asked between records; when it says so, `KeyboardInterrupt` is raised.
        failed: is told every failure, with its traceback.
        spending: the limits beside the number of candidates, and what was used of them.
        recorded: is told every ask and trial once it is in the history.

    Attributes:
        limit: the limit that ended the search, if it was not its number of candidates.
    """

    def __init__(
        self,
        population: Population,
        history: History,
        spool: Spool,
        pool: Callable[[], Pool],
        limits: Limits,
        report: Callable[[Progress], None] = lambda _: None,
        stop: Callable[[], bool] = lambda: False,
        failed: Callable[[Outcome], None] = lambda _: None,
        spending: Spending | None = None,
        recorded: Callable[[Ask | Trial], None] = lambda _: None,
    ) -> None:
        self.population, self.history, self.limits = population, history, limits
        self.trials: dict[Key, Trial] = {}
        self._spool, self._make_pool = spool, pool
        self._report, self._stop, self._failed, self._recorded = report, stop, failed, recorded
        self._pool: Pool | None = None
        self._first_with_recipe: dict[str, int] = {}
        self._open: dict[Key, None] = {}
        self._copies: dict[Key, list[Key]] = {}
        self._progress = Progress(phase="search", total=limits.budget or 0)
        self._spending = spending or Spending()
        events = history.events()
        self.limit = limit_in_force(events)
        self._untold: set[Key] = set()
        if limits.ordered:
            # Of an extended run, some recorded results are told only after a new candidate was asked: see there.
            self.trials.update({(event.candidate, event.items): event for event in events if isinstance(event, Trial)})
            untold = replay_ordered(
                events,
                population,
                limits.window,
                lambda: self._has_room(len({c.work for c in population.candidates})) is True,
            )
            self._untold = {(trial.candidate, trial.items) for trial in untold}
        else:
            self.trials.update(replay(events, population))
        for candidate in population.candidates:
            self._first_with_recipe.setdefault(candidate.work, candidate.id)
        for trial in self.trials.values():
            if trial.items == "search":
                self._note(trial)
        self._arrived = self._take_spooled()
        self._arrived.update((key, outcome_of(self.trials[key])) for key in sorted(self._untold))

    def search(self) -> None:
        """Run the search to its budget."""
        self._begin("search", self.total)
        self._refuse_without_parents()
        for candidate in self.population.candidates:
            if (key := (candidate.id, "search")) not in self.trials or key in self._untold:
                self._submit(candidate, "search")
        self._fill()
        while self._open:
            self._collect()

    def score(self, candidates: Sequence[Candidate], items: ItemPool) -> list[Trial]:
        """Score candidates on other items, each once in the run; in the order given."""
        missing = [candidate for candidate in candidates if (candidate.id, items) not in self.trials]
        self._begin(items, len(candidates))
        self._count(done=len(candidates) - len(missing))
        for candidate in missing:
            self._submit(candidate, items)
        while self._open:
            self._collect()
        return [self.trials[candidate.id, items] for candidate in candidates]

    def close(self) -> None:
        """Release the workers."""
        if self._pool is not None:
            self._pool.close()

    def _fill(self) -> None:
        """Ask and submit while the window and the budget have room."""
        while len(self._open) < self.limits.window and self._may_ask():
            candidate = self.population.ask()
            if candidate is None:
                if not self._open and not self.population.finished:
                    raise RunError("a baseline waits for a result that never comes; take it out of search.baselines")
                return
            self._record(ask_event(candidate))
            self._progress = replace(self._progress, total=self.total)
            self._first_with_recipe.setdefault(candidate.work, candidate.id)
            self._submit(candidate, "search")

    def _has_room(self, works: int) -> LimitReached | bool:
        """Whether the budget has room for one more candidate, or the limit that it reaches now."""
        budget = self.limits.budget
        if self.limit is not None or (budget is not None and len(self.population.candidates) >= budget):
            return False
        return (self._spending.reached(works) if self.population.has_parents else None) or True

    def _may_ask(self) -> bool:
        """Whether to ask; a limit that forbids it is recorded before it takes effect."""
        room = self._has_room(len(self._first_with_recipe))
        if isinstance(room, LimitReached):
            self.history.append(room)
            self.limit, room = room, False
        return room

    def _submit(self, candidate: Candidate, items: ItemPool) -> None:
        key = (candidate.id, items)
        self._open[key] = None
        if key in self._arrived:
            return
        # A recipe that was there before costs nothing: its result is that of the first.
        original = (self._first_with_recipe[candidate.work], items)
        if original == key:
            learn = candidate.learn if items == "search" else None
            self._workers().submit(
                Job(candidate.id, candidate.recipe, items, hash_weights=items != "search", learn=learn)
            )
        elif original in self.trials:
            self._arrived[key] = _copy(outcome_of(self.trials[original]), key)
        elif original in self._arrived:
            self._arrived[key] = _copy(self._arrived[original], key)
        elif original in self._open:
            self._copies.setdefault(original, []).append(key)
        else:
            self._first_with_recipe[candidate.work] = candidate.id
            self._submit(candidate, items)

    def _collect(self) -> None:
        """Commit what may be committed; if nothing may, wait for results."""
        if self._stop():
            raise KeyboardInterrupt
        key = self._next_to_commit()
        if key is not None:
            self._commit(key)
            return
        for outcome in self._workers().wait(POLL_SECONDS):
            if outcome.key not in self._open:
                continue
            self._arrived[outcome.key] = outcome
            for copy in self._copies.pop(outcome.key, []):
                self._arrived[copy] = _copy(outcome, copy)
            if self._next_to_commit() != outcome.key:
                self._spool.put(*outcome.key, trial_event(outcome, None, feasible=False))
        self._show()

    def _take_spooled(self) -> dict[Key, Outcome]:
        """Results that came before their turn and were not recorded when the last driver ended."""
        kept: dict[Key, Outcome] = {}
        for key, trial in self._spool.take_all().items():
            if key in self.trials:
                self._spool.drop(*key)
            else:
                kept[key] = outcome_of(trial)
        return kept

    def _next_to_commit(self) -> Key | None:
        if self.limits.ordered:
            first = next(iter(self._open))
            return first if first in self._arrived else None
        return next((key for key in self._arrived if key in self._open), None)

    def _commit(self, key: Key) -> None:
        outcome = self._arrived.pop(key)
        metrics = None if outcome.failure else outcome.metrics
        if recorded := key in self._untold:
            self._untold.remove(key)
            trial = self.trials[key]
        else:
            trial = trial_event(outcome, self.population.judge(metrics), self.population.objective.feasible(metrics))
            self._record(trial)
            self._spending.told(trial)
            if outcome.failure:
                self._failed(outcome)
        self._spool.drop(*outcome.key)
        self.trials[key] = trial
        del self._open[key]
        if key[1] == "search":
            self.population.tell(key[0], metrics)
            self._refuse_without_parents()
            if not recorded:
                self._note(trial)
            self._fill()
        self._count(done=self._progress.done + (not recorded))

    def _record(self, event: Ask | Trial) -> None:
        self.history.append(event)
        self._recorded(event)

    def _refuse_without_parents(self) -> None:
        if self.population.parents_failed():
            first = self.trials[0, "search"]
            raise RunError(
                f"no parent could be evaluated, so nothing can be compared with them: {first.failure_message}"
            )

    def _workers(self) -> Pool:
        if self._pool is None:
            self._pool = self._make_pool()
        return self._pool

    @property
    def total(self) -> int:
        """Candidates of the search; without a budget those that are known by now."""
        return len(self.population.candidates) if self.limits.budget is None else self.limits.budget

    def _begin(self, phase: ItemPool, total: int) -> None:
        done = sum(1 for _, items in self.trials if items == phase)
        self._progress = replace(self._progress, phase=phase, total=total, done=done)
        self._show()

    def _note(self, trial: Trial) -> None:
        best = self._progress.best
        origin = self.population.candidates[trial.candidate].origin
        self._progress = replace(self._progress, failures=self._progress.failures + bool(trial.failure_kind))
        if trial.loss is not None and trial.feasible and (best is None or best.loss is None or trial.loss < best.loss):
            self._progress = replace(self._progress, best=trial, best_origin=origin)

    def _count(self, done: int) -> None:
        self._progress = replace(self._progress, done=done)
        self._show()

    def _show(self) -> None:
        busy, size = (self._pool.busy, self._pool.size) if self._pool else (0, 0)
        self._report(replace(self._progress, busy=busy, workers=size))


def _copy(outcome: Outcome, key: Key) -> Outcome:
    """The result of a recipe for another candidate that has the same one."""
    return Outcome(
        *key,
        scores=outcome.scores,
        metrics=outcome.metrics,
        failure=outcome.failure,
        weights_sha256=outcome.weights_sha256,
        attempts=0,
    )


def replay(events: Iterable[Event], population: Population) -> dict[Key, Trial]:
    """Bring a fresh population to where a history ends; returns the trials.

    Raises:
        HistoryError: the population asks for something else than what is recorded.
    """
    trials: dict[Key, Trial] = {}
    for event in events:
        if isinstance(event, Ask):
            candidate = population.ask()
            check_ask(event, None if candidate is None else ask_event(candidate))
        elif isinstance(event, Trial):
            trials[event.candidate, event.items] = event
            if event.items == "search":
                population.tell(event.candidate, usable_metrics(event))
    return trials
