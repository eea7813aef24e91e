"""What a tracker is: a place outside of the run folder where results are shown as well.

The run folder is the truth; a tracker gets a copy of the figures, in a thread of its own (`search.tracking`).
Whatever goes wrong in it is said once and ends the tracking, never the run. Adding one is one file in
`search/trackers` with a `PLUGIN`, or an entry point `meiosis.trackers` in another package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from evaluators.base import ItemPool
from evaluators.registry import Registry
from search.errors import UserError
from search.store.atomic import write_atomic

if TYPE_CHECKING:
    from search.config import LoadedConfig, TrackerConfig


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Attributes:
        name: what the user calls it.
        folder: existing folder inside of the run folder that belongs to this tracker; what is in it is there
            again when the run is resumed.
        config: the resolved config, plain data.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]

    def remembered(self, make: Any) -> str:
        """An identifier for this run: made by `make()` the first time, the same after a resume."""
        path = self.folder / "id"
        known = path.read_text() if path.exists() else ""
        if not known:
            known = str(make())
            write_atomic(path, known.encode())
        return known


@dataclass(frozen=True)
class TrackedTrial:
    """A result.

    Attributes:
        candidate: its number, from 0.
        items: the pool of items it was scored on.
        origin: where the candidate comes from.
        figures: finite numbers by name: `loss`, `best_loss` (so far, on the search items), `merge_seconds`,
            `evaluate_seconds`, and `<evaluator>.<metric>`; of a search for a front `front` (its points) and
            `hypervolume` on the search items so far.
        failure: why there are no scores, or None.
        recorded_at: Unix time in seconds.
    """

    candidate: int
    items: ItemPool
    origin: str
    figures: Mapping[str, float]
    failure: str | None
    recorded_at: float


class TrackerOptions(BaseModel):
    """Base of a tracker's options, and the options of one that has none: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


OutputFolder = Annotated[Path, AfterValidator(lambda path: path.expanduser().resolve())]
"""Type of options that are folders to write; relative ones start where the user stands."""


class Tracker(ABC):
    """One tracker of one run. All calls come from one thread; any may raise, which ends the tracking.

    Attributes:
        help: a sentence for people.
        needs: top-level module without which it cannot work; where that is not installed, the run says so in one
            line and goes on.
        install: what to install for it.
    """

    help: ClassVar[str] = ""
    needs: ClassVar[str] = ""
    install: ClassVar[str] = ""
    Options: ClassVar[type[TrackerOptions]] = TrackerOptions

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def begin(self, run: TrackedRun) -> None:
        """Start, or go on with, the tracking of a run; heavy libraries are imported here."""

    @abstractmethod
    def trial(self, trial: TrackedTrial) -> None:
        """Show a result."""

    @abstractmethod
    def close(self, how: str) -> None:
        """The driver ends: `finished`, `interrupted` (the run can go on) or `failed`."""


def _fault(plugin: object) -> str | None:
    if isinstance(plugin, type) and issubclass(plugin, Tracker) and not plugin.__abstractmethods__:
        return None
    return "is not a tracker: expected a complete subclass of search.tracker.Tracker"


TRACKERS: Registry[type[Tracker]] = Registry("tracker", "search.trackers", "meiosis.trackers", fault=_fault)


def tracker_faults(loaded: LoadedConfig) -> list[str]:
    """What is wrong with `tracking` of a config, a line for each; a library that is absent is no fault."""
    lines: list[str] = []
    for index, entry in enumerate(loaded.config.tracking):
        try:
            plugin = TRACKERS.get(entry.name)
            plugin.Options.model_validate(entry.options)
        except ValidationError as error:
            lines += loaded.source.faults(error, plugin.Options, ("tracking", index, entry.name))
        except UserError as error:
            lines.append(loaded.source.fault(("tracking", index), str(error)))
        if entry.name in [other.name for other in loaded.config.tracking[:index]]:
            lines.append(loaded.source.fault(("tracking", index), f"'{entry.name}' stands twice"))
    return lines


def known_trackers(entries: list[dict[str, Any]], complain: Callable[[str], None]) -> list[dict[str, Any]]:
    """The entries of a run that was begun with them, without those that are not installed here."""
    known = []
    for entry in entries:
        try:
            TRACKERS.get(next(iter(entry)))
            known.append(entry)
        except UserError as error:
            complain(f"tracking: {error}; the run goes on without it")
    return known


def complete_options(entries: Iterable[TrackerConfig]) -> list[dict[str, Any]]:
    """The entries of `tracking` with all their options, folders absolute."""
    found = []
    for entry in entries:
        options = TRACKERS.get(entry.name).Options.model_validate(entry.options)
        found.append({entry.name: options.model_dump(mode="json")})
    return found
