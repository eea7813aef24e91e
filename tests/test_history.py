"""The history: what goes in comes out, to the bit, and anyone can read it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from history_bodies import event, events, open_small
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from evaluators.base import Scores
from search.errors import HistoryError, RunError
from search.store.events import Ask, End, Event, Trial
from search.store.history import History, digest, read_table

ROOT = Path(__file__).parent.parent
BODIES = Path(__file__).parent / "history_bodies.py"

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=":"), max_size=5)
real = st.floats(allow_nan=True, allow_infinity=True, width=64)


@st.composite
def scores(draw: st.DrawFn) -> Scores:
    n = draw(st.integers(0, 30))
    column = st.lists(real, min_size=n, max_size=n).map(lambda values: np.array(values, np.float64))
    items = draw(st.lists(text, min_size=n, max_size=n))
    return Scores(tuple(items), draw(st.dictionaries(name, column, max_size=3)), draw(column))


asks = st.builds(
    Ask,
    candidate=st.integers(0, 2**40),
    origin=text,
    genome=st.none() | st.lists(real, max_size=5).map(tuple),
    recipe_hash=text,
    recipe=st.none() | text,
)
trials = st.builds(
    Trial,
    candidate=st.integers(0, 2**40),
    items=st.sampled_from(["search", "select", "certify"]),
    metrics=st.dictionaries(text, real, max_size=3),
    loss=st.none() | real,
    feasible=st.booleans(),
    scores=st.dictionaries(name, scores(), max_size=3),
    failure_kind=st.none() | text,
    failure_message=text,
    weights_sha256=st.none() | text,
    recorded_at=real,
    merge_seconds=real,
    evaluate_seconds=real,
    worker=text,
    attempts=st.integers(0, 100),
)
ends = st.builds(End, winner=st.none() | st.integers(0, 2**40), verdict=text)


@settings(max_examples=40, deadline=None)
@given(st.lists(asks | trials | ends, max_size=6))
def test_events_come_back_to_the_bit_whatever_is_in_them(recorded: list[Event]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with History.open(Path(folder) / "h", events_per_segment=3, inline_values=20) as history:
            for one in recorded:
                history.append(one)
            assert history.events() == recorded
            assert history.digest() == digest(recorded)
        with History.open(Path(folder) / "h", writable=False) as history:
            assert history.events() == recorded
            assert len(history) == len(recorded)


def test_equality_of_events_is_by_bits_and_sees_every_field() -> None:
    trial = event(3)
    assert isinstance(trial, Trial)
    block = trial.scores["text"]
    others = [
        replace(trial, candidate=9),
        replace(trial, items="select"),
        replace(trial, metrics={**trial.metrics, "text.bits": -0.0}),
        replace(trial, loss=None),
        replace(trial, feasible=False),
        replace(trial, scores={"text": replace(block, values={"nll": -block.values["nll"]})}),
        replace(trial, scores={"text": replace(block, weights=2 * block.weights)}),
        replace(trial, scores={"text": replace(block, items=block.items[::-1])}),
        replace(trial, failure_kind="error"),
        replace(trial, weights_sha256="0"),
    ]
    contents = [one.deterministic() for one in (trial, *others)]
    assert len(set(contents)) == len(contents)
    assert replace(trial, loss=float("nan")) == replace(trial, loss=float("nan"))
    assert replace(trial, loss=0.0) != replace(trial, loss=-0.0)
    ask = Ask(0, "optimizer", (), "h")
    assert len({ask, replace(ask, genome=None), replace(ask, genome=(0.0,)), replace(ask, genome=(-0.0,))}) == 4


def test_the_digest_ignores_circumstances_and_nothing_else() -> None:
    trial = event(3)
    assert isinstance(trial, Trial)
    elsewhere = replace(
        trial,
        recorded_at=5.0,
        merge_seconds=5.0,
        evaluate_seconds=5.0,
        worker="node7",
        attempts=2,
        failure_message="other words",
        metrics=dict(reversed(trial.metrics.items())),
    )
    assert elsewhere != trial
    assert digest([elsewhere]) == digest([trial])
    assert digest([trial, trial]) != digest([trial])
    assert digest(events(2)) != digest(events(2)[::-1])


def test_the_digest_is_the_same_in_another_process_and_however_segments_are_cut(tmp_path: Path) -> None:
    with open_small(tmp_path / "a") as small, History.open(tmp_path / "b") as large:
        for one in events(23):
            small.append(one)
            large.append(one)
        assert small.digest() == large.digest() == digest(events(23))
        folder = large.folder
    read = f"History.open({str(folder)!r}, writable=False)"
    code = f"from search.store.history import History; print({read}.digest())"
    for seed in "12":
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == digest(events(23))


def test_segments_are_sealed_and_the_live_one_goes_only_then(tmp_path: Path) -> None:
    with open_small(tmp_path) as history:
        for one in events(12):
            history.append(one)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert [part["rows"] for part in manifest["parts"]] == [5, 5]
        assert [path.name for path in sorted(tmp_path.glob("*.arrows"))] == ["000002.arrows"]
        history.seal()
        history.seal()
        assert len(list(tmp_path.glob("part-*.parquet"))) == 3
        history.append(event(12))
    with open_small(tmp_path) as history:
        assert history.recovered is None
        assert history.events() == events(13)


def test_lists_of_item_ids_are_stored_once(tmp_path: Path) -> None:
    with open_small(tmp_path) as history:
        for one in events(40):
            history.append(one)
    lists = {block.items for one in events(40) if isinstance(one, Trial) for block in one.scores.values()}
    stored = [tuple(json.loads(path.read_text())) for path in (tmp_path / "items").iterdir()]
    assert sorted(stored) == sorted(lists)


def test_pyarrow_and_pandas_read_the_files_without_us(tmp_path: Path) -> None:
    with open_small(tmp_path) as history:
        for one in events(8):
            history.append(one)
    part = pd.read_parquet(tmp_path / "part-000000.parquet")
    live = pa.ipc.open_stream((tmp_path / "000001.arrows").read_bytes()).read_all().to_pandas()
    table = pd.concat([part, live], ignore_index=True)
    assert list(table["seq"]) == list(range(8))
    assert list(table["kind"]) == ["ask", "trial"] * 4
    trial = event(3)
    assert isinstance(trial, Trial)
    assert table["loss"][3] == trial.loss
    stored = dict(table["scores"][3])
    np.testing.assert_array_equal(stored["text.nll"], trial.scores["text"].values["nll"])
    np.testing.assert_array_equal(stored["text:weight"], trial.scores["text"].weights)
    large = event(7)
    assert isinstance(large, Trial)
    side = parquet.read_table(tmp_path / table["scores_file"][7]).to_pandas().set_index("key")["values"]
    np.testing.assert_array_equal(side["text.nll"], large.scores["text"].values["nll"])


def test_read_table_gives_all_events_with_our_columns(tmp_path: Path) -> None:
    with open_small(tmp_path) as history:
        assert read_table(tmp_path).num_rows == 0
        for one in events(13):
            history.append(one)
        table = read_table(str(tmp_path))
    assert table.column("seq").to_pylist() == list(range(13))
    assert table.schema.metadata == {b"meiosis.history": b"1"}
    assert not any(pa.types.is_dictionary(field.type) for field in table.schema)


def test_a_reader_changes_nothing_and_sees_only_whole_events_while_a_writer_works(tmp_path: Path) -> None:
    folder = tmp_path / "h"
    writer = subprocess.Popen(
        [sys.executable, BODIES, "write", folder, "120"],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    expected, seen = events(120), [0]
    while writer.poll() is None:
        if folder.is_dir():
            found = History.open(folder, writable=False).events()
            assert found == expected[: len(found)]
            seen.append(len(found))
    writer.communicate()
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    live = next(folder.glob("*.arrows"))
    live.write_bytes(live.read_bytes()[:-3])
    before[live] = live.stat().st_mtime_ns
    reader = History.open(folder, writable=False)
    assert reader.events() == expected[:-1]
    assert reader.recovered is None
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before
    with pytest.raises(HistoryError, match="not open for writing"):
        reader.append(event(0))


def test_there_is_one_writer(tmp_path: Path) -> None:
    with open_small(tmp_path), pytest.raises(RunError, match=r"in use by process \d+ on .*; stop it first"):
        open_small(tmp_path)
    open_small(tmp_path).close()


def test_reading_a_history_that_is_not_there_is_an_error_and_an_empty_folder_is_empty(tmp_path: Path) -> None:
    with pytest.raises(HistoryError, match="there is no history"):
        History.open(tmp_path / "none", writable=False)
    assert History.open(tmp_path, writable=False).events() == []


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The system refuses to write beyond this size of a file: a real I/O error at a chosen byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("extra_bytes", [0, 1, 100, 2000])
def test_an_append_that_fails_is_taken_back_and_the_history_takes_no_more(tmp_path: Path, extra_bytes: int) -> None:
    with open_small(tmp_path) as history:
        for one in events(2):
            history.append(one)
        size = (tmp_path / "000000.arrows").stat().st_size
        with file_size_limit(size + extra_bytes), pytest.raises(HistoryError, match=r"disk is full.*resume"):
            history.append(event(2))
        assert (tmp_path / "000000.arrows").stat().st_size == size
        assert history.events() == events(2)
        with pytest.raises(HistoryError, match=r"earlier write failed.*resume"):
            history.append(event(2))
    with open_small(tmp_path) as history:
        assert history.recovered is None
        for one in events(12, start=2):
            history.append(one)
        assert history.digest() == digest(events(12))


@pytest.mark.parametrize("limit_bytes", [0, 100, 5000])
def test_sealing_that_fails_at_some_byte_loses_nothing(tmp_path: Path, limit_bytes: int) -> None:
    with open_small(tmp_path) as history:
        for one in events(5):
            history.append(one)
        with file_size_limit(limit_bytes), pytest.raises(HistoryError, match="disk is full"):
            history.append(event(5))
        assert history.events() == events(5)
    with open_small(tmp_path) as history:
        for one in events(12, start=len(history)):
            history.append(one)
        assert history.digest() == digest(events(12))


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    disk = f"mount -t tmpfs -o size=400k tmpfs {tmp_path} && exec {sys.executable} {BODIES} fill {tmp_path} 60"
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", disk],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
    )
    if "unshare" in result.stderr or "mount" in result.stderr:
        pytest.skip(f"cannot mount a small disk here: {result.stderr.strip()}")
    found = json.loads(result.stdout or "{}")
    assert found, result.stderr
    assert "the disk is full; make room and resume the run" in found["message"]
    assert 0 < found["written"] < 60
    assert found["found"] == found["written"]
    assert found["recovered"] is None
    assert found["digest"] == digest(events(60))


def test_scores_that_do_not_fit_their_items_are_refused_and_harm_nothing(tmp_path: Path) -> None:
    with open_small(tmp_path) as history:
        wrong = Scores(("a", "b"), {"nll": np.zeros(3)}, np.ones(2))
        with pytest.raises(ValueError, match=r"'text.nll' have shape \(3,\) for 2 items"):
            history.append(Trial(0, "search", scores={"text": wrong}))
        with pytest.raises(ValueError, match="no colon"):
            history.append(Trial(0, "search", scores={"a:b": Scores((), {}, np.zeros(0))}))
        history.append(event(0))
        assert history.events() == events(1)


def test_a_failure_message_that_is_not_text_is_recorded(tmp_path: Path) -> None:
    with open_small(tmp_path) as history:
        history.append(Trial(0, "search", failure_kind="error", failure_message="no file \udcff"))
        (found,) = history.events()
    assert isinstance(found, Trial)
    assert found.failure_message == "no file \\udcff"


def test_neither_the_log_nor_a_look_at_it_imports_pandas_torch_or_ray() -> None:
    code = """
import sys, tempfile
from pathlib import Path
import search.store.history, search.store.run_folder, search.store.spool
assert "pyarrow" not in sys.modules
from history_bodies import events, open_small
from search.store.history import read_table
folder = Path(tempfile.mkdtemp())
with open_small(folder) as history:
    for event in events(13):
        history.append(event)
    history.seal()
    history.digest()
read_table(folder)
spool = search.store.spool.Spool(folder / "spool")
spool.put(1, "search", events(4)[3])
assert spool.take_all()
print(sorted({"pandas", "torch", "ray", "transformers", "nevergrad"} & set(sys.modules)))
"""
    paths = f"{ROOT}:{BODIES.parent}"
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_an_append_takes_a_few_milliseconds_at_most(tmp_path: Path) -> None:
    genome = tuple(np.random.default_rng(0).random(100))
    with History.open(tmp_path) as history:
        seconds = []
        for candidate in range(100):
            start = time.process_time()
            history.append(Ask(candidate, "optimizer", genome, "0" * 64))
            seconds.append(time.process_time() - start)
    assert np.median(seconds) < 0.002
