"""The pool on Ray: real workers that crash, hang, raise and are killed."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from packages import ROOT
from safetensors.numpy import save_file
from worker_bodies import OwnError, job, plan, starts

from cluster import local_ray
from cluster.early_ray import early_ray
from cluster.local_ray import _make_folder, open_session
from cluster.node_memory import cluster_nodes
from cluster.pool import MOMENT_SECONDS, RayPool
from cluster.shards import node_folder, warm_stamp
from evaluators.base import EvaluatorSpec
from search.errors import CheckpointError, UserError, WorkerError
from search.pool import Outcome
from search.recipe import ModelRef

if TYPE_CHECKING:
    from cluster.local_ray import Session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture
def make(ray_session: Session, tmp_path: Path) -> Iterator[Callable[..., RayPool]]:
    """Makes pools on the shared Ray, closed at the end of the test."""
    pools: list[RayPool] = []

    def make(workers: int = 1, body: str = "worker_bodies:Scripted", **options: Any) -> RayPool:
        threads = options.pop("threads", 1)
        pools.append(RayPool(plan(tmp_path, threads), workers=workers, body=body, working_folder=tmp_path, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def drain(pool: RayPool, count: int, seconds: float = 120) -> dict[int, Outcome]:
    """The next `count` outcomes by candidate; fails if one comes twice or they do not come."""
    outcomes: dict[int, Outcome] = {}
    end = time.monotonic() + seconds
    while len(outcomes) < count:
        assert time.monotonic() < end, f"only {sorted(outcomes)} came"
        for outcome in pool.wait(1.0):
            assert outcome.candidate not in outcomes
            outcomes[outcome.candidate] = outcome
    assert pool.wait(0.1) == ()
    return outcomes


def wait_for(path: Path) -> str:
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return path.read_text()


def test_twenty_jobs_on_three_workers_run_once_each(make: Callable[..., RayPool], tmp_path: Path) -> None:
    said: list[str] = []
    pool = make(3, report=said.append)
    pool.ready()
    assert (pool.size, pool.busy) == (3, 0)
    for candidate in range(20):
        pool.submit(job(candidate, "sleep", seconds=0.05))
    outcomes = drain(pool, 20)
    assert {c: o.metrics["test.square"] for c, o in outcomes.items()} == {c: float(c * c) for c in range(20)}
    assert {outcome.attempts for outcome in outcomes.values()} == {1}
    assert len({outcome.worker for outcome in outcomes.values()}) == 3
    assert sorted(starts(tmp_path)) == list(range(20))
    assert said == ["starting Ray", "worker 1/3 ready", "worker 2/3 ready", "worker 3/3 ready"]


def test_one_worker_runs_jobs_in_the_order_of_submission(make: Callable[..., RayPool], tmp_path: Path) -> None:
    pool = make()
    order = [5, 3, 9, 1, 7]
    for candidate in order:
        pool.submit(job(candidate))
    drain(pool, 5)
    assert starts(tmp_path) == order


def test_a_worker_killed_in_mid_trial_costs_one_more_start_of_its_job_and_nothing_else(
    make: Callable[..., RayPool], tmp_path: Path
) -> None:
    pool = make(2)
    for candidate in range(6):
        pool.submit(job(candidate, "sleep", seconds=1.0 if candidate == 0 else 0.1))
    while not (tmp_path / "pid-0").exists():
        pool.wait(0.0)
    os.kill(int(wait_for(tmp_path / "pid-0")), signal.SIGKILL)
    outcomes = drain(pool, 6)
    assert {c: o.metrics["test.square"] for c, o in outcomes.items()} == {c: float(c * c) for c in range(6)}
    assert {c: o.attempts for c, o in outcomes.items()} == {0: 2, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}
    assert sorted(starts(tmp_path)) == [0, 0, 1, 2, 3, 4, 5]


def worker_processes() -> list[int]:
    """Processes of this process's workers."""
    parents, workers = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"ray::MeiosisWorker" in (folder / "cmdline").read_bytes():
                workers.append(int(folder.name))
        except OSError:
            continue

    def ancestors(pid: int) -> Iterator[int]:
        while pid := parents.get(pid, 0):
            yield pid

    return [pid for pid in workers if os.getpid() in ancestors(pid)]


def test_workers_that_die_while_they_are_idle_cost_no_job_an_attempt(
    make: Callable[..., RayPool], tmp_path: Path
) -> None:
    said: list[str] = []
    pool = make(2, report=said.append)
    pool.ready()
    for idle in (0.0, MOMENT_SECONDS + 0.2):  # before their first job, and after one
        for candidate in (0, 1):
            if idle:
                pool.submit(job(candidate, "sleep", seconds=0.5))
        drain(pool, 2 if idle else 0)
        time.sleep(idle)
        pids = worker_processes()
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        pool.submit(job(2))
        outcome = drain(pool, 1)[2]
        assert (outcome.failure, outcome.attempts) == (None, 1)
        pool.ready()
    assert sorted(starts(tmp_path)) == [0, 1, 2, 2]
    assert sum("is replaced: its process died" in line for line in said) == 4


def test_a_job_whose_outcome_waits_to_be_collected_cannot_be_submitted_again(make: Callable[..., RayPool]) -> None:
    pool = make()
    impossible = replace(job(0), hash_weights=lambda: None)  # type: ignore[arg-type]
    pool.submit(impossible)
    with pytest.raises(ValueError, match=r"\(0, 'search'\) was submitted twice"):
        pool.submit(job(0))
    (outcome,) = pool.wait()
    assert outcome.failure is not None
    assert outcome.failure.message.startswith("the job cannot be sent to a worker: ")
    pool.submit(job(0))
    assert drain(pool, 1)[0].failure is None


def test_failures_of_every_kind_stay_with_their_candidate(make: Callable[..., RayPool], tmp_path: Path) -> None:
    said: list[str] = []
    pool = make(2, trial_seconds=3.0, report=said.append)
    scripts: list[tuple[str, dict[str, Any]]] = [
        ("square", {}),
        ("exit", {}),
        ("exit_once", {}),
        ("throw", {"message": "no such item"}),
        ("sleep", {"seconds": 600}),
        ("hang_once", {}),
        ("leave", {}),
        ("other_candidate", {}),
        ("unpicklable", {}),
        ("square", {}),
    ]
    for candidate, (what, arguments) in enumerate(scripts):
        pool.submit(job(candidate, what, **arguments))
    outcomes = drain(pool, len(scripts))

    failures = {c: o.failure.kind for c, o in outcomes.items() if o.failure is not None}
    assert failures == {1: "crash", 3: "error", 4: "timeout", 6: "error", 7: "error", 8: "error"}
    fine = {c: (o.metrics["test.square"], o.attempts) for c, o in outcomes.items() if o.failure is None}
    assert fine == {0: (0.0, 1), 2: (4.0, 2), 5: (25.0, 2), 9: (81.0, 1)}
    assert [outcomes[c].attempts for c in (1, 3, 4, 6, 7, 8)] == [2, 1, 2, 1, 1, 1]
    thrown = outcomes[3].failure
    assert thrown is not None
    assert thrown.message == "KeyError: 'no such item'"
    assert "in throw" in thrown.detail
    overdue = outcomes[4].failure
    assert overdue is not None
    assert overdue.message == "took down 2 workers, the last time: not done after 3 s"
    assert 3.0 <= outcomes[4].evaluate_seconds < 60, "the time of the attempt that was lost counts"
    assert outcomes[1].evaluate_seconds > 0
    unsent = outcomes[8].failure
    assert unsent is not None
    assert unsent.message.startswith("the outcome cannot be sent to the driver: ")
    crashed = outcomes[1].failure
    assert crashed is not None
    assert crashed.message == (
        "took down 2 workers, the last time: its process died: killed, out of memory, or crashed"
    )
    assert sum("is replaced" in line for line in said) == 6


def test_a_cancelled_job_brings_no_outcome_and_its_worker_goes_on(make: Callable[..., RayPool], tmp_path: Path) -> None:
    pool = make()
    for candidate in (0, 1, 2):
        pool.submit(job(candidate, "sleep", seconds=0.5))
    while not (tmp_path / "pid-0").exists():
        pool.wait(0.0)
    assert pool.busy == 1
    pool.cancel((0, "search"))
    pool.cancel((1, "search"))
    assert set(drain(pool, 1)) == {2}
    assert starts(tmp_path) == [0, 2]


def test_wait_ends_at_its_timeout(make: Callable[..., RayPool]) -> None:
    pool = make()
    pool.ready()
    pool.submit(job(0, "sleep", seconds=5))
    began = time.monotonic()
    assert pool.wait(0.7) == ()
    assert 0.6 < time.monotonic() - began < 2.0


def test_threads_of_the_plan_reach_the_libraries_of_the_worker(make: Callable[..., RayPool]) -> None:
    pool = make(threads=3)
    for candidate, variable in enumerate(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")):
        pool.submit(job(candidate, "environment", variable=variable))
    outcomes = drain(pool, 3)
    assert [value for outcome in outcomes.values() for value in outcome.metrics.values()] == [3.0, 3.0, 3.0]


def test_a_mistake_found_by_a_worker_comes_out_as_it_is(make: Callable[..., RayPool]) -> None:
    with pytest.raises(OwnError) as caught:
        make(2, "worker_bodies:Refuses").ready()
    assert str(caught.value) == "evaluators.code: there is no file 'items.jsonl'"
    assert caught.value.exit_status == 7


def test_a_mistake_found_by_a_worker_comes_out_of_wait_too(make: Callable[..., RayPool]) -> None:
    pool = make(1, "worker_bodies:Refuses")
    pool.submit(job(0))
    with pytest.raises(OwnError):
        pool.wait(60)


@pytest.mark.parametrize(
    ("body", "message"),
    [("Broken", "RuntimeError: the model does not load"), ("Dies", "3 workers in a row could not start")],
)
def test_workers_that_never_start_stop_the_run(make: Callable[..., RayPool], body: str, message: str) -> None:
    with pytest.raises(WorkerError) as caught:
        make(2, f"worker_bodies:{body}").ready()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_impossible_arguments_are_refused_before_ray_starts(tmp_path: Path) -> None:
    for arguments, message in [
        ({"workers": 0}, r"cluster\.workers is 0"),
        ({"workers": 1, "trial_seconds": 0.0}, r"cluster\.trial_seconds is 0"),
        (
            {"workers": 1, "address": "ray://head:10001"},
            r"'ray://head:10001' is not the address of a Ray head",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            RayPool(plan(tmp_path), working_folder=tmp_path, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def code_pool(ray_session: Session, tmp_path: Path) -> Iterator[Callable[..., RayPool]]:
    """Makes pools whose plan has a model `code`, in `tmp_path`; closed at the end of the test."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text("{}")
    write_code(tmp_path, 1.0)
    pools: list[RayPool] = []

    def make(workers: int, sha256: str | None = None) -> RayPool:
        models = {"code": ModelRef(path=str(tmp_path / "code"), sha256=sha256)}
        body = "worker_bodies:Scripted"
        with_model = replace(plan(tmp_path), models=models)
        pools.append(RayPool(with_model, workers=workers, body=body, working_folder=tmp_path))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def write_code(folder: Path, value: float) -> Path:
    file = folder / "code" / "model.safetensors"
    save_file({"w": np.full((64, 64), value, np.float32)}, file)
    return file


def test_the_models_are_read_ahead_once_for_all_workers_of_a_node(
    code_pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    file = tmp_path / "code" / "model.safetensors"
    stamp = warm_stamp([file], node_folder())
    pool = code_pool(2)
    pool.ready()
    for candidate in range(2):
        pool.submit(job(candidate, "sleep", seconds=0.5))
    drain(pool, 2)
    wait_for(stamp)
    pids = [(tmp_path / f"pid-{candidate}").read_text() for candidate in range(2)]
    assert stamp.read_text() in [f"process {pid} read {file.stat().st_size} bytes\n" for pid in pids]
    assert len(set(pids)) == 2
    stamp.unlink()


def test_a_worker_that_finds_another_model_than_the_driver_is_refused_before_it_gets_a_job(
    code_pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    pool = code_pool(1)
    pool.ready()
    file = write_code(tmp_path, 2.0)
    pool.submit(job(0, "exit_once"))
    with pytest.raises(WorkerError) as caught:
        drain(pool, 1)
    message = str(caught.value)
    assert message.startswith(f"node {platform.node()}: model 'code': with {file} its weights hash to ")
    assert "\n" not in message
    assert starts(tmp_path) == [0], "the worker that replaced the dead one must not have started the job"


def test_a_model_that_is_gone_on_the_node_of_a_worker_is_told(
    code_pool: Callable[..., RayPool], tmp_path: Path
) -> None:
    pool = code_pool(1)
    pool.ready()
    shutil.move(tmp_path / "code", tmp_path / "away")
    pool.submit(job(0, "exit_once"))
    with pytest.raises(WorkerError, match=r"node .*: model 'code': no folder .*, which the driver has"):
        drain(pool, 1)


def test_a_model_that_changed_since_it_was_hashed_stops_the_pool_at_once(
    code_pool: Callable[..., RayPool],
) -> None:
    with pytest.raises(CheckpointError, match=r"model 'code': the weights in .* expected 000000000000"):
        code_pool(1, sha256="0" * 64)


def test_a_process_uses_one_ray_at_a_time(ray_session: Session) -> None:
    with pytest.raises(WorkerError, match="uses Ray at"):
        open_session("127.0.0.1:1")


def test_an_address_is_not_passed_over_where_the_program_that_uses_us_has_another_ray(
    ray_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ray, "_session", None)  # as if the program had started it
    with pytest.raises(WorkerError, match=f"uses Ray at {ray_session.address} already; close it before joining 127"):
        open_session("127.0.0.1:1")
    for address in (None, ray_session.address):
        theirs = open_session(address)
        assert (theirs.address, theirs.own) == (ray_session.address, False)
        theirs.close()


def test_a_ray_that_did_not_start_early_does_not_fail_the_next_command_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = iter(["no room on the disk", "a second fault"])

    def start_ray(*_: object) -> None:
        raise WorkerError(next(started))

    monkeypatch.setattr(local_ray, "start_ray", start_ray)
    monkeypatch.setattr(local_ray, "_session", None)
    monkeypatch.setattr(local_ray, "_offered", None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)

    def command() -> None:
        with early_ray(1, False) as begin:
            begin()
            open_session(None)

    with pytest.raises(WorkerError, match="no room on the disk"):
        command()
    with pytest.raises(WorkerError, match="a second fault"):
        open_session(None)


@pytest.mark.parametrize(("gpus", "slots"), [(0.6, 2), (0.5, 4), (1, 2), (2, 1)])
def test_memory_is_planned_for_as_many_workers_as_are_started(
    ray_session: Session, monkeypatch: pytest.MonkeyPatch, gpus: float, slots: int
) -> None:
    import ray

    (node,) = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: [{**node, "Resources": {"CPU": 8.0, "GPU": 2.0}}])
    (found,) = cluster_nodes(ray_session, cpus=1, gpus=gpus)
    assert found.slots == slots


def test_an_address_where_nobody_answers_is_an_error_within_seconds() -> None:
    code = "from cluster.local_ray import open_session; open_session('127.0.0.1:1')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 1
    assert "WorkerError: no Ray head answers at '127.0.0.1:1'" in done.stderr.splitlines()[-1]


def test_folders_that_a_killed_driver_left_are_removed_and_those_in_use_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as base:
        monkeypatch.setenv("RAY_TMPDIR", base)
        used, held = _make_folder()
        left, lock = _make_folder()
        lock.close()  # as the end of a process does
        new, other = _make_folder()
        assert (used.exists(), left.exists(), new.exists()) == (True, False, True)
        held.close()
        other.close()


def test_a_worker_with_another_evaluator_is_refused_before_it_gets_a_job(ray_session: Session, tmp_path: Path) -> None:
    function = tmp_path / "function.py"
    function.write_text("def score(model): return 1.0")
    spec = EvaluatorSpec("mine", "python", {"function": f"{function}:score"})
    with RayPool(
        replace(plan(tmp_path), evaluators=(spec,)),
        workers=1,
        body="worker_bodies:Scripted",
        working_folder=tmp_path,
    ) as pool:
        pool.ready()
        function.write_text("def score(model): return 2.0")
        pool.submit(job(0, "exit_once"))
        with pytest.raises(WorkerError) as caught:
            drain(pool, 1)
    assert f"node {platform.node()} has another evaluator 'mine'" in str(caught.value)
    assert str(function) in str(caught.value)
    assert starts(tmp_path) == [0]
