"""What a run folder tells about its run, without touching it: quick, and safe while a driver is at work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from search.budget import Budget, Used, budget_in_force, end_in_force, limit_in_force, why_ended
from search.certificate import ARMS
from search.errors import MeiosisError
from search.limits import LimitsConfig
from search.manifest import read_manifest
from search.pareto.recorded import tracked_front
from search.run_log import last_events
from search.store.copied import COPIED, read_copied
from search.store.events import Ask, Trial
from search.store.following import Follower
from search.store.nodes_file import WorkersState, read_nodes
from search.store.run_folder import RunFolder
from search.store.sessions import Sessions
from search.trials import may_be_best
from search.utilisation import WorkerUse, together, worker_uses
from search.verdict import Verdict

RATE_TRIALS = 64
"""Trials over which the rate is taken."""
WARNINGS = 5
"""Warnings that are shown."""


@dataclass(frozen=True)
class RunStatus:
    """State of a run.

    Attributes:
        state: `running` (a driver holds the lock), `finished`, or `stopped` (it can be resumed).
        done, budget: candidates told, and all of them.
        limits, used: what the search may use and has used, by name (seconds, hours, items); limits that are set.
        ended_by: what ended the search, in a sentence, once it is over.
        sessions: how many drivers have worked on it.
        best_loss, best_candidate, best_origin, best_metrics: the best feasible trial on the search items.
        failures: message -> how many trials failed with it.
        last_result: local time of the last trial.
        phase, phase_done, phase_total: what a driver at work does, where its log tells: `search`, `select` or
            `certify`, and how many candidates of it are done.
        workers_busy, workers_wanted: workers at work and those asked for, a few seconds ago; None where no driver
            tells.
        trials_per_hour: over the last trials of the driver at work, waiting for the next one included.
        seconds_left: until the search ends, at that rate or by its limit of wall-clock.
        uses: what each worker did with its time; of a run at work, under this driver only.
        use: all of them together, or None.
        warnings: the latest warnings of the log, with their time.
        verdict: the sentence of a finished run.
        model: exported model, where there is one.
        winner: the candidate that a finished run chose, which need not be the best on the search items.
        workers: workers and nodes of a run on Ray as its pool last saw them.
        front, hypervolume: points of the front on the search items and the volume they dominate, see
            `search.pareto.hypervolume`; None where no front is searched, or the parents are not known yet.
        arms: searches that the winner is compared with -> candidates that were told in them.
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
    phase: str | None = None
    phase_done: int = 0
    phase_total: int = 0
    workers_busy: int | None = None
    workers_wanted: int | None = None
    trials_per_hour: float | None = None
    seconds_left: float | None = None
    uses: tuple[WorkerUse, ...] = ()
    use: WorkerUse | None = None
    warnings: tuple[str, ...] = ()
    verdict: str | None = None
    model: str | None = None
    winner: int | None = None
    workers: WorkersState | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    used: Mapping[str, float] = field(default_factory=dict)
    ended_by: str | None = None
    sessions: int = 0
    arms: Mapping[str, int] = field(default_factory=dict)
    copied_bytes: Mapping[str, int] = field(default_factory=dict)
    front: int | None = None
    hypervolume: float | None = None


def status_or_damage(folder: RunFolder) -> RunStatus:
    """The state of a run, or what is wrong with its folder, for lists that must not end at one bad run."""
    try:
        return run_status(folder)
    except MeiosisError as error:
        return RunStatus(folder.name, str(folder.path), f"damaged: {error}", 0, 0)


def _copied(folder: RunFolder) -> dict[str, int]:
    found: Counter[str] = Counter()
    for copied in read_copied(folder.workers / COPIED):
        found[f"{copied.node} ({copied.node_id[:8]})"] += copied.nbytes
    return dict(found)


def run_status(folder: RunFolder, follower: Follower | None = None) -> RunStatus:
    """Read the state of a run.

    Args:
        follower: of the history, to be given again when the state is read again.

    Raises:
        MeiosisError: `run.yaml` or the history is damaged.
    """
    manifest = read_manifest(folder)
    owner = folder.owner()
    follower = follower or Follower(folder.history)
    events = follower.events()
    origins = {event.candidate: event.origin for event in events if isinstance(event, Ask)}
    trials = [event for event in events if isinstance(event, Trial)]
    searched = [trial for trial in trials if trial.items == "search"]
    ended, limit = end_in_force(events), limit_in_force(events)
    sessions = Sessions(folder.sessions)
    search = manifest["config"]["search"]
    budget = budget_in_force(_budget_at_start(search), events)
    limits = {name: most for name, most in asdict(budget).items() if most is not None and name != "candidates"}
    rotate = bool(search.get("fitness", {}).get("rotate"))
    usable = [(t.loss, t) for t in searched if t.loss is not None and may_be_best(t, rotate)]
    best = min(usable, key=lambda pair: (pair[0], pair[1].candidate))[1] if usable else None
    failures = Counter(f"{t.failure_kind}: {t.failure_message}" for t in trials if t.failure_kind)
    verdict = Verdict.from_json(ended.verdict) if ended else None
    arms: dict[str, int] = {
        name: _told(folder.arms / name / "history") for name in ARMS if (folder.arms / name).is_dir()
    }
    # What was to be compared later, and is not in the verdict yet.
    left = arms.keys() - {arm.name for arm in verdict.arms} if verdict and verdict.candidates_searched else ()
    over = verdict is not None and not left and folder.best.exists()
    state = "running" if owner else "finished" if over else "stopped"
    last = max((trial.recorded_at for trial in trials), default=None)
    since = datetime.fromisoformat(owner.started).timestamp() if owner else 0.0
    uses = worker_uses(trials, since)
    log = last_events(folder.events_log)
    told = next((event for event in reversed(log) if event["event"] in ("progress", "started")), {}) if owner else {}
    rate = _rate(searched, since) if owner else None
    used = Used.of(events, sessions, follower.search_items)
    total = len(origins) if budget.candidates is None else budget.candidates
    front = tracked_front(manifest, searched, origins)
    return RunStatus(
        name=folder.name,
        path=str(folder.path),
        state=state,
        done=len(searched),
        budget=total,
        best_loss=best.loss if best else None,
        best_candidate=best.candidate if best else None,
        best_origin=origins[best.candidate] if best else None,
        best_metrics=best.metrics if best else {},
        failures=dict(failures.most_common()),
        last_result=datetime.fromtimestamp(last).isoformat(" ", "seconds") if last else None,
        phase=_text(told.get("phase")),
        phase_done=_number(told.get("done")) or 0,
        phase_total=_number(told.get("total")) or 0,
        workers_busy=_number(told.get("busy")),
        workers_wanted=_number(told.get("workers")),
        trials_per_hour=None if rate is None else 3600 * rate,
        seconds_left=_seconds_left(total - len(searched), rate, budget, used) if rate and not limit else None,
        uses=tuple(uses),
        use=together(uses) if uses else None,
        warnings=tuple(_warnings(log)),
        verdict=verdict.sentence() if verdict else None,
        model=str(folder.best) if folder.best.exists() else None,
        winner=ended.winner if ended else None,
        workers=read_nodes(folder.workers),
        limits=limits,
        used=asdict(used),
        ended_by=why_ended(len(origins), limit, budget) if ended or limit else None,
        sessions=len(sessions.all),
        arms=arms,
        copied_bytes=_copied(folder),
        front=front.size if front else None,
        hypervolume=front.hypervolume if front else None,
    )


def _told(history: Path) -> int:
    return sum(isinstance(event, Trial) and event.items == "search" for event in Follower(history).events())


def _budget_at_start(search: Mapping[str, Any]) -> Budget:
    limits = LimitsConfig.model_validate(search.get("limits") or {})
    candidates = None if search.get("baselines_only") else int(search["budget"])
    return Budget(candidates, limits.item_evaluations, limits.gpu_hours, limits.wall_clock)


def _rate(searched: Sequence[Trial], since: float) -> float | None:
    """Trials per second of the driver that began then, None before its first two."""
    times = sorted(trial.recorded_at for trial in searched if trial.recorded_at >= since)[-RATE_TRIALS:]
    seconds = time.time() - times[0] if len(times) > 1 else 0.0
    return (len(times) - 1) / seconds if seconds > 0 else None


def _seconds_left(candidates: int, rate: float, budget: Budget, used: Used) -> float | None:
    if candidates <= 0:
        return None
    seconds = candidates / rate
    return seconds if budget.wall_clock is None else min(seconds, max(0.0, budget.wall_clock - used.wall_clock))


def _warnings(log: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """The latest warnings, failed trials aside: those are counted."""
    found = [e for e in log if e.get("level") in ("warning", "error") and e["event"] not in ("trial", "failure")]
    for event in found[-WARNINGS:]:
        details = ", ".join(str(event[key]) for key in ("text", "worker", "node", "how", "why") if event.get(key))
        try:
            when = datetime.fromisoformat(str(event["time"])).astimezone().strftime("%H:%M:%S")
        except (KeyError, ValueError):
            when = ""
        yield f"{when} {event['event']}: {details}".strip()


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
