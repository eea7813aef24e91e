"""A search whose workers, nodes and driver are killed at random: `benchmarks/chaos.py`, the short form."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from landscape import Shuffled, population
from packages import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from chaos_run.monkey import SHARES, deal, moments
from chaos_run.verify import faults, read_events

from search.driver import Driver, Limits
from search.store.events import Ask, End, Event, Trial
from search.store.history import History
from search.store.spool import Spool

KILLS = 12


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_search_killed_a_dozen_times_has_the_history_and_the_model_of_one_left_alone(
    family: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    runs, out = tmp_path / "runs", tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", str(KILLS), "--budget", "48"]
    places = ["--family", str(family), "--folder", str(runs), "--out", str(out)]
    done = subprocess.run(
        [*command, "--seconds", "0.7", "--workers", "2", "--cpus", "1", *places],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kills = pq.read_table(out / "chaos.parquet").to_pylist()
    assert len(kills) == KILLS
    # Two workers at once may have been one, where no two were in a trial.
    assert {kill["kind"] for kill in kills} >= set(SHARES) - {"two workers"}
    assert "every candidate had been asked for once" in (out / "chaos.md").read_text()


def test_every_kind_of_kill_is_dealt_in_its_share_and_the_seed_decides_the_order() -> None:
    for kills in (6, 12, 30, 200):
        dealt = deal(kills, random.Random(0))
        assert len(dealt) == kills
        assert set(dealt) == set(SHARES)
        assert dealt == deal(kills, random.Random(0))
    assert Counter(deal(200, random.Random(1)))["driver"] == 200 * SHARES["driver"]
    when = moments(200, 800, 830, random.Random(0))
    assert when == sorted(when)
    assert sum(moment >= 800 for moment in when) == 6
    assert when[-1] < 830


def write_run(run: Path, events: Sequence[Event], weights: bytes = b"weights") -> Path:
    """A run folder with these events and an exported model."""
    with History.open(run / "history", events_per_segment=30) as history:
        history.append_all(events)
    (run / "best").mkdir()
    (run / "best" / "model.safetensors").write_bytes(weights)
    return run


BUDGET = 24


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """The events of a search in which every eleventh candidate fails, as if it had not."""
    folder: Path = tmp_path_factory.mktemp("recorded")
    with History.open(folder / "history") as history:
        pool = Shuffled(2, 0)
        Driver(population(BUDGET), history, Spool(folder / "spool"), lambda: pool, Limits(BUDGET, 4)).search()
        events = history.events()
    return [*(replace(e, failure_kind=None) if isinstance(e, Trial) else e for e in events), End(3, "{}")]


def trial_at(events: list[Event], candidate: int) -> int:
    return next(n for n, e in enumerate(events) if isinstance(e, Trial) and e.candidate == candidate)


def lose(events: list[Event]) -> None:
    del events[trial_at(events, 7)]


def tell_twice(events: list[Event]) -> None:
    events.insert(-1, events[trial_at(events, 7)])


def swap(events: list[Event]) -> None:
    first, second = trial_at(events, 7), trial_at(events, 8)
    events[first], events[second] = events[second], events[first]


def fail(events: list[Event]) -> None:
    place = trial_at(events, 7)
    trial = events[place]
    assert isinstance(trial, Trial)
    events[place] = replace(trial, failure_kind="crash", failure_message="took down 2 workers")


def nudge(events: list[Event]) -> None:
    place = trial_at(events, 7)
    trial = events[place]
    assert isinstance(trial, Trial)
    assert trial.loss is not None
    events[place] = replace(trial, loss=math.nextafter(trial.loss, 1.0))


def forget_an_ask(events: list[Event]) -> None:
    events.pop(next(n for n, e in enumerate(events) if isinstance(e, Ask) and e.candidate == 7))


def stop_early(events: list[Event]) -> None:
    events.pop()


DAMAGES: dict[Callable[[list[Event]], None], str] = {
    lose: "trials that were lost: [7]",
    tell_twice: "told twice: [(7, 'search')]",
    swap: "results were not told in the order",
    fail: "candidate 7 was declared failed: took down 2 workers",
    nudge: "the history is not that of the undisturbed run",
    forget_an_ask: "were not asked for once each",
    stop_early: "the run does not end once",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_went_wrong_in_a_disturbed_run_is_found(
    damage: Callable[[list[Event]], None], recorded: list[Event], tmp_path: Path
) -> None:
    whole, damaged = write_run(tmp_path / "whole", recorded), list(recorded)
    damage(damaged)
    found = faults(write_run(tmp_path / "damaged", damaged), whole, BUDGET)
    assert any(DAMAGES[damage] in line for line in found), found
    assert any("the history is not that of the undisturbed run" in line for line in found)


def test_runs_that_differ_in_circumstances_only_have_no_faults_until_the_model_differs(
    recorded: list[Event], tmp_path: Path
) -> None:
    whole = write_run(tmp_path / "whole", recorded)
    other = [replace(e, worker="elsewhere", attempts=2, node="x") if isinstance(e, Trial) else e for e in recorded]
    same = write_run(tmp_path / "same", other)
    assert len(read_events(same)) == len(recorded)
    assert faults(same, whole, BUDGET) == []
    (same / "best" / "model.safetensors").write_bytes(b"other weights")
    assert faults(same, whole, BUDGET) == ["the exported model is not that of the undisturbed run"]
