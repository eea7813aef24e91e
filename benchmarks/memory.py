"""Resident memory of one more worker, against the size of one live model and of the sources.

    python benchmarks/memory.py [--layers 12] [--workers 3] [--out results/reference]

Makes a base and three sources of random float32 weights, starts real pools of 1, 2, 3 workers on Ray,
lets every worker merge and score two task_arithmetic candidates, then a TIES candidate and another
task_arithmetic one, and reads the memory of the idle workers from `/proc/PID/smaps_rollup`:

* PSS counts a page that n processes share as 1/n in each, so the sum over the workers is what they take
  together, and its increase from n to n + 1 workers is what one more worker costs.
* A worker that imported torch and transformers but holds no model is measured in the same way: the
  floor, which no way of sharing models can change. `ratio` is (increase - floor) / live model.

Takes about two minutes on two cores, 3 GB of disk (in the temporary folder) and 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.local_ray import open_session
from cluster.pool import RayPool
from evaluators.base import EvaluatorSpec
from search.checkpoints.fingerprint import fingerprint
from search.checkpoints.reading import open_checkpoint
from search.local_pool import DEFAULT_BODY
from search.pool import Job, Outcome, WorkerPlan
from search.recipe import ModelRef, Recipe

SOURCES = ("a", "b", "c")
WORDS = ("merge", "model", "layer", "weight", "task", "vector", "sign", "trim", "scale", "score", "search")
STAGES = {"task_arithmetic": ("task_arithmetic", "task_arithmetic"), "ties": ("ties", "task_arithmetic")}
"""What every worker merges and scores before each measurement."""
MB = 1e6


class Bare:
    """The floor: a worker with everything imported that `search.evaluation` needs, and no model.

    Workers import it from this file by its name, `memory:Bare`, so the folder of this file must be on the path:
    it is when this file is run as a script, and `main` sees to it otherwise.
    """

    def __init__(self, plan: WorkerPlan) -> None:
        import torch
        from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401 - imported to be there

        import search.evaluation  # noqa: F401

        torch.set_num_threads(plan.threads)

    def run(self, job: Job) -> Outcome:
        return Outcome(job.candidate, job.items)


@dataclass(frozen=True)
class Memory:
    """Bytes over all workers of a pool: PSS, the part of it that no file backs, and what is theirs alone."""

    pss: int
    anonymous: int
    private: int


def memory_of(pids: Sequence[int]) -> Memory:
    """What the processes take together."""
    sums: dict[str, int] = {}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, kib = line.split()[:2]
            sums[name] = sums.get(name, 0) + int(kib) * 1024
    return Memory(sums["Pss:"], sums["Pss_Anon:"], sums["Private_Clean:"] + sums["Private_Dirty:"])


def build_family(folder: Path, layers: int) -> None:
    """A base, three sources at some distance from it, and a data set of a few short texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    words = random.Random(0)
    texts = [" ".join(words.choices(WORDS, k=40)) for _ in range(12)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=layers,
        num_attention_heads=12,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder / "base")
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name in SOURCES:
        for key, weight in model.state_dict().items():
            weight.copy_(base[key] + 0.01 * torch.randn(weight.shape))
        model.save_pretrained(folder / name)
    for pool, part in (("search", texts[:4]), ("select", texts[4:8]), ("certify", texts[8:])):
        rows = [json.dumps({"id": f"{pool}-{number}", "text": text}) for number, text in enumerate(part)]
        (folder / f"{pool}.jsonl").write_text("\n".join(rows) + "\n")


def make_plan(folder: Path, prepared: Path) -> WorkerPlan:
    """What `search.setup` would tell the workers, for one thread each."""
    models = {}
    for name in ("base", *SOURCES):
        checkpoint = open_checkpoint(folder / name)
        models[name] = ModelRef(path=str(checkpoint.folder), sha256=fingerprint(checkpoint).sha256)
    data = {pool: str(folder / f"{pool}.jsonl") for pool in ("search", "select", "certify")}
    texts = EvaluatorSpec("texts", "perplexity", {"data": data})
    return WorkerPlan(models, "base", (texts,), device="cpu", threads=1, prepared_folder=str(prepared))


def recipe(plan: WorkerPlan, operator: str, weight: float) -> Recipe:
    values = {"weight": weight, "density": 0.5} if operator == "ties" else {"weight": weight}
    rule = {"operator": operator, "sources": {name: values for name in SOURCES}}
    return Recipe.from_data({"base": "base", "models": plan.models, "rules": [rule]})


def measure(plan: WorkerPlan, body: str, workers: int, log: Path) -> dict[str, Memory]:
    """Memory of a pool of workers after every stage, all of them idle."""
    found: dict[str, Memory] = {}
    number = 0
    with RayPool(plan, workers=workers, working_folder=log, body=body) as pool:
        pool.ready()
        for stage, operators in STAGES.items():
            for operator in operators:
                for _ in range(workers):  # idle workers take one each
                    number += 1
                    pool.submit(Job(number, recipe(plan, operator, 0.2 + 0.01 * number), "search"))
                done: list[Outcome] = []
                while len(done) < workers:
                    done += pool.wait(60)
                failures = [outcome.failure for outcome in done if outcome.failure is not None]
                if failures:
                    raise RuntimeError(f"a candidate failed: {failures[0].message}\n{failures[0].detail}")
                pids = {int(outcome.worker.rpartition("/")[2]) for outcome in done}
                if len(pids) != workers:
                    raise RuntimeError(f"{len(pids)} of {workers} workers had a candidate, expected all")
            found[stage] = memory_of(sorted(pids))
    return found


def rows_of(bare: Sequence[Memory], merging: Sequence[Mapping[str, Memory]], live_bytes: int) -> list[dict[str, Any]]:
    """One row per number of workers and measurement; the floor first.

    Args:
        bare, merging: what 1, 2, ... workers take together, without and with models.
    """
    rows = _rows("bare", "import", bare, None, live_bytes)
    for stage in STAGES:
        rows += _rows("merging", stage, [memory[stage] for memory in merging], bare, live_bytes)
    return rows


def _rows(
    kind: str, after: str, measured: Sequence[Memory], floor: Sequence[Memory] | None, live_bytes: int
) -> list[dict[str, Any]]:
    rows = []
    for index, memory in enumerate(measured):
        row: dict[str, Any] = {
            "worker": kind,
            "after": after,
            "workers": index + 1,
            "pss_mb": memory.pss / MB,
            "anonymous_mb": memory.anonymous / MB,
            "private_mb": memory.private / MB,
            "increase_mb": None,
            "over_floor_mb": None,
            "ratio": None,
        }
        if index:
            increase = memory.pss - measured[index - 1].pss
            row["increase_mb"] = increase / MB
            if floor is not None:
                over = increase - (floor[index].pss - floor[index - 1].pss)
                row |= {"over_floor_mb": over / MB, "ratio": over / live_bytes}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| kind | after | workers | PSS of all, MB | one more worker, MB | over the floor, MB | ratio |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        digits = {"pss_mb": 0, "increase_mb": 0, "over_floor_mb": 0, "ratio": 2}
        cells = ["" if row[key] is None else f"{row[key]:.{n}f}" for key, n in digits.items()]
        lines.append(" | ".join(["", row["worker"], row["after"], str(row["workers"]), *cells, ""]).strip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="12 make 105 million parameters")
    parser.add_argument("--workers", type=int, default=3, help="most workers in a pool")
    parser.add_argument("--out", type=Path, default=Path("results", "reference"))
    arguments = parser.parse_args()
    if (here := str(Path(__file__).resolve().parent)) not in sys.path:  # as in `python -m benchmarks.memory`
        sys.path.append(here)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="memory-") as temporary:
        folder = Path(temporary)
        # In a process of its own: this one stays without torch, so it shares no page with the workers.
        builder = multiprocessing.get_context("spawn").Process(target=build_family, args=(folder, arguments.layers))
        builder.start()
        builder.join()
        if builder.exitcode:
            raise SystemExit("the models could not be made")
        live_bytes = open_checkpoint(folder / "base").nbytes
        source_bytes = (1 + len(SOURCES)) * live_bytes
        bare: list[Memory] = []
        merging: list[dict[str, Memory]] = []
        session = open_session(None, cpus=arguments.workers, log=folder / "ray.log")
        for workers in range(1, arguments.workers + 1):
            # Each pool prepares for TIES anew.
            plan = make_plan(folder, folder / f"prepared-{workers}")
            bare.append(measure(plan, f"{Path(__file__).stem}:{Bare.__name__}", workers, folder)["ties"])
            merging.append(measure(plan, DEFAULT_BODY, workers, folder))
            seconds = time.perf_counter() - began
            print(f"measured pools of {workers}, {seconds:.0f} s", file=sys.stderr, flush=True)
        session.close()
    write(rows_of(bare, merging, live_bytes), live_bytes, source_bytes, arguments.out)


def write(rows: Sequence[Mapping[str, Any]], live_bytes: int, source_bytes: int, out: Path) -> None:
    """Print the table and put it beside the others of the project."""
    from results_page import versions, write_page

    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    libraries = versions("torch", "transformers", "ray")
    ratios = [row["ratio"] for row in rows if row["ratio"] is not None]
    text = f"""# Memory of one more worker

- One live model: {live_bytes / MB:.0f} MB ({live_bytes / 4e6:.0f} million float32 parameters, random).
- Base and three sources: {source_bytes / MB:.0f} MB, mapped, shared by all workers.
- **Beyond the floor one more worker costs {min(ratios):.2f} to {max(ratios):.2f} live models** (`ratio`).

{table(rows)}

The floor is a `bare` worker: torch and transformers imported, no model. PSS counts a page that n
processes share as 1/n in each, so the sum over the workers holds sources and libraries once, and
its increase is what one more worker costs. All workers were idle, after every one of them had merged
and scored two task_arithmetic candidates, then a TIES candidate and another task_arithmetic one. The memory
of a GPU was not measured.

Remake with `python benchmarks/memory.py`. Made on {os.cpu_count()} cores and {memory_gib:.0f} GiB of memory with
one thread per worker; {libraries}.
In `memory.parquet`, `anonymous_mb` is the part of PSS that no file backs, and `private_mb` what belongs
to single workers.
"""
    print(text)
    write_page(out, "memory", text, rows)


if __name__ == "__main__":
    main()
