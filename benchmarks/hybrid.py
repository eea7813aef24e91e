"""Whether merge and path together beat the merge alone, at the same number of item-evaluations.

    python benchmarks/hybrid.py [--samples samples/text] [--seeds 0 1 2] [--candidates 80] [--jobs 1]

Three searches for every seed over the text family of `meiosis samples text`, with the same generation 0, optimiser and
number of candidates, each of them scored on all search items:

* parameters: a weight for every source and group of tensors.
* together: the same genes, and those of a path through the layers of the merge: which run, and a factor on the hidden
  state between any two. It starts at the plain path.
* after: a part of the budget for the merge, the rest for the path of the best merge.

The best three on the search items are scored on the select items, the best of these on the certify items, and what
these differ by is tested with the paired bootstrap of a verdict. Beside it, what changes of the path cost by
themselves. Takes about half an hour on one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))

from results_page import remade_with, write_page

from evaluators.base import ItemPool
from search.bootstrap import Bootstrap, holm
from search.config import load_config
from search.errors import UserError
from search.evaluation import Evaluation
from search.genome import Genome
from search.pool import Job, Outcome
from search.recipe import Recipe
from search.run import make_population
from search.setup import Setup, check
from search.worker_plan import worker_plan

SHARE = 0.6
"""Of the budget of `after`, for the merge."""
FINALISTS = 3
GROUPED = ("space.layers_per_group=4", "space.split=[]")
ONE_WEIGHT = 0.35
"""Of every source, in the merge that the costs of changes are measured on."""
PATH = "space.path={{pool: [merged], repeats: 1, scales: {{by: slot, low: 0.8, high: 1.25}}, margin: 0.45{stage}}}"
ARMS: dict[str, tuple[str, ...]] = {
    "parameters": (),
    "together": (PATH.format(stage=""),),
    "after": (PATH.format(stage=f", stage: after, share: {SHARE}"),),
}
Row = dict[str, Any]


class Bench:
    """Evaluates recipes, each of them once for a pool of items."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._worker = Evaluation(replace(worker_plan(setup), reuse_bytes=2**30))
        self._known: dict[tuple[str, str], Outcome] = {}

    def outcome(self, recipe: Recipe, recipe_hash: str, items: ItemPool = "search") -> Outcome:
        """What a recipe scores."""
        if (recipe_hash, items) not in self._known:
            found = self._worker.run(Job(len(self._known), recipe, items))
            if found.failure is not None:
                raise SystemExit(f"{found.failure.message}")
            self._known[recipe_hash, items] = found
        return self._known[recipe_hash, items]

    def loss(self, outcome: Outcome) -> float:
        """The objective."""
        return self.setup.objective.judge(outcome.metrics).loss


def setup_of(samples: Path, seed: int, candidates: int, overrides: Sequence[str]) -> Setup:
    """The config of the samples, searched as all arms are."""
    common = (
        f"seed={seed}",
        f"search.budget={candidates}",
        "search.optimizer=full_cma",
        "search.baselines=[uniform_soup]",
        *GROUPED,
    )
    return check(load_config(samples / "search.yaml", (*common, *overrides)))


def chosen(bench: Bench, found: Mapping[str, tuple[float, Recipe]]) -> str:
    """The hash of the recipe that is best on the select items, among the best on the search items."""
    best = sorted(found, key=lambda name: found[name][0])[:FINALISTS]
    return min(best, key=lambda name: bench.loss(bench.outcome(found[name][1], name, "select")))


def one_seed(samples: Path, seed: int, candidates: int) -> list[Row]:
    """A row for each arm, and one for the merge that `after` chose a path for."""
    import torch

    torch.set_num_threads(1)
    rows: list[Row] = []
    outcomes: list[Outcome] = []
    bench: Bench | None = None
    for arm, overrides in ARMS.items():
        setup = setup_of(samples, seed, candidates, overrides)
        # What the worker does depends on no gene, so arms that ask for the same merge have it evaluated once.
        bench = bench or Bench(setup)
        population = make_population(setup, 1)
        found: dict[str, tuple[float, Recipe]] = {}
        asked = 0
        while asked < candidates and (candidate := population.ask()) is not None:
            asked += 1
            outcome = bench.outcome(candidate.recipe, candidate.recipe_hash)
            found[candidate.recipe_hash] = bench.loss(outcome), candidate.recipe
            population.tell(candidate.id, outcome.metrics, outcome.scores)
        parts = {arm: found}
        if arm == "after":
            parts["after, before its path"] = {name: one for name, one in found.items() if one[1].layers is None}
        for label, one in parts.items():
            name = chosen(bench, one)
            loss, recipe = one[name]
            certified = bench.outcome(recipe, name, "certify")
            outcomes.append(certified)
            rows.append(
                {
                    "seed": seed,
                    "arm": label,
                    "genes": len(setup.space.genes),
                    "candidates": asked,
                    "search": loss,
                    "certify": bench.loss(certified),
                    "scales": [] if recipe.scales is None else [round(scale, 4) for scale in recipe.scales],
                    "layers": " ".join(str(next(iter(layer.values()))) for layer in recipe.layers or ()) or "0 1 2 3",
                }
            )
        print(f"seed {seed}, {arm}: {rows[-1]['search']:.4f}", file=sys.stderr, flush=True)
    assert bench is not None
    setup = bench.setup
    scores = {number: outcome.scores for number, outcome in enumerate(outcomes)}
    bootstrap = Bootstrap(setup.objective, setup.evaluators, scores, seed)
    number_of = {row["arm"]: number for number, row in enumerate(rows)}
    pairs = {"together": "parameters", "after": "parameters", "after, before its path": "after"}
    for row in rows:
        row["against"] = pairs.get(row["arm"], "")
        if not row["against"]:
            continue
        mine, theirs = number_of[row["arm"]], number_of[row["against"]]
        seen = bootstrap.compare(mine, theirs, rows[mine]["certify"] - rows[theirs]["certify"])
        row |= {"difference": seen.difference, "low": seen.low, "high": seen.high, "p": seen.p}
    return rows


def costs(samples: Path) -> list[Row]:
    """What changes of the path of one merge add to its loss on the search items."""
    path = "space.path={pool: [merged], repeats: 2, scales: {by: slot, low: 0.1, high: 10}, margin: 0.4}"
    setup = setup_of(samples, 0, 10, (path,))
    bench, space = Bench(setup), setup.space
    plain: Row = {"change": "none", "layers": "0 1 2 3", "scales": "1 1 1 1"}
    rows: list[Row] = []
    for change, layers, scales in changes():
        point = []
        place = {gene.name.removeprefix("path/merged."): gene for gene in space.genes}
        wanted = used_slots(layers)
        for gene in space.genes:
            name, _, what = gene.name.removeprefix("path/merged.").rpartition(".")
            if what == "use":
                point.append(0.9 if name in wanted else 0.1)
            elif what == "scale":
                point.append(place[f"{name}.scale"].coordinate(scales[wanted.index(name)] if name in wanted else 1.0))
            else:
                point.append(gene.coordinate(ONE_WEIGHT))
        recipe = space.decode(Genome(tuple(point)))
        loss = bench.loss(bench.outcome(recipe, change))
        row = {"change": change, "layers": " ".join(map(str, layers)), "scales": " ".join(f"{s:g}" for s in scales)}
        rows.append({**plain, **row, "loss": loss, "added": loss - (rows[0]["loss"] if rows else loss)})
    return rows


def used_slots(layers: Sequence[int]) -> list[str]:
    """The slots of a path, as `<layer>.<repeat>`: a layer that is not behind the one before it is of the repeat."""
    repeat, found, last = 0, [], -1
    for layer in layers:
        repeat += layer <= last
        found.append(f"{layer}.{repeat}")
        last = layer
    found[-1] = f"{layers[-1]}.1"  # pinned
    return found


def changes() -> Iterator[tuple[str, tuple[int, ...], tuple[float, ...]]]:
    """Name, layers, and the factor on entry of each."""
    ones = (1.0, 1.0, 1.0, 1.0)
    yield "none", (0, 1, 2, 3), ones
    yield "layer 1 left out", (0, 2, 3), ones[1:]
    yield "layer 2 left out", (0, 1, 3), ones[1:]
    yield "layers 1 and 2 swapped", (0, 2, 1, 3), ones
    yield "layer 1 again after 2", (0, 1, 2, 1, 3), (*ones, 1.0)
    yield "layer 2 twice", (0, 1, 2, 2, 3), (*ones, 1.0)
    yield "layers 1 and 2 twice", (0, 1, 2, 1, 2, 3), (*ones, 1.0, 1.0)
    for part in (2.0, 4.0, 8.0):
        yield (
            f"layer 2 twice, what the second adds divided by {part:g}",
            (0, 1, 2, 2, 3),
            (1.0, 1.0, 1.0, part, 1 / part),
        )
    for at in (1, 2, 3):
        for scale in (0.8, 0.9, 1.12, 1.25):
            scales = tuple(scale if place == at else 1.0 for place in range(4))
            yield f"{scale:g} on entry of layer {at}", (0, 1, 2, 3), scales
    yield "0.95 on entry of all", (0, 1, 2, 3), (1.0, 0.95, 0.95, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("samples/text"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--candidates", type=int, default=80)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each of them one thread")
    parser.add_argument("--out", type=Path, default=Path("results/reference"))
    given = parser.parse_args()
    if not (given.samples / "search.yaml").exists():
        raise SystemExit(f"{given.samples} has no models; make them with: meiosis samples text {given.samples}")
    try:
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            searches = [pool.submit(one_seed, given.samples, seed, given.candidates) for seed in given.seeds]
            priced = pool.submit(costs, given.samples)
            rows = [row for search in searches for row in search.result()]
            table = priced.result()
    except UserError as error:
        raise SystemExit(str(error)) from error
    tested = [row for row in rows if row["against"]]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = p
    write(rows, table, given.out)


def account(rows: Sequence[Row], table: Sequence[Row]) -> str:
    """What the numbers say, in sentences."""
    certified = {(row["seed"], row["arm"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    alone = [certified[seed, "parameters"]["certify"] for seed in seeds]
    said = []
    for arm in ("together", "after"):
        ahead = [certified[seed, arm]["certify"] - value for seed, value in zip(seeds, alone, strict=True)]
        wins = sum(difference < 0 for difference in ahead)
        said.append(
            f"`{arm}` is better than the parameters alone for {wins} of {len(seeds)} seeds; on average its loss is "
            f"{sum(ahead) / len(ahead):+.4f} nats from theirs."
        )
    gains = [row["difference"] for row in rows if row["arm"] == "after, before its path"]
    said.append(
        f"What the path adds to one and the same merge is {min(gains):.4f} to {max(gains):.4f} nats, while the seed "
        f"alone moves the merge by {max(alone) - min(alone):.4f}. The p-values are about two given merges on other "
        "documents; they know nothing of another seed, so a single row proves no method better."
    )
    kept = [row["added"] for row in table if row["layers"] != "0 1 2 3"]
    scaled = [row["added"] for row in table if row["layers"] == "0 1 2 3" and row["change"] != "none"]
    said.append(
        f"Every change of the order or number of layers that was tried costs at least {min(kept):.4f} nats; the best "
        f"factor changes the loss by {min(scaled):+.4f}."
    )
    return " ".join(said)


def write(rows: Sequence[Row], table: Sequence[Row], out: Path) -> None:
    """Print both tables and put them beside the others of the project."""
    lines = [
        "| seed | search | genes | candidates | scales | search items | certify items | against | difference | 95 % "
        "interval | p (Holm) |",
        "|--:|---|--:|--:|---|--:|--:|---|--:|---|--:|",
    ]
    for row in rows:
        tested = "| | | |"
        if row["against"]:
            tested = (
                f"{row['against']} | {row['difference']:+.4f} | {row['low']:+.4f} to {row['high']:+.4f} | "
                f"{row['p_holm']:.2g} |"
            )
        else:
            tested = f"{tested[1:]} |"
        scales = " ".join(f"{scale:.3f}" for scale in row["scales"]) or "none"
        lines.append(
            f"| {row['seed']} | {row['arm']} | {row['genes']} | {row['candidates']} | {scales} | {row['search']:.4f} | "
            f"{row['certify']:.4f} | {tested}"
        )
    prices = ["| change | layers | scales | loss | added |", "|---|---|---|--:|--:|"]
    prices += [
        f"| {row['change']} | {row['layers']} | {row['scales']} | {row['loss']:.4f} | {row['added']:+.4f} |"
        for row in table
    ]
    text = "\n".join(
        [
            "# Merge and path against the merge alone",
            "",
            "The text family (4 layers), the mean over three domains of the loss per token in nats; smaller is "
            "better. Every search has the same generation 0 (which counts), `full_cma`, and the same number of "
            "candidates, each on all search items; a weight per source for the layers and for the rest. `together` "
            "has a path through the layers of the merge in the same genome, `after` gives "
            f"{SHARE:.0%} of its budget to the merge and the rest to its path; 'before its path' is the merge it had "
            f"by then. The best {FINALISTS} on the search items are scored on the select items and the best of these "
            "on the certify items. Differences are those of the certified losses, row minus the one it is compared "
            "with, with the paired bootstrap over documents; p corrected for all rows.",
            "",
            *lines,
            "",
            account(rows, table),
            "",
            f"What a change of the path costs by itself: on the search items, in the merge with weight {ONE_WEIGHT} "
            "of every source. The factors are on the hidden state on entry of each layer of the path.",
            "",
            *prices,
            "",
            remade_with("hybrid.py"),
            "",
        ]
    )
    print(text)
    every = [{"table": "searches", **row, "scales": " ".join(map(str, row["scales"]))} for row in rows]
    every += [{"table": "changes", **row} for row in table]
    write_page(out, "hybrid", text, every)


if __name__ == "__main__":
    main()
