"""What was copied to nodes that do not see the files of a run: a line of JSON for each, in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

COPIED = "copied.jsonl"


@dataclass(frozen=True)
class Copied:
    """One node that got copies.

    Attributes:
        node, node_id: its name, and Ray's id of it.
        nbytes: what moved.
        folder: where the copies are on that node.
    """

    node: str
    node_id: str
    nbytes: int
    seconds: float
    folder: str


def note_copied(file: Path, copied: Copied) -> None:
    """Add a line. A disk that is full is no reason to stop a search: then the line is missing."""
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(copied)) + "\n")
    except OSError:
        return


def read_copied(file: Path) -> list[Copied]:
    """The lines so far; damaged ones are left out."""
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(Copied(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
