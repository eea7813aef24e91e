"""What does not go into the records: lists of item ids, and scores of many items.

Both are written and durable before the record that needs them. Item ids are the same for all trials
of a pool and can be long, so each list is stored once, under its hash. Scores of trials with many
items would bloat the log, so they go to a Parquet file each, named after the number of the event.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from search.errors import HistoryError
from search.store.arrays import ScoreRows, lists, texts, unpack_lists
from search.store.atomic import make_folder, sweep, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa


class SideFiles:
    """The side files of one history, in `items/` and `scores/` of its folder.

    Args:
        folder: folder of the history.
        inline_values: up to this many numbers the scores of a trial stay in its record.
    """

    def __init__(self, folder: Path, inline_values: float) -> None:
        self.folder, self.inline_values = folder, inline_values
        self._known_items: dict[tuple[str, ...], str] = {}
        self._items_of: dict[str, tuple[str, ...]] = {}

    def put_items(self, items: tuple[str, ...]) -> str:
        """Store a list of item ids, durably, unless it is there; returns its sha256. Raises OSError."""
        items = tuple(items)
        if items in self._known_items:
            return self._known_items[items]
        data = json.dumps(items, indent=0).encode()
        key = hashlib.sha256(data).hexdigest()
        path = self._items_path(key)
        if not path.exists() or path.read_bytes() != data:
            make_folder(path.parent)
            write_atomic(path, data)
        self._known_items[items] = key
        return key

    def get_items(self, key: str) -> tuple[str, ...]:
        """The list of item ids with this sha256. Raises HistoryError."""
        if key not in self._items_of:
            self._items_of[key] = tuple(json.loads(self._read(self._items_path(key), key)))
        return self._items_of[key]

    def _items_path(self, key: str) -> Path:
        return self.folder / "items" / f"{key}.json"

    def takes(self, scores: ScoreRows) -> bool:
        """Whether there are too many scores for a record."""
        return sum(len(values) for _, values in scores) > self.inline_values

    def put_scores(self, seq: int, scores: ScoreRows) -> tuple[str, str]:
        """Store the scores of event `seq`, durably; returns file name and sha256. Raises OSError."""
        import pyarrow as pa

        kind = pa.list_(pa.field("element", pa.float64()))
        columns = {
            "key": texts([key for key, _ in scores]),
            "values": lists([values for _, values in scores], kind),
        }
        data = to_parquet(pa.table(columns))
        path = self.folder / "scores" / f"{seq:08d}.parquet"
        make_folder(path.parent)
        write_atomic(path, data)
        return f"{path.parent.name}/{path.name}", hashlib.sha256(data).hexdigest()

    def get_scores(self, name: str, sha256: str) -> ScoreRows:
        """The scores in a side file. Raises HistoryError."""
        import pyarrow as pa

        path = self.folder / "scores" / Path(name).name
        table = from_parquet(self._read(path, sha256))
        values = pa.concat_arrays(table.column("values").chunks)
        return list(zip(table.column("key").to_pylist(), unpack_lists(values), strict=True))

    def _read(self, path: Path, sha256: str) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise HistoryError(
                f"{path}: the history needs this file, which cannot be read ({error.strerror}); "
                "restore it from a backup"
            ) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise HistoryError(f"{path} is damaged: its sha256 is not {sha256}; restore it from a backup")
        return data

    def sweep(self) -> None:
        """Remove half-written files of a writer that died."""
        for name in ("items", "scores"):
            sweep(self.folder / name)


def to_parquet(table: pa.Table) -> bytes:
    """A table as a Parquet file (zstd).

    Without dictionaries: Arrow builds them by comparing values, and 0.0 equals -0.0.
    """
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, compression="zstd", use_dictionary=False)
    return bytes(sink.getvalue())


def from_parquet(data: bytes) -> pa.Table:
    """The table in the bytes of a Parquet file. Raises pyarrow.ArrowException or OSError."""
    import pyarrow as pa
    from pyarrow import parquet

    return parquet.ParquetFile(pa.BufferReader(data)).read()
