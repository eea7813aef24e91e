"""Who carried a run, when and with what: a file beside the history, about circumstances only.

Every driver that works on a run adds one entry. The time that the search took is summed up here, since
results say when they came but not since when somebody waited for them.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path

from search.errors import RunError
from search.store.atomic import write_atomic

SESSIONS = "sessions.json"
SAVE_SECONDS = 10.0
"""A driver that is killed loses at most so much of the time that it searched."""


@dataclass(frozen=True)
class Session:
    """One driver at work.

    Attributes:
        first_event: number of the first event that it recorded.
        gpus_per_worker: GPUs that each of its workers reserved; 0 for none.
        search_seconds: how long it searched, without the finals.
    """

    started: str
    host: str
    first_event: int
    pool: str
    workers: int
    gpus_per_worker: float
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    search_seconds: float = 0.0


class Sessions:
    """The sessions of a run, oldest first, and where its models and data were found when they had moved.

    Args:
        path: the file; none is a run that nobody has worked on.

    Raises:
        RunError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[Session] = []
        self.places: tuple[str, ...] = ()
        self._running_since: float | None = None
        self._saved = 0.0
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            self.all = [Session(**one) for one in data["sessions"]]
            self.places = tuple(map(str, data["places"]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({error}); restore it from a backup, or remove it: then wall-clock counts anew"
            ) from error

    @property
    def search_seconds(self) -> float:
        """Seconds of search by now, over all sessions."""
        running = 0.0 if self._running_since is None else time.monotonic() - self._running_since
        return sum(session.search_seconds for session in self.all) + running

    def gpus_at(self, event: int) -> float:
        """GPUs per worker of the session that recorded an event."""
        return next((one.gpus_per_worker for one in reversed(self.all) if one.first_event <= event), 0.0)

    def begin(
        self,
        *,
        first_event: int,
        pool: str,
        workers: int,
        gpus_per_worker: float,
        device: str,
        versions: Mapping[str, str],
        places: tuple[str, ...] = (),
    ) -> None:
        """Add the session of this process. Raises OSError."""
        started = datetime.now().astimezone().isoformat(" ", "seconds")
        host = socket.gethostname()
        self.all.append(Session(started, host, first_event, pool, workers, gpus_per_worker, device, dict(versions)))
        self.places = tuple(dict.fromkeys((*places, *self.places)))
        self.save()

    @contextmanager
    def searching(self) -> Iterator[None]:
        """While the block runs, time counts."""
        self._running_since = self._saved = time.monotonic()
        try:
            yield
        finally:
            self.save()
            self._running_since = None

    def tick(self) -> None:
        """Save the time now and then; to be called often."""
        if self._running_since is not None and time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the file. Raises OSError."""
        now = time.monotonic()
        if self._running_since is not None and self.all:
            lasted = self.all[-1].search_seconds + now - self._running_since
            self.all[-1] = replace(self.all[-1], search_seconds=lasted)
            self._running_since = now
        self._saved = now
        data = {"sessions": [asdict(session) for session in self.all], "places": list(self.places)}
        write_atomic(self.path, (json.dumps(data, indent=1) + os.linesep).encode())
