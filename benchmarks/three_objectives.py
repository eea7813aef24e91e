"""The tables and the picture of results/reference/front.*: examples/front.yaml, two capabilities and path length.

    python benchmarks/three_objectives.py [--seeds 0 1 2]

For every seed the example is searched as it is, with racing, and with random points, each at as many candidates. Of the
first seed every member of the front is then scored on the certify items, which no search has seen, and one is exported
and loaded by stock transformers. Nine searches of 400 candidates, an hour on two cores. What is stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.budget import Used
from search.candidate import SEARCHED
from search.config import load_config
from search.evaluate import evaluate_model
from search.evaluation import Evaluation
from search.genome import Genome
from search.pareto.dominance import front
from search.pareto.front import PARENT, Front, FrontPoint, feasible_points, front_of
from search.pareto.knee import knee
from search.pareto.recorded import tracked_front
from search.pareto.svg import front_svg
from search.pool import Job
from search.recipe import Recipe, Rule
from search.setup import Setup, check
from search.store.events import Ask, Trial
from search.store.run_folder import RunFolder
from search.store.sessions import Sessions
from search.worker_plan import worker_plan

ROOT = Path(__file__).resolve().parent.parent
MEIOSIS = str(Path(sys.executable).with_name("meiosis"))
CONFIG = ROOT / "examples" / "front.yaml"
RESULTS = ROOT / "results" / "three-objectives"
TERMS = ("python.nll", "english.nll", "cost.layers")
ARMS = {
    "nsga2": (),
    "raced": ("search.fitness.racing=true",),
    "random": ("search.optimizer.name=random_search", "search.finalists=1"),
}
NAMES = {"nsga2": "NSGA-II", "raced": "NSGA-II, racing", "random": "random"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished search as its history has it."""

    folder: RunFolder
    origins: Mapping[int, str]
    trials: Sequence[Trial]

    @classmethod
    def of(cls, arm: str, seed: int) -> Run:
        """Carry out a search, or what is missing of it."""
        path = RESULTS / f"{arm}-{seed}"
        settings = [f"--set={value}" for value in (f"seed={seed}", f"results={RESULTS}", *ARMS[arm])]
        command = [MEIOSIS, "search", str(CONFIG), "--run", path.name, "--json", *settings]
        if path.exists():
            command = [MEIOSIS, "resume", str(path), "--json"]
        if (status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode) != 0:
            sys.exit(f"{' '.join(command)}: exit status {status}")
        folder = RunFolder(path)
        events = folder.events()
        asks = [event for event in events if isinstance(event, Ask)]
        trials = [event for event in events if isinstance(event, Trial)]
        return cls(folder, {ask.candidate: ask.origin for ask in asks}, trials)

    def on(self, items: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.items == items]

    def front(self, first: int | None = None) -> Front:
        """On the search items, of the first so many candidates."""
        tracked = tracked_front(self.folder.manifest(), self.on("search")[:first], self.origins)
        assert tracked is not None
        return tracked.front()

    def recipe(self, candidate: int, setup: Setup) -> Recipe:
        """What a candidate was."""
        (ask,) = [event for event in self.folder.events() if isinstance(event, Ask) and event.candidate == candidate]
        if ask.genome is not None:
            return setup.space.decode(Genome(ask.genome))
        written = json.loads(ask.recipe or "[]")
        return setup.space.recipe(tuple(Rule.model_validate(rule) for rule in written))

    @property
    def item_evaluations(self) -> int:
        """Search items that were scored."""
        whole = sum(len(scores.items) for scores in self.on("search")[0].scores.values())
        return Used.of(self.folder.events(), Sessions(self.folder.sessions), whole).item_evaluations

    @property
    def baselines(self) -> int:
        """Candidates of generation 0."""
        return sum(origin != SEARCHED for origin in self.origins.values())


def volumes(arm: str, seed: int, run: Run) -> Row:
    """How the hypervolume grew, and what the front is made of."""
    total = len(run.on("search"))
    steps = (run.baselines, *(count for count in (100, 200, 300) if count < total), total)
    sizes = Counter(int(point.metrics[TERMS[2]]) for point in run.front().points)
    return {
        "arm": arm,
        "seed": seed,
        "candidates": total,
        "item_evaluations": run.item_evaluations,
        **{f"volume_{count}": run.front(count).hypervolume() for count in steps[1:-1]},
        "volume_generation_0": run.front(steps[0]).hypervolume(),
        "volume": run.front().hypervolume(),
        "points": len(run.front().points),
        "sizes": ", ".join(f"{size}: {count}" for size, count in sorted(sizes.items())),
    }


def certified(run: Run, setup: Setup) -> list[Row]:
    """The members of the front with what they are on items that the search has not seen."""
    worker = Evaluation(worker_plan(setup))
    known = {(trial.candidate, trial.items): trial.metrics for trial in run.trials}
    rows = []
    for point in run.front().points:
        metrics = known.get((point.candidate, "certify"))
        if metrics is None:
            outcome = worker.run(Job(point.candidate, run.recipe(point.candidate, setup), "certify"))
            if outcome.failure is not None:
                sys.exit(f"candidate {point.candidate}: {outcome.failure.message}")
            metrics = outcome.metrics
        rows.append(
            {
                "candidate": point.candidate,
                "origin": point.origin,
                "layers": int(point.metrics[TERMS[2]]),
                **{f"search_{name}": point.metrics[name] for name in TERMS[:2]},
                **{f"certify_{name}": metrics[name] for name in TERMS[:2]},
            }
        )
    return sorted(rows, key=lambda row: (row["layers"], row["search_python.nll"]))


def still_on_front(rows: Sequence[Row]) -> set[int]:
    """The members that no other one beats on the certify items either."""
    import numpy as np

    losses = np.array([[row["certify_python.nll"], row["certify_english.nll"], row["layers"]] for row in rows])
    return {rows[index]["candidate"] for index in front(losses)}


def exported(run: Run, pick: str) -> Row:
    """Export what an expression picks, load it with stock transformers, and score it as a plain checkpoint."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model"
        command = [MEIOSIS, "export", str(run.folder.path), str(out), "--pick", pick, "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        candidate = json.loads(done.stdout)["trial"]
        model = AutoModelForCausalLM.from_pretrained(out)
        loaded = evaluate_model(str(out), load_config(CONFIG), "select")
        (selected,) = [trial.metrics for trial in run.on("select") if trial.candidate == candidate]
        found = {
            "candidate": candidate,
            "origin": run.origins[candidate],
            "layers": int(selected[TERMS[2]]),
            "layers_in_config": int(model.config.num_hidden_layers),
            "layers_loaded": len(model.model.layers),
            "largest_difference": max(abs(loaded[name] - selected[name]) for name in TERMS),
            **{name: selected[name] for name in TERMS[:2]},
        }
    if not found["layers"] == found["layers_in_config"] == found["layers_loaded"]:
        sys.exit(f"the exported model does not have the layers that were scored: {found}")
    return found


def markdown(rows: Sequence[Row], members: Sequence[Row], run: Run, pick: str, picked: Row, seed: int) -> str:
    point = run.front().points[knee(run.front().losses())]
    kept = still_on_front(members)
    steps = sorted((key for key in rows[0] if key[7:].isdigit()), key=lambda key: int(key[7:]))
    lines = [
        "# A search for a front: two capabilities and path length",
        "",
        "`examples/front.yaml`: merges of two models of the sample family, the losses per token (nats) on Python and",
        "on English, and the layers that run; all three are minimised. Nothing was measured on a GPU.",
        "",
        "Command: `python benchmarks/three_objectives.py`",
        "",
        "![The front of the first seed](front.svg)",
        "",
        "## Hypervolume",
        "",
        "On the search items, of losses normalised against the parents, up to the worst parent of each term and a",
        "tenth of the distance to the best. What is beyond that in any term adds nothing, so neither do paths longer",
        "than the parents, nor short ones that lose too much. All have the same generation 0 and as many candidates;",
        "with racing those that a member of the front beats in every term beyond chance are scored on fewer items.",
        "",
        f"| search | seed | item-evaluations | generation 0 | {' | '.join(f'after {key[7:]}' for key in steps)} "
        "| at the end | points | of them per number of layers |",
        f"|---|--:|--:|--:|{'--:|' * len(steps)}--:|--:|---|",
    ]
    for row in rows:
        figures = (row["volume_generation_0"], *(row[key] for key in steps), row["volume"])
        volumes_ = " | ".join(f"{value:.4f}" for value in figures)
        lines.append(
            f"| {NAMES[row['arm']]} | {row['seed']} | {row['item_evaluations']:,} | {volumes_} | {row['points']} "
            f"| {row['sizes']} |"
        )
    values = ", ".join(f"{name} {point.metrics[name]:.4g}" for name in TERMS)
    lines += [
        "",
        f"## The front of seed {seed}",
        "",
        f"The knee on the search items is trial {point.candidate} ({point.origin}): {values}.",
        f'`--pick "{pick}"` takes trial {picked["candidate"]} ({picked["origin"]}), from the members that were scored',
        f"again on the select items: {picked['layers']} layers, python.nll {picked['python.nll']:.4f}, english.nll",
        f"{picked['english.nll']:.4f}. The exported checkpoint, loaded by `AutoModelForCausalLM.from_pretrained`, has",
        f"{picked['layers_loaded']} layers; scored again as any other checkpoint it differs by at most",
        f"{picked['largest_difference']:.1e} in a metric.",
        "",
        f"On the certify items, which the search has not seen, {len(kept)} of the {len(members)} members are on the",
        "front as well: no other member beats them there.",
        "",
        "| trial | origin | layers | python, search | english, search | python, certify | english, certify "
        "| on the front of both |",
        "|--:|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in members:
        shown = " | ".join(f"{row[f'certify_{name}']:.4f}" for name in TERMS[:2])
        lines.append(
            f"| {row['candidate']} | {row['origin']} | {row['layers']} | {row['search_python.nll']:.4f} "
            f"| {row['search_english.nll']:.4f} | {shown} | {'yes' if row['candidate'] in kept else ''} |"
        )
    return "\n".join([*lines, ""])


def picture(run: Run, setup: Setup, picked: int) -> str:
    trials = run.on("search")
    parents = [trial.metrics for trial in trials if run.origins[trial.candidate].startswith(PARENT)]
    objective = setup.objective.against(parents)
    found = front_of(trials, objective, run.origins, "search")
    others: list[FrontPoint] = feasible_points(trials, objective, run.origins, "search")
    middle = found.points[knee(found.losses())].candidate
    marked = {middle: "knee", picked: "picked"} if middle != picked else {picked: "knee, and picked"}
    title = f"Front of {len(trials)} candidates on the search items (nats per token)"
    return front_svg(found, others=others, marked=marked, title=title)


def main() -> None:
    import pyarrow
    import pyarrow.parquet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pick", default="python.nll <= 4.4, min cost.layers")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "reference")
    arguments = parser.parse_args()
    runs = {(arm, seed): Run.of(arm, seed) for seed in arguments.seeds for arm in ARMS}
    rows = [volumes(arm, seed, run) for (arm, seed), run in runs.items()]
    rows.sort(key=lambda row: row["arm"])
    first = arguments.seeds[0]
    run, setup = runs["nsga2", first], check(load_config(CONFIG, (f"seed={first}",)))
    members = certified(run, setup)
    picked = exported(run, arguments.pick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, table in (("front", members), ("front_volumes", rows)):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(table)), arguments.out / f"{name}.parquet")
    (arguments.out / "front.svg").write_text(picture(run, setup, picked["candidate"]))
    text = markdown(rows, members, run, arguments.pick, picked, first)
    (arguments.out / "front.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
