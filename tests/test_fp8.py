"""Checkpoints in fp8 are read as the numbers they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from search.checkpoints.reading import open_checkpoint
from search.errors import CheckpointError
from search.export import merge_recipe
from search.recipe import Recipe
from search.sources import open_sources

torch.set_num_threads(1)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
FLOAT_QUANTIZED: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}}},
    }
}


def model(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["A"], "model_type": "a"} | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read(folder: Path) -> dict[str, torch.Tensor]:
    source = open_sources({"m": open_checkpoint(folder)}).tensors["m"]
    return {name: source.get(name) for name in source.names}


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    kind=st.sampled_from(["none", "number", "one", "rows", "rows 1", "blocks"]),
    dtype=st.sampled_from([E4M3, E5M2]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    ending=st.sampled_from(["_scale", "_scale_inv"]),
)
def test_every_element_is_its_number_times_the_scale_of_its_row_or_block(
    rows: int,
    columns: int,
    block: tuple[int, int],
    kind: str,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    ending: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    shapes = {
        "number": (),
        "one": (1,),
        "rows": (rows,),
        "rows 1": (rows, 1),
        "blocks": (-(-rows // block[0]), -(-columns // block[1])),
    }
    stored = numbers(rows, columns).to(dtype)
    tensors = {"x.weight": stored, "y.weight": torch.ones(3)}
    if kind != "none":
        scale = tensors[f"x.weight{ending}"] = (numbers(*shapes[kind], seed=1).abs() + 0.1).to(scale_dtype)
    config = {"quant_method": "fp8", "weight_block_size": list(block)} if kind != "none" else None
    folder = model(tmp_path_factory.mktemp("fp8") / "m", tensors, **({"quantization_config": config} if config else {}))
    found = read(folder)
    assert found.keys() == {"x.weight", "y.weight"}
    assert found["x.weight"].dtype == torch.float32
    for i in range(rows):
        for j in range(columns):
            factor = 1.0
            if kind in ("number", "one"):
                factor = float(scale)
            elif kind in ("rows", "rows 1"):
                factor = float(scale.reshape(-1)[i])
            elif kind == "blocks":
                factor = float(scale[i // block[0], j // block[1]])
            expected = torch.tensor(float(stored[i, j])) * torch.tensor(factor)
            assert float(found["x.weight"][i, j]) == float(expected)


def test_blocks_are_128_by_128_where_nothing_is_said_and_experts_may_be_stacked(tmp_path: Path) -> None:
    weight, scale = numbers(2, 200, 130).to(E4M3), numbers(2, 2, 2, seed=1).abs()
    folder = model(
        tmp_path / "m",
        {"x.weight": weight, "x.weight_scale_inv": scale},
        quantization_config={"quant_method": "fp8"},
    )
    full = scale.repeat_interleave(128, 1)[:, :200].repeat_interleave(128, 2)[:, :, :130]
    assert torch.equal(read(folder)["x.weight"], weight.float() * full)


def test_scales_of_activations_and_of_the_cache_are_no_tensors_of_the_model(tmp_path: Path) -> None:
    tensors = {
        "a.q_proj.weight": numbers(4, 4).to(E4M3),
        "a.q_proj.weight_scale": torch.tensor(0.5),
        "a.q_proj.input_scale": torch.tensor(0.1),
        "a.k_scale": torch.tensor(0.1),
        "a.norm.weight": torch.ones(4),
    }
    found = read(model(tmp_path / "m", tensors, **FLOAT_QUANTIZED))
    assert sorted(found) == ["a.norm.weight", "a.q_proj.weight"]


def test_a_scale_beside_other_numbers_than_fp8_is_a_tensor_like_any_other(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.ones(2), "x.weight_scale": torch.tensor(3.0)}
    assert sorted(read(model(tmp_path / "m", tensors))) == sorted(tensors)


def recipe(**paths: Path) -> Recipe:
    sources = {name: {"weight": 0.5} for name in paths}
    return Recipe.from_data(
        {
            "models": {name: {"path": str(path)} for name, path in paths.items()},
            "rules": [{"operator": "linear", "sources": sources}],
        }
    )


@pytest.mark.parametrize("first", ["fp8", "plain"])
def test_a_merge_with_a_model_in_fp8_is_that_of_its_numbers(first: str, tmp_path: Path) -> None:
    weight, scale = numbers(4, 6).to(E4M3), numbers(4, 1, seed=1).abs()
    norm = numbers(6, seed=2)
    fp8 = model(
        tmp_path / "fp8",
        {"x.weight": weight, "x.weight_scale": scale, "norm.weight": norm},
        torch_dtype="bfloat16",
        **FLOAT_QUANTIZED,
    )
    plain = model(tmp_path / "plain", {"x.weight": numbers(4, 6, seed=3), "norm.weight": norm}, torch_dtype="float32")
    paths = {"fp8": fp8, "plain": plain}
    order = dict(sorted(paths.items(), reverse=first == "plain"))
    out = merge_recipe(recipe(**order), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    expected = (weight.float() * scale + numbers(4, 6, seed=3)) / 2
    # bfloat16 where the donor has fp8, otherwise what the donor has.
    assert found["norm.weight"].dtype == torch.float32
    dtype = torch.bfloat16 if first == "fp8" else torch.float32
    assert found["x.weight"].dtype == dtype
    torch.testing.assert_close(found["x.weight"], expected.to(dtype), rtol=1e-6 if first == "plain" else 0, atol=0)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == ("bfloat16" if first == "fp8" else "float32")


def test_a_dtype_in_the_recipe_holds_for_donors_in_fp8_too(tmp_path: Path) -> None:
    weight = numbers(4, 6).to(E5M2)
    folder = model(tmp_path / "m", {"x.weight": weight})
    out = merge_recipe(recipe(m=folder).model_copy(update={"dtype": "float32"}), tmp_path / "out")
    assert torch.equal(load_file(out / "model.safetensors")["x.weight"], weight.float())


WEIGHT = {"x.weight": torch.ones(4, 6).to(E4M3)}


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        (WEIGHT, FP8, "tensor 'x.weight' is quantised to fp8, but its scale 'x.weight_scale' is missing"),
        (WEIGHT | {"x.weight_scale": torch.ones(3)}, FP8, "'x.weight_scale' has shape [3], expected one number"),
        (WEIGHT | {"x.weight_scale_inv": torch.ones(2, 2)}, FP8, "one per block of 128 x 128 for shape [4, 6]"),
        (WEIGHT, {"quantization_config": {"quant_method": "gptq"}}, "is quantised ('gptq'), its numbers cannot"),
        (WEIGHT, {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A8"}}, "quantised ('modelopt')"),
        (
            WEIGHT,
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "is quantised ('compressed-tensors')",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_as_numbers_is_one_line(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    bad = model(tmp_path / "bad", tensors, **config)
    good = model(tmp_path / "good", {"x.weight": torch.ones(4, 6)})
    for paths in ({"good": good, "bad": bad}, {"bad": bad, "good": good}, {"bad": bad}):
        with pytest.raises(CheckpointError) as caught:
            merge_recipe(recipe(**paths), tmp_path / "out")
        (line,) = str(caught.value).splitlines()
        assert expected in line
        assert str(bad) in line or "the base" in line
