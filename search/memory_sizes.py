"""What a worker takes and keeps, in bytes, apart from its models."""

from __future__ import annotations

LIBRARY_BYTES = 600 << 20
"""Private memory of a worker in which torch, transformers and Ray are loaded and that has not computed yet."""
CUDA_HOST_BYTES = 2 << 30
"""What CUDA takes of a process's main memory beside that."""
CUDA_CONTEXT_BYTES = 1 << 30
"""What a process takes of a GPU before the first tensor, with the work spaces of the libraries for matrices."""
WORK_SPACE_BYTES = CUDA_CONTEXT_BYTES // 2
"""What of that is not yet taken when a model is laid over several GPUs."""
SCRATCH_ELEMENTS = {False: 1 << 18, True: 1 << 24}
"""Elements of a block of the merge, on the CPU and on a GPU."""
KEPT_PLACEBO_BYTES = 1 << 30
"""Most that a worker keeps of placebos; what is beyond is drawn again whenever it is merged."""
REUSE_BYTES = 4 << 30
"""Most that is kept of hidden states where the config does not say how much."""
DEFAULT_BATCH_TOKENS = 2048
"""Taken for evaluators that have no option `batch_tokens`."""


def gib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 / 10 else f"{nbytes / 2**20:.1f} MiB"
