"""Quality against item-evaluations: the tables and pictures of results/reference/search_quality*.md.

    python benchmarks/search_quality.py --family table                      landscapes, 20 seeds
    python benchmarks/search_quality.py --family text --seeds 0 1 2         the models of `meiosis samples text`
    python benchmarks/search_quality.py --family vision --seeds 0 1 2       `meiosis samples vision`, a weight per task
    python benchmarks/search_quality.py --family vision_answers             by right answers, not by loss
    python benchmarks/search_quality.py --family vision_layers              with a weight per task and layer
    python benchmarks/search_quality.py --family table --methods default racing --page curves.html
    python benchmarks/search_quality.py --tabulate text                     evaluate the grid of a table anew

Every method is a setting of the config (`quality/methods.py`) and runs through the real search. What was run is kept
and found again. CMA-ES as mergekit-evolve sets it up is always among them: its final quality is the target.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from quality.methods import PEER, Method, chosen
from quality.reports import Row, markdown, page, rows, write
from quality.runs import Curve, real_curve, table_curve

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference"
TABLES = REFERENCE / "tables"
WORK = ROOT / "results" / "search_quality"
SAMPLES = {"text": "text", "vision": "vision", "vision_answers": "vision", "vision_layers": "vision"}
"""Family -> the samples that it is made of."""
ANALYTIC = ("bowl-4", "valley-2", "answers-4")


def real_config(family: str, budget: int) -> dict[str, Any]:
    """The config of a family of real models, on one worker in this process."""
    folder = ROOT / "samples" / SAMPLES[family]
    if not (folder / "search.yaml").exists():
        sys.exit(f"{folder} is not there; make it with: meiosis samples {SAMPLES[family]} {folder}")
    config: dict[str, Any] = yaml.safe_load((folder / "search.yaml").read_text())

    def absolute(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: absolute(part) for key, part in value.items()}
        return str(folder / value) if isinstance(value, str) and value.startswith("./") else value

    found: dict[str, Any] = absolute(config)
    # Optimiser and fitness are what is compared.
    kept = {key: value for key, value in found["search"].items() if key not in ("optimizer", "fitness")}
    found["search"] = {**kept, "budget": budget, "finalists": 1, "window": 2}
    found["cluster"] = {"pool": "local", "workers": 1}
    if family in ("vision", "vision_answers"):
        found["space"]["patterns"] = {"model": ".*"}
    if family == "vision_answers":
        found["objectives"]["terms"] = [term.replace(".nll", ".accuracy") for term in found["objectives"]["terms"]]
    return found


def _one(order: tuple[str, str, Method, int, int]) -> Curve | str:
    kind, name, method, seed, budget = order
    import torch

    torch.set_num_threads(1)
    if kind == "table":
        return table_curve(name, method, seed, budget, WORK)
    return real_curve(real_config(name, budget), method, seed, WORK / "runs" / name)


def compare(
    kind: str, name: str, methods: list[Method], seeds: list[int], budgets: tuple[int, int], jobs: int
) -> tuple[list[Curve], list[str]]:
    """All curves of one landscape or family, and what could not be run; `budgets`: of the peer, of the others."""
    orders = [(kind, name, method, seed, budgets[method.name != PEER]) for method in methods for seed in seeds]
    curves, notes = [], []
    results = map(_one, orders) if jobs == 1 else ProcessPoolExecutor(jobs).map(_one, orders)
    for order, result in zip(orders, results, strict=True):
        label = f"{name} {order[2].name} seed {order[3]}"
        if isinstance(result, str):
            print(f"{label}: left out: {result}", flush=True)
            notes.append(f"{order[2].name} was left out: {result.rpartition(': ')[2]}")
        else:
            print(f"{label}: {result.final:.4f} after {result.items:,} items, {result.seconds:.1f} s", flush=True)
            curves.append(result)
    return curves, list(dict.fromkeys(notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("table", *SAMPLES), default="table")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 19 for tables, 0 1 2 for real models")
    parser.add_argument("--methods", nargs="+", help="names from quality/methods.py; default: all")
    parser.add_argument("--landscapes", nargs="+", help="parquet files or formulas; default: all tables and formulas")
    parser.add_argument("--budget", type=int, default=300, help="candidates of every search")
    parser.add_argument("--peer-budget", type=int, help="those of the peer, CMA-ES; default: as many")
    parser.add_argument("--tolerance", type=float, default=0.02, help="share of the gain of CMA-ES that may be missing")
    parser.add_argument("--jobs", type=int, default=1, help="searches at once")
    parser.add_argument("--page", type=Path, help="write the curves as html")
    parser.add_argument("--name", help="of the files written; default: search_quality_<family>")
    parser.add_argument("--tabulate", choices=("text", "vision"), help="make the table of a family instead")
    parser.add_argument("--points", type=int, default=192, help="points of a table")
    arguments = parser.parse_args()
    if arguments.tabulate:
        from quality.tabulate import tabulate

        TABLES.mkdir(parents=True, exist_ok=True)
        tabulate(arguments.tabulate, ROOT / "samples" / arguments.tabulate, arguments.points, TABLES)
        return
    tables = arguments.family == "table"
    seeds = arguments.seeds or list(range(20 if tables else 3))
    names = [arguments.family]
    if tables:
        names = arguments.landscapes or [*(str(path) for path in sorted(TABLES.glob("*.parquet"))), *ANALYTIC]
    found: list[Row] = []
    curves: dict[str, list[Curve]] = {}
    notes: list[str] = []
    for name in names:
        label = Path(name).stem
        kind = "table" if tables else "real"
        budgets = (arguments.peer_budget or arguments.budget, arguments.budget)
        curves[label], left_out = compare(kind, name, chosen(arguments.methods), seeds, budgets, arguments.jobs)
        notes += [note for note in left_out if note not in notes]
        found += rows(label, curves[label], arguments.tolerance)
    command = " ".join(["python", "benchmarks/search_quality.py", *sys.argv[1:]])
    page_name = arguments.name or f"search_quality_{arguments.family}"
    text = markdown(page_name, found, command, notes, arguments.tolerance)
    write(REFERENCE, page_name, curves, arguments.tolerance, text)
    if arguments.page:
        page(arguments.page, curves)
    print(text)


if __name__ == "__main__":
    main()
