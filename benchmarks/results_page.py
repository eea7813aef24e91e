"""What the pages of results have in common: what they were measured with, and how they and their rows are written."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> str:
    """What was measured on."""
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, {gpu}"


def versions(*libraries: str) -> str:
    """Name and version of each."""
    return ", ".join(f"{name} {version(name)}" for name in libraries)


def remade_with(script: str) -> str:
    """The end of a page, written when all is measured."""
    return (
        f"Remake with `python benchmarks/{script}`. {machine()}; {versions('torch', 'transformers')}. The load of the "
        f"machine (1 minute) was {os.getloadavg()[0]:.1f} at the end."
    )


def write_page(out: Path, name: str, text: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """`<name>.md`, and `<name>.parquet` with a column for every key of any row."""
    import pyarrow
    import pyarrow.parquet

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    columns = dict.fromkeys(key for row in rows for key in row)
    same = [{column: row.get(column) for column in columns} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(same), out / f"{name}.parquet")
