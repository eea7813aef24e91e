"""Joining a cluster: one that asks for no token is joined with a warning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packages import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

JOIN = """
import json, os, sys
from pathlib import Path
notes = Path(sys.argv[1])
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

if __name__ == "__main__":
    from ray.cluster_utils import Cluster
    cluster = Cluster(True, head_node_args=dict(num_cpus=1, include_dashboard=False, object_store_memory=10**8))
    if sys.argv[2]:  # a user who has a token, and trusts that it is asked for
        os.environ["RAY_AUTH_MODE"] = sys.argv[2]
        from ray._raylet import Config
        Config.initialize("")
    from worker_bodies import job, plan
    from cluster.pool import RayPool
    said = []
    with RayPool(plan(notes), workers=1, body="worker_bodies:Scripted", working_folder=notes,
                 address=cluster.address, report=said.append) as pool:
        pool.submit(job(3))
        while not (outcomes := pool.wait(5)):
            pass
    cluster.shutdown()
    print(json.dumps(dict(said=said, squares=[outcome.metrics["test.square"] for outcome in outcomes])))
"""


def join(cluster: str, user: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Join a new cluster of that mode, as a user whose mode is the second."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "RAY_AUTH_MODE": cluster,
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
    }
    command = [sys.executable, "-c", JOIN, str(folder), user]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def test_a_cluster_that_asks_for_no_token_is_joined_with_one_line_of_warning(tmp_path: Path) -> None:
    done = join("disabled", "", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["squares"] == [9.0]
    (line,) = [line for line in found["said"] if line.startswith("warning:")]
    assert "asks for no token" in line
    assert "whoever reaches its ports runs code on its nodes" in line
    assert "start its nodes with RAY_AUTH_MODE=token" in line


def test_a_cluster_that_asks_for_the_token_is_joined_without_a_warning(tmp_path: Path) -> None:
    done = join("token", "", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["squares"] == [9.0]
    assert not any("token" in line for line in found["said"])
    assert "Unauthenticated" not in done.stderr


def test_who_has_a_token_does_not_join_a_cluster_that_does_not_ask_for_it(tmp_path: Path) -> None:
    done = join("disabled", "token", tmp_path)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("search.errors.WorkerError: ")]
    assert "asks for no token, but RAY_AUTH_MODE=token is set here" in line
