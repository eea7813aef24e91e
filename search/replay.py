"""Replay of a history in ordered commit: by the rule that made it, not by the order of its records.

In ordered commit, seed and window decide when a candidate is asked: as soon as the window has room, before
the next result is told. A budget that runs out interrupts that: the last results are told without a new ask
between them. When the run is extended, the optimiser must be asked where it would have been asked under the
larger budget, or what it proposes would depend on how often the run was extended. So the new candidates are
asked between results that are recorded already, and this replay puts them there again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from search.errors import HistoryError
from search.population import Population
from search.store.events import Ask, Event, Trial
from search.trials import ask_event, usable_metrics


def replay_ordered(
    events: Sequence[Event],
    population: Population,
    window: int,
    may_ask: Callable[[], bool] = lambda: False,
    told: Callable[[Trial], None] = lambda _: None,
) -> list[Trial]:
    """Bring a fresh population to where a history in ordered commit ends.

    Args:
        window: candidates in flight at once.
        may_ask: whether the budget has room for a candidate beyond the recorded ones.
        told: is called after every result that was told.

    Returns:
        Recorded results that are not told yet: a new candidate is to be asked before the first of them.

    Raises:
        HistoryError: the population asks for something else than what is recorded.
    """
    asks = deque(event for event in events if isinstance(event, Ask))
    results = deque(event for event in events if isinstance(event, Trial) and event.items == "search")
    in_flight = 0
    while True:
        while asks and in_flight < window:
            candidate = population.ask()
            if candidate is None:
                break
            check_ask(asks.popleft(), ask_event(candidate))
            in_flight += 1
        if not results or (not asks and in_flight < window and may_ask()):
            break
        trial = results.popleft()
        population.tell(trial.candidate, usable_metrics(trial), trial.scores, censored=trial.censored)
        told(trial)
        in_flight -= 1
    if asks:
        check_ask(asks[0], None)
    return list(results)


def check_ask(recorded: Ask, now: Ask | None) -> None:
    """Raise `HistoryError` unless the population asks for what is recorded."""
    if recorded != now:
        raise HistoryError(
            f"the history does not replay: candidate {recorded.candidate} was asked differently than it would "
            "be now; resume with the versions and on the kind of processor that run.yaml names"
        )
