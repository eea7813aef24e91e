"""What the pool on Ray tells: to the log, to the history, and to Prometheus."""

from __future__ import annotations

import importlib.util
import math
import os
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from worker_bodies import job, plan

from search.pool import Outcome, Publisher
from search.progress import Progress
from search.run_log import last_events, log_to
from search.store.events import Trial

if TYPE_CHECKING:
    from cluster.local_ray import Session
    from cluster.pool import RayPool

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

NEEDED = ("aiohttp", "prometheus_client", "opencensus", "opentelemetry.sdk")
"""Of what `ray[default]` brings, what serving metrics takes."""


def served() -> bool:
    try:
        return all(importlib.util.find_spec(name) for name in NEEDED)
    except ModuleNotFoundError:
        return False


def make_pool(folder: Path, run: str, workers: int = 1) -> RayPool:
    from cluster.pool import RayPool

    working = folder / run / "workers"
    working.mkdir(parents=True)
    return RayPool(plan(folder), workers=workers, body="worker_bodies:Scripted", working_folder=working)


def test_outcomes_tell_where_and_when_and_the_log_who_came_and_went(ray_session: Session, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with log_to(log), make_pool(tmp_path, "told") as pool:
        pool.ready()
        before = time.time()
        pool.submit(job(0, "exit_once"))
        pool.submit(job(1, "sleep", seconds=0.5))
        found: dict[int, Outcome] = {}
        while len(found) < 2:
            found.update({outcome.candidate: outcome for outcome in pool.wait(5)})
    again, slow = found[0], found[1]
    assert (again.attempts, slow.attempts) == (2, 1)
    for outcome in (again, slow):
        assert outcome.node == os.uname().nodename
        assert before <= outcome.started_at <= time.time()
        assert outcome.bytes_moved > 400
        assert outcome.queue_seconds >= 0
    assert again.bytes_moved > slow.bytes_moved, "the job was sent twice"
    events = last_events(log)
    assert [event["event"] for event in events] == ["worker_ready", "worker_lost", "worker_ready"]
    lost = events[1]
    assert (lost["level"], lost["kind"], lost["node"]) == ("warning", "crash", os.uname().nodename)
    assert lost["worker"] == events[0]["worker"] != events[2]["worker"]


def test_metrics_take_any_numbers_and_cost_microseconds(ray_session: Session, tmp_path: Path) -> None:
    with make_pool(tmp_path, "odd") as pool:
        assert isinstance(pool, Publisher)
        best = Trial(0, "search", loss=math.inf)
        for loss in (best, None):
            pool.publish(Progress("search", 3, best=loss, busy=0, workers=0))
        odd = [math.nan, math.inf, -1.0, 0.0]
        pool._metrics.count([Outcome(0, "search", merge_seconds=x, evaluate_seconds=x) for x in odd])


@pytest.mark.skipif(not served(), reason="needs ray[default], without which Ray serves no metrics")
def test_prometheus_finds_the_figures_of_a_run(ray_session: Session, tmp_path: Path) -> None:
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    with make_pool(tmp_path, "scraped") as pool:
        pool.ready()
        for candidate in range(3):
            pool.submit(job(candidate))
        pool.submit(job(3, "throw", message="no"))
        outcomes: list[Outcome] = []
        while len(outcomes) < 4:
            outcomes += pool.wait(5)
        pool.publish(Progress("search", 9, best=Trial(0, "search", loss=0.25), busy=1, workers=1))
        (node,) = [node for node in ray.nodes() if node["Alive"]]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        found: dict[str, float] = {}
        end = time.monotonic() + 90
        while "ray_meiosis_best_loss" not in found and time.monotonic() < end:
            time.sleep(1)
            with urllib.request.urlopen(url, timeout=30) as page:
                families = list(text_string_to_metric_families(page.read().decode()))
            samples = [one for family in families for one in family.samples if one.labels.get("run") == "scraped"]
            found = {f"{one.name} {one.labels.get('outcome', '')}".strip(): one.value for one in samples}
    assert found["ray_meiosis_trials_total ok"] == 3
    assert found["ray_meiosis_trials_total error"] == 1
    assert found["ray_meiosis_merge_seconds_count"] == found["ray_meiosis_evaluate_seconds_count"] == 4
    assert (found["ray_meiosis_workers"], found["ray_meiosis_busy_workers"]) == (1, 1)
    assert found["ray_meiosis_best_loss"] == 0.25


def test_how_models_are_laid_over_gpus_is_in_the_log_once(ray_session: Session, tmp_path: Path) -> None:
    from cluster.pool import RayPool

    log = tmp_path / "log.jsonl"
    body = "worker_bodies:LaidOut"
    with log_to(log), RayPool(plan(tmp_path), workers=2, body=body, working_folder=tmp_path) as pool:
        pool.ready()
    events = last_events(log)
    assert sorted(str(event["event"]) for event in events) == ["layout", "worker_ready", "worker_ready"]
    told = next(event for event in events if event["event"] == "layout")
    assert told["device_map"] == {"model.embed_tokens": "cuda:0", "lm_head": "cuda:1"}
    assert told["bytes"] == {"cuda:0": 7, "cuda:1": 8}
    assert told["node"] == os.uname().nodename
