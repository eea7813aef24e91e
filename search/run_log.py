"""The log of a run for programs: `log.jsonl` in its folder, one JSON object per line.

    {"time": "2026-01-02T03:04:05.678+00:00", "level": "info", "event": "trial", "candidate": 7, ...}

| event | level | what it tells beside `time`, `level` and `event` |
|---|---|---|
| command | info | process_started_at (Unix): a command that makes a run, or goes on with one, began |
| config_read, config_checked, models_hashed | info | these steps of it are done |
| started | info | run, name, pid, host, pool, workers: a driver began or went on |
| ray_starting, ray_up | info | address: of the head; null before one of our own is there |
| message | info | `text`: a line that the person at the terminal sees as well |
| asked | info | candidate, origin |
| trial | info, or warning for a failure | candidate, items, worker, node, merge_seconds, evaluate_seconds, queue_seconds, started_at (Unix), attempts, bytes_read, bytes_moved, layers_run, layers_reused, loss, feasible; kind and why of a failure |
| failure | warning | candidate, items, detail: a traceback |
| progress | info | phase (`search`, or `placebo search` of a search beside the main one), done, total, busy, workers; every few seconds |
| worker_ready | info | worker, node; on Ray greeted_at (Unix), when its first call was answered, which took hello_seconds; build_seconds of the second, and of these model_seconds and evaluator_seconds, the rest being libraries |
| worker_lost | warning | worker, node, kind and why |
| worker_released | info | worker, node: it ended for the sake of other runs on the cluster |
| layout | info | worker, node, device_map, bytes: how a model was laid over several GPUs, once for every way |
| tracking | warning | `text`: a tracker that is absent or gave up |
| ended | info, or error | how: finished, interrupted, failed; why |

Code of any room says something to it with `emit`; who has no log attached says nothing. Nothing here ever
raises: a full disk loses lines of the log, never the run.
"""  # noqa: E501 - a table row is one line

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

Level = Literal["info", "warning", "error"]

MOST_BYTES = 16 << 20
"""Size at which the file is put aside as `log.1.jsonl`; the one put aside before goes."""
LONGEST_TEXT = 8000
"""Characters of one value; a traceback can be long."""

_LOGGER = logging.getLogger("meiosis")
_LOGGER.addHandler(logging.NullHandler())  # else Python prints what nobody listens to
_LEVELS: dict[Level, int] = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def emit(event: str, level: Level = "info", /, **fields: object) -> None:
    """Tell an event to the log of the run that is under way in this process, if there is one."""
    if _LOGGER.isEnabledFor(_LEVELS[level]):
        _LOGGER.log(_LEVELS[level], event, extra={"meiosis_fields": fields})


class JsonLines(logging.Handler):
    """Writes events as JSON, one line each; keeps at most twice `most_bytes` on disk.

    Args:
        path: the file.
        complain: is told once, in one line, when the log cannot be written.
    """

    def __init__(
        self, path: Path, complain: Callable[[str], None] = lambda _: None, most_bytes: int = MOST_BYTES
    ) -> None:
        super().__init__(logging.INFO)
        self.path, self._complain, self._most_bytes = path, complain, most_bytes
        self._complained = False
        self._descriptor: int | None = None
        self._size = 0

    @property
    def older(self) -> Path:
        """Where the lines before the current ones are."""
        return self.path.with_suffix(f".1{self.path.suffix}")

    def emit(self, record: logging.LogRecord) -> None:
        """Write an event; the lock of the handler is held."""
        try:
            line = _line(record)
            if self._size and self._size + len(line) > self._most_bytes:
                self._put_aside()
            self._write(line)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a log, the run goes on
            self._close()
            if not self._complained:
                self._complained = True
                why = error.strerror if isinstance(error, OSError) and error.strerror else error
                self._complain(f"{self.path} cannot be written: {why}; the run goes on without that log")

    def _write(self, line: bytes) -> None:
        """All of a line or nothing of it: half a line would spoil the next one too."""
        if self._descriptor is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o666)
            self._size = os.fstat(self._descriptor).st_size
            if self._size and os.pread(self._descriptor, 1, self._size - 1) != b"\n":  # of a driver that was killed
                self._size += os.write(self._descriptor, b"\n")
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):
                os.write(self._descriptor, line[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(line)

    def _put_aside(self) -> None:
        self._close()
        self.path.replace(self.older)

    def _close(self) -> None:
        descriptor, self._descriptor, self._size = self._descriptor, None, 0
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def close(self) -> None:
        """Release the file."""
        self._close()
        super().close()


@contextmanager
def log_to(path: Path, complain: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Write what `emit` is told into a file, as long as this lasts, after what `before_the_log` kept for it."""
    handler = JsonLines(path, complain)
    for earlier in list(_LOGGER.handlers):
        if isinstance(earlier, _Kept):
            earlier.hand_over(handler)
    with _listening(handler):
        yield


@contextmanager
def before_the_log() -> Iterator[None]:
    """Keep what `emit` is told until there is a log, which is made inside and takes it, or is never made."""
    with _listening(_Kept()):
        yield


@contextmanager
def _listening(handler: logging.Handler) -> Iterator[None]:
    level = _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        _LOGGER.setLevel(level)
        _LOGGER.removeHandler(handler)
        handler.close()


class _Kept(logging.Handler):
    """Events from before there is a log: a few, all from the first seconds of a command."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def hand_over(self, log: logging.Handler) -> None:
        """Give what was kept to the log; whatever comes now goes there by itself."""
        for record in self._records:
            log.handle(record)
        _LOGGER.removeHandler(self)


def process_started_at() -> float | None:
    """When this process began, in Unix seconds to a hundredth; None where the system does not say (it is not Linux)."""
    try:
        # The name of the command, in brackets, may hold anything; the 20th field after it is the one.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time() - age


def last_events(path: Path, most_bytes: int = 1 << 16) -> list[dict[str, object]]:
    """The events at the end of a log, also while it is written; none when there is no log."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - most_bytes))
            lines = file.read(most_bytes).split(b"\n")
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):  # the first line may be cut, the last one may be half there
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                found.append(event)
    return found


def _line(record: logging.LogRecord) -> bytes:
    fields: dict[str, object] = getattr(record, "meiosis_fields", {})
    content = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "event": record.getMessage(),
        **{name: _plain(value) for name, value in fields.items()},
    }
    return (json.dumps(content, default=str) + "\n").encode()


def _plain(value: object) -> object:
    """What JSON can hold: it knows neither NaN nor infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value[:LONGEST_TEXT] if isinstance(value, str) else value
