"""A whole model merged tensor by tensor, several at a time.

Much of what merges need runs on one thread: torch sorts on one, and its short passes gain little from more. So
tensors are merged side by side, as long as those under way together are no larger than twice the largest one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from search.merge.apply import Merger
from search.recipe import Recipe

MOST_AT_ONCE = 8
"""Each has buffers of its own; further threads work within the tensors."""

SMALL_ELEMENTS = 1 << 20
"""Tensors under way together may always have this many elements."""


class _Begun(NamedTuple):
    name: str
    elements: int
    merged: Future[Tensor]


def merge_side_by_side(
    merger: Callable[[], Merger],
    recipe: Recipe,
    sizes: Mapping[str, int],
    *,
    threads: int,
    most_at_once: int = MOST_AT_ONCE,
) -> Generator[tuple[str, Tensor], None, None]:
    """The merged tensors in order, with the bits of `Merger.merge_tensors`.

    Close it to end its threads, which takes as long as the tensors that they are at.

    Args:
        merger: makes the merger of one thread.
        sizes: tensor of the output -> its number of elements.
        threads: CPU threads, of all tensors under way together.
        most_at_once: tensors under way at a time.

    Raises: as `Merger.merge_tensors`.
    """
    workers = min(threads, most_at_once)
    limit = max(SMALL_ELEMENTS, 2 * max(sizes.values(), default=0))
    own = threading.local()

    def merge(name: str, share: int) -> Tensor:
        if not hasattr(own, "merger"):
            own.merger = merger()
        torch.set_num_threads(share)  # of this thread
        ((_, tensor),) = own.merger.merge_tensors(recipe, [name])
        return tensor

    before = torch.get_num_threads()
    waiting, begun, under_way = deque(sizes.items()), deque[_Begun](), 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="merge-tensor")
    try:
        while waiting or begun:
            while waiting and len(begun) < 2 * workers and (not begun or under_way + waiting[0][1] <= limit):
                name, elements = waiting.popleft()
                alone = not waiting and not begun
                share = threads if alone else max(threads // workers, threads * elements // limit)
                begun.append(_Begun(name, elements, pool.submit(merge, name, share)))
                under_way += elements
            first = begun.popleft()
            yield first.name, first.merged.result()
            under_way -= first.elements
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)  # which threads that begin later take after
