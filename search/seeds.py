"""Seeds that derive from the run's seed and a purpose, never from a worker or from the order of arrival."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed for one purpose, such as `derive_seed(run_seed, "bootstrap", 3)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with the global generators of torch, NumPy and Python at `seed`, and put them back after it.

    For code of others that draws from them: what it draws must not depend on what ran before.
    """
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
