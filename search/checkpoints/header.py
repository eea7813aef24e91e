"""Headers of safetensors files, read strictly and without torch.

A file is 8 bytes with the length of the header (little endian), the header as JSON, and the data.
The safetensors library checks the same things, but answers with one error for many damages and no
file name; here every damage has its own line, before a worker is started.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from search.errors import CheckpointError, nearest

HEADER_LIMIT_BYTES = 100_000_000
"""Longest header that the safetensors library accepts."""

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes per element of every dtype that is read."""

PACKED_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
"""dtypes of less than a byte: they exist in quantised checkpoints, which cannot be merged."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        dtype: as in safetensors: `F32`, `BF16`, ...
        start, stop: byte offsets in `file`, counted from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def floating(self) -> bool:
        """Whether the elements are real floating-point numbers."""
        return is_floating(self.dtype)


def is_floating(dtype: str) -> bool:
    """Whether a safetensors dtype is a real floating-point type (`C64` is not)."""
    return dtype.startswith(("F", "BF"))


def quoted(name: object) -> str:
    """A name from a file as a message can hold it: escaped, on one line, at most about 80 characters."""
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-16:]}"


def damage(path: Path, found: str, way_out: str = "copy or download the file again") -> CheckpointError:
    """The error for one damaged file: what was found in it (and expected), and what to do."""
    return CheckpointError(f"{path}: {found}; {way_out}")


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that the system does not let us read."""
    return damage(path, f"cannot be read ({error.strerror})", "make it readable or give another copy")


def file_size(path: Path) -> int:
    """Bytes of a file that a checkpoint consists of.

    Raises:
        CheckpointError: it is no regular file; a pipe or a device would hang whoever reads it.
        OSError: it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise damage(path, "is not a regular file", "put the file itself there")
    return status.st_size


class RepeatedKeyError(ValueError):
    """A JSON object that has a key twice; the argument is the key."""


def parse_json(data: bytes) -> Any:
    """JSON as strict as the safetensors library reads it, with repeated keys refused.

    Raises:
        RepeatedKeyError: an object has the same key twice.
        ValueError: not UTF-8, or not JSON; the message says why in a few words.
    """

    def no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise RepeatedKeyError(key)
            found[key] = value
        return found

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_repeats, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg.removesuffix(' at')} at character {error.pos}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor name -> where it lies, for one safetensors file, sorted by name.

    Reads the header only: the cost does not grow with the data.

    Raises:
        CheckpointError: the file cannot be read, or is damaged in any way that its header can show.
    """
    try:
        size = file_size(path)
        with path.open("rb") as file:
            header = _header_bytes(path, file, size)
    except OSError as error:
        raise cannot_read(path, error) from error
    try:
        if not header.startswith(b"{"):
            raise ValueError("it does not begin with '{'")
        entries = parse_json(header)
    except RepeatedKeyError as error:
        found = f"the header has {quoted(error.args[0])} twice, expected every name once"
        raise damage(path, found, "write the file again") from error
    except ValueError as error:
        raise damage(path, f"the header is not JSON ({error})") from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damage(path, "__metadata__ in the header does not map text to text", "write the file again")
    data_start = 8 + len(header)
    tensors = {name: _tensor(path, name, entries[name], data_start) for name in sorted(entries)}
    _check_layout(path, tensors.values(), data_start, size)
    return tensors


def header_sha256(path: Path) -> str:
    """sha256 of the 8 bytes of length and the header: tells files apart without reading their data.

    Raises:
        CheckpointError: as `read_header`, for a file without a complete header.
        OSError: the file cannot be read.
    """
    size = file_size(path)
    with path.open("rb") as file:
        header = _header_bytes(path, file, size)
    return hashlib.sha256(len(header).to_bytes(8, "little") + header).hexdigest()


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    if size == 0:
        raise damage(path, "is empty (0 bytes), expected a safetensors file")
    first = file.read(8)
    if first == b"version ":
        raise damage(path, "is a Git LFS pointer, not the weights", "run `git lfs pull` in its repository")
    length = int.from_bytes(first, "little")
    # A header of 640 or 1152 bytes also begins with the bytes of a pickle, but then zeros follow.
    pickled = first.startswith((b"\x80\x02", b"\x80\x04")) and length > HEADER_LIMIT_BYTES
    if pickled or first.startswith(b"PK\x03\x04"):
        found = "is a PyTorch pickle under the name of a safetensors file, and pickle is never loaded"
        raise damage(path, found, "convert the model with save_pretrained(safe_serialization=True)")
    if len(first) < 8:
        raise damage(path, f"has {len(first)} bytes, the length of the header alone takes 8")
    if not 2 <= length <= HEADER_LIMIT_BYTES:
        found = f"absurd header length of {length} bytes, expected 2 to {HEADER_LIMIT_BYTES}"
        raise damage(path, found, "is this a safetensors file? If so, copy or download it again")
    if 8 + length > size:
        raise damage(path, f"truncated in the header: it ends at byte {8 + length}, the file at byte {size}")
    header = file.read(length)
    if len(header) < length:
        raise damage(path, "became shorter while it was read", "wait until it is written and try again")
    return header


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    where = f"tensor {quoted(name)}"
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise damage(path, f"{where} has a name that is not Unicode text", "rename it") from error
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        found = quoted(sorted(entry) if isinstance(entry, dict) else entry)
        raise damage(path, f"{where} has {found} in the header, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in PACKED_DTYPES:
        raise damage(path, f"{where} has dtype {dtype}, which cannot be merged", "dequantise the model first")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{path}: {where} has unknown dtype {quoted(dtype)}{nearest(str(dtype), ITEM_BYTES)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise damage(path, f"{where} has shape {quoted(shape)}, expected a list of whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise damage(path, f"{where} has data_offsets {quoted(offsets)}, expected [start, stop]")
    start, stop = offsets
    if not 0 <= start <= stop:
        raise damage(path, f"{where} has data_offsets {quoted(offsets)}, expected 0 <= start <= stop")
    # The library multiplies in 64 bits, from left to right, and fails on what does not fit.
    needed = ITEM_BYTES[dtype]
    for n in shape:
        needed *= n
        if n >= 1 << 60 or needed >= 1 << 60:
            raise damage(path, f"{where} has shape {quoted(shape)}, which no memory can hold")
    if needed != stop - start:
        found = f"{where} takes {stop - start} bytes, but {dtype} of shape {quoted(shape)} needs {needed}"
        raise damage(path, found)
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, data_start + stop)


def _check_layout(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """The tensors fill the data from its first byte to its last, each byte belonging to one of them."""
    end, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        this = f"tensor {quoted(tensor.name)}"
        if tensor.start < end:
            found = f"{this} overlaps {before} by {end - tensor.start} bytes"
            raise damage(path, f"{found}, expected data of its own")
        if tensor.start > end:
            found = f"{tensor.start - end} bytes between {before} and {this} belong to no tensor"
            raise damage(path, f"{found}, expected no hole")
        end, before = tensor.stop, this
    if end > size:
        raise damage(path, f"truncated in the data: has {size} bytes, expected {end} by its header")
    if end < size:
        raise damage(path, f"{size - end} bytes follow the last tensor, expected none")
