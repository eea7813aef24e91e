"""The folder of a run: what it is made of, how it is found, and who may write it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import yaml

from search.errors import RunError, UserError, nearest
from search.store.atomic import TEMPORARY, make_folder, sync_folder, write_atomic
from search.store.events import Event
from search.store.history import History
from search.store.lock import LOCK, FileLock, Owner
from search.store.sessions import SESSIONS

CONFIG = "run.yaml"
"""A folder is a run when it has this file."""
REMOTE = "remote"
"""File with the URL of a run whose working copy the folder is."""

_NAME = re.compile(r"[\w][\w.+@=-]{0,127}")


class RunFolder:
    """A run on disk.

    Args:
        path: the folder; `create` and `find` return sound ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.path.resolve().name

    @property
    def config(self) -> Path:
        """`run.yaml`: resolved config, versions, source hashes, window. Written once."""
        return self.path / CONFIG

    @property
    def history(self) -> Path:
        """Folder of the history."""
        return self.path / "history"

    @property
    def spool(self) -> Path:
        """Folder of evaluations that are finished but not committed."""
        return self.path / "spool"

    @property
    def arms(self) -> Path:
        """Folder of the searches that the winner is compared with, each with a history of its own."""
        return self.path / "arms"

    @property
    def best(self) -> Path:
        """Folder of the exported model."""
        return self.path / "best"

    @property
    def report(self) -> Path:
        """The report, for people."""
        return self.path / "report.md"

    @property
    def sessions(self) -> Path:
        """Who carried the run, when and with what."""
        return self.path / SESSIONS

    @property
    def remote(self) -> str | None:
        """The URL that the run is kept under, and that this folder is the working copy of."""
        try:
            return (self.path / REMOTE).read_text(encoding="utf-8").strip() or None
        except OSError:
            return None

    def set_remote(self, url: str) -> None:
        """Make this folder the working copy of the run at a URL. Raises OSError."""
        write_atomic(self.path / REMOTE, f"{url}\n".encode())

    @property
    def address(self) -> str:
        """What the user goes on with: the URL, or the folder."""
        return self.remote or str(self.path)

    @property
    def workers(self) -> Path:
        """Folder for what the pool of workers writes."""
        return self.path / "workers"

    @property
    def log(self) -> Path:
        """What the driver had to say, for people."""
        return self.path / "run.log"

    @property
    def events_log(self) -> Path:
        """What happened, for programs; see `search.run_log`."""
        return self.path / "log.jsonl"

    @classmethod
    def create(cls, root: Path, name: str | None, manifest: Mapping[str, Any]) -> RunFolder:
        """A new run under `root`. It appears whole, with its `run.yaml`, or not at all.

        Args:
            root: folder of all runs; created when it is not there.
            name: name of the run; None for one made of `manifest["name"]` (default `run`) and the time.
            manifest: plain data (YAML) that says what the run is.

        Raises:
            UserError: the name is taken, or is no name.
            RunError: the folder cannot be written.
        """
        root = Path(root)
        text = yaml.safe_dump(dict(manifest), sort_keys=False, allow_unicode=True, width=100)
        if name is None:
            name = _free_name(root, str(manifest.get("name") or "run"))
        _check_name(name)
        run = cls(root / name)
        try:
            make_folder(root)
            draft = root / f".{name}.{uuid4().hex[:8]}{TEMPORARY}"
            draft.mkdir()
            try:
                write_atomic(draft / CONFIG, text.encode())
                run._refuse_taken()
                try:
                    draft.rename(run.path)  # fails on a folder with content, so that only one creator wins
                except OSError:
                    run._refuse_taken()
                    raise
                sync_folder(root)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        except OSError as error:
            raise RunError(f"{run.path}: cannot create the run: {error.strerror or error}") from error
        return run

    def _refuse_taken(self) -> None:
        if self.config.exists():
            raise UserError(
                f"run '{self.name}' already exists in {self.path.parent}; "
                f"go on with `meiosis resume {self.path}` or choose another --run"
            )
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.path} exists and is not a run; choose another --run")

    @classmethod
    def find(cls, root: Path, name_or_path: str | Path) -> RunFolder:
        """The run of that name under `root`, or at that path.

        Raises:
            UserError: there is none; says the nearest name.
        """
        text = str(name_or_path)
        for path in (Path(root) / text, Path(text).expanduser()):
            if text and (path / CONFIG).is_file():
                return cls(path)
        names = [run.name for run in cls.list_runs(root)]
        raise UserError(f"no run '{text}' in {root}{nearest(text, names)}")

    @classmethod
    def list_runs(cls, root: Path) -> list[RunFolder]:
        """All runs under `root`, the oldest first; none when `root` is not there."""
        runs = [cls(path.parent) for path in Path(root).glob(f"*/{CONFIG}") if not path.parent.name.startswith(".")]
        return sorted(runs, key=lambda run: (run.config.stat().st_mtime_ns, run.name))

    def manifest(self) -> dict[str, Any]:
        """What `create` was given.

        Raises:
            RunError: `run.yaml` is missing or damaged.
        """
        try:
            data = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RunError(f"{self.config} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise RunError(f"{self.config} is damaged: expected a mapping; restore it from a backup")
        return cast(dict[str, Any], data)

    def events(self) -> list[Event]:
        """What the history holds now, also while a driver is at work; none before the first.

        Raises:
            HistoryError: the history is damaged.
        """
        if not self.history.exists():
            return []
        with History.open(self.history, writable=False) as history:
            return history.events()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only driver of the run. The lock ends with the process, however that ends.

        Raises:
            RunError: another driver has it; says which process, where and since when.
        """
        with self._lock():
            yield

    def owner(self) -> Owner | None:
        """The driver at work now, or None. Changes nothing."""
        return self._lock().owner()

    def _lock(self) -> FileLock:
        return FileLock(self.path / LOCK, f"run '{self.name}'")


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"'{name}' is no name for a run: expected up to 128 letters, digits and . _ - + @ =, "
            "a letter or digit first; choose another --run"
        )


def _free_name(root: Path, stem: str) -> str:
    """`<stem>-<time>`, with a number where two runs begin in the same second."""
    stem = re.sub(r"[^\w.+@=-]+", "-", stem).strip(".-+@=")[:80] or "run"
    name = f"{stem}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    number = 2
    free = name
    while (root / free).exists():
        free, number = f"{name}-{number}", number + 1
    return free
