"""What the driver costs per trial, and how busy the workers are that it feeds.

    python benchmarks/driver_cost.py [--out results/reference] [--folder /tmp] [--skip-ray] [--quick]

* Cost: the driver searches with the default optimiser over the 99 genes of a 32-layer model and three sources;
  workers are simulated (8 to 10,000), or real ones on Ray that only sleep (4 to 16).
* Utilisation: log-normal and Pareto durations in virtual time, and real sleepers; in arrival order, in ordered
  commit, and with a barrier between generations.

Takes about ten minutes on two cores and wants them for itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from results_page import machine, versions, write_page
from scheduling.metering import PARTS, Meter, metered_search
from scheduling.problem import make_population, score
from scheduling.simulated_pool import Fates, SimulatedPool, log_normal, pareto
from scheduling.utilisation import (
    ARRIVAL,
    BARRIER,
    GENERATION_0,
    ORDERED,
    Discipline,
    real,
    simulated,
    sleeping_pool,
    starved,
)

from search.driver import Limits
from search.nevergrad_box import import_cma

MEAN_SECONDS, VARIATION = 60.0, 0.5
REAL_SECONDS = 0.5
SUBMIT_SECONDS = 0.002
"""What the driver takes for a trial in the simulations of utilisation: the target of its cost."""
Row = dict[str, Any]


def cost_rows(meter: Meter, kind: str, workers: int, wait_seconds: float) -> Row:
    """Milliseconds per trial of the search: median, p95, p99 and mean; the median of every part."""
    found = [parts for candidate, parts in meter.spent.items() if candidate >= GENERATION_0]
    totals = sorted(1e3 * sum(parts.values()) for parts in found)
    cuts = statistics.quantiles(totals, n=100, method="inclusive")
    row = {
        "table": "cost",
        "workers": workers,
        "pool": kind,
        "trials": len(totals),
        "median_ms": statistics.median(totals),
        "p95_ms": cuts[94],
        "p99_ms": cuts[98],
        "mean_ms": statistics.fmean(totals),
        "cpu_ms": 1e3 * meter.cpu_seconds / (len(totals) + GENERATION_0),
        "sync_ms": wait_seconds * 1e3,
    }
    return row | {f"{part}_ms": statistics.median(1e3 * parts[part] for parts in found) for part in PARTS}


def sync_seconds(folder: Path) -> float:
    """Median time to append 4 KiB to a file and wait until the disk has them."""
    times = []
    descriptor = os.open(folder / "sync", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in range(100):
        began = time.perf_counter()
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)
        times.append(time.perf_counter() - began)
    os.close(descriptor)
    return statistics.median(times)


def simulated_cost(folder: Path, workers: int, budget: int) -> Row:
    """The driver against simulated workers, some of which crash or fail."""
    folder.mkdir()
    fates = Fates(log_normal(MEAN_SECONDS, VARIATION), crash=0.01, error=0.01)
    pool = SimulatedPool(workers, fates, score, replace_seconds=5.0)
    window = 2 * workers
    meter = metered_search(
        folder, pool, lambda kind: make_population(kind, budget=budget, window=window), Limits(budget, window)
    )
    return cost_rows(meter, "simulated", workers, sync_seconds(folder))


def real_cost(folder: Path, workers: int, budget: int) -> Row:
    """The driver with workers on Ray that sleep."""
    folder.mkdir()
    window = 2 * workers
    with sleeping_pool(folder, workers, REAL_SECONDS, VARIATION) as pool:
        pool.ready()
        meter = metered_search(
            folder,
            pool,
            lambda kind: make_population(kind, budget=budget, window=window),
            Limits(budget, window),
            real=True,
        )
    return cost_rows(meter, "Ray", workers, sync_seconds(folder))


STEADY = "log-normal, CV 0.5"
HEAVY = "Pareto, exponent 2.5; 1 % crash, 1 % fail"
FATES = {
    STEADY: Fates(log_normal(MEAN_SECONDS, VARIATION)),
    HEAVY: Fates(pareto(MEAN_SECONDS, 2.5), crash=0.01, error=0.01),
}
WIDER = {times: Discipline(f"ordered commit, window {times} times the workers", times, True) for times in (3, 4, 6)}
WIDE = (
    (8, 3000, STEADY, WIDER[3]),
    (16, 4000, STEADY, ORDERED),
    (16, 4000, STEADY, WIDER[3]),
    (100, 6000, STEADY, ARRIVAL),
    (100, 6000, STEADY, ORDERED),
    (100, 6000, STEADY, WIDER[3]),
    (100, 6000, STEADY, WIDER[4]),
    (1000, 12_000, STEADY, ARRIVAL),
    (1000, 12_000, STEADY, ORDERED),
    (1000, 12_000, STEADY, WIDER[4]),
    (10_000, 30_000, STEADY, ARRIVAL),
    (8, 3000, HEAVY, ARRIVAL),
    (8, 3000, HEAVY, ORDERED),
    (8, 3000, HEAVY, WIDER[6]),
    (1000, 12_000, HEAVY, ARRIVAL),
    (1000, 12_000, HEAVY, WIDER[6]),
)
"""Workers, candidates, durations and ways beyond the eight workers that are compared with real ones."""


def simulated_use(folder: Path, durations: str, way: Discipline, workers: int, budget: int) -> Row:
    """Utilisation of simulated workers."""
    share, pool = simulated(
        folder, FATES[durations], way, workers=workers, budget=budget, submit_seconds=SUBMIT_SECONDS
    )
    return _use(way, durations, workers, "simulated", budget) | {"utilisation": share, "starved": starved(pool)}


def real_use(folder: Path, way: Discipline, workers: int, budget: int) -> Row:
    """Utilisation of workers on Ray that sleep."""
    share = real(folder, way, workers=workers, budget=budget, mean=REAL_SECONDS, variation=VARIATION)
    return _use(way, STEADY, workers, "Ray", budget) | {"utilisation": share, "starved": None}


def _use(way: Discipline, durations: str, workers: int, pool: str, budget: int) -> Row:
    row = {"table": "utilisation", "workers": workers, "pool": pool, "durations": durations}
    return row | {"discipline": way.name, "trials": budget}


def measure(arguments: argparse.Namespace, note: Callable[[str], None]) -> list[Row]:
    """All rows of both tables."""
    import_cma()  # a second, once per run: no cost of a trial
    few = 10 if arguments.quick else 1
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="driver-cost-", dir=arguments.folder) as temporary:
        folders = (Path(temporary, str(number)) for number in range(1000))

        def add(row: Row) -> None:
            rows.append(row)
            shown = f"{row['median_ms']:.2f} ms" if row["table"] == "cost" else f"{row['utilisation']:.3f}"
            note(f"{row['table']}: {row['workers']} workers, {row['pool']}, {row.get('discipline', '')} {shown}")

        for workers, budget in ((8, 3000), (100, 3000), (1000, 6000), (10_000, 24_000)):
            add(simulated_cost(next(folders), workers, max(budget // few, 300)))
        for workers in () if arguments.skip_ray else (4, 8, 16):
            add(real_cost(next(folders), workers, 40 * workers // few + 8))
        for way in (ARRIVAL, ORDERED, BARRIER):
            add(simulated_use(next(folders), STEADY, way, 8, 3000 // few))
            if not arguments.skip_ray:
                add(real_use(next(folders), way, 8, max(320 // few, 40)))
        for workers, budget, fates, way in WIDE:
            add(simulated_use(next(folders), fates, way, workers, budget // few))
    return rows


def cost_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds per trial, as Markdown."""
    heads = ["median", "p95", "p99", "mean", "cpu", *PARTS]
    lines = [
        f"| workers | pool | trials | sync | {' | '.join(heads)} |",
        "|--:|---|--:|--:|" + "--:|" * len(heads),
    ]
    for row in rows:
        cells = [str(row["workers"]), row["pool"], str(row["trials"]), f"{row['sync_ms']:.2f}"]
        cells += [f"{row[f'{head}_ms']:.2f}" for head in heads]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def use_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Utilisation, as Markdown."""
    lines = [
        "| workers | pool | durations | candidates are handed out | trials | utilisation | no job queued |",
        "|--:|---|---|---|--:|--:|--:|",
    ]
    for row in rows:
        empty = "" if row["starved"] is None else f"{100 * row['starved']:.1f} %"
        lines.append(
            f"| {row['workers']} | {row['pool']} | {row['durations']} | {row['discipline']} | {row['trials']} | "
            f"{row['utilisation']:.3f} | {empty} |"
        )
    return lines


def write(rows: Sequence[Row], loads: tuple[float, float], out: Path) -> None:
    """`driver_cost.md` and `driver_cost.parquet`."""
    command = " ".join(["python", "benchmarks/driver_cost.py", *sys.argv[1:]])
    libraries = versions("nevergrad", "cma", "pyarrow", "ray")
    costs = [row for row in rows if row["table"] == "cost"]
    uses = [row for row in rows if row["table"] == "utilisation"]
    lines = [
        "# Cost of the driver, and how busy it keeps the workers",
        "",
        f"{machine()}. {libraries}. Remake with `{command}`.",
        "",
        "## Driver milliseconds per trial",
        "",
        "Ordered commit, window twice the workers, 99 genes, diagonal CMA, 200 item scores per trial; simulated "
        f"workers take {MEAN_SECONDS:g} s on average (log-normal, CV {VARIATION}), 1 % of attempts crash and 1 % of "
        f"trials fail; workers on Ray sleep {REAL_SECONDS:g} s on average. A trial pays for all that is done for it, "
        "and its share of what is done for several.",
        "",
        "- `sync`: time to append 4 KiB to a file and have them on this disk, in the same run: nothing that is "
        "durable costs less. `cpu`: mean time on the processor; the rest of the mean is waiting, for the disk or the "
        f"processor. The load of the machine (1 minute) was {loads[0]:.1f} at the start and {loads[1]:.1f} at the end.",
        "- Medians of the parts: `ask` and `tell` are the optimiser and the recipe, `record` the history "
        "(ask and result, on disk), `keep` the spool (results that came before their turn, on disk), `submit` and "
        "`collect` the pool (for simulated workers only the call), `loop` the rest.",
        "",
        *cost_table(costs),
        "",
        "## Utilisation",
        "",
        "Share of their time that workers are busy, from the start of the first candidate after generation 0 to the "
        "start of the last. Simulated workers in virtual time, in which the driver takes "
        f"{SUBMIT_SECONDS * 1e3:g} ms for every trial. `no job queued`: how many evaluations ended while no next one "
        "was decided.",
        "",
        *use_table(uses),
        "",
        "In ordered commit, a candidate that takes long holds back those that are a window behind it; the more workers "
        "there are, the longer the longest of them takes. A barrier waits for the longest of every generation.",
    ]
    write_page(out, "driver_cost", "\n".join(lines) + "\n", rows)
    print(out / "driver_cost.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results", "reference"))
    parser.add_argument("--folder", type=Path, help="where runs are written: the disk that is measured")
    parser.add_argument("--skip-ray", action="store_true", help="simulated workers only")
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials, to try it out")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rows = measure(arguments, lambda line: print(line, file=sys.stderr, flush=True))
    write(rows, (load, os.getloadavg()[0]), arguments.out)


if __name__ == "__main__":
    main()
