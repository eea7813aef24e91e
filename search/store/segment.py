"""The live segment of a history: an Arrow IPC stream, written message by message.

The file is a schema message and then one record batch message per event. Messages delimit themselves,
so it can be reopened for append, any Arrow reader can read it while it grows, and what a crash leaves
of a message at the end can be told from whole ones. Arrow has no checksums (most bit flips would go
unnoticed), hence the column crc32, which is checked before Arrow looks at a record's data.
"""

from __future__ import annotations

import hashlib
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from search.errors import HistoryError
from search.store.atomic import make_folder, write_all, write_atomic
from search.store.columns import completed, is_current, is_readable, is_whole, place_of, schema

if TYPE_CHECKING:
    import pyarrow as pa

TORN = "torn"
"""Folder beside the segments for what crashes left unfinished."""

_MARK = b"\xff\xff\xff\xff"
"""Opens every message of an Arrow stream."""


@dataclass(frozen=True)
class Scan:
    """What is in a segment.

    Attributes:
        table: the events, one row each.
        whole_bytes: length of the schema message and all whole records.
        torn_bytes: length of what follows: an append that never finished.
        appendable: whether the segment has all columns of `schema`; nothing may be appended to one that lacks some.
    """

    table: pa.Table
    whole_bytes: int
    torn_bytes: int
    appendable: bool = True


@dataclass(frozen=True)
class _Message:
    """A message of the stream and where it ends."""

    content: pa.ipc.Message
    end: int


def read_bounded(path: Path) -> bytes:
    """The bytes of a file that may be growing, up to the length it has now.

    Beyond that length the pages of a record could become visible in any order. Raises OSError.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        parts = []
        while size and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


def scan(path: Path, data: bytes, first_seq: int) -> Scan:
    """The whole records at the start of `data`, the content of the segment `path`.

    Args:
        first_seq: number of the first event of the segment.

    Raises:
        HistoryError: damage that no interrupted append explains, because a whole record of a later append
            follows it; or a record that does not belong here; or columns of another version.
    """
    import pyarrow as pa

    columns, at = _header(path, data)
    batches: list[pa.RecordBatch] = []
    seq = first_seq
    if at:
        while (record := _record(data, at)) is not None:
            batch = _batch(record, columns)
            if batch is None:
                break  # a stale block of a file with other columns
            found = _seq(batch)
            if found < seq:
                break  # a stale block of an older file: the disk has not written what was to be here
            if found > seq:
                raise HistoryError(
                    f"{path} is damaged at byte {at}: event {found} follows event {seq - 1}; "
                    "restore the file from a backup"
                )
            batches.append(batch)
            at, seq = record.end, seq + 1
    if at < len(data) and (later := _later_record(data, at, seq, columns)) is not None:
        raise HistoryError(
            f"{path} is damaged at byte {at}, before a whole record at byte {later}; restore the file from a "
            f"backup, or give up event {seq} and all that follow: truncate --size={at} {path}"
        )
    table = pa.Table.from_batches(batches, columns)
    return Scan(completed(table), at, len(data) - at, appendable=is_current(columns))


def _header(path: Path, data: bytes) -> tuple[pa.Schema, int]:
    """The columns, and the length of the schema message; 0 when it is torn."""
    import pyarrow as pa

    expected = header()
    if data.startswith(expected):
        return schema(), len(expected)
    message = _message(data, 0)
    if message is None or message.content.type != "schema":
        return schema(), 0
    try:
        found = pa.ipc.read_schema(message.content)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return schema(), 0
    if is_readable(found):
        return found, message.end
    if _later_record(data, message.end, None, found) is None:
        return schema(), 0
    raise HistoryError(
        f"{path} has other columns than this version of Meiosis writes, or its start is damaged; "
        "resume the run with the version that began it, or restore the file from a backup"
    )


def header() -> bytes:
    """The schema message that opens every segment."""
    return bytes(schema().serialize())


def _message(data: bytes, at: int) -> _Message | None:
    """The message at `at`, or None when there is no whole one. Its body is not checked yet."""
    import pyarrow as pa

    if len(data) < at + 8 or data[at : at + 4] != _MARK:
        return None
    (metadata_bytes,) = struct.unpack_from("<i", data, at + 4)
    start = at + 8 + metadata_bytes
    if metadata_bytes <= 0 or start > len(data):
        return None
    try:
        content = pa.ipc.read_message(pa.BufferReader(pa.py_buffer(data).slice(at)))
    except (pa.ArrowException, OSError, EOFError):
        return None
    body = content.body
    return _Message(content, start + (0 if body is None else body.size))


def _record(data: bytes, at: int) -> _Message | None:
    """The record at `at` if it is whole and its bytes are those that were written."""
    message = _message(data, at)
    if message is None or message.content.type != "record batch" or message.end - at < 16:
        return None
    return message if is_whole(memoryview(data)[at : message.end]) else None


def _later_record(data: bytes, start: int, lost_seq: int | None, columns: pa.Schema) -> int | None:
    """Where a whole record begins after `start` that was written when event `lost_seq` was durable already.

    None for `lost_seq`: a record of any columns. A record that was written with the lost one proves nothing: of
    what is not synced yet, a disk keeps what it likes.
    """
    at = data.find(_MARK, start)
    while at >= 0:
        record = _record(data, at)
        if record is not None:
            batch = None if lost_seq is None else _batch(record, columns)
            place = place_of(memoryview(data)[at : record.end])
            if lost_seq is None or (batch is not None and _seq(batch) - place >= lost_seq + (place > 0)):
                return at
        at = data.find(_MARK, at + 1)
    return None


def _batch(record: _Message, columns: pa.Schema) -> pa.RecordBatch | None:
    """The event in a record, None where the record has other columns."""
    import pyarrow as pa

    try:
        return pa.ipc.read_record_batch(record.content, columns)
    except (pa.ArrowException, OSError):
        return None


def _seq(batch: pa.RecordBatch) -> int:
    return cast(int, batch.column(0)[0].as_py())


def create(path: Path) -> None:
    """A segment without events, durable on return. Raises OSError."""
    write_atomic(path, header())


def cut_tail(path: Path, data: bytes, found: Scan) -> Path:
    """Cut what follows the last whole record; returns the file in `torn/` that keeps it. Raises OSError."""
    tail = data[found.whole_bytes :]
    name = f"{path.stem}-{found.whole_bytes}-{hashlib.sha256(tail).hexdigest()[:8]}.bin"
    kept = path.parent / TORN / name
    make_folder(kept.parent)
    write_atomic(kept, tail)
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.ftruncate(descriptor, found.whole_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return kept


class Segment:
    """A segment open for append: all its bytes are whole records.

    Args:
        path: the file; `create` or `cut_tail` left it sound.
        size_bytes, rows: what is in it.
    """

    def __init__(self, path: Path, size_bytes: int, rows: int) -> None:
        self.path, self.size_bytes, self.rows = path, size_bytes, rows
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def append(self, records: bytes, count: int) -> None:
        """Write `count` records; they are durable on return.

        Raises:
            OSError: they could not be written; what was written of them is taken back.
        """
        end, rows = self.size_bytes + len(records), self.rows + count
        try:
            write_all(self._descriptor, records, self.size_bytes)
            os.fsync(self._descriptor)
            self.size_bytes, self.rows = end, rows
        except BaseException:
            with suppress(OSError):  # then it is a torn tail, which the next writer cuts
                os.ftruncate(self._descriptor, self.size_bytes)
            raise

    def close(self) -> None:
        """Release the file. May be called twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
