"""A run that is kept elsewhere: on an object store or a network file system, under a URL.

The driver works in a folder of this machine, where appends are cheap and locks work, and copies it to the URL
while it runs: everything that was recorded is there at the latest `LAG_SECONDS` after it was, and the time of
the copy. What is there at any moment is a whole run: first comes what records refer to, then sealed parts and
the live segment, then the list of the parts, which says what counts; a model marks itself last.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

from search.errors import MeiosisError, RunError, UserError
from search.store.history import History
from search.store.urls import Store, first_line

LAG_SECONDS = 5.0
"""Pause between two copies."""
STALE_SECONDS = 120.0
"""A driver that has not been heard of for so long is gone: another may go on."""
BEAT_SECONDS = 30.0
"""While a copy takes longer than this, such as that of a model, the driver is heard of in between."""
DRIVER = "driver.json"
"""Who works on the run, and when that was last true."""
_BEST = "best/meiosis.json"
"""Copied last of a model: without it the model there is not whole."""

_PARTS = "history/manifest.json"
_ITEMS = "history/items/"  # every list under its hash
_TRIES = 5
_LOCAL = ("workers", "remote")
_HISTORY = re.compile(r"((?:arms/[^/]+/)?)(history|spool)/")
"""What belongs to the history or the spool of the run, or of a search beside it; where that search lies."""
_SEGMENT = re.compile(r"(?:arms/[^/]+/)?history/[^/]+\.arrows")


class Mirror:
    """Copies a run folder to a URL.

    Args:
        folder: the run here.
        store: the run there.
        report: is told when copying fails, and when it works again.
    """

    def __init__(self, folder: Path, store: Store, report: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.store, self._report = folder, store, report
        self._sent: dict[str, tuple[int, int] | str] = {}
        self._token = uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_on, name="mirror", daemon=True)
        self._failing = False
        self._beaten_at: float | None = None

    def claim(self) -> None:
        """Be the driver of the run there.

        Raises:
            RunError: another driver was heard of a moment ago.
        """
        owner = self._owner()
        ours = owner.get("host") == socket.gethostname() and not _alive(int(owner.get("pid", 0)))
        silent = time.time() - float(owner.get("beat", 0))
        if owner and not ours and silent < STALE_SECONDS:
            raise RunError(
                f"{self.store.url} is in use by process {owner['pid']} on {owner['host']}, heard of {silent:.0f} s "
                f"ago; stop it first, or wait until it was silent for {STALE_SECONDS:.0f} s"
            )
        self._beat()

    def refuse_what_is_newer(self) -> None:
        """Raise `RunError` unless the histories here go on from those there: copying would take that away.

        Raises OSError.
        """
        for at in places_of(self.store.names()):
            if not self._goes_on(at):
                self._compare(at)

    def _compare(self, at: str) -> None:
        history = f"{at}history"
        with TemporaryDirectory(dir=self.folder.parent, prefix=f".{self.folder.name}.") as there_folder:
            download_run(self.store, Path(there_folder) / "there", only=f"{history}/")
            here, there = contents_of(self.folder / history), contents_of(Path(there_folder) / "there" / history)
        if here[: len(there)] == there:
            return
        if there[: len(here)] == here:
            raise RunError(
                f"{self.store.url} has {len(there) - len(here)} events that {self.folder} lacks: another driver went "
                f"on there; go on with: meiosis resume {self.store.url}"
            )
        raise RunError(different_ways(self.folder, self.store.url))

    def _goes_on(self, at: str) -> bool:
        """Whether the bytes alone tell that what is here goes on from what is there, as they nearly always do."""
        listed = self.store.read(at + _PARTS)
        theirs, ours = _hashes(listed), _hashes(_read(self.folder / at / _PARTS))
        live = f"{at}history/{len(theirs):06d}.arrows"
        there, here = self.store.read(live), _read(self.folder / live)
        if there is None:
            return listed is None
        same = all(ours.get(name) == sha256 for name, sha256 in theirs.items())
        return same and here is not None and here.startswith(there)

    def release(self) -> None:
        """No longer be the driver of the run there. Raises OSError."""
        self.store.remove(DRIVER)

    def _owner(self) -> dict[str, Any]:
        """Who says to be the driver of the run there; nobody if that cannot be read."""
        try:
            owner = json.loads(self.store.read(DRIVER) or b"{}")
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _beat(self) -> None:
        self._beaten_at = time.monotonic()
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token, "beat": time.time()}
        self.store.write(DRIVER, [json.dumps(owner).encode()])

    def start(self) -> None:
        """Copy from now on, in a thread."""
        self._thread.start()

    def _keep_on(self) -> None:
        while not self._stop.wait(LAG_SECONDS):
            try:
                self._refuse_usurper()
                self.push()
                self._refuse_usurper()
                self._beat()
            except RunError as error:
                self._report(str(error))
                return
            except OSError as error:
                if not self._failing:
                    self._report(
                        f"cannot copy to {self.store.url}: {first_line(error)}; trying again as the run goes on"
                    )
                self._failing = True
            else:
                if self._failing:
                    self._report(f"copying to {self.store.url} works again")
                self._failing = False

    def _refuse_usurper(self) -> None:
        if self._owner().get("token", self._token) != self._token:
            raise RunError(f"another driver took over {self.store.url}; nothing more is copied there from here")

    def finish(self) -> None:
        """Stop the thread and copy what is left.

        Raises:
            RunError: that failed; everything is here.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self._refuse_usurper()
            self.push()
            self.release()
        except OSError as error:
            raise RunError(
                f"cannot copy to {self.store.url}: {first_line(error)}; everything is in {self.folder}, "
                f"copy it with: meiosis resume {self.folder}"
            ) from None  # the disk that may be full is not the one of the run

    def push(self) -> None:
        """Copy what changed. Raises OSError."""
        if not self._sent:
            self._sent = self._look()
        # Results wait in the spool until the history has them: it is read first and cleared last.
        places = ["", *(f"arms/{path.name}/" for path in sorted(self.folder.glob("arms/*/")))]
        spool = {self._name(path) for at in places for path in _files(self.folder / at / "spool")}
        self._send_file("run.yaml")
        for at in reversed(places):  # the verdict, in the history of the run, tells what is in the others
            self._push_history(at)
        trackers = sorted(self._name(path) for path in self.folder.glob("tracking/*/id"))
        for name in ("sessions.json", "run.log", "log.jsonl", "report.md", *trackers, *sorted(spool)):
            self._send_file(name)
        waiting = [name for name in self._sent if (found := _HISTORY.match(name)) and found[2] == "spool"]
        for name in waiting:
            if name not in spool:
                self._remove(name)
        self._push_model()

    def _look(self) -> dict[str, tuple[int, int] | str]:
        """What is there, and whether it is known to be what is here: by hash, since a copy may have broken off."""
        names = [name for name in self.store.names() if name != DRIVER]
        same, items = set(), []
        for at in places_of(names):
            theirs, ours = _hashes(self.store.read(at + _PARTS)), _hashes(_read(self.folder / at / _PARTS))
            same |= {f"{at}history/{name}" for name, sha256 in theirs.items() if ours.get(name) == sha256}
            items.append(at + _ITEMS)
        return {name: "there" if name in same or name.startswith(tuple(items)) else "unknown" for name in names}

    def _push_history(self, at: str) -> None:
        history = self.folder / at / "history"
        for _ in range(10):
            listed = _read(history / "manifest.json")
            parts = [part["file"] for part in json.loads(listed)["parts"]] if listed else []
            live = f"{at}history/{len(parts):06d}.arrows"
            tail = _read(self.folder / live)
            if tail is not None:
                break  # else it was sealed while we looked
        else:
            return
        for kind in ("items", "scores"):
            for path in _files(history / kind):
                self._send_file(self._name(path))
        for part in parts:
            self._send_file(f"{at}history/{part}")
        self._send(live, tail)
        # Up to here the list that is there goes with the live segment that is there; what it does not name, nobody
        # reads (see `download_run`).
        if listed is not None:
            self._send(at + _PARTS, listed)
        segments = [name for name in self._sent if _SEGMENT.fullmatch(name) and name.startswith(f"{at}history/")]
        for name in segments:
            if name != live:
                self._remove(name)

    def _remove(self, name: str) -> None:
        self.store.remove(name)
        del self._sent[name]

    def _push_model(self) -> None:
        files = _files(self.folder / "best")
        names = [self._name(path) for path in files]
        if _BEST not in names or all(self._is_sent(name) for name in names):
            return
        self.store.remove(_BEST)
        for name in [name for name in self._sent if name.startswith("best/") and name not in names]:
            self._remove(name)
        for name in sorted(names, key=lambda name: name == _BEST):
            self._send_file(name)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _state(self, name: str) -> tuple[int, int] | None:
        try:
            stat = (self.folder / name).stat()
        except OSError:
            return None
        return stat.st_size, stat.st_mtime_ns

    def _is_sent(self, name: str) -> bool:
        return self._sent.get(name) in ("there", self._state(name))

    def _send_file(self, name: str) -> None:
        state = self._state(name)
        if state is None or self._is_sent(name):
            return
        with suppress(FileNotFoundError):  # dropped in the meantime
            self.store.write(name, self._heard_of(_chunks(self.folder / name)))
            self._sent[name] = state

    def _heard_of(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        """The chunks; a copy that takes long must not make this driver look dead."""
        for chunk in chunks:
            if self._beaten_at is not None and time.monotonic() - self._beaten_at >= BEAT_SECONDS:
                self._refuse_usurper()
                self._beat()
            yield chunk

    def _send(self, name: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if self._sent.get(name) != digest:
            self.store.write(name, [data])
            self._sent[name] = digest


def download_run(store: Store, folder: Path, only: str = "") -> None:
    """Copy a run here, without what a copy that broke off has left there; a driver may be at work on it.

    Args:
        only: what the names of the files begin with that are copied.

    Raises:
        OSError: that failed.
    """
    for attempt in range(_TRIES):
        try:
            _download_once(store, folder, only)
            return
        except FileNotFoundError:  # its driver sealed a segment, or took a result from the spool
            shutil.rmtree(folder, ignore_errors=True)
            if attempt == _TRIES - 1:
                raise


def _download_once(store: Store, folder: Path, only: str) -> None:
    lists = {f"{at}{_PARTS}": store.read(at + _PARTS) for at in places_of(store.names())}
    names = store.names()
    counted: set[str] = set()
    for name, listed in lists.items():
        parts = [part["file"] for part in json.loads(listed)["parts"]] if listed else []
        history = name.removesuffix("manifest.json")
        counted |= {f"{history}{part}" for part in (*parts, f"{len(parts):06d}.arrows")}
    for name in names:
        segment = "history/part-" in name or _SEGMENT.fullmatch(name)
        unfinished = (segment and name not in counted) or (name.startswith("best/") and _BEST not in names)
        if name.startswith(only) and name != DRIVER and name not in lists and not unfinished:
            store.download(name, folder / name)
    for name, listed in lists.items():
        if listed is not None and name.startswith(only):
            (folder / name).write_bytes(listed)


def places_of(names: Iterable[str]) -> list[str]:
    """Where the histories are among the files of a run: at its top, and in `arms/<name>/` of searches beside it."""
    return sorted({"", *(found[1] for name in names if (found := _HISTORY.match(name)))})


@contextmanager
def mirrored(folder: Path, url: str | None, report: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, and once more at its end, the run is copied to the URL, if there is one.

    Raises:
        RunError: another driver works on the run there, or went on there, or the last copy fails.
        UserError: the URL cannot be used.
    """
    if url is None:
        yield
        return
    mirror = Mirror(folder, Store.open(url), report)
    try:
        mirror.claim()
        try:
            mirror.refuse_what_is_newer()
        except MeiosisError:
            with suppress(OSError):
                mirror.release()
            raise
        mirror.push()
    except OSError as error:
        raise UserError(f"{url}: cannot be written: {first_line(error)}") from error
    mirror.start()
    try:
        yield
    except BaseException:
        with suppress(RunError):  # the first error is the one to tell; what is here can be copied later
            mirror.finish()
        raise
    mirror.finish()


def contents_of(history: Path) -> list[object]:
    """What is deterministic in the events of a history, in order; nothing where there is none. Raises HistoryError."""
    if not history.exists():
        return []
    with History.open(history, writable=False) as opened:
        return [event.deterministic() for event in opened]


def different_ways(folder: Path, url: str) -> str:
    """What to say of two copies of a run of which neither goes on from the other."""
    return (
        f"{folder} and {url} went different ways after the same start; keep one: remove {folder} to go on with the one "
        "at the URL"
    )


def _hashes(manifest: bytes | None) -> dict[str, str]:
    """Part -> hash, of a history's list of parts."""
    return {part["file"]: part["sha256"] for part in json.loads(manifest)["parts"]} if manifest else {}


def _files(folder: Path) -> list[Path]:
    """What is copied: no locks, nothing half-written, and nothing that belongs to this machine."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        local = any(part.startswith(".") for part in parts) or parts[0] in _LOCAL or path.name == "lock"
        if not local and path.is_file():
            found.append(path)
    return found


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            yield chunk


def _alive(pid: int) -> bool:
    return pid > 0 and Path(f"/proc/{pid}").exists()
