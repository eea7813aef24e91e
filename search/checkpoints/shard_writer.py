"""Safetensors files, single or sharded, written tensor by tensor straight from memory.

The library's own writer wants all tensors at once, makes its files private to the user, refuses tensors
that share memory, and hides a full disk in an error of its own; the format is eight bytes, a line of
JSON and the data. Where names, dtypes and shapes are known beforehand, the header goes first and every
tensor follows when it is there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.checkpoints.byte_progress import Meter
from search.checkpoints.fingerprint import CHUNK_BYTES, count_non_finite
from search.checkpoints.header import ITEM_BYTES, is_floating, quoted
from search.checkpoints.reading import INDEX, WEIGHTS
from search.checkpoints.tensor_bytes import TORCH_NAMES, dtype_name, tensor_bytes
from search.checkpoints.write_pipeline import WritePipeline, WrittenTensor
from search.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""Bytes of the tensors of one file, as stock transformers splits models."""

Written = Sequence[WrittenTensor]


@dataclass(frozen=True)
class Planned:
    """A tensor to be written, before it is there. `dtype` as in safetensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Entry:
    """One tensor to write."""

    name: str
    dtype: str
    tensor: Tensor

    @property
    def planned(self) -> Planned:
        return Planned(self.name, self.dtype, tuple(self.tensor.shape))

    def bytes(self) -> memoryview:
        """The elements in the dtype to be written.

        Raises:
            UserError: a finite value became infinite or NaN, because the dtype is too narrow for it.
        """
        import torch

        data = tensor_bytes(self.tensor.detach().to(getattr(torch, TORCH_NAMES[self.dtype])))
        before = dtype_name(self.tensor)
        if self.dtype != before:
            lost = _non_finite(data, self.dtype) - _non_finite(tensor_bytes(self.tensor), before)
            if lost > 0:
                raise UserError(
                    f"tensor {quoted(self.name)}: {lost} values do not fit into {TORCH_NAMES[self.dtype]}; "
                    "write the model in bfloat16 or float32"
                )
        return data


def _non_finite(data: memoryview, dtype: str) -> int:
    chunks = (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
    return sum(sum(count_non_finite(chunk, dtype)) for chunk in chunks)


def entries(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], target: str | None) -> Iterator[Entry]:
    """What to write, in the order given; floating-point tensors in the `target` dtype, if there is one.

    Raises:
        ValueError: a tensor comes twice, or in a dtype that safetensors lacks.
    """
    seen: set[str] = set()
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if name in seen or name == "__metadata__":
            raise ValueError(f"tensor {name!r} comes twice, or has a name that safetensors keeps for itself")
        seen.add(name)
        dtype = dtype_name(tensor)
        yield Entry(name, target if target and is_floating(dtype) else dtype, tensor)


def split(layout: Iterable[Planned], max_shard_bytes: int) -> Iterator[list[Planned]]:
    """Tensors by shard, filled in order; one that is larger than a shard gets its own."""
    batch: list[Planned] = []
    batch_bytes = 0
    for planned in layout:
        if batch and batch_bytes + planned.nbytes > max_shard_bytes:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(planned)
        batch_bytes += planned.nbytes
    yield batch


def write_weights(
    entries: Iterable[Entry],
    folder: Path,
    max_shard_bytes: int,
    *,
    layout: Sequence[Planned] | None = None,
    finite: bool = False,
    meter: Meter | None = None,
) -> Written:
    """Write the shards, and the index if there are several.

    Args:
        layout: the entries' names, dtypes and shapes, in their order. With it a few tensors are in memory
            at a time; without it a whole shard.
        finite: whether NaN and infinity are refused.

    Raises:
        ValueError: an entry is not what the layout says.
    """
    shards: list[list[str]] = []
    total = 0
    parts = _planned(entries, layout, max_shard_bytes) if layout is not None else _buffered(entries, max_shard_bytes)
    limit = 2 * max((planned.nbytes for planned in layout or ()), default=max_shard_bytes)
    with WritePipeline(limit, finite=finite, meter=meter) as pipeline:
        for plan, stream in parts:
            shards.append([planned.name for planned in plan])
            total += sum(planned.nbytes for planned in plan)
            _write_shard(plan, stream, folder / f"shard-{len(shards)}", pipeline)
        written = pipeline.finish()
    if len(shards) == 1:
        (folder / "shard-1").rename(folder / WEIGHTS)
        return written
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX, [json.dumps(index, indent=2).encode()])
    return written


_Part = tuple[list[Planned], Iterable[Entry]]
"""The plan of a shard, and its tensors."""


def _planned(entries: Iterable[Entry], layout: Sequence[Planned], max_shard_bytes: int) -> Iterator[_Part]:
    stream = iter(entries)
    for plan in split(layout, max_shard_bytes):
        yield plan, itertools.islice(stream, len(plan))
    for extra in stream:
        raise ValueError(f"tensor {extra.name!r} comes, though the layout does not have it")


def _buffered(entries: Iterable[Entry], max_shard_bytes: int) -> Iterator[_Part]:
    batch: list[Entry] = []
    batch_bytes = 0
    for entry in entries:
        if batch and batch_bytes + entry.planned.nbytes > max_shard_bytes:
            yield [one.planned for one in batch], batch
            batch, batch_bytes = [], 0
        batch.append(entry)
        batch_bytes += entry.planned.nbytes
    yield [one.planned for one in batch], batch


def _write_shard(plan: Sequence[Planned], stream: Iterable[Entry], path: Path, pipeline: WritePipeline) -> None:
    """One safetensors file. Wide dtypes come first, so that every tensor is aligned to its elements."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for planned in sorted(plan, key=lambda planned: -ITEM_BYTES[planned.dtype]):
        offsets = [end, end + planned.nbytes]
        header[planned.name] = {"dtype": planned.dtype, "shape": list(planned.shape), "data_offsets": offsets}
        end += planned.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the umask narrows it
    try:
        done = 0
        while done < len(text):
            done += os.write(descriptor, text[done:])
        count = 0
        for planned, entry in zip(plan, stream, strict=False):
            if entry.planned != planned:
                raise ValueError(f"found {entry.planned}, the layout says {planned}")
            place = len(text) + header[planned.name]["data_offsets"][0]
            pipeline.put(planned.name, planned.dtype, planned.shape, entry.bytes(), descriptor, place)
            count += 1
        if count != len(plan):
            raise ValueError(f"tensor {plan[count].name!r} does not come, though the layout has it")
    finally:
        pipeline.close_file(descriptor)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file and wait until it is on the disk. `open` leaves the mode to the user's umask."""
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
