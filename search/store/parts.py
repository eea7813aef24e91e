"""The sealed part of a history: Parquet files, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.errors import HistoryError
from search.store.atomic import write_atomic
from search.store.columns import completed, is_readable
from search.store.side_files import from_parquet, to_parquet

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Part:
    """A sealed segment, as the manifest lists it."""

    file: str
    sha256: str
    rows: int
    first_seq: int
    last_seq: int


def part_path(folder: Path, index: int) -> Path:
    """Where the part of segment `index` is."""
    return folder / f"part-{index:06d}.parquet"


def load_manifest(folder: Path) -> list[Part]:
    """The parts in order; none when there is no manifest yet. Raises HistoryError."""
    path = folder / MANIFEST
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise HistoryError(f"{path} cannot be read: {error}; restore it from a backup") from error
    try:
        data: dict[str, Any] = json.loads(text)
        version, parts = data["version"], [Part(**part) for part in data["parts"]]
        if not all(isinstance(number, int) for part in parts for number in (part.rows, part.first_seq)):
            raise TypeError("rows and first_seq must be whole numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise HistoryError(f"{path} is damaged: {error}; restore it from a backup") from error
    if version != VERSION:
        raise HistoryError(f"{path} has version {version}, expected {VERSION}; use the Meiosis that wrote it")
    next_seq = 0
    for index, part in enumerate(parts):
        fits = part.file == part_path(folder, index).name and part.first_seq == next_seq
        if not fits or part.rows < 1 or part.last_seq != next_seq + part.rows - 1:
            raise HistoryError(
                f"{path} is damaged: parts[{index}] does not go on with event {next_seq}; restore it from a backup"
            )
        next_seq += part.rows
    return parts


def save_manifest(folder: Path, parts: list[Part]) -> None:
    """List `parts`, durably. Raises OSError."""
    data = {"version": VERSION, "parts": [asdict(part) for part in parts]}
    write_atomic(folder / MANIFEST, (json.dumps(data, indent=1) + "\n").encode())


def write_part(folder: Path, index: int, table: pa.Table) -> Part:
    """Write the events of a segment as Parquet, durably. Raises OSError."""
    path = part_path(folder, index)
    data = to_parquet(table)
    write_atomic(path, data)
    first_seq = table.column("seq")[0].as_py()
    sha256 = hashlib.sha256(data).hexdigest()
    return Part(path.name, sha256, table.num_rows, first_seq, first_seq + table.num_rows - 1)


def read_part(folder: Path, part: Part) -> pa.Table:
    """The events of a part, verified. Raises HistoryError."""
    import pyarrow as pa

    path = folder / part.file
    way_out = "restore it from a backup"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HistoryError(f"{path} is listed in {MANIFEST} and cannot be read: {error.strerror}; {way_out}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != part.sha256:
        raise HistoryError(f"{path} is damaged: its sha256 is {found}, {MANIFEST} says {part.sha256}; {way_out}")
    try:
        table = from_parquet(data)
    except (pa.ArrowException, OSError) as error:
        raise HistoryError(f"{path} cannot be read as Parquet: {error}; {way_out}") from error
    if not is_readable(table.schema):
        raise HistoryError(
            f"{path} has other columns than this version of Meiosis writes; use the Meiosis that wrote it"
        )
    if table.column("seq").to_pylist() != list(range(part.first_seq, part.last_seq + 1)):
        raise HistoryError(
            f"{path} does not hold events {part.first_seq} to {part.last_seq}, as {MANIFEST} says; {way_out}"
        )
    return completed(table)
