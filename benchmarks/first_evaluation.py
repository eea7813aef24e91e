"""How long it takes from `meiosis search` to the first recorded evaluation, and what that is made of.

    python benchmarks/first_evaluation.py [--rounds 5] [--config samples/text/search.yaml] [--out results/reference]
        [--checkout NAME=FOLDER ...]

Starts the command as a user does, waits until the first result is in the log of the run, stops it, and takes the parts
from the log. Cases take turns, so that a change in the load of the machine meets all of them:

* one and two workers on a Ray of their own, two on a Ray that runs already, and the pool in the process;
* `fresh`: nothing of ours is kept from earlier runs, neither hashes of models, nor compiled kernels, nor what operators
  prepared. Files stay in the memory of the system.
* `floor`: Ray started or joined with the same options, and the libraries imported in as many workers, nothing else.

`--checkout` measures other working copies in turn with this one, for before and after.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from results_page import machine, versions, write_page
from starting.timeline import PARTS, first_trial, parts_of, read_log

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-c", "from meiosis.cli.main import main; main()")
MOST_SECONDS = 300.0
"""A start that takes longer has failed."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A way to run a search; `workers` 0 is the pool in the process."""

    name: str
    workers: int
    joined: bool = False
    fresh: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        return ("--workers", str(self.workers)) if self.workers else ("--workers", "1", "--set", "cluster.pool=local")


CASES = (
    Case("own Ray, 1 worker", 1),
    Case("own Ray, 2 workers", 2),
    Case("own Ray, 2 workers, fresh", 2, fresh=True),
    Case("joined Ray, 2 workers", 2, joined=True),
    Case("local", 0),
    Case("local, fresh", 0, fresh=True),
)


def environment(checkout: Path, empty: Path | None) -> dict[str, str]:
    """Of the command: our packages out of a working copy; caches in an empty folder if one is given."""
    found = dict(os.environ, PYTHONPATH=str(checkout))
    if empty is not None:
        found |= {"MEIOSIS_CACHE": str(empty / "hashes"), "XDG_CACHE_HOME": str(empty), "TMPDIR": str(empty)}
    return found


@contextmanager
def ray_head(workers: int) -> Iterator[str]:
    """A Ray that runs already, at the address that is given."""
    from cluster.local_ray import open_session

    session = open_session(None, cpus=workers)
    try:
        time.sleep(5)  # until its own processes have come to rest
        yield session.address
    finally:
        session.close()


def search_seconds(case: Case, config: Path, checkout: Path, address: str | None) -> Row:
    """One start of a search: all seconds, and those of every part where the log tells them."""
    with tempfile.TemporaryDirectory(prefix="fe-") as temporary:
        folder = Path(temporary)
        (empty := folder / "c").mkdir()
        arguments = ["search", str(config), "--run", "first", *case.options, "--set", f"results={folder / 'results'}"]
        arguments += ["--address", address] if address else []
        log = folder / "results" / "first" / "log.jsonl"
        with (folder / "out").open("w") as out:
            began = time.time()
            process = subprocess.Popen(
                [*COMMAND, *arguments],
                env=environment(checkout, empty if case.fresh else None),
                stdout=out,
                stderr=out,
                cwd=folder,
            )
        try:
            while first_trial(read_log(log)) is None:
                if process.poll() is not None or time.time() > began + MOST_SECONDS:
                    raise RuntimeError(f"{case.name}: no first evaluation:\n{(folder / 'out').read_text()}")
                time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.wait(MOST_SECONDS)
        finally:
            process.kill()
            process.wait()
        events = read_log(log)
        trial = first_trial(events)
        assert trial is not None
        row: Row = {"seconds": datetime.fromisoformat(trial["time"]).timestamp() - began}
        try:
            return row | {"parts": parts_of(events, began)}
        except ValueError:  # another working copy, whose log does not tell it
            return row | {"parts": {}}


def floor_seconds(case: Case, checkout: Path, address: str | None) -> Row:
    """Ray and libraries alone."""
    arguments = ["--workers", str(case.workers)] + (["--address", address] if address else [])
    began = time.time()
    with subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "starting" / "floor.py"), *arguments],
        env=environment(checkout, None),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.time() - began
    if line != "done\n":
        raise RuntimeError(f"{case.name}: the floor could not be measured")
    return {"seconds": seconds, "parts": {}}


def measure(
    arguments: argparse.Namespace, checkouts: Mapping[str, Path], note: Callable[[str], None]
) -> Iterator[list[Row]]:
    """All single measurements so far, in the order in which they were made, after every round."""
    rows: list[Row] = []
    chosen = [case for case in CASES if case.name in (arguments.only or [case.name])]

    def add(case: Case, what: str, row: Row, number: int) -> None:
        rows.append({"case": case.name, "what": what, "round": number, "load": os.getloadavg()[0], **row})
        note(f"round {number}: {case.name}, {what}: {row['seconds']:.2f} s (load {rows[-1]['load']:.1f})")

    for number in range(arguments.rounds + 1):  # round 0 fills caches and is not counted
        for case in chosen:
            if number == 0 and case.fresh:
                continue
            with ray_head(case.workers) if case.joined else nullcontext() as address:
                names = list(checkouts)
                for name in names if number % 2 else reversed(names):
                    add(case, name, search_seconds(case, arguments.config, checkouts[name], address), number)
                if not case.fresh:
                    add(case, "floor", floor_seconds(case, ROOT, address), number)
        if number:
            yield [row for row in rows if row["round"] > 0]


def medians(rows: Sequence[Row]) -> Row:
    """Of all seconds, and the parts of the run whose seconds are nearest to it: these add up."""
    middle = statistics.median(row["seconds"] for row in rows)
    typical = min(rows, key=lambda row: abs(row["seconds"] - middle))
    seconds = sorted(row["seconds"] for row in rows)
    return {"seconds": middle, "least": seconds[0], "most": seconds[-1], "parts": typical["parts"]}


def write(rows: Sequence[Row], checkouts: Mapping[str, Path], out: Path) -> None:
    """`first_evaluation.md` and `first_evaluation.parquet`."""
    command = shlex.join(["python", "benchmarks/first_evaluation.py", *sys.argv[1:]])
    libraries = versions("torch", "transformers", "ray")
    loads = [row["load"] for row in rows]
    names = [case.name for case in CASES if any(row["case"] == case.name for row in rows)]
    found = {
        (name, what): medians([row for row in rows if (row["case"], row["what"]) == (name, what)])
        for name in names
        for what in (*checkouts, "floor")
        if any((row["case"], row["what"]) == (name, what) for row in rows)
    }
    heads = [*checkouts, "floor"]
    lines = [
        "# From `meiosis search` to the first evaluation",
        "",
        f"{machine()}. {libraries}. {datetime.now(UTC):%Y-%m-%d}. Remake with `{command}`.",
        "",
        f"Seconds from the start of the process until the first result is recorded: median (least to most) of "
        f"{max(row['round'] for row in rows)} round(s) in which cases took turns. The load of the machine (1 minute) "
        f"was {min(loads):.1f} to {max(loads):.1f}, all of this included. The floor is Ray with the same options, and "
        "torch and transformers imported in as many workers: no model, no evaluation.",
        "",
        f"| case | {' | '.join(heads)} |",
        "|---|" + "--:|" * len(heads),
    ]
    for name in names:
        cells = []
        for what in heads:
            one = found.get((name, what))
            cells.append("" if one is None else f"{one['seconds']:.2f} ({one['least']:.2f} to {one['most']:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for what in checkouts:
        with_parts = [name for name in names if found[name, what]["parts"]]
        if not with_parts:
            continue
        lines += [
            "",
            "## What it is made of" + (f": {what}" if len(checkouts) > 1 else ""),
            "",
            "Of the run nearest to the median, in the order in which the parts end; together they are all of its time. "
            "What goes on beside something else counts only as far as it ends later.",
            "",
            f"| part | {' | '.join(with_parts)} |",
            "|---|" + "--:|" * len(with_parts),
        ]
        for part, meaning in PARTS.items():
            seconds = [found[name, what]["parts"].get(part) for name in with_parts]
            lines.append(f"| {meaning} | {' | '.join('' if s is None else f'{s:.2f}' for s in seconds)} |")
        sums = [sum(found[name, what]["parts"].values()) for name in with_parts]
        lines.append(f"| together | {' | '.join(f'{total:.2f}' for total in sums)} |")
    flat = [
        {**{k: v for k, v in row.items() if k != "parts"}, **{p: row["parts"].get(p) for p in PARTS}} for row in rows
    ]
    write_page(out, "first_evaluation", "\n".join(lines) + "\n", flat)
    print(out / "first_evaluation.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--config", type=Path, default=ROOT / "samples" / "text" / "search.yaml")
    parser.add_argument("--out", type=Path, default=Path("results", "reference"))
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--checkout", action="append", metavar="NAME=FOLDER", help="measure this working copy as well")
    arguments = parser.parse_args()
    arguments.config = arguments.config.resolve()
    others = dict(text.split("=", 1) for text in arguments.checkout or ())
    checkouts = {
        **{name: Path(folder).resolve() for name, folder in others.items()},
        "now" if others else "search": ROOT,
    }
    for rows in measure(arguments, checkouts, lambda line: print(line, file=sys.stderr, flush=True)):
        write(rows, checkouts, arguments.out)


if __name__ == "__main__":
    main()
