"""The evaluator's function of a chaos run: it takes its time, and notes when a trial begins and ends.

The notes tell who may be killed, and how much was evaluated in all. The score tells which merge it is.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NOTES, SECONDS = "CHAOS_NOTES", "CHAOS_SECONDS"
"""Environment variables: folder with a file for every process, and how long a trial takes on average."""


def score(model: torch.nn.Module, items: Sequence[Mapping[str, Any]]) -> float:
    """The sum of all weights without their signs, after a time that depends on it alone."""
    value = float(sum(float(weight.double().abs().sum()) for weight in model.parameters()))
    trial = f"{items[0]['pool']} {value!r}"
    chance = zlib.crc32(trial.encode()) % 1000 / 1000
    note(f"begin {trial}")
    # One in twenty takes so long that the window fills up behind it: 0.95 * 0.975 + 0.05 * 1.5 = 1.
    time.sleep(float(os.environ[SECONDS]) * (1.5 if chance >= 0.95 else 0.5 + chance))
    note(f"end {trial}")
    return value


def note(line: str) -> None:
    """Append to the file of this process, in one write. Its number alone would name a later process as well."""
    started = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    with Path(os.environ[NOTES], f"{os.getpid()}.{started}").open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())
