"""Evaluations that are finished but not yet committed.

Trials enter the history in the order of their candidates, so one that overtook a slower candidate
waits. It waits on disk, and a crash does not cost its evaluation.
"""

from __future__ import annotations

import math
from pathlib import Path

from evaluators.base import ItemPool
from search.errors import HistoryError
from search.store.atomic import explained, make_folder, sweep, write_atomic
from search.store.columns import decode, encode
from search.store.events import Trial
from search.store.segment import header, scan
from search.store.side_files import SideFiles


class Spool:
    """A folder of trials, each a whole Arrow stream of one record. For the one driver of a run.

    Args:
        folder: where; created with the first `put`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._side = SideFiles(self.folder, inline_values=math.inf)

    def put(self, candidate: int, items: ItemPool, trial: Trial) -> None:
        """Keep a trial; durable on return. One with the same key is replaced. Raises HistoryError."""
        path = self._path(candidate, items)
        with explained(f"{path}: cannot keep the finished evaluation of candidate {candidate}"):
            make_folder(self.folder)
            write_atomic(path, header() + encode(trial, candidate, self._side))

    def take_all(self) -> dict[tuple[int, ItemPool], Trial]:
        """All trials that are kept, by candidate and pool, in the order of candidates.

        They stay until `drop`; one whose drop a crash cut short may come back, so a key that the history
        already has is to be dropped. Damaged entries are removed: their evaluation is simply run again.
        """
        sweep(self.folder)
        self._side.sweep()
        found: dict[tuple[int, ItemPool], Trial] = {}
        for path in sorted(self.folder.glob("*.arrow")):
            trial = self._read(path)
            if trial is None:
                path.unlink(missing_ok=True)
            else:
                found[trial.candidate, trial.items] = trial
        return found

    def drop(self, candidate: int, items: ItemPool) -> None:
        """Forget a trial, which the history has now; one that is not kept is fine."""
        self._path(candidate, items).unlink(missing_ok=True)

    def _path(self, candidate: int, items: ItemPool) -> Path:
        return self.folder / f"{candidate:08d}-{items}.arrow"

    def _read(self, path: Path) -> Trial | None:
        candidate, _, items = path.stem.partition("-")
        try:
            found = scan(path, path.read_bytes(), int(candidate))
            if found.torn_bytes or found.table.num_rows != 1:
                return None
            (event,) = decode(found.table, self._side)
        except (HistoryError, OSError, ValueError):
            return None
        key_fits = isinstance(event, Trial) and (event.candidate, event.items) == (int(candidate), items)
        return event if key_fits and isinstance(event, Trial) else None
