"""What a run folder tells about its run, without touching it: quick, and safe while a driver is at work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from search.errors import MeiosisError
from search.finals import Verdict
from search.manifest import read_manifest
from search.store.copied import COPIED, read_copied
from search.store.events import Ask, End, Trial
from search.store.run_folder import RunFolder


@dataclass(frozen=True)
class RunStatus:
    """State of a run.

    Attributes:
        state: `running` (a driver holds the lock), `finished`, or `stopped` (it can be resumed).
        done, budget: candidates told, and all of them.
        best_loss, best_candidate, best_origin, best_metrics: the best feasible trial on the search items.
        failures: message -> how many trials failed with it.
        last_result: local time of the last trial.
        verdict: the sentence of a finished run.
        model: exported model, where there is one.
        copied_bytes: node (with the beginning of Ray's id) -> bytes of models and data that were copied to it.
    """

    name: str
    path: str
    state: str
    done: int
    budget: int
    best_loss: float | None = None
    best_candidate: int | None = None
    best_origin: str | None = None
    best_metrics: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    last_result: str | None = None
    verdict: str | None = None
    model: str | None = None
    copied_bytes: Mapping[str, int] = field(default_factory=dict)


def status_or_damage(folder: RunFolder) -> RunStatus:
    """The state of a run, or what is wrong with its folder, for lists that must not end at one bad run."""
    try:
        return run_status(folder)
    except MeiosisError as error:
        return RunStatus(folder.name, str(folder.path), f"damaged: {error}", 0, 0)


def _copied(folder: RunFolder) -> dict[str, int]:
    found: Counter[str] = Counter()
    for copied in read_copied(folder.path / "workers" / COPIED):
        found[f"{copied.node} ({copied.node_id[:8]})"] += copied.nbytes
    return dict(found)


def run_status(folder: RunFolder) -> RunStatus:
    """Read the state of a run.

    Raises:
        MeiosisError: `run.yaml` or the history is damaged.
    """
    manifest = read_manifest(folder)
    events = folder.events()
    origins = {event.candidate: event.origin for event in events if isinstance(event, Ask)}
    trials = [event for event in events if isinstance(event, Trial)]
    searched = [trial for trial in trials if trial.items == "search"]
    ended = next((event for event in events if isinstance(event, End)), None)
    usable = [(trial.loss, trial) for trial in searched if trial.feasible and trial.loss is not None]
    best = min(usable, key=lambda pair: (pair[0], pair[1].candidate))[1] if usable else None
    failures = Counter(f"{t.failure_kind}: {t.failure_message}" for t in trials if t.failure_kind)
    state = "running" if folder.owner() else "finished" if ended and folder.best.exists() else "stopped"
    last = max((trial.recorded_at for trial in trials), default=None)
    return RunStatus(
        name=folder.name,
        path=str(folder.path),
        state=state,
        done=len(searched),
        budget=len(origins)
        if manifest["config"]["search"].get("baselines_only")
        else int(manifest["config"]["search"]["budget"]),
        best_loss=best.loss if best else None,
        best_candidate=best.candidate if best else None,
        best_origin=origins[best.candidate] if best else None,
        best_metrics=best.metrics if best else {},
        failures=dict(failures.most_common()),
        last_result=datetime.fromtimestamp(last).isoformat(" ", "seconds") if last else None,
        verdict=Verdict.from_json(ended.verdict).sentence() if ended else None,
        model=str(folder.best) if folder.best.exists() else None,
        copied_bytes=_copied(folder),
    )
