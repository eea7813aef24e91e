"""How many layers need not run where candidates share their first ones, and how long that takes.

    python benchmarks/prefix_reuse.py [--samples samples/text] [--sequences split natural_niches]

Two sequences of candidates over the text family of `meiosis samples text`:

* split: an archive of 15 at random points of the space. A child has the genes of one member before a split, drawn
  uniformly, and those of another behind it; it takes the place of the worst if it is better.
* natural_niches: the optimiser of that name with `crossover: pure`, from generation 0 on.

Every candidate is evaluated twice, on a worker that keeps hidden states and on one that keeps none, in turn. Takes
about twenty minutes on one core and wants it for itself. A sequence that is left out keeps its rows.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from results_page import remade_with, write_page

from search.config import load_config
from search.errors import UserError
from search.evaluation import Evaluation
from search.genome import Genome
from search.pool import Job, Outcome
from search.recipe import Recipe
from search.run import make_population
from search.setup import Setup, check
from search.worker_plan import worker_plan

ARCHIVE = 15
SEQUENCES = {"split": 150, "natural_niches": 240}
"""Name -> candidates."""
Row = dict[str, Any]


@dataclass
class Pair:
    """A worker that keeps hidden states and one that keeps none, on the same candidates.

    Attributes:
        layers, seconds: per worker (with, without), a number per candidate; seconds of evaluators alone.
        difference: largest difference of a per-item score.
    """

    setup: Setup
    gib: float
    layers: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    difference: float = 0.0

    def __post_init__(self) -> None:
        plan = worker_plan(self.setup)
        self._workers = [Evaluation(replace(plan, reuse_bytes=int(gib * 2**30))) for gib in (self.gib, 0)]

    def run(self, recipe: Recipe) -> Outcome:
        """The outcome of the worker that keeps states."""
        number = len(self.layers[0])
        found: list[Outcome | None] = [None, None]
        for which in (0, 1) if number % 2 else (1, 0):
            outcome = self._workers[which].run(Job(number, recipe, "search"))
            if outcome.failure is not None:
                raise SystemExit(f"candidate {number}: {outcome.failure.message}")
            self.layers[which].append(outcome.layers_run)
            self.seconds[which].append(outcome.evaluate_seconds)
            found[which] = outcome
        mine, cold = found
        assert mine is not None
        assert cold is not None
        for name, scores in cold.scores.items():
            for metric, values in scores.values.items():
                self.difference = max(self.difference, float(abs(values - mine.scores[name].values[metric]).max()))
        return mine

    def row(self, sequence: str, first: int) -> Row:
        """What the candidates from the `first` on took."""
        run, whole = (sum(layers[first:]) for layers in self.layers)
        taken, cold = (sum(seconds[first:]) for seconds in self.seconds)
        return {
            "sequence": sequence,
            "candidates": len(self.layers[0]) - first,
            "layers_run": run,
            "layers_without": whole,
            "times_fewer": whole / run,
            "seconds": taken,
            "seconds_without": cold,
            "times_faster": cold / taken,
            "max_difference": self.difference,
        }


def loss_of(setup: Setup, outcome: Outcome) -> float:
    """The mean of the metrics of the objective, as the config of the samples has it."""
    return setup.objective.judge(outcome.metrics).loss


def split_children(setup: Setup, pair: Pair, candidates: int, seed: int) -> int:
    """Evaluate an archive and children of two members each; returns how many were no children."""
    draw, genes = random.Random(seed), len(setup.space.genes)
    archive: list[tuple[float, tuple[float, ...]]] = []
    seen: set[tuple[float, ...]] = set()
    while len(seen) < candidates:
        if len(seen) < ARCHIVE:
            child = tuple(draw.random() for _ in range(genes))
        else:
            (_, first), (_, second) = draw.sample(archive, 2)
            at = draw.randrange(1, genes)
            child = first[:at] + second[at:]
        if child in seen:  # costs nothing in a search either
            continue
        seen.add(child)
        archive.append((loss_of(setup, pair.run(setup.space.decode(Genome(child)))), child))
        if len(archive) > ARCHIVE:
            archive.remove(max(archive))
    return ARCHIVE


def niches(setup: Setup, pair: Pair, candidates: int) -> int:
    """Evaluate what `natural_niches` asks for; returns how many were no children."""
    population = make_population(setup, 1)
    known: dict[str, Outcome] = {}
    first = 0
    while population.asked < candidates and (candidate := population.ask()) is not None:
        if candidate.recipe_hash not in known:
            known[candidate.recipe_hash] = pair.run(candidate.recipe)
        if candidate.genome is None:
            first = len(known) + ARCHIVE
        outcome = known[candidate.recipe_hash]
        population.tell(candidate.id, outcome.metrics, outcome.scores)
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("samples/text"))
    parser.add_argument("--sequences", nargs="+", choices=tuple(SEQUENCES), default=tuple(SEQUENCES))
    parser.add_argument("--gib", type=float, default=4.0, help="memory for hidden states")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/reference"))
    arguments = parser.parse_args()
    config = arguments.samples / "search.yaml"
    if not config.exists():
        raise SystemExit(f"{config} is not there; make it with: meiosis samples text {arguments.samples}")
    rows = []
    try:
        for name in arguments.sequences:
            overrides: tuple[str, ...] = ()
            if name == "natural_niches":
                optimizer = "search.optimizer={name: natural_niches, crossover: pure}"
                overrides = (optimizer, "search.baselines=[uniform_soup]", f"seed={arguments.seed}")
            setup = check(load_config(config, overrides))
            pair = Pair(setup, arguments.gib)
            began = time.perf_counter()
            if name == "split":
                first, whole = split_children(setup, pair, SEQUENCES[name], arguments.seed), "with the archive"
            else:
                first, whole = niches(setup, pair, SEQUENCES[name]), "with generation 0"
            rows += [pair.row(f"{name}, {whole}", 0), pair.row(f"{name}, children alone", first)]
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    except UserError as error:
        raise SystemExit(str(error)) from error
    earlier = [name for name in SEQUENCES if name not in arguments.sequences]
    write(with_earlier(rows, arguments.out), arguments.out, arguments.gib, earlier)


def with_earlier(rows: Sequence[Row], out: Path) -> list[Row]:
    """The rows, and those of sequences that were measured before and not now."""
    import pyarrow.parquet

    earlier = out / "prefix_reuse.parquet"
    measured = {row["sequence"].partition(",")[0] for row in rows}
    kept = pyarrow.parquet.read_table(earlier).to_pylist() if earlier.exists() else []
    every = [*(row for row in kept if row["sequence"].partition(",")[0] not in measured), *rows]
    return sorted(every, key=lambda row: list(SEQUENCES).index(row["sequence"].partition(",")[0]))


def write(rows: Sequence[Mapping[str, Any]], out: Path, gib: float, earlier: Sequence[str]) -> None:
    """Print the table and put it beside the others of the project; `earlier`: sequences of an earlier run."""
    lines = [
        "| sequence | candidates | layers run | without reuse | times fewer | s | s without | times faster | largest "
        "difference of a score |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['sequence']} | {row['candidates']} | {row['layers_run']} | {row['layers_without']} | "
            f"{row['times_fewer']:.2f} | {row['seconds']:.1f} | {row['seconds_without']:.1f} | "
            f"{row['times_faster']:.2f} | {row['max_difference']:g} |"
        )
    text = "\n".join(
        [
            "# Layers that need not run",
            "",
            "Candidates over the text family (4 layers, embedding tied to the head), scored by three perplexities on "
            f"the search items, on one thread; up to {gib:g} GiB of hidden states. Layers are counted once for every "
            "forward pass, and those that ran to check a pass are among them. Seconds are the evaluators'; each "
            "candidate is evaluated with and without reuse in turn.",
            "",
            *lines,
            "",
            f"split: an archive of {ARCHIVE} at random points; a child has the genes of one member before a split that "
            "is drawn uniformly and those of another behind it, and takes the place of the worst if it is better. "
            "natural_niches: with `crossover: pure`, whose children are a mix of both parents with mutations behind "
            "the split, which lies before everything or where at least one layer is spared. Genes stand in the order "
            "of the layers: embedding, attention, MLP and norms of each layer, the "
            "last norm. Repeated candidates are left out."
            + "".join(f" The rows of {name} are of an earlier run: compare no seconds." for name in earlier),
            "",
            remade_with("prefix_reuse.py"),
            "",
        ]
    )
    print(text)
    write_page(out, "prefix_reuse", text, rows)


if __name__ == "__main__":
    main()
