"""The tables of `benchmarks/merge.py` as Markdown and Parquet."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from merging.mergekit_peer import Peer
from results_page import machine, write_page

from search.merge.kernels import description

Rows = Sequence[Mapping[str, Any]]
MIB = 2**20
PARTS = ("one-shot", "resident", "incremental", "giant")
LIMITS = {"linear": 1.25, "slerp": 1.25, "task_arithmetic": 1.25, "ties": 2.0, "dare_ties": 2.0}
"""Multiples of the floor on a CPU that are not to be passed."""


def write_tables(measured: Mapping[str, Rows], peer: Peer, *, memory_bandwidth: float, threads: int, out: Path) -> None:
    """Write `merge.md` and `merge.parquet`.

    Args:
        measured: part (one-shot, resident, incremental, giant: 8 B parameters) -> rows; other parts stay as they are.
        memory_bandwidth: bytes per second, reads and writes counted.
    """
    import pyarrow.parquet

    command = " ".join(["python", "benchmarks/merge.py", *sys.argv[1:]])
    parts = {part: [{**row, "command": command} for row in rows] for part, rows in measured.items()}
    if (out / "merge.parquet").exists():
        for row in pyarrow.parquet.read_table(out / "merge.parquet").to_pylist():
            if row["part"] not in measured:
                parts.setdefault(row["part"], []).append(row)
    shots, held, changed, huge = (parts.get(part, []) for part in PARTS)
    parameters = max((row["parameters"] for row in shots), default=0) / 1e6
    lines = [
        "# Speed of merges",
        "",
        f"{machine()}. torch {torch.__version__}, safetensors {version('safetensors')}, "
        f"{peer.version or f'mergekit: {peer.missing}'}; {threads} threads.",
        "",
        f"Copy bandwidth in this run: memory {memory_bandwidth / 1e9:.1f} GB/s (reads and writes), "
        f"`cp` of files {_disk(shots, 'copy_s')}, until they are on the disk {_disk(shots, 'copy_synced_s')}.",
        "",
        "## One-shot: checkpoints on disk",
        "",
        f"Llama-like models of {parameters:.0f} million parameters, files in the page cache. {_command(shots)}",
        "",
        "- `copy`: `cp` of all inputs and of a file of the output's size until all of it is on the disk, as our output "
        "is when the command ends.",
        "- `recipe`: the method as a recipe of ours, which computes in float32 and rounds once; `file`: the merge file "
        "that mergekit gets, rounded at every step as mergekit rounds. Both look for NaN in the sources on the way.",
        "- `start`: a merge of a tiny model. Ratios to the copy are without it, in brackets of the whole process. "
        "mergekit / file is of whole processes, in brackets without the start of both.",
        "- `peak`: most resident memory, mapped pages included; `private`: most memory that no file backs; sampled.",
        "",
        *one_shot_table(shots),
        "",
        *summary(shots),
        "",
        "## Resident: into memory, as a search merges",
        "",
        _command(held),
        "",
        *resident_table(held),
        "",
        *(giant_table(huge) if huge else ["8 B parameters in bfloat16 on one GPU: not measured (needs `--giant`)."]),
        *([] if torch.cuda.is_available() else ["", "Not measured on a GPU."]),
        "",
        "## Incremental: one gene of 64",
        "",
        _command(changed),
        "",
        "| operator | device | all groups, ms | one group, ms | times cheaper |",
        "|---|---|--:|--:|--:|",
    ]
    for row in changed:
        full, one = row["full_s"], row["one_gene_s"]
        lines.append(f"| {row['operator']} | {row['device']} | {full * 1e3:.2f} | {one * 1e3:.2f} | {full / one:.0f} |")
    rows = [{**row, "part": part} for part, found in parts.items() for row in found]
    write_page(out, "merge", "\n".join(lines) + "\n", rows)
    print(out / "merge.md")


def _command(rows: Rows) -> str:
    """How a part is remade."""
    return "Remake with " + ", ".join(dict.fromkeys(f"`{row['command']}`" for row in rows)) + "." if rows else ""


def one_shot_table(rows: Rows) -> list[str]:
    """The one-shot part in Markdown: no absolute time without its ratio."""
    lines = [
        "| dtype | method | models | copy, s | recipe, s | recipe / copy | file, s | file / copy | start, s | "
        "mergekit, s | mergekit / file | peak of recipe, MiB | private | of file, MiB | private | of mergekit, MiB | "
        "private |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        copy = row["copy_synced_s"]
        cells = [row["dtype"], row["method"], str(row["models"]), f"{copy:.2f}"]
        for name in ("recipe", "ours"):
            seconds = row[f"{name}_s"]
            both = [row[f"{name}_failed"], ""] if seconds is None else [f"{seconds:.2f}", _ratio(seconds, row)]
            cells += both
        cells.append("" if row["start_s"] is None else f"{row['start_s']:.2f}")
        theirs, ours = row.get("mergekit_s"), row["ours_s"]
        cells += [
            row.get("mergekit_failed", "") if theirs is None else f"{theirs:.2f}",
            "" if theirs is None or ours is None else f"{theirs / ours:.1f} ({_work(row, 'mergekit'):.1f})",
        ]
        for name in ("recipe", "ours", "mergekit"):
            cells += [
                f"{row[f'{name}_{kind}'] / MIB:.0f}" if f"{name}_peak" in row else "" for kind in ("peak", "private")
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _work(row: Mapping[str, Any], name: str) -> float:
    """mergekit's time over ours, both without the start of the process."""
    ours = max(1e-3, row["ours_s"] - (row["start_s"] or 0.0))
    return max(0.0, row[f"{name}_s"] - (row[f"{name}_start_s"] or 0.0)) / ours


def _ratio(seconds: float, row: Mapping[str, Any]) -> str:
    """Time over the copy until it is on the disk: without the start of the process, and with it."""
    work = max(0.0, seconds - (row["start_s"] or 0.0))
    return f"{work / row['copy_synced_s']:.2f} ({seconds / row['copy_synced_s']:.2f})"


def summary(rows: Rows) -> list[str]:
    """Which of the limits the one-shot merges keep."""

    def kept(what: str, holds: Mapping[str, bool]) -> str:
        missed = [name for name, good in holds.items() if not good]
        return f"- {what}: {len(holds) - len(missed)} of {len(holds)}" + (
            f"; not {', '.join(missed)}" if missed else ""
        )

    names = {id(row): f"{row['method']} in {row['dtype']}" for row in rows}
    ran = [row for row in rows if row["recipe_s"] is not None and row["ours_s"] is not None]
    start = {id(row): row["start_s"] or 0.0 for row in rows}
    lines = [
        kept(
            f"{label}, without the start of the process, at most 1.5 times the copy",
            {names[id(row)]: row[f"{name}_s"] - start[id(row)] <= 1.5 * row["copy_synced_s"] for row in ran},
        )
        for label, name in (("recipe", "recipe"), ("merge file", "ours"))
    ]
    both = [row for row in ran if row.get("mergekit_s") is not None]
    if both:
        lines += [
            kept("merge file faster than mergekit", {names[id(r)]: r["ours_s"] < r["mergekit_s"] for r in both}),
            kept("the same without the start of both", {names[id(r)]: _work(r, "mergekit") > 1.0 for r in both}),
            kept("less peak memory than mergekit", {names[id(r)]: r["ours_peak"] < r["mergekit_peak"] for r in both}),
        ]
    return lines


def resident_table(rows: Rows) -> list[str]:
    """The resident part in Markdown: milliseconds and how many times the floor that is."""
    lines = [
        "The floor is (reads + 1 write) at the copy bandwidth, measured right before each row. "
        f"CPU kernels: {description()}.",
        "",
        "| operator | sources | dtype | device | threads | changed | copy, GB/s | ms | times the floor | at most |",
        "|---|--:|---|---|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        speed = row["floor_bytes"] / row["floor_seconds"] / 1e9
        limit = LIMITS.get(row["operator"]) if row["device"] == "cpu" else None
        missed = "" if limit is None else f"{limit:g}" + ("" if row["ratio"] <= limit else ", missed")
        lines.append(
            f"| {row['operator']} | {row['sources']} | {row['dtype']} | {row['device']} | {row['threads']} | "
            f"{row['changed']} | {speed:.1f} | {row['seconds'] * 1e3:.2f} | {row['ratio']:.2f} | {missed} |"
        )
    return lines


def giant_table(rows: Rows) -> list[str]:
    """8 B parameters: the time, with its multiple of the floor."""
    lines = ["8 B parameters, bfloat16, three sources:", "", "| operator | ms | times the floor |", "|---|--:|--:|"]
    for row in rows:
        cells = f"{row['seconds'] * 1e3:.1f} | {row['seconds'] / row['floor_seconds']:.2f}" if not row["failed"] else ""
        lines.append(f"| {row['operator']} | {cells or row['failed'] + ' | '} |")
    return lines


def _disk(rows: Rows, key: str) -> str:
    """Bytes copied (written) per second, the median over the rows."""
    speeds = [
        (row["models"] + 1) * row["parameters"] * getattr(torch, row["dtype"]).itemsize / row[key] for row in rows
    ]
    return f"{statistics.median(speeds) / 1e9:.2f} GB/s" if speeds else "not measured"
