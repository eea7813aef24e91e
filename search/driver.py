"""The main loop: ask, submit, collect, record, tell.

Steady state: there is no generation barrier. At most `window` candidates are in flight; whenever a result
is told, the next candidate is asked. In ordered commit, results are recorded and told in the order of the
candidates, so what is asked depends on seed and window only, never on timing or on how many workers there
are. Every ask and every result is on disk before anything outside this process hears of what follows from it:
what was decided together is written together, and only then are its jobs sent. A driver that starts on a
history replays it and goes on where it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from evaluators.base import ItemPool
from search.budget import Spending, limit_in_force
from search.candidate import Candidate
from search.errors import RunError
from search.in_flight import InFlight, Key
from search.pool import Job, Outcome, Pool
from search.population import Population
from search.progress import Progress
from search.recipe import Recipe
from search.replay import check_ask, replay_ordered
from search.store.events import Ask, Event, LimitReached, Trial
from search.store.history import History
from search.store.spool import Spool
from search.trials import ask_event, may_be_best, outcome_of, trial_event, usable_metrics

POLL_SECONDS = 0.5
STEPS = 32
"""So many asks and results are decided, and written with one sync, before the pool is looked at again: few
enough that workers that became free do not wait for long, enough to spread the cost of the sync."""


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
        prefix: see `Job.prefix`.

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
        prefix: Callable[[Recipe], tuple[int, ...]] = lambda _: (),
    ) -> None:
        self.population, self.history, self.limits = population, history, limits
        self.trials: dict[Key, Trial] = {}
        self._spool, self._make_pool = spool, pool
        self._report, self._stop, self._failed, self._recorded = report, stop, failed, recorded
        self._prefix = prefix
        self._pool: Pool | None = None
        self._first_with_recipe: dict[str, int] = {}
        self._copies: dict[Key, list[Key]] = {}
        self._asking = self._asked_in_vain = False
        self._unwritten: list[Event] = []
        self._decided: list[Outcome] = []
        self._unsent: list[Job] = []
        self._unkept: dict[Key, Outcome] = {}
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
                lambda: self._has_room and self._reached(len({c.work for c in population.candidates})) is None,
            )
            self._untold = {(trial.candidate, trial.items) for trial in untold}
        else:
            self.trials.update(replay(events, population))
        for candidate in population.candidates:
            self._first_with_recipe.setdefault(candidate.work, candidate.id)
        for trial in self.trials.values():
            if trial.items == "search":
                self._note(trial)
        kept = {**self._take_spooled(), **{key: outcome_of(self.trials[key]) for key in self._untold}}
        self._in_flight = InFlight(limits.ordered, kept)

    def search(self) -> None:
        """Run the search to its budget."""
        self._begin("search", self.total)
        self._refuse_without_parents()
        for candidate in self.population.candidates:
            if (key := (candidate.id, "search")) not in self.trials or key in self._untold:
                self._submit(candidate, "search")
        self._work()

    def score(self, candidates: Sequence[Candidate], items: ItemPool) -> list[Trial]:
        """Score candidates on other items, each once in the run; in the order given."""
        missing = [candidate for candidate in candidates if (candidate.id, items) not in self.trials]
        self._begin(items, len(candidates))
        self._count(done=len(candidates) - len(missing))
        for candidate in missing:
            self._submit(candidate, items)
        self._work()
        return [self.trials[candidate.id, items] for candidate in candidates]

    def close(self) -> None:
        """Release the workers."""
        if self._pool is not None:
            self._pool.close()

    def _work(self) -> None:
        """Decide, write, send and wait until nothing is in flight and nothing may be asked."""
        while True:
            self._advance()
            deciding = self._in_flight.ready or self._may_ask
            if not deciding and not self._in_flight:
                self._spool.tidy()
                return
            if self._stop():
                raise KeyboardInterrupt
            # The pool is looked at between decisions too: it gives jobs to workers only then.
            if self._pool is not None or not deciding:
                self._receive(self._workers().wait(0.0 if deciding else POLL_SECONDS))

    def _advance(self) -> None:
        """Ask and commit, ask first, as far as that is possible but a few steps at most; make it known."""
        try:
            for _ in range(STEPS):
                if not (self._ask() or self._commit()):
                    break
        finally:
            self._write()
        for job in self._unsent:
            self._workers().submit(job)
        self._unsent.clear()
        # A result that waits for its turn waits on disk.
        self._spool.put_all([trial_event(outcome, None, feasible=False) for outcome in self._unkept.values()])
        self._unkept.clear()
        self._show()

    @property
    def _has_room(self) -> bool:
        """Whether the budget has room for one more candidate, and no limit has ended the search."""
        budget = self.limits.budget
        return self.limit is None and (budget is None or self.population.asked < budget)

    @property
    def _may_ask(self) -> bool:
        """Whether the window and the budget have room, and something was told since the last ask in vain."""
        room = self._has_room and len(self._in_flight) < self.limits.window
        return room and self._asking and not self._asked_in_vain

    def _reached(self, works: int) -> LimitReached | None:
        """The limit that forbids to ask for one more candidate, after so many different ones."""
        return (
            self._spending.reached(works, self.population.coverage.items_spent) if self.population.has_parents else None
        )

    def _ask(self) -> bool:
        """Ask for a candidate, or note that a limit forbids it; returns whether there is something to write."""
        if not self._may_ask:
            return False
        if (limit := self._reached(len(self._first_with_recipe))) is not None:
            self._unwritten.append(limit)
            self.limit = limit
            return True
        candidate = self.population.ask()
        if candidate is None:
            if not self._in_flight and not self.population.finished:
                raise RunError("a baseline waits for a result that never comes; take it out of search.baselines")
            self._asked_in_vain = True
            return False
        self._unwritten.append(ask_event(candidate))
        self._progress = replace(self._progress, total=self.total)
        self._first_with_recipe.setdefault(candidate.work, candidate.id)
        self._submit(candidate, "search")
        return True

    def _submit(self, candidate: Candidate, items: ItemPool) -> None:
        key = (candidate.id, items)
        self._in_flight.open(key)
        if self._in_flight.result(key) is not None:
            return
        # A recipe that was there before costs nothing: its result is that of the first.
        original = self._first_with_recipe[candidate.work], items
        if original == key:
            learn = candidate.learn if items == "search" else None
            race = candidate.race if items == "search" else None
            job = Job(
                candidate.id,
                candidate.recipe,
                items,
                hash_weights=items != "search",
                learn=learn,
                prefix=self._prefix(candidate.recipe),
                race=race,
            )
            self._unsent.append(job)
        elif original in self.trials:
            self._in_flight.arrive(_copy(outcome_of(self.trials[original]), key))
        elif (found := self._in_flight.result(original)) is not None:
            self._in_flight.arrive(_copy(found, key))
        elif original in self._in_flight:
            self._copies.setdefault(original, []).append(key)
        else:
            self._first_with_recipe[candidate.work] = candidate.id
            self._submit(candidate, items)

    def _receive(self, outcomes: Iterable[Outcome]) -> None:
        for outcome in outcomes:
            if self._in_flight.arrive(outcome):
                self._unkept[outcome.key] = outcome
                for copy in self._copies.pop(outcome.key, []):
                    self._in_flight.arrive(_copy(outcome, copy))

    def _take_spooled(self) -> dict[Key, Outcome]:
        """Results that came before their turn and were not recorded when the last driver ended."""
        kept: dict[Key, Outcome] = {}
        for key, trial in self._spool.take_all().items():
            if key in self.trials:
                self._spool.drop(*key)
            else:
                kept[key] = outcome_of(trial)
        return kept

    def _commit(self) -> bool:
        outcome = self._in_flight.take()
        if outcome is None:
            return False
        key = outcome.key
        self._unkept.pop(key, None)
        if key[1] == "search" and key not in self._untold:
            outcome = self.population.coverage.completed(outcome)
        metrics = None if outcome.failure else outcome.metrics
        if known := key in self._untold:  # recorded before the run was extended
            self._untold.remove(key)
            trial = self.trials[key]
        else:
            trial = trial_event(
                outcome,
                self.population.judge(metrics, key[0] if outcome.censored else None),
                self.population.objective.feasible(metrics),
                self.population.coverage.scored(outcome),
            )
            self.trials[key] = trial
            self._unwritten.append(trial)
            self._decided.append(outcome)
            self._spending.told(trial)
            self._progress = replace(self._progress, done=self._progress.done + 1)
        if key[1] == "search":
            self._asked_in_vain = False
            self.population.tell(key[0], metrics, outcome.scores, censored=outcome.censored)
            self._refuse_without_parents()
            if not known:
                self._note(trial)
        return True

    def _write(self) -> None:
        """Make durable what was decided, with one sync."""
        self.history.append_all(self._unwritten)
        written, self._unwritten = self._unwritten, []
        for event in written:
            if isinstance(event, Ask | Trial):
                self._recorded(event)
        for outcome in self._decided:
            if outcome.failure:
                self._failed(outcome)
            self._spool.drop(*outcome.key)
        self._decided.clear()

    def _refuse_without_parents(self) -> None:
        if self.population.parents_failed():
            first = next(self.trials[one.id, "search"] for one in self.population.candidates if one.is_parent)
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
        return self.population.asked if self.limits.budget is None else self.limits.budget

    def _begin(self, phase: ItemPool, total: int) -> None:
        done = sum(1 for _, items in self.trials if items == phase)
        self._progress = replace(self._progress, phase=phase, total=total, done=done)
        self._asking = phase == "search"
        self._show()

    def _note(self, trial: Trial) -> None:
        best = self._progress.best
        origin = self.population.candidate(trial.candidate).origin
        self._progress = replace(self._progress, failures=self._progress.failures + bool(trial.failure_kind))
        if trial.loss is None or not may_be_best(trial, self.population.coverage.rotates):
            return
        if best is None or best.loss is None or trial.loss < best.loss:
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
        censored=outcome.censored,
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
                population.tell(event.candidate, usable_metrics(event), event.scores, censored=event.censored)
    return trials
