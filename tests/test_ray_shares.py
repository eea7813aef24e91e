"""Several searches on one cluster: each in a process of its own, on several raylets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packages import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from scheduling.problem import score
from scheduling.simulated_pool import Fates, SimulatedPool
from shared_search import search

from search.store.nodes_file import WorkersState, read_nodes

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

CLUSTER = """
import os, sys
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")
from ray.cluster_utils import Cluster
small = dict(object_store_memory=10**8)
cluster = Cluster(True, head_node_args=dict(num_cpus=0, include_dashboard=False, **small))
for cpus in (2, 1, 1):
    cluster.add_node(num_cpus=cpus, num_gpus=cpus, **small)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
LONG, SHORT = 1500, 20
WAIT_SECONDS = 150.0


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the nodes of the cluster keep copies of models."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def address(cache: Path) -> Iterator[str]:
    """A cluster with room for 2 + 1 + 1 workers."""
    program = [sys.executable, "-c", CLUSTER]
    environment = {**ENVIRONMENT, "MEIOSIS_CACHE": str(cache)}
    with subprocess.Popen(
        program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        try:
            yield started.stdout.readline().strip()
        finally:
            started.stdin.close()
            started.wait(60)


class Search:
    """A search that runs."""

    def __init__(self, address: str, folder: Path, *, budget: int, workers: int = 6, gpus: float = 0) -> None:
        folder.mkdir(parents=True)
        self.folder, self.budget = folder, budget
        program = [sys.executable, str(ROOT / "tests" / "shared_search.py"), address, str(folder)]
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                [*program, str(workers), str(gpus), str(budget)], env=ENVIRONMENT, stdout=output, stderr=output
            )

    @property
    def workers(self) -> WorkersState:
        return read_nodes(self.folder / "workers") or WorkersState("", 0, 0, ())

    @property
    def said(self) -> list[str]:
        return (self.folder / "said").read_text().splitlines()

    @property
    def starts(self) -> list[int]:
        log = self.folder / "starts"
        return [int(line) for line in log.read_text().split()] if log.exists() else []

    def wait(self, true: Callable[[], Any], what: str) -> float:
        """Wait until it is so; seconds that it took."""
        began = time.monotonic()
        while not true():
            assert self.process.poll() in (None, 0), (self.folder / "output").read_text()
            assert time.monotonic() - began < WAIT_SECONDS, f"{what}: {self.workers}, {self.said}"
            time.sleep(0.1)
        return time.monotonic() - began

    def hurry(self) -> None:
        (self.folder / "hurry").touch()
        self.wait(lambda: self.process.poll() is not None, "does not end")

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def undisturbed(folder: Path, budget: int) -> str:
    """The digest of the same search in virtual time."""
    folder.mkdir()
    return search(folder, budget, lambda: SimulatedPool(3, Fates(lambda _: 1.0), score))


@pytest.fixture
def started(address: str) -> Iterator[Callable[..., Search]]:
    """Starts searches; those that still run at the end are killed."""
    found: list[Search] = []

    def start(*arguments: Any, **options: Any) -> Search:
        found.append(Search(address, *arguments, **options))
        return found[-1]

    yield start
    for one in found:
        if one.process.poll() is None:
            one.kill()


def test_runs_of_one_name_share_a_cluster_by_halves_and_what_they_find_is_not_changed(
    started: Callable[..., Search], tmp_path: Path
) -> None:
    first = started(tmp_path / "ann" / "run", budget=LONG)
    first.wait(lambda: first.workers.up == 4 and len(first.starts) > 8, "not all for the first")
    assert first.workers.share is None

    second = started(tmp_path / "bob" / "run", budget=SHORT)
    second.wait(lambda: second.workers.up == 2 and len(second.starts) > 2, "no half for the second")
    first.wait(lambda: first.workers.up == 2, "more than half for the first")
    assert first.workers.share == second.workers.share == 2
    assert [other.partition(" of ")[0] for other in first.workers.others] == ["run"]
    assert first.process.poll() is None
    second.wait(lambda: second.process.poll() == 0, "the second does not end")
    regrown = first.wait(lambda: first.workers.up == 4 and first.workers.share is None, "not all again")
    assert regrown < WAIT_SECONDS

    third = started(tmp_path / "eve" / "run", budget=LONG)
    third.wait(lambda: third.workers.up == 2 and len(third.starts) > 2, "no half for the third")
    third.kill()
    first.wait(lambda: first.workers.up == 4 and first.workers.share is None, "not all after a driver was killed")

    before = len(first.starts)
    first.hurry()
    assert before < LONG, "the search was over too early to show anything"
    for one in (first, second):
        assert sorted(one.starts) == list(range(one.budget)), "every trial ran once"
        assert (one.folder / "digest").read_text() == undisturbed(one.folder.parent / "alone", one.budget)
    lines = [line for line in first.said if "cluster" in line]
    assert lines == [
        "usage statistics stay as the head of the cluster has them",
        "shares the cluster with 1 other run: 2 of 6 workers",
        "has the cluster to itself again",
        "shares the cluster with 1 other run: 2 of 6 workers",
        "has the cluster to itself again",
    ]
    assert not any("is replaced" in line or "busy" in line for line in first.said)


def test_a_run_with_small_workers_frees_the_node_that_another_needs_whole(
    started: Callable[..., Search], tmp_path: Path
) -> None:
    small = started(tmp_path / "small", budget=LONG, gpus=1.0, workers=4)
    small.wait(lambda: small.workers.up == 4, "not all for the small")
    large = started(tmp_path / "large", budget=SHORT // 2, gpus=2.0, workers=1)
    large.wait(lambda: len(large.starts) > 0, "no node with two GPUs")
    small.wait(lambda: small.workers.up == 2, "another node than that")
    large.wait(lambda: large.process.poll() == 0, "the large does not end")
    small.wait(lambda: small.workers.up == 4, "not all again")
    small.hurry()
    for one in (small, large):
        assert sorted(one.starts) == list(range(one.budget))


ROOM = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
address, notes, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
sys.path.append(sys.argv[4])
import numpy as np
from safetensors.numpy import save_file
from worker_bodies import plan
from cluster import supervisor
from cluster.copies import Copies
from cluster.nodes import is_placed
from cluster.pool import RayPool
from search.recipe import ModelRef

(notes / "code").mkdir()
(notes / "code" / "config.json").write_text("{}")
save_file({"w": np.ones((64, 64), np.float32)}, notes / "code" / "model.safetensors")
with_model = replace(plan(notes), models={"code": ModelRef(path=str(notes / "code"))})

def look(pool, true):
    # As if a minute went by again and again.
    end = time.monotonic() + 100
    while not true():
        assert time.monotonic() < end
        pool._supervisor.step(0.1)
    for _ in range(5):
        pool._supervisor._gather_until = 0.0
        assert not pool._supervisor.ready
        pool._supervisor.step(0.1)

def made(workers):
    return RayPool(with_model, workers=workers, working_folder=notes, address=address, report=said.append,
                   shards="copy", body="worker_bodies:Scripted")

said = []
with made(4) as pool:
    with Copies(cache / "shards").alone():  # somebody else is at it, and that takes long
        look(pool, lambda: sum(is_placed(slot.actor) for slot in pool._supervisor._slots.values()) == 4)
        print(sum("busy" in line for line in said))
    pool.ready()

    import ray  # something that is not ours has the rest
    stranger = ray.remote(num_gpus=0)(type("Stranger", (), {"hello": lambda self: None}))
    pool.close()
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    strangers = [stranger.options(num_cpus=1).remote() for _ in range(3)]
    ray.get([one.hello.remote() for one in strangers])
    said.clear()
    with made(4) as pool, Copies(cache / "shards").alone():
        look(pool, lambda: sum(is_placed(slot.actor) for slot in pool._supervisor._slots.values()) == 1)
    print([line for line in said if "busy" in line][-1])
"""


def test_a_cluster_is_called_busy_where_room_is_missing_and_not_where_models_are_copied(
    address: str, cache: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ROOM, address, str(tmp_path), str(cache), str(ROOT / "tests")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["0", "the cluster is busy: it has room for 1 of 4 workers now"]
