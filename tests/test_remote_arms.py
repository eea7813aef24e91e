"""A run at a URL has the searches that its winner is compared with there as well, whole at every copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from history_bodies import event, events, open_small

from search.errors import RunError
from search.store.events import Event, Trial
from search.store.history import History
from search.store.remote import Mirror, download_run, mirrored
from search.store.remote_run import fetch, working_root
from search.store.spool import Spool
from search.store.urls import Store

ARM = "arms/placebo"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Working copies of this test."""
    monkeypatch.setenv("MEIOSIS_CACHE", str(tmp_path / "cache"))


def make(folder: Path, main: int, arm: int) -> None:
    """A run with so many events, and so many of a search beside it, in place of what was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("{}")
    for at, count in (("", main), (ARM, arm)):
        with open_small(folder / at / "history") as history:
            for one in events(count):
                history.append(one)


def there(url: str, folder: Path, at: str = ARM) -> list[Event]:
    """The events at a URL, as another machine would get them."""
    shutil.rmtree(folder, ignore_errors=True)
    download_run(Store.open(url), folder)
    with History.open(folder / at / "history", writable=False) as history:
        return history.events()


def test_at_every_copy_history_and_waiting_results_of_a_comparison_are_whole(tmp_path: Path) -> None:
    url, folder = f"file://{tmp_path}/there", tmp_path / "here"
    make(folder, 9, 0)
    mirror, spool = Mirror(folder, Store.open(url)), Spool(folder / ARM / "spool", trials_per_file=2)
    waiting = [one for one in events(20) if isinstance(one, Trial)][:3]
    spool.put_all(waiting)
    with open_small(folder / ARM / "history") as history:
        for number in range(13):
            history.append(event(number))
            mirror.push()
            assert there(url, tmp_path / "copy") == events(number + 1)
            assert there(url, tmp_path / "copy", "") == events(9)
            assert list(Spool(tmp_path / "copy" / ARM / "spool").take_all().values()) == waiting
    for trial in waiting:
        spool.drop(trial.candidate, trial.items)
    spool.tidy()
    mirror.push()
    assert not list((tmp_path / "there" / ARM / "spool").glob("*.arrows"))
    assert len(list((tmp_path / "there" / ARM / "history").glob("*.arrows"))) == 1
    again = Mirror(folder, Store.open(url))
    again.push()
    assert there(url, tmp_path / "copy") == events(13)


def test_what_another_machine_added_to_a_comparison_is_neither_overwritten_nor_overlooked(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    store, here = tmp_path / "store" / "run", working_root(f"file://{tmp_path}/store") / "run"
    for ours, theirs in ((3, 8), (8, 3), (0, 6), (5, 5)):
        make(store, 7, theirs)
        make(here, 7, ours)
        if ours < theirs:
            with pytest.raises(RunError, match=f"has {theirs - ours} events that"), mirrored(here, url, print):
                pass
        with History.open(fetch(url).path / ARM / "history", writable=False) as history:
            assert history.events() == events(max(ours, theirs))
        with mirrored(here, url, print):
            pass
        assert there(url, tmp_path / "copy") == events(max(ours, theirs))
