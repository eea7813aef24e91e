"""The figures of a chaos run as Markdown and Parquet."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from chaos_run.monkey import SHARES, Kill
from results_page import machine, versions, write_page


def write_tables(found: Mapping[str, Any], out: Path) -> None:
    """`chaos.md` and `chaos.parquet`, which has a row for every kill."""
    kills: list[Kill] = found["kills"]
    arguments = sys.argv[1:]
    if "--out" in arguments:  # where the table went is no part of how it came about
        at = arguments.index("--out")
        del arguments[at : at + 2]
    command = " ".join(["python", "benchmarks/chaos.py", *arguments])
    libraries = versions("ray", "nevergrad", "torch")
    torn = [kill for kill in kills if kill.torn_bytes]
    lines = [
        "# A search that is killed again and again",
        "",
        f"{machine()}. {libraries}. {date.today().isoformat()}. The load of the machine (1 minute) was "
        f"{found['load']:.1f} at the start. Remake with `{command}`.",
        "",
        "One search is left alone; of the same search a seeded monkey kills (signal 9) workers in the middle of "
        "trials, nodes, drivers, or everything, on a head and several raylets of one machine. Events are read from "
        "the files of both runs, without the code that wrote them, and compared.",
        "",
        "| killed | times | processes | median seconds to the next result |",
        "|---|--:|--:|--:|",
        *(_row(kind, [kill for kill in kills if kill.kind == kind]) for kind in SHARES),
        _row("all", kills),
        "",
        "| | left alone | disturbed |",
        "|---|--:|--:|",
        f"| seconds | {found['quiet_seconds']:.0f} | {found['seconds']:.0f} |",
        f"| drivers | 1 | {found['drivers']} |",
        f"| clusters | 1 | {found['clusters']} |",
        f"| evaluations needed | {found['needed']} | {found['needed']} |",
        f"| evaluations begun | {found['quiet_begun']} | {found['begun']} |",
        "",
        f"{found['budget']} candidates were asked for, and {found['trials']} trials told; those without an evaluation "
        f"of their own have the recipe of an earlier one. {found['again']} evaluations were started again by the "
        "driver under which their worker died; the others that were begun in vain belonged to drivers that died. "
        f"{found['nodes']} nodes joined in all. Behind {len(torn)} of the drivers that were killed, "
        f"{sum(kill.torn_bytes for kill in torn)} bytes of garbage were put at the end of their log or spool.",
        "",
        *(_verdict(found)),
    ]
    rows = [{**asdict(kill), "command": command} for kill in kills]
    write_page(out, "chaos", "\n".join(lines) + "\n", rows)


def _row(kind: str, kills: list[Kill]) -> str:
    waited = [kill.next_result for kill in kills if kill.next_result is not None]
    median = f"{statistics.median(waited):.1f}" if waited else ""
    return f"| {kind} | {len(kills)} | {sum(kill.processes for kill in kills)} | {median} |"


def _verdict(found: Mapping[str, Any]) -> list[str]:
    if found["faults"]:
        return ["**Faults:**", "", *(f"- {fault}" for fault in found["faults"])]
    return [
        "In the end every candidate had been asked for once, every trial was there once, none was lost or declared "
        "failed, results had been told in the order of their candidates, and all that is not circumstance (times, "
        "workers, attempts) had the same bits as in the search that was left alone, down to the exported model "
        f"(digest of both histories: `{found['digest'][:16]}`)."
    ]
