"""Reading the folder of a history: what the manifest lists, and what is in the live segment."""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search.errors import HistoryError
from search.store.columns import schema
from search.store.lock import LOCK
from search.store.parts import Part, load_manifest, part_path, read_part
from search.store.segment import Scan, read_bounded, scan

if TYPE_CHECKING:
    import pyarrow as pa

READ_TRIES = 5
"""A reader may look while the writer seals; it looks again before it calls that damage."""


@dataclass(frozen=True)
class Contents:
    """The folder of a history as read at one moment.

    `live` is None before the first open, and where sealing was interrupted before the next segment.
    """

    parts: list[Part]
    tables: list[pa.Table]
    live_data: bytes
    live: Scan | None

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts) + (self.live.table.num_rows if self.live else 0)

    @property
    def all_tables(self) -> list[pa.Table]:
        return [*self.tables, self.live.table] if self.live else self.tables


def live_path(folder: Path, index: int) -> Path:
    """Where segment `index` is while it is live."""
    return folder / f"{index:06d}.arrows"


def read_contents(folder: Path, known: Container[str] = ()) -> Contents:
    """What is in a folder in which a writer may be at work; `known` as in `read_once`. Raises HistoryError."""
    for _ in range(READ_TRIES - 1):
        try:
            return read_once(folder, known)
        except HistoryError:
            time.sleep(0.02)
    return read_once(folder, known)


def read_once(folder: Path, known: Container[str] = ()) -> Contents:
    """What is in a folder, verified. Raises HistoryError.

    Args:
        known: hashes of parts that are not read again; an empty table stands for each.
    """
    import pyarrow as pa

    if not folder.is_dir():
        raise HistoryError(f"{folder}: there is no history")
    parts = load_manifest(folder)
    index = len(parts)
    first_seq = sum(part.rows for part in parts)
    path = live_path(folder, index)
    _check_strays(folder, index)
    live: Scan | None = None
    data = b""
    try:
        data = read_bounded(path)
        live = scan(path, data, first_seq)
    except FileNotFoundError:
        sealing = index and live_path(folder, index - 1).exists()
        if not sealing and _is_begun(folder):
            raise HistoryError(
                f"{path} is missing, with the events from {first_seq} on; restore it from a backup, or give "
                f"them up: touch {path}"
            ) from None
    except OSError as error:
        raise HistoryError(f"{path} cannot be read: {error.strerror}") from error
    nothing = pa.Table.from_batches([], schema())  # `empty_table` would import pandas
    tables = [nothing if part.sha256 in known else read_part(folder, part) for part in parts]
    return Contents(parts, tables, data, live)


def _is_begun(folder: Path) -> bool:
    """Whether more is there than a lock, and the first file half-written."""
    return any(path.name != LOCK and not path.name.startswith(".") for path in folder.iterdir())


def _check_strays(folder: Path, index: int) -> None:
    """Raise for files beyond what an interrupted sealing explains: the manifest is not the last one."""
    expected = {part_path(folder, i).name for i in range(index)}
    expected |= {live_path(folder, i).name for i in (index - 1, index)}
    if live_path(folder, index).exists():
        expected.add(part_path(folder, index).name)
    found = {path.name for pattern in ("*.arrows", "part-*.parquet") for path in folder.glob(pattern)}
    for name in sorted(found - expected):
        raise HistoryError(
            f"{folder / name} does not go with manifest.json, which lists {index} parts; "
            "restore the missing or damaged manifest.json from a backup"
        )
