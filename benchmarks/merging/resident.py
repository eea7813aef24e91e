"""Speed of re-merging resident models, as a multiple of the least traffic at the speed of copying memory.

    python benchmarks/merging/resident.py [--million 48] [--device cpu] [--threads 1] [--operators ties linear]

One row per operator, number of sources and dtype. The floor is (reads + 1 write) over the copy bandwidth
measured right before; the base counts as a read. Each merge has new parameters: every weight, or every
density (on the grid that searches use) where the row says so. What `prepare` makes is there, as it is for
every candidate after the first. `one_of_64` compares one changed gene of 64 groups with a full merge.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run alone, or imported by a script beside

from machine import copy_bandwidth, least_seconds, synchronize

from search.merge.apply import Merger
from search.merge.kernels import description
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe
from search.registry import OPERATORS

OPERATOR_NAMES = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")

OTHER_NAMES = (
    *("nuslerp", "multislerp", "karcher", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "model_stock"),
    *("nearswap", "passthrough", "sce", "arcee_fusion", "ram", "ramplus_tl", "consensus", "tall_mask", "lines"),
)
"""Those without a fused kernel; not those that decompose matrices (tsv_m, iso_c, iso_cts, wudi) or read statistics."""

GROUPS = 64


@dataclass(frozen=True)
class Row:
    """One measured merge. `floor_seconds`: least traffic at copy bandwidth; `ratio`: seconds over that."""

    operator: str
    sources: int
    dtype: str
    device: str
    threads: int
    changed: str
    floor_bytes: int
    floor_seconds: float
    seconds: float
    ratio: float


def size_for(device: str) -> int:
    """Parameters of a model that is large for the caches of a device, and for what launching work on it takes."""
    return 48_000_000 if torch.device(device).type == "cpu" else 256_000_000


def models_of(count: int, size: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """A base and `count` models near it, each one matrix with rows of 4000."""
    generator = torch.Generator(device).manual_seed(0)
    base = torch.randn(size, generator=generator, device=device).view(-1, 4000)
    models = {"base": base.to(dtype)}
    for index in range(count):
        step = torch.randn(base.shape, generator=generator, device=device)
        models[f"m{index}"] = base.add(step, alpha=0.05).to(dtype)
    return models


def recipe_of(operator: str, count: int, number: int, changed: str, tensors: str = "*") -> Recipe:
    """A recipe whose weights, or densities, are those of candidate `number`."""
    names = {parameter.name for parameter in OPERATORS.get(operator).parameters}
    values: dict[str, Any] = {}
    if "weight" in names:
        values["weight"] = 0.3 + (0.01 * number if changed == "weights" else 0.0)
    if "density" in names:
        values["density"] = (512 + (number if changed == "densities" else 0)) / 1024
    shared = {"t": 0.3 + 0.01 * number} if operator in ("slerp", "nearswap") else {}
    sources = {f"m{index}": values for index in range(count)}
    rule = {"tensors": [tensors], "operator": operator, "sources": sources, "parameters": shared}
    paths = {name: {"path": name} for name in ("base", *sources)}
    return Recipe.from_data({"base": "base", "models": paths, "rules": [rule]})


def measure(
    *,
    operators: Iterable[str] = OPERATOR_NAMES,
    counts: Iterable[int] = (2, 3, 8),
    dtypes: Iterable[str] = ("float32", "bfloat16"),
    size: int = 48_000_000,
    device: str = "cpu",
    threads: int = 1,
    repeats: int = 7,
) -> Iterator[Row]:
    """Rows, one by one as they are measured. Sets the number of threads of torch while it runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in dtypes:
            for count in counts:
                models = models_of(count, size, getattr(torch, dtype), device)
                for operator in operators:
                    most = OPERATORS.get(operator).max_sources or count
                    if count <= most or operator in OTHER_NAMES:
                        yield from _rows(operator, min(count, most), dtype, models, device, threads, repeats)
                del models
    finally:
        torch.set_num_threads(before)


def _rows(
    operator: str,
    count: int,
    dtype: str,
    models: dict[str, torch.Tensor],
    device: str,
    threads: int,
    repeats: int,
) -> Iterator[Row]:
    engine = Merger({name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()})
    target = torch.empty_like(models["base"])
    bytes_each = target.numel() * target.element_size()
    known = OPERATORS.get(operator)
    searched = {parameter.name for parameter in known.parameters}
    for changed in ("weights", "densities") if "density" in searched else ("weights",):
        for number in (1000, 1001):  # what is made once is made
            engine.merge_into(recipe_of(operator, count, number % 400, changed), {"w": target})
        synchronize(device)
        floor_bytes = (count + known.needs_base + 1) * bytes_each
        # A copy of as many bytes: a smaller one would run in the caches that a merge of several models leaves.
        bandwidth = copy_bandwidth(floor_bytes // 2, device, repeats)
        recipes = [recipe_of(operator, count, number, changed) for number in range(repeats + 1)]
        seconds = least_seconds(lambda n, r=recipes: engine.merge_into(r[n], {"w": target}), device, repeats)
        floor = floor_bytes / bandwidth
        yield Row(operator, count, dtype, device, threads, changed, floor_bytes, floor, seconds, seconds / floor)


def one_of_64(operator: str, *, size: int = 64_000_000, device: str = "cpu", repeats: int = 5) -> float:
    """How many times cheaper a merge is after one of 64 genes changed than a full merge."""
    step = size // GROUPS
    names = [f"layers.{index}.w" for index in range(GROUPS)]
    models = {
        model: {name: tensor.view(-1)[index * step : (index + 1) * step] for index, name in enumerate(names)}
        for model, tensor in models_of(2, size, torch.bfloat16, device).items()
    }
    engine = Merger({model: InMemoryTensors(tensors) for model, tensors in models.items()})
    targets = {name: torch.empty_like(tensor) for name, tensor in models["base"].items()}

    def recipe(changed: Iterable[int], number: int) -> Recipe:
        moved = set(changed)
        one = [recipe_of(operator, 2, number if i in moved else 0, "weights", names[i]) for i in range(GROUPS)]
        return one[0].model_copy(update={"rules": tuple(part.rules[0] for part in one)})

    everything = [recipe(range(GROUPS), number) for number in range(repeats + 1)]
    engine.merge_into(everything[0], targets)
    whole = least_seconds(lambda n: engine.merge_into(everything[n], targets), device, repeats)
    engine.merge_into(everything[0], targets)
    single = [recipe([17], number) for number in range(repeats + 1)]
    return whole / least_seconds(lambda n: engine.merge_into(single[n], targets), device, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, help="parameters of the model, in millions: 48, or 256 on a GPU")
    parser.add_argument("--device", default="cpu", help="where models and target lie")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sources", type=int, nargs="*", default=[2, 3, 8])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--operators", nargs="*", default=list(OPERATOR_NAMES))
    parser.add_argument("--others", action="store_true", help="operators without a fused kernel, with 3 sources")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    arguments = parser.parse_args()
    size = arguments.million * 1_000_000 if arguments.million else size_for(arguments.device)
    print(f"{size / 1e6:.0f} M parameters, {arguments.device}, {arguments.threads} threads; {description()}")
    print(f"{'operator':<17}{'sources':>8} {'dtype':<10}{'changed':<11}{'seconds':>9}{'floor':>9}{'ratio':>7}")
    rows = []
    for row in measure(
        operators=OTHER_NAMES if arguments.others else arguments.operators,
        counts=[3] if arguments.others else arguments.sources,
        dtypes=arguments.dtypes,
        size=size,
        device=arguments.device,
        threads=arguments.threads,
        repeats=arguments.repeats,
    ):
        print(
            f"{row.operator:<17}{row.sources:>8} {row.dtype:<10}{row.changed:<11}"
            f"{row.seconds:>9.4f}{row.floor_seconds:>9.4f}{row.ratio:>7.2f}",
            flush=True,
        )
        rows.append(asdict(row))
    if arguments.out is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from merging.tables import resident_table
        from results_page import machine

        head = [
            "# Operators without a fused kernel, merged into memory",
            "",
            f"{machine()}. {arguments.threads} threads.",
        ]
        head[-1] += " Remake with `" + " ".join(["python", "benchmarks/merging/resident.py", *sys.argv[1:]]) + "`."
        arguments.out.write_text("\n".join([*head, "", *resident_table(rows)]) + "\n")
    for operator in () if arguments.others else ("linear", "ties"):
        if operator in arguments.operators:
            times = one_of_64(operator, size=4 * size, device=arguments.device)
            print(f"one gene of 64 changed, {operator}: {times:.0f} times cheaper than a full merge")


if __name__ == "__main__":
    main()
