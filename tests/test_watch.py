"""`meiosis status --watch` and what a run folder tells: from another process, while a driver works and after."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_line import START, Ended, end, meiosis, short, spawn, wait_until, write_config
from family import config_of

from search.run_log import last_events
from search.store.events import Trial
from search.store.history import History
from search.store.run_folder import RunFolder
from search.utilisation import together, worker_uses

SLOW = "import time\ndef score(model):\n    time.sleep(0.3)\n    return 1.0\n"


@pytest.fixture(scope="module")
def results(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run, `done`."""
    folder = tmp_path_factory.mktemp("watch")
    config = write_config(short(config_of(family, folder / "runs")), folder)
    ended = meiosis("search", config, "--run", "done")
    assert ended.status == 0, ended.err
    return folder / "runs"


def test_the_history_tells_when_where_and_how_much_and_the_shares_follow(results: Path) -> None:
    with History.open(results / "done" / "history", writable=False) as history:
        trials = [event for event in history if isinstance(event, Trial)]
    (use,) = worker_uses(trials)
    busy = sum(trial.merge_seconds + trial.evaluate_seconds for trial in trials)
    assert use.merge_seconds + use.evaluate_seconds == pytest.approx(busy)
    evaluated = [trial for trial in trials if trial.worker]
    assert use.trials == len(evaluated)
    for trial in evaluated:
        assert trial.node
        assert 0 < trial.started_at < trial.recorded_at
        assert trial.queue_seconds >= 0
    assert use.bytes_read == sum(trial.bytes_read for trial in trials) > 0
    assert use.busy is not None
    assert 0 < use.busy <= 1


def test_shares_are_of_the_time_from_the_first_trial_to_the_last() -> None:
    def trial(candidate: int, worker: str, started: float, seconds: float) -> Trial:
        half = seconds / 2
        fields = {"merge_seconds": half, "evaluate_seconds": half, "bytes_read": 10, "node": "n"}
        return Trial(candidate, "search", worker=worker, started_at=started, **fields)  # type: ignore[arg-type]

    trials = [
        trial(0, "worker-10/1", 100, 4),
        trial(1, "worker-10/1", 106, 4),
        trial(2, "worker-9/1", 100, 10),
        trial(3, "worker-9/1", 110, 10),
        Trial(4, "search"),  # a copy: nobody's work
    ]
    nine, ten = worker_uses(trials)
    assert (nine.worker, nine.busy, ten.worker, ten.busy) == ("worker-9/1", 1.0, "worker-10/1", 0.8)
    all_ = together([nine, ten])
    assert (all_.trials, all_.bytes_read, all_.span_seconds, all_.busy) == (4, 40, 30.0, pytest.approx(28 / 30))
    assert [use.worker for use in worker_uses(trials, since=105)] == ["worker-9/1", "worker-10/1"]
    (old,) = worker_uses([Trial(0, "search", worker="w", evaluate_seconds=3.0)])
    assert (old.busy, old.span_seconds) == (None, 0.0)


def test_status_and_report_show_what_workers_did(results: Path) -> None:
    shown = meiosis("status", "done", "--results", results).out
    report = (results / "done" / "report.md").read_text()
    for text in ("busy", "merge s", "evaluate s", "read GB", f"local/{os.getpid()}"):
        assert text in shown
        assert text in report
    found = meiosis("status", "done", "--results", results, "--json").json
    assert found["use"]["trials"] == sum(use["trials"] for use in found["uses"])
    assert 0 < found["use"]["busy"] <= 1


def test_the_log_of_a_run_tells_it_from_start_to_end(results: Path) -> None:
    events = last_events(results / "done" / "log.jsonl")
    names = [event["event"] for event in events]
    assert names.index("config_checked") < names.index("started") < names.index("asked")
    assert names[-1] == "ended"
    assert events[-1]["how"] == "finished"
    assert names.count("asked") == 8
    assert {"trial", "progress", "message"} <= set(names)
    trial = next(event for event in events if event["event"] == "trial")
    assert {"candidate", "worker", "node", "merge_seconds", "evaluate_seconds", "bytes_read"} <= set(trial)


def test_a_log_that_cannot_be_written_costs_a_line_and_not_the_run(family: Path, tmp_path: Path) -> None:
    config = write_config(short(config_of(family, tmp_path / "runs"), budget=6), tmp_path)
    taken = "import search.store.run_folder as r; r.RunFolder.events_log = property(lambda run: run.path)\n"
    ended = end(spawn("search", config, "--run", "x", code=taken + START))
    assert ended.status == 0, ended.err
    assert ended.err.count("the run goes on without that log") == 1


def test_the_watch_of_a_finished_run_is_one_line_and_ends(results: Path) -> None:
    ended = end(spawn("status", "done", "--watch", "--results", results))
    assert (ended.status, ended.err) == (0, "")
    (line,) = ended.out.splitlines()
    assert line.startswith("done: finished, 8/8 candidates, best ")
    as_json = end(spawn("status", "done", "--watch", "--json", "--results", results))
    assert [json.loads(line)["state"] for line in as_json.out.splitlines()] == ["finished"]


def test_watch_without_a_run_says_which_there_are(results: Path) -> None:
    ended = meiosis("status", "--watch", "--results", results)
    assert (ended.status, ended.out) == (2, "")
    assert "--watch needs the name of a run" in ended.err
    assert "done" in ended.err


def on_terminal(*arguments: object) -> tuple[subprocess.Popen[bytes], list[bytes]]:
    """A command on a terminal of its own; what it draws comes into the list."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", "COLUMNS": "160"},
    )
    os.close(theirs)
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 65536):
                drawn.append(data)

    threading.Thread(target=read, daemon=True).start()
    return process, drawn


def test_watches_follow_a_run_at_work_and_end_with_it_or_with_ctrl_c(family: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    config = short(config_of(family, tmp_path / "runs"), budget=14)
    config["evaluators"]["slow"] = {"use": "python", "function": str(tmp_path / "slow.py:score")}
    driver = spawn("search", write_config(config, tmp_path), "--run", "live")
    folder = RunFolder(tmp_path / "runs" / "live")
    wait_until(lambda: folder.history.exists() and len(folder.events()) > 2, driver)
    watching = ["status", "live", "--watch", "--every", 0.2, "--results", tmp_path / "runs"]
    piped = spawn(*watching)
    terminal, drawn = on_terminal(*watching)
    until = time.monotonic() + 120
    while b"Rate:" not in b"".join(drawn) and time.monotonic() < until:
        time.sleep(0.1)
    assert driver.poll() is None, "the search was over before it could be watched"
    os.kill(terminal.pid, signal.SIGINT)
    assert terminal.wait(60) == 0
    assert driver.poll() is None or driver.returncode == 0
    picture = b"".join(drawn).decode()
    for text in ("Run live: running", "of 14 candidates", "Rate:", "left", "evaluate s", "Ctrl-C ends this view"):
        assert text in picture
    assert "Traceback" not in picture
    done, watched = end(driver), end(piped)
    assert done.status == 0, done.err
    assert (watched.status, watched.err) == (0, "")
    lines = watched.out.splitlines()
    assert len(lines) > 3
    assert len(set(lines)) == len(lines)
    assert "live: running, " in lines[0]
    assert "per hour" in watched.out
    assert lines[-1].startswith("live: finished, 14/14 candidates, best ")


def test_a_stopped_run_is_watched_on_until_ctrl_c(results: Path, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(results / "done", tmp_path / "stopped"))
    shutil.rmtree(run / "best")
    process = spawn("status", run, "--watch", "--every", 0.2)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("stopped: stopped, 8/8 candidates")
    process.send_signal(signal.SIGINT)
    ended: Ended = end(process)
    assert (ended.status, ended.out, ended.err) == (0, "", "")
