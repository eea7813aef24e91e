"""Real processes, really killed: what is recorded stays, and the history ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from family import config_of

from search.store.events import Event, Trial
from search.store.history import History, digest

BUDGET = 30

GATE = """
import os, pathlib, time

HERE = pathlib.Path(__file__).parent

def score(model):
    value = float(sum(weight.double().abs().sum() for weight in model.parameters()))
    if (HERE / "closed").exists():
        inside = HERE / f"inside-{os.getpid()}"
        inside.with_suffix(".part").write_text(repr(value))
        inside.with_suffix(".part").rename(inside)
        while (HERE / "closed").exists():
            time.sleep(0.02)
        inside.unlink()
    return value
"""
"""An evaluator's function that holds a trial as long as there is a file `closed`. Its score tells which merge it is."""


def meiosis(*arguments: str, cwd: Path, wait: bool = True, **environment: str) -> subprocess.Popen[str]:
    """A real `meiosis` process in a session of its own; with `wait` it must succeed."""
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("meiosis")), *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )
    if wait:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    return process


def write_config(family: Path, folder: Path, **cluster: Any) -> Path:
    config = config_of(family, folder / "results")
    config["search"] |= {"budget": BUDGET, "window": 4}
    config["cluster"] |= cluster
    (folder / "gate.py").write_text(GATE)
    config["evaluators"]["gate"] = {"use": "python", "function": "gate.py:score"}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def events(run: Path) -> list[Event]:
    with History.open(run / "history", writable=False) as history:
        return history.events()


def log_size(run: Path) -> int:
    return sum(path.stat().st_size for path in (run / "history").glob("*.arrows"))


def kill_when(process: subprocess.Popen[str], run: Path, size: int) -> bool:
    """kill -9 the process group once the log is that large; False if the process was done before."""
    deadline = time.monotonic() + 240
    while log_size(run) < size:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the search does not get on"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


@pytest.fixture(scope="module")
def reference(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    meiosis("search", str(write_config(family, folder)), "--run", "one", cwd=folder)
    return folder / "results" / "one"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_driver_killed_at_random_moments_resumes_to_the_same_history(
    seed: int, reference: Path, family: Path, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    path = write_config(family, tmp_path)
    run = tmp_path / "results" / "one"
    whole = log_size(reference)
    moments = sorted(chance.sample(range(1, whole), 3))
    process = meiosis("search", str(path), "--run", "one", cwd=tmp_path, wait=False)
    killed = 0
    for moment in moments:
        if not kill_when(process, run, moment):
            break
        killed += 1
        recorded = [event.deterministic() for event in events(run)]
        expected = [event.deterministic() for event in events(reference)]
        assert recorded == expected[: len(recorded)]
        process = meiosis("resume", "one", cwd=tmp_path, wait=False)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert killed > 0
    assert digest(events(run)) == digest(events(reference))
    assert (run / "best" / "model.safetensors").read_bytes() == (reference / "best" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_log_torn_in_the_middle_of_a_write_resumes_to_the_same_history(
    reference: Path, family: Path, tmp_path: Path
) -> None:
    path = write_config(family, tmp_path)
    run = tmp_path / "results" / "one"
    process = meiosis("search", str(path), "--run", "one", cwd=tmp_path, wait=False)
    assert kill_when(process, run, log_size(reference) // 2)
    log = next((run / "history").glob("*.arrows"))
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 333)
    second = meiosis("resume", "one", cwd=tmp_path, wait=False)
    _, stderr = second.communicate(timeout=300)
    assert second.returncode == 0, stderr
    assert "torn" in stderr
    assert digest(events(run)) == digest(events(reference))


def processes(**environment: str) -> list[int]:
    """Processes that were started with these variables, or by such processes."""
    wanted = {f"{name}={value}".encode() for name, value in environment.items()}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.002)


def held(folder: Path) -> dict[int, float]:
    """Process -> score of the trial that is held in it."""
    return {int(path.name.partition("-")[2]): float(path.read_text()) for path in folder.glob("inside-*[0-9]")}


class Interrupted(NamedTuple):
    """A search that Ctrl-C ended: its status, what it wrote, and the processes that it left."""

    status: int
    out: str
    err: str
    recorded: list[Event]
    left: list[int]


class Disturbed(NamedTuple):
    """A run that was interrupted, then killed with its driver, and then lost a worker in mid-trial."""

    run: Path
    interrupted: Interrupted
    lost: float


def still_there(folder: Path) -> list[int]:
    """Processes of a search in `folder` that are not gone after some time."""
    deadline = time.monotonic() + 30
    while (left := processes(MEIOSIS_TEST=str(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.fixture(scope="module")
def disturbed(reference: Path, family: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """One search on 2, then 4, then 2 workers, ended by Ctrl-C, by kill -9 of the driver and by its end."""
    folder = tmp_path_factory.mktemp("ray")
    path = write_config(family, folder, pool="ray")
    (folder / "evaluators").mkdir()  # a folder of the user with the name of a package of ours
    (folder / "evaluators" / "__init__.py").write_text("raise ImportError('the wrong evaluators')")
    run, closed, whole = folder / "results" / "one", folder / "closed", log_size(reference)

    first = meiosis("search", str(path), "--run", "one", cwd=folder, wait=False, MEIOSIS_TEST=str(folder))
    wait_until(lambda: log_size(run) > whole // 4, first)
    closed.touch()
    wait_until(lambda: len(held(folder)) == 2, first)
    os.killpg(first.pid, signal.SIGINT)  # what a terminal does: Ray's processes get it as well
    out, err = first.communicate(timeout=60)
    interrupted = Interrupted(first.returncode, out, err, events(run), still_there(folder))
    closed.unlink()

    second = meiosis("resume", "one", "--workers", "4", cwd=folder, wait=False, MEIOSIS_TEST=str(folder))
    assert kill_when(second, run, whole // 2)
    # Workers outlive their driver for a moment: they must not be taken for those of the next one.
    assert still_there(folder) == []

    for mark in folder.glob("inside-*"):
        mark.unlink()
    closed.touch()
    third = meiosis("resume", "one", "--workers", "2", cwd=folder, wait=False)
    wait_until(lambda: len(held(folder)) == 2, third)
    pid, lost = min(held(folder).items())
    os.kill(pid, signal.SIGKILL)
    closed.unlink()
    _, err = third.communicate(timeout=240)
    assert third.returncode == 0, err
    return Disturbed(run, interrupted, lost)


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_on_ray_saves_what_is_recorded_and_leaves_no_process(disturbed: Disturbed, reference: Path) -> None:
    ended = disturbed.interrupted
    assert (ended.status, ended.out) == (130, "")
    assert f"meiosis resume {disturbed.run}" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    expected = [event.deterministic() for event in events(reference)]
    assert [event.deterministic() for event in ended.recorded] == expected[: len(ended.recorded)]
    assert ended.left == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_trial_whose_worker_is_killed_is_run_again_and_no_other(disturbed: Disturbed) -> None:
    trials = [event for event in events(disturbed.run) if isinstance(event, Trial)]
    assert [(t.attempts, t.metrics["gate.score"], t.failure_kind) for t in trials if t.attempts > 1] == [
        (2, disturbed.lost, None)
    ]


@pytest.mark.slow
@pytest.mark.ray
def test_interrupt_killed_driver_killed_worker_and_other_numbers_of_workers_change_nothing(
    disturbed: Disturbed, reference: Path
) -> None:
    ours, theirs = events(disturbed.run), events(reference)
    assert [event.deterministic() for event in ours] == [event.deterministic() for event in theirs]
    assert digest(ours) == digest(theirs)
    keys = [(event.candidate, event.items) for event in ours if isinstance(event, Trial)]
    assert len(keys) == len(set(keys))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, 4])
def test_a_search_on_one_or_four_ray_workers_has_the_history_of_one_in_this_process(
    workers: int, reference: Path, family: Path, tmp_path: Path
) -> None:
    path = write_config(family, tmp_path, pool="ray", workers=workers)
    node = tmp_path / "node"
    node.mkdir()
    meiosis("search", str(path), "--run", "one", cwd=tmp_path, TMPDIR=str(node))
    run = tmp_path / "results" / "one"
    assert digest(events(run)) == digest(events(reference))
    assert {event.attempts for event in events(run) if isinstance(event, Trial)} <= {0, 1}
    # What operators prepared is shared on the node, and no part of the run.
    assert {path.name for path in (run / "workers").iterdir()} == {"ray.log", "nodes.json"}
    assert list(node.glob("meiosis-*/prepared/*.safetensors"))
