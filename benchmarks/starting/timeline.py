"""What the time until the first evaluation of a run was spent on, out of its log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

Event = Mapping[str, Any]

PARTS = {
    "python": "Python and the command line",
    "config": "imports, config read",
    "check": "config checked: plug-ins, data, files of the models",
    "hashes": "models hashed, or found hashed",
    "folder": "run folder, first candidates",
    "ray": "Ray started, or joined",
    "process": "plan of the workers, their processes",
    "hello": "worker's first call: our modules, its files found",
    "libraries": "libraries in the worker: torch, transformers",
    "models": "live model and sources",
    "evaluators": "evaluators: tokenizer, data",
    "turn": "wait for the other workers' first call",
    "merge": "merge of the first candidate",
    "evaluate": "its evaluation",
    "commit": "result returned and recorded",
}
"""Name of a part -> what happens in it, in the order in which they end."""


def read_log(path: Path) -> list[Event]:
    """The events of a run, as far as they are whole."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def first_trial(events: Sequence[Event]) -> Event | None:
    """The first result that was recorded."""
    return next((event for event in events if event["event"] == "trial"), None)


def parts_of(events: Sequence[Event], started_at: float) -> dict[str, float]:
    """Part -> seconds, from `started_at` (Unix) to the first recorded result: together, all the time between.

    What goes on beside something else counts only as far as it ends later.

    Raises:
        ValueError: the log has no result, or does not tell of all the steps before it.
    """
    trial = first_trial(events)
    if trial is None:
        raise ValueError("no candidate was evaluated")
    ends = {"commit": _time(trial)}
    for name, event in (("python", "command"), ("config", "config_read"), ("check", "config_checked")):
        ends[name] = _time(_first(events, event))
    ends["hashes"] = _time(_first(events, "models_hashed"))
    ready = next((e for e in events if e["event"] == "worker_ready" and e["worker"] == trial["worker"]), None)
    if ready is None:
        raise ValueError(f"the log does not tell when {trial['worker']} was ready")
    if "greeted_at" in ready:  # on Ray
        ends["folder"], ends["ray"] = _time(_first(events, "ray_starting")), _time(_first(events, "ray_up"))
        ends["hello"] = ready["greeted_at"]
        ends["process"] = ready["greeted_at"] - ready["hello_seconds"]
    else:
        ends["folder"] = _time(ready) - ready["build_seconds"]
    ends["evaluators"] = _time(ready)
    ends["models"] = ends["evaluators"] - ready["evaluator_seconds"]
    ends["libraries"] = ends["models"] - ready["model_seconds"]
    ends["turn"] = trial["started_at"]
    ends["merge"] = ends["turn"] + trial["merge_seconds"]
    ends["evaluate"] = ends["merge"] + trial["evaluate_seconds"]
    found, before = {}, started_at
    for part in PARTS:
        if part in ends:
            # Times in the log have milliseconds only, so the last parts may seem to overlap by one.
            now = max(before, min(ends[part], ends["commit"]))
            found[part], before = now - before, now
    return found


def _first(events: Sequence[Event], name: str) -> Event:
    event = next((event for event in events if event["event"] == name), None)
    if event is None:
        raise ValueError(f"the log tells of no '{name}'")
    return event


def _time(event: Event) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()
