"""A history that is looked at again and again while a driver writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from search.store.columns import decode
from search.store.contents import read_contents
from search.store.events import Event, Trial
from search.store.side_files import SideFiles

if TYPE_CHECKING:
    import pyarrow as pa


class Follower:
    """The events of a history without their scores and genomes. Each sealed part is read once.

    Args:
        folder: the history; need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, list[Event]] = {}
        self.search_items = 0
        """Search items of a candidate, as in the first trial that has scores of all; 0 before there is one."""

    def events(self) -> list[Event]:
        """What the history holds now. Changes nothing. Raises HistoryError."""
        if not self.folder.exists():
            return []
        contents = read_contents(self.folder, self._known)
        for part, table in zip(contents.parts, contents.tables, strict=True):
            if part.sha256 not in self._known:
                self._known[part.sha256] = self._decoded(table)
        sealed = [event for part in contents.parts for event in self._known[part.sha256]]
        return sealed + (self._decoded(contents.live.table) if contents.live else [])

    def _decoded(self, table: pa.Table) -> list[Event]:
        events = decode(table, None)
        if not self.search_items:
            row = next((row for row, event in enumerate(events) if _has_search_scores(event)), None)
            if row is not None:
                (trial,) = decode(table.slice(row, 1), SideFiles(self.folder, 0))
                assert isinstance(trial, Trial)
                self.search_items = sum(len(scores.items) for scores in trial.scores.values())
        return events


def _has_search_scores(event: Event) -> bool:
    return isinstance(event, Trial) and event.has_all_search_items
