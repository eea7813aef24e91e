"""SLERP half way between two sources (Shoemake 1985): all pairs of up to three, else the best two."""

from __future__ import annotations

from search.pair_baseline import PairBaseline

PLUGIN = PairBaseline("slerp", task_vectors=False)
