"""The loop: ordered commit, resume from every point, nothing lost and nothing repeated."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from driving import content, search_in
from hypothesis import given, settings
from hypothesis import strategies as st
from landscape import Shuffled, population

from search.driver import Limits
from search.errors import HistoryError
from search.optimizer import Problem, Vector
from search.store.events import Ask, Event, Trial
from search.store.history import History

BUDGET, WINDOW = 40, 4


def drive(
    folder: Path,
    pool: Shuffled,
    *,
    budget: int = BUDGET,
    window: int = WINDOW,
    ordered: bool = True,
    stop_after: int | None = None,
    normalize: str = "none",
    optimizer: str = "diagonal_cma",
) -> list[Event]:
    """Search in `folder` until the budget, or until `stop_after` more events are recorded."""
    made = population(budget, window, normalize, optimizer)
    limits = Limits(budget, window, ordered)
    return search_in(folder, pool, made, limits, stop_after=stop_after, selected=(3, 5, 9, 12))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The history of a run that nothing disturbed, on one worker."""
    return content(drive(tmp_path_factory.mktemp("whole"), Shuffled(1, 0)))


@pytest.mark.parametrize(("workers", "seed"), [(1, 5), (2, 1), (2, 2), (4, 3), (4, 4), (30, 5)])
def test_the_history_is_the_same_for_any_number_of_workers_and_order_of_arrival(
    workers: int, seed: int, whole: list[object], tmp_path: Path
) -> None:
    assert content(drive(tmp_path, Shuffled(workers, seed))) == whole


def test_every_candidate_is_evaluated_once_and_repeated_recipes_not_at_all(tmp_path: Path) -> None:
    pool = Shuffled(3, 1)
    events = drive(tmp_path, pool)
    searched = [key for key in pool.ran if key[1] == "search"]
    assert len(searched) == len(set(searched))
    asks = {e.candidate: e.recipe_hash for e in events if isinstance(e, Ask)}
    assert len(asks) == BUDGET
    assert len(searched) == len(set(asks.values()))
    trials = [e for e in events if isinstance(e, Trial) and e.items == "search"]
    assert [t.candidate for t in trials] == list(range(BUDGET))


def test_at_most_a_window_of_candidates_is_in_flight(tmp_path: Path) -> None:
    open_ = 0
    largest = 0
    for event in drive(tmp_path, Shuffled(8, 1)):
        open_ += 1 if isinstance(event, Ask) else -1 if isinstance(event, Trial) and event.items == "search" else 0
        largest = max(largest, open_)
    assert largest == WINDOW


@pytest.mark.parametrize("normalize", ["none", "parents"])
def test_a_driver_that_dies_after_any_event_resumes_to_the_same_history(normalize: str, tmp_path: Path) -> None:
    reference = content(drive(tmp_path / "whole", Shuffled(1, 0), normalize=normalize))
    for cut in range(1, len(reference), 1 if normalize == "none" else 7):
        folder = tmp_path / str(cut)
        first = drive(folder, Shuffled(3, cut), stop_after=cut, normalize=normalize)
        assert content(first) == reference[: len(first)]
        assert content(drive(folder, Shuffled(2, cut + 1), normalize=normalize)) == reference
        shutil.rmtree(folder)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 5)), max_size=6), st.integers(0, 1000))
def test_any_sequence_of_deaths_on_any_workers_ends_in_the_same_history(
    whole: list[object], tmp_path_factory: pytest.TempPathFactory, deaths: list[tuple[int, int]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("deaths")
    for step, (events, workers) in enumerate(deaths):
        drive(folder, Shuffled(workers, seed + step), stop_after=events)
    assert content(drive(folder, Shuffled(2, seed))) == whole


def test_a_log_that_is_cut_in_the_middle_of_a_record_resumes_to_the_same_history(
    whole: list[object], tmp_path: Path
) -> None:
    drive(tmp_path / "one", Shuffled(2, 1), stop_after=28)
    log = next((tmp_path / "one" / "history").glob("*.arrows"))
    size = log.stat().st_size
    for cut in range(1, size, size // 25):
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "one", folder)
        torn = folder / "history" / log.name
        with torn.open("r+b") as file:
            file.truncate(cut)
        assert content(drive(folder, Shuffled(2, cut))) == whole, cut
        shutil.rmtree(folder)


def test_what_was_written_with_one_sync_resumes_from_every_record_of_it(tmp_path: Path) -> None:
    """The death of the machine leaves any beginning of a write, also between a result and the ask that followed."""
    pool = Shuffled(3, 2)
    reference = content(drive(tmp_path / "whole", pool, budget=24))
    log = next((tmp_path / "whole" / "history").glob("*.arrows"))
    data = log.read_bytes()
    ends = [at for at in range(len(data)) if data.startswith(b"\xff\xff\xff\xff", at) and at % 8 == 0][1:]
    seen = set()
    for number, end in enumerate(ends):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole" / "history", folder / "history")
        with (folder / "history" / log.name).open("r+b") as file:
            file.truncate(end)
        with History.open(folder / "history", events_per_segment=30) as history:
            seen.add(len(history))
        assert content(drive(folder, Shuffled(2, number), budget=24)) == reference
        shutil.rmtree(folder)
    assert len(seen) >= len(reference) % 30


@pytest.mark.parametrize(("seed", "stop_after"), [(6, 9), (4, 14), (5, 14)])
def test_results_that_came_before_their_turn_survive_the_driver(seed: int, stop_after: int, tmp_path: Path) -> None:
    """With arrival shuffled, some results wait for earlier ones; after a death they are not computed again."""
    first = Shuffled(4, seed)
    events = drive(tmp_path, first, stop_after=stop_after)
    told = {event.candidate for event in events if isinstance(event, Trial)}
    waiting = {candidate for candidate, _ in first.ran} - told
    assert waiting, "the seed must leave a result waiting"
    second = Shuffled(4, seed + 1)
    drive(tmp_path, second)
    assert not waiting & {candidate for candidate, items in second.ran if items == "search"}


def test_arrival_order_resumes_from_what_was_recorded(tmp_path: Path) -> None:
    first = drive(tmp_path, Shuffled(4, 1), ordered=False, stop_after=31)
    events = drive(tmp_path, Shuffled(4, 2), ordered=False)
    assert content(events)[: len(first)] == content(first)
    told = [e.candidate for e in events if isinstance(e, Trial) and e.items == "search"]
    assert sorted(told) == list(range(BUDGET))
    assert told != sorted(told)


def test_a_history_of_another_search_is_refused(tmp_path: Path) -> None:
    drive(tmp_path, Shuffled(1, 0), stop_after=70)
    with pytest.raises(HistoryError, match="does not replay"):
        drive(tmp_path, Shuffled(1, 0), optimizer="random_search")


class Coarse:
    """An optimiser that repeats itself: three points, in turn."""

    def __init__(self, problem: Problem) -> None:
        self._count, self._genes = 0, len(problem.start)

    def suggest(self, point: Vector) -> None: ...

    def ask(self) -> Vector:
        self._count += 1
        return np.full(self._genes, (self._count * self._count % 3) / 4)

    def tell(self, point: Vector, loss: float) -> None: ...


@pytest.mark.parametrize("seed", range(5))
def test_a_recipe_that_is_asked_again_while_its_first_result_waits_does_not_hang(seed: int, tmp_path: Path) -> None:
    first = drive(tmp_path, Shuffled(4, seed), optimizer="test_driver:Coarse", budget=60, stop_after=70)
    pool = Shuffled(4, seed + 1)
    events = drive(tmp_path, pool, optimizer="test_driver:Coarse", budget=60)
    assert content(events)[: len(first)] == content(first)
    assert len([e for e in events if isinstance(e, Trial) and e.items == "search"]) == 60
    assert content(events) == content(
        drive(tmp_path / "one", Shuffled(1, 0), optimizer="test_driver:Coarse", budget=60)
    )
