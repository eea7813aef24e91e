"""The pool on Ray as processes: a driver of its own, what it leaves behind, and nodes that die and join."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packages import PACKAGES, ROOT, copy_packages

if TYPE_CHECKING:
    pass

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


DRIVER = """
import json, os, signal, sys, threading, time
from pathlib import Path
packages, tests, notes = map(Path, sys.argv[1:4])
sys.path[:0] = [str(packages)]  # a place that workers do not know of, whatever is installed
sys.path += [str(tests)]
hits = []
signal.signal(signal.SIGTERM, lambda *_: hits.append("SIGTERM"))

def descendants():
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(stat.parent.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}

if __name__ == "__main__":
    from worker_bodies import job, plan, starts
    from cluster.pool import RayPool
    from search.errors import WorkerError
    pool = RayPool(plan(notes), workers=2, body="worker_bodies:Scripted", working_folder=notes)
    pool.ready()
    print("while Ray runs")
    pool.submit(job(0, "exit_once"))
    pool.submit(job(1))
    results = {}
    while len(results) < 2:
        results.update({o.candidate: o.metrics["test.square"] for o in pool.wait(5)})
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    pool.submit(job(2, "sleep", seconds=1))
    results.update({o.candidate: o.metrics["test.square"] for o in pool.wait(5)})

    with (packages / "search" / "pool.py").open("a") as source:
        source.write("# changed during the run\\n")
    refused = ""
    try:
        for candidate in range(3, 60):  # the other worker goes on until the new one says what it runs
            pool.submit(job(3, "exit_once") if candidate == 3 else job(candidate, "sleep", seconds=0.2))
            pool.wait(5)
    except WorkerError as error:
        refused = str(error)

    started = descendants()
    folders = {part for pid in started for part in Path(f"/proc/{pid}/cmdline").read_text().split("\\0")
               if part.startswith("--temp_dir") or part.startswith("--temp-dir")}
    pool.close()
    pool.close()
    for _ in range(50):
        left = {pid for pid in started if Path(f"/proc/{pid}").exists()
                and ") Z " not in Path(f"/proc/{pid}/stat").read_text()}
        if not left:
            break
        time.sleep(0.1)
    print(json.dumps(dict(results=results, hits=hits, refused=refused, started=len(started), left=len(left),
                          folders=sorted(f.partition("=")[2] for f in folders),
                          own_stdout=sys.stdout is sys.__stdout__, environment=dict(os.environ))))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A driver of its own, started where folders with the names of our packages lie."""
    folder = tmp_path_factory.mktemp("driver")
    standing, script, notes = folder / "standing", folder / "bin" / "driver.py", folder / "notes"
    for made in (standing, script.parent, notes):
        made.mkdir()
    for where in (standing, script.parent):
        for name in PACKAGES:
            (where / name).mkdir()
            (where / name / "__init__.py").write_text("raise ImportError('the wrong package')\n")
    script.write_text(DRIVER)
    packages = copy_packages(folder / "packages")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY", "PYTHONPATH"))}
    done = subprocess.run(
        # -P: like a console script, the driver does not look for modules beside its script.
        [sys.executable, "-P", str(script), str(packages), str(ROOT / "tests"), str(notes)],
        cwd=standing,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return {
        **json.loads(lines[-1]),
        "stdout": lines,
        "stderr": done.stderr,
        "log": (notes / "ray.log").read_text(),
    }


def test_folders_with_our_names_where_the_user_stands_are_not_imported(driver: dict[str, Any]) -> None:
    assert driver["results"] == {"0": 0.0, "1": 1.0, "2": 4.0}


def test_what_ray_says_about_a_dead_worker_is_not_on_stdout(driver: dict[str, Any]) -> None:
    assert len(driver["stdout"]) == 2
    assert driver["stdout"][0] == "while Ray runs"
    assert driver["stderr"] == ""
    assert "died" in driver["log"]
    assert driver["own_stdout"]


def test_the_drivers_own_signal_handlers_run_during_wait(driver: dict[str, Any]) -> None:
    assert driver["hits"] == ["SIGTERM"]


def test_a_worker_that_would_run_changed_code_is_refused(driver: dict[str, Any]) -> None:
    assert "has another package 'search'" in driver["refused"]


def test_closing_leaves_no_process_and_no_file_of_ray(driver: dict[str, Any]) -> None:
    assert driver["started"] > 3
    assert driver["left"] == 0
    assert driver["folders"]
    assert not any(Path(folder).exists() for folder in driver["folders"])


def test_ray_sends_no_statistics_and_asks_for_a_token(driver: dict[str, Any]) -> None:
    assert driver["environment"]["RAY_USAGE_STATS_ENABLED"] == "0"
    assert driver["environment"]["RAY_AUTH_MODE"] == "token"
    token = Path.home() / ".ray" / "auth_token"
    assert not token.exists() or token.stat().st_mode & 0o077 == 0


NODE_DEATH = """
import json, os, signal, sys, time
from pathlib import Path
tests, notes = map(Path, sys.argv[1:3])
sys.path.append(str(tests))
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")

if __name__ == "__main__":
    from ray.cluster_utils import Cluster
    small = dict(object_store_memory=10**8)
    cluster = Cluster(True, head_node_args=dict(num_cpus=1, include_dashboard=False, **small))
    other = cluster.add_node(num_cpus=1, **small)
    from worker_bodies import job, plan, starts
    from cluster.pool import RayPool
    said = []
    pool = RayPool(plan(notes), workers=3, body="worker_bodies:Scripted", working_folder=notes,
                   address=cluster.address, report=said.append)
    pool.ready()
    for candidate in range(6):
        pool.submit(job(candidate, "sleep", seconds=3 if candidate < 2 else 0.1))
    while len(starts(notes)) < 2:
        pool.wait(0.0)
    cluster.remove_node(other, allow_graceful=False)
    results = []
    while len(results) < 6:
        results += [(o.candidate, o.failure and o.failure.kind, o.attempts) for o in pool.wait(5)]
    joined = cluster.add_node(num_cpus=1, **small)
    for candidate in range(100, 400):
        pool.submit(job(candidate, "sleep", seconds=0.2))
    workers = set()
    end = time.monotonic() + 50
    while len(workers) < 2 and time.monotonic() < end:
        workers.update(outcome.worker for outcome in pool.wait(1))
    for candidate in range(100, 400):
        pool.cancel((candidate, "search"))
    while pool.busy:
        pool.submit(job(500)), pool.wait(5)  # the cancelled ones that run come to their end

    pool.submit(job(1000, "large", seconds=2))
    pool.submit(job(1001, "large", seconds=2))
    while not {1000, 1001} <= set(starts(notes)):
        pool.wait(0.05)
    time.sleep(4)
    cluster.remove_node(joined, allow_graceful=False)
    large = []
    while len(large) < 2:
        large += [(o.candidate, o.failure and o.failure.message, o.attempts) for o in pool.wait(5)]
    pool.close()
    print(json.dumps(dict(results=sorted(results), said=said, workers=len(workers), large=sorted(large))))
    cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_dies_costs_no_job_and_no_outcome_and_one_that_joins_gets_a_worker(tmp_path: Path) -> None:
    script, notes = tmp_path / "driver.py", tmp_path / "notes"
    notes.mkdir()
    script.write_text(NODE_DEATH)
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "tests"), str(notes)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [result[:2] for result in found["results"]] == [[candidate, None] for candidate in range(6)]
    assert sum(attempts for _, _, attempts in found["results"]) == 7
    assert "there is room for 2 of 3 workers until nodes join" in found["said"]
    assert found["workers"] == 2
    assert [result[:2] for result in found["large"]] == [[1000, None], [1001, None]]
    assert sum(attempts for _, _, attempts in found["large"]) == 3, "one outcome was lost with its node"
