"""A run goes on after its end, on another machine, with other versions, and after a full disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import ROOT, Ended, meiosis, short, write_config
from family import DOMAINS, config_of

from search import relocate
from search.budget import Used
from search.errors import UserError
from search.manifest import changed_versions, versions
from search.relocate import Places, relocated
from search.store.events import Ask, End, Event, LimitReached, Trial
from search.store.history import History, digest
from search.store.sessions import Sessions
from search.verdict import Verdict


def events(run: Path) -> list[Event]:
    with History.open(run / "history", writable=False) as history:
        return history.events()


def asks(run: Path) -> list[object]:
    return [event.deterministic() for event in events(run) if isinstance(event, Ask)]


def results(run: Path) -> dict[tuple[int, str], object]:
    return {(e.candidate, e.items): e.deterministic() for e in events(run) if isinstance(e, Trial)}


def one_line(ended: Ended, *texts: str, status: int = 2) -> None:
    assert ended.status == status, ended
    assert ended.err.splitlines()[-1].startswith("meiosis: ")
    assert ended.err.count("meiosis: ") == 1, ended.err
    for text in texts:
        assert text in ended.err


# Extension


@pytest.fixture(scope="module")
def extended(family: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of 8 candidates that was extended to 14, and one that had 14 from its start."""
    folder = tmp_path_factory.mktemp("extended")
    config = write_config(short(config_of(family, folder / "runs"), budget=8), folder)
    first = meiosis("search", config, "--run", "grown")
    run = folder / "runs" / "grown"
    before = (run / "best" / "README.md").read_text()
    second = meiosis("resume", run, "--budget", 14)
    assert (first.status, second.status) == (0, 0), second.err
    assert meiosis("search", config, "--run", "large", "--budget", 14).status == 0
    return {"run": run, "large": run.parent / "large", "card": before, "first": first, "second": second}


def test_a_finished_run_goes_on_to_what_the_larger_budget_would_have_found(extended: dict[str, Any]) -> None:
    run, large = extended["run"], extended["large"]
    assert asks(run) == asks(large)
    searched = {key: value for key, value in results(run).items() if key[1] == "search"}
    assert searched == {key: value for key, value in results(large).items() if key[1] == "search"}
    keys = [(e.candidate, e.items) for e in events(run) if isinstance(e, Trial)]
    assert len(keys) == len(set(keys))


def test_both_verdicts_stay_and_the_model_is_that_of_the_second(extended: dict[str, Any]) -> None:
    run = extended["run"]
    first, second = (Verdict.from_json(e.verdict) for e in events(run) if isinstance(e, End))
    assert (first.earlier, second.earlier) == (0, 1)
    assert second.candidates_searched > first.candidates_searched
    assert "extended after 1 earlier verdict" in second.sentence()
    marker = json.loads((run / "best" / "meiosis.json").read_text())
    assert marker["weights_sha256"] == second.weights_sha256
    assert second.sentence() in (run / "best" / "README.md").read_text()
    assert second.sentence() not in extended["card"]
    assert "budget of 14 candidates" in (run / "report.md").read_text()
    assert "budget of 14 candidates" in extended["second"].err
    assert "14/14 candidates" in extended["second"].err
    status = meiosis("status", run, "--json").json
    used = Used.of(events(run), Sessions(run / "sessions.json"))
    assert status["used"]["item_evaluations"] == used.item_evaluations > 0
    assert (status["state"], status["done"], status["budget"], status["sessions"]) == ("finished", 14, 14, 2)
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_death_between_the_second_verdict_and_its_model_exports_it_afterwards(
    extended: dict[str, Any], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(extended["run"], tmp_path / "run"))
    (run / "best" / "README.md").write_text(extended["card"])
    before = digest(events(run))
    ended = meiosis("resume", run)
    assert ended.status == 0, ended.err
    assert "exporting the winner" in ended.err
    assert digest(events(run)) == before
    assert "exporting the winner" not in meiosis("resume", run).err


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["--budget", "14"], ["no"]),
        (["--budget", "10"], ["--budget 10", "14 candidates already", "at least 15"]),
        (["--budget", "0"], ["--budget 0", "greater than or equal to 1"]),
        (["--wall-clock", "8"], ["--wall-clock 8", "8h, 30m"]),
        (["--gpu-hours", "x"], ["--gpu-hours x"]),
        (["--budget", "20", "--item-evaluations", "24"], ["--item-evaluations"]),
    ],
)
def test_limits_that_allow_nothing_change_nothing(
    options: list[str], texts: list[str], extended: dict[str, Any]
) -> None:
    run = extended["run"]
    before = digest(events(run))
    ended = meiosis("resume", run, *options)
    if texts == ["no"]:  # what it has already: as without
        assert ended.status == 0
    else:
        one_line(ended, *texts)
    assert digest(events(run)) == before


def test_time_ends_a_search_and_the_finals_still_run(family: Path, tmp_path: Path) -> None:
    config = short(config_of(family, tmp_path / "runs"), budget=5000)
    path = write_config(config, tmp_path)
    ended = meiosis("search", path, "--run", "timed", "--wall-clock", "1s")
    assert ended.status == 0, ended.err
    run = tmp_path / "runs" / "timed"
    assert "limit of wall-clock" in ended.err
    assert "limit of wall-clock" in (run / "report.md").read_text()
    assert sum(isinstance(event, LimitReached) for event in events(run)) == 1
    asked = len(asks(run))
    assert asked < 5000
    status = meiosis("status", run)
    assert "finished" in status.out
    assert "Limit wall_clock: " in status.out
    assert "of 1s used" in status.out
    assert meiosis("resume", run).out == ended.out
    one_line(meiosis("resume", run, "--budget", asked + 2), "--wall-clock")
    more = meiosis("resume", run, "--budget", asked + 2, "--wall-clock", "none")
    assert more.status == 0, more.err
    assert len(asks(run)) == asked + 2


def test_item_evaluations_below_the_parents_are_refused(family: Path, tmp_path: Path) -> None:
    path = write_config(short(config_of(family, tmp_path / "runs")), tmp_path)
    one_line(meiosis("plan", path, "--set", "search.limits.item_evaluations=30"), "item_evaluations", "too small")
    one_line(meiosis("search", path, "--item-evaluations", "3,0"), "item_evaluations", "30 is too small")
    one_line(meiosis("search", path, "--gpu-hours", "x"), "search.limits.gpu_hours")
    one_line(meiosis("plan", path, "--set", "search.limits.wall_clok=3h"), "did you mean 'wall_clock'?")
    one_line(meiosis("plan", path, "--set", "search.limits.wall_clock=3"), "3 is no time")


# Moving


def stopped(config: dict[str, Any], folder: Path) -> Path:
    """A run that stopped before its first candidate; returns its folder."""
    from search.config import load_config
    from search.errors import InterruptedRun
    from search.run import Watcher, start
    from search.setup import check

    def no_pool(*_: object) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        start(check(load_config(write_config(config, folder))), no_pool, Watcher(), "run")
    return Path(config["results"]) / "run"


@pytest.fixture
def project(family: Path, tmp_path: Path) -> Path:
    """A folder with a family, its data and a stopped run."""
    folder = tmp_path / "here"
    shutil.copytree(family, folder / "models")
    shutil.move(folder / "models" / "data", folder / "texts")
    config = short(config_of(folder / "models", folder / "runs"))
    for name in DOMAINS:
        paths = config["evaluators"][name]["data"]
        config["evaluators"][name]["data"] = {
            pool: path.replace("/models/data/", "/texts/") for pool, path in paths.items()
        }
    stopped(config, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert meiosis("search", write_config(short(config_of(family, folder)), folder), "--run", "run").status == 0
    return folder / "run"


def test_a_project_that_moved_as_a_whole_goes_on_without_a_word(
    project: Path, undisturbed: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "there" / "deep"
    moved.parent.mkdir()
    project.rename(moved)
    ended = meiosis("resume", moved / "runs" / "run")
    assert ended.status == 0, ended.err
    assert "found by its hash" in ended.err
    assert digest(events(moved / "runs" / "run")) == digest(events(undisturbed))


def test_models_under_other_names_are_found_by_their_hash_and_data_by_the_end_of_their_path(
    project: Path, undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (store / "deep").mkdir(parents=True)
    for number, name in enumerate(("cpp", "base", "python", "english")):
        (project / "models" / name).rename(store / "deep" / f"m{number}")
    # A model of that name with other weights does not pass for it.
    shutil.copytree(store / "deep" / "m0", store / "python")
    (project / "texts").rename(tmp_path / "texts")
    run = tmp_path / "run"
    (project / "runs" / "run").rename(run)
    one_line(meiosis("resume", run), "models.base", "is gone", "--models DIR")
    missing = meiosis("resume", run, "--models", store)
    one_line(missing, "evaluators.", "search.jsonl is gone", "--data DIR")
    ended = meiosis("resume", run, "--models", store, "--data", tmp_path / "texts")
    assert ended.status == 0, ended.err
    assert f"model 'python' found by its hash: {store / 'deep' / 'm2'}" in ended.err
    assert digest(events(run)) == digest(events(undisturbed))
    # The places are remembered.
    exported = meiosis("export", run, tmp_path / "out", "--trial", 0)
    assert exported.status == 0, exported.err


def test_a_model_that_is_nowhere_is_named_with_its_hash(project: Path) -> None:
    run = project / "runs" / "run"
    recorded = yaml.safe_load((run / "run.yaml").read_text())["models"]["english"]["sha256"]
    shutil.rmtree(project / "models" / "english")
    one_line(
        meiosis("resume", run, "--models", project / "models"), "models.sources.english", recorded[:12], "--models"
    )


def test_a_model_whose_files_changed_is_taken_from_where_it_is_unchanged(
    project: Path, family: Path, undisturbed: Path
) -> None:
    shutil.rmtree(project / "models" / "english")
    shutil.copytree(family / "cpp", project / "models" / "english")
    run = project / "runs" / "run"
    one_line(meiosis("resume", run), "model 'english'", "is not the one", "--models DIR", status=1)
    assert meiosis("resume", run, "--models", family).status == 0
    assert digest(events(run)) == digest(events(undisturbed))


def test_text_that_only_begins_like_a_path_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
    models = {"base": str(tmp_path / "base"), "sources": {"a": str(tmp_path / "a")}}
    speed = {
        "use": "python",
        "function": f"{tmp_path}/then/score.py:score",
        "metrics": {"tokens": {"unit": "/s", "help": "/what/is/this"}},
        "data": f"{tmp_path}/then/items.jsonl",
    }
    manifest = {
        "config": {"models": models, "evaluators": {"speed": speed}},
        "models": {"base": {"sha256": ""}, "a": {"sha256": ""}},
    }
    now = tmp_path / "now"
    (now / "s").mkdir(parents=True)
    places = Places((now,), tmp_path, tmp_path)
    monkeypatch.setattr(relocate, "_sha256", lambda *_: "")
    with pytest.raises(UserError, match=r"score.py is gone.*--data DIR"):
        relocated(manifest, "run.yaml", replace(places, named=()))
    (now / "score.py").touch()
    with pytest.raises(UserError, match=r"evaluators.speed.data: .*items.jsonl is gone.*--data DIR"):
        relocated(manifest, "run.yaml", places)
    (now / "items.jsonl").touch()
    assert relocated(manifest, "run.yaml", places)["evaluators"] == {
        "speed": speed | {"function": f"{now}/score.py:score", "data": f"{now}/items.jsonl"}
    }


def test_a_hub_model_is_found_in_the_cache_of_another_machine(
    family: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(cache: Path) -> Path:
        snapshot = cache / "models--org--cpp" / "snapshots" / ("a" * 40)
        shutil.copytree(family / "cpp", snapshot)
        (cache / "models--org--cpp" / "refs").mkdir()
        (cache / "models--org--cpp" / "refs" / "main").write_text("a" * 40)
        return snapshot

    config = short(config_of(family, tmp_path / "runs"))
    config["models"]["sources"]["cpp"] = str(cached(tmp_path / "one"))
    run = stopped(config, tmp_path)
    shutil.rmtree(tmp_path / "one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    one_line(meiosis("resume", run), "models.sources.cpp", "is gone")
    cached(tmp_path / "two")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "two"))
    ended = meiosis("resume", run)
    assert ended.status == 0, ended.err
    assert digest(events(run)) == digest(events(undisturbed))


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_of_one_process_goes_on_with_ray_and_the_other_way_round(
    family: Path, undisturbed: Path, tmp_path: Path
) -> None:
    config = short(config_of(family, tmp_path / "runs"))
    config["search"]["window"] = 4
    run = stopped(config, tmp_path)
    ended = meiosis("resume", run, "--pool", "ray", "--workers", 1)
    assert ended.status == 0, ended.err
    assert digest(events(run)) == digest(events(undisturbed))
    (node,) = meiosis("status", run, "--json").json["workers"]["nodes"]
    assert (node["state"], len(node["workers"])) == ("in use", 1)
    config["cluster"]["pool"] = "ray"
    (tmp_path / "second").mkdir()
    config["results"] = str(tmp_path / "second")
    other = stopped(config, tmp_path / "second")
    assert meiosis("resume", other, "--pool", "local").status == 0
    assert digest(events(other)) == digest(events(undisturbed))


# Other versions


def test_other_versions_are_said_with_what_they_mean(project: Path) -> None:
    path = project / "runs" / "run" / "run.yaml"
    manifest = yaml.safe_load(path.read_text())
    manifest["versions"] |= {"cma": "0.9", "torch": "1.0", "ray": "2.0"}
    manifest["machine"] |= {"processor": "pdp11", "device": "cuda"}
    path.write_text(yaml.safe_dump(manifest, sort_keys=False))
    ended = meiosis("resume", path.parent)
    assert ended.status == 0, ended.err
    lines = {name: next(line for line in ended.err.splitlines() if f" {name}" in line) for name in ("cma", "torch")}
    assert "cma 0.9, now it is" in lines["cma"]
    assert "compared ask by ask" in lines["cma"]
    assert "last bits" in lines["torch"]
    assert "ray 2.0" in ended.err
    assert "changes nothing that is recorded" in ended.err
    assert "processor of kind pdp11" in ended.err
    assert "on cuda, now on cpu" in ended.err


@pytest.mark.parametrize(
    ("optimizer", "said"), [("TwoPointsDE", "proposes may differ"), ("diagonal_cma", "changes nothing")]
)
def test_another_nevergrad_means_something_where_it_proposes(optimizer: str, said: str) -> None:
    config = {"search": {"optimizer": {"name": optimizer}}}
    (line,) = changed_versions({"config": config, "versions": versions() | {"nevergrad": "0.9"}})
    assert line.startswith("the run started with nevergrad 0.9, now it is")
    assert said in line


def test_another_scipy_may_mean_other_proposals_and_older_runs_do_not_know_theirs() -> None:
    config = {"search": {"optimizer": {"name": "gaussian_process"}}}
    (line,) = changed_versions({"config": config, "versions": versions() | {"scipy": "0.9"}})
    assert "proposes may differ" in line
    known = {name: version for name, version in versions().items() if name != "scipy"}
    assert not list(changed_versions({"config": config, "versions": known}))


# A full disk

FULL_DISK = """
import json, os, pathlib, subprocess, sys
disk, config = pathlib.Path(sys.argv[1]), sys.argv[2]
START = "from meiosis.cli.main import main; main()"
def run(*arguments):
    done = subprocess.run([sys.executable, "-c", START, *arguments], capture_output=True, text=True)
    return done.returncode, done.stderr
ballast = disk / "ballast"
def fill(left_bytes):
    ballast.unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(max(0, free - left_bytes)))
ends = []
fill(int(sys.argv[3]))
ends.append(run("search", config, "--run", "run"))
ends.append(run("resume", str(disk / "runs" / "run")))  # still full
ballast.unlink()
ends.append(run("resume", str(disk / "runs" / "run")))
from search.store.history import History, digest
with History.open(disk / "runs" / "run" / "history", writable=False) as history:
    print(json.dumps({"ends": ends, "digest": digest(history.events())}))
"""


@pytest.mark.slow
def test_a_full_disk_stops_a_run_in_one_line_and_it_goes_on_when_there_is_room(
    family: Path, undisturbed: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    config = write_config(short(config_of(family, disk / "runs")), tmp_path)
    (tmp_path / "body.py").write_text(FULL_DISK)
    script = 'mount -t tmpfs -o size=8m tmpfs "$1" || exit 77; exec "$2" "$3" "$1" "$4" "$5"'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", disk, sys.executable, tmp_path / "body.py", config]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([*command, str(60 << 10)], capture_output=True, text=True, env=environment)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("not allowed to mount here")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (first, said), (second, again), (third, _) = found["ends"]
    assert (first, second, third) == (1, 1, 0), found["ends"]
    for text in (said, again):
        assert "Traceback" not in text
        last = text.splitlines()[-1]
        assert last.startswith("meiosis: the disk of ")
        assert "is full" in last
        assert f"meiosis resume {disk / 'runs' / 'run'}" in last
    assert found["digest"] == digest(events(undisturbed))
