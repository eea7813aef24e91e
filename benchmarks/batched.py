"""How much faster candidates are evaluated several at a time, in one forward pass, than one by one.

    python benchmarks/batched.py [--samples samples/text] [--cases shipped short few]

The same random candidates of the text family of `meiosis samples text` are evaluated by workers that take 1, 2, 4 and
8 at once, in turn and on one CPU thread. In the cases after the first the texts are cut, to where a pass costs more
than what it computes. No worker keeps hidden states, or the two ways would differ in more than the pass. Takes about
three minutes. A case that is left out is not on the page.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from results_page import machine, versions, write_page

from search.batch_evaluation import BatchEvaluation
from search.config import load_config
from search.errors import UserError
from search.evaluation import Evaluation
from search.genome import Genome
from search.pool import Job, Outcome
from search.setup import Setup, check
from search.worker_plan import worker_plan

COUNTS = (1, 2, 4, 8)
"""Candidates in one forward pass; 1 is the worker of a search without `candidates_per_forward`."""
CANDIDATES = 8
OVERRIDES = ("cluster.pool=local", "cluster.threads=1", "cluster.device=cpu", "cluster.reuse_gib=0")
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What of the texts is scored.

    Attributes:
        limit: texts per evaluator; None for all.
        characters: where the texts are cut; None for nowhere.
        rounds: how often every worker evaluates all candidates.
    """

    limit: int | None
    characters: int | None
    rounds: int

    def overrides(self, setup: Setup, folder: Path) -> tuple[str, ...]:
        """What makes the config of the samples this case; cut texts are written to the folder."""
        found = []
        for name, section in setup.config.evaluators.items():
            if self.limit is not None:
                found.append(f"evaluators.{name}.limit={self.limit}")
            if self.characters is not None:
                shipped = Path(section.options["data"]["search"])
                texts = [json.loads(line) for line in shipped.read_text().splitlines()]
                cut = [{**text, "text": text["text"].strip()[: self.characters]} for text in texts]
                data = folder / f"{name}.jsonl"
                data.write_text("".join(f"{json.dumps(text)}\n" for text in cut))
                found.append(f"evaluators.{name}.data.search={json.dumps(str(data))}")
        return tuple(found)


CASES = {"shipped": Case(None, None, 3), "short": Case(None, 24, 6), "few": Case(4, 24, 15)}


def measure(name: str, config: Path, seed: int) -> list[Row]:
    """A row for every number of candidates in a pass and every round."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        setup = check(load_config(config, OVERRIDES))
        setup = check(load_config(config, (*OVERRIDES, *case.overrides(setup, Path(folder)))))
        plan = worker_plan(setup)
        workers: dict[int, Evaluation] = {
            count: (Evaluation if count == 1 else BatchEvaluation)(replace(plan, candidates_per_forward=count))
            for count in COUNTS
        }
    draw = random.Random(seed)
    points = [Genome(tuple(draw.random() for _ in setup.space.genes)) for _ in range(CANDIDATES)]
    jobs = [Job(number, setup.space.decode(point), "search") for number, point in enumerate(points)]
    for worker in workers.values():
        evaluate(worker, jobs[:1])  # the first pass of a worker takes longer than any other
    rows = []
    for number in range(case.rounds):
        found: dict[int, list[Outcome]] = {}
        for count in COUNTS if number % 2 else reversed(COUNTS):
            found[count] = evaluate(workers[count], jobs)
        texts, tokens = sizes(found[1][0])
        for count, outcomes in found.items():
            row: Row = {"case": name, "texts": texts, "tokens": tokens}
            row |= {"candidates_per_forward": count, "round": number}
            row["evaluate_seconds"] = statistics.fmean(outcome.evaluate_seconds for outcome in outcomes)
            row["merge_seconds"] = statistics.fmean(outcome.merge_seconds for outcome in outcomes)
            row["relative_difference"] = relative_difference(outcomes, found[1])
            row["load"] = os.getloadavg()[0]
            rows.append(row)
    return sorted(rows, key=lambda row: (row["candidates_per_forward"], row["round"]))


def evaluate(worker: Evaluation, jobs: Sequence[Job]) -> list[Outcome]:
    """The outcomes of all, none of which failed."""
    outcomes = worker.run_many(jobs) if isinstance(worker, BatchEvaluation) else [worker.run(job) for job in jobs]
    for outcome in outcomes:
        if outcome.failure is not None:
            raise SystemExit(f"candidate {outcome.candidate}: {outcome.failure.message}")
    return outcomes


def sizes(outcome: Outcome) -> tuple[int, int]:
    """How many texts and how many of their tokens a candidate is scored on."""
    scores = outcome.scores.values()
    return sum(len(each.items) for each in scores), int(sum(each.weights.sum() for each in scores))


def relative_difference(outcomes: Sequence[Outcome], alone: Sequence[Outcome]) -> float:
    """The largest over candidates, evaluators and items, as a part of the score from single passes."""
    largest = 0.0
    for mine, other in zip(outcomes, alone, strict=True):
        for name, scores in other.scores.items():
            if mine.scores[name].items != scores.items:
                raise SystemExit(f"candidate {mine.candidate}: '{name}' has its items in another order")
            for metric, values in scores.values.items():
                largest = max(largest, float((abs(mine.scores[name].values[metric] - values) / abs(values)).max()))
    return largest


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row for every case and number of candidates in a pass; ratios are those of medians."""
    found = []
    for name, count in product(dict.fromkeys(row["case"] for row in rows), COUNTS):
        alone, mine = (
            [row for row in rows if (row["case"], row["candidates_per_forward"]) == (name, which)]
            for which in (1, count)
        )
        evaluated, whole, ratios = [], [], []
        for measured in (alone, mine):
            evaluated.append(statistics.median(row["evaluate_seconds"] for row in measured))
            whole.append(statistics.median(row["evaluate_seconds"] + row["merge_seconds"] for row in measured))
        for one, several in zip(alone, mine, strict=True):
            ratios.append(one["evaluate_seconds"] / several["evaluate_seconds"])
        found.append(
            {
                "case": name,
                "count": count,
                "evaluate_ms": 1e3 * evaluated[1],
                "times_faster": evaluated[0] / evaluated[1],
                "least": min(ratios),
                "most": max(ratios),
                "whole_ms": 1e3 * whole[1],
                "whole_times_faster": whole[0] / whole[1],
                "relative_difference": max(row["relative_difference"] for row in mine),
            }
        )
    return found


def page(rows: Sequence[Row], command: str) -> str:
    lines = [
        "| case | candidates per pass | ms | times faster | least to most | ms with merging | times faster with "
        "merging | largest relative difference of a score |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in summary(rows):
        start = f"| {row['case']} | {row['count']} | {row['evaluate_ms']:.1f} |"
        if row["count"] == 1:
            lines.append(f"{start} | | {row['whole_ms']:.1f} | | |")
            continue
        lines.append(
            f"{start} {row['times_faster']:.2f} | {row['least']:.2f} to {row['most']:.2f} | {row['whole_ms']:.1f} | "
            f"{row['whole_times_faster']:.2f} | {row['relative_difference']:.1g} |"
        )
    loads = [row["load"] for row in rows]
    return "\n".join(
        [
            "# Several candidates in one forward pass",
            "",
            f"{CANDIDATES} random candidates of the text family (4 layers, width 128), scored by three perplexities on "
            "the search items, one by one and several in a pass (`cluster.candidates_per_forward`). Workers took turns "
            "in one process, on one CPU thread, in an order that alternates. No hidden states were kept "
            "(`cluster.reuse_gib: 0`): candidates one by one can share them, those in one pass do not, and only the "
            "pass is compared here. Nothing was measured on a GPU.",
            "",
            f"Command: `{command}`",
            "",
            *lines,
            "",
            "Milliseconds are per candidate, medians over rounds. The first are the evaluators'; with merging, what it "
            "takes to copy a merged candidate beside the others is counted too. Times faster are ratios of medians to "
            "one by one, below 1 is slower; least to most are those of single rounds. "
            + slower(rows)
            + " A pass has room for as many candidates as the config says and computes all of them, also where fewer "
            "wait (`search.window`); here it was always full.",
            "",
            "A pass reads up to 2,048 tokens of one evaluator, padding included.",
            "",
            *(described(name, rows) for name in dict.fromkeys(row["case"] for row in rows)),
            "",
            "The vision family is not here: `image_classification` is no likelihood evaluator and has nothing to share "
            "a pass with; a config that asks for it is refused.",
            "",
            f"{machine()}; {versions('torch', 'transformers')}. The load of the machine (1 minute) was "
            f"{min(loads):.1f} to {max(loads):.1f}, this included.",
            "",
        ]
    )


def slower(rows: Sequence[Row]) -> str:
    """Where taking several at once does not pay."""
    cases: dict[str, list[str]] = {}
    for row in summary(rows):
        if row["times_faster"] < 1:
            cases.setdefault(row["case"], []).append(str(row["count"]))
    if not cases:
        return "No case is slower than one by one."
    named = [f"{case} with {', '.join(counts)}" for case, counts in cases.items()]
    return f"Slower than one by one: {'; '.join(named)}."


def described(name: str, rows: Sequence[Row]) -> str:
    row, case = next(row for row in rows if row["case"] == name), CASES[name]
    cut = "as they are" if case.characters is None else f"cut to {case.characters} characters"
    return f"* {name}: {row['texts']} texts {cut}, {row['tokens']:,} scored tokens; {case.rounds} rounds."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("samples/text"))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/reference"))
    arguments = parser.parse_args()
    config = arguments.samples / "search.yaml"
    if not config.exists():
        raise SystemExit(f"{config} is not there; make it with: meiosis samples text {arguments.samples}")
    rows: list[Row] = []
    for name in arguments.cases:
        began = time.perf_counter()
        try:
            rows += measure(name, config, arguments.seed)
        except UserError as error:
            raise SystemExit(str(error)) from error
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    text = page(rows, shlex.join(["python", "benchmarks/batched.py", *sys.argv[1:]]))
    print(text)
    write_page(arguments.out, "batched", text, rows)


if __name__ == "__main__":
    main()
