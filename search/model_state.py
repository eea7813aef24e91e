"""What an evaluator must leave alone in a live model, in a form that can be compared."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from search.merge.writing import version_of

if TYPE_CHECKING:
    import torch


def model_state(model: torch.nn.Module) -> dict[str, tuple[object, ...]]:
    """What an evaluator must leave alone: which tensors there are, where, how often written, and their bits.

    Writes through `.data` are not counted by torch, so there is a checksum of the bits in their places. A
    tensor in which a single number changed has another checksum; of other changes, an exchange of rows among
    them, one in billions goes unseen. Reads the model once, which is little beside an evaluation of it.
    """
    import torch

    # Buffers that are not saved belong to the forward pass: some rotary embeddings replace theirs in it.
    tensors = model.state_dict()
    found = [_checksum(tensor.device).of(tensor) for tensor in tensors.values()]
    # Taken from the device together: every single one would wait for it.
    bits: list[int] = torch.stack([checksum.to(found[0].device) for checksum in found]).tolist() if found else []
    # Of a model that is laid over several devices: without them it does not run.
    hooked = tuple(name for name, module in model.named_modules() if "_hf_hook" in vars(module))
    return {
        "": hooked,
        **{
            name: (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, version_of(tensor), bits_of_one)
            for (name, tensor), bits_of_one in zip(tensors.items(), bits, strict=True)
        },
    }


class _Checksum:
    """Checksums of the bytes of tensors on one device, block by block, as whole numbers modulo 2^64.

    The words x of a block are summed with a random odd weight each, and so are the blocks with the powers of
    an odd number: other than a plain sum, this sees what moved. Not x itself, but x + floor(x / 2^32): a change of
    the highest bit (the sign of a float) is 2^63 times the weight, which is the same for all odd weights.
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        # Two buffers: what stays in the cache of a core, or is enough work for an accelerator (16 MiB).
        self._words = 1 << (17 if device.type == "cpu" else 20)
        generator = torch.Generator().manual_seed(0)
        weights = torch.randint(-(2**63), 2**63 - 1, (self._words,), generator=generator)
        self._weights = weights.bitwise_or_(1).to(device)
        self._buffer = torch.empty_like(self._weights)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The checksum, a scalar on the device of the tensor. Copies a tensor that is not contiguous, no other."""
        import torch

        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for start in range(0, flat.numel(), 8 * self._words):
            piece = flat[start : start + 8 * self._words]
            if piece.numel() % 8:
                piece = torch.nn.functional.pad(piece, (0, -piece.numel() % 8))
            elif piece.storage_offset() % 8:
                piece = piece.clone()
            words = piece.view(torch.int64)
            buffer = self._buffer[: words.numel()]
            torch.bitwise_right_shift(words, 32, out=buffer).add_(words).mul_(self._weights[: words.numel()])
            total.mul_(0x5851F42D4C957F2D).add_(buffer.sum())
        return total


@functools.cache
def _checksum(device: torch.device) -> _Checksum:
    return _Checksum(device)
