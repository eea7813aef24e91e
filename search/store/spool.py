"""Evaluations that are finished but not yet committed.

Trials enter the history in the order of their candidates, so one that overtook a slower candidate
waits. It waits on disk, and a crash does not cost its evaluation. Trials that arrived together share a
file, which goes when the history has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from evaluators.base import ItemPool
from search.errors import HistoryError
from search.store.atomic import explained, make_folder, sweep, write_atomic
from search.store.columns import decode, encode
from search.store.events import Trial
from search.store.segment import header, scan
from search.store.side_files import SideFiles

Key = tuple[int, ItemPool]


class Spool:
    """A folder of trials in files that are whole Arrow streams. For the one driver of a run.

    Args:
        folder: where; created with the first `put`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._side = SideFiles(self.folder, inline_values=math.inf)
        self._file_of: dict[Key, Path] = {}
        self._waiting_in: dict[Path, int] = {}

    def put(self, candidate: int, items: ItemPool, trial: Trial) -> None:
        """Keep a trial; durable on return. One with the same key is replaced. Raises HistoryError."""
        self._write(self._path(candidate, items), candidate, [trial])

    def put_all(self, trials: Sequence[Trial]) -> None:
        """Keep trials whose keys are not kept yet; all are durable on return. Raises HistoryError."""
        if trials:
            first = trials[0]
            self._write(self._path(first.candidate, first.items, len(trials)), first.candidate, trials)

    def take_all(self) -> dict[Key, Trial]:
        """All trials that are kept, by candidate and pool, in the order of candidates.

        They stay until `drop`; one whose drop a crash cut short, or whose file holds others too, may come
        back, so a key that the history already has is to be dropped. Damaged files are removed: their
        evaluations are simply run again.
        """
        sweep(self.folder)
        self._side.sweep()
        self._file_of, self._waiting_in = {}, {}
        found: dict[Key, Trial] = {}
        for path in sorted(self.folder.glob("*.arrow")):
            trials = self._read(path)
            if trials:
                self._note(path, trials)
                found.update({(trial.candidate, trial.items): trial for trial in trials})
            else:
                path.unlink(missing_ok=True)
        return dict(sorted(found.items()))

    def drop(self, candidate: int, items: ItemPool) -> None:
        """Forget a trial, which the history has now; one that is not kept is fine."""
        path = self._file_of.pop((candidate, items), None)
        if path is None:
            return
        self._waiting_in[path] -= 1
        if not self._waiting_in[path]:
            del self._waiting_in[path]
            path.unlink(missing_ok=True)

    def _write(self, path: Path, first: int, trials: Sequence[Trial]) -> None:
        which = f"candidate {first}" if len(trials) == 1 else f"candidate {first} and {len(trials) - 1} others"
        with explained(f"{path}: cannot keep the finished evaluation of {which}"):
            make_folder(self.folder)
            records = [encode(trial, seq, self._side) for seq, trial in enumerate(trials, first)]
            write_atomic(path, b"".join([header(), *records]))
        self._note(path, trials)

    def _note(self, path: Path, trials: Sequence[Trial]) -> None:
        self._waiting_in[path] = len(trials)
        self._file_of.update({(trial.candidate, trial.items): path for trial in trials})

    def _path(self, candidate: int, items: ItemPool, count: int = 1) -> Path:
        others = f"+{count - 1}" if count > 1 else ""
        return self.folder / f"{candidate:08d}-{items}{others}.arrow"

    def _read(self, path: Path) -> list[Trial]:
        """The trials of a file; none when it is not as `_write` left it."""
        first, _, rest = path.stem.partition("-")
        items, _, others = rest.partition("+")
        try:
            found = scan(path, path.read_bytes(), int(first))
            if found.torn_bytes or found.table.num_rows != 1 + int(others or 0):
                return []
            events = decode(found.table, self._side)
        except (HistoryError, OSError, ValueError):
            return []
        trials = [event for event in events if isinstance(event, Trial)]
        named = trials and (trials[0].candidate, trials[0].items) == (int(first), items)
        return trials if named and len(trials) == len(events) else []
