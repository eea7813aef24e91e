"""Parts of one tensor on as many threads as torch uses.

Not OpenMP: torch brings a runtime of its own, and two in one process do not get on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

PART_ELEMENTS = 1 << 17
"""Least elements that are worth a thread: some 100 microseconds of work."""

_ALIGNED = 1 << 12

_pool: ThreadPoolExecutor | None = None
_threads = 0
_guard = threading.Lock()


def run_in_parts(elements: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) for ranges that cover [0, elements), at once where that pays.

    Starts are multiples of 4096. What a call raises passes through after all have ended.
    """
    threads = min(torch.get_num_threads(), elements // PART_ELEMENTS)
    if threads < 2:
        work(0, elements)
        return
    step = -(-elements // threads)
    step = -(-step // _ALIGNED) * _ALIGNED
    pool = _pool_of(torch.get_num_threads())
    others = [pool.submit(work, start, min(start + step, elements)) for start in range(step, elements, step)]
    try:
        work(0, min(step, elements))
    finally:
        for other in others:
            other.exception()
    for other in others:
        other.result()


def _pool_of(threads: int) -> ThreadPoolExecutor:
    global _pool, _threads
    with _guard:
        if _pool is None or threads > _threads:
            # One that is in use elsewhere ends with its last task.
            _pool, _threads = ThreadPoolExecutor(threads - 1, thread_name_prefix="merge"), threads
        return _pool


def _forget() -> None:
    """In a forked process there are none of the threads of its parent."""
    global _pool, _threads, _guard
    _pool, _threads, _guard = None, 0, threading.Lock()


os.register_at_fork(after_in_child=_forget)
