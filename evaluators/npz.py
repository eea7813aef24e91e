"""Arrays out of .npz files. The one place that reads them: numpy refuses pickled objects there unless it is told
otherwise, and nobody tells it."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.errors import UserError


def read_arrays(path: Path, names: Sequence[str], expected: str) -> list[NDArray[Any]]:
    """The arrays of these names.

    Args:
        expected: what the file should hold, for messages.

    Raises:
        UserError: no such file, another format, a damaged one, or an array that is missing.
    """
    try:
        with np.load(path) as arrays:
            if not isinstance(arrays, Mapping):
                raise UserError(f"{path}: a single array, expected an .npz file with {expected}")
            for name in names:
                if name not in arrays:
                    found = ", ".join(map(repr, arrays)) or "none"
                    raise UserError(f"{path}: no array '{name}'; expected {expected}, found {found}")
            return [arrays[name] for name in names]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a readable .npz file, maybe it was cut short ({reason})") from error
