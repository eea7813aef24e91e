"""Batches are planned from lengths and names alone."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from evaluators.batching import plan_batches


def test_a_case_by_hand() -> None:
    """7 is too long and goes alone; 4 + 4 fill 8 exactly; 1 would be padded to 4."""
    assert plan_batches([4, 1, 7, 4], ["a", "b", "c", "d"], 8) == [(2,), (0, 3), (1,)]


LENGTHS = st.lists(st.integers(1, 50), max_size=60)


def names_of(lengths: list[int]) -> list[str]:
    return [f"i{n}" for n in range(len(lengths))]


@given(LENGTHS, st.integers(1, 200))
def test_every_sequence_is_in_one_batch_and_padded_batches_keep_the_limit(lengths: list[int], limit: int) -> None:
    plan = plan_batches(lengths, names_of(lengths), limit)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        assert batch
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= limit


@given(LENGTHS, st.integers(1, 200), st.randoms())
def test_the_plan_does_not_depend_on_the_order_of_the_sequences(
    lengths: list[int], limit: int, shuffler: random.Random
) -> None:
    names = names_of(lengths)
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    plan = plan_batches([lengths[i] for i in order], [names[i] for i in order], limit)
    named = [[names[order[i]] for i in batch] for batch in plan]
    assert named == [[names[i] for i in batch] for batch in plan_batches(lengths, names, limit)]


@given(LENGTHS, st.integers(1, 200))
def test_batches_are_full(lengths: list[int], limit: int) -> None:
    """The first sequence of a batch would not have fitted into the batch before."""
    plan = plan_batches(lengths, names_of(lengths), limit)
    for before, after in pairwise(plan):
        assert lengths[before[0]] >= lengths[after[0]]
        assert lengths[before[0]] * (len(before) + 1) > limit
