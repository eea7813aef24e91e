"""A run that is kept under a URL: what is there at any moment is a whole run, and it goes on from there."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import end, meiosis, short, spawn, wait_until, write_config
from family import config_of
from history_bodies import event, events, open_small

from search.errors import RunError, UserError
from search.store import remote
from search.store.events import Trial
from search.store.history import History, digest
from search.store.remote import DRIVER, Mirror, download_run, mirrored
from search.store.remote_run import fetch, working_root
from search.store.run_folder import RunFolder
from search.store.spool import Spool
from search.store.urls import Store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working copies of this test."""
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(url: str, folder: Path) -> list[Any]:
    """The events of the run at a URL, as another machine would get them."""
    store = Store.open(url)
    shutil.rmtree(folder, ignore_errors=True)
    download_run(store, folder)
    with History.open(folder / "history", writable=False) as history:
        return history.events()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_files_appear_whole_and_are_listed_read_and_removed(kind: str, tmp_path: Path) -> None:
    if kind == "memory":
        pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/store" if kind == "file" else f"memory://{tmp_path.name}/store"
    store = Store.open(url)
    assert store.names() == {}
    assert store.read("none") is None
    store.write("a/b", [b"one", b"two"])
    store.write("c", [b""])
    store.write("a/b", [b"three"])
    assert store.names() == {"a/b": 5, "c": 0}
    assert store.read("a/b") == b"three"
    store.download("a/b", tmp_path / "x" / "y")
    assert (tmp_path / "x" / "y").read_bytes() == b"three"
    store.remove("c")
    store.remove("c")
    assert store.names() == {"a/b": 5}


def test_a_url_of_no_known_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere://x.*give a folder"):
        Store.open("nowhere://x")


def test_at_every_copy_the_history_there_is_whole(tmp_path: Path) -> None:
    """Sealing every few events, with a copy after every append."""
    url, folder = f"file://{tmp_path}/there", tmp_path / "here"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    mirror = Mirror(folder, Store.open(url))
    with open_small(folder / "history") as history:
        for number in range(23):
            history.append(event(number))
            mirror.push()
            assert content(url, tmp_path / "copy") == events(number + 1)
    assert [path.name for path in (tmp_path / "there" / "history").glob("*.arrows")] == ["000004.arrows"]


def test_results_that_wait_are_there_until_the_history_has_them(tmp_path: Path) -> None:
    url, folder = f"file://{tmp_path}/there", tmp_path / "here"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    (folder / "tracking" / "wandb").mkdir(parents=True)
    (folder / "tracking" / "wandb" / "id").write_text("abc")
    (folder / "log.jsonl").write_text("{}\n")
    mirror, spool = Mirror(folder, Store.open(url)), Spool(folder / "spool", trials_per_file=2)
    waiting = [one for one in events(20) if isinstance(one, Trial)][:5]
    with open_small(folder / "history") as history:
        for trial in waiting:
            spool.put_all([trial])
            mirror.push()
        content(url, tmp_path / "copy")
        found = Spool(tmp_path / "copy" / "spool").take_all()
        assert list(found.values()) == waiting
        for trial in waiting:
            history.append(trial)
            spool.drop(trial.candidate, trial.items)
            mirror.push()
            kept = content(url, tmp_path / "copy")
            there = Spool(tmp_path / "copy" / "spool").take_all().values()
            assert {one.candidate for one in (*kept, *there) if isinstance(one, Trial)} == {
                one.candidate for one in waiting
            }
    spool.tidy()
    mirror.push()
    assert not list((tmp_path / "there" / "spool").glob("*.arrows"))
    assert (tmp_path / "there" / "tracking" / "wandb" / "id").read_text() == "abc"
    assert (tmp_path / "there" / "log.jsonl").read_text() == "{}\n"


class Failing(Store):
    """A store that takes a number of writes and removals, and then none."""

    left = 0

    def _use(self) -> None:
        if Failing.left <= 0:
            raise OSError("the network is down")
        Failing.left -= 1

    def write(self, name: str, chunks: Any) -> None:
        self._use()
        super().write(name, chunks)

    def remove(self, name: str) -> None:
        self._use()
        super().remove(name)


def test_a_copy_that_breaks_off_anywhere_leaves_a_whole_history_there(tmp_path: Path) -> None:
    chance_of = {step: 2 + step * 5 % 17 for step in range(12)}
    for allowed in range(14):
        url, folder = f"file://{tmp_path}/there{allowed}", tmp_path / f"here{allowed}"
        folder.mkdir()
        (folder / "run.yaml").write_text("{}")
        whole = Store.open(url)
        mirror = Mirror(folder, Failing(whole.url, whole.system, whole.root))
        copied = 0
        with open_small(folder / "history") as history:
            for step in range(4):
                Failing.left = 1000
                mirror.push()
                copied = len(history)
                for number in range(copied, copied + chance_of[step]):
                    history.append(event(number))
                Failing.left = allowed
                with contextlib.suppress(OSError):
                    mirror.push()
                found = content(url, tmp_path / "copy")
                assert found == events(len(found))
                assert len(found) >= copied


def test_what_a_lost_driver_left_half_copied_does_not_stay(tmp_path: Path) -> None:
    """Another driver seals the same part with other bytes: times and workers are its own."""
    url = f"file://{tmp_path}/there"
    store = Store.open(url)
    for name in ("part-000000.parquet", "000001.arrows", "scores/00000003.parquet"):
        store.write(f"history/{name}", [b"of a driver whose machine was lost"])
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    with open_small(folder / "history") as history:
        for one in events(8):
            history.append(one)
        Mirror(folder, store).push()
    assert content(url, tmp_path / "copy") == events(8)


def test_copying_while_events_are_written_gives_whole_histories(tmp_path: Path) -> None:
    url, folder = f"file://{tmp_path}/there", tmp_path / "here"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    done = threading.Event()

    def write() -> None:
        with open_small(folder / "history") as history:
            for number in range(150):
                history.append(event(number))
                time.sleep(0.001)
        done.set()

    mirror = Mirror(folder, Store.open(url))
    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        mirror.push()
        if (tmp_path / "there" / "history").exists():
            found = content(url, tmp_path / "copy")
            assert found == events(len(found))
            seen.append(len(found))
    writer.join()
    mirror.push()
    assert content(url, tmp_path / "copy") == events(150)
    assert seen == sorted(seen)
    assert len(set(seen)) > 2


def test_a_store_that_is_down_for_a_while_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LAG_SECONDS", 0.02)
    folder, there = tmp_path / "here", tmp_path / "there"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    said: list[str] = []
    with mirrored(folder, f"file://{there}", said.append), open_small(folder / "history") as history:
        there.rename(tmp_path / "away")
        there.write_text("a file in the way")
        for one in events(8):
            history.append(one)
        limit = time.monotonic() + 60
        while not said and time.monotonic() < limit:
            time.sleep(0.01)
        there.unlink()
        (tmp_path / "away").rename(there)
        while len(said) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
    assert "cannot copy to" in said[0]
    assert "works again" in said[1]
    assert content(f"file://{there}", tmp_path / "copy") == events(8)
    assert not (there / DRIVER).exists()


def test_two_drivers_on_one_url_are_refused_until_the_first_is_silent(tmp_path: Path) -> None:
    url, folder = f"file://{tmp_path}/there", tmp_path / "here"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    store = Store.open(url)
    owner = {"host": "elsewhere", "pid": 7, "token": "x", "beat": time.time()}
    store.write(DRIVER, [json.dumps(owner).encode()])
    with pytest.raises(RunError, match=r"in use by process 7 on elsewhere"), mirrored(folder, url, print):
        pass
    store.write(DRIVER, [json.dumps({**owner, "beat": time.time() - 200}).encode()])
    with mirrored(folder, url, print):
        assert json.loads(store.read(DRIVER) or b"")["host"] != "elsewhere"


def test_errors_of_any_kind_of_store_are_told_and_do_not_end_the_copying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = pytest.importorskip("fsspec.implementations.memory")

    class HttpError(Exception):
        """As that of gcsfs, which is no OSError."""

    down = threading.Event()

    class Moody(memory.MemoryFileSystem):  # type: ignore[misc,name-defined]  # has no types
        protocol = "moody"

        def info(self, path: str, **options: Any) -> Any:
            if down.is_set():
                raise HttpError("503: come back later")
            return super().info(path, **options)

        def _open(self, path: str, *args: Any, **options: Any) -> Any:
            if down.is_set():
                raise HttpError("503: come back later")
            return super()._open(path, *args, **options)

    fsspec.register_implementation("moody", Moody, clobber=True)
    monkeypatch.setattr(remote, "LAG_SECONDS", 0.02)
    folder, url = tmp_path / "here", f"moody://{tmp_path.name}/there"
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    said: list[str] = []
    with mirrored(folder, url, said.append), open_small(folder / "history") as history:
        down.set()
        for one in events(8):
            history.append(one)
        limit = time.monotonic() + 60
        while not said and time.monotonic() < limit:
            time.sleep(0.01)
        down.clear()
        while len(said) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
    assert "HttpError: 503" in said[0]
    assert "works again" in said[1]
    assert content(url, tmp_path / "copy") == events(8)


@pytest.mark.parametrize("owner", [b"{", b"[]", b'{"tok'])
def test_a_note_of_the_driver_that_cannot_be_read_is_that_of_nobody(owner: bytes, tmp_path: Path) -> None:
    folder, store = tmp_path / "here", Store.open(f"file://{tmp_path}/there")
    folder.mkdir()
    (folder / "run.yaml").write_text("{}")
    store.write(DRIVER, [owner])
    with mirrored(folder, store.url, print):
        assert json.loads(store.read(DRIVER) or b"")["token"]


def test_a_driver_is_heard_of_while_it_copies_something_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BEAT_SECONDS", 0.0)
    folder, store = tmp_path / "here", Store.open(f"file://{tmp_path}/there")
    (folder / "best").mkdir(parents=True)
    (folder / "run.yaml").write_text("{}")
    (folder / "best" / "meiosis.json").write_text("{}")
    mirror = Mirror(folder, store)
    mirror.claim()
    (before,) = [json.loads(store.read(DRIVER) or b"")["beat"]]
    mirror.push()
    assert json.loads(store.read(DRIVER) or b"")["beat"] > before
    store.write(DRIVER, [json.dumps({"host": "elsewhere", "pid": 7, "token": "x", "beat": time.time()}).encode()])
    (folder / "best" / "meiosis.json").write_text("other")
    with pytest.raises(RunError, match="another driver took over"):
        mirror.push()


def make(folder: Path, count: int, start: int = 0) -> None:
    """A run with so many events, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("{}")
    with open_small(folder / "history") as history:
        for one in events(count + start, start=start):
            history.append(one)


def test_what_another_machine_added_there_is_not_overwritten_from_an_older_copy(tmp_path: Path) -> None:
    url, there, here = f"file://{tmp_path}/there", tmp_path / "there", tmp_path / "here"

    for ours, theirs in ((4, 5), (4, 17), (0, 3)):
        make(there, theirs)
        make(here, ours)
        newer = f"has {theirs - ours} events that .*meiosis resume {url}"
        with pytest.raises(RunError, match=newer), mirrored(here, url, print):
            pass
        assert content(url, tmp_path / "copy") == events(theirs)
        assert not (there / DRIVER).exists()
    make(here, 6, start=2)
    with pytest.raises(RunError, match="went different ways"), mirrored(here, url, print):
        pass
    for ours, theirs in ((5, 5), (5, 4), (17, 4), (3, 0)):
        make(there, theirs)
        make(here, ours)
        with mirrored(here, url, print):
            pass
        assert content(url, tmp_path / "copy") == events(ours)
    assert not list(tmp_path.glob(".*"))


# Whole runs


@pytest.fixture(scope="module")
def undisturbed(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert meiosis("search", write_config(short(config_of(family, folder)), folder), "--run", "run").status == 0
    return folder / "run"


def of(run: Path) -> str:
    with History.open(run / "history", writable=False) as history:
        return digest(history.events())


def test_a_run_under_a_url_is_whole_there_and_goes_on_from_there_on_another_machine(
    family: Path, undisturbed: Path, cache: Path, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/store"
    path = write_config(short(config_of(family, tmp_path)) | {"results": url}, tmp_path)
    ended = meiosis("search", path, "--run", "run")
    assert ended.status == 0, ended.err
    there = tmp_path / "store" / "run"
    assert of(there) == of(undisturbed)
    assert (there / "best" / "model.safetensors").read_bytes() == (
        undisturbed / "best" / "model.safetensors"
    ).read_bytes()
    assert (there / "report.md").exists()
    assert not (there / DRIVER).exists()
    again = meiosis("search", path, "--run", "run")
    assert (again.status, "already exists" in again.err) == (2, True)
    shutil.rmtree(cache / "runs")  # another machine
    assert meiosis("status", f"{url}/run", "--json").json["state"] == "finished"
    more = meiosis("resume", f"{url}/run", "--budget", 10)
    assert more.status == 0, more.err
    assert meiosis("status", f"{url}/run", "--json").json["done"] == 10
    with History.open(there / "history", writable=False) as history:
        recorded = history.events()
    assert sum(type(one).__name__ == "End" for one in recorded) == 2
    gone = meiosis("resume", f"{url}/none")
    assert gone.status == 2
    assert "there is no run" in gone.err


@pytest.mark.slow
def test_a_run_whose_machine_is_lost_goes_on_elsewhere_from_what_was_copied(
    family: Path, cache: Path, tmp_path: Path
) -> None:
    url, there = f"file://{tmp_path}/store", tmp_path / "store" / "run"
    (tmp_path / "pause.py").write_text(
        "import pathlib, time\n"
        "def score(model):\n"
        f"    time.sleep(1.5 if pathlib.Path({str(tmp_path / 'closed')!r}).exists() else 0)\n"
        "    return 0.0\n"
    )
    (tmp_path / "closed").touch()
    config = short(config_of(family, tmp_path), budget=7) | {"results": url}
    config["evaluators"]["pause"] = {"use": "python", "function": f"{tmp_path / 'pause.py'}:score"}
    path = write_config(config, tmp_path)
    process = spawn("search", path, "--run", "run")

    def copied() -> list[Any]:
        return content(url + "/run", tmp_path / "copy") if list(there.glob("history/*.arrows")) else []

    wait_until(lambda: len(copied()) > 5, process, seconds=240)
    process.kill()
    end(process)
    before = [event.deterministic() for event in copied()]
    (tmp_path / "closed").unlink()
    shutil.rmtree(cache / "runs")
    ended = meiosis("resume", f"{url}/run")
    assert ended.status == 0, ended.err
    after = copied()
    assert [event.deterministic() for event in after][: len(before)] == before
    assert len(after) > len(before)
    keys = [(one.candidate, one.items) for one in after if hasattr(one, "items")]
    assert len(keys) == len(set(keys))


def test_a_working_copy_that_is_ahead_stays_and_one_that_is_behind_is_replaced(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    there, here = tmp_path / "store" / "run", working_root(f"file://{tmp_path}/store") / "run"

    for ours, theirs in ((7, 4), (4, 7), (5, 5)):
        make(here, ours)
        make(there, theirs)
        with History.open(fetch(url).history, writable=False) as history:
            assert history.events() == events(max(ours, theirs))
        assert fetch(url).remote == url
    make(here, 6, start=2)
    with pytest.raises(RunError, match="went different ways"):
        fetch(url)
    with RunFolder(here).lock():  # a driver is at work here: what it has is looked at, whatever is there
        assert fetch(url).path == here
