"""A search whose workers, nodes and driver are killed at random, against the same search left alone.

    python benchmarks/chaos.py                        200 kills; half an hour to an hour on two cores
    python benchmarks/chaos.py --kills 12 --out DIR   a few minutes

Both searches run on a Ray cluster of their own on this machine, a head and three raylets, as real `meiosis`
processes. One is left alone. Of the other, a seeded monkey kills with signal 9: a worker in the middle of a trial,
two at once, a node, the driver (then `meiosis resume`), driver and node, or everything there is (then a new cluster,
and `meiosis resume` there). Sometimes garbage is put behind the log of a driver that was killed. In the end the
events are read from the files, without the code that wrote them, and compared.

The models are those of `meiosis samples text samples/text`, or any family in a folder of the same form.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos_run import verify
from chaos_run.monkey import SHARES, Monkey, deal, moments
from chaos_run.one_search import Search, environment, write_config
from chaos_run.raylets import Raylets
from chaos_run.tables import write_tables

from search.store.history import History

ROOT = Path(__file__).resolve().parent.parent


def run_search(
    folder: Path, arguments: argparse.Namespace, plan: list[tuple[int, str]], note: Callable[[str], None]
) -> tuple[Monkey, Search, float]:
    """One search in `folder`, disturbed as planned; returns who watched it, the search and its seconds."""
    variables = environment(folder, arguments.seconds)
    config = write_config(
        arguments.family.resolve(),
        folder,
        budget=arguments.budget,
        window=3 * arguments.workers,
        workers=arguments.workers,
        seed=arguments.seed,
    )
    one = Search(folder, config, variables)
    monkey = Monkey(
        one,
        folder,
        lambda: Raylets(folder, variables, arguments.cpus),
        size=arguments.nodes,
        workers=arguments.workers,
        chance=random.Random(f"strikes {arguments.seed}"),
        note=note,
    )
    return monkey, one, monkey.run(plan)


def measure(arguments: argparse.Namespace, temporary: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Run both searches; returns the figures, with `kills` and `faults`."""
    chance = random.Random(arguments.seed)
    quiet, quiet_search, quiet_seconds = run_search(temporary / "quiet", arguments, [], note)
    note(f"undisturbed: {quiet_seconds:.0f} s")
    searched = sum(trial.startswith("search ") for trial in quiet.notes.ended)
    when = moments(arguments.kills, searched, len(quiet.notes.ended), chance)
    plan = list(zip(when, deal(arguments.kills, chance), strict=True))
    monkey, disturbed, seconds = run_search(temporary / "chaos", arguments, plan, note)
    faults = verify.faults(disturbed.run, quiet_search.run, arguments.budget)
    with (
        History.open(disturbed.run / "history", writable=False) as ours,
        History.open(quiet_search.run / "history", writable=False) as theirs,
    ):
        digest = ours.digest()
        if digest != theirs.digest():
            faults.append("the digests of the histories differ")
    faults += [f"a driver ended by itself: {why}" for why in disturbed.ended_themselves]
    faults += [f"workers are left: {monkey.orphans}"] if monkey.orphans else []
    faults += [] if len(monkey.kills) == arguments.kills else [f"only {len(monkey.kills)} kills before the end"]
    needed, again = verify.evaluated(disturbed.run)
    return {
        "kills": monkey.kills,
        "faults": faults,
        "digest": digest,
        "budget": arguments.budget,
        "trials": sum(event["kind"] == "trial" for event in verify.read_events(disturbed.run)),
        "needed": needed,
        "again": again,
        "begun": monkey.notes.begun,
        "quiet_begun": quiet.notes.begun,
        "drivers": disturbed.drivers,
        "clusters": monkey.clusters,
        "nodes": monkey.nodes,
        "seconds": seconds,
        "quiet_seconds": quiet_seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, help="candidates; by default four per kill, at least 60")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a trial takes on average")
    parser.add_argument("--workers", type=int, default=3, help="at first; later drivers get one more or less")
    parser.add_argument("--nodes", type=int, default=3, help="raylets beside the head")
    parser.add_argument("--cpus", type=int, default=2, help="workers that a node holds")
    parser.add_argument("--family", type=Path, default=ROOT / "samples" / "text")
    parser.add_argument("--folder", type=Path, help="where the runs are written, and stay")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference")
    arguments = parser.parse_args()
    arguments.budget = arguments.budget or max(60, 4 * arguments.kills)
    if arguments.kills < len(SHARES):
        parser.error(f"--kills is {arguments.kills}, expected at least {len(SHARES)}: one of every kind")
    if not (arguments.family / "base").is_dir():
        parser.error(f"{arguments.family} has no models; make them with: meiosis samples text {arguments.family}")
    began = time.monotonic()

    def note(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = arguments.folder.resolve() if arguments.folder else Path(temporary)
        found = measure(arguments, folder, note)
    found["load"] = load
    write_tables(found, arguments.out)
    print((arguments.out / "chaos.md").read_text())
    for fault in found["faults"]:
        print(f"FAULT: {fault}", file=sys.stderr)
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
