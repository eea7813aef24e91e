"""Weights stored in 8-bit floating point, with scales beside them, read as ordinary numbers.

Policy: an fp8 tensor is multiplied by its scale in float32 when it is read, and the scale is no tensor of
the model any more. Scales may be one number, one per row, or one per block (128 x 128 with DeepSeek).
fp8 without a scale are plain numbers (Micikevicius 2022, https://arxiv.org/abs/2209.05433). Outputs that
take after such a tensor are bfloat16; nothing is written in fp8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from search.checkpoints.header import quoted
from search.checkpoints.view import Maker, Spec, View
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from search.checkpoints.reading import Checkpoint
    from search.merge.sources import TensorSource

STORED_AS = "BF16"
"""What a merged tensor is stored in that takes after one in fp8."""

FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

SCALES = ("_scale_inv", "_scale")
"""What the name of a scale adds to that of its tensor. Both multiply: the `inv` was inverse when quantising."""

OF_ACTIVATIONS = (".input_scale", ".input_scale_inv", ".activation_scale", ".activation_scale_inv", ".output_scale")
OF_CACHE = (".k_scale", ".v_scale", ".q_scale", ".prob_output_scale")
"""Scales of numbers that are made while the model runs: they mean nothing where it runs in other dtypes."""

BLOCK = (128, 128)
"""Block of the scales where the config does not say."""


def fp8_faults(checkpoint: Checkpoint) -> Iterator[str]:
    """Why the numbers of a quantised model cannot be read; nothing for one in fp8 or not quantised."""
    settings = quantisation(checkpoint.config)
    if settings and not _readable(settings):
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        yield (
            f"is quantised ({quoted(method)}), its numbers cannot be averaged; dequantise it first "
            "(of quantised models, those in fp8 are read)"
        )


def quantisation(config: Mapping[str, Any]) -> Any:
    """The config's `quantization_config`, wherever it stands; None where there is none."""
    inner = config.get("text_config")
    nested = inner.get("quantization_config") if isinstance(inner, dict) else None
    return config.get("quantization_config") or nested


def _readable(settings: Any) -> bool:
    if not isinstance(settings, dict):
        return False
    match settings.get("quant_method"):
        case "fp8" | "fbgemm_fp8":
            return True
        case "modelopt":
            return settings.get("quant_algo") == "FP8"
        case "compressed-tensors":
            return settings.get("format") in ("float-quantized", "naive-quantized") and all(
                _eight_bit_float(group) for group in (settings.get("config_groups") or {}).values()
            )
        case _:
            return False


def _eight_bit_float(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, dict) else None
    return not weights or (weights.get("type"), weights.get("num_bits")) == ("float", 8)


def dequantised(view: View) -> View:
    """The view with fp8 weights as numbers, without their scales and without `quantization_config`.

    Raises:
        CheckpointError: another kind of quantisation, or a scale that is missing or does not fit.
    """
    for fault in fp8_faults(view.checkpoint):
        raise CheckpointError(f"{view.folder}: {fault}")
    settings = quantisation(view.config)
    makers: dict[str, tuple[Spec, Maker]] = {}
    gone: list[str] = []
    for name, spec in view.tensors.items():
        if spec.dtype not in FP8:
            continue
        scale = next((name + ending for ending in SCALES if name + ending in view.tensors), None)
        if scale is None and settings and name.endswith("weight"):
            raise CheckpointError(
                f"{view.folder}: tensor {quoted(name)} is quantised to fp8, but its scale "
                f"{quoted(name + SCALES[1])} is missing; copy or download the model again"
            )
        blocks = _blocks(view, name, spec, scale, settings)
        makers[name] = (Spec(STORED_AS, spec.shape), _reader(name, scale, blocks))
        stem = name.rpartition(".")[0]
        gone += [scale] if scale else []
        gone += [stem + ending for ending in OF_ACTIVATIONS if stem + ending in view.tensors]
    if settings:
        gone += [name for name, spec in view.tensors.items() if name.endswith(OF_CACHE) and math.prod(spec.shape) == 1]
        view = replace(view, config=_without_quantisation(view.config))
    return view.having(makers, gone) if makers or gone else view


def _without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(inner := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in inner.items() if key != "quantization_config"}
    return plain


def _blocks(view: View, name: str, spec: Spec, scale: str | None, settings: Any) -> tuple[int, ...]:
    """Elements of the tensor that share an element of the scale, for every dimension; checks that it fits."""
    if scale is None or math.prod(view.tensors[scale].shape) == 1:
        return ()
    shape, theirs = spec.shape, view.tensors[scale].shape
    if len(theirs) < len(shape):  # (rows,) for (rows, columns)
        theirs = (*theirs, *(1,) * (len(shape) - len(theirs)))
    given = settings.get("weight_block_size") if isinstance(settings, dict) else None
    size = tuple(given) if isinstance(given, list) and len(given) == 2 else BLOCK
    wanted = (*(1,) * (len(shape) - 2), *size)[-len(shape) :] if shape else ()
    blocks = tuple(
        max(n, 1) if m == 1 else 1 if m == n else block for n, m, block in zip(shape, theirs, wanted, strict=False)
    )
    fits = len(theirs) == len(shape) and all(
        -(-n // block) == m for n, m, block in zip(shape, theirs, blocks, strict=True) if n
    )
    if not fits:
        raise CheckpointError(
            f"{view.folder}: the scale {quoted(scale)} has shape {list(view.tensors[scale].shape)}, expected "
            f"one number, one per row, or one per block of {size[0]} x {size[1]} for shape {list(shape)}; "
            "download the model again, or dequantise it with the library that made it"
        )
    return blocks


def _reader(name: str, scale: str | None, blocks: tuple[int, ...]) -> Maker:
    def read(source: TensorSource) -> Tensor:
        import torch

        values = source.get(name).to(torch.float32)
        if scale is None:
            return values
        factors = source.get(scale).to(torch.float32)
        return values.mul_(factors.reshape(())) if not blocks else _scaled(values, factors, blocks)

    return read


def _scaled(values: Tensor, factors: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """`values` times a factor for each block, in place and without factors of its size in memory."""
    grid = [-(-n // block) for n, block in zip(values.shape, blocks, strict=True)]
    factors = factors.reshape(grid)
    for dimension, (n, block) in enumerate(zip(values.shape, blocks, strict=True)):
        if dimension < values.ndim - 1 and block > 1:
            factors = factors.repeat_interleave(block, dimension).narrow(dimension, 0, n)
    last = blocks[-1]
    if last == 1:
        return values.mul_(factors)
    for index in range(grid[-1]):
        part = values.narrow(-1, index * last, min(last, values.shape[-1] - index * last))
        part.mul_(factors.narrow(-1, index, 1))
    return values
