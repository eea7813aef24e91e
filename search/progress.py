"""What a search tells those who watch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from evaluators.base import ItemPool
from search.store.events import Trial


@dataclass(frozen=True)
class Progress:
    """State of a run at one moment.

    Attributes:
        phase: which pool of items candidates are being scored on.
        done, total: candidates of this phase.
        best, best_origin: the best feasible trial on the search items so far, and its origin.
        failures: failed trials on the search items.
        busy, workers: workers at work, and all of them.
        front, hypervolume: points of the front on the search items and the volume they dominate, of a search for a
            front whose parents are known.
        arm: the search beside the main one that this is the state of; empty for the main one.
    """

    phase: ItemPool
    total: int
    done: int = 0
    best: Trial | None = None
    best_origin: str = ""
    failures: int = 0
    busy: int = 0
    workers: int = 0
    front: int | None = None
    hypervolume: float | None = None
    arm: str = ""


@dataclass(frozen=True)
class Watcher:
    """Who is told what happens: `line` gets sentences, `progress` the state after every change."""

    line: Callable[[str], None] = lambda _: None
    progress: Callable[[Progress], None] = lambda _: None
