"""Copies through a real cluster: raylets whose mount namespace hides the models and has a disk of its own.

The nodes share this machine, so each is started in a mount namespace in which the folder of the models and that
of the cache are file systems of its own: it truly does not see what the driver sees, nor what other nodes keep.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from family import config_of
from packages import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


@cache
def unshare() -> tuple[str, ...] | None:
    """The command that starts a process in a mount namespace; None where this user may not."""
    for command in (("unshare", "-m"), ("unshare", "-rm")):
        try:
            done = subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, timeout=30)
        except OSError:
            return None
        if done.returncode == 0:
            return command
    return None


START = """
import atexit, contextlib, json, os, signal, subprocess, sys, time
from pathlib import Path
unshare, models, cache, notes = sys.argv[1].split(), *map(Path, sys.argv[2:5])
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", MEIOSIS_CACHE=str(cache))
raylets = []

def add_hidden_node(address, disk, **resources):
    script = f'mount -t tmpfs none {models} && mount -t tmpfs -o size={disk} none {cache} && exec "$@"'
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={address}", "--num-cpus=1",
           "--object-store-memory=80000000", f"--resources={json.dumps(resources)}"]
    raylets.append(subprocess.Popen([*unshare, "sh", "-c", script, "sh", *ray], stdout=subprocess.DEVNULL,
                                    start_new_session=True))

def nodes(count):
    import ray
    end = time.monotonic() + 120
    while sum(node["Alive"] for node in ray.nodes()) != count:
        assert time.monotonic() < end, "the nodes did not come"
        time.sleep(0.2)

def start():
    from ray.cluster_utils import Cluster
    import ray
    cluster = Cluster(True, head_node_args=dict(num_cpus=1, include_dashboard=False, object_store_memory=80_000_000))
    add_hidden_node(cluster.address, "300m", hidden=4)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    nodes(2)
    ray.shutdown()
    return cluster

@atexit.register
def end_raylets():
    for raylet in raylets:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(raylet.pid, signal.SIGKILL)

def end(cluster):
    for raylet in raylets:
        os.killpg(raylet.pid, signal.SIGTERM)
    for raylet in raylets:
        raylet.wait(60)
    cluster.shutdown()
"""

SEARCH = """
if __name__ == "__main__":
    cluster = start()
    from cluster.pool import RayPool
    from search.config import load_config
    from search.errors import WorkerError
    from search.pool import Job
    from search.recipe import Recipe, Rule
    from search.setup import check
    from search.store.copied import read_copied
    from search.worker_plan import worker_plan
    from meiosis.cli.memory import memory_plan
    overrides = (f"cluster.address={cluster.address}", "cluster.pool=ray")
    setup = check(load_config(notes / "config.yaml", overrides))
    planned = memory_plan(setup)
    plan = worker_plan(setup)

    def candidate(number):
        sources = {"python": {"weight": 0.1 * (number % 2)}, "cpp": {"weight": 0.3}}
        rule = Rule(operator="task_arithmetic", sources=sources)
        return Job(number, Recipe(base="base", models=plan.models, rules=(rule,)), "search", hash_weights=True)

    def run(workers):
        said = []
        pool = RayPool(plan, workers=workers, working_folder=notes, address=cluster.address, report=said.append)
        found, number = {}, 0
        try:
            pool.ready()
            while len({o.worker for o in found.values()}) < workers or len(found) < 8:
                assert number < 200, "one of the workers gets no job"
                pool.submit(candidate(number))
                pool.submit(candidate(number + 1))
                number += 2
                while pool.busy or len(found) < number:
                    found.update({o.candidate: o for o in pool.wait(5)})
        finally:
            pool.close()
        return found, said

    first, said = run(2)
    _, said_later = run(2)
    results = [(o.candidate % 2, o.weights_sha256, sorted(o.metrics.items()), o.failure) for o in first.values()]
    add_hidden_node(cluster.address, "400k", small=1)
    import ray
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    nodes(3)
    ray.shutdown()
    full = ""
    try:
        run(3)
    except WorkerError as error:
        full = str(error)
    end(cluster)
    print(json.dumps(dict(
        said=said, said_later=said_later, full=full, workers=len({o.worker for o in first.values()}),
        results=results, copied=[vars(one) for one in read_copied(notes / "copied.jsonl")],
        lacks=[share.node.lacks for share in planned.shares], slots=[share.node.slots for share in planned.shares],
        seen=[str(p) for p in (cache / "shards").glob("*")] if (cache / "shards").exists() else [])))
"""

KILLS = """
def descendants(word):
    parents, found = {}, []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if word in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    def ours(pid):
        while pid and pid != os.getpid():
            pid = parents.get(pid, 0)
        return bool(pid)
    return [pid for pid in found if ours(pid)]

class Receiver:
    def run(self, offer, source):
        import pickle, resource, time
        import cluster.receiving as receiving
        from cluster.receiving import ActorChannel, locate
        receiving.PIECE_BYTES, receiving.REPORT_SECONDS = 1 << 20, 0.0
        class Slow(ActorChannel):
            def take(self, asked):
                time.sleep(0.05)
                return super().take(asked)
        import cluster.shards, search.checkpoints.fingerprint, search.checkpoints.reading
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        located = locate(pickle.loads(offer), Slow(source))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return str(located.checkpoints["big"].folder), grown / 1024

if __name__ == "__main__":
    import numpy as np
    from safetensors.numpy import save_file
    (models / "big").mkdir()
    (models / "big" / "config.json").write_text("{}")
    save_file({"a": np.random.default_rng(0).random(12_000_000, np.float32)}, models / "big" / "model.safetensors")
    cluster = start()
    import ray
    from cluster.handshake import identity
    from cluster.sending import Sender
    from cluster.shards import shard_refs
    from search.pool import WorkerPlan
    from search.recipe import ModelRef
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    plan = WorkerPlan({"big": ModelRef(path=str(models / "big"))}, "big", ())
    sender = Sender(plan, shard_refs(plan.models), "auto", own=False, identity=identity(), notes=notes / "copied.jsonl")
    said = []

    def until(percent):
        limit = time.monotonic() + 120
        while not any(f"copied {p} %" in line for line in said for p in range(percent, 100)):
            assert time.monotonic() < limit, said
            said.extend(sender.news(0.1))

    receivers = ray.remote(Receiver).options(num_cpus=0, resources={"hidden": 1})
    one = receivers.remote()
    call = one.run.remote(sender.offer, sender.handle)
    until(30)
    (actor,) = descendants(b"ray::MeiosisSource")
    os.kill(actor, signal.SIGKILL)
    until(60)
    restarted = descendants(b"ray::MeiosisSource")
    ray.kill(one)
    folder, grown = ray.get(receivers.remote().run.remote(sender.offer, sender.handle))
    said.extend(sender.news(30))
    said.extend(sender.close())
    ray.shutdown()
    end(cluster)
    from search.store.copied import read_copied
    print(json.dumps(dict(said=said, folder=folder, grown=grown, restarted=restarted != [actor],
                          copied=[vars(c) for c in read_copied(notes / "copied.jsonl")])))
"""


def run(script: str, tmp_path: Path, models: Path) -> dict[str, Any]:
    command = unshare()
    if command is None:
        pytest.skip("this user may not make mount namespaces")
    (tmp_path / "driver.py").write_text(START + script)
    for name in ("cache", "notes"):
        (tmp_path / name).mkdir(exist_ok=True)
    arguments = [" ".join(command), str(models), str(tmp_path / "cache"), str(tmp_path / "notes")]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=360,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_a_node_without_the_files_gets_them_once_and_scores_the_same_bits(family: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(family, models)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.yaml").write_text(yaml.safe_dump(config_of(models, tmp_path / "results")))
    found = run(SEARCH, tmp_path, models)
    assert found["workers"] == 2
    assert len({json.dumps(result) for result in found["results"]}) == 2, "one result for each of two recipes"
    assert all(failure is None for *_, failure in found["results"])

    (copied,) = found["copied"]
    sizes = [path.stat().st_size for path in models.rglob("*") if path.is_file()]
    assert 0.9 * sum(sizes) < copied["nbytes"] <= sum(sizes)
    assert sum("copying model 'base' and 12 more (" in line for line in found["said"]) == 1
    assert sum("kept for later runs" in line for line in found["said"]) == 1
    assert not any("cop" in line for line in found["said_later"])
    assert found["seen"] == [], "the driver's own node needs no copy"

    weights = sum(path.stat().st_size for path in models.rglob("*.safetensors"))
    assert sorted(found["lacks"]) == [0, weights]
    assert "has room for" in found["full"]
    assert "for copies of models that this node does not see; make room there" in found["full"]
    assert "\n" not in found["full"]


@pytest.mark.slow
def test_a_sender_and_a_receiver_that_are_killed_cost_no_byte_that_was_there(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    found = run(KILLS, tmp_path, models)
    assert found["restarted"]
    (copied,) = found["copied"]
    size = (models / "big" / "model.safetensors").stat().st_size
    assert copied["nbytes"] < 0.5 * size, "60 % were there before the receiver was killed"
    assert found["folder"].startswith(str(tmp_path / "cache"))
    assert found["grown"] < 40, "MiB, of a model of 46 MiB"
