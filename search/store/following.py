"""A history that is looked at again and again while a driver writes it."""

from __future__ import annotations

from pathlib import Path

from search.store.columns import decode
from search.store.contents import read_contents
from search.store.events import Event


class Follower:
    """The events of a history without their scores and genomes. Each sealed part is read once.

    Args:
        folder: the history; need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, list[Event]] = {}

    def events(self) -> list[Event]:
        """What the history holds now. Changes nothing. Raises HistoryError."""
        if not self.folder.exists():
            return []
        contents = read_contents(self.folder, self._known)
        for part, table in zip(contents.parts, contents.tables, strict=True):
            if part.sha256 not in self._known:
                self._known[part.sha256] = decode(table, None)
        sealed = [event for part in contents.parts for event in self._known[part.sha256]]
        return sealed + (decode(contents.live.table, None) if contents.live else [])
