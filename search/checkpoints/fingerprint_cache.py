"""The cache of fingerprints: one JSON file per user, by path of the weight file. Losing it costs time."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 1


def cache_folder() -> Path:
    """Where this user's caches lie: `MEIOSIS_CACHE`, or `meiosis` in the cache folder of the system.

    Raises:
        RuntimeError: neither is set and the user has no home.
    """
    if own := os.environ.get("MEIOSIS_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared, "meiosis")
    return Path.home() / ".cache" / "meiosis"


def read_cache() -> dict[str, Any]:
    """Path -> what was written for it; empty if there is no cache or it is damaged."""
    try:
        content = json.loads((cache_folder() / "fingerprints.json").read_bytes())
        return dict(content["files"]) if content["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError):
        return {}


def write_cache(fresh: Mapping[str, Any]) -> None:
    """Add entries, and drop those of files that are gone.

    Two processes at once may lose each other's entries, but never spoil the file. A cache that cannot
    be written is no error: the next run hashes again.
    """
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        files = {path: entry for path, entry in read_cache().items() if os.path.exists(path)}
        files.update(fresh)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix="fingerprints-", delete=False) as file:
            json.dump({"version": VERSION, "files": files}, file)
        os.replace(file.name, folder / "fingerprints.json")
    except (OSError, RuntimeError):
        return
