"""The columns of a history, and events as rows of them.

| column | type | meaning |
|---|---|---|
| seq | int64 | number of the event, from 0 without gaps |
| kind | string | `ask`, `trial`, `limit`, `extended` or `end` |
| candidate | int64 | number of the candidate; of the winner in `end` |
| items | string | pool of items of a trial: `search`, `select` or `certify` |
| origin | string | where an asked candidate comes from |
| genome | list<float64> | flat genome in [0, 1]; null for candidates outside the space |
| recipe_hash | string | sha256 of the recipe |
| recipe | string | canonical JSON of a recipe that the genome does not give |
| metrics | map<string, float64> | `<evaluator>.<metric>` -> value |
| loss | float64 | what the optimiser was told |
| feasible | bool | whether the constraints hold |
| item_ids | map<string, string> | evaluator -> sha256 of its item ids, listed in `items/<sha256>.json` |
| scores | map<string, list<float64>> | `<evaluator>:weight`, then `<evaluator>.<metric>`: a value per item |
| scores_file | string | Parquet file that holds the scores instead when there are many |
| scores_sha256 | string | hash of that file |
| failure_kind, failure_message | string | why a trial has no scores |
| weights_sha256 | string | hash of the merged tensors |
| recorded_at | float64 | Unix time in seconds |
| merge_seconds, evaluate_seconds | float64 | time spent by the worker |
| worker | string | who evaluated |
| attempts | int64 | how often the evaluation was started |
| node | string | host name of the machine that evaluated |
| started_at | float64 | Unix time in seconds at which the last attempt was sent to a worker, by the driver's clock |
| queue_seconds | float64 | from submission to that moment |
| bytes_read | int64 | bytes of the models that the merge read |
| bytes_moved | int64 | bytes of messages between driver and worker |
| layers_run | int64 | layers of the model that ran, once for every forward pass |
| layers_reused | int64 | layers whose result was known from an earlier candidate of the worker |
| censored | bool | whether the evaluation was stopped early, since the candidate is worse than its reference |
| scored | int64 | items scored, where these are not all; the metrics are then estimates for all |
| verdict | string | JSON of `end`, of `limit` (limit, used) and of `extended` (the budget from there on) |
| crc32 | uint32 | CRC-32 of the record: of its Arrow message up to the last 8 bytes, and of its place unless 0 |

Columns that do not belong to a kind of event are null. There are no dictionary columns: they would
need messages of their own, and a record would no longer stand for itself. The last 8 bytes of a record hold
the column crc32 and, in what pads it, the place of the record among those that were written with one sync.

Columns came to be over time. A history that was begun without those in `ADDED` is read as if they were null
there, and goes on in a new segment that has them. A new column is added to both tables and to `ADDED`; it
must be one that may be null.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaluators.base import Scores
from search.store.arrays import ScoreRows, maker, score_rows
from search.store.events import Ask, End, Event, Extended, LimitReached, Trial
from search.store.side_files import SideFiles

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = b"1"
"""Version of the columns, in the metadata of the schema."""

ADDED = frozenset(
    {
        "node",
        "started_at",
        "queue_seconds",
        "bytes_read",
        "bytes_moved",
        "layers_run",
        "layers_reused",
        "censored",
        "scored",
    }
)
"""Columns that older histories of this version lack."""

_UNSET = 0xFFFFFFFF
_CRC_BYTES = 8
"""The last buffer of a record is the crc32 column: 4 bytes, and 4 of padding, which hold the place."""


@cache
def schema() -> pa.Schema:
    """The Arrow schema of live segments and sealed parts."""
    import pyarrow as pa

    # 'element' is what Parquet calls the values of a list; with it a schema survives the round trip
    floats = pa.list_(pa.field("element", pa.float64()))
    text, number, real = pa.string(), pa.int64(), pa.float64()
    types: dict[str, Any] = {
        "seq": number,
        "kind": text,
        "candidate": number,
        "items": text,
        "origin": text,
        "genome": floats,
        "recipe_hash": text,
        "recipe": text,
        "metrics": pa.map_(text, real),
        "loss": real,
        "feasible": pa.bool_(),
        "item_ids": pa.map_(text, text),
        "scores": pa.map_(text, floats),
        "scores_file": text,
        "scores_sha256": text,
        "failure_kind": text,
        "failure_message": text,
        "weights_sha256": text,
        "recorded_at": real,
        "merge_seconds": real,
        "evaluate_seconds": real,
        "worker": text,
        "attempts": number,
        "node": text,
        "started_at": real,
        "queue_seconds": real,
        "bytes_read": number,
        "bytes_moved": number,
        "layers_run": number,
        "layers_reused": number,
        "censored": pa.bool_(),
        "scored": number,
        "verdict": text,
        "crc32": pa.uint32(),
    }
    always = {"seq", "kind", "crc32"}
    return pa.schema(
        [pa.field(name, kind, nullable=name not in always) for name, kind in types.items()],
        metadata={b"meiosis.history": VERSION},
    )


@cache
def _columns() -> tuple[tuple[str, pa.Array, Callable[[Any], pa.Array]], ...]:
    """Of every column its name, the array of one null, and what makes an array of one value.

    Looked up once: a type of Arrow is hashed by its text.
    """
    import pyarrow as pa

    return tuple((field.name, pa.nulls(1, field.type), maker(field.type)) for field in schema())


def is_current(found: pa.Schema) -> bool:
    """Whether the columns are those of `schema`. What Arrow calls the inside of a map may differ."""
    return bool(found.equals(schema()) and found.metadata == schema().metadata)


def is_readable(found: pa.Schema) -> bool:
    """Whether the columns are those of `schema`, but for some of `ADDED` that may be missing."""
    import pyarrow as pa

    try:
        names = set(found.names)
    except UnicodeDecodeError:  # of a damaged file
        return False
    expected = [field for field in schema() if field.name in names or field.name not in ADDED]
    return bool(found.equals(pa.schema(expected)) and found.metadata == schema().metadata)


def completed(table: pa.Table) -> pa.Table:
    """A table of readable columns as one of `schema`: what it lacks is null."""
    import pyarrow as pa

    names = set(table.column_names)
    columns = [
        table.column(field.name).cast(field.type) if field.name in names else pa.nulls(table.num_rows, field.type)
        for field in schema()
    ]
    return pa.Table.from_arrays(columns, schema=schema())


def encode(event: Event, seq: int, side: SideFiles, place: int = 0) -> bytes:
    """The Arrow IPC message of an event; its item ids and large scores are on disk when this returns.

    Args:
        place: how many records are written before it with the same sync. A disk may lose those and keep this one.
    """
    import pyarrow as pa

    row = _row(event, seq, side)
    arrays = [null if (value := row.get(name)) is None else make(value) for name, null, make in _columns()]
    message = bytearray(pa.RecordBatch.from_arrays(arrays, schema=schema()).serialize())
    if message[-_CRC_BYTES:] != struct.pack("<II", _UNSET, 0):
        raise AssertionError("Arrow does not lay out a record as expected: crc32 is not its last buffer")
    message[-_CRC_BYTES:] = _tail(memoryview(message)[:-_CRC_BYTES], place)
    return bytes(message)


def is_whole(record: memoryview) -> bool:
    """Whether the bytes of a record are those that `encode` made."""
    return bytes(record[-_CRC_BYTES:]) == _tail(record[:-_CRC_BYTES], place_of(record))


def place_of(record: memoryview) -> int:
    """The place of a whole record among those that were written with one sync, from 0."""
    (place,) = struct.unpack("<I", record[-_CRC_BYTES // 2 :])
    return int(place)


def _tail(body: memoryview, place: int) -> bytes:
    checksum = zlib.crc32(body)
    if place:  # without it the checksum is that of records from before there were places
        checksum = zlib.crc32(struct.pack("<I", place), checksum)
    return struct.pack("<II", checksum, place)


def _row(event: Event, seq: int, side: SideFiles) -> dict[str, object]:
    match event:
        case Ask():
            row: dict[str, object] = {
                "kind": "ask",
                "candidate": event.candidate,
                "origin": event.origin,
                "genome": None if event.genome is None else np.array(event.genome, np.float64),
                "recipe_hash": event.recipe_hash,
                "recipe": event.recipe,
            }
        case Trial():
            scores = _score_rows(event.scores)
            row = {
                "kind": "trial",
                "candidate": event.candidate,
                "items": event.items,
                "metrics": event.metrics,
                "loss": event.loss,
                "feasible": event.feasible,
                "item_ids": {name: side.put_items(block.items) for name, block in event.scores.items()},
                "failure_kind": event.failure_kind,
                "failure_message": _printable(event.failure_message),
                "weights_sha256": event.weights_sha256,
                "recorded_at": event.recorded_at,
                "merge_seconds": event.merge_seconds,
                "evaluate_seconds": event.evaluate_seconds,
                "worker": _printable(event.worker),
                "attempts": event.attempts,
                "node": _printable(event.node),
                "started_at": event.started_at,
                "queue_seconds": event.queue_seconds,
                "bytes_read": event.bytes_read,
                "bytes_moved": event.bytes_moved,
                "layers_run": event.layers_run,
                "layers_reused": event.layers_reused,
                "censored": event.censored or None,
                "scored": event.scored,
            }
            if side.takes(scores):
                row["scores_file"], row["scores_sha256"] = side.put_scores(seq, scores)
            else:
                row["scores"] = scores
        case LimitReached():
            row = {"kind": "limit", "verdict": json.dumps({"limit": event.limit, "used": event.used})}
        case Extended():
            row = {"kind": "extended", "verdict": event.budget}
        case End():
            row = {"kind": "end", "candidate": event.winner, "verdict": event.verdict}
    return {**row, "seq": seq, "crc32": _UNSET}


def decode(table: pa.Table, side: SideFiles | None) -> list[Event]:
    """The events of a table of `schema`, with scores and item ids from `side`; None leaves the scores out.

    Raises:
        HistoryError: a side file is missing or damaged.
    """
    if side is None:
        rows = table.drop_columns(["scores", "item_ids", "genome"]).to_pylist()
        return [_event({**row, "item_ids": (), "genome": None, "scores_file": None}, [], None) for row in rows]
    rows = table.drop_columns(["scores"]).to_pylist()
    inline = score_rows(table.column("scores"))
    return [_event(row, scores, side) for row, scores in zip(rows, inline, strict=True)]


def _event(row: dict[str, Any], scores: ScoreRows, side: SideFiles | None) -> Event:
    if row["kind"] == "ask":
        genome = row["genome"]
        return Ask(
            candidate=row["candidate"],
            origin=row["origin"],
            genome=None if genome is None else tuple(genome),
            recipe_hash=row["recipe_hash"],
            recipe=row["recipe"],
        )
    if row["kind"] == "end":
        return End(winner=row["candidate"], verdict=row["verdict"])
    if row["kind"] == "limit":
        return LimitReached(**json.loads(row["verdict"]))
    if row["kind"] == "extended":
        return Extended(row["verdict"])
    ids: dict[str, tuple[str, ...]] = {}
    if side is not None:
        ids = {name: side.get_items(key) for name, key in row["item_ids"]}
        if row["scores_file"] is not None:
            scores = side.get_scores(row["scores_file"], row["scores_sha256"])
    return Trial(
        candidate=row["candidate"],
        items=row["items"],
        metrics=dict(row["metrics"]),
        loss=row["loss"],
        feasible=row["feasible"],
        scores=_scores(ids, scores),
        failure_kind=row["failure_kind"],
        failure_message=row["failure_message"],
        weights_sha256=row["weights_sha256"],
        recorded_at=row["recorded_at"],
        merge_seconds=row["merge_seconds"],
        evaluate_seconds=row["evaluate_seconds"],
        worker=row["worker"],
        attempts=row["attempts"],
        node=row["node"] or "",
        started_at=row["started_at"] or 0.0,
        queue_seconds=row["queue_seconds"] or 0.0,
        bytes_read=row["bytes_read"] or 0,
        bytes_moved=row["bytes_moved"] or 0,
        layers_run=row["layers_run"] or 0,
        layers_reused=row["layers_reused"] or 0,
        censored=bool(row["censored"]),
        scored=row["scored"],
    )


def _score_rows(scores: Mapping[str, Scores]) -> ScoreRows:
    rows: list[tuple[str, NDArray[np.float64]]] = []
    for name, block in scores.items():
        blocks = {f"{name}:weight": block.weights}
        blocks.update({f"{name}.{metric}": values for metric, values in block.values.items()})
        for key, values in blocks.items():
            array = np.ascontiguousarray(values, "<f8")
            if array.shape != (len(block.items),) or key.count(":") > (key == f"{name}:weight"):
                raise ValueError(
                    f"scores of '{key}' have shape {array.shape} for {len(block.items)} items; "
                    "expected one number per item, and no colon in the names"
                )
            rows.append((key, array))
    return rows


def _scores(items: dict[str, tuple[str, ...]], rows: ScoreRows) -> dict[str, Scores]:
    """Undo `_score_rows`. The weights open the rows of an evaluator: a dot may be part of either name."""
    found: dict[str, tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]] = {}
    name = ""
    for key, values in rows:
        if ":" in key:
            name = key.rpartition(":")[0]
            found[name] = values, {}
        else:
            found[name][1][key[len(name) + 1 :]] = values
    return {name: Scores(items[name], values, weights) for name, (weights, values) in found.items()}


def _printable(text: str) -> str:
    """Text that UTF-8 can hold: messages may quote file names that are not text."""
    return text.encode("utf-8", "backslashreplace").decode()
