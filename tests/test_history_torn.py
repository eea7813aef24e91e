"""The history after crashes and damage: whole events come back, and damage is never taken for events."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from history_bodies import event, events, open_small
from hypothesis import given, settings
from hypothesis import strategies as st

from search.errors import HistoryError
from search.store.columns import decode
from search.store.contents import read_once
from search.store.events import Event
from search.store.history import digest
from search.store.segment import header, scan
from search.store.side_files import SideFiles

ROOT = Path(__file__).parent.parent
BODIES = Path(__file__).parent / "history_bodies.py"
COUNT = 8
"""Five events in a sealed part and three in the live segment."""
LIVE = "000001.arrows"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("original") / "h"
    with open_small(folder) as history:
        for one in events(COUNT):
            history.append(one)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the original to harm, in memory where there is such a file system."""
    return Path(shutil.copytree(original, tmp_path / "h"))


def record_ends(original: Path) -> list[int]:
    """Where the schema message and each record end, found by appending them one by one."""
    import pyarrow as pa

    data = (original / LIVE).read_bytes()
    reader = pa.BufferReader(data)
    ends = []
    while reader.tell() < len(data):
        pa.ipc.read_message(reader)
        ends.append(reader.tell())
    return ends


def look(folder: Path) -> list[Event]:
    """The events, read once and without patience."""
    contents = read_once(folder)
    side = SideFiles(folder, 0)
    return [one for table in contents.all_tables for one in decode(table, side)]


def test_a_log_cut_at_any_byte_gives_back_the_events_before_and_nothing_else(original: Path, folder: Path) -> None:
    data, ends = (original / LIVE).read_bytes(), record_ends(original)
    assert len(ends) == 1 + COUNT - 5
    expected = events(COUNT)
    checksums = scan(folder / LIVE, data, 5).table.column("crc32").to_pylist()
    assert len(set(checksums)) == COUNT - 5
    for size in range(len(data) + 1):
        whole = max(0, sum(end <= size for end in ends) - 1)
        found = scan(folder / LIVE, data[:size], 5)
        assert found.table.column("crc32").to_pylist() == checksums[:whole]
        assert found.whole_bytes == max([0, *(end for end in ends if end <= size)])
        assert found.torn_bytes == size - found.whole_bytes
        if size % 97 == 0 or size in ends:
            (folder / LIVE).write_bytes(data[:size])
            assert look(folder) == expected[: 5 + whole]


def test_a_log_cut_at_any_byte_goes_on_to_the_same_history(original: Path, tmp_path: Path) -> None:
    data, ends = (original / LIVE).read_bytes(), record_ends(original)
    near = {end + step for end in (0, *ends) for step in (-9, -8, -1, 0, 1, 4, 8, 9)}
    sizes = sorted({*range(0, len(data), 149), *(size for size in near if 0 <= size <= len(data))})
    for size in sizes:
        folder = Path(shutil.copytree(original, tmp_path / str(size)))
        os.truncate(folder / LIVE, size)
        with open_small(folder) as history:
            kept = len(history)
            assert history.events() == events(kept)
            assert (history.recovered is None) == (size in ends)
            torn = b"".join(path.read_bytes() for path in folder.glob("torn/*"))
            assert data[:size].endswith(torn)
            assert len(torn) == size - max([0, *(end for end in ends if end <= size)])
            for one in events(COUNT + 4, start=kept):
                history.append(one)
            assert history.digest() == digest(events(COUNT + 4))
        with open_small(folder) as history:
            assert history.recovered is None
            assert history.events() == events(COUNT + 4)
        shutil.rmtree(folder)


GARBAGE = st.one_of(
    st.integers(1, 5000).map(bytes),
    st.integers(1, 5000).map(lambda n: b"\xff" * n),
    st.binary(min_size=1, max_size=300),
    st.just(b"\xff\xff\xff\xff\x00\x00\x00\x00"),  # the end marker of a stream
    st.integers(-(2**31), 2**31 - 1).map(lambda n: b"\xff\xff\xff\xff" + n.to_bytes(4, "little", signed=True)),
    st.tuples(st.integers(0, 2500), st.binary(max_size=40)).map(lambda x: ("own", *x)),
)


@settings(max_examples=80, deadline=None)
@given(garbage=GARBAGE, rest=st.binary(max_size=200), keep=st.integers(0, 3))
def test_garbage_at_the_end_is_cut_and_kept(
    tmp_path_factory: pytest.TempPathFactory,
    original: Path,
    garbage: bytes | tuple[str, int, bytes],
    rest: bytes,
    keep: int,
) -> None:
    data, ends = (original / LIVE).read_bytes(), record_ends(original)
    start = ends[keep]
    if isinstance(garbage, tuple):  # the start of our own next record, and then something else
        garbage = data[start : start + garbage[1]][:-1] + garbage[2]
        if data.startswith(garbage + rest, start) and len(garbage + rest) >= ends[min(keep + 1, 3)] - start:
            return
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("garbage") / "h"))
    (folder / LIVE).write_bytes(data[:start] + garbage + rest)
    with open_small(folder) as history:
        assert history.events() == events(5 + keep)
        if garbage + rest:
            assert history.recovered is not None
            (kept,) = folder.glob("torn/*")
            assert kept.read_bytes() == garbage + rest
            assert str(kept) in history.recovered
        for one in events(COUNT, start=len(history)):
            history.append(one)
        assert history.digest() == digest(events(COUNT))
    shutil.rmtree(folder.parent)


def test_a_flipped_bit_in_the_log_is_damage_or_a_cut_tail_but_never_an_event(original: Path, folder: Path) -> None:
    data, ends = (original / LIVE).read_bytes(), record_ends(original)
    expected, messages = events(COUNT), {}
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at * 5 + at // 8) % 8
        try:
            found = scan(folder / LIVE, bytes(flipped), 5)
        except HistoryError as error:
            messages[at] = str(error)
            continue
        if found.table.num_rows == COUNT - 5:
            assert at < ends[0]  # a byte of the schema message that means nothing
            (folder / LIVE).write_bytes(flipped)
            assert look(folder) == expected
        else:
            assert at >= ends[-2]
            assert found.table.num_rows == COUNT - 6
            assert found.torn_bytes == ends[-1] - ends[-2]
    assert max(messages) < ends[-2]
    assert all(str(folder / LIVE) in message and "backup" in message for message in messages.values())


def test_every_bit_of_the_manifest_counts(original: Path, folder: Path) -> None:
    data, expected = (original / "manifest.json").read_bytes(), events(COUNT)
    harmless, messages = 0, []
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (folder / "manifest.json").write_bytes(flipped)
        try:
            found = look(folder)
        except HistoryError as error:
            messages.append(str(error))
        else:
            assert found == expected
            harmless += 1
    assert all("from a backup" in message or "use the Meiosis" in message for message in messages)
    assert harmless < 40  # white space for other white space


@pytest.mark.parametrize("pattern", ["part-000000.parquet", "items/*.json", "scores/*.parquet"])
def test_damage_of_another_file_is_an_error_that_names_it(original: Path, folder: Path, pattern: str) -> None:
    for source in sorted(original.glob(pattern)):
        path = folder / source.relative_to(original)
        data = source.read_bytes()
        harmed = [data[: len(data) // 2], b"", data + b"\0"]
        for at in range(0, len(data), max(1, len(data) // 40)):
            harmed.append(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        for content in harmed:
            path.write_bytes(content)
            with pytest.raises(HistoryError, match="backup") as caught:
                look(folder)
            assert str(path) in str(caught.value)
        path.unlink()
        with pytest.raises(HistoryError, match="backup") as caught:
            look(folder)
        assert str(path) in str(caught.value)
        path.write_bytes(data)
        assert look(folder) == events(COUNT)


def test_a_damaged_list_of_items_is_mended_when_the_same_list_is_recorded_again(folder: Path) -> None:
    for path in folder.glob("items/*.json"):
        path.write_bytes(b"[]")
    with open_small(folder) as history:
        for one in events(COUNT + 16, start=COUNT):
            history.append(one)
    assert look(folder) == events(COUNT + 16)


def test_damage_before_a_whole_record_is_refused_and_the_way_out_works(original: Path, folder: Path) -> None:
    ends = record_ends(original)
    data = bytearray((original / LIVE).read_bytes())
    data[ends[1] + 100] ^= 1
    (folder / LIVE).write_bytes(data)
    with pytest.raises(HistoryError, match=f"damaged at byte {ends[1]}, before a whole record") as caught:
        open_small(folder)
    assert (folder / LIVE).read_bytes() == data
    command = str(caught.value).rpartition(": ")[2]
    subprocess.run(command.split(), check=True)
    with open_small(folder) as history:
        assert history.events() == events(6)


def test_of_records_that_were_written_together_a_disk_may_lose_any(original: Path, tmp_path: Path) -> None:
    """Before the sync returns, a later block of a write may be on disk and an earlier one not: nobody was told."""
    with open_small(tmp_path / "h") as history:
        for one in events(2):
            history.append(one)
        history.append_all(events(5, start=2))
        history.append_all(events(6, start=5))
        history.append_all(events(10, start=6))
        assert history.events() == events(10)
    data, ends = (tmp_path / "h" / LIVE).read_bytes(), record_ends(tmp_path / "h")
    assert len(ends) == 6
    for lost in range(2, 5):  # of events 6 to 9, the last of which stays
        holed = data[: ends[lost - 1]] + bytes(ends[lost] - ends[lost - 1]) + data[ends[lost] :]
        folder = Path(shutil.copytree(tmp_path / "h", tmp_path / str(lost)))
        (folder / LIVE).write_bytes(holed)
        with open_small(folder) as history:
            assert history.events() == events(5 + lost - 1)
            assert history.recovered is not None
    harmed = data[: ends[0]] + bytes(ends[1] - ends[0]) + data[ends[1] :]
    (tmp_path / "h" / LIVE).write_bytes(harmed)
    # Event 5 was synced before event 6 was written.
    with pytest.raises(HistoryError, match=f"damaged at byte {ends[0]}, before a whole record"):
        open_small(tmp_path / "h")


def test_a_lost_or_repeated_record_is_damage(original: Path, folder: Path) -> None:
    ends = record_ends(original)
    data = (original / LIVE).read_bytes()
    for content in (
        data[: ends[0]] + data[ends[1] :],
        data[: ends[1]] + data[ends[0] : ends[1]] + data[ends[1] :],
        data[: ends[1]] + b"xyz" + data[ends[1] :],
    ):
        (folder / LIVE).write_bytes(content)
        with pytest.raises(HistoryError, match="is damaged at byte"):
            open_small(folder)


def test_a_missing_live_segment_is_refused_and_the_way_out_works(folder: Path) -> None:
    (folder / LIVE).unlink()
    with pytest.raises(HistoryError, match="is missing, with the events from 5 on") as caught:
        open_small(folder)
    subprocess.run(str(caught.value).rpartition(": ")[2].split(), check=True)
    with open_small(folder) as history:
        assert history.recovered is not None
        for one in events(COUNT, start=len(history)):
            history.append(one)
        assert history.digest() == digest(events(COUNT))


def test_a_missing_manifest_is_refused(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    for _ in range(2):
        with pytest.raises(HistoryError, match=r"does not go with manifest\.json.*from a backup"):
            open_small(folder)


def test_columns_of_another_version_are_refused(original: Path, folder: Path) -> None:
    changed = header().replace(b"meiosis.history", b"meiosis.nothing")
    data = (original / LIVE).read_bytes()
    assert changed != header()
    (folder / LIVE).write_bytes(changed + data[len(header()) :])
    with pytest.raises(HistoryError, match="other columns than this version"):
        open_small(folder)


def _program(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(BODIES), *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_writer_killed_at_random_moments_loses_no_acknowledged_event(tmp_path: Path) -> None:
    """25 writers, one after the other on one history; each goes on where the last one died."""
    folder = tmp_path / "h"
    program = _program("kill", folder, 25, 1)
    assert program.stdin is not None
    assert program.stdout is not None
    counts = [0]
    for line in program.stdout:
        result = json.loads(line)
        assert result["killed"]
        if folder.is_dir():
            found = look(folder)
            assert found == events(len(found))
            assert len(found) >= max(counts[-1], result["acknowledged"] + 1)
            assert len(found) <= max(counts[-1], result["acknowledged"] + 1) + 1
            counts.append(len(found))
        program.stdin.write("\n")
        program.stdin.flush()
    assert program.wait() == 0
    assert counts[-1] > 25
    with open_small(folder) as history:
        assert history.digest() == digest(events(counts[-1]))


def test_a_writer_that_dies_before_any_change_of_a_file_name_leaves_what_the_next_one_needs(
    tmp_path: Path,
) -> None:
    """Creation, side files, two sealings: every state of the folder that a crash can leave between calls."""
    count = 12
    program = _program("crash", tmp_path, count)
    out, _ = program.communicate()
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) > 40
    assert [result["killed"] for result in results] == [True] * (len(results) - 1) + [False]
    for point, result in enumerate(results):
        folder = tmp_path / f"{point:04d}"
        if folder.is_dir():
            found = look(folder)
            assert found == events(len(found))
            assert len(found) > result["acknowledged"]
        with open_small(folder) as history:
            assert len(history) > result["acknowledged"]
            assert history.recovered is None
            for one in events(count, start=len(history)):
                history.append(one)
            assert history.digest() == digest(events(count))
        assert not list(folder.rglob(".*.tmp"))
        assert len(list(folder.glob("*.arrows"))) == 1


def test_a_segment_that_was_sealed_but_not_removed_counts_once(original: Path, folder: Path, tmp_path: Path) -> None:
    with open_small(tmp_path / "one") as history:
        for one in events(5):
            history.append(one)
        shutil.copy(tmp_path / "one" / "000000.arrows", folder)
    assert look(folder) == events(COUNT)
    with open_small(folder) as history:
        assert history.events() == events(COUNT)
    assert not (folder / "000000.arrows").exists()


def test_a_part_that_the_manifest_does_not_list_yet_does_not_count(original: Path, folder: Path) -> None:
    (folder / "part-000001.parquet").write_bytes(b"half of a part")
    assert look(folder) == events(COUNT)
    with open_small(folder) as history:
        assert history.events() == events(COUNT)
        for one in events(COUNT + 4, start=COUNT):
            history.append(one)
        assert history.digest() == digest(events(COUNT + 4))


def test_a_file_of_the_live_segment_that_something_else_changed_is_not_sealed(folder: Path) -> None:
    with open_small(folder) as history:
        os.truncate(folder / LIVE, (folder / LIVE).stat().st_size - 10)
        with pytest.raises(HistoryError, match="changed under the run"):
            history.seal()
        with pytest.raises(HistoryError, match="earlier write failed"):
            history.append(event(COUNT))
    assert look(folder) == events(COUNT - 1)
