"""Which sequences go through a model together. Depends on their lengths and names only."""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], names: Sequence[str], batch_tokens: int) -> list[tuple[int, ...]]:
    """Batches of sequences of similar length, the longest first, so that too little memory shows at once.

    The plan is the same for every worker and whatever the order in which the sequences come: what a
    sequence shares a batch with changes the last bits of its scores.

    Args:
        lengths: (n,) tokens of every sequence, at least 1.
        names: (n,) distinct names, which decide among sequences of equal length.
        batch_tokens: most tokens in a batch, padding included; a longer sequence is a batch by itself.

    Returns:
        Batches of indices; every index is in exactly one.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], names[i])):
        # Sorted, the first sequence of a batch is the longest: all others are padded to it.
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return [tuple(batch) for batch in batches]
