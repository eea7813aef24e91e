"""Seeds that derive from the run's seed and a purpose, never from a worker or from the order of arrival."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed for one purpose, such as `derive_seed(run_seed, "bootstrap", 3)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Run a block with the global generators of torch, NumPy and Python at `seed`, and put them back after it.

    For code of others that draws from them: what it draws must not depend on what ran before.

    Args:
        seed: 32 bits.
        device: where else than on the CPU the block may draw. Other devices are not touched: asking one for
            the state of its generator makes a context on it, which takes hundreds of megabytes.
    """
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()
    with _forked(torch.device(device)) as generators:
        random.seed(seed)
        np.random.seed(seed)
        for seed_one in generators:
            seed_one(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def _forked(device: torch.device) -> Iterator[tuple[Callable[[int], object], ...]]:
    """What seeds torch's generators on the CPU and on `device`; both are put back afterwards."""
    import torch

    # Not `torch.manual_seed`, which seeds all devices.
    on_cpu = torch.default_generator.manual_seed
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield (on_cpu,)
        return
    module = torch.get_device_module(device.type)
    if device.type == "mps":  # the only one of its kind: its functions take no device
        state = module.get_rng_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield on_cpu, module.manual_seed
        finally:
            module.set_rng_state(state)
        return
    index = module.current_device() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type), module.device(index):
        yield on_cpu, module.manual_seed
