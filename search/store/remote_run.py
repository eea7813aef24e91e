"""Runs under a URL: made, found and brought here."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from search.checkpoints.fingerprint_cache import cache_folder
from search.errors import RunError, UserError
from search.store.remote import contents_of, different_ways, download_run
from search.store.run_folder import CONFIG, RunFolder
from search.store.urls import Store


def working_root(url: str) -> Path:
    """The folder of this machine for the runs under a URL: below `MEIOSIS_CACHE`, by default `~/.cache/meiosis`."""
    url = url.rstrip("/")
    return (
        cache_folder() / "runs" / f"{url.rpartition('/')[2] or 'runs'}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    )


def create_remote(url: str, name: str | None, manifest: Mapping[str, Any]) -> RunFolder:
    """A new run under a URL, and its working copy here; see `RunFolder.create`."""
    store = Store.open(url)
    root = working_root(url)
    if name is not None:
        try:
            taken = store.read(f"{name}/{CONFIG}") is not None
        except OSError as error:
            raise UserError(f"{url}: cannot be read: {error}") from error
        if taken:
            raise UserError(
                f"run '{name}' already exists in {url}; go on with `meiosis resume {url}/{name}` or choose "
                "another --run"
            )
    folder = RunFolder.create(root, name, manifest)
    folder.set_remote(f"{url.rstrip('/')}/{folder.name}")
    return folder


def fetch(url: str) -> RunFolder:
    """The run at a URL, in its working copy here, which is brought up to date unless it is ahead, or in use.

    Raises:
        UserError: there is no run at the URL.
        RunError: the copy here and the one at the URL went different ways, or it cannot be brought here.
    """
    store = Store.open(url)
    root, _, name = store.url.rpartition("/")
    folder = RunFolder(working_root(root) / name)
    try:
        if store.read(CONFIG) is None:
            raise UserError(f"{url}: there is no run: no {CONFIG}; check the URL")
        if folder.config.exists() and folder.owner():
            return folder  # of the driver that is at work on it here: nothing is newer
        draft = folder.path.parent / f".{name}.{uuid4().hex[:8]}.tmp"
        try:
            download_run(store, draft)
            _take(draft, folder, url)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise RunError(f"{url}: cannot be brought to {folder.path}: {error}") from error
    folder.set_remote(store.url)
    return folder


def _take(draft: Path, folder: RunFolder, url: str) -> None:
    """Put what was downloaded in the place of the working copy, if it goes on from that."""
    if folder.config.exists():
        beside = {f"{path.parent.parent.name}/{path.parent.name}" for path in draft.glob("arms/*/history")}
        for at in sorted({"", *beside}):
            here, there = contents_of(folder.path / at / "history"), contents_of(draft / at / "history")
            if here[: len(there)] != there:
                break
        else:
            return  # killed before its last events were copied: they are worth more
        if there[: len(here)] != here:
            raise RunError(different_ways(folder.path, url))
        aside = folder.path.parent / f".{folder.name}.{uuid4().hex[:8]}.old"
        folder.path.rename(aside)
        draft.rename(folder.path)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        draft.rename(folder.path)
