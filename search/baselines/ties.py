"""TIES of all sources (Yadav 2023, https://arxiv.org/abs/2306.01708): a sweep over densities, the paper's 0.2 first.

Lambda, which the paper tunes too, is swept at the best density: downwards from 1, or as `lambdas` lists it.
"""

from __future__ import annotations

from search.ties_sweep import TiesSweep

PLUGIN = TiesSweep("ties", densities=(0.2, 0.5, 1.0))
