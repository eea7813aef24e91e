"""The merge engine against the machine and against mergekit, on the same files, in one run.

    python benchmarks/merge.py [--millions 250] [--quick] [--venv build/mergekit-venv] [--out results/reference]

Three parts, each with the bandwidth of the machine beside it: merges of checkpoints on disk (one-shot), merges into
memory as a search does them (resident), and merges after one gene of 64 changed (incremental). Writes `merge.md` and
`merge.parquet`. Takes about 40 minutes on two cores and 8 GB of disk with the default size, a minute with `--quick`;
measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from merging import oneshot, resident
from merging.machine import copy_bandwidth
from merging.mergekit_peer import Peer, find_peer
from merging.tables import write_tables

from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

GROUPS = 64
PARTS = ("resident", "incremental", "one-shot")


def incremental(million: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """A merge of a model in 64 groups when one group has a new weight, against a merge of all of it."""
    size = max(1024, million * 1_000_000 // GROUPS)
    generator = torch.Generator(device).manual_seed(0)
    names = [f"layers.{group}.weight" for group in range(GROUPS)]
    models = {
        model: {name: torch.randn(size, generator=generator, device=device).bfloat16() for name in names}
        for model in ("base", "a", "b", "c")
    }
    rows = []
    for operator, parameters in (("linear", {}), ("task_arithmetic", {}), ("ties", {"density": 0.5})):

        def recipe(weights: Sequence[float], operator: str = operator, more: dict[str, float] = parameters) -> Recipe:
            rules = [
                {"tensors": [name], "operator": operator, "sources": {m: {"weight": w, **more} for m in "abc"}}
                for name, w in zip(names, weights, strict=True)
            ]
            return Recipe.from_data({"base": "base", "models": {m: {"path": m} for m in models}, "rules": rules})

        merger = Merger({name: InMemoryTensors(tensors) for name, tensors in models.items()}, device=device)
        target = {name: torch.empty(size, dtype=torch.bfloat16, device=device) for name in names}
        merger.merge_into(recipe([0.3] * GROUPS), target)
        full, one = [], []
        for number in range(repeats):
            fresh = [0.31 + 0.01 * number] * GROUPS
            full.append(_seconds(merger, recipe(fresh), target, device))
            one.append(_seconds(merger, recipe([*fresh[:-1], 0.5 + 0.01 * number]), target, device))
        rows.append({"operator": operator, "device": device, "full_s": min(full), "one_gene_s": min(one)})
    return rows


def _seconds(merger: Merger, recipe: Recipe, target: dict[str, torch.Tensor], device: str) -> float:
    def wait() -> None:
        if torch.device(device).type != "cpu":
            torch.accelerator.synchronize(device)

    wait()
    began = time.perf_counter()
    merger.merge_into(recipe, target)
    wait()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=250, help="parameters of the checkpoints, in millions")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--methods", nargs="+", choices=[*oneshot.METHODS], default=[*oneshot.METHODS])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--venv", type=Path, default=Path("build/mergekit-venv"), help="environment of mergekit")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they are in --out")
    parser.add_argument("--giant", action="store_true", help="8 B parameters in bfloat16, for a GPU that holds them")
    parser.add_argument("--quick", action="store_true", help="tiny models: does it work at all")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints; by default a temporary one")
    parser.add_argument("--out", type=Path, help="by default results/reference, or build/merge-quick")
    arguments = parser.parse_args()
    peer = Peer((), "", "not asked for") if arguments.no_mergekit else find_peer(arguments.venv.absolute())
    if peer.missing:
        print(peer.missing, file=sys.stderr)
    torch.set_num_threads(arguments.threads)
    out = arguments.out or Path("build/merge-quick" if arguments.quick else "results/reference")
    repeats = 1 if arguments.quick else arguments.repeats
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    million = 1 if arguments.quick else 64
    counts = sorted({1, arguments.threads})
    measured: dict[str, list[dict[str, Any]]] = {}
    if "resident" in arguments.parts:
        measured["resident"] = [row for device in devices for row in resident_rows(device, counts, arguments.quick)]
    if "incremental" in arguments.parts:
        times = 2 if arguments.quick else 5
        measured["incremental"] = [row for device in devices for row in incremental(million, device, times)]
    if arguments.giant and torch.cuda.is_available():
        measured["giant"] = giant("cuda", 5)
    if "one-shot" in arguments.parts:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            measured["one-shot"] = oneshot.measure(
                Path(scratch),
                millions=arguments.millions,
                dtypes=arguments.dtypes,
                peer=peer,
                threads=arguments.threads,
                repeats=repeats,
                methods=arguments.methods,
                tiny=arguments.quick,
            )
    write_tables(
        measured,
        peer,
        memory_bandwidth=copy_bandwidth(1 << 28, "cpu", 5),
        threads=arguments.threads,
        out=out,
    )


def giant(device: str, repeats: int, layers: int = 128, size: int = 62_500_000) -> list[dict[str, Any]]:
    """Candidates over 8 B parameters in bfloat16, three sources: linear (64 GB), and TIES against a base (80 GB)."""
    bandwidth = copy_bandwidth(1 << 30, device, repeats)
    torch.cuda.empty_cache()
    generator = torch.Generator(device).manual_seed(0)
    names = [f"layers.{layer}.weight" for layer in range(layers)]

    def model(step: float) -> dict[str, torch.Tensor]:
        parts = {}
        for name in names:
            parts[name] = torch.empty(size, dtype=torch.bfloat16, device=device)
            parts[name].normal_(0, 0.02 + step, generator=generator)
        return parts

    rows = []
    models = {name: model(0.001 * index) for index, name in enumerate("abc")}
    target = model(0)
    for operator, parameters, reads in (("linear", {}, 3), ("ties", {"density": 0.5}, 4)):
        if reads == 4:
            free, _ = torch.cuda.mem_get_info(device)
            if free < layers * size * 2 + 40 * size:  # what sorts the magnitudes of a tensor takes 40 bytes an element
                rows.append({"operator": operator, "device": device, "failed": "too little memory for a base"})
                continue
            models["base"] = model(0)
        merger = Merger({name: InMemoryTensors(tensors) for name, tensors in models.items()}, device=device)

        def recipe(weight: float, operator: str = operator, more: dict[str, float] = parameters) -> Recipe:
            rule = {"operator": operator, "sources": {m: {"weight": weight, **more} for m in "abc"}}
            base = {"base": "base"} if "base" in models else {}
            return Recipe.from_data({**base, "models": {m: {"path": m} for m in models}, "rules": [rule]})

        try:
            merger.merge_into(recipe(0.3), target)
            seconds = min(_seconds(merger, recipe(0.31 + 0.01 * n), target, device) for n in range(repeats))
        except torch.OutOfMemoryError:
            rows.append({"operator": operator, "device": device, "failed": "out of memory"})
            continue
        floor = (reads + 1) * layers * size * 2 / bandwidth
        rows.append({"operator": operator, "device": device, "seconds": seconds, "floor_seconds": floor, "failed": ""})
    return rows


def resident_rows(device: str, threads: Sequence[int], quick: bool) -> list[dict[str, Any]]:
    """What `merging.resident` measures on a device."""
    options: dict[str, Any] = {"size": resident.size_for(device), "repeats": 5}
    if quick:
        options = {"size": options["size"] // 48, "repeats": 2, "counts": (2,), "operators": ("linear", "ties")}
    found: list[dict[str, Any]] = []
    for count in threads if device == "cpu" else threads[-1:]:
        found += map(asdict, resident.measure(device=device, threads=count, **options))
    return found


if __name__ == "__main__":
    main()
