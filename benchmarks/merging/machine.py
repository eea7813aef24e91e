"""How fast the machine copies memory, and how to time work on its devices."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronize(device: str) -> None:
    """Wait for what was given to the device."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def least_seconds(work: Callable[[int], object], device: str, repeats: int) -> float:
    """The fastest of `repeats` runs; each is told its number, from 1."""
    times = []
    for number in range(1, repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        work(number)
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def copy_bandwidth(size_bytes: int, device: str, repeats: int) -> float:
    """Bytes per second of a copy in memory, reads and writes counted, on as many threads as torch uses."""
    source = torch.ones(size_bytes // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() * 4 / least_seconds(lambda _: target.copy_(source), device, repeats)
