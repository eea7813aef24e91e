"""Who sees what a run does, beside its history: the person at the terminal, the log, trackers, metrics."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from search.errors import InterruptedRun
from search.pareto.front import FrontTracker
from search.pool import Outcome, Pool, Publisher
from search.progress import Progress, Watcher
from search.run_log import emit, log_to
from search.setup import Setup
from search.store.events import Ask, Trial
from search.store.run_folder import RunFolder
from search.tracking import Tracking

PROGRESS_SECONDS = 5.0
"""The log tells the state of the run at most this often."""


@dataclass
class Observer:
    """Passes on what happens while a driver is at work. A context manager: how it ends is told as well.

    What fails in here is said to `watcher`, once, and never ends the run.

    Args:
        folder: the run, locked.
        watcher: who is at the terminal.
    """

    folder: RunFolder
    setup: Setup
    watcher: Watcher
    _publish: Publisher | None = None
    _logged: tuple[float, str] = (0.0, "")
    _front: FrontTracker | None = None
    _origins: dict[int, str] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Observer:
        config = self.setup.config
        if self.setup.objective.pareto:
            self._front = FrontTracker(self.setup.objective, len(config.models.sources))
        self._stack.enter_context(log_to(self.folder.events_log, self.watcher.line))
        started = {"pid": os.getpid(), "host": platform.node(), "workers": config.cluster.workers}
        emit("started", run=self.folder.name, name=config.name, pool=config.cluster.pool, **started)
        self._tracking = Tracking(
            config.tracking,
            name=self.folder.name,
            folder=self.folder.path / "tracking",
            config=config.model_dump(mode="json") if config.tracking else {},
            rotate=bool(config.search.fitness.rotate),
            complain=self.watcher.line,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        how: Literal["finished", "interrupted", "failed"] = "finished"
        if error is not None:
            how = "interrupted" if isinstance(error, InterruptedRun | KeyboardInterrupt) else "failed"
        level: Literal["info", "error"] = "error" if how == "failed" else "info"
        why = {} if error is None else {"why": f"{type(error).__name__}: {error}"}
        self._tracking.close(how)
        emit("ended", level, how=how, **why)
        self._stack.close()

    def line(self, text: str) -> None:
        """A sentence for the person at the terminal."""
        emit("message", text=text)
        self.watcher.line(text)

    def pool(self, pool: Pool) -> Pool:
        """The pool, which is shown the state from now on if it wants to."""
        self._publish = pool if isinstance(pool, Publisher) else None
        return pool

    def know(self, trials: Iterable[Trial], origins: Mapping[int, str]) -> None:
        """What the history held before."""
        known = list(trials)
        self._tracking.know(known, origins)
        self._origins.update(origins)
        if self._front is not None:
            for trial in known:
                self._front.note(trial, self._origins[trial.candidate])

    def progress(self, state: Progress) -> None:
        """The state after a change."""
        if self._front is not None:
            state = replace(state, front=self._front.size, hypervolume=self._front.hypervolume)
        self.watcher.progress(state)
        if self._publish is not None:
            self._publish.publish(state)
        now = time.monotonic()
        phase = f"{state.arm} {state.phase}" if state.arm else state.phase
        if now - self._logged[0] >= PROGRESS_SECONDS or self._logged[1] != phase:
            self._logged = now, phase
            counts = {"done": state.done, "total": state.total, "busy": state.busy, "workers": state.workers}
            emit("progress", phase=phase, **counts, **self._of_front())

    def recorded(self, event: Ask | Trial) -> None:
        """An ask or a trial that is in the history now."""
        if isinstance(event, Ask):
            self._origins[event.candidate] = event.origin
            emit("asked", candidate=event.candidate, origin=event.origin)
        else:
            if self._front is not None:
                self._front.note(event, self._origins[event.candidate])
            emit("trial", "warning" if event.failure_kind else "info", **_fields(event), **self._of_front())
        self._tracking.recorded(event, self._of_front())

    def _of_front(self) -> dict[str, float]:
        """Size and hypervolume of the front so far; nothing without a search for one."""
        if self._front is None or self._front.size is None or self._front.hypervolume is None:
            return {}
        return {"front": self._front.size, "hypervolume": self._front.hypervolume}

    def failed(self, outcome: Outcome) -> None:
        """A failure, with its traceback."""
        assert outcome.failure is not None
        detail = outcome.failure.detail
        emit("failure", "warning", candidate=outcome.candidate, items=outcome.items, detail=detail)
        what = f"candidate {outcome.candidate} on {outcome.items} items: {outcome.failure.message}"
        with contextlib.suppress(OSError), self.folder.log.open("a", encoding="utf-8", errors="replace") as log:
            log.write(f"{what}\n{detail}\n")


def _fields(trial: Trial) -> dict[str, Any]:
    """What the log tells of a trial."""
    fields: dict[str, Any] = {
        "candidate": trial.candidate,
        "items": trial.items,
        "worker": trial.worker,
        "node": trial.node,
        "loss": trial.loss,
        "feasible": trial.feasible,
        "merge_seconds": trial.merge_seconds,
        "evaluate_seconds": trial.evaluate_seconds,
        "queue_seconds": trial.queue_seconds,
        "started_at": trial.started_at,
        "bytes_read": trial.bytes_read,
        "bytes_moved": trial.bytes_moved,
        "layers_run": trial.layers_run,
        "layers_reused": trial.layers_reused,
        "attempts": trial.attempts,
    }
    if trial.failure_kind:
        fields |= {"kind": trial.failure_kind, "why": trial.failure_message}
    return fields
