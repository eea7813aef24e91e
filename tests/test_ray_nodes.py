"""The pool on Ray and its nodes: several raylets on this machine, with as many GPUs as they say they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packages import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

COMMON = """
import json, os, sys, time
from pathlib import Path
tests, notes = map(Path, sys.argv[1:3])
sys.path.append(str(tests))
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token")

def until(true, what, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        pool.wait(0.05) if not pool._jobs.any_done else time.sleep(0.05)

def drain(count, seconds=120):
    found, end = [], time.monotonic() + seconds
    while len(found) < count:
        assert time.monotonic() < end, found
        found += pool.wait(1)
    assert len({o.candidate for o in found}) == count
    return {o.candidate: o for o in found}

def turn(seconds=0.3):
    # The pool looks after its workers while somebody waits for jobs.
    numbers = [next(number) for _ in range(3)]
    for n in numbers:
        pool.submit(job(n, "where", seconds=seconds))
    done.update(drain(3))
    return {(notes / f"node-{n}").read_text() for n in numbers}

def turn_until(true, what, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, what
        turn()

def up():
    shown = read_nodes(notes)
    return shown.up if shown else 0

def node(id):
    return next((n for n in read_nodes(notes).nodes if n.id == id[:8]), None)

def alive():
    return {n["NodeID"] for n in ray.nodes() if n["Alive"]}

def add(**resources):
    before = alive()
    added = cluster.add_node(object_store_memory=10**8, **resources)
    (id,) = alive() - before
    return added, id

if __name__ == "__main__":
    import itertools
    import ray
    from ray.cluster_utils import Cluster
    cluster = Cluster(True, head_node_args=dict(num_cpus=HEAD, include_dashboard=False, object_store_memory=10**8))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    from worker_bodies import job, plan, starts
    from cluster.pool import RayPool
    from search.store.nodes_file import read_nodes
    said, done, number = [], {}, itertools.count(1000)
    def make(**options):
        return RayPool(plan(notes), body="worker_bodies:Scripted", working_folder=notes, report=said.append, **options)
"""

GPUS = (
    COMMON.replace("HEAD", "1")
    + """
    from ray.util import placement_group_table
    def groups():
        states = [group["state"] for group in placement_group_table().values()]
        return {state: states.count(state) for state in set(states) - {"REMOVED"}}
    first, _ = add(num_cpus=3, num_gpus=5)
    pool = make(workers=3, gpus_per_worker=2)
    pool.ready()
    at_first = groups()
    for candidate in range(4):
        pool.submit(job(candidate, "gpus"))
    four = drain(4)
    second, second_id = add(num_cpus=3, num_gpus=4)
    turn_until(lambda: up() == 3, "no third worker")
    third = groups()
    pool.submit(job(5, "exit_once"))
    killed = drain(1)[5].attempts
    turn_until(lambda: up() == 3 and groups() == {"CREATED": 3}, "no worker instead of the dead one")
    cluster.remove_node(second, allow_graceful=False)
    for candidate in range(10, 16):
        pool.submit(job(candidate, "sleep", seconds=0.3))
    after = drain(6)
    pool.close()
    end = time.monotonic() + 30
    while groups() and time.monotonic() < end:
        time.sleep(0.1)
    left = groups()
    end = time.monotonic() + 30  # what the last pool had must be free again
    while ray.available_resources().get("GPU", 0) < 5 and time.monotonic() < end:
        time.sleep(0.1)
    pool = make(workers=3, gpus_per_worker=0.5)
    pool.ready()
    for candidate in range(20, 26):
        pool.submit(job(candidate, "gpus"))
    shares = drain(6)
    pool.close()
    (notes / "result.json").write_text(json.dumps(dict(
        said=said, at_first=at_first, third=third, killed=killed, left=left,
        four=[(o.failure and o.failure.message, o.metrics.get("gpus"), o.metrics.get("first")) for o in four.values()],
        after=[o.failure and o.failure.message for o in after.values()],
        shares=[(o.worker, o.metrics.get("gpus"), o.metrics.get("first")) for o in shares.values()],
        failures=[o.failure.message for o in done.values() if o.failure])))
    ray.shutdown()
    cluster.shutdown()
"""
)

NODES = (
    COMMON.replace("HEAD", "1")
    + """
    from cluster import nodes
    nodes.ASIDE_SECONDS = 10.0
    from ray.core.generated import autoscaler_pb2
    _, second = add(num_cpus=1)
    pool = make(workers=3)
    pool.ready()
    turn_until(lambda: up() == 2, "the file is written once a second")

    # A node that is about to go.
    for candidate in range(2):
        pool.submit(job(candidate, "where", seconds=3.0))
    until(lambda: all((notes / f"node-{c}").exists() for c in range(2)), "not begun")
    gcs = ray._raylet.GcsClient(address=cluster.address)
    deadline = int((time.time() + 300) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted = gcs.drain_node(second, reason, "spot", deadline)
    until(lambda: node(second).state == "draining", "drain not noticed", 30)
    draining = node(second)
    while_draining = pool.busy
    ended = drain(2)
    seen = set()
    for _ in range(5):
        seen |= turn()
    third_node, third = add(num_cpus=1)
    turn_until(lambda: up() == 2, "no worker on the node that joined")

    # A node on which workers die.
    fourth_node, fourth = add(num_cpus=1)
    turn_until(lambda: up() == 3, "no third worker")
    most = up()
    (notes / "bad").write_text(fourth)
    safe, aside, open_jobs, following = {}, None, 0, itertools.count(100)
    end = time.monotonic() + 150
    while aside is None or open_jobs:
        assert time.monotonic() < end, "not set aside"
        while aside is None and open_jobs < 6:
            pool.submit(job(next(following), "where_it_is_safe", seconds=0.2))
            open_jobs += 1
        for outcome in pool.wait(0.2):
            assert outcome.candidate not in safe
            safe[outcome.candidate] = outcome
            open_jobs -= 1
        if aside is None and node(fourth).state == "set aside":
            aside = node(fourth)
    (notes / "bad").write_text("none")
    turn_until(lambda: up() == 3, "not taken back")
    back = node(fourth)
    cluster.remove_node(fourth_node, allow_graceful=False)
    for candidate in range(200, 206):
        pool.submit(job(candidate, "sleep", seconds=0.5))
    after = drain(6)
    pool.close()
    (notes / "result.json").write_text(json.dumps(dict(
        said=said, accepted=accepted[0], draining=draining.__dict__, while_draining=while_draining,
        ended=[(o.failure and o.failure.message, o.attempts) for o in ended.values()],
        seen_second=second in seen, most=most,
        safe=[(o.failure and o.failure.message, o.attempts) for o in safe.values()],
        aside=aside and aside.__dict__, back=back.state,
        after=[o.failure and o.failure.message for o in after.values()],
        failures=[o.failure.message for o in done.values() if o.failure])))
    ray.shutdown()
    cluster.shutdown()
"""
)

STARTING = (
    COMMON.replace("HEAD", "0")
    + """
    nodes = [add(num_cpus=2)[0] for _ in range(2)]
    pool = RayPool(plan(notes), body="worker_bodies:Waits", working_folder=notes, report=said.append, workers=4)
    for candidate in range(4):
        pool.submit(job(candidate))
    until(lambda: len(list(notes.glob("building-*"))) == 4, "the workers do not start")
    for one in nodes:
        cluster.remove_node(one, allow_graceful=False)
    until(lambda: sum(line.endswith("left the cluster") for line in said) == 2, "the deaths are not noticed")
    add(num_cpus=2)
    (notes / "go").touch()
    outcomes = drain(4)
    pool.close()
    (notes / "result.json").write_text(json.dumps(dict(
        said=said, outcomes=[(o.failure and o.failure.message, o.attempts) for o in outcomes.values()])))
    ray.shutdown()
    cluster.shutdown()
"""
)


HEADLESS = (
    COMMON.replace("HEAD", "1")
    + """
    import signal
    pool = make(workers=1)
    pool.submit(job(0))
    first = drain(1)[0]
    (head,) = cluster.head_node.all_processes["gcs_server"]
    os.kill(head.process.pid, signal.SIGKILL)
    head.process.wait()
    pool.submit(job(1, "sleep", seconds=2.0))
    pool.submit(job(2))
    outcomes = drain(2, seconds=30)
    longest, end = 0.0, time.monotonic() + 4
    pool.submit(job(3, "sleep", seconds=10.0))
    while time.monotonic() < end:
        began = time.monotonic()
        pool.wait(0.2)
        longest = max(longest, time.monotonic() - began)
    (notes / "result.json").write_text(json.dumps(dict(
        said=said, longest=longest, failures=[o.failure and o.failure.message for o in (first, *outcomes.values())])))
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    os._exit(0)  # with its head, Ray cannot be left in order
"""
)


def run(text: str, folder: Path) -> dict[str, Any]:
    """What a driver of its own found out."""
    script, notes = folder / "driver.py", folder / "notes"
    notes.mkdir()
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT / "tests"), str(notes)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((notes / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Workers with two GPUs each, then with half of one."""
    return run(GPUS, tmp_path_factory.mktemp("gpus"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Nodes that are drained, join, kill their workers and leave."""
    return run(NODES, tmp_path_factory.mktemp("nodes"))


def test_a_worker_gets_its_gpus_from_one_node_through_a_placement_group(gpus: dict[str, Any]) -> None:
    assert "there is room for 2 of 3 workers until nodes join" in gpus["said"]
    assert gpus["at_first"] == {"CREATED": 2, "PENDING": 1}
    assert {tuple(each[:2]) for each in gpus["four"]} == {(None, 2.0)}
    assert len({each[2] for each in gpus["four"]}) == 2, "two workers do not share a GPU"


def test_workers_start_as_nodes_join_and_are_never_more_than_the_maximum(gpus: dict[str, Any]) -> None:
    assert gpus["third"] == {"CREATED": 3}
    assert "worker 3/3 ready" in gpus["said"]
    assert gpus["failures"] == []


def test_the_gpus_of_a_dead_worker_are_released(gpus: dict[str, Any]) -> None:
    assert gpus["killed"] == 2
    assert gpus["after"] == [None] * 6
    assert gpus["left"] == {}


def test_workers_with_a_fraction_share_a_gpu(gpus: dict[str, Any]) -> None:
    assert {tuple(each[1:2]) for each in gpus["shares"]} == {(1.0,)}
    held = {worker: gpu for worker, _, gpu in gpus["shares"]}
    assert len(held) > len(set(held.values()))


def test_a_node_that_is_about_to_go_ends_its_jobs_and_gets_no_more(nodes: dict[str, Any]) -> None:
    assert nodes["accepted"]
    assert (nodes["draining"]["state"], nodes["draining"]["why"]) == ("draining", "it is about to go")
    assert nodes["draining"]["until"]
    assert nodes["while_draining"] == 2
    assert nodes["ended"] == [[None, 1], [None, 1]]
    assert not nodes["seen_second"]
    assert any("is about to go at" in line for line in nodes["said"])
    assert sum("moves away from node" in line for line in nodes["said"]) >= 1


def test_a_node_whose_workers_keep_dying_is_set_aside_and_taken_back(nodes: dict[str, Any]) -> None:
    assert nodes["most"] == 3
    assert {failure for failure, _ in nodes["safe"]} == {None}
    assert max(attempts for _, attempts in nodes["safe"]) == 2, "the second attempt is on another node"
    assert nodes["aside"]["state"] == "set aside"
    assert nodes["aside"]["deaths"] >= 3
    assert "3 workers died or failed there, the last one: its process died" in nodes["aside"]["why"]
    assert sum("is set aside for 10 s: 3 workers died" in line for line in nodes["said"]) == 1
    assert any("is taken back: its time is over" in line for line in nodes["said"])
    assert nodes["back"] == "in use"
    assert nodes["failures"] == []


def test_nothing_is_lost_when_a_node_leaves(nodes: dict[str, Any]) -> None:
    assert nodes["after"] == [None] * 6
    assert sum(line.endswith("joined the cluster") for line in nodes["said"]) == 2


def test_nodes_that_go_while_the_workers_start_end_no_search(tmp_path: Path) -> None:
    found = run(STARTING, tmp_path)
    assert sum(": it" in line and "is replaced" in line for line in found["said"]) >= 4
    assert found["outcomes"] == [[None, 1]] * 4


def test_a_head_that_is_gone_is_told_at_once_and_does_not_hold_up_the_driver(tmp_path: Path) -> None:
    found = run(HEADLESS, tmp_path)
    (line,) = [line for line in found["said"] if "does not answer" in line]
    assert line.startswith("the head of the Ray cluster at ")
    assert "'meiosis resume'" in line
    assert found["failures"] == [None] * 3
    assert found["longest"] < 3.0, "seconds in one wait of 0.2"
