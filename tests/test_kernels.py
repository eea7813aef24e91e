"""Native kernels give the bits of plain torch, and where they cannot be had this is said."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from search.errors import UserError
from search.merge.apply import Merger
from search.merge.kernels import build, chosen_mode, description, library, threads
from search.merge.kernels.native import Stored, plan
from search.merge.kernels.passes import SAMPLED_ELEMENTS
from search.merge.operator import Apply, Block
from search.merge.sources import InMemoryTensors
from search.recipe import Recipe
from search.registry import OPERATORS

torch.set_num_threads(1)

try:
    WITH_COMPILER = build.built() is not None
except build.NoKernelsError:
    WITH_COMPILER = False

native_only = pytest.mark.skipif(not WITH_COMPILER, reason="needs a C++ compiler")

FAST = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
TRIMMED = ("breadcrumbs", "breadcrumbs_ties", "della", "della_linear")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


def models_of(count: int, size: int, dtypes: list[str], *, coarse: bool = False) -> dict[str, Tensor]:
    """A base and `count` models near it. Coarse ones have many equal differences, and zeros of both signs."""
    generator = torch.Generator().manual_seed(size + count)
    base = torch.randn(size, generator=generator)
    if coarse:
        base = (base * 2).round() / 2 * torch.where(torch.rand(size, generator=generator) < 0.5, -1.0, 1.0)
    models = {"base": base}
    for index in range(count):
        step = torch.randn(size, generator=generator)
        models[f"m{index}"] = base + ((step * 2).round() / 4 if coarse else 0.1 * step)
    return {name: tensor.to(DTYPES[dtypes[index % len(dtypes)]]) for index, (name, tensor) in enumerate(models.items())}


def recipe_of(operator: str, sources: dict[str, dict[str, Any]], shared: dict[str, Any], **more: Any) -> Recipe:
    names = ("base", *sources)
    return Recipe.from_data(
        {
            "base": "base",
            "models": {name: {"path": name} for name in names},
            "rules": [{"operator": operator, "sources": sources, "parameters": shared}],
            **more,
        }
    )


def bits(tensor: Tensor) -> Tensor:
    """What lies in memory; NaNs may differ in theirs."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return torch.where(tensor.isnan(), torch.ones_like(tensor), tensor).view(width)


def merge(recipe: Recipe, models: dict[str, Tensor], target: Tensor, kernels: Any) -> Tensor:
    engine = Merger({name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()}, kernels=kernels)
    engine.merge_into(recipe, {"w": target})
    return target


@st.composite
def cases(draw: st.DrawFn) -> tuple[Recipe, dict[str, Tensor], torch.dtype]:
    operator = draw(st.sampled_from(FAST + TRIMMED))
    known = {parameter.name: parameter for parameter in OPERATORS.get(operator).parameters}
    count = 2 if operator == "slerp" else draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9]))
    size = draw(st.sampled_from([1, 15, 16, 17, 1000, 1024, 1040, 3000, 5 * 1024]))
    dtypes = draw(
        st.sampled_from([["f32"], ["bf16"], ["f16"], ["f32", "bf16", "f16"], ["bf16", "f32"], ["f64", "f32"]])
    )
    weights = st.one_of(st.sampled_from([0.0, -0.5, 1.0]), st.floats(-2, 2, width=32))
    densities = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 3 / 1024]), st.floats(0, 1))
    sources: dict[str, dict[str, Any]] = {f"m{index}": {} for index in range(count)}
    for values in sources.values():
        if "weight" in known:
            values["weight"] = draw(weights)
        if "density" in known:
            # DELLA's probabilities lie 0.15 around the density.
            values["density"] = draw(st.floats(0.2, 0.8) if operator.startswith("della") else densities)
    if operator == "linear":  # which divides by the sum of its weights
        assume(abs(sum(values["weight"] for values in sources.values())) > 1e-3)
    shared: dict[str, Any] = {
        name: draw(st.booleans()) for name in ("normalize", "rescale") if name in known and draw(st.booleans())
    }
    if "lambda" in known:
        shared["lambda"] = draw(st.sampled_from([1.0, 0.7, -1.3]))
    if "t" in known:
        shared["t"] = draw(st.floats(-0.5, 1.5))
    recipe = recipe_of(
        operator,
        sources,
        shared,
        seed=draw(st.integers(0, 3)),
        dtype=draw(st.sampled_from([None, None, "bfloat16", "float16"])),
        compute=draw(st.sampled_from(["float32", "float32", "inputs"])),
    )
    models = models_of(count, size, dtypes, coarse=draw(st.booleans()))
    return recipe, models, DTYPES[draw(st.sampled_from(list(DTYPES)))]


@native_only
@given(case=cases())
@settings(max_examples=250, deadline=None)
def test_native_kernels_give_the_bits_of_plain_torch(case: tuple[Recipe, dict[str, Tensor], torch.dtype]) -> None:
    recipe, models, dtype = case
    size = models["base"].numel()
    found = merge(recipe, models, torch.full((size,), 7.0, dtype=dtype), "native")
    wanted = merge(recipe, models, torch.full((size,), 5.0, dtype=dtype), "torch")
    assert torch.equal(bits(found), bits(wanted))


@native_only
@pytest.mark.parametrize(
    ("operator", "dtype", "compute"),
    [
        *((operator, dtype, "float32") for operator in FAST for dtype in ("f32", "bf16")),
        *((operator, "bf16", "inputs") for operator in (*FAST, *TRIMMED) if operator != "slerp"),
    ],
)
def test_native_kernels_are_what_merges_these_operators(operator: str, dtype: str, compute: str) -> None:
    models = models_of(2, 2048, [dtype])
    values = {
        p.name: 0.1 if p.name in ("gamma", "epsilon") else 0.5
        for p in OPERATORS.get(operator).parameters
        if p.scope == "source"
    }
    shared = {"t": 0.3} if operator == "slerp" else {}
    engine = Merger({name: InMemoryTensors({"w": tensor}) for name, tensor in models.items()}, kernels="native")
    calls = []
    merge_at_once = engine._merge_at_once
    engine._merge_at_once = lambda *given: calls.append(merge_at_once(*given)) or calls[-1]  # type: ignore[method-assign]
    recipe = recipe_of(operator, {"m0": values, "m1": values}, shared, compute=compute, seed=0)
    engine.merge_into(recipe, {"w": models["base"].clone()})
    assert calls == [True]


@native_only
@pytest.mark.parametrize("coarse", [False, True], ids=["near", "coarse"])
@pytest.mark.parametrize("compute", ["float32", "inputs"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("operator", ["ties", "dare_ties", *TRIMMED])
def test_large_tensors_have_the_bits_of_plain_torch_on_any_number_of_threads(
    operator: str, dtype: str, compute: str, coarse: bool
) -> None:
    size = SAMPLED_ELEMENTS + 1337
    models = models_of(2, size, [dtype], coarse=coarse)
    gammas = {"gamma": 0.02} if operator.startswith("breadcrumbs") else {}
    sources = {"m0": {"weight": 0.7, "density": 0.3, **gammas}, "m1": {"weight": -0.4, "density": 0.61, **gammas}}
    recipe = recipe_of(operator, sources, {}, compute=compute, seed=2)
    target = DTYPES[dtype]
    wanted = merge(recipe, models, torch.empty(size, dtype=target), "torch")
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            found = merge(recipe, models, torch.empty(size, dtype=target), "native")
        finally:
            torch.set_num_threads(1)
        assert torch.equal(bits(found), bits(wanted))


@native_only
@pytest.mark.parametrize("operator", FAST)
def test_bits_do_not_depend_on_threads_block_size_or_strides(operator: str) -> None:
    size = 2 * threads.PART_ELEMENTS + 3 * 1024 + 5
    models = models_of(2, size, ["bf16"], coarse=True)
    values = {p.name: 0.4 for p in OPERATORS.get(operator).parameters if p.scope == "source"}
    recipe = recipe_of(operator, {"m0": values, "m1": values}, {"t": 0.3} if operator == "slerp" else {}, seed=5)
    wanted = merge(recipe, models, torch.zeros(size, dtype=torch.bfloat16), "torch")
    torch.set_num_threads(2)
    try:
        found = merge(recipe, models, torch.zeros(size, dtype=torch.bfloat16), "native")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, wanted)
    strided = torch.zeros(size, 2, dtype=torch.bfloat16)[:, 0]
    assert torch.equal(merge(recipe, models, strided, "native"), wanted)
    odd = torch.zeros(size + 3, dtype=torch.bfloat16)[3:]  # not where vectors like to lie
    shifted = {name: torch.cat([tensor[:1], tensor])[1:] for name, tensor in models.items()}
    assert torch.equal(merge(recipe, shifted, odd, "native"), wanted)


@native_only
def test_masks_of_the_kernels_go_on_beyond_a_segment() -> None:
    size = (1 << 20) + 5000
    models = models_of(1, size, ["f32"])
    recipe = recipe_of("dare_linear", {"m0": {"weight": 1.0, "density": 0.3}}, {})
    found = merge(recipe, models, torch.zeros(size), "native")
    assert torch.equal(found, merge(recipe, models, torch.zeros(size), "torch"))


@native_only
def test_a_native_write_counts_as_a_write_of_torch() -> None:
    models = models_of(2, 2048, ["f32"])
    target = torch.zeros(2048)
    before = target._version
    merge(recipe_of("linear", {"m0": {"weight": 1.0}, "m1": {"weight": 1.0}}, {}), models, target, "native")
    assert target._version > before
    with torch.inference_mode():
        inference = torch.zeros(2048)
    merge(recipe_of("linear", {"m0": {"weight": 1.0}, "m1": {"weight": 1.0}}, {}), models, inference, "native")
    assert torch.equal(inference, target)


def _covered() -> list[tuple[int, int]]:
    parts: list[tuple[int, int]] = []
    threads.run_in_parts(2 * threads.PART_ELEMENTS, lambda start, stop: parts.append((start, stop)))
    return sorted(parts)


def _in_a_child(results: Any) -> None:
    results.put(_covered())


def test_a_process_forked_after_threads_ran_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    try:
        wanted = _covered()
        assert wanted == [(0, threads.PART_ELEMENTS), (threads.PART_ELEMENTS, 2 * threads.PART_ELEMENTS)]
        context = multiprocessing.get_context("fork")
        results: Any = context.Queue()
        child = context.Process(target=_in_a_child, args=(results,))
        child.start()
        assert results.get(timeout=60) == wanted
        child.join()
    finally:
        torch.set_num_threads(1)


def test_what_a_part_raises_passes_through() -> None:
    def work(start: int, stop: int) -> None:
        if start:
            raise OSError("the second part")

    torch.set_num_threads(2)
    try:
        with pytest.raises(OSError, match="the second part"):
            threads.run_in_parts(2 * threads.PART_ELEMENTS, work)
    finally:
        torch.set_num_threads(1)


def test_what_kernels_do_not_know_is_left_to_torch() -> None:
    class Other:
        def __call__(self, block: Block, out: Tensor) -> None:
            raise AssertionError

    values = torch.zeros(4)
    other: Apply = Other()
    assert plan("torch", other, Stored((values,), None), torch.float32, None) is None


# --- where there is no compiler


def in_a_process(code: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[1]
    clean = {key: value for key, value in os.environ.items() if key not in ("CXX", "MEIOSIS_KERNELS")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        env={**clean, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path), **environment},
    )


LOAD = "from search.merge.kernels.library import library; print(library('{}'))"


def compiler_in(tmp_path: Path, text: str) -> str:
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_merges_run_in_torch_and_say_so(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    code = "from search.merge.kernels import description; print(description()); " + LOAD.format("auto")
    said = in_a_process(code, tmp_path, PATH=str(tmp_path / "bin"))
    assert said.stdout.splitlines() == [
        "plain torch, several times slower than native kernels: no C++ compiler (c++, g++ or clang++) was found; "
        "install one or name it in CXX",
        "None",
    ]
    assert said.stderr.count("merges run in plain torch, several times slower than native kernels") == 1


def test_a_compiler_that_fails_is_quoted_and_merges_run_in_torch(tmp_path: Path) -> None:
    text = 'case "$1" in --version) echo "odd 1.0";; *) echo "cpu.cpp:1: error: too new" >&2; exit 1;; esac'
    said = in_a_process(LOAD.format("auto"), tmp_path, CXX=compiler_in(tmp_path, text))
    assert said.stdout.strip() == "None"
    assert "odd 1.0 cannot compile the kernels: cpu.cpp:1: error: too new" in said.stderr
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".so", ".part")]


def test_native_kernels_that_were_asked_for_and_cannot_be_had_are_an_error(tmp_path: Path) -> None:
    said = in_a_process(LOAD.format("native"), tmp_path, CXX=str(tmp_path / "missing"))
    assert "UserError: MEIOSIS_KERNELS=native: the compiler of CXX" in said.stderr


@native_only
def test_workers_that_start_together_compile_once(tmp_path: Path) -> None:
    real = build.find_compiler().command[0]
    log = tmp_path / "log"
    text = f'case "$1" in --version) echo "counting 1.0";; *) echo compiled >> {log}; exec {real} "$@";; esac'
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": compiler_in(tmp_path, text)}
    code = "from search.merge.kernels.build import built; print(built())"
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code]
    workers = [
        subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {worker.communicate()[0] for worker in workers}
    assert len(said) == 1
    assert log.read_text().splitlines() == ["compiled"]
    assert Path(said.pop().strip()).parent == tmp_path / "cache" / "meiosis" / "kernels"


def test_a_cache_folder_that_others_can_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_to_all = tmp_path / "cache" / "meiosis" / "kernels"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    assert build.cache_folder() == tmp_path / f"meiosis-kernels-{os.getuid()}"


def test_the_environment_chooses_and_typing_errors_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEIOSIS_KERNELS", "torch")
    assert chosen_mode() == "torch"
    assert description() == "plain torch (MEIOSIS_KERNELS=torch)"
    monkeypatch.setenv("MEIOSIS_KERNELS", "nativ")
    with pytest.raises(UserError, match="found 'nativ', expected one of auto, native, torch; did you mean 'native'"):
        chosen_mode()


def test_plain_torch_that_was_asked_for_needs_no_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.library("torch") is None
