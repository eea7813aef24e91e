"""SLERP of task vectors, half way between two sources: all pairs of up to three, else the best two.

Fine-tunes of one base are nearly parallel as whole tensors, where SLERP becomes linear; their differences from
the base are not.
"""

from __future__ import annotations

from search.pair_baseline import PairBaseline

PLUGIN = PairBaseline("nuslerp", task_vectors=True)
