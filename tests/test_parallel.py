"""Tensors merged side by side: the bits, the order, the memory and the errors of one after the other."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from search.errors import CheckpointError
from search.merge.apply import Merger
from search.merge.parallel import SMALL_ELEMENTS, merge_side_by_side
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe

Models = dict[str, dict[str, Tensor]]


def models(sizes: list[int]) -> Models:
    generator = torch.Generator().manual_seed(0)
    base = {f"t{index}": torch.randn(size, generator=generator) for index, size in enumerate(sizes)}
    made = {"base": base}
    for name in "ab":
        made[name] = {key: value + 0.1 * torch.randn(len(value), generator=generator) for key, value in base.items()}
    return {name: {key: value.bfloat16() for key, value in one.items()} for name, one in made.items()}


def recipe(operator: str, compute: str = "inputs", **values: Any) -> Recipe:
    rule = {"operator": operator, "sources": {name: {"weight": 0.4, **values} for name in "ab"}}
    return Recipe.from_data(
        {
            "base": "base",
            "models": {name: {"path": name} for name in ("base", "a", "b")},
            "rules": [rule],
            "seed": 1,
            "compute": compute,
        }
    )


def merger(tensors: Models) -> Merger:
    return Merger({name: InMemoryTensors(one) for name, one in tensors.items()}, keep_prepared=False)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("compute", ["inputs", "float32"])
@pytest.mark.parametrize(
    ("operator", "values"), [("ties", {"density": 0.3}), ("della", {"density": 0.5}), ("linear", {})]
)
def test_the_order_and_the_bits_are_those_of_one_after_the_other(
    operator: str, values: dict[str, float], compute: str, threads: int
) -> None:
    tensors = models([3000, 10, 70_000, 1, 2000, 1024, 5, 40_000])
    wanted = recipe(operator, compute, **values)
    sizes = {name: tensor.numel() for name, tensor in tensors["base"].items()}
    found = list(merge_side_by_side(lambda: merger(tensors), wanted, sizes, threads=threads))
    alone = list(merger(tensors).merge_tensors(wanted))
    assert [name for name, _ in found] == [name for name, _ in alone]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, alone, strict=True))


def test_those_under_way_are_no_larger_than_twice_the_largest() -> None:
    size, read, guard = SMALL_ELEMENTS, set(), threading.Lock()
    base = torch.zeros(size, dtype=torch.bfloat16)

    class Watched(InMemoryTensors):
        def get(self, name: str) -> Tensor:
            with guard:
                read.add(name)
            return super().get(name)

    tensors = {name: Watched({f"t{index}": base for index in range(20)}) for name in ("base", "a", "b")}
    sizes = {f"t{index}": size for index in range(20)}
    stream = merge_side_by_side(lambda: Merger(tensors), recipe("linear"), sizes, threads=8)
    next(stream)
    time.sleep(0.3)
    assert len(read) <= 2
    next(stream)
    time.sleep(0.3)
    assert len(read) <= 3
    stream.close()


def test_an_error_passes_through_and_ends_the_threads() -> None:
    tensors = models([100] * 6)
    tensors["b"]["t3"] = tensors["b"]["t3"][:50]
    before = threading.active_count()
    stream = merge_side_by_side(
        lambda: merger(tensors), recipe("linear"), {name: 100 for name in tensors["base"]}, threads=3
    )
    with pytest.raises(CheckpointError, match="t3"):
        list(stream)
    assert threading.active_count() == before


def test_the_threads_of_torch_are_as_before() -> None:
    before = torch.get_num_threads()
    tensors = models([100] * 4)
    sizes = {name: 100 for name in tensors["base"]}
    list(merge_side_by_side(lambda: merger(tensors), recipe("linear"), sizes, threads=4))
    assert torch.get_num_threads() == before
