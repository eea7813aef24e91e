"""The pool on Ray supervises itself: workers that fail where others do not, and what workers return."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_ray_pool import drain
from worker_bodies import job, plan, starts

from cluster.doubts import FAILURES_IN_A_ROW
from cluster.handshake import identity
from cluster.jobs import JobBook
from cluster.pool import RayPool
from cluster.sending import Sender
from cluster.shards import one_at_a_time, shard_refs
from cluster.start_deaths import StartDeath, StartDeaths
from search.errors import UserError
from search.pool import Outcome
from search.recipe import ModelRef
from search.store.copied import Copied, read_copied
from search.store.nodes_file import NODES, NodeState, WorkersState, read_nodes, write_nodes

if TYPE_CHECKING:
    from cluster.local_ray import Session

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture
def make(ray_session: Session, tmp_path: Path) -> Iterator[Callable[..., RayPool]]:
    """Makes pools on the shared Ray, closed at the end of the test."""
    pools: list[RayPool] = []

    def make(workers: int, body: str = "worker_bodies:Scripted", **options: Any) -> RayPool:
        with_models = replace(plan(tmp_path), models=options.pop("models", {}))
        pools.append(RayPool(with_models, workers=workers, body=body, working_folder=tmp_path, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_a_worker_that_fails_what_others_can_do_is_replaced_and_its_last_failure_is_not_told(
    make: Callable[..., RayPool], tmp_path: Path
) -> None:
    said: list[str] = []
    pool = make(2, report=said.append)
    pool.ready()
    for candidate in range(40):
        pool.submit(job(candidate, "sick", seconds=0.05))
    outcomes = drain(pool, 40)
    failed = [outcome for outcome in outcomes.values() if outcome.failure is not None]
    assert len(failed) == FAILURES_IN_A_ROW - 1
    assert len({outcome.worker for outcome in failed}) == 1
    assert sorted(outcome.attempts for outcome in outcomes.values()) == [1] * 39 + [2]
    assert len(starts(tmp_path)) == 41
    replaced = [line for line in said if "is replaced" in line]
    assert len(replaced) == 1
    assert replaced[0].startswith(f"{failed[0].worker} is replaced: {FAILURES_IN_A_ROW} candidates in a row failed")
    pool.submit(job(100, "sleep", seconds=2.0))  # the file is written once a second
    drain(pool, 1)
    shown = read_nodes(tmp_path)
    assert shown is not None
    assert [(node.state, node.deaths) for node in shown.nodes] == [("in use", 1)]


def test_candidates_that_fail_everywhere_cost_no_worker_and_are_seldom_tried_again(
    make: Callable[..., RayPool], tmp_path: Path
) -> None:
    said: list[str] = []
    pool = make(2, report=said.append)
    pool.ready()
    for candidate in range(2):
        pool.submit(job(candidate, "sleep", seconds=0.3))
    drain(pool, 2)
    for candidate in range(2, 34):
        pool.submit(job(candidate, "throw", message="no such item") if candidate % 8 else job(candidate))
    outcomes = drain(pool, 32)
    assert {c for c, o in outcomes.items() if o.failure is None} == {8, 16, 24, 32}
    assert {o.failure.message for o in outcomes.values() if o.failure is not None} == {"KeyError: 'no such item'"}
    assert len(starts(tmp_path)) <= 34 + 32 // FAILURES_IN_A_ROW
    assert not any("is replaced" in line for line in said)


def test_the_only_worker_is_believed_whatever_it_fails(make: Callable[..., RayPool], tmp_path: Path) -> None:
    pool = make(1)
    pool.submit(job(0))
    for candidate in range(1, 9):
        pool.submit(job(candidate, "throw", message="no"))
    outcomes = drain(pool, 9)
    assert [outcome.attempts for outcome in outcomes.values()] == [1] * 9
    assert starts(tmp_path) == list(range(9))


def test_a_worker_that_comes_later_and_cannot_be_used_is_replaced_and_the_search_goes_on(
    make: Callable[..., RayPool], tmp_path: Path
) -> None:
    said: list[str] = []
    pool = make(1, report=said.append, body="worker_bodies:RefusesLater")
    pool.submit(job(0))
    assert drain(pool, 1)[0].failure is None
    (tmp_path / "refuse").write_text("the disk is full\nstill full")
    pool.submit(job(1, "exit_once"))
    outcome = drain(pool, 1)[1]
    assert (outcome.failure, outcome.attempts) == (None, 2)
    assert [line.partition(": ")[2] for line in said if "is replaced" in line][1:] == [
        "evaluators.code: the disk is full",
        "evaluators.code: still full",
    ]


def test_workers_that_can_no_longer_be_used_end_the_search_with_the_reason(
    make: Callable[..., RayPool], tmp_path: Path
) -> None:
    pool = make(1, body="worker_bodies:RefusesLater")
    pool.submit(job(0))
    drain(pool, 1)
    (tmp_path / "refuse").write_text("gone\n" * 3)
    pool.submit(job(1, "exit_once"))
    with pytest.raises(UserError) as caught:
        drain(pool, 1)
    assert str(caught.value) == "evaluators.code: gone"


def test_several_nodes_on_which_no_worker_starts_end_no_search_while_others_work() -> None:
    deaths = StartDeaths()
    for node in ("one", "two", "one", "three"):
        deaths.add(StartDeath(node, "no room", "", 0.0))
    deaths.add(StartDeath("two", "killed", "", 20.0))
    assert len(deaths.counted((), 1.0, others_work=False)) == 4
    assert [death.node for death in deaths.counted((), 1.0, others_work=True)] == ["one", "one"]
    assert [death.node for death in deaths.counted(("one",), 20.0, others_work=True)] == ["two", "two"]
    deaths.clear()
    assert deaths.counted((), 1.0, others_work=True) == []


def test_a_worker_that_comes_later_and_runs_other_code_is_replaced_and_the_search_goes_on(
    make: Callable[..., RayPool],
) -> None:
    said: list[str] = []
    pool = make(1, report=said.append)
    pool.submit(job(0))
    drain(pool, 1)
    assert pool._supervisor is not None
    crew = pool._supervisor._crew
    ours = crew.identity
    crew.identity = replace(ours, libraries={**ours.libraries, "torch": "0.0"})
    pool.submit(job(1, "exit_once"))
    end = time.monotonic() + 60
    while not any("has torch" in line for line in said):
        assert time.monotonic() < end, said
        pool.wait(0.05)
    crew.identity = ours
    assert drain(pool, 1)[1].failure is None


def write_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": np.ones((4, 4), np.float32)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_a_worker_that_has_room_already_is_not_started_anew_when_a_node_may_be_used_again(
    make: Callable[..., RayPool], tmp_path: Path
) -> None:
    from cluster.nodes import is_placed

    file = write_model(tmp_path / "code")
    model = file.parent
    elsewhere = frozenset({"f" * 56})
    pool = make(1, models={"code": ModelRef(path=str(model))})
    supervisor = pool._supervisor
    assert supervisor is not None

    def look_until(true: Callable[[], object]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end
            supervisor.step(0.1)

    with one_at_a_time(model):  # as if another worker of the node hashed it, and that took long
        os.utime(file, (1, 1))
        supervisor._sharing.full = elsewhere
        supervisor._replace(next(iter(supervisor._slots.values())))
        (slot,) = supervisor._slots.values()
        assert slot.avoid == elsewhere
        look_until(lambda: is_placed(slot.actor) and supervisor._avoided == elsewhere)
        supervisor._sharing.full = frozenset()
        look_until(lambda: supervisor._avoided == frozenset())
        assert list(supervisor._slots.values()) == [slot]
    look_until(lambda: slot.up)


def test_what_a_node_says_of_its_copies_until_the_end_is_told_and_noted(ray_session: Session, tmp_path: Path) -> None:
    import ray

    model = write_model(tmp_path / "code").parent
    models = {"code": ModelRef(path=str(model))}
    with_model = replace(plan(tmp_path), models=models)
    notes = tmp_path / "copied.jsonl"
    sender = Sender(with_model, shard_refs(models), "copy", own=True, identity=identity(), notes=notes)
    sender.news()  # asks, and does not wait
    ray.wait([sender._asked], timeout=60)
    copied = Copied("there", "abcd", 7, 0.5, "/cache")
    event = {"node": "there", "node_id": "abcd", "total": 7, "state": "ended", "moved": 7, "seconds": 0.5}
    ray.get(sender.handle.tell.remote({**event, "folder": "/cache"}))
    (line,) = sender.close()
    assert line.startswith("node there: copied ")
    assert read_copied(notes) == [copied]


def test_what_a_worker_returns_is_looked_at_before_it_is_told(make: Callable[..., RayPool]) -> None:
    pool = make(1)
    for candidate, what in enumerate(("other_type", "not_a_number", "too_large", "text_as_metric", "square")):
        pool.submit(job(candidate, what))
    outcomes = drain(pool, 5)
    failures = {c: (o.failure.kind, o.failure.message) for c, o in outcomes.items() if o.failure is not None}
    assert failures == {
        0: ("error", "TypeError: the worker returned dict, expected Outcome"),
        1: ("not_finite", "test.square is nan"),
        3: ("error", "TypeError: outcome.metrics['test.square'] is str, expected a float"),
        2: failures[2],
    }
    assert len(outcomes[2].failure.detail) == 100_000 if outcomes[2].failure else False
    assert outcomes[1].metrics == {}


@pytest.mark.parametrize("gpus", [1.5, -1.0, 2.25])
def test_gpus_that_no_worker_can_have_are_refused_in_one_line(tmp_path: Path, gpus: float) -> None:
    with pytest.raises(UserError) as caught:
        RayPool(plan(tmp_path), workers=1, working_folder=tmp_path, gpus_per_worker=gpus)
    assert str(caught.value).startswith(f"cluster.gpus_per_worker is {gpus:g}, expected a fraction of one GPU, or")
    assert "\n" not in str(caught.value)


def test_keeping_the_book_of_a_job_takes_the_same_time_among_ten_thousand() -> None:
    def microseconds(count: int) -> float:
        jobs = [job(candidate) for candidate in range(count)]
        book = JobBook()
        began = time.process_time()
        for one in jobs:
            book.add(one)
        while (entry := book.next_for(lambda _: True)) is not None:
            assert book.under_way
            book.conclude(entry, Outcome(entry.job.candidate, "search"))
        assert len(book.take()) == count
        return (time.process_time() - began) / count * 1e6

    assert microseconds(10_000) < 4 * microseconds(500) + 200


def test_jobs_that_run_again_come_before_those_submitted_later() -> None:
    book = JobBook()
    for candidate in range(4):
        book.add(job(candidate))
    first, second = (book.next_for(lambda _: True) for _ in range(2))
    assert first is not None
    assert second is not None
    book.put_back(second)
    book.put_back(first)
    book.cancel((2, "search"))
    order = [book.next_for(lambda entry: entry is not first) for _ in range(3)]
    assert [entry.job.candidate if entry else None for entry in order] == [1, 3, None]
    assert book.next_for(lambda _: True) is first
    with pytest.raises(ValueError, match="submitted twice"):
        book.add(job(0))
    book.cancel((0, "search"))
    book.conclude(first, Outcome(0, "search"))
    assert book.take() == ()
    book.add(job(0))


def test_a_file_of_nodes_that_is_damaged_or_missing_shows_nothing(tmp_path: Path) -> None:
    state = WorkersState("2030-01-01 12:00:00", 3, 2, (NodeState("host", "abcd", "draining", ("worker-1/7",), 1),))
    assert read_nodes(tmp_path) is None
    write_nodes(tmp_path, state)
    assert read_nodes(tmp_path) == state
    for text in ("", "[]", "{}", '{"nodes": [{"host": 1}]}', '{"nodes": 3}'):
        (tmp_path / NODES).write_text(text)
        assert read_nodes(tmp_path) is None
