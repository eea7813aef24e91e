"""Real processes, really killed: what is recorded stays, and the history ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from family import config_of

from search.store.events import Event, Trial
from search.store.history import History, digest

BUDGET = 30


def meiosis(*arguments: str, cwd: Path, wait: bool = True) -> subprocess.Popen[str]:
    """A real `meiosis` process; with `wait` it must succeed."""
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("meiosis")), *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if wait:
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    return process


def write_config(family: Path, folder: Path, **cluster: Any) -> Path:
    config = config_of(family, folder / "results")
    config["search"] |= {"budget": BUDGET, "window": 4}
    config["cluster"] |= cluster
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


@pytest.fixture(scope="module")
def on_ray(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two Ray workers whose driver is killed once and whose workers are killed after that."""
    folder = tmp_path_factory.mktemp("ray")
    path = write_config(family, folder, pool="ray")
    (folder / "evaluators").mkdir()  # a folder of the user with the name of a package of ours
    (folder / "evaluators" / "__init__.py").write_text("raise ImportError('the wrong evaluators')")
    run = folder / "results" / "one"
    process = meiosis("search", str(path), "--run", "one", cwd=folder, wait=False)
    assert kill_when(process, run, 20_000)
    second = meiosis("resume", "one", "--workers", "4", cwd=folder, wait=False)
    killed = kill_a_worker(second, run)
    _, stderr = second.communicate(timeout=400)
    assert second.returncode == 0, stderr
    assert killed
    return run


def kill_a_worker(driver: subprocess.Popen[str], run: Path) -> bool:
    """kill -9 a Ray worker that has recorded a trial, while the driver is at work; False if it ended before."""
    deadline = time.monotonic() + 300
    while driver.poll() is None:
        assert time.monotonic() < deadline, "the search does not get on"
        for worker in {event.worker for event in events(run) if isinstance(event, Trial) and "/" in event.worker}:
            process = Path("/proc", worker.rpartition("/")[2])
            # Results of the driver before this one name workers that are gone.
            if process.exists() and b"ray::" in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
                return True
        time.sleep(0.01)
    return False


@pytest.mark.slow
@pytest.mark.ray
def test_killed_driver_killed_worker_and_another_number_of_workers_change_nothing(
    on_ray: Path, reference: Path
) -> None:
    ours, theirs = events(on_ray), events(reference)
    assert [event.deterministic() for event in ours] == [event.deterministic() for event in theirs]
    keys = [(event.candidate, event.items) for event in ours if isinstance(event, Trial)]
    assert len(keys) == len(set(keys))
