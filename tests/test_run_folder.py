"""The folder of a run, its lock, and the spool of finished evaluations."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from history_bodies import event
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.errors import MeiosisError
from search.errors import RunError, UserError
from search.store.columns import encode
from search.store.events import Trial
from search.store.run_folder import RunFolder
from search.store.segment import header
from search.store.side_files import SideFiles
from search.store.spool import Spool

ROOT = Path(__file__).parent.parent


def test_a_run_appears_with_its_manifest(tmp_path: Path) -> None:
    manifest = {"name": "first", "window": 4, "config": {"seed": 0, "text": "naïve"}, "rates": [0.1, 1e-5]}
    run = RunFolder.create(tmp_path / "results", "first", manifest)
    assert run.path == tmp_path / "results" / "first"
    assert run.name == "first"
    assert run.manifest() == manifest
    assert [path.name for path in run.path.iterdir()] == ["run.yaml"]
    assert [path.name for path in run.path.parent.iterdir()] == ["first"]
    others = [run.history, run.spool, run.best, run.report, run.log]
    assert [path.name for path in others] == ["history", "spool", "best", "report.md", "run.log"]
    assert run.path.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "first", {"seed": 1})
    with pytest.raises(UserError, match=r"'first' already exists.*`meiosis resume /.*/first` or choose another --run"):
        RunFolder.create(tmp_path, "first", {"seed": 2})
    assert run.manifest() == {"seed": 1}
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "table.md").write_text("mine")
    with pytest.raises(UserError, match="reference exists and is not a run; choose another --run"):
        RunFolder.create(tmp_path, "reference", {})
    (tmp_path / "note").write_text("a file")
    with pytest.raises(UserError, match="note exists and is not a run"):
        RunFolder.create(tmp_path, "note", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "note", "reference"]
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path, "empty", {"seed": 3}).manifest() == {"seed": 3}


def test_of_many_who_create_a_run_at_once_one_wins(tmp_path: Path) -> None:
    def create(seed: int) -> int | None:
        try:
            RunFolder.create(tmp_path, "first", {"seed": seed})
        except UserError:
            return None
        return seed

    with ThreadPoolExecutor(8) as threads:
        winners = [seed for seed in threads.map(create, range(40)) if seed is not None]
    assert len(winners) == 1
    assert RunFolder.find(tmp_path, "first").manifest() == {"seed": winners[0]}
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_run_without_a_name_is_called_after_its_config_and_the_time(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path, None, {"name": "my search/2"}).name for _ in range(3)]
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"my-search-2-\d{8}-\d{6}(-\d)?", name) for name in names)
    assert RunFolder.create(tmp_path, None, {}).name.startswith("run-")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/tmp/a", "a\0b", "a\nb", " a", "-a", "x" * 129])
def test_a_name_that_is_no_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a run"):
        RunFolder.create(tmp_path / "results", name, {})
    assert not (tmp_path / "results").exists()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12))
def test_any_name_is_refused_or_gives_a_run_in_the_root_that_is_found(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    root: Path = tmp_path_factory.mktemp("names") / "results"
    try:
        run = RunFolder.create(root, name, {})
    except UserError:
        return
    assert [path.name for path in root.iterdir()] == [run.name]
    assert RunFolder.find(root, name).path == run.path


def test_a_run_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "results"
    run = RunFolder.create(root, "first", {})
    RunFolder.create(root, "second", {})
    monkeypatch.chdir(tmp_path)
    for text in ("first", "first/", "results/first", str(run.path), run.path):
        assert RunFolder.find(root, text).path.resolve() == run.path.resolve()
    assert RunFolder.find(Path("elsewhere"), "results/first").name == "first"
    with pytest.raises(UserError, match=r"no run 'frist' in .*; did you mean 'first'"):
        RunFolder.find(root, "frist")
    with pytest.raises(UserError, match="no run '' in"):
        RunFolder.find(root, "")
    with pytest.raises(UserError, match=r"no run 'first' in .*; there is none"):
        RunFolder.find(tmp_path / "none", "first")


def test_runs_are_listed_by_age_and_other_folders_are_not(tmp_path: Path) -> None:
    assert RunFolder.list_runs(tmp_path / "none") == []
    for age, name in enumerate(["b", "c", "a"]):
        run = RunFolder.create(tmp_path, name, {})
        os.utime(run.config, (age, age))
    (tmp_path / "reference").mkdir()
    (tmp_path / ".d.tmp").mkdir()
    (tmp_path / ".d.tmp" / "run.yaml").write_text("{}")
    assert [run.name for run in RunFolder.list_runs(tmp_path)] == ["b", "c", "a"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"a: [", b"\xff\xfe", b"a: !!python/object/apply:os.getpid []"])
def test_a_damaged_manifest_is_an_error_in_one_line(tmp_path: Path, content: bytes) -> None:
    run = RunFolder.create(tmp_path, "first", {})
    run.config.write_bytes(content)
    with pytest.raises(RunError, match=r"run\.yaml") as caught:
        run.manifest()
    assert "\n" not in str(caught.value)


HOLD = """
import os, sys, time
from pathlib import Path
from search.store.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    if sys.argv[2] == "fork" and os.fork() == 0:
        print(os.getpid(), flush=True)
    elif sys.argv[2] == "hold":
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def _hold(run: RunFolder, how: str) -> tuple[subprocess.Popen[str], int]:
    """A process that has the lock, and the id that it (or its fork) printed when it was ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path), how],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def test_a_second_driver_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "first", {})
    assert run.owner() is None
    process, pid = _hold(run, "hold")
    try:
        expected = f"run 'first' is in use by process {pid} on .+ since 20.+; stop it first"
        with pytest.raises(RunError, match=expected), run.lock():
            pass
        owner = run.owner()
        assert owner is not None
        assert owner.pid == pid
    finally:
        process.kill()
        process.communicate()
    assert run.owner() is None
    with run.lock():
        owner = run.owner()
        assert owner is not None
        assert owner.pid == os.getpid()
        with pytest.raises(RunError, match="in use"), RunFolder(run.path).lock():
            pass
    with run.lock():
        pass
    assert run.owner() is None


def test_a_child_that_outlives_the_driver_does_not_keep_the_lock(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "first", {})
    process, child = _hold(run, "fork")
    try:
        with pytest.raises(RunError, match=f"process {process.pid} "), run.lock():
            pass
        process.kill()
        process.wait()
        os.kill(child, 0)
        with run.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_an_exception_releases_the_lock_and_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "first", {})
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    with run.lock():
        pass
    with pytest.raises(MeiosisError, match="cannot open the lock"), RunFolder(tmp_path / "none").lock():
        pass


def _trial(candidate: int) -> Trial:
    trial = event(2 * candidate + 1)
    assert isinstance(trial, Trial)
    return trial


def test_the_spool_gives_back_what_was_put_until_it_is_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", trials_per_file=1)
    assert spool.take_all() == {}
    for candidate in (11, 3, 7):
        spool.put(candidate, "search", _trial(candidate))
    expected = {(candidate, "search"): _trial(candidate) for candidate in (3, 7, 11)}
    for _ in range(2):
        found = Spool(tmp_path / "spool").take_all()
        assert found == expected
        assert list(found) == list(expected)
    spool.drop(7, "search")
    spool.drop(7, "search")
    assert set(Spool(tmp_path / "spool").take_all()) == {(3, "search"), (11, "search")}


def _older_entry(folder: Path, candidate: int) -> Path:
    """What a spool of an older version kept: a file per trial, named and numbered by its key."""
    path = folder / f"{candidate:08d}-search.arrow"
    path.write_bytes(header() + encode(_trial(candidate), candidate, SideFiles(folder, math.inf)))
    return path


def test_damaged_entries_of_the_spool_are_removed_and_the_others_stay(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    path, other = (_older_entry(tmp_path, candidate) for candidate in (1, 2))
    data = path.read_bytes()
    harmed = [data[:size] for size in range(0, len(data), 97)]
    harmed += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data) - 2000, len(data), 97)]
    harmed += [data + b"\0", data + data, b"\xff" * 100, other.read_bytes()]
    for content in harmed:
        path.write_bytes(content)
        assert spool.take_all() == {(2, "search"): _trial(2)}
        assert not path.exists()
    for name in ("x-search.arrow", "00000009-none.arrow", ".00000001-search.arrow.tmp"):
        (tmp_path / name).write_bytes(data)
    assert spool.take_all() == {(2, "search"): _trial(2)}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["00000002-search.arrow", "items"]
    spool.drop(2, "search")
    assert [entry.name for entry in tmp_path.iterdir()] == ["items"]


def test_a_file_of_the_spool_cut_or_harmed_anywhere_gives_back_whole_trials_only(tmp_path: Path) -> None:
    candidates = (5, 3, 8, 1)
    Spool(tmp_path).put_all([_trial(candidate) for candidate in candidates])
    (path,) = tmp_path.glob("*.arrows")
    data = path.read_bytes()
    beginnings = [{(c, "search"): _trial(c) for c in candidates[:count]} for count in range(5)]
    seen = set()
    for size in range(0, len(data), 61):
        path.write_bytes(data[:size])
        found = Spool(tmp_path).take_all()
        assert found in beginnings
        assert path.exists() == bool(found)
        seen.add(len(found))
    assert seen == {0, 1, 2, 3}
    for at in range(len(header()), len(data), 61):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert Spool(tmp_path).take_all() in beginnings
    path.write_bytes(data + b"garbage")
    spool = Spool(tmp_path)
    assert spool.take_all() == beginnings[4]
    spool.put_all([_trial(9)])  # goes to a file of its own
    assert set(Spool(tmp_path).take_all()) == {*beginnings[4], (9, "search")}


def test_files_of_the_spool_go_when_nothing_waits_in_them(tmp_path: Path) -> None:
    spool = Spool(tmp_path, trials_per_file=3)
    candidates = [c for c in range(40) if _trial(c).scores]
    files = lambda: len(list(tmp_path.glob("*.arrows")))  # noqa: E731
    for first in range(0, 12, 2):
        spool.put_all([_trial(candidate) for candidate in candidates[first : first + 2]])
    assert files() == 3
    for candidate in candidates[:10]:
        spool.drop(candidate, "search")
    assert files() == 1
    assert set(Spool(tmp_path).take_all()) >= {(candidate, "search") for candidate in candidates[10:12]}
    for candidate in candidates[10:12]:
        spool.drop(candidate, "search")
    spool.tidy()
    assert files() == 0
    assert Spool(tmp_path).take_all() == {}
