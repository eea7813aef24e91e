"""What a search may use, what it has used, and what ended it.

Candidates and item-evaluations follow from the history, so a search ends at the same candidate however it
was run. GPU-hours and wall-clock are circumstance: when one of them ends a search, that is an event of the
history, and a replay goes by the event.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from search.errors import UserError
from search.limits import LimitsConfig, duration
from search.store.events import Ask, End, Event, Extended, LimitReached, Trial

if TYPE_CHECKING:
    from search.config import SearchConfig
    from search.store.sessions import Sessions


@dataclass(frozen=True)
class Budget:
    """What a search may use; None: as much as it likes.

    Attributes:
        candidates: candidates in all, generation 0 included.
        item_evaluations: search items scored; a recipe that was there before costs none.
        gpu_hours: worker-hours times GPUs per worker (1 where a worker has none).
        wall_clock: seconds of search, over all resumes.
    """

    candidates: int | None
    item_evaluations: int | None = None
    gpu_hours: float | None = None
    wall_clock: float | None = None

    @classmethod
    def of(cls, search: SearchConfig) -> Budget:
        """The budget that a config gives."""
        limits = search.limits
        candidates = None if search.baselines_only else search.budget
        return cls(candidates, limits.item_evaluations, limits.gpu_hours, limits.wall_clock)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def changed(self, changes: Mapping[str, Any]) -> Budget:
        """The budget with other limits, as the user wrote them: `budget`, and the keys of `search.limits`; None
        lifts one.

        Raises:
            UserError: a value that is none.
        """
        found: dict[str, Any] = {}
        for name, value in changes.items():
            kind: Any = Annotated[int, Field(ge=1)] if name == "budget" else None
            try:
                if kind is not None:
                    found["candidates"] = TypeAdapter(kind).validate_python(value)
                else:
                    found[name] = getattr(LimitsConfig.model_validate({name: value}), name)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise UserError(f"--{name.replace('_', '-')} {value}: {message[0].lower()}{message[1:]}") from error
        return replace(self, **found)


def budget_in_force(start: Budget, events: Iterable[Event]) -> Budget:
    """The budget after all that the history says of it."""
    last = next((event for event in reversed(list(events)) if isinstance(event, Extended)), None)
    return start if last is None else Budget(**json.loads(last.budget))


def limit_in_force(events: Iterable[Event]) -> LimitReached | None:
    """The limit that ended the search, unless it was extended afterwards."""
    found: LimitReached | None = None
    for event in events:
        if isinstance(event, LimitReached):
            found = event
        elif isinstance(event, Extended):
            found = None
    return found


def end_in_force(events: Iterable[Event]) -> End | None:
    """The end of the run, unless it was extended afterwards."""
    found: End | None = None
    for event in events:
        if isinstance(event, End):
            found = event
        elif isinstance(event, Extended):
            found = None
    return found


@dataclass(frozen=True)
class Used:
    """What a search has used, in the units of `Budget`."""

    candidates: int = 0
    item_evaluations: int = 0
    gpu_hours: float = 0.0
    wall_clock: float = 0.0

    @classmethod
    def of(cls, events: Sequence[Event], sessions: Sessions, items: int | None = None) -> Used:
        """What a history tells, and the files beside it.

        Args:
            items: search items of a candidate; by default those of the first trial with scores of all of them.
        """
        asks = [event for event in events if isinstance(event, Ask)]
        gpu_seconds = sum(gpu_seconds_of(e, sessions.gpus_at(i)) for i, e in enumerate(events) if isinstance(e, Trial))
        if items is None:
            whole = (e.scores for e in events if isinstance(e, Trial) and e.has_all_search_items)
            items = sum(len(scores.items) for scores in next(whole, {}).values())
        trials = {e.candidate: e for e in events if isinstance(e, Trial) and e.items == "search"}
        first_asks: dict[object, int] = {}
        begun: set[str] = set()
        for ask in asks:
            work, trial = _work(ask), trials.get(ask.candidate)
            if trial is not None or work not in begun:
                first_asks.setdefault((work, _part(trial)), ask.candidate)
            begun.add(work)
        # Of candidates that were not scored on all items it is recorded; what is in flight is taken to need all.
        fewer = {id_: items - trial.scored for id_, trial in trials.items() if trial.scored is not None}
        spared = sum(fewer.get(candidate, 0) for candidate in first_asks.values())
        return cls(len(asks), len(first_asks) * items - spared, gpu_seconds / 3600, sessions.search_seconds)


def _work(ask: Ask) -> str:
    """Equal for candidates that are evaluated once together: see `Candidate.work`."""
    learns = ask.recipe is not None and ask.recipe.startswith("{")
    return f"{ask.recipe_hash} {ask.recipe}" if learns else ask.recipe_hash


def _part(trial: Trial | None) -> object:
    """Equal for candidates with one recipe that were scored on the same items: on others it is scored anew."""
    if trial is None or trial.scored is None:
        return None
    return trial.scored, tuple((name, block.items[:1]) for name, block in sorted(trial.scores.items()))


def gpu_seconds_of(trial: Trial, gpus_per_worker: float) -> float:
    """What a trial of the search used of `gpu_hours`; finals are not counted.

    Attempts that were lost with their worker are taken to have lasted as long as the last one, which alone is recorded.
    """
    if trial.items != "search":
        return 0.0
    return (trial.merge_seconds + trial.evaluate_seconds) * trial.attempts * (gpus_per_worker or 1.0)


class Spending:
    """What a search that runs uses of its limits, candidates aside.

    Args:
        budget: the limits.
        items: search items of a candidate.
        gpus_per_worker: 0 where a worker has none.
        gpu_hours: used before.
        seconds: how long the search has lasted by now, earlier drivers included.
    """

    def __init__(
        self,
        budget: Budget | None = None,
        items: int = 0,
        gpus_per_worker: float = 0.0,
        gpu_hours: float = 0.0,
        seconds: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.budget = budget or Budget(None)
        self._items, self._gpus, self._seconds = items, gpus_per_worker, seconds
        self._gpu_seconds = gpu_hours * 3600

    def told(self, trial: Trial) -> None:
        """Count a result."""
        self._gpu_seconds += gpu_seconds_of(trial, self._gpus)

    def reached(self, works: int, items: tuple[int, int] | None = None) -> LimitReached | None:
        """The limit that forbids to ask for one more candidate, or None.

        Args:
            works: how many different evaluations were asked for, finished or not.
            items: where candidates are not all scored on all items, the items scored, with the most that those in
                flight may take, and the most that one more may take.
        """
        most = self.budget
        spent, one_more = items or (works * self._items, self._items)
        if most.item_evaluations is not None and spent + one_more > most.item_evaluations:
            return LimitReached("item_evaluations", float(spent))
        if most.gpu_hours is not None and self._gpu_seconds >= most.gpu_hours * 3600:
            return LimitReached("gpu_hours", self._gpu_seconds / 3600)
        if most.wall_clock is not None and (seconds := self._seconds()) >= most.wall_clock:
            return LimitReached("wall_clock", seconds)
        return None


def refuse_useless(budget: Budget, used: Used, ended: bool, items: int = 1) -> None:
    """Raise `UserError` when a changed budget allows no more than was used already.

    Args:
        items: search items of a candidate.
        ended: whether the search was over: then there must be room for one more candidate.
    """
    if budget.candidates is not None:
        asked = used.candidates
        if budget.candidates < asked + ended:
            raise UserError(
                f"--budget {budget.candidates}: the run has asked for {asked} candidates already; "
                f"give at least {asked + ended}"
            )
    spent: dict[str, tuple[float | None, float, str]] = {
        "item-evaluations": (budget.item_evaluations, used.item_evaluations, f"{used.item_evaluations:,}"),
        "gpu-hours": (budget.gpu_hours, used.gpu_hours, f"{used.gpu_hours:.4g}"),
        "wall-clock": (budget.wall_clock, used.wall_clock, duration(round(used.wall_clock, 1))),
    }
    for name, (allowed, amount, said) in spent.items():
        more = items if ended and name == "item-evaluations" else 0
        if allowed is None or (allowed > amount and allowed >= amount + more):
            continue
        raise UserError(
            f"the run has used {said} of --{name} already, and its limit would be "
            f"{duration(allowed) if name == 'wall-clock' else f'{allowed:,.10g}'}; "
            f"give {f'at least {amount + more:,}' if more else 'more'} with --{name}, or `none`"
        )


def why_ended(asked: int, reached: LimitReached | None, budget: Budget) -> str:
    """What ended a search, in a sentence for people.

    Args:
        asked: candidates in all.
        reached: see `limit_in_force`.
    """
    of = f"{asked} candidates" if budget.candidates is None else f"{asked} of {budget.candidates} candidates"
    if reached is None:
        if budget.candidates is None:
            return f"The search ended with generation 0: {asked} candidates."
        return f"The search ended with its budget of {budget.candidates} candidates."
    if reached.limit == "wall_clock":
        return f"The search ended by its limit of wall-clock: {duration(round(reached.used, 1))}, {of}."
    if reached.limit == "gpu_hours":
        return f"The search ended by its limit of GPU-hours: {reached.used:.4g}, {of}."
    return f"The search ended by its limit of item-evaluations: {int(reached.used):,}, {of}."
