"""Arrow arrays of one row, and scores out of Arrow.

They are built from buffers because `pa.array` imports pandas, which takes over a second and is not
needed for anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

ScoreRows = list[tuple[str, NDArray[np.float64]]]
"""Key -> one number per item, in order; the keys are those of the column `scores`."""

_SHORT = 32
"""Texts of so many characters are kept."""


def maker(kind: pa.DataType) -> Callable[[Any], pa.Array]:
    """What makes an array of `kind` with one element that is not null."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        return lambda value: _short(value) if len(value) <= _SHORT else texts([value])
    if pa.types.is_list(kind):
        return lambda value: lists([value], kind)
    if pa.types.is_map(kind):
        return _map_maker(kind)
    if pa.types.is_boolean(kind):
        return lambda value: pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(b"\x01" if value else b"\x00")])
    pack = struct.Struct("<d" if pa.types.is_floating(kind) else "<I" if kind == pa.uint32() else "<q").pack
    return lambda value: pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(pack(value))])


@lru_cache(maxsize=1000)
def _short(value: str) -> pa.Array:
    """Kinds, workers, nodes and the like: the same few in all records."""
    return texts([value])


def _map_maker(kind: pa.DataType) -> Callable[[Any], pa.Array]:
    import pyarrow as pa

    fields, item_type = pa.struct([kind.key_field, kind.item_field]), kind.item_type
    if pa.types.is_list(item_type):
        make_items: Callable[[Any], pa.Array] = partial(lists, kind=item_type)
    elif pa.types.is_string(item_type):
        make_items = texts
    else:
        make_items = lambda values: _floats(np.array(values, np.float64))  # noqa: E731

    def make(value: object) -> pa.Array:
        pairs = list(value.items()) if isinstance(value, Mapping) else list(cast(ScoreRows, value))
        children = [texts([key for key, _ in pairs]), make_items([item for _, item in pairs])]
        entries = pa.Array.from_buffers(fields, len(pairs), [None], children=children)
        offsets = pa.py_buffer(struct.pack("<ii", 0, len(pairs)))
        return pa.Array.from_buffers(kind, 1, [None, offsets], children=[entries])

    return make


def texts(values: Sequence[str]) -> pa.Array:
    """A string array."""
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    buffers = [None, _offsets(encoded), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def lists(values: Sequence[NDArray[np.float64]], kind: pa.DataType) -> pa.Array:
    """An array of lists of float64; `kind` is their list type."""
    import pyarrow as pa

    flat = _floats(np.concatenate([np.zeros(0), *values]))
    return pa.Array.from_buffers(kind, len(values), [None, _offsets(values)], children=[flat])


def _floats(values: NDArray[np.float64]) -> pa.Array:
    import pyarrow as pa

    return pa.Array.from_buffers(pa.float64(), len(values), [None, pa.py_buffer(values.astype("<f8"))])


def _offsets(values: Sequence[Any]) -> pa.Buffer:
    import pyarrow as pa

    return pa.py_buffer(struct.pack(f"<{len(values) + 1}i", 0, *accumulate(map(len, values))))


def score_rows(column: pa.ChunkedArray) -> list[ScoreRows]:
    """The rows of a column of type map<string, list<float64>>; null reads as empty."""
    import pyarrow as pa

    if not len(column):
        return []
    maps = pa.concat_arrays(column.chunks)
    bounds = _numbers(maps.offsets, np.int32)
    blocks = list(zip(maps.keys.to_pylist(), unpack_lists(maps.items), strict=True))
    return [blocks[bounds[i] : bounds[i + 1]] for i in range(len(maps))]


def unpack_lists(lists: pa.ListArray) -> list[NDArray[np.float64]]:
    """The lists of float64 as read-only views; no list may be null."""
    bounds, values = _numbers(lists.offsets, np.int32), _numbers(lists.values, np.float64)
    return [values[bounds[i] : bounds[i + 1]] for i in range(len(lists))]


def _numbers(array: pa.Array, dtype: type) -> NDArray[Any]:
    buffer = array.buffers()[1]
    if buffer is None:
        return np.zeros(0, dtype)
    return np.frombuffer(buffer, dtype)[array.offset : array.offset + len(array)]
