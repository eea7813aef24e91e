"""Safetensors files, single or sharded, written tensor by tensor straight from memory.

The library's own writer makes its files private to the user, refuses tensors that share memory, and
hides a full disk in an error of its own; the format is eight bytes, a line of JSON and the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.checkpoints.fingerprint import CHUNK_BYTES, count_non_finite
from search.checkpoints.header import ITEM_BYTES, is_floating, quoted
from search.checkpoints.reading import INDEX, WEIGHTS
from search.checkpoints.tensor_bytes import TORCH_NAMES, dtype_name, tensor_bytes
from search.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One tensor to write."""

    name: str
    dtype: str
    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def nbytes(self) -> int:
        return int(self.tensor.numel()) * ITEM_BYTES[self.dtype]

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


Written = list[tuple[str, str, tuple[int, ...], str]]
"""(name, dtype, shape, sha256 of the bytes) of every tensor."""


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


def write_weights(entries: Iterable[Entry], folder: Path, max_shard_bytes: int) -> Written:
    """Write the shards, and the index if there are several."""
    written: Written = []
    shards: list[list[str]] = []
    total = 0

    def flush(batch: Sequence[Entry]) -> None:
        shards.append([entry.name for entry in batch])
        written.extend(_write_shard(batch, folder / f"shard-{len(shards)}"))

    batch: list[Entry] = []
    batch_bytes = 0
    for entry in entries:
        if batch and batch_bytes + entry.nbytes > max_shard_bytes:
            flush(batch)
            batch, batch_bytes = [], 0
        batch.append(entry)
        batch_bytes += entry.nbytes
        total += entry.nbytes
    flush(batch)
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


def _write_shard(batch: Sequence[Entry], path: Path) -> Written:
    """One safetensors file. Wide dtypes come first, so that every tensor is aligned to its elements."""
    ordered = sorted(batch, key=lambda entry: -ITEM_BYTES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in ordered:
        offsets = [end, end + entry.nbytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        end += entry.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written: Written = []

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for entry in ordered:
            data = entry.bytes()
            written.append((entry.name, entry.dtype, entry.shape, hashlib.sha256(data).hexdigest()))
            yield data

    write_file(path, parts())
    return written


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file and wait until it is on the disk. `open` leaves the mode to the user's umask."""
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
