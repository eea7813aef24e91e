"""Live progress of a search on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from meiosis.cli.common import note

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from search.progress import Progress

PLAIN_LINE_SECONDS = 5.0

_PHASES = {"search": "search", "select": "choosing among finalists", "certify": "certifying"}


class Watch:
    """Shows candidates done, best so far, workers busy and time left.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Bar | None = None
        self._phase = ""
        self._started = self._last_line = 0.0
        self._done_at_start = 0

    def __enter__(self) -> Watch:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def line(self, text: str) -> None:
        """A sentence."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self._quiet:
            note(text)

    def progress(self, state: Progress) -> None:
        """The state after a change."""
        if self._quiet:
            return
        now = time.monotonic()
        phase = f"{state.arm}: {_PHASES[state.phase]}" if state.arm else _PHASES[state.phase]
        new_phase = phase != self._phase
        if new_phase:
            self._phase, self._started, self._done_at_start = phase, now, state.done
        text = self._describe(state, now)
        if self._bar is not None:
            if new_phase:
                self._bar.add_task(phase, total=state.total, completed=state.done, state=text)
            else:
                self._bar.update(self._bar.task_ids[-1], completed=state.done, state=text)
        elif new_phase or state.done == state.total or now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            note(f"{phase}: {state.done}/{state.total} candidates, {text}")

    def _describe(self, state: Progress, now: float) -> str:
        parts = []
        if state.best is not None and state.best.loss is not None and state.phase == "search":
            parts.append(f"best {state.best.loss:.4f} ({state.best_origin} {state.best.candidate})")
        if state.hypervolume is not None and state.phase == "search":
            parts.append(f"front {state.front}, hypervolume {state.hypervolume:.4f}")
        parts.append(f"{state.busy}/{state.workers} workers busy" if state.workers else "no workers yet")
        if state.failures:
            parts.append(f"{state.failures} failed")
        finished = state.done - self._done_at_start
        if finished > 0 and state.done < state.total:
            left = (now - self._started) / finished * (state.total - state.done)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """A length of time for people: `1 h 5 min`, `2 min 3 s`, `4 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
