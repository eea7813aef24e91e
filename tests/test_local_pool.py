"""The pool in this process."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_bodies import OwnError, job, plan, starts

from search.local_pool import LocalPool
from search.pool import Outcome


def pool(folder: Path, body: str = "worker_bodies:Scripted") -> LocalPool:
    return LocalPool(plan(folder), body=body)


def drain(pool: LocalPool) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while came := pool.wait(1.0):
        outcomes.extend(came)
    return outcomes


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=20))
def test_jobs_come_back_once_each_in_the_order_of_submission(candidates: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder, pool(Path(folder)) as local:
        for candidate in candidates:
            local.submit(job(candidate))
        outcomes = drain(local)
        assert [outcome.candidate for outcome in outcomes] == candidates == starts(Path(folder))
        assert [outcome.metrics["test.square"] for outcome in outcomes] == [c * c for c in candidates]


def test_one_call_of_wait_runs_one_job(tmp_path: Path) -> None:
    with pool(tmp_path) as local:
        local.submit(job(1))
        local.submit(job(2))
        assert starts(tmp_path) == []
        assert [outcome.candidate for outcome in local.wait()] == [1]
        assert starts(tmp_path) == [1]


def test_a_cancelled_job_never_runs(tmp_path: Path) -> None:
    with pool(tmp_path) as local:
        for candidate in (1, 2, 3):
            local.submit(job(candidate))
        local.cancel((2, "search"))
        local.cancel((9, "search"))
        assert [outcome.candidate for outcome in drain(local)] == [1, 3] == starts(tmp_path)


def test_waiting_for_nothing_returns_nothing(tmp_path: Path) -> None:
    with pool(tmp_path) as local:
        assert local.wait() == ()


def test_an_interrupt_passes_through_and_the_job_runs_again(tmp_path: Path) -> None:
    with pool(tmp_path) as local:
        local.submit(job(1, "interrupt_once"))
        local.submit(job(2))
        with pytest.raises(KeyboardInterrupt):
            local.wait()
        assert local.busy == 0
        assert [outcome.candidate for outcome in drain(local)] == [1, 2]
        assert starts(tmp_path) == [1, 1, 2]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("leave", "SystemExit: 3"),
        ("other_candidate", "ValueError: the worker returned the outcome of (1004, 'search')"),
        ("other_type", "TypeError: the worker returned dict, expected Outcome"),
        ("text_as_metric", "TypeError: outcome.metrics['test.square'] is str, expected a float"),
        ("no_such_method", "AttributeError: 'Scripted' object has no attribute 'no_such_method'"),
    ],
)
def test_what_a_body_does_wrong_is_the_failure_of_its_trial(tmp_path: Path, what: str, message: str) -> None:
    with pool(tmp_path) as local:
        local.submit(job(4, what))
        local.submit(job(5))
        failed, fine = drain(local)
    assert failed.key == (4, "search")
    assert failed.failure is not None
    assert failed.failure.kind == "error"
    assert failed.failure.message.startswith(message)
    assert "Traceback" in failed.failure.detail
    assert fine.metrics == {"test.square": 25.0}


def test_the_same_job_twice_is_refused(tmp_path: Path) -> None:
    with pool(tmp_path) as local:
        local.submit(job(1))
        with pytest.raises(ValueError, match=r"\(1, 'search'\) was submitted twice"):
            local.submit(job(1))


def test_a_closed_pool_takes_no_jobs(tmp_path: Path) -> None:
    local = pool(tmp_path)
    local.submit(job(1))
    local.close()
    local.close()
    assert local.wait() == ()
    with pytest.raises(ValueError, match="closed"):
        local.submit(job(2))


def test_errors_of_the_bodys_constructor_come_out_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OwnError, match=r"items\.jsonl"):
        pool(tmp_path, "worker_bodies:Refuses")


def test_it_needs_neither_ray_nor_torch() -> None:
    code = "import sys, search.local_pool; print({'ray', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
