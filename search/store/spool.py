"""Evaluations that are finished but not yet committed.

Trials enter the history in the order of their candidates, so one that overtook a slower candidate
waits. It waits on disk, and a crash does not cost its evaluation. Files are segments as those of the history;
one goes when nothing waits in it any more. A driver appends to files that it began, never to older ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from evaluators.base import ItemPool
from search.errors import HistoryError
from search.store import segment
from search.store.atomic import explained, make_folder, sweep
from search.store.columns import decode, encode
from search.store.events import Trial
from search.store.segment import Segment, scan
from search.store.side_files import SideFiles

Key = tuple[int, ItemPool]
TRIALS_PER_FILE = 256


class Spool:
    """A folder of trials. For the one driver of a run; no file is open between calls.

    Args:
        folder: where; created with the first `put`.
        trials_per_file: so many go into a file before the next one is begun.
    """

    def __init__(self, folder: Path, trials_per_file: int = TRIALS_PER_FILE) -> None:
        self.folder = Path(folder)
        self._trials_per_file = trials_per_file
        self._side = SideFiles(self.folder, inline_values=math.inf)
        self._file_of: dict[Key, Path] = {}
        self._waiting_in: dict[Path, int] = {}
        self._live: Path | None = None
        self._live_bytes = self._live_rows = 0

    def put(self, candidate: int, items: ItemPool, trial: Trial) -> None:
        """Keep a trial; durable on return. Raises HistoryError."""
        assert (candidate, items) == (trial.candidate, trial.items)
        self.put_all([trial])

    def put_all(self, trials: Sequence[Trial]) -> None:
        """Keep trials, with one sync; all are durable on return. Raises HistoryError."""
        if not trials:
            return
        others = f" and {len(trials) - 1} others" if len(trials) > 1 else ""
        what = f"cannot keep the finished evaluation of candidate {trials[0].candidate}{others}"
        with explained(f"{self.folder}: {what}"):
            if self._live is None or self._live_rows >= self._trials_per_file:
                self._begin_file()
            assert self._live is not None
            live = Segment(self._live, self._live_bytes, self._live_rows)
            try:
                first = live.rows
                records = [encode(trial, first + place, self._side, place) for place, trial in enumerate(trials)]
                live.append(b"".join(records), len(records))
            finally:
                live.close()
        self._live_bytes, self._live_rows = live.size_bytes, live.rows
        self._note(self._live, trials)

    def take_all(self) -> dict[Key, Trial]:
        """All trials that are kept, by candidate and pool, in the order of candidates.

        They stay until `drop`. A trial whose file holds others too may come back after its drop, so a key that
        the history already has is to be dropped. Damaged files are removed, and a torn end is passed over: those
        evaluations are simply run again.
        """
        sweep(self.folder)
        self._side.sweep()
        self._file_of, self._waiting_in, self._live = {}, {}, None
        found: dict[Key, Trial] = {}
        for path in sorted(self.folder.glob("*.arrow*")):
            trials = self._read_entry(path) if path.suffix == ".arrow" else self._read(path, 0, torn=True)
            if trials:
                found.update({(trial.candidate, trial.items): trial for trial in trials})
                self._note(path, trials)
            else:
                path.unlink(missing_ok=True)
        return dict(sorted(found.items()))

    def drop(self, candidate: int, items: ItemPool) -> None:
        """Forget a trial, which the history has now; one that is not kept is fine."""
        path = self._file_of.pop((candidate, items), None)
        if path is None:
            return
        self._waiting_in[path] -= 1
        if path != self._live or self._live_rows >= self._trials_per_file:
            self._remove_if_empty(path)

    def tidy(self) -> None:
        """Leave no file behind in which nothing waits."""
        if self._live is not None:
            live, self._live = self._live, None
            self._remove_if_empty(live)

    def _begin_file(self) -> None:
        self.tidy()
        make_folder(self.folder)
        numbers = [int(path.stem) for path in self.folder.glob("*.arrows") if path.stem.isdigit()]
        self._live = self.folder / f"{max(numbers, default=-1) + 1:06d}.arrows"
        segment.create(self._live)
        self._live_bytes, self._live_rows = self._live.stat().st_size, 0

    def _note(self, path: Path, trials: Sequence[Trial]) -> None:
        self._waiting_in.setdefault(path, 0)
        for trial in trials:
            self.drop(trial.candidate, trial.items)  # one with the same key, if there is any
            self._file_of[trial.candidate, trial.items] = path
            self._waiting_in[path] += 1

    def _remove_if_empty(self, path: Path) -> None:
        if not self._waiting_in.get(path):
            self._waiting_in.pop(path, None)
            self._live = None if path == self._live else self._live
            path.unlink(missing_ok=True)

    def _read(self, path: Path, first_seq: int, *, torn: bool) -> list[Trial]:
        """The whole trials of a file; none when it is damaged, or has a torn end and may not."""
        try:
            found = scan(path, path.read_bytes(), first_seq)
            events = decode(found.table, self._side)
        except (HistoryError, OSError):
            return []
        trials = [event for event in events if isinstance(event, Trial)]
        return trials if len(trials) == len(events) and (torn or not found.torn_bytes) else []

    def _read_entry(self, path: Path) -> list[Trial]:
        """The trial of a file as spools of older versions have it: one record, numbered and named by its key."""
        candidate, _, items = path.stem.partition("-")
        if not candidate.isdigit():
            return []
        trials = self._read(path, int(candidate), torn=False)
        return trials if [(trial.candidate, trial.items) for trial in trials] == [(int(candidate), items)] else []
