"""Seeds that derive from the run's seed and a purpose, never from a worker or from the order of arrival."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 32-bit seed for one purpose, such as `derive_seed(run_seed, "bootstrap", 3)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


@contextmanager
def seeded(seed: int, *devices: str) -> Iterator[None]:
    """Run a block with the global generators of torch, NumPy and Python at `seed`, and put them back after it.

    For code of others that draws from them: what it draws must not depend on what ran before.

    Args:
        seed: 32 bits.
        devices: where else than on the CPU the block may draw, all of one kind. Other devices are not touched: asking
            one for the state of its generator makes a context on it, which takes hundreds of megabytes.
    """
    import numpy as np
    import torch

    before = random.getstate(), np.random.get_state()
    with _forked([device for name in devices if (device := torch.device(name)).type != "cpu"]) as generators:
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
def _forked(devices: Sequence[torch.device]) -> Iterator[tuple[Callable[[int], object], ...]]:
    """What seeds torch's generators on the CPU and on `devices`; all are put back afterwards."""
    import torch

    # Not `torch.manual_seed`, which seeds all devices.
    on_cpu = torch.default_generator.manual_seed
    if not devices:
        with torch.random.fork_rng(devices=[]):
            yield (on_cpu,)
        return
    kind = devices[0].type
    module = torch.get_device_module(kind)
    if kind == "mps":  # the only one of its kind: its functions take no device
        state = module.get_rng_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield on_cpu, module.manual_seed
        finally:
            module.set_rng_state(state)
        return
    indices = [module.current_device() if device.index is None else device.index for device in devices]

    def seed_all(seed: int) -> None:
        for index in indices:
            with module.device(index):
                module.manual_seed(seed)

    with torch.random.fork_rng(devices=indices, device_type=kind), module.device(indices[0]):
        yield on_cpu, seed_all
