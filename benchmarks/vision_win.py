"""The table of results/reference/vision_win.md: a searched merge of eight image tasks against the standard merges.

    meiosis samples vision samples/vision --data DATA       first, with MNIST and CIFAR-10
    python benchmarks/vision_win.py --seeds 0 1 2

The search minimises the loss, and so does the certificate of the run, which is in the table as it is. Accuracy is
compared in the same way: by the paired bootstrap of `search.bootstrap`, corrected by Holm, on the scores that the
certification recorded. For that comparison the baselines are tuned for accuracy in a run of their own, so that their
settings are the ones that are best at what is compared, on the search and the select pictures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evaluators.base import Scores
from search.bootstrap import Bootstrap, holm
from search.config import load_config
from search.objective import Objective, Term
from search.setup import Setup, check
from search.store.events import Ask, Trial
from search.store.history import History

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "results" / "reference"
NAMED = ("uniform_soup", "task_arithmetic", "ties", "tsv_m", "iso_c")
"""What the winner has to beat."""
START = "import sys; from meiosis.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Finished:
    """A run that has ended: its verdict, what it used, and its certify scores by label."""

    verdict: Mapping[str, Any]
    item_evaluations: int
    certified: Mapping[str, Trial]

    @property
    def found(self) -> Trial:
        """The winner."""
        return self.certified["found merge"]


def meiosis(*arguments: str) -> dict[str, Any]:
    """What a command prints with `--json`."""
    command = [sys.executable, "-c", START, *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"meiosis {' '.join(arguments)}: exit status {done.returncode}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def run(config: Path, folder: Path, settings: Sequence[str]) -> Finished:
    """Search, or go on with a search that was stopped, or read one that has ended."""
    arguments = ["search", str(config), "--run", folder.name]
    for setting in (*settings, f"results={folder.parent}"):
        arguments += ["--set", setting]
    verdict = meiosis(*(["resume", str(folder)] if folder.exists() else arguments))["verdict"]
    origins: dict[int, str] = {}
    certified: dict[str, Trial] = {}
    for event in History.open(folder / "history", writable=False):
        if isinstance(event, Ask):
            origins[event.candidate] = event.origin
        elif isinstance(event, Trial) and event.items == "certify":
            origin = origins[event.candidate]
            certified["found merge" if origin == "search" else origin] = event
    used = meiosis("status", str(folder))["used"]
    return Finished(verdict, int(used["item_evaluations"]), certified)


def compared(
    setup: Setup, objective: Objective, found: Trial, others: Mapping[str, Trial], seed: int
) -> list[dict[str, Any]]:
    """A row for each of the others, best first, then the found merge; values as the metrics have them."""
    scores: dict[int, Mapping[str, Scores]] = {0: found.scores}
    scores |= {number: trial.scores for number, trial in enumerate(others.values(), 1)}
    bootstrap = Bootstrap(objective, setup.evaluators, scores, seed)
    value = {number: objective.value(trial.metrics) for number, trial in enumerate((found, *others.values()))}
    found_minus = [bootstrap.compare(0, n, value[0] - value[n]) for n in range(1, len(scores))]
    sign = objective.terms[0].sign
    rows = []
    corrected = holm([one.p for one in found_minus])
    for number, (label, trial) in enumerate(others.items(), 1):
        one = found_minus[number - 1]
        low, high = sorted((sign * one.low, sign * one.high))
        rows.append(
            {
                "model": label,
                "value": sign * value[number],
                "found_minus_this": sign * one.difference,
                "low": low,
                "high": high,
                "p_holm": corrected[number - 1],
                **{term.metric.partition(".")[0]: trial.metrics[term.metric] for term in objective.terms},
            }
        )
    rows.sort(key=lambda row: sign * row["value"])
    last = {term.metric.partition(".")[0]: found.metrics[term.metric] for term in objective.terms}
    return [*rows, {"model": "found merge", "value": sign * value[0], **last}]


def accuracy_of(objective: Objective) -> Objective:
    """The mean accuracy over the tasks of an objective."""
    terms = [Term(f"{term.metric.partition('.')[0]}.accuracy", 1.0, -1) for term in objective.terms]
    return replace(objective, terms=tuple(terms), constraints=(), needs_parents=False)


def individual(certified: Mapping[str, Trial], tasks: Sequence[str], metric: str) -> dict[str, float]:
    """Every fine-tune on its own task."""
    return {task: certified[f"parent:{task}"].metrics[f"{task}.{metric}"] for task in tasks}


def table(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str], alone: Mapping[str, float]) -> list[str]:
    head = ["model", "mean", "found merge minus this", "95 % interval", "p (Holm)", *tasks]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        shown = ["", "", ""]
        if row.get("p_holm") is not None:
            interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
            shown = [f"{row['found_minus_this']:+.4f}", interval, f"{row['p_holm']:.2g}"]
        cells = [row["model"], f"{row['value']:.4f}", *shown, *(f"{row[task]:.3f}" for task in tasks)]
        lines.append(f"| {' | '.join(cells)} |")
    mean = sum(alone.values()) / len(tasks)
    found = rows[-1]
    own = [f"{mean:.4f}", "", "", "", *(f"{alone[task]:.3f}" for task in tasks)]
    gap = [f"{found['value'] - mean:+.4f}", "", "", "", *(f"{found[task] - alone[task]:+.3f}" for task in tasks)]
    lines.append(f"| individual models, each on its own task | {' | '.join(own)} |")
    lines.append(f"| found merge minus these | {' | '.join(gap)} |")
    return lines


def sentence(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """Whether the found merge beats what was named, in this metric."""
    named = [row for row in rows if row["model"].split(" ")[0] in NAMED]
    better = min if what == "loss" else max
    best = better(named, key=lambda row: row["value"])
    ahead = best["found_minus_this"] < 0 if what == "loss" else best["found_minus_this"] > 0
    largest = max(row["p_holm"] for row in named)
    verb = "beats all of them" if ahead and largest < 0.01 else "does not beat all of them at p < 0.01"
    return (
        f"By {what}: the best of {', '.join(NAMED)} is `{best['model']}`; the found merge {verb} "
        f"({best['found_minus_this']:+.4f}, largest p {largest:.2g})."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=ROOT / "samples" / "vision")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the search; the family is one")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="as of `meiosis search`")
    arguments = parser.parse_args()
    config = arguments.samples.resolve() / "search.yaml"
    results = ROOT / "results" / "vision-win"
    setup = check(load_config(config))
    tasks = [term.metric.partition(".")[0] for term in setup.objective.terms]
    by_accuracy = [f"objectives.terms=[{', '.join(f'{task}.accuracy' for task in tasks)}]"]
    by_accuracy += ["search.baselines_only=true", "search.fitness.racing=false", *arguments.settings]
    tuned = run(config, results / "tuned-for-accuracy", by_accuracy)
    pictures = {pool: sum(len(e.items(pool)) for e in setup.evaluators.values()) for pool in ("search", "certify")}
    command = " ".join(["python benchmarks/vision_win.py --seeds", *map(str, arguments.seeds)])
    lines = [
        "# Eight image tasks: a searched merge against the standard ones",
        "",
        f"The family of `meiosis samples vision` with photographs (seed 0), merged by `samples/vision/search.yaml`: "
        f"{len(setup.space.genes)} weights of TSV-M, one per group of tensors and task, found on "
        f"{pictures['search']:,} search pictures by their loss. All figures are from {pictures['certify']:,} certify "
        "pictures that nothing else has seen: means over the eight tasks; intervals and p-values from the paired "
        "bootstrap over pictures (10,000 draws), p corrected for the number of rows (Holm). Of a baseline with "
        "several settings the one stands here that is best on the select pictures, by loss in the table of the loss "
        "and by accuracy in that of the accuracy. The seeds are those of the search. Nothing was measured on a GPU.",
        "",
        f"Command: `{command}`",
    ]
    kept: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        one = run(config, results / f"seed-{seed}", [f"seed={seed}", *arguments.settings])
        lines += ["", f"## Seed {seed}", "", f"{one.item_evaluations:,} item-evaluations in the search.", ""]
        lines += [f"Certificate of the run: {one.verdict['sentence']}"]
        if "found merge" not in one.certified:
            continue
        for what, metric, objective, source in (
            ("accuracy", "accuracy", accuracy_of(setup.objective), tuned),
            ("loss", "nll", setup.objective, one),
        ):
            others = {label: trial for label, trial in source.certified.items() if label != "found merge"}
            rows = compared(setup, objective, one.found, others, seed)
            alone = individual(one.certified, tasks, metric)
            lines += ["", f"### {what.capitalize()}", "", sentence(rows, what), "", *table(rows, tasks, alone)]
            kept += [{"seed": seed, "metric": what, **row} for row in rows]
            mean = sum(alone.values()) / len(tasks)
            kept.append({"seed": seed, "metric": what, "model": "individual models", "value": mean, **alone})
    REFERENCE.mkdir(parents=True, exist_ok=True)
    if kept:
        columns = list(dict.fromkeys(key for row in kept for key in row))
        whole = [{column: row.get(column) for column in columns} for row in kept]
        pq.write_table(pa.Table.from_pylist(whole), REFERENCE / "vision_win.parquet")
    text = "\n".join([*lines, ""])
    (REFERENCE / "vision_win.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
