"""The config beside a family: renewed when the shipped one changes, kept when the user has edited it.

The hash of what was written lies beside it, so that an edit can be told from an older shipped config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

CONFIG = "search.yaml"
RECORD = f".{CONFIG}.sha256"


def make_with_config(folder: Path, make: Callable[[], str], report: Callable[[str], None]) -> Path:
    """Make a family and write its config, unless the user's is there; returns the file.

    Args:
        folder: of the family.
        make: makes the family, which may replace the folder, and returns the config that is shipped for it.
        report: is told when a config is kept that is not the shipped one.
    """
    there, written = _read(folder / CONFIG), _read(folder / RECORD)
    shipped = make().encode()
    config = folder / CONFIG
    if there is None or _digest(there) in (written, _digest(shipped)):
        _write(config, shipped)
        _write(folder / RECORD, _digest(shipped))
        return config
    _write(config, there)
    if written is not None:
        _write(folder / RECORD, written)
    report(
        f"{config}: kept, since it may be edited and is not what this version ships; "
        "to get that, delete it and repeat this command"
    )
    return config


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(path: Path, content: bytes) -> None:
    if _read(path) != content:
        path.write_bytes(content)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
