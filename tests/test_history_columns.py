"""Histories that older versions wrote: `golden/history` is one from before the columns of `ADDED`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from history_bodies import event, events, open_small
from pyarrow import parquet

from search.store.columns import ADDED, schema
from search.store.events import Trial
from search.store.following import Follower
from search.store.history import History, digest, read_table
from search.store.spool import Spool

GOLDEN = Path(__file__).parent / "golden" / "history"
COUNT = 8


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "old"))


def test_the_old_history_really_lacks_the_columns() -> None:
    live = pa.ipc.open_stream((GOLDEN / "history" / "000001.arrows").read_bytes()).schema
    part = parquet.read_schema(GOLDEN / "history" / "part-000000.parquet")
    assert set(schema().names) - set(live.names) == set(schema().names) - set(part.names) == ADDED


def test_an_old_history_reads_as_it_was_written_and_a_reader_changes_nothing(old: Path) -> None:
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    with History.open(old / "history", writable=False) as history:
        assert history.events() == events(COUNT)
    assert read_table(old / "history").column("bytes_read").null_count == COUNT
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_an_old_history_goes_on_with_the_new_columns_and_the_same_digest(old: Path) -> None:
    with open_small(old / "history") as history:
        assert history.recovered is None
        assert [path.name for path in (old / "history").glob("*.arrows")] == ["000002.arrows"]
        for one in events(12, start=len(history)):
            history.append(one)
        assert history.events() == events(12)
        assert history.digest() == digest(events(12))
    with open_small(old / "history") as history:
        assert len(history) == 12


def test_an_old_live_segment_with_a_torn_end_is_cut_and_goes_on(old: Path) -> None:
    live = old / "history" / "000001.arrows"
    live.write_bytes(live.read_bytes()[:-3])
    with open_small(old / "history") as history:
        assert history.recovered is not None
        for one in events(COUNT, start=len(history)):
            history.append(one)
        assert history.digest() == digest(events(COUNT))


def test_an_old_live_segment_without_events_is_begun_anew(old: Path) -> None:
    live = old / "history" / "000001.arrows"
    data = live.read_bytes()
    first = pa.ipc.open_stream(data)
    live.write_bytes(bytes(first.schema.serialize()))
    with open_small(old / "history") as history:
        assert len(history) == 5
        history.append(event(5))
        assert history.events() == events(6)


def test_finished_evaluations_of_an_old_driver_are_taken_over(old: Path) -> None:
    assert Spool(old / "spool").take_all() == {(4, "search"): event(9), (5, "search"): event(11)}


def test_what_was_moved_and_when_is_recorded_and_no_part_of_the_digest(tmp_path: Path) -> None:
    plain = event(3)
    assert isinstance(plain, Trial)
    full = replace(plain, node="host", started_at=1.5, queue_seconds=0.25, bytes_read=2**40, bytes_moved=7)
    with open_small(tmp_path) as history:
        history.append(event(2))
        history.append(full)
        assert history.events()[1] == full
        assert full != plain
        assert history.digest() == digest([event(2), plain])


def test_a_follower_sees_every_event_without_its_scores_and_reads_each_part_once(tmp_path: Path) -> None:
    folder = tmp_path / "h"
    follower = Follower(folder)
    assert follower.events() == []
    with open_small(folder) as history:
        for number, one in enumerate(events(23)):
            history.append(one)
            if number == 12:  # two parts and three events in the live segment
                follower.events()
                part = folder / "part-000000.parquet"
                sealed = part.read_bytes()
                part.write_bytes(b"nobody looks")
        seen = follower.events()
        part.write_bytes(sealed)
    assert len(seen) == 23
    for one, found in zip(events(23), seen, strict=True):
        if isinstance(one, Trial):
            assert found == replace(one, scores={})
        else:
            assert replace(one, genome=None) == found  # type: ignore[type-var]
