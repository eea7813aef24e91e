"""The Triton kernels give the bits of plain torch: on a GPU, or else in Triton's interpreter on the CPU.

What the interpreter cannot show: that the compiler fuses no product with a sum, and vectors of odd alignment. The
same tests on a GPU do.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import search.merge.kernels
from search.errors import UserError
from search.merge.apply import Merger
from search.merge.inputs import TensorInputs
from search.merge.kernels import Mode, gpu
from search.merge.kernels.native import Stored
from search.merge.operator import Apply, Block
from search.merge.sources import InMemoryTensors
from search.merge.weighted_sums import WeightedSum
from search.merge.writing import count_write, write_range
from search.recipe import Recipe
from search.registry import OPERATORS

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them itself"))
compiled = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
every_device = pytest.mark.parametrize("device", [interpreted, compiled])

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FAMILIES = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
SIZES = (1, 17, 1024, 3000)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Where there is no GPU, Triton is told to interpret when the kernels are first imported."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setenv("TRITON_INTERPRET", "1")
        gpu.triton_kernels.cache_clear()
        yield
        gpu.triton_kernels.cache_clear()


class KernelsOnly(Merger):
    """Merges by the Triton kernels wherever the targets are, and says what they did not do."""

    refused = 0

    def _merge_at_once(self, apply: Apply, inputs: TensorInputs, target: Tensor, dtype: torch.dtype | None) -> bool:
        if target.is_cuda:
            done = super()._merge_at_once(apply, inputs, target, dtype)
            self.refused += not done
            return done
        assert inputs.stored is not None
        narrow = inputs.dtype != torch.float32
        found = None
        if inputs.dtype != torch.float64 and (not narrow or isinstance(apply, WeightedSum)):
            rounded = inputs.dtype if narrow else dtype
            found = gpu.plan("native", apply, Stored(*inputs.stored), target.dtype, rounded, target.device)
        if found is None:
            self.refused += 1
            return False
        for start, stop in inputs.ranges():
            out = torch.empty(stop - start, dtype=target.dtype)
            with np.errstate(over="ignore", invalid="ignore"):  # whole numbers wrap, and that is meant
                found.write(start, stop, out)
            write_range(target, start, out)
        count_write(target)
        return True


def models_of(count: int, size: int, dtypes: list[str], device: str, *, coarse: bool = False) -> dict[str, Tensor]:
    """A base and `count` models near it. Coarse ones have many equal differences, and zeros of both signs."""
    generator = torch.Generator().manual_seed(size + count)
    base = torch.randn(size, generator=generator)
    if coarse:
        base = (base * 2).round() / 2 * torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    models = {"base": base}
    for index in range(count):
        step = torch.randn(size, generator=generator)
        models[f"m{index}"] = base + ((step * 2).round() / 4 if coarse else 0.1 * step)
    kinds = [DTYPES[dtypes[index % len(dtypes)]] for index in range(count + 1)]
    return {name: tensor.to(device, kind) for (name, tensor), kind in zip(models.items(), kinds, strict=True)}


def recipe_of(operator: str, count: int, *, density: float = 0.4, shared: Any = None, **more: Any) -> Recipe:
    known = {parameter.name for parameter in OPERATORS.get(operator).parameters}
    sources: dict[str, dict[str, float]] = {f"m{index}": {} for index in range(count)}
    for index, values in enumerate(sources.values()):
        if "weight" in known:
            values["weight"] = (0.7, -0.4, 0.3, 1.1)[index % 4]
        if "density" in known:
            values["density"] = density
    parameters = {"t": 0.3} if operator == "slerp" else {}
    rule = {"operator": operator, "sources": sources, "parameters": {**parameters, **(shared or {})}}
    paths = {name: {"path": name} for name in ("base", *sources)}
    return Recipe.from_data({"base": "base", "models": paths, "rules": [rule], **more})


def bits(tensor: Tensor) -> Tensor:
    """What lies in memory; NaNs may differ in theirs."""
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.ones_like(tensor), tensor).view(width).cpu()


def assert_same_bits(
    recipe: Recipe, models: dict[str, Tensor], dtype: torch.dtype, *, fused: bool = False, **options: Any
) -> None:
    sources = {name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()}
    like = models["base"]
    found, wanted = (torch.full(like.shape, fill, dtype=dtype, device=like.device) for fill in (5.0, 7.0))
    engine = KernelsOnly(sources, kernels="native", **options)
    engine.merge_into(recipe, {"w": found})
    assert engine.refused == 0, "the kernels left this to torch"
    Merger(sources, kernels="torch").merge_into(recipe, {"w": wanted})
    if fused and like.device.type == "cpu" and not interpreter_fuses():
        # Older interpreters multiply and add in two steps: an error of half a unit of the sums on the way.
        torch.testing.assert_close(found.float(), wanted.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    else:
        assert torch.equal(bits(found), bits(wanted))


def interpreter_fuses() -> bool:
    from triton._C.libtriton import interpreter

    return hasattr(interpreter, "fma_fp32")


@with_triton
@every_device
@pytest.mark.parametrize("dtypes", [["f32"], ["bf16"], ["f16"], ["f32", "bf16", "f16"]], ids="-".join)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("operator", FAMILIES)
def test_kernels_give_the_bits_of_plain_torch(operator: str, count: int, dtypes: list[str], device: str) -> None:
    if count > (OPERATORS.get(operator).max_sources or count) or count < OPERATORS.get(operator).min_sources:
        pytest.skip("not so many sources")
    for index, size in enumerate(SIZES):
        models = models_of(count, size, dtypes, device, coarse=bool(index % 2))
        target = DTYPES[[*dtypes, "bf16"][index % (len(dtypes) + 1)]]
        assert_same_bits(recipe_of(operator, count, seed=3), models, target, fused=operator == "linear")


@with_triton
@every_device
@pytest.mark.parametrize("operator", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("shared", [{"normalize": True, "lambda": 0.7}, {"normalize": False, "lambda": -1.3}])
def test_sums_are_divided_and_scaled_as_in_torch(operator: str, shared: dict[str, Any], device: str) -> None:
    for dtype in ("f32", "bf16"):
        models = models_of(3, 3000, [dtype], device)
        assert_same_bits(recipe_of(operator, 3, shared=shared), models, DTYPES[dtype])


@with_triton
@every_device
@pytest.mark.parametrize("rounded", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("target", ["f32", "bf16", "f16"])
def test_results_are_rounded_to_the_dtype_of_the_recipe_first(rounded: str, target: str, device: str) -> None:
    models = models_of(2, 3000, ["f32"], device)
    assert_same_bits(recipe_of("ties", 2, dtype=rounded), models, DTYPES[target])


@with_triton
@every_device
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_sums_in_the_dtype_of_the_inputs_are_rounded_to_it(dtype: str, device: str) -> None:
    models = models_of(3, 3000, [dtype], device)
    assert_same_bits(recipe_of("linear", 3, compute="inputs"), models, torch.float32, fused=True)


@with_triton
@every_device
@pytest.mark.parametrize("density", [0.0, 1 / 3000, 0.3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("count", [1, 3])
def test_equals_at_a_threshold_are_kept_up_to_the_same_element(density: float, count: int, device: str) -> None:
    for dtype in ("f32", "bf16"):
        models = models_of(count, 5000, [dtype], device, coarse=True)
        assert_same_bits(recipe_of("ties", count, density=density), models, DTYPES[dtype])


@with_triton
@every_device
@pytest.mark.parametrize("operator", ["ties", "dare_linear"])
def test_sources_of_which_nothing_and_all_is_kept_go_together_with_others(operator: str, device: str) -> None:
    models = models_of(3, 3000, ["f32"], device, coarse=True)
    data = recipe_of(operator, 3).model_dump(mode="json")
    for densities in ((0.0, 0.5, 1.0), (0.0, 1.0, 1.0)):
        for index, density in enumerate(densities):
            data["rules"][0]["sources"][f"m{index}"]["density"] = density
        assert_same_bits(Recipe.from_data(data), models, torch.float32)


@with_triton
@every_device
def test_masks_go_on_beyond_a_segment(device: str) -> None:
    start, stop = (1 << 20) - 3072, (1 << 20) + 2500
    models = models_of(1, stop, ["f32"], device)
    sources = {name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()}

    class LastPart(KernelsOnly):
        """The interpreter takes long for a million elements."""

        def _merge_at_once(self, apply: Apply, inputs: TensorInputs, target: Tensor, dtype: torch.dtype | None) -> bool:
            assert inputs.stored is not None
            found = gpu.plan("native", apply, Stored(*inputs.stored), target.dtype, dtype, target.device)
            assert found is not None
            with np.errstate(over="ignore"):
                found.write(start, stop, target[start:])
            return True

    recipe = recipe_of("dare_linear", 1, density=0.3, seed=11)
    found, wanted = (torch.zeros(stop, device=device) for _ in range(2))
    LastPart(sources).merge_into(recipe, {"w": found})
    Merger(sources, kernels="torch").merge_into(recipe, {"w": wanted})
    assert torch.equal(bits(found[start:]), bits(wanted[start:]))


@with_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_may_have_more_elements_than_32_bits_count() -> None:
    size = (1 << 31) + 5000
    if torch.cuda.mem_get_info()[0] < 12 * size:
        pytest.skip("needs 24 GiB of GPU memory")
    models = {name: torch.zeros(size, dtype=torch.bfloat16, device="cuda") for name in ("base", "m0")}
    for number, tensor in enumerate(models.values()):
        for part in (tensor[:5000], tensor[-10_000:]):
            part.normal_(generator=torch.Generator("cuda").manual_seed(number))
    assert_same_bits_at_the_ends(recipe_of("dare_linear", 1, seed=5), models)
    assert_same_bits_at_the_ends(recipe_of("linear", 1), models)


def assert_same_bits_at_the_ends(recipe: Recipe, models: dict[str, Tensor]) -> None:
    sources = {name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()}
    found, wanted = (torch.zeros_like(models["base"]) for _ in range(2))
    Merger(sources, kernels="native").merge_into(recipe, {"w": found})
    Merger(sources, kernels="torch").merge_into(recipe, {"w": wanted})
    for part in (slice(5000), slice(-10_000, None)):
        assert torch.equal(bits(found[part]), bits(wanted[part]))


@with_triton
@every_device
def test_targets_with_strides_get_the_same_bits(device: str) -> None:
    models = {name: one.view(50, 60) for name, one in models_of(2, 3000, ["bf16"], device).items()}
    sources = {name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()}
    recipe = recipe_of("ties", 2)
    found = torch.zeros(60, 50, dtype=torch.bfloat16, device=device).t()
    wanted = torch.zeros(50, 60, dtype=torch.bfloat16, device=device)
    engine = KernelsOnly(sources, kernels="native", block_elements=1024)
    before = found._version
    engine.merge_into(recipe, {"w": found})
    Merger(sources, kernels="torch").merge_into(recipe, {"w": wanted})
    assert engine.refused == 0
    assert found._version > before
    assert torch.equal(found, wanted)


@with_triton
@every_device
@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_what_is_no_number_or_infinite_comes_out_as_in_torch(operator: str, device: str) -> None:
    for dtype in ("f32", "bf16", "f16"):
        models = models_of(2, 1500, [dtype], device)
        for place, value in enumerate((math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 3e38)):
            models["m0"][place] = value
            models["m1"][100 + place] = value
            models["base"][200 + place] = value
        assert_same_bits(recipe_of(operator, 2), models, DTYPES[dtype], fused=operator == "linear")


@with_triton
@every_device
def test_fused_sums_round_once_per_source(device: str) -> None:
    factors = (1 / 3, 0.7, -1.1)
    values = [torch.randn(4096, generator=torch.Generator().manual_seed(n)).to(device) for n in range(3)]
    apply = WeightedSum(None, factors, None, fused=True)  # type: ignore[arg-type]  # kernels ask it for nothing
    out = torch.empty(4096, device=device)
    found = gpu.plan("native", apply, Stored(tuple(values), None), out.dtype, None, out.device)
    assert found is not None
    found.write(0, 4096, out)
    narrow = [np.float64(np.float32(factor)) for factor in factors]
    exact = [value.cpu().double().numpy() for value in values]
    total = np.float32(exact[0] * narrow[0])
    for value, factor in zip(exact[1:], narrow[1:], strict=True):
        # The product of two float32 is exact in float64; the sum there rounds once more, half a unit at most, and
        # that moves the float32 by one unit where it lies on the border of two.
        total = np.float32(value * factor + total.astype(np.float64))
    unit = np.spacing(np.maximum(np.abs(total), np.float32(2.0**-20)))
    assert (np.abs(out.cpu().numpy() - total) <= 2 * unit).all()
    assert not interpreter_fuses() or (out.cpu().numpy() == total).mean() > 0.999


def test_what_the_kernels_do_not_know_is_left_to_torch() -> None:
    class Other:
        def __call__(self, block: Block, out: Tensor) -> None:
            raise AssertionError

    def planned(apply: Apply, count: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> object:
        values = tuple(torch.zeros(4, dtype=dtype) for _ in range(count))
        return gpu.plan("torch", apply, Stored(values, None), torch.float32, None, torch.device(device))

    def average(count: int) -> Apply:
        return WeightedSum(None, (1.0,) * count, None, fused=True)  # type: ignore[arg-type]  # asked for nothing

    assert planned(Other(), 2) is None
    assert planned(average(9), 9) is None
    assert planned(average(2), 2, torch.float64) is None
    assert planned(average(2), 2, device="cuda:0") is None  # sources on the CPU: copied block by block
    assert planned(average(2), 2) is None  # kernels="torch"


@pytest.mark.parametrize("mode", ["auto", "native"])
def test_where_triton_does_not_run_this_is_said(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "search.merge.kernels.triton_kernels", broken())
    monkeypatch.setattr(search.merge.kernels, "triton_kernels", broken(), raising=False)
    gpu.triton_kernels.cache_clear()
    try:
        if mode == "native":
            with pytest.raises(UserError, match="MEIOSIS_KERNELS=native: Triton cannot be used on cpu: no compiler"):
                gpu.triton_kernels(mode, torch.device("cpu"))
            return
        with pytest.warns(RuntimeWarning, match="plain torch, several times slower than Triton kernels: no compiler"):
            assert gpu.triton_kernels(mode, torch.device("cpu")) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert gpu.triton_kernels(mode, torch.device("cpu")) is None
    finally:
        gpu.triton_kernels.cache_clear()


def broken() -> ModuleType:
    """Kernels whose first launch fails, as on a machine without a C compiler."""

    class Kernel:
        def __getitem__(self, grid: object) -> Any:
            raise RuntimeError("no compiler\nmore")

    module = ModuleType("search.merge.kernels.triton_kernels")
    module.weighted_sum = Kernel()  # type: ignore[attr-defined]
    return module
