"""The driver in a folder, until it ends or dies, for tests of what its history is then."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable
from pathlib import Path

from search.budget import Budget, Spending
from search.driver import Driver, Limits
from search.pool import Pool
from search.population import Population
from search.progress import Progress
from search.store.events import Event, Extended
from search.store.history import History
from search.store.spool import Spool


class Stop(Exception):  # noqa: N818 - stands for the end of the process
    """The driver dies here."""


def search_in(
    folder: Path,
    pool: Pool,
    population: Population,
    limits: Limits,
    *,
    spending: Spending | None = None,
    extended_to: Budget | None = None,
    stop_after: int | None = None,
    selected: Container[int] | None = None,
) -> list[Event]:
    """Search until a limit, or until `stop_after` more events are recorded; all events of the history.

    Args:
        extended_to: a larger budget that is noted first.
        selected: candidates that are scored on the select items after the search.
    """
    with History.open(folder / "history", events_per_segment=30) as history:
        if extended_to is not None:
            history.append(Extended(extended_to.to_json()))
        before = len(history)

        def watch(state: Progress) -> None:
            if stop_after is not None and len(history) - before >= stop_after:
                raise Stop

        driver = Driver(population, history, Spool(folder / "spool"), lambda: pool, limits, watch, spending=spending)
        with contextlib.suppress(Stop):
            driver.search()
            if selected is not None:
                driver.score([c for c in driver.population.candidates if c.id in selected], "select")
        return history.events()


def content(events: Iterable[Event]) -> list[object]:
    """What of a history may not depend on the workers or on stops."""
    return [event.deterministic() for event in events]
