"""A safetensors file that is larger than the memory of the machine, mapped all the same.

Linux refuses a private mapping that may be written and could not be held in memory and swap, unless it is told not to
reserve any. Libraries do not tell it so, hence this.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from search.checkpoints.header import TensorInfo, read_header
from search.checkpoints.tensor_bytes import TORCH_NAMES
from search.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

MAP_NORESERVE = 0x4000
"""Of Linux on all common processors; Python has no name for it before 3.13."""


class LargeFile:
    """The tensors of one file as views of its mapping, copy-on-write like those of other files.

    Raises:
        CheckpointError: it cannot be mapped even so.
    """

    def __init__(self, path: Path) -> None:
        self._tensors = read_header(path)
        flags = getattr(mmap, "MAP_NORESERVE", MAP_NORESERVE) | mmap.MAP_PRIVATE
        try:
            with path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be mapped ({error}); save the model again in several files, with max_shard_size"
            ) from error

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, which keeps the mapping alive."""
        import torch

        info: TensorInfo = self._tensors[name]
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        piece = torch.frombuffer(self._mapping, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        return piece.view(dtype).reshape(info.shape)
