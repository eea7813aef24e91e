"""What two runs recorded, read and compared without the code that recorded it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

CIRCUMSTANCES = frozenset(
    {
        "failure_message",
        "recorded_at",
        "merge_seconds",
        "evaluate_seconds",
        "worker",
        "attempts",
        "node",
        "started_at",
        "queue_seconds",
        "bytes_read",
        "bytes_moved",
        "layers_run",
        "layers_reused",
        "crc32",
    }
)
"""Columns that tell when, where and how long; all others are what a run and its repetition must agree on."""

Event = dict[str, Any]


def read_events(run: Path) -> list[Event]:
    """All events of a run, as rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    history = run / "history"
    tables = [pq.read_table(path) for path in sorted(history.glob("part-*.parquet"))]
    for path in sorted(history.glob("*.arrows")):
        with pa.ipc.open_stream(path) as reader:
            tables.append(reader.read_all())
    return [event for table in tables for event in table.to_pylist()]


def decided(event: Event) -> str:
    """What is not circumstance in an event, as text in which every bit of a number counts."""
    return json.dumps({name: _exact(value) for name, value in event.items() if name not in CIRCUMSTANCES})


def _exact(value: object) -> object:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, list | tuple):
        return [_exact(one) for one in value]
    return value


def model_hashes(run: Path) -> dict[str, str]:
    """File of the exported weights -> sha256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.glob("best/*.safetensors"))}


def faults(disturbed: Path, undisturbed: Path, budget: int) -> list[str]:
    """Everything that is wrong with the disturbed run, a line each."""
    events = read_events(disturbed)
    found = _faults_of_one(events, budget)
    ours, theirs = [decided(event) for event in events], [decided(event) for event in read_events(undisturbed)]
    if ours != theirs:
        place = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        where = f"event {place} differs" if place is not None else f"{len(ours)} events, expected {len(theirs)}"
        found.append(f"the history is not that of the undisturbed run: {where}")
    if not model_hashes(disturbed) or model_hashes(disturbed) != model_hashes(undisturbed):
        found.append("the exported model is not that of the undisturbed run")
    if waiting := [path.name for path in disturbed.glob("spool/*.arrow*")]:
        found.append(f"results are left that were never told: {waiting}")
    return found


def _faults_of_one(events: list[Event], budget: int) -> list[str]:
    found = []
    if [event["seq"] for event in events] != list(range(len(events))):
        found.append("events are missing, or there twice")
    asked = [event["candidate"] for event in events if event["kind"] == "ask"]
    if asked != list(range(budget)):
        found.append(f"candidates 0 to {budget - 1} were not asked for once each, in their order")
    trials = [event for event in events if event["kind"] == "trial"]
    counts = Counter((event["candidate"], event["items"]) for event in trials)
    if twice := [key for key, count in counts.items() if count > 1]:
        found.append(f"told twice: {twice}")
    told = [event["candidate"] for event in trials if event["items"] == "search"]
    if lost := sorted(set(asked) - set(told)):
        found.append(f"trials that were lost: {lost}")
    if told != sorted(told):
        found.append("results were not told in the order of their candidates")
    if set(told) - set(asked) or any(event["candidate"] not in asked for event in trials):
        found.append("a trial of a candidate that nobody asked for")
    for event in trials:
        if event["failure_kind"] is not None:
            found.append(f"candidate {event['candidate']} was declared failed: {event['failure_message']}")
    ends = [number for number, event in enumerate(events) if event["kind"] == "end"]
    if ends != [len(events) - 1]:
        found.append("the run does not end once, with its last event")
    return found


def evaluated(run: Path) -> tuple[int, int]:
    """How many trials needed an evaluation, and how many of these were started more than once by one driver."""
    attempts = [event["attempts"] for event in read_events(run) if event["kind"] == "trial"]
    return sum(count > 0 for count in attempts), sum(count > 1 for count in attempts)
