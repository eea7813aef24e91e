"""The log for programs: whole lines, bounded, and never the reason that a run ends."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from pathlib import Path

import pytest
from test_history import file_size_limit

from search.run_log import JsonLines, emit, last_events, log_to


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_event_is_one_line_of_json_with_time_and_level(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log_to(log):
        emit("trial", candidate=3, loss=math.nan, why="two\nlines \udcff", worker="w/1")
        emit("worker_lost", "warning", worker="w/1")
    emit("late", candidate=4)
    first, second = lines(log)
    assert first["event"] == "trial"
    assert (first["candidate"], first["loss"], first["level"]) == (3, "nan", "info")
    assert first["why"] == "two\nlines \udcff"
    assert str(first["time"]).endswith("+00:00")
    assert (second["event"], second["level"]) == ("worker_lost", "warning")


def test_what_nobody_listens_to_is_printed_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    emit("worker_lost", "warning", worker="w")
    emit("ended", "error", why="x")
    assert capfd.readouterr() == ("", "")


def test_a_second_driver_appends_and_half_a_line_of_the_first_spoils_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log_to(log):
        emit("started")
    with log.open("ab") as file:
        file.write(b'{"event": "tri')
    with log_to(log):
        emit("started", again=True)
    assert [event["event"] for event in last_events(log)] == ["started", "started"]
    assert last_events(log)[-1]["again"] is True


def test_the_log_is_bounded_and_keeps_the_newest_lines(tmp_path: Path) -> None:
    handler = JsonLines(tmp_path / "log.jsonl", most_bytes=2000)
    logger = logging.getLogger("meiosis.test_bounded")
    logger.propagate = False
    logger.addHandler(handler)
    for number in range(200):
        logger.warning("trial", extra={"meiosis_fields": {"candidate": number}})
    handler.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 2000
    kept = [event["candidate"] for path in (handler.older, handler.path) for event in lines(path)]
    assert kept == list(range(200 - len(kept), 200))
    assert len(kept) > 20


def test_a_disk_that_is_full_costs_lines_and_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    log = tmp_path / "log.jsonl"
    with log_to(log, said.append):
        emit("first")
        with file_size_limit(log.stat().st_size + 10):
            for _ in range(5):
                emit("lost", text="x" * 100)
        emit("last")
    assert [event["event"] for event in lines(log)] == ["first", "last"]
    (line,) = said
    assert "the run goes on without that log" in line


def test_a_log_that_cannot_be_opened_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    with log_to(tmp_path / "no folder" / "log.jsonl", said.append):
        emit("first")
        emit("second")
    (line,) = said
    assert "No such file" in line


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log_to(log):
        threads = [threading.Thread(target=lambda: [emit("x", n=n) for n in range(200)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(lines(log)) == 800


def test_the_end_of_a_long_log_is_read_without_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log_to(log):
        for number in range(3000):
            emit("trial", candidate=number)
    found = last_events(log, most_bytes=4096)
    assert [event["candidate"] for event in found] == list(range(3000 - len(found), 3000))
    assert 20 < len(found) < 100
    assert last_events(Path(os.devnull) / "none") == []
