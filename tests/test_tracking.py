"""Trackers get what happens, and whatever they do the run goes on."""

from __future__ import annotations

import importlib.util
import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import meiosis, short, write_config
from family import config_of

from search.config import TrackerConfig
from search.store.events import Ask, Trial
from search.tracker import TrackedRun
from search.tracking import QUEUED_TRIALS, Tracking

NOTES = "odd_trackers:Notes"


def notes(folder: Path, name: str = "Notes") -> list[dict[str, Any]]:
    text = (folder / "tracking" / f"odd_trackers.{name}" / "notes.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def tracking(folder: Path, *entries: dict[str, Any] | str, said: list[str] | None = None) -> Tracking:
    configs = [TrackerConfig.model_validate(entry) for entry in entries]
    say = (said if said is not None else []).append
    return Tracking(configs, name="run", folder=folder / "tracking", config={"seed": 0}, complain=say)


def search_with(family: Path, folder: Path, entries: list[Any], *more: object) -> Any:
    config = short(config_of(family, folder / "runs")) | {"tracking": entries}
    return meiosis("search", write_config(config, folder), "--run", "t", *more)


def test_a_tracker_gets_every_result_with_its_figures_and_a_resume_goes_on_with_it(
    family: Path, tmp_path: Path
) -> None:
    ended = search_with(family, tmp_path, [{NOTES: {"every": 2}}])
    assert ended.status == 0, ended.err
    run = tmp_path / "runs" / "t"
    found = notes(run)
    assert [note["what"] for note in found[:1] + found[-1:]] == ["begin", "close"]
    assert (found[-1]["how"], found[-1]["thread"]) == ("finished", f"tracking-{NOTES}")
    searched = [note for note in found if note["what"] == "trial" and note["items"] == "search"]
    assert [note["candidate"] for note in searched] == [0, 2, 4, 6]
    best = [note["figures"]["best_loss"] for note in searched]
    assert best == sorted(best, reverse=True)
    assert searched[0]["origin"].startswith("parent:")
    assert {"loss", "merge_seconds", "evaluate_seconds", "python.nll"} <= set(searched[0]["figures"])
    assert {note["items"] for note in found if note["what"] == "trial"} == {"search", "select", "certify"}
    assert meiosis("resume", "t", "--results", tmp_path / "runs").status == 0
    again = notes(run)
    assert [note["what"] for note in again[len(found) :]] == ["begin", "close"]
    assert again[-2]["id"] == found[0]["id"]


def test_trackers_that_are_absent_or_down_cost_a_line_each_and_change_no_result(family: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = search_with(family, tmp_path / "a", [])
    odd = search_with(
        family, tmp_path / "b", ["odd_trackers:Absent", "odd_trackers:Down", "odd_trackers:Leaves", NOTES]
    )
    assert (plain.status, odd.status) == (0, 0), odd.err
    said = [line for line in odd.err.splitlines() if line.startswith("tracking")]
    assert len(said) == 3
    assert any("Absent is not installed, the run goes on" in line and "pip install a-lib" in line for line in said)
    assert any("Down gave up" in line and "ConnectionError: the server is down" in line for line in said)
    assert any("Leaves gave up" in line and "SystemExit: 3" in line for line in said)
    assert notes(tmp_path / "b" / "runs" / "t")[-1]["how"] == "finished"
    tables = [ended.out.partition("Exported model")[0] for ended in (plain, odd)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"),
        ({"tensorboard": {"foldr": "x"}}, "unknown key; did you mean 'folder'?"),
        ({"mlflow": {"experiment": ""}}, "at least 1 character"),
        ("odd_trackers:NoTracker", "is not a tracker"),
        (3, "expected the name of a tracker"),
    ],
)
def test_a_mistake_in_tracking_is_refused_with_its_line(
    entry: object, expected: str, family: Path, tmp_path: Path
) -> None:
    ended = search_with(family, tmp_path, ["wandb", entry])
    assert ended.status == 2
    (line,) = ended.err.splitlines()
    assert "config.yaml:" in line
    assert "tracking.1" in line
    assert expected in line


def test_a_tracker_that_hangs_delays_neither_the_driver_nor_for_long_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    started = time.monotonic()
    tracked = tracking(tmp_path, "odd_trackers:Hangs", said=said)
    for candidate in range(QUEUED_TRIALS + 50):
        tracked.recorded(Trial(candidate, "search", loss=1.0))
    assert time.monotonic() - started < 30
    tracked.close("finished", seconds=0.2)
    assert said == [f"tracking: odd_trackers:Hangs does not answer; {QUEUED_TRIALS + 50} results did not reach it"]


def test_failures_and_numbers_that_are_none_reach_a_tracker_as_such(tmp_path: Path) -> None:
    tracked = tracking(tmp_path, NOTES)
    tracked.know([Trial(0, "search", loss=0.5)], {0: "base", 1: "baseline:soup"})
    tracked.recorded(Ask(2, "searched", (0.5,), "hash"))
    tracked.recorded(Trial(1, "search", loss=9.0, feasible=False, failure_kind="timeout", failure_message="slow"))
    tracked.recorded(Trial(2, "search", metrics={"a.b": math.inf, "a.c": 1.0}, loss=0.7))
    tracked.close("interrupted")
    failed, fine = (note for note in notes(tmp_path) if note["what"] == "trial")
    assert (failed["failure"], failed["origin"]) == ("timeout: slow", "baseline:soup")
    assert "loss" not in failed["figures"]
    assert (fine["origin"], fine["figures"]["best_loss"]) == ("searched", 0.5)
    assert "a.b" not in fine["figures"]
    assert fine["figures"]["a.c"] == 1.0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tracking-odd_trackers:Notes")]


def test_a_tracked_run_has_one_identifier_also_after_a_crash_while_it_was_written(tmp_path: Path) -> None:
    run = TrackedRun("run", tmp_path, {})
    assert [run.remembered(lambda: 5), run.remembered(lambda: 6)] == ["5", "5"]
    (tmp_path / "id").write_text("")
    assert run.remembered(lambda: 7) == "7"


def trials() -> list[Trial]:
    return [Trial(n, "search", metrics={"a.nll": 2.0 - n}, loss=2.0 - n, recorded_at=1e9 + n) for n in range(3)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_gets_scalars_by_candidate(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    tracked = tracking(tmp_path, "tensorboard", {"name": "tensorboard", "options": {"folder": str(tmp_path / "b")}})
    for trial in trials():
        tracked.recorded(trial)
    tracked.close("finished", seconds=60)
    assert said == []
    for folder in (tmp_path / "tracking" / "tensorboard", tmp_path / "b" / "run"):
        events = EventAccumulator(str(folder)).Reload()
        found = [(event.step, event.value, event.wall_time) for event in events.Scalars("search/a.nll")]
        assert found == [(n, 2.0 - n, 1e9 + n) for n in range(3)]
        assert [event.value for event in events.Scalars("search/best_loss")] == [2.0, 1.0, 0.0]


@pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in ("mlflow", "sqlalchemy", "alembic")),
    reason="needs mlflow, sqlalchemy and alembic: its folders of files are no more, and a server is elsewhere",
)
def test_mlflow_gets_one_run_that_a_resume_goes_on_with(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    entry = {"mlflow": {"uri": uri, "experiment": "merges"}}
    said: list[str] = []
    for how, some in (("interrupted", trials()[:2]), ("finished", trials()[2:])):
        tracked = tracking(tmp_path, entry, said=said)
        for trial in some:
            tracked.recorded(trial)
        tracked.close(how, seconds=120)
    assert said == []
    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("merges").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "search/a.nll")
    assert [(metric.step, metric.value) for metric in history] == [(0, 2.0), (1, 1.0), (2, 0.0)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_offline_takes_the_results_and_leaves_a_file_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    said: list[str] = []
    tracked = tracking(tmp_path, {"wandb": {"mode": "offline"}}, said=said)
    for trial in trials():
        tracked.recorded(trial)
    tracked.close("finished", seconds=120)
    assert said == []
    assert list((tmp_path / "tracking" / "wandb").rglob("*.wandb"))
