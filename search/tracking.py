"""Results on their way to the trackers of a run.

Each tracker has a thread and a queue of its own: the loop of the driver never waits for a disk or a network
that is not the run's. A tracker that is too slow loses results, one that raises is told goodbye; either is
said in one line.
"""

from __future__ import annotations

import importlib.util
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from search.config import TrackerConfig
from search.run_log import emit
from search.store.events import Ask, Trial
from search.tracker import TRACKERS, TrackedRun, TrackedTrial, Tracker
from search.trials import may_be_best

QUEUED_TRIALS = 1000
"""Results that may wait for a tracker; more are dropped, and their number is told at the end."""
GOODBYE_SECONDS = 15.0
"""How long the end of a run waits for trackers to take what is left."""


class Tracking:
    """The trackers of one run. Nothing in here raises or waits, but `close`, which waits a little.

    Args:
        entries: `tracking` of the config, checked.
        rotate: whether candidates are scored on different parts of the items.
        name, folder, config: the run; each tracker gets a folder of its own below `folder`.
        complain: is told, in one line, what is missing or went wrong.
    """

    def __init__(
        self,
        entries: Iterable[TrackerConfig],
        *,
        name: str,
        folder: Path,
        config: Mapping[str, Any],
        rotate: bool = False,
        complain: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._origins: dict[int, str] = {}
        self._best = math.inf
        self._rotate = rotate
        self._feeds: list[_Feed] = []

        def say(text: str) -> None:
            emit("tracking", "warning", text=text)
            complain(text)

        for entry in entries:
            try:
                plugin = TRACKERS.get(entry.name)
                if plugin.needs and importlib.util.find_spec(plugin.needs) is None:
                    say(f"tracking: {entry.name} is not installed, the run goes on without it ({plugin.install})")
                    continue
                own = folder / entry.name.replace(":", ".")
                own.mkdir(parents=True, exist_ok=True)
                tracker = plugin(plugin.Options.model_validate(entry.options))
                self._feeds.append(_Feed(entry.name, tracker, TrackedRun(name, own, config), say))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a tracker never stops a run
                say(f"tracking: {entry.name} cannot start, the run goes on without it: {_line(error)}")

    def know(self, trials: Iterable[Trial], origins: Mapping[int, str]) -> None:
        """What the run found before: it is not sent again."""
        self._origins.update(origins)
        for trial in trials:
            self._note(trial)

    def recorded(self, event: Ask | Trial, more: Mapping[str, float] = MappingProxyType({})) -> None:
        """An ask or a trial that is in the history now, and more figures to be shown with a trial."""
        if isinstance(event, Ask):
            self._origins[event.candidate] = event.origin
            return
        self._note(event)
        if not self._feeds:
            return
        figures = {
            "merge_seconds": event.merge_seconds,
            "evaluate_seconds": event.evaluate_seconds,
            **event.metrics,
            **more,
        }
        if event.loss is not None and not event.failure_kind:
            figures["loss"] = event.loss
        figures["best_loss"] = self._best
        trial = TrackedTrial(
            event.candidate,
            event.items,
            self._origins.get(event.candidate, ""),
            {name: float(value) for name, value in figures.items() if math.isfinite(value)},
            f"{event.failure_kind}: {event.failure_message}" if event.failure_kind else None,
            event.recorded_at,
        )
        for feed in self._feeds:
            feed.put(trial)

    def close(self, how: str, seconds: float = GOODBYE_SECONDS) -> None:
        """Let the trackers take what is left, for so many seconds in all."""
        end = time.monotonic() + seconds
        for feed in self._feeds:
            feed.end(how)
        for feed in self._feeds:
            feed.join(end)
        self._feeds = []

    def _note(self, trial: Trial) -> None:
        if trial.items == "search" and trial.loss is not None and may_be_best(trial, self._rotate):
            self._best = min(self._best, trial.loss)


class _Feed:
    """The thread of one tracker."""

    def __init__(self, name: str, tracker: Tracker, run: TrackedRun, say: Callable[[str], None]) -> None:
        self._name, self._tracker, self._run, self._say = name, tracker, run, say
        self._queue: queue.Queue[TrackedTrial] = queue.Queue(QUEUED_TRIALS)
        self._how: str | None = None
        self._dropped = 0
        self._over = False
        # A daemon: a tracker that hangs must not keep the process.
        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    def put(self, trial: TrackedTrial) -> None:
        if self._over:
            return
        try:
            self._queue.put_nowait(trial)
        except queue.Full:
            self._dropped += 1

    def end(self, how: str) -> None:
        self._how = how

    def join(self, end: float) -> None:
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._over = True
            left = self._queue.qsize() + self._dropped
            self._say(f"tracking: {self._name} does not answer; {left} results did not reach it")
        elif self._dropped:
            self._say(f"tracking: {self._name} was too slow; {self._dropped} results did not reach it")

    def _work(self) -> None:
        try:
            self._tracker.begin(self._run)
            while not self._over:
                try:
                    trial = self._queue.get(timeout=0.2)
                except queue.Empty:
                    if self._how is not None:
                        break
                    continue
                self._tracker.trial(trial)
            self._tracker.close(self._how or "failed")
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a tracker never stops a run
            if not self._over:
                self._over = True
                self._say(f"tracking: {self._name} gave up, the run goes on without it: {_line(error)}")


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__
