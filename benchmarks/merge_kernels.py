"""Speed of the merge operators against the speed of copying memory.

    python benchmarks/merge_kernels.py [--million 16] [--sources 3] [--dtype bfloat16] [--device cpu]

Per operator: million parameters per second of the second merge (what `prepare` makes is there, as it is
for every candidate after the first) with new parameters, and the ideal traffic (each source read once,
the target written once) over the time, as a share of the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from search.merge.apply import Merger
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe
from search.registry import OPERATORS


def synchronize(device: str) -> None:
    """Wait for what was given to the device."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(work: Callable[[int], object], device: str, repeats: int) -> float:
    """The fastest of `repeats` runs; each is told its number."""
    times = []
    for number in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        work(number)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=int, default=16, help="parameters of the model, in millions")
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where models and target lie")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype, device, repeats = getattr(torch, arguments.dtype), arguments.device, arguments.repeats
    size = arguments.million * 1_000_000
    generator = torch.Generator(device).manual_seed(0)
    base = torch.randn(size, generator=generator, device=device)
    models = {"base": base.to(dtype)}
    for index in range(arguments.sources):
        step = torch.randn(size, generator=generator, device=device)
        models[f"m{index}"] = (base + 0.05 * step).to(dtype)
    target = torch.empty(size, dtype=dtype, device=device)
    bytes_each = size * target.element_size()
    copying = 2 * bytes_each / seconds(lambda _: target.copy_(models["base"]), device, repeats)
    print(f"{size / 1e6:.0f} M parameters, {arguments.dtype}, {device}, {arguments.threads} threads")
    print(f"copy: {copying / 1e9:.1f} GB/s")
    print(f"{'operator':<18}{'sources':>8}{'Mparam/s':>10}{'of copy':>9}{'first, s':>10}")
    for name, operator in OPERATORS:
        count = min(arguments.sources, operator.max_sources or arguments.sources)

        def recipe(number: int, name: str = name, count: int = count) -> Recipe:
            operator = OPERATORS.get(name)
            values = {p.name: p.search[2] + 0.01 * number for p in operator.parameters if p.search is not None}
            scope = {p.name: p.scope for p in operator.parameters}
            own = {key: value for key, value in values.items() if scope[key] == "source"}
            return Recipe.from_data(
                {
                    "base": "base",
                    "models": {model: {"path": model} for model in models},
                    "rules": [
                        {
                            "operator": name,
                            "sources": {f"m{i}": own for i in range(count)},
                            "parameters": {k: v for k, v in values.items() if scope[k] == "shared"},
                        }
                    ],
                }
            )

        engine = Merger({model: InMemoryTensors({"w": values}) for model, values in models.items()})
        began = time.perf_counter()
        engine.merge_into(recipe(0), {"w": target})
        synchronize(device)
        first = time.perf_counter() - began

        def merge(number: int, engine: Merger = engine, make: Callable[[int], Recipe] = recipe) -> None:
            engine.merge_into(make(number + 1), {"w": target})

        again = seconds(merge, device, repeats)
        traffic = (count + operator.needs_base + 1) * bytes_each / again
        print(f"{name:<18}{count:>8}{size / again / 1e6:>10.0f}{traffic / copying:>9.0%}{first:>10.2f}")


if __name__ == "__main__":
    main()
