"""The files of docs/deploy: they parse, agree with each other and with the lock, and what can run here runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import short, write_config
from family import config_of

from search.store.events import End, Trial
from search.store.history import History

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
LOCKED = re.search(r"^ray==(.+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)[1]  # type: ignore[index]
BIN = Path(sys.executable).parent


def load(name: str) -> dict[str, Any]:
    (document,) = yaml.safe_load_all((DEPLOY / name).read_text())
    assert isinstance(document, dict)
    return document


def cluster_spec(name: str) -> dict[str, Any]:
    """The spec of a RayCluster, in whatever it stands."""
    document = load(name)
    spec = document["spec"]
    return dict(spec["rayClusterSpec"] if document["kind"] == "RayJob" else spec)


def test_every_file_is_named_by_the_page_and_every_link_leads_somewhere() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    linked = set(re.findall(r"\]\((deploy/[^)]+)\)", page))
    assert linked == {f"deploy/{path.name}" for path in DEPLOY.iterdir()}


def test_ray_is_everywhere_the_one_of_the_lock() -> None:
    versions = {}
    for path in [*DEPLOY.iterdir(), ROOT / "docs" / "cluster.md"]:
        text = path.read_text()
        found = re.findall(r"(?:ray(?:\[default\])?==|rayproject/ray:|rayVersion: \"|\bRay )(\d+\.\d+\.\d+)", text)
        versions[path.name] = set(found)
    assert all(found <= {LOCKED} for found in versions.values()), versions
    assert sum(bool(found) for found in versions.values()) >= 5


def test_the_cloud_file_is_one_that_ray_up_takes() -> None:
    import jsonschema
    import ray

    config = load("aws.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    assert "/home/ubuntu/.ray/auth_token" in config["file_mounts"]
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_a_manifest_is_what_kuberay_expects(name: str) -> None:
    document, spec = load(name), cluster_spec(name)
    assert document["apiVersion"] == "ray.io/v1"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(spec) == {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "Go wants strings"
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all(isinstance(one["value"], str) for one in container["env"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups}) == 1
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_of_kubernetes_goes_on_with_a_run_that_is_there(tmp_path: Path) -> None:
    """Its entrypoint, with a `meiosis` that prints what it was asked."""
    fake = tmp_path / "bin" / "meiosis"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    script = load("kuberay-job.yaml")["spec"]["entrypoint"].replace("/data", str(tmp_path))
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "RAY_ADDRESS": "10.0.0.1:6379"}

    def run() -> str:
        return subprocess.run(script, shell=True, env=environment, capture_output=True, text=True, check=True).stdout

    assert run() == "search search.yaml --run first --address 10.0.0.1:6379\n"
    (tmp_path / "results" / "first").mkdir(parents=True)
    (tmp_path / "results" / "first" / "run.yaml").touch()
    assert run() == "resume first --address 10.0.0.1:6379\n"


def test_the_job_script_of_slurm_is_bash() -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)


def test_the_configs_of_the_page_are_configs(family: Path, tmp_path: Path) -> None:
    from search.config import load_config

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        config = config_of(family, tmp_path) | yaml.safe_load(block)
        load_config(write_config(config, tmp_path))


# What runs here


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short path, for Ray's sockets; what still runs with it at the end is killed."""
    folder = Path(tempfile.mkdtemp(prefix="m-", dir="/tmp"))
    yield folder
    for pid in processes_of(folder):
        os.kill(pid, 9)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[int]:
    """Ray's processes whose files are in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def environment(place: Path, **more: str) -> dict[str, str]:
    """That of a shell in which Meiosis is installed, with a home of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{place / 'bin'}:{BIN}:{os.environ['PATH']}",
        "HOME": str(place),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAY_TMPDIR": str(place),
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


def ray_config(family: Path, place: Path) -> Path:
    config = short(config_of(family, place / "results"), budget=6)
    config["cluster"] = {"pool": "ray", "workers": 2, "threads": 1}
    return write_config(config, place)


def trials_of(run: Path) -> list[Trial]:
    with History.open(run / "history", writable=False) as history:
        events = history.events()
    assert isinstance(events[-1], End)
    return [event for event in events if isinstance(event, Trial)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_cluster_on_loopback_takes_who_has_the_token_and_nobody_else(family: Path, place: Path) -> None:
    config, address = ray_config(family, place), f"127.0.0.1:{free_port()}"
    shell = environment(place, RAY_AUTH_MODE="token")

    def run(*command: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=place, env=shell | changed, capture_output=True, text=True, timeout=400)

    assert run("ray", "get-auth-token", "--generate").returncode == 0
    assert (place / ".ray" / "auth_token").exists()
    port = address.rpartition(":")[2]
    head = ["ray", "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    started = run(*head, "--include-dashboard=false", "--object-store-memory=200000000")
    assert started.returncode == 0, started.stderr
    search = ["meiosis", "search", str(config), "--set", f"cluster.address={address}", "--run"]
    stranger = run(*search, "stranger", RAY_AUTH_TOKEN="0" * 64)
    assert stranger.returncode == 1, stranger.stderr
    (said,) = [line for line in stranger.stderr.splitlines() if line.startswith("meiosis:")]
    assert "if it asks for a token, set RAY_AUTH_MODE=token" in said
    assert "Traceback" not in stranger.stderr
    done = run(*search, "first")
    assert done.returncode == 0, done.stderr
    trials = trials_of(place / "results" / "first")
    assert len([trial for trial in trials if trial.items == "search"]) == 6
    assert all(trial.failure_kind is None for trial in trials)


SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" >> "$HOME/scontrol"; fi
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_job_script_of_slurm_searches_stops_when_told_and_goes_on(family: Path, place: Path) -> None:
    """On one machine: two raylets, with an `srun` that starts its command here."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = place / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (place / "env" / "bin").mkdir(parents=True)
    (place / "env" / "bin" / "activate").touch()
    config = ray_config(family, place)
    job = environment(
        place,
        SLURM_JOB_ID=str(free_port() % 10000),
        SLURM_JOB_NODELIST="node[1-2]",
        SLURM_CPUS_PER_TASK="1",
        MEIOSIS_ENV=str(place / "env"),
        MEIOSIS_REQUEUE="1",
    )

    def submit(name: str, *options: str) -> subprocess.Popen[str]:
        command = ["bash", str(DEPLOY / "slurm.sh"), str(config), name, *options]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=place, env=job, text=True, **pipes)  # type: ignore[call-overload,no-any-return]

    first = submit("first", "--set", "search.budget=40")
    history = place / "results" / "first" / "history"
    until = time.monotonic() + 300
    while not (history.exists() and len(History.open(history, writable=False)) > 4):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < until
        time.sleep(0.2)
    first.terminate()  # what Slurm sends the batch step before the time limit
    out, err = first.communicate(timeout=200)
    assert first.returncode == 130, (out, err)
    assert "go on with: meiosis resume" in err
    assert (place / "scontrol").read_text().split() == ["requeue", job["SLURM_JOB_ID"]]
    until = time.monotonic() + 60
    while processes_of(place) and time.monotonic() < until:
        time.sleep(0.5)
    assert processes_of(place) == [], "the steps of the job end with it"

    again = submit("first")
    out, err = again.communicate(timeout=500)
    assert again.returncode == 0, (out, err)
    trials = trials_of(place / "results" / "first")
    assert len([trial for trial in trials if trial.items == "search"]) == 40
    assert len({trial.worker for trial in trials if trial.worker}) >= 2
