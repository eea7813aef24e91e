"""What the log of a run tells about the time until its first evaluation."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, meiosis, write_config
from family import config_of

sys.path.append(str(ROOT / "benchmarks"))

from first_evaluation import Case, search_seconds
from starting.timeline import PARTS, parts_of, read_log

from search.run_log import before_the_log, emit, log_to, process_started_at

pytestmark = pytest.mark.timeout(300)


def small(family: Path, folder: Path, **cluster: Any) -> Path:
    config = config_of(family, folder / "results")
    config["search"] |= {"budget": len(config["models"]["sources"]) + 2, "baselines": []}
    config["cluster"] |= cluster
    return write_config(config, folder)


def test_the_log_tells_every_step_until_the_first_evaluation_and_they_add_up(family: Path, tmp_path: Path) -> None:
    ended = meiosis("search", small(family, tmp_path, pool="local"), "--run", "told")
    assert ended.status == 0, ended.err
    events = read_log(tmp_path / "results" / "told" / "log.jsonl")
    steps = ["command", "config_read", "config_checked", "models_hashed", "started", "asked", "worker_ready", "trial"]
    first = [next(i for i, event in enumerate(events) if event["event"] == step) for step in steps]
    assert first == sorted(first)
    times = [events[index]["time"] for index in first]
    assert times == sorted(times), "what came before the log has the time at which it happened"
    began = events[0]["process_started_at"]
    assert began == pytest.approx(process_started_at(), abs=0.1)
    parts = parts_of(events, began)
    assert set(parts) == set(PARTS) - {"ray", "process", "hello"}
    assert min(parts.values()) >= 0
    assert min(parts["libraries"], parts["models"], parts["evaluators"], parts["evaluate"]) > 0
    trial = next(event for event in events if event["event"] == "trial")
    assert sum(parts.values()) == pytest.approx(_unix(trial["time"]) - began, abs=1e-6)


@pytest.mark.ray
def test_on_ray_the_parts_add_up_to_all_the_time_of_the_command_as_well(family: Path, tmp_path: Path) -> None:
    row = search_seconds(Case("own Ray", 1), small(family, tmp_path, pool="ray", workers=1), ROOT, None)
    parts = row["parts"]
    assert set(parts) == set(PARTS)
    assert sum(parts.values()) == pytest.approx(row["seconds"], abs=1e-6)
    assert min(parts["ray"], parts["hello"], parts["libraries"], parts["evaluate"]) > 0


def test_what_comes_before_a_log_goes_to_the_first_one_only(tmp_path: Path) -> None:
    with before_the_log():
        emit("early", number=1)
        with log_to(tmp_path / "a.jsonl"):
            emit("late")
        emit("unheard")
        with log_to(tmp_path / "b.jsonl"):
            emit("other")
    with before_the_log():
        emit("given up")
    with log_to(tmp_path / "c.jsonl"):
        emit("alone")
    names = [[event["event"] for event in read_log(tmp_path / f"{name}.jsonl")] for name in "abc"]
    assert names == [["early", "late"], ["other"], ["alone"]]


def test_a_process_knows_when_it_began() -> None:
    before = time.time()
    code = "from search.run_log import process_started_at; print(process_started_at())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert before - 0.1 <= float(told) <= time.time()


def test_the_driver_asks_for_its_workers_before_torch_is_imported(family: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from search.config import load_config
from search.progress import Watcher
from search.run import start
from search.setup import check

def make_pool(*_):
    print([name for name in ("torch", "transformers", "nevergrad") if name in sys.modules])
    raise KeyboardInterrupt

try:
    start(check(load_config(Path({str(small(family, tmp_path))!r}))), make_pool, Watcher(print, print), "asked")
except Exception as error:
    print(type(error).__name__)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-2:] == ["[]", "InterruptedRun"]


def _unix(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()
